import { ApiError } from './api-error.ts'
import type { HashPool } from './hash-pool.ts'
import type { HashAnswer } from './hash-worker.ts'

/** What the worker knows of a whole blob. */
type Hashes = Required<Pick<HashAnswer, 'offset' | 'sha256Hex' | 'pieces'>> & Pick<HashAnswer, 'sha512Hex'>

/** One blob on its way in: bytes go in batches to a worker that hashes and writes them. */
export interface UploadSession {
  readonly id: string
  readonly repository: string
  /** Bytes written. */
  readonly offset: number
  readonly touchedMs: number
  /** A request is using it. */
  readonly busy: boolean
  /** @param written is called whenever `offset` has moved */
  append(bytes: AsyncIterable<Uint8Array>, signal: AbortSignal, written?: () => void): Promise<void>
  /** @param sha512 whether the SHA-512 is needed as well */
  finish(sha512: boolean): Promise<Hashes>
  drop(): Promise<void>
}

/** What goes to the worker at once: sockets yield 64 KiB, and a message costs more than hashing that. */
const batchBytes = 1024 * 1024
/** Batches under way in the worker before the socket is made to wait. */
const batchesMax = 4

export async function startUploadSession(options: {
  id: string
  repository: string
  /** The declared length, where there was one. */
  length: number | undefined
  file: string
  /** What another server has written: it is read and written to `file` first. */
  from?: string | undefined
  /** Other servers must see what was written once a request has ended. */
  synced?: boolean | undefined
  pool: HashPool
  now: () => number
  blobMaxBytes: number
  /** Throws where the disk has no room for more. */
  checkRoom: () => Promise<void>
}): Promise<UploadSession> {
  const { id, pool, now, blobMaxBytes, checkRoom } = options
  let { offset } = await pool.call({
    op: 'open',
    upload: id,
    file: options.file,
    from: options.from,
    length: options.length,
  })
  let touchedMs = now()
  let busy = false

  /** One request at a time: two writers would interleave. */
  const exclusively = async <Result>(work: () => Promise<Result>): Promise<Result> => {
    if (busy)
      throw new ApiError(409, 'BLOB_UPLOAD_INVALID', 'Cannot use the upload: another request is using it')
    busy = true
    try {
      return await work()
    } finally {
      busy = false
      touchedMs = now()
    }
  }

  const write = async (
    bytes: AsyncIterable<Uint8Array>,
    signal: AbortSignal,
    tellWritten?: () => void,
  ): Promise<void> => {
    await checkRoom()
    const underWay: Promise<void>[] = []
    // Batches go to the worker and come back: new memory for each would cost more than hashing it.
    const free: Uint8Array<ArrayBuffer>[] = []
    let received = offset
    let sent = offset
    let failure: unknown
    const flush = async (batch: Uint8Array<ArrayBuffer>) => {
      const at = sent
      sent += batch.length
      const written = pool.call({ op: 'append', upload: id, at, bytes: batch }).then(
        (answer) => {
          offset = answer.offset
          if (answer.bytes) free.push(new Uint8Array(answer.bytes.buffer))
          tellWritten?.()
        },
        (error: unknown) => {
          failure ??= error
        },
      )
      underWay.push(written)
      if (underWay.length >= batchesMax) await underWay.shift()
    }
    let batch = new Uint8Array(batchBytes)
    let filled = 0
    try {
      for await (const chunk of bytes) {
        signal.throwIfAborted()
        if (failure !== undefined) throw failure as Error
        touchedMs = now()
        received += chunk.length
        if (received > blobMaxBytes) throw tooLarge(blobMaxBytes)
        for (let at = 0; at < chunk.length;) {
          const part = chunk.subarray(at, at + batchBytes - filled)
          batch.set(part, filled)
          filled += part.length
          at += part.length
          if (filled === batchBytes) {
            await flush(batch)
            batch = free.pop() ?? new Uint8Array(batchBytes)
            filled = 0
          }
        }
      }
    } finally {
      // What did arrive is kept, so that the client can go on from there.
      if (filled > 0) await flush(batch.subarray(0, filled))
      await Promise.all(underWay)
      if (options.synced === true) await pool.call({ op: 'sync', upload: id })
    }
    if (failure !== undefined) throw failure as Error
  }

  return {
    id,
    repository: options.repository,
    get offset() {
      return offset
    },
    get touchedMs() {
      return touchedMs
    },
    get busy() {
      return busy
    },
    append: (bytes, signal, written) => exclusively(() => write(bytes, signal, written)),
    finish: (sha512) =>
      exclusively(async () => {
        const answer = await pool.call({ op: 'finish', upload: id, sha512 })
        const { sha256Hex, sha512Hex, pieces, offset: length } = answer
        if (sha256Hex === undefined || pieces === undefined)
          throw new Error('Cannot finish upload: the worker gave no hashes')
        return { offset: length, sha256Hex, sha512Hex, pieces }
      }),
    drop: async () => {
      await pool.call({ op: 'drop', upload: id })
    },
  }
}

export function tooLarge(maxBytes: number): ApiError {
  return new ApiError(413, 'SIZE_INVALID', `Cannot store blob: it is larger than ${maxBytes} bytes`)
}
