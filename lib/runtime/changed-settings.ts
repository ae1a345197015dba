/** Paths of settings that differ: `storage.config.peers_max`; a section that is only there once is one difference. */
function changedSettings(before: unknown, after: unknown, path = ''): string[] {
  if (!isSection(before) || !isSection(after))
    return JSON.stringify(before) === JSON.stringify(after) ? [] : [path]
  return [...new Set([...Object.keys(before), ...Object.keys(after)])].flatMap((key) =>
    changedSettings(before[key], after[key], path === '' ? key : `${path}.${key}`),
  )
}

/** Settings that are not as they were at the start, and that a reload does not put in force; `live` are those that it does, or sections of them. */
export function restartNeeded(start: unknown, next: unknown, live: readonly string[]): string[] {
  return changedSettings(start, next).filter(
    (path) => !live.some((setting) => path === setting || path.startsWith(`${setting}.`)),
  )
}

function isSection(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
