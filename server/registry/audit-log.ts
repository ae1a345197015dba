import { createHash } from 'node:crypto'
import type { FileHandle } from 'node:fs/promises'
import { open, readFile, readdir, rename, unlink } from 'node:fs/promises'
import { join } from 'node:path'
import { LRUCache } from 'lru-cache'
import { chainStart, hashOfLine, parseLink } from '../../lib/protocol/audit-chain.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import { errorCode, ignoreMissing, isMissing, syncDirectory } from '../../lib/runtime/files.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import { createTurn } from '../../lib/runtime/turn.ts'
import { ApiError } from './api-error.ts'

/** A closed set: people search for these words. */
export type AuditAction =
  | 'manifest.put'
  | 'manifest.delete'
  | 'blob.delete'
  | 'tag.move'
  | 'tag.delete'
  | 'gc'
  | 'gc.removed'
  | 'pin.put'
  | 'pin.remove'
  | 'token.create'
  | 'token.exchange'
  | 'token.revoke'
  | 'announce-token.create'
  | 'bootstrap.create'
  | 'bootstrap.revoke'
  | 'host.enrol'
  | 'host.renew'
  | 'host.revoke'
  | 'host.forget'
  | 'key.create'
  | 'key.activate'
  | 'key.remove'
  | 'key.rotate'
  | 'key.revoke'
  | 'key.import'
  | 'torrent.revoke'
  | 'torrent.unrevoke'
  | 'audit.repair'

export interface AuditEntry {
  readonly who: {
    /** `api`, `host`, `access`, `bootstrap`, `oidc`, `anonymous`; `server` is this server by itself, `upstream` what another registry has. */
    readonly kind: string
    readonly name: string
    /** Id of the credential, never the credential. */
    readonly credential?: string | undefined
  }
  /** Where it was asked from. */
  readonly address?: string | undefined
  readonly action: AuditAction
  /** On what: `web:1.2.3`, a host, the id of a token, an infohash. */
  readonly target: string
  readonly details?: Readonly<Record<string, unknown>> | undefined
}

/**
 * What was done, by whom: JSON lines in `data_dir/audit.log` (0600), each with the SHA-256 of the one before, so that a line
 * that was changed or removed shows. A line is written and synced before the act: a crash may leave a line of an act that was
 * not completed, never an act without its line.
 */
export interface AuditLog extends AsyncDisposable {
  /** Writes the line, and then does the work; work that fails has a second line that says so. Rejects with ApiError where the line cannot be written: then nothing is done. */
  around<Result>(entry: AuditEntry, work: () => Promise<Result>): Promise<Result>
  /** Lines as they stand, oldest first, after line `after` and not before `sinceMs`. */
  read(asked: AuditAsk): Promise<AuditPage>
  /** Entries that wait for the disk; bounded. */
  readonly waiting: number
  /** Entries that could not be written. */
  readonly failures: number
}

export interface AuditAsk {
  readonly after: number
  readonly sinceMs: number
  readonly limit: number
}

export interface AuditPage {
  readonly lines: string[]
  /** Where the next page begins; undefined where this one is the last. */
  readonly next: number | undefined
}

export interface AuditLogOptions {
  readonly directory: string
  /** A file that would grow beyond it is put aside. */
  readonly fileMaxBytes: number
  /** Files kept, the one that is written included; the oldest goes. */
  readonly filesMax: number
  /** Milliseconds since 1970. */
  readonly now: () => number
  readonly log: Logger
}

/** Entries that wait while a batch is synced; further ones are told that the server is busy. */
const waitingMax = 2000
/** Written with one sync. */
const batchMax = 200
const pageBytesMax = 1024 * 1024
const readBytes = 256 * 1024
const currentName = 'audit.log'
/** Logs of other servers that are read on from where a page ended. */
const readersMax = 100

interface Waiting {
  readonly entry: AuditEntry & { readonly outcome: 'allowed' | 'failed'; readonly of?: number }
  readonly resolve: (seq: number) => void
  readonly reject: (error: Error) => void
}

interface File {
  readonly path: string
  /** The number of its first line. */
  readonly firstSeq: number
}

/**
 * Opens the log and goes on with its chain. What a crash left behind the last whole line was never acknowledged: it is cut
 * off, and a line says so.
 *
 * @throws Error naming a file that is no audit log
 */
export async function openAuditLog(options: AuditLogOptions): Promise<AuditLog> {
  const { directory, now, log } = options
  const current = join(directory, currentName)
  const found = await findEnd(directory)
  let { head, sizeBytes, firstSeq } = found
  let handle = await open(current, 'a', 0o600)
  await syncDirectory(directory)
  /** Pages are not read while files are renamed. */
  const filesTurn = createTurn()
  const waiting: Waiting[] = []
  let writing = false
  let written = Promise.resolve()
  let broken: Error | undefined
  let failures = 0
  const reader = createAuditReader(directory, () => ({ seq: head.seq, sizeBytes, firstSeq }))

  const append = (entry: Waiting['entry']): Promise<number> =>
    new Promise((resolve, reject) => {
      if (waiting.length >= waitingMax) {
        failures++
        reject(unwritable(new Error(`${waitingMax} entries wait already`)))
        return
      }
      waiting.push({ entry, resolve, reject })
      if (!writing) written = writeAll()
    })

  const writeAll = async (): Promise<void> => {
    writing = true
    while (waiting.length > 0) {
      const batch = waiting.splice(0, batchMax)
      try {
        const first = await write(batch)
        for (const [i, { resolve }] of batch.entries()) resolve(first + i)
      } catch (error) {
        failures += batch.length
        log.error({ err: error, entries: batch.length }, 'audit log cannot be written: calls are refused')
        for (const { reject } of batch) reject(unwritable(error))
      }
    }
    writing = false
  }

  /** @returns the number of the first line */
  const write = async (batch: readonly Waiting[]): Promise<number> => {
    if (broken) throw broken
    const first = head.seq + 1
    let next = head
    const lines = batch.map(({ entry }) => {
      const { who, address, action, target, outcome, of, details } = entry
      const time = new Date(now()).toISOString()
      const link = { seq: next.seq + 1, time, prev: next.hash }
      const line = JSON.stringify({ ...link, who, address, action, target, outcome, of, details })
      next = { seq: link.seq, hash: hashOfLine(line) }
      return line
    })
    const bytes = Buffer.from(`${lines.join('\n')}\n`)
    if (sizeBytes > 0 && sizeBytes + bytes.length > options.fileMaxBytes) await filesTurn(putAside)
    await appendSynced(bytes)
    if (sizeBytes === 0) firstSeq = first
    sizeBytes += bytes.length
    head = next
    return first
  }

  const appendSynced = async (bytes: Buffer): Promise<void> => {
    try {
      await handle.writeFile(bytes)
    } catch (error) {
      // What a full disk took of it would stand in the way of the next line.
      await handle.truncate(sizeBytes).catch((cause: unknown) => {
        broken = new Error('half a line cannot be taken back', { cause })
      })
      throw error
    }
    await handle.datasync().catch((cause: unknown) => {
      // What is on the disk after a sync that failed nobody can tell; the next start looks.
      broken = new Error('the disk has lost what was written', { cause })
      throw broken
    })
  }

  const putAside = async (): Promise<void> => {
    const aside = join(directory, asideName(firstSeq))
    // Where the file was put aside and the new one could not be opened, it is already there.
    await rename(current, aside).catch(ignoreMissing)
    const fresh = await open(current, 'a', 0o600)
    await syncDirectory(directory)
    await handle.close()
    handle = fresh
    sizeBytes = 0
    reader.forget()
    const old = (await listFiles(directory)).slice(0, -(options.filesMax - 1) || undefined)
    for (const { path } of old)
      await unlink(path).catch((error: unknown) => {
        log.warn({ err: error, file: path }, 'an old audit log stays')
      })
  }

  if (found.torn.length > 0) {
    await handle.truncate(sizeBytes)
    const bytes = found.torn.length
    log.warn({ file: current, bytes }, 'audit log ended in the middle of a line: it was cut off')
    await append({
      who: { kind: 'server', name: 'start' },
      action: 'audit.repair',
      target: currentName,
      outcome: 'allowed',
      details: { bytes, sha256: createHash('sha256').update(found.torn).digest('hex') },
    }).catch((error: unknown) => {
      log.warn({ err: error }, 'the repair of the audit log has no line')
    })
  }
  return {
    around: async (entry, work) => {
      const of = await append({ ...entry, outcome: 'allowed' })
      try {
        return await work()
      } catch (error) {
        const reason =
          error instanceof ApiError || error instanceof ClientError ? error.message : 'internal error'
        await append({ ...entry, outcome: 'failed', of, details: { reason: reason.slice(0, 300) } }).catch(
          (cause: unknown) => {
            log.error({ err: cause, of }, 'that an act failed is not in the audit log')
          },
        )
        throw error
      }
    },
    read: (asked) => filesTurn(() => reader.read(asked)),
    get waiting() {
      return waiting.length
    },
    get failures() {
      return failures
    },
    [Symbol.asyncDispose]: async () => {
      await written
      await handle.close()
    },
  }
}

interface AuditReader {
  read(asked: AuditAsk): Promise<AuditPage>
  /** Call when files were renamed. */
  forget(): void
}

/** @param endOf where the log ends, for whoever writes it; another reads what is there */
function createAuditReader(
  directory: string,
  endOf?: () => { seq: number; sizeBytes: number; firstSeq: number },
): AuditReader {
  const current = join(directory, currentName)
  /** Where the page before this one ended, so that the next one does not look for it. */
  let bookmark: { seq: number; path: string; offset: number } | undefined
  const firstSeqOfCurrent = async () => {
    for await (const { line } of linesOf(current, 0, Infinity)) return parseLink(line)?.seq
    return undefined
  }
  return {
    read: async ({ after, sinceMs, limit }) => {
      const end = endOf?.()
      const firstSeq = end ? (end.sizeBytes > 0 ? end.firstSeq : undefined) : await firstSeqOfCurrent()
      const files = [
        ...(await listFiles(directory)),
        ...(firstSeq === undefined ? [] : [{ path: current, firstSeq }]),
      ]
      const at = bookmark?.seq === after ? bookmark : undefined
      const start = at
        ? files.findIndex(({ path }) => path === at.path)
        : Math.max(
            0,
            files.findLastIndex((file) => file.firstSeq <= after + 1),
          )
      const lines: string[] = []
      let bytes = 0
      for (const { path } of files.slice(Math.max(0, start))) {
        const to = path === current ? (end?.sizeBytes ?? Infinity) : Infinity
        for await (const { line, offset } of linesOf(path, at?.path === path ? at.offset : 0, to)) {
          const seq = parseLink(line)?.seq
          if (seq !== undefined && seq <= after) continue
          if (sinceMs > 0 && timeOf(line) < sinceMs) continue
          lines.push(line)
          bytes += line.length
          // A line without a number was tampered with, and is no place to go on from.
          if (seq === undefined || (lines.length < limit && bytes < pageBytesMax)) continue
          if (end && seq >= end.seq) return { lines, next: undefined }
          bookmark = { seq, path, offset }
          return { lines, next: seq }
        }
      }
      return { lines, next: undefined }
    },
    forget: () => {
      bookmark = undefined
    },
  }
}

/** The logs of several servers, each in a directory of its name, with a chain of its own. */
export interface SharedAuditLogs {
  /** Sorted. */
  names(): Promise<string[]>
  /** Undefined where there is none of that name. */
  read(name: string, asked: AuditAsk): Promise<AuditPage | undefined>
}

/** Reads the logs below a directory; that of this server through `own`. */
export function openSharedAuditLogs(
  directory: string,
  own: { readonly name: string; readonly log: Pick<AuditLog, 'read'> },
): SharedAuditLogs {
  const readers = new LRUCache<string, AuditReader>({ max: readersMax })
  const names = async () => (await readdir(directory)).filter((name) => !name.startsWith('.')).sort()
  return {
    names,
    read: async (name, asked) => {
      if (name === own.name) return own.log.read(asked)
      if (!(await names()).includes(name)) return undefined
      const reader = readers.get(name) ?? createAuditReader(join(directory, name))
      readers.set(name, reader)
      try {
        return await reader.read(asked)
      } catch (error) {
        // Its server has put a file aside meanwhile.
        if (!isMissing(error)) throw error
        reader.forget()
        return await reader.read(asked)
      }
    },
  }
}

/** The last line there is, and what is behind it. @throws Error naming a file that is no audit log */
async function findEnd(directory: string) {
  const bytes = (await readFile(join(directory, currentName)).catch(ignoreMissing)) ?? Buffer.alloc(0)
  const { line, end } = lastLine(bytes)
  const torn = bytes.subarray(end)
  const first = parseLink(bytes.toString('utf8', 0, Math.max(0, bytes.indexOf(0x0a))))
  if (line !== undefined) return { head: headOf(line), sizeBytes: end, firstSeq: first?.seq ?? 1, torn }
  const before = (await listFiles(directory)).at(-1)
  if (!before) return { head: { seq: 0, hash: chainStart }, sizeBytes: 0, firstSeq: 1, torn }
  const last = lastLine(await readFile(before.path)).line
  if (last === undefined) throw new Error(`Cannot go on with the audit log: ${before.path} has no line of it`)
  const head = headOf(last)
  return { head, sizeBytes: 0, firstSeq: head.seq + 1, torn }
}

/** The last whole line, and where it ends. Power that failed may leave whole lines of nonsense, too: what was synced is before them. */
function lastLine(bytes: Buffer): { line: string | undefined; end: number } {
  for (let end = bytes.lastIndexOf(0x0a) + 1; end > 0;) {
    const start = end < 2 ? 0 : bytes.lastIndexOf(0x0a, end - 2) + 1
    const line = bytes.toString('utf8', start, end - 1)
    if (parseLink(line)) return { line, end }
    end = start
  }
  return { line: undefined, end: 0 }
}

function headOf(line: string): { seq: number; hash: string } {
  return { seq: parseLink(line)?.seq ?? 0, hash: hashOfLine(line) }
}

/** Lines of a file from an offset, each with where it ends. What has no newline yet is none. */
async function* linesOf(
  path: string,
  from: number,
  to: number,
): AsyncGenerator<{ line: string; offset: number }> {
  const opened = await open(path, 'r').catch(ignoreMissing)
  if (!opened) return
  await using handle: FileHandle = opened
  let rest = Buffer.alloc(0)
  for (let at = from; at < to;) {
    const chunk = Buffer.allocUnsafe(Math.min(readBytes, to - at))
    const { bytesRead } = await handle.read(chunk, 0, chunk.length, at)
    if (bytesRead === 0) return
    rest = Buffer.concat([rest, chunk.subarray(0, bytesRead)])
    at += bytesRead
    let start = 0
    for (let end = rest.indexOf(0x0a); end >= 0; end = rest.indexOf(0x0a, start)) {
      const line = rest.toString('utf8', start, end)
      start = end + 1
      yield { line, offset: at - rest.length + start }
    }
    rest = rest.subarray(start)
  }
}

/** Files that were put aside, oldest first. */
async function listFiles(directory: string): Promise<File[]> {
  return (await readdir(directory))
    .flatMap((name) => {
      const digits = /^audit-(\d{12,})\.log$/.exec(name)?.[1]
      return digits === undefined ? [] : [{ path: join(directory, name), firstSeq: Number(digits) }]
    })
    .sort((a, b) => a.firstSeq - b.firstSeq)
}

function asideName(firstSeq: number): string {
  return `audit-${String(firstSeq).padStart(12, '0')}.log`
}

/** Lines that cannot be read are never left out. */
function timeOf(line: string): number {
  try {
    const time = Date.parse((JSON.parse(line) as { time: string }).time)
    return Number.isNaN(time) ? Infinity : time
  } catch {
    return Infinity
  }
}

function unwritable(cause: unknown): ApiError {
  const full = ['ENOSPC', 'EDQUOT'].includes(errorCode(cause) ?? '')
  return new ApiError(
    full ? 507 : 503,
    'AUDIT_UNAVAILABLE',
    `Cannot do what cannot be told: the audit log cannot be written${full ? ', the disk is full' : ''}`,
    { hint: 'Nothing was done. The log of the server says why; audit.log lies in its data_dir.', cause },
  )
}
