import { resolve } from 'node:path'
import { z } from 'zod'
import type { HookDeps, PreHook } from '../hooks.ts'
import type { EntryList, ListFormat } from './watched-list.ts'
import { watchList } from './watched-list.ts'

export type ListKind = 'whitelist' | 'blacklist'

/** How a list stands, for metrics. */
export interface ListStatus {
  readonly kind: ListKind
  /** Undefined for one that stands in the configuration. */
  readonly file: string | undefined
  readonly entries: number
  /** Milliseconds since 1970. */
  readonly loadedAtMs: number
  /** Why the file as it is now is not in force, while the list before it is. */
  readonly fault: string | undefined
}

export interface ListHook extends PreHook {
  readonly list: ListStatus
}

/** A whitelist or a blacklist, whichever the options name. */
export interface ApprovalList<List> extends ListStatus, AsyncDisposable {
  readonly current: List
}

/** Entries in the configuration itself; more belong in a file, which is followed and read in slices. */
const inlineMax = 10_000

/** The options of a hook that has one list: of `what`, each written as `entry` in the configuration, as `line` in a file. */
export function listOptions<Entry extends z.ZodType>(
  entry: Entry,
  { what, line }: { what: string; line: string },
) {
  const inline = z.array(entry).min(1, 'an empty list: take the setting out, or name an entry').max(inlineMax)
  const file = z.string().min(1)
  const lines = `${line} a line, with # comments. Changes count within seconds, without a restart; a file with a bad line is logged and the list before it stays in force.`
  return z
    .strictObject({
      whitelist: inline.optional().describe(`Only these ${what} are approved.`),
      blacklist: inline.optional().describe(`All ${what} but these are approved.`),
      whitelist_file: file.optional().describe(`The same in a file: ${lines}`),
      blacklist_file: file.optional().describe(`The same in a file, as for \`whitelist_file\`.`),
    })
    .superRefine((options, context) => {
      const white = [options.whitelist, options.whitelist_file].filter((list) => list !== undefined)
      const black = [options.blacklist, options.blacklist_file].filter((list) => list !== undefined)
      const fault = (message: string) => {
        context.addIssue({ code: 'custom', message })
      }
      if (white.length > 0 && black.length > 0) fault('using both whitelist and blacklist is invalid')
      if (white.length > 1) fault('using both whitelist and whitelist_file is invalid')
      if (black.length > 1) fault('using both blacklist and blacklist_file is invalid')
      if (white.length + black.length === 0)
        fault('need one of whitelist, blacklist, whitelist_file and blacklist_file')
    })
}

/** @throws Error naming each bad line of a file */
export async function openList<Entry, List extends EntryList<Entry>>(
  options: {
    readonly whitelist?: readonly Entry[] | undefined
    readonly blacklist?: readonly Entry[] | undefined
    readonly whitelist_file?: string | undefined
    readonly blacklist_file?: string | undefined
  },
  format: ListFormat<Entry, List>,
  { log, now }: HookDeps,
): Promise<ApprovalList<List>> {
  const kind =
    options.whitelist === undefined && options.whitelist_file === undefined ? 'blacklist' : 'whitelist'
  const file = options[`${kind}_file`]
  if (file === undefined) return inlineList(kind, options[kind] ?? [], format, now())
  const absolute = resolve(file)
  const watched = await watchList({ file: absolute, format, log, now })
  return {
    kind,
    file: absolute,
    get current() {
      return watched.current
    },
    get entries() {
      return watched.current.size
    },
    get loadedAtMs() {
      return watched.loadedAtMs
    },
    get fault() {
      return watched.fault
    },
    [Symbol.asyncDispose]: () => watched[Symbol.asyncDispose](),
  }
}

function inlineList<Entry, List extends EntryList<Entry>>(
  kind: ListKind,
  entries: readonly Entry[],
  format: ListFormat<Entry, List>,
  loadedAtMs: number,
): ApprovalList<List> {
  const current = format.create(entries.length)
  for (const entry of entries) current.add(entry)
  return {
    kind,
    file: undefined,
    current,
    entries: current.size,
    loadedAtMs,
    fault: undefined,
    [Symbol.asyncDispose]: () => Promise.resolve(),
  }
}
