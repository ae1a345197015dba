import type { ContentDigest, Digest } from '../../../lib/protocol/digest.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import { backoff, delay } from '../../../lib/runtime/backoff.ts'
import { isMissing } from '../../../lib/runtime/files.ts'
import type { BlobStat, BlobStore, BlobUpload } from '../blob-store.ts'
import type { BlobStream } from './upstream-client.ts'
import { untilAborted } from './until-aborted.ts'
import { UpstreamError } from './upstream-error.ts'

/** A blob that comes from an upstream and is being stored; whoever wants it reads along. */
export interface IncomingBlob {
  readonly digest: ContentDigest
  /** Undefined where the upstream did not say; then only the stored blob has a length. */
  readonly sizeBytes: number | undefined
  /** Rejects with why it was not stored: UpstreamError, or the store's own. */
  readonly stored: Promise<BlobStat>
  /** Resolves when there are bytes to read; of a blob that came at once, when it is stored. Rejects like `stored`. */
  readonly begun: Promise<void>
  /**
   * Bytes `[start, end)` as they come, for a blob of known size. The last byte of the blob is given only when its SHA-256 was proven: who
   * has read all of it has the right bytes.
   */
  read(range: { start: number; end: number }, signal: AbortSignal): AsyncIterable<Uint8Array>
}

export interface IncomingOptions {
  readonly repository: string
  readonly digest: Digest
  readonly first: BlobStream
  /** The bytes from `start` on, once more after a connection that broke. */
  readonly reopen: (start: number) => Promise<BlobStream | undefined>
  readonly store: BlobStore
  readonly blobMaxBytes: number
  readonly signal: AbortSignal
  readonly random: () => number
  readonly received: (bytes: number) => void
}

/** Connections for one blob: each but the first goes on where the last one broke. */
const triesMax = 5

/**
 * Begins to store a blob. It goes on when those who read it have left: the next one finds it here.
 *
 * @throws UpstreamError `broken` when it is too large, ApiError when there is no room
 */
export async function receiveBlob(options: IncomingOptions): Promise<IncomingBlob> {
  const { repository, digest, first, store, blobMaxBytes } = options
  const { sizeBytes } = first
  if (sizeBytes !== undefined && sizeBytes > blobMaxBytes) {
    await first.discard()
    throw tooLarge(digest, blobMaxBytes)
  }
  let upload: BlobUpload
  try {
    upload = await store.startUpload(repository, sizeBytes)
  } catch (error) {
    await first.discard()
    throw error
  }
  let state: 'coming' | 'stored' | 'failed' = 'coming'
  let moved = Promise.withResolvers<undefined>()
  const tell = () => {
    const before = moved
    moved = Promise.withResolvers()
    before.resolve(undefined)
  }
  async function* watched(): AsyncGenerator<Uint8Array> {
    for await (const chunk of bytesOf(options)) {
      options.received(chunk.length)
      yield chunk
    }
  }
  const run = async (): Promise<BlobStat> => {
    try {
      await upload.append(watched(), options.signal, tell)
    } catch (error) {
      await upload.cancel()
      throw error
    }
    tell()
    return upload.commit(digest).catch((cause: unknown) => {
      if (!(cause instanceof ClientError)) throw cause
      throw new UpstreamError('broken', `the upstream sent other bytes: ${cause.message}`, { cause })
    })
  }
  const stored = run().then(
    (blob) => {
      state = 'stored'
      tell()
      return blob
    },
    (error: unknown) => {
      state = 'failed'
      tell()
      throw error
    },
  )
  // Those who read along see it; where nobody does, the log of the pull has it.
  stored.catch(() => undefined)

  /** How far it may be read now. */
  const readable = () => {
    if (state === 'stored') return Number.POSITIVE_INFINITY
    return sizeBytes === undefined ? 0 : Math.min(upload.offset, sizeBytes - 1)
  }
  const readableBeyond = async (at: number, signal: AbortSignal): Promise<number> => {
    for (;;) {
      signal.throwIfAborted()
      const limit = readable()
      if (limit > at) return limit
      if (state === 'failed') await stored
      await untilAborted(moved.promise, signal)
    }
  }
  async function* read({ start, end }: { start: number; end: number }, signal: AbortSignal) {
    for (let at = start; at < end;) {
      const until = Math.min(end, await readableBeyond(at, signal))
      yield* stretch({ start: at, end: until }, signal)
      at = until
    }
  }
  async function* stretch(range: { start: number; end: number }, signal: AbortSignal) {
    try {
      yield* upload.read(range, signal)
    } catch (error) {
      if (!isMissing(error)) throw error
      // It was committed, or given up, just now.
      await stored
      yield* store.readBlob(digest, range, signal)
    }
  }
  const begins = async () => {
    while (state === 'coming' && !(upload.offset > 0 && upload.offset < (sizeBytes ?? 0))) await moved.promise
    if (state === 'failed') await stored
  }
  const begun = begins()
  begun.catch(() => undefined)
  return { digest, sizeBytes, stored, begun, read }
}

async function* bytesOf(options: IncomingOptions): AsyncGenerator<Uint8Array> {
  const { digest, first, reopen, signal, blobMaxBytes } = options
  const waits = backoff({ firstMs: 200, maxMs: 2000, random: options.random })
  let stream: BlobStream | undefined = first
  let at = 0
  for (let tries = 1; ; tries++) {
    try {
      stream ??= await reopen(at)
      if (!stream) throw new UpstreamError('missing', `${digest} went away while it was pulled`)
      let skip = at - stream.start
      for await (const chunk of stream.bytes) {
        const fresh = chunk.subarray(Math.min(skip, chunk.length))
        skip -= chunk.length - fresh.length
        at += fresh.length
        if (at > blobMaxBytes) throw tooLarge(digest, blobMaxBytes)
        if (fresh.length > 0) yield fresh
      }
      if (first.sizeBytes === undefined || at === first.sizeBytes) return
      throw new UpstreamError('down', `${digest} ended at ${at} of ${first.sizeBytes} bytes`)
    } catch (error) {
      stream = undefined
      // Without a length nobody knows where a broken stream would have ended.
      const mayGoOn = first.sizeBytes !== undefined && tries < triesMax
      if (!(error instanceof UpstreamError) || error.fault !== 'down' || !mayGoOn) throw error
      await delay(waits.next().value, signal)
    }
  }
}

function tooLarge(digest: Digest, maxBytes: number): UpstreamError {
  return new UpstreamError('broken', `${digest} is larger than ${maxBytes} bytes (registry.blob_max)`)
}
