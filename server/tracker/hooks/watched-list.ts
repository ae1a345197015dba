import { watch } from 'node:fs'
import type { FileHandle } from 'node:fs/promises'
import { open, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { setImmediate as turn, setTimeout as pause } from 'node:timers/promises'
import { versionOf } from '../../../lib/runtime/files.ts'
import type { Logger } from '../../../lib/runtime/log.ts'

/** What the entries of one list are collected in. */
export interface EntryList<Entry> {
  readonly size: number
  add(entry: Entry): void
}

export interface ListFormat<Entry, List extends EntryList<Entry>> {
  readonly entriesMax: number
  /** Bytes of the shortest entry with its line feed: with the size of a file, how many entries there can be. */
  readonly lineBytesMin: number
  /** @throws Error saying what is wrong with `text` */
  parse(text: string): Entry
  /** An empty list with room for `capacity` entries; adding one must cost about the same each time. */
  create(capacity: number): List
}

export interface WatchedList<List> extends AsyncDisposable {
  /** The list in force; another object after each change. */
  readonly current: List
  /** When it was read, in milliseconds since 1970. */
  readonly loadedAtMs: number
  /** Why the file as it is now is not in force. */
  readonly fault: string | undefined
}

export interface WatchOptions<Entry, List extends EntryList<Entry>> {
  readonly file: string
  readonly format: ListFormat<Entry, List>
  readonly log: Logger
  readonly now: () => number
  readonly pollMs?: number
  readonly settleMs?: number
}

/** Largest file: five million infohashes are 205 MB. */
export const listBytesMax = 256 * 2 ** 20
/** What a change is noticed by where events do not reach: NFS, a directory that was itself replaced. */
const listPollMs = 2000
/** A file counts once it has stood still for this long; also the least time between two looks at it. */
const listSettleMs = 100
/** Looks at a file that keeps changing before that is logged. */
const settleLooksMax = 100
/** The longest line, too. */
const chunkBytes = 64 * 1024
/** How long parsing may hold up announces at a time. */
const sliceMs = 2
const faultsMax = 10

/**
 * Reads a list, one entry a line; `#` starts a comment at the start of a line or after a blank. From then on the file is
 * followed, by name: edits in place, renames over it and swapped symbolic links all count. A file that is gone or has
 * a bad line is logged, and the list before it stays in force.
 *
 * @throws Error naming each bad line as `file:line`
 */
export async function watchList<Entry, List extends EntryList<Entry>>(
  options: WatchOptions<Entry, List>,
): Promise<WatchedList<List>> {
  const { file, format, log, now, pollMs = listPollMs, settleMs = listSettleMs } = options
  const stop = new AbortController()
  /** The version of the file that was last read. Undefined: it could not be, so try again whatever it looks like. */
  let tried: string | undefined = await versionOf(file)
  let current = await readList(file, format, stop.signal)
  let loadedAtMs = now()
  let fault: string | undefined

  const bell = createBell()
  const unwatch = watchDirectory(
    dirname(file),
    () => {
      bell.ring()
    },
    log,
  )
  // What changed before the directory was watched.
  bell.ring()
  const following = follow()
  return {
    get current() {
      return current
    },
    get loadedAtMs() {
      return loadedAtMs
    },
    get fault() {
      return fault
    },
    [Symbol.asyncDispose]: async () => {
      stop.abort()
      bell.ring()
      unwatch()
      await following
    },
  }

  async function follow(): Promise<void> {
    try {
      for (;;) {
        await bell.rung(pollMs)
        const version = await settled()
        if (version === tried) continue
        await reload(version)
      }
    } catch (error) {
      if (!stop.signal.aborted) throw error
    }
  }

  /** The version of the file once two looks agree, or none is needed since it was tried. */
  async function settled(): Promise<string> {
    await pause(settleMs, undefined, { signal: stop.signal, ref: false })
    let version = await versionOf(file)
    for (let looks = 1; version !== tried; looks++) {
      await pause(settleMs, undefined, { signal: stop.signal, ref: false })
      const again = await versionOf(file)
      if (again === version) break
      version = again
      if (looks === settleLooksMax) log.warn({ file }, 'list keeps changing; the one before stays in force')
    }
    return version
  }

  async function reload(version: string): Promise<void> {
    const startMs = now()
    const outcome = await readList(file, format, stop.signal).then(
      (list) => ({ list }),
      (error: unknown) => ({ error }),
    )
    stop.signal.throwIfAborted()
    if ((await versionOf(file)) !== version) {
      bell.ring()
      return
    }
    if ('list' in outcome) {
      current = outcome.list
      loadedAtMs = now()
      tried = version
      fault = undefined
      log.info({ file, entries: current.size, tookMs: loadedAtMs - startMs }, 'list loaded')
    } else {
      const { error } = outcome
      tried = error instanceof ListFaults ? version : undefined
      const message = error instanceof Error ? error.message : String(error)
      if (message !== fault)
        log.error({ file, fault: message }, 'list not loaded; the one before stays in force')
      fault = message
    }
  }
}

/** What is wrong with the content of a file. */
class ListFaults extends Error {
  override readonly name = 'ListFaults'
}

async function readList<Entry, List extends EntryList<Entry>>(
  file: string,
  format: ListFormat<Entry, List>,
  signal: AbortSignal,
): Promise<List> {
  try {
    const found = await stat(file)
    if (!found.isFile()) throw new Error('it is not a file')
    if (found.size > listBytesMax)
      throw new Error(`it has ${found.size} bytes, and a list has at most ${listBytesMax}`)
    await using handle = await open(file, 'r')
    return await readEntries(file, handle, found.size, format, signal)
  } catch (error) {
    if (error instanceof ListFaults) throw error
    throw new Error(`Cannot read list ${file}: ${error instanceof Error ? error.message : String(error)}`, {
      cause: error,
    })
  }
}

async function readEntries<Entry, List extends EntryList<Entry>>(
  file: string,
  handle: FileHandle,
  size: number,
  format: ListFormat<Entry, List>,
  signal: AbortSignal,
): Promise<List> {
  const capacity = Math.min(format.entriesMax, Math.floor(size / format.lineBytesMin) + 1)
  const list = format.create(capacity)
  const faults: string[] = []
  let number = 0
  let sliceStartMs = performance.now()
  for await (const lines of wholeLines(file, handle, size)) {
    signal.throwIfAborted()
    for (const line of lines) {
      number++
      const fault = addLine(line, format, list, capacity)
      if (fault !== undefined) faults.push(`${file}:${number}: ${fault}`)
      if (faults.length === faultsMax) throw faultsError(file, faults)
      if (number % 64 === 0 && performance.now() - sliceStartMs > sliceMs) {
        await turn()
        sliceStartMs = performance.now()
      }
    }
  }
  if (faults.length > 0) throw faultsError(file, faults)
  return list
}

/** Says what is wrong with a line, if anything is. */
function addLine<Entry, List extends EntryList<Entry>>(
  line: string,
  format: ListFormat<Entry, List>,
  list: List,
  capacity: number,
): string | undefined {
  const text = (line.includes('#') ? line.replace(/(^|\s)#[^]*$/, '') : line).trim()
  if (text === '') return undefined
  if (list.size === capacity) return `there are more than ${capacity} entries`
  try {
    list.add(format.parse(text))
    return undefined
  } catch (error) {
    return error instanceof Error ? error.message : String(error)
  }
}

function faultsError(file: string, faults: readonly string[]): ListFaults {
  return new ListFaults(`Cannot use list ${file}:\n${faults.map((fault) => `  ${fault}`).join('\n')}`)
}

/** The first `size` bytes, as runs of whole lines. What is added meanwhile is another version of the file. */
async function* wholeLines(file: string, handle: FileHandle, size: number): AsyncGenerator<string[]> {
  const buffer = Buffer.allocUnsafe(chunkBytes)
  let kept = 0
  let number = 1
  for (let position = 0; ;) {
    const wanted = Math.min(chunkBytes - kept, size - position)
    const { bytesRead } = await handle.read(buffer, kept, wanted, position)
    const filled = buffer.subarray(0, kept + bytesRead)
    position += bytesRead
    if (bytesRead === 0) {
      if (filled.length > 0) yield split(filled)
      return
    }
    const end = filled.lastIndexOf(0x0a)
    if (end === -1 && filled.length === chunkBytes)
      throw faultsError(file, [`${file}:${number}: the line has more than ${chunkBytes - 1} bytes`])
    if (end !== -1) {
      const lines = split(filled.subarray(0, end))
      number += lines.length
      yield lines
    }
    kept = filled.length - (end + 1)
    buffer.copyWithin(0, end + 1, filled.length)
  }
}

function split(bytes: Buffer): string[] {
  return bytes.toString('utf8').split('\n')
}

/** Rings when anything in the directory changes. Where that cannot be watched, the poll has to do. */
function watchDirectory(directory: string, ring: () => void, log: Logger): () => void {
  const failed = (err: unknown) =>
    log.warn({ err, directory }, 'directory cannot be watched; its lists are polled')
  try {
    const watcher = watch(directory, { persistent: false }, ring)
    watcher.on('error', failed)
    return () => {
      watcher.close()
    }
  } catch (err) {
    failed(err)
    return () => undefined
  }
}

/** One sleeper that is woken early by `ring()`; a ring while it is awake counts for its next sleep. */
function createBell(): { ring(): void; rung(timeoutMs: number): Promise<void> } {
  let rang = false
  let wake: () => void = () => undefined
  return {
    ring: () => {
      rang = true
      wake()
    },
    rung: async (timeoutMs) => {
      if (!rang) {
        await new Promise<void>((resolve) => {
          const timer = setTimeout(resolve, timeoutMs).unref()
          wake = () => {
            clearTimeout(timer)
            resolve()
          }
        })
      }
      rang = false
    },
  }
}
