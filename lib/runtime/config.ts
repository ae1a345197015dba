import { readFile } from 'node:fs/promises'
import type { Document } from 'yaml'
import { LineCounter, isMap, parseDocument } from 'yaml'
import { z } from 'zod'

/** A configuration that cannot be used; `faults` names every one with its place: `server.yaml:3:9 http.addr: …`. */
export class ConfigError extends Error {
  override readonly name = 'ConfigError'
  readonly faults: readonly string[]

  constructor(faults: readonly string[], options?: ErrorOptions) {
    super(`Cannot use the configuration:\n${faults.map((fault) => `  ${fault}`).join('\n')}`, options)
    this.faults = faults
  }
}

/**
 * Reads a YAML file (1.2; anchors and unknown tags refused) against a schema whose sections are strict.
 * Nothing is repaired: every fault is reported, all at once.
 *
 * @throws ConfigError
 */
export async function loadConfig<Schema extends z.ZodType>(
  schema: Schema,
  file: string,
): Promise<z.output<Schema>> {
  let text: string
  try {
    text = await readFile(file, 'utf8')
  } catch (cause) {
    throw new ConfigError([`${file}: cannot be read: ${(cause as Error).message}`], { cause })
  }
  return parseConfig(schema, text, file)
}

/** Like `loadConfig`, for text at hand. `file` only names it in faults. */
export function parseConfig<Schema extends z.ZodType>(
  schema: Schema,
  text: string,
  file: string,
): z.output<Schema> {
  const lineCounter = new LineCounter()
  const document = parseDocument(text, { lineCounter, prettyErrors: false, uniqueKeys: true, version: '1.2' })
  const at = (offset: number | undefined) => {
    if (offset === undefined) return file
    const { line, col } = lineCounter.linePos(offset)
    return `${file}:${line}:${col}`
  }
  const problems = [...document.errors, ...document.warnings]
  if (problems.length > 0)
    throw new ConfigError(problems.map(({ pos, message }) => `${at(pos[0])} ${message}`))
  const parsed = schema.safeParse(document.toJS({ maxAliasCount: 0 }) ?? {})
  if (parsed.success) return parsed.data
  throw new ConfigError(
    parsed.error.issues.flatMap((issue) =>
      faultsOf(issue).map(
        ({ path, message }) => `${at(offsetOf(document, path))} ${path.join('.')}: ${message}`,
      ),
    ),
  )
}

/** What is wrong with settings at hand, each fault with its place (`http.addr: …`), or what they mean. */
export function checkConfig<Schema extends z.ZodType>(
  schema: Schema,
  settings: unknown,
): { config: z.output<Schema> } | { faults: string[] } {
  const parsed = schema.safeParse(settings)
  if (parsed.success) return { config: parsed.data }
  return {
    faults: parsed.error.issues.flatMap((issue) =>
      faultsOf(issue).map(({ path, message }) => `${path.join('.') || 'settings'}: ${message}`),
    ),
  }
}

/** A text that `parse` accepts; its message becomes the fault. */
export function parsed<Value>(parse: (text: string) => Value) {
  return z.string().transform((text, context) => {
    try {
      return parse(text)
    } catch (error) {
      context.addIssue({ code: 'custom', message: error instanceof Error ? error.message : String(error) })
      return z.NEVER
    }
  })
}

/** `90s`, `30m`, `15d`, `250ms` … as milliseconds. */
export function duration() {
  return z
    .string()
    .regex(/^\d+(\.\d+)?(ms|s|m|h|d)$/, 'need a duration such as 250ms, 10s, 30m, 12h or 7d')
    .transform(
      (text) => Number.parseFloat(text) * (durationUnits.get(text.replace(/^[\d.]+/, '')) ?? Number.NaN),
    )
}

/** `512KiB`, `256MiB`, `20GiB`, `1.5GB` … as bytes. */
export function size() {
  return z
    .string()
    .regex(
      /^\d+(\.\d+)?(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)$/,
      'need a size such as 64KiB, 256MiB, 20GiB or 1.5GB',
    )
    .transform((text) =>
      Math.round(Number.parseFloat(text) * (sizeUnits.get(text.replace(/^[\d.]+/, '')) ?? Number.NaN)),
    )
}

/** `10Gb` (bits a second) or `100MiB`, `1.25GB` (bytes a second), as bytes a second. */
export function rate() {
  return z
    .string()
    .regex(
      /^\d+(\.\d+)?([KMGT]b|[KMGT]i?B|b|B)$/,
      'need a rate such as 10Gb (bits) or 100MiB (bytes), a second',
    )
    .transform((text) => {
      const unit = text.replace(/^[\d.]+/, '')
      const factor = unit.includes('i') ? 1024 : 1000
      const power = ['', 'K', 'M', 'G', 'T'].indexOf(unit.replace(/i?[bB]$/, ''))
      return (Number.parseFloat(text) * factor ** power) / (unit.endsWith('b') ? 8 : 1)
    })
}

const durationUnits = new Map([
  ['ms', 1],
  ['s', 1000],
  ['m', 60_000],
  ['h', 3_600_000],
  ['d', 86_400_000],
])

const sizeUnits = new Map([
  ['B', 1],
  ['KiB', 2 ** 10],
  ['MiB', 2 ** 20],
  ['GiB', 2 ** 30],
  ['TiB', 2 ** 40],
  ['KB', 1e3],
  ['MB', 1e6],
  ['GB', 1e9],
  ['TB', 1e12],
])

type Path = readonly PropertyKey[]

function faultsOf(issue: z.core.$ZodIssue): { path: Path; message: string }[] {
  if (issue.code === 'unrecognized_keys') {
    return issue.keys.map((key) => ({ path: [...issue.path, key], message: 'there is no such setting' }))
  }
  if (issue.code === 'invalid_union') {
    // Of several forms the one that was meant: the only one whose faults are not that it is something else altogether.
    const [meant, ...others] = issue.errors.filter(
      (faults) => !faults.some(({ code, path }) => code === 'invalid_type' && path.length === 0),
    )
    if (meant && others.length === 0)
      return meant.flatMap((inner) => faultsOf({ ...inner, path: [...issue.path, ...inner.path] }))
  }
  return [{ path: issue.path, message: issue.message }]
}

/** Where a setting stands: its key if it is there, else the nearest parent that is. */
function offsetOf(document: Document, path: Path): number | undefined {
  for (let length = path.length; length > 0; length--) {
    const parent = length === 1 ? document.contents : document.getIn(path.slice(0, length - 1), true)
    const name = path[length - 1]
    if (isMap(parent)) {
      const pair = parent.items.find(({ key }) => (key as { value?: unknown } | null)?.value === name)
      const range = (pair?.key as { range?: [number, number, number] } | undefined)?.range
      if (range) return range[0]
    } else {
      const node = document.getIn(path.slice(0, length), true) as
        { range?: [number, number, number] } | undefined
      if (node?.range) return node.range[0]
    }
  }
  return undefined
}
