import { randomBytes } from 'node:crypto'
import type { FileHandle } from 'node:fs/promises'
import { open, readdir, stat, unlink } from 'node:fs/promises'
import { join } from 'node:path'
import { infoHashAt } from '../../../lib/protocol/infohash.ts'
import { makeDirectory } from '../../../lib/runtime/files.ts'
import type { Logger } from '../../../lib/runtime/log.ts'
import type { StoreAnnounce } from '../peer-store.ts'

export type StoppedPeer = Pick<StoreAnnounce, 'infoHash' | 'source' | 'port'>

/** A peer that has stopped at another server. */
export interface HeardStop {
  readonly peer: StoppedPeer
  /** The store that all share has been told. */
  readonly isTold: boolean
  /** How long ago at most, unless the file system keeps old contents for longer. */
  readonly ageMs: number
}

export interface StopFiles extends AsyncDisposable {
  /** Tells the other servers. Nobody waits for it. */
  tell(peer: StoppedPeer, isTold: boolean): void
}

export interface StopFilesOptions {
  /** All servers share it. */
  readonly directory: string
  /** Told of each stop at another server, or another thread of this one. */
  readonly heard: (stop: HeardStop) => void
  /** Milliseconds of a clock that never goes back. */
  readonly monotonic: () => number
  readonly log: Logger
  /** Between two looks. Default: 500 ms. */
  readonly lookMs?: number
  /** How long a file is written to before the next is begun. Default: a minute. */
  readonly partMs?: number
}

/** flag: 1 where the shared store was told; how long ago, milliseconds: 2; infohash: 20; bytes of the address: 1; address: 16; port: 2. */
const recordBytes = 42
const flushMs = 100
/** Stops that wait to be written, or are in one file; beyond it they are lost, and end with the lives of their peers. */
const recordsMax = 65_536
/** A file of a server that is gone, by the clock of the file system. */
const forgottenMs = 3_600_000
const readBytes = 1000 * recordBytes

/**
 * Tells of peers that stop through files in the directory that the servers share, so that none names a peer which has stopped at another
 * while they cannot reach Redis. Each thread appends to a file of its own and begins another every so often; the others look for what is new.
 * No file is written by two, none is read where it may still change, and nothing needs a lock: it holds on NFS.
 *
 * @throws Error when the directory cannot be made
 */
export async function openStopFiles({
  directory,
  heard,
  monotonic,
  log,
  lookMs = 500,
  partMs = 60_000,
}: StopFilesOptions): Promise<StopFiles> {
  await makeDirectory(directory, 0o700)
  /** What it has written itself it does not read. */
  const writer = randomBytes(6).toString('hex')
  let parts = 0
  let waiting: { peer: StoppedPeer; isTold: boolean; atMs: number }[] = []
  let part:
    | { readonly name: string; readonly file: FileHandle; readonly sinceMs: number; records: number }
    | undefined
  /** Files of this thread that are full, oldest first. */
  const past: string[] = []
  /** Up to where each file of others was read. */
  let read: Map<string, number> | undefined
  let lastFault: string | undefined
  const complain = (error: unknown) => {
    const { message } = error as Error
    if (message === lastFault) return
    lastFault = message
    log.warn(
      { reason: message },
      'peers that stop cannot be told to other servers, or not heard of, through registry.shared_dir',
    )
  }

  const partToWrite = async () => {
    if (part && monotonic() - part.sinceMs < partMs && part.records < recordsMax) return part
    await endPart()
    const name = `${writer}-${++parts}.stops`
    part = { name, file: await open(join(directory, name), 'ax', 0o600), sinceMs: monotonic(), records: 0 }
    return part
  }
  const endPart = async () => {
    if (!part) return
    const { name, file } = part
    part = undefined
    await file.close()
    past.push(name)
    // The last one may not have been read by all.
    for (const old of past.splice(0, past.length - 1)) await unlink(join(directory, old))
  }
  const write = async () => {
    const records = waiting
    waiting = []
    if (records.length > 0) {
      try {
        const to = await partToWrite()
        const nowMs = monotonic()
        const bytes = Buffer.concat(records.map(({ atMs, ...record }) => writeRecord(record, nowMs - atMs)))
        to.records += records.length
        await to.file.writeFile(bytes)
      } catch (error) {
        waiting = [...records, ...waiting].slice(-recordsMax)
        // A record may have been written in part: what comes goes to another file.
        await endPart()
        throw error
      }
    } else if (part && monotonic() - part.sinceMs >= partMs) {
      await endPart()
    }
  }

  const look = async () => {
    const names = (await readdir(directory)).filter(
      (name) => name.endsWith('.stops') && !name.startsWith(writer),
    )
    // What was there before this server began says nothing new, and how old it is nobody knows.
    const before = read
    const next = new Map<string, number>()
    for (const name of names) {
      const from = before?.get(name)
      const file = join(directory, name)
      if (before === undefined) {
        const { size, mtimeMs } = await stat(file)
        // One may be half written.
        next.set(name, size - (size % recordBytes))
        if (Date.now() - mtimeMs > forgottenMs) await unlink(file).catch(() => undefined)
      } else {
        next.set(name, await readNew(file, from ?? 0).catch(() => from ?? 0))
      }
    }
    read = next
  }
  const readNew = async (file: string, from: number) => {
    // Opened each time: that is when NFS looks what is new.
    await using handle = await open(file, 'r')
    const bytes = Buffer.allocUnsafe(readBytes)
    let at = from
    for (;;) {
      const { bytesRead } = await handle.read(bytes, 0, readBytes, at)
      const whole = bytesRead - (bytesRead % recordBytes)
      for (let i = 0; i < whole; i += recordBytes) {
        const stop = readRecord(bytes.subarray(i, i + recordBytes))
        if (stop) heard({ ...stop, ageMs: stop.ageMs + lookMs })
      }
      at += whole
      if (whole < readBytes) return at
    }
  }

  const writing = repeat(flushMs, write, complain)
  const looking = repeat(lookMs, look, complain)
  return {
    tell: (peer, isTold) => {
      if (waiting.length >= recordsMax) waiting.shift()
      const { family, bytes } = peer.source
      waiting.push({
        peer: { infoHash: peer.infoHash, source: { family, bytes: bytes.slice() }, port: peer.port },
        isTold,
        atMs: monotonic(),
      })
    },
    [Symbol.asyncDispose]: async () => {
      await looking[Symbol.asyncDispose]()
      await writing[Symbol.asyncDispose]()
      await write().catch(complain)
      await part?.file.close()
    },
  }
}

function writeRecord({ peer, isTold }: { peer: StoppedPeer; isTold: boolean }, ageMs: number): Buffer {
  const { infoHash, source, port } = peer
  const bytes = Buffer.alloc(recordBytes)
  bytes[0] = isTold ? 1 : 0
  bytes.writeUInt16LE(Math.min(0xffff, Math.ceil(ageMs)), 1)
  bytes.write(infoHash, 3, 'hex')
  bytes[23] = source.bytes.length
  bytes.set(source.bytes, 24)
  bytes.writeUInt16LE(port, 40)
  return bytes
}

/** @returns undefined for what no server of this version writes */
function readRecord(bytes: Buffer): HeardStop | undefined {
  const length = bytes[23]
  if (length !== 4 && length !== 16) return undefined
  return {
    isTold: bytes[0] === 1,
    ageMs: bytes.readUInt16LE(1),
    peer: {
      infoHash: infoHashAt(bytes, 3),
      source: {
        family: length === 4 ? 4 : 6,
        bytes: new Uint8Array(bytes.subarray(24, 24 + length)),
      },
      port: bytes.readUInt16LE(40),
    },
  }
}

/** Does something again and again, never twice at once, until it is disposed. */
function repeat(
  everyMs: number,
  work: () => Promise<void>,
  failed: (error: unknown) => void,
): AsyncDisposable {
  let running: Promise<void> | undefined
  const timer = setInterval(() => {
    running ??= work()
      .catch(failed)
      .finally(() => {
        running = undefined
      })
  }, everyMs)
  timer.unref()
  return {
    [Symbol.asyncDispose]: async () => {
      clearInterval(timer)
      await running
    },
  }
}
