import { closeSync, fstatSync, openSync, readFileSync } from 'node:fs'
import { Worker } from 'node:worker_threads'
import { parseCidr, readCidr } from '../../lib/protocol/cidr.ts'
import { isPlace, parsePlace } from '../../lib/protocol/place.ts'
import { ConfigError } from '../../lib/runtime/config.ts'
import type { PrefixRule, PrefixTable } from './prefix-table.ts'
import { createPrefixTableBuilder } from './prefix-table.ts'
import type { PrefixEntry } from './topology.ts'
import { describeSource, sourceOfPrefix } from './topology.ts'

/** To the thread that reads, and from it. */
export interface PlaceTableOrder {
  readonly file: string
  readonly prefixes: readonly PrefixEntry[]
}

export type PlaceTableAnswer = { readonly table: PrefixTable } | { readonly faults: readonly string[] }

export interface TableBounds {
  readonly networksMax: number
  readonly bytesMax: number
}

/** So many take 450 MB more for three seconds while they are read, and 46 MB in each thread from then on. */
const tableBounds: TableBounds = { networksMax: 1_000_000, bytesMax: 64 * 2 ** 20 }

/** Faults that are shown; of the others there is the number. */
const faultsShown = 20

/** A disk that does not answer must not hold up reloads for ever. */
const readTimeoutMs = 60_000

/**
 * Reads a CSV file, `10.2.17.0/24,r17` a line, and compiles it with the entries of `topology.prefixes`. The first line may be
 * `cidr,place`; `#` begins a comment at the start of a line or after a blank. A thread of its own does it: announces do not wait.
 *
 * @throws ConfigError with all faults, as `file:line: …`
 */
export async function readPlaceTable(file: string, prefixes: readonly PrefixEntry[]): Promise<PrefixTable> {
  const worker = new Worker(new URL('./place-table-worker.ts', import.meta.url), {
    workerData: { file, prefixes } satisfies PlaceTableOrder,
  })
  const answered = Promise.withResolvers<PlaceTableAnswer>()
  const failed = (what: string, cause?: unknown) => {
    answered.reject(unreadable(file, what, cause))
  }
  worker.once('message', answered.resolve)
  worker.once('error', (error) => {
    failed(error instanceof Error ? error.message : String(error), error)
  })
  worker.once('exit', () => {
    failed('the thread that reads it ended')
  })
  const timer = setTimeout(failed, readTimeoutMs, `it took more than ${readTimeoutMs / 1000} s`)
  try {
    const answer = await answered.promise
    if ('faults' in answer) throw new ConfigError(answer.faults)
    return answer.table
  } finally {
    clearTimeout(timer)
    await worker.terminate()
  }
}

/** The same in this thread. */
export function loadPlaceTable(
  file: string,
  prefixes: readonly PrefixEntry[],
  bounds: TableBounds = tableBounds,
): PrefixTable {
  return parsePlaceTable(readTable(file, bounds), file, prefixes, bounds)
}

function unreadable(file: string, what: string, cause: unknown): ConfigError {
  return new ConfigError([`topology.table: cannot read ${file}: ${what}`], { cause })
}

function readTable(file: string, { bytesMax }: TableBounds): string {
  let descriptor: number | undefined
  try {
    descriptor = openSync(file, 'r')
    const before = fstatSync(descriptor)
    if (!before.isFile()) throw new Error('it is not a file')
    if (before.size > bytesMax)
      throw new Error(`it has ${before.size} bytes, and a table has at most ${bytesMax}`)
    const text = readFileSync(descriptor, 'utf8')
    const after = fstatSync(descriptor)
    if (after.size !== before.size || after.mtimeMs !== before.mtimeMs)
      throw new Error('it changed meanwhile; write a new file and rename it over the old one')
    return text
  } catch (error) {
    throw unreadable(file, (error as Error).message, error)
  } finally {
    if (descriptor !== undefined) closeSync(descriptor)
  }
}

/** @throws ConfigError */
export function parsePlaceTable(
  text: string,
  file: string,
  prefixes: readonly PrefixEntry[],
  { networksMax }: TableBounds = tableBounds,
): PrefixTable {
  const builder = createPrefixTableBuilder()
  for (const [i, { cidr, place }] of prefixes.entries()) builder.add(cidr, place, sourceOfPrefix(i))
  const faults: { readonly line: number; readonly what: string }[] = []
  let uncounted = 0
  const tell = (line: number, what: () => string) => {
    if (faults.length < faultsShown) faults.push({ line, what: what() })
    else uncounted++
  }
  let line = 0
  let mayBeHeader = true
  for (let at = 0; at < text.length;) {
    const feed = text.indexOf('\n', at)
    const end = feed === -1 ? text.length : feed
    const content = contentOf(text.slice(at, end))
    at = end + 1
    line++
    if (content === '') continue
    if (mayBeHeader) {
      mayBeHeader = false
      if (isHeader.test(content)) continue
    }
    const comma = content.indexOf(',')
    const network = fieldOf(content.slice(0, comma))
    const place = fieldOf(content.slice(comma + 1))
    const cidr = comma === -1 || place.includes(',') ? undefined : readCidr(network)
    if (cidr === undefined || !isPlace(place)) tell(line, () => faultOf(content, network, place))
    else if (builder.size >= networksMax + prefixes.length) {
      tell(line, () => `a table has at most ${networksMax} networks; what follows was not read`)
      break
    } else builder.add(cidr, place, line)
  }
  const { table, conflicts } = builder.build()
  for (const { first, second } of conflicts.examples) tell(second.source, () => conflictOf(first, second))
  const more = uncounted + Math.max(0, conflicts.count - conflicts.examples.length)
  if (faults.length === 0) return table
  faults.sort((a, b) => a.line - b.line)
  throw new ConfigError([
    ...faults.map(({ line, what }) => `${file}:${line}: ${what}`),
    ...(more > 0 ? [`${file}: and ${more} faults more`] : []),
  ])
}

const isHeader = /^"?cidr"?\s*,\s*"?place"?$/i

/** A line without its comment and what is blank around it; a byte order mark is. */
function contentOf(line: string): string {
  return (line.includes('#') ? line.replace(/(^|\s)#[^]*$/, '') : line).trim()
}

function fieldOf(text: string): string {
  const field = text.trim()
  return field.length > 1 && field.startsWith('"') && field.endsWith('"') ? field.slice(1, -1).trim() : field
}

function faultOf(content: string, network: string, place: string): string {
  const fields = content.split(',').length
  if (fields !== 2)
    return `need a network and its place, such as 10.2.17.0/24,r17: got ${fields} field${fields === 1 ? '' : 's'}: ${JSON.stringify(content.slice(0, 80))}`
  try {
    parseCidr(network)
    parsePlace(place)
  } catch (error) {
    return (error as Error).message
  }
  return `cannot read ${JSON.stringify(content.slice(0, 80))}`
}

function conflictOf(first: PrefixRule, second: PrefixRule): string {
  return `${second.network} is given as ${second.place} here, and as ${first.place} in ${describeSource(first)}: keep one of the two`
}
