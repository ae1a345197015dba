import type { StateEntry, StateStore } from './state-store.ts'
import { VersionConflict } from './state-store.ts'

const pageSize = 1000

/** Every entry below a prefix, page by page: what is removed meanwhile keeps none from being seen. */
export async function* entriesOf(
  state: StateStore,
  prefix: string,
  signal?: AbortSignal,
): AsyncGenerator<StateEntry> {
  for (let after = ''; ;) {
    signal?.throwIfAborted()
    const page = await state.list(prefix, { after, limit: pageSize })
    yield* page
    const last = page.at(-1)
    if (last === undefined || page.length < pageSize) return
    after = last.key
  }
}

/** Removes an entry as it was read; one that somebody has written since stays. @returns whether it went */
export async function removeUnchanged(
  state: StateStore,
  { key, version }: Pick<StateEntry, 'key' | 'version'>,
): Promise<boolean> {
  try {
    return await state.delete(key, { ifVersion: version })
  } catch (error) {
    if (error instanceof VersionConflict) return false
    throw error
  }
}

/** Removes the entries below a prefix that `isOver` says so of. @returns how many */
export async function sweepEntries(
  state: StateStore,
  prefix: string,
  isOver: (value: unknown) => boolean,
  signal: AbortSignal,
): Promise<number> {
  let removed = 0
  for await (const entry of entriesOf(state, prefix, signal))
    if (isOver(entry.value) && (await removeUnchanged(state, entry))) removed++
  return removed
}
