import { availableParallelism } from 'node:os'
import { RestingThread } from '../../lib/runtime/resting-thread.ts'

export type PieceRequest =
  | {
      readonly kind: 'write'
      readonly id: number
      readonly file: number
      readonly path: string
      readonly position: number
      readonly bytes: Uint8Array
      readonly sha1: string
    }
  | {
      readonly kind: 'check'
      readonly id: number
      readonly file: number
      readonly path: string
      readonly position: number
      readonly length: number
      readonly sha1: string
    }
  | { readonly kind: 'close'; readonly file: number }

export type PieceReply =
  | { readonly id: number; readonly right: boolean }
  | { readonly id: number; readonly message: string; readonly code: string | undefined }

/** A file that pieces are written to. It is opened when it is first used, and held open until `close`. */
export interface PieceWriter {
  /** Has a thread ready: the first piece need not wait for it. */
  prepare(): void
  /**
   * Checks the bytes of a piece and writes them. Resolves with whether they were right, once the write has returned. Bytes in
   * shared memory are not copied and must stay as they are until then.
   *
   * @throws Error of the system, with its `code`
   */
  write(position: number, bytes: Uint8Array, sha1: string): Promise<boolean>
  /** Whether these bytes are on disk already. @throws Error of the system, with its `code` */
  check(position: number, length: number, sha1: string): Promise<boolean>
  close(): void
}

/**
 * Threads that hash pieces and write them, shared by all torrents, and the memory that pieces are put together in. SHA-1 runs at some
 * 0.9 GB/s a core: one thread keeps up with 5 Gbit/s, and more than four never had work.
 */
export interface PieceStore extends AsyncDisposable {
  open(path: string): PieceWriter
  /** Shared memory for a piece; undefined where all that may be held is in use. A torrent that holds none always gets some. */
  takeMemory(bytes: number, held: number): Uint8Array | undefined
  giveMemory(memory: Uint8Array): void
}

const threadsMax = 4
/** Between two deploys they need not be there. */
const restMs = 30_000
/** What pieces are put together in, for all torrents. */
export const pieceMemoryMax = 24 * 1024 * 1024
/** A torrent may hold so many pieces, whatever the others hold. */
export const ownPieces = 2

export function createPieceStore(): PieceStore {
  const threads: PieceThread[] = []
  const threadCount = Math.min(threadsMax, Math.max(1, availableParallelism() - 1))
  let lastFile = 0
  let inUse = 0
  let spareBytes = 0
  const spare: Uint8Array[] = []

  const threadOf = (file: number): PieceThread => (threads[file % threadCount] ??= new PieceThread())

  return {
    open: (path) => {
      const file = ++lastFile
      // Pieces of one file go to all threads in turn; each opens it once.
      let turn = file
      const used = new Set<PieceThread>()
      const next = () => {
        const thread = threadOf(turn++)
        if (!used.has(thread)) thread.need()
        used.add(thread)
        return thread
      }
      return {
        prepare: () => {
          next()
        },
        write: (position, bytes, sha1) => next().ask({ kind: 'write', file, path, position, bytes, sha1 }),
        check: (position, length, sha1) => next().ask({ kind: 'check', file, path, position, length, sha1 }),
        close: () => {
          for (const thread of used) thread.close(file)
          used.clear()
        },
      }
    },
    takeMemory: (bytes, held) => {
      if (inUse + bytes > pieceMemoryMax && held >= ownPieces) return undefined
      inUse += bytes
      const found = spare.findIndex((memory) => memory.length === bytes)
      if (found < 0) return new Uint8Array(new SharedArrayBuffer(bytes))
      spareBytes -= bytes
      return spare.splice(found, 1)[0]
    },
    giveMemory: (memory) => {
      inUse -= memory.length
      // Nobody fetches: nothing is kept.
      if (inUse === 0) spare.length = spareBytes = 0
      // Left to the collector, shared memory would pile up for as long as it does not run.
      if (inUse + spareBytes + memory.length > pieceMemoryMax) return
      spareBytes += memory.length
      spare.push(memory)
    },
    [Symbol.asyncDispose]: async () => {
      await Promise.all(threads.map((thread) => thread[Symbol.asyncDispose]()))
    },
  }
}

type Work = PieceRequest extends infer Each ? (Each extends { id: number } ? Omit<Each, 'id'> : never) : never

class PieceThread implements AsyncDisposable {
  readonly #waiting = new Map<number, PromiseWithResolvers<boolean>>()
  readonly #thread = new RestingThread<PieceRequest, PieceReply>(
    new URL('./piece-worker.ts', import.meta.url),
    {
      restMs,
      replied: (reply) => {
        const waiting = this.#waiting.get(reply.id)
        this.#waiting.delete(reply.id)
        if ('right' in reply) waiting?.resolve(reply.right)
        else waiting?.reject(Object.assign(new Error(reply.message), { code: reply.code }))
      },
      lost: (error) => {
        for (const waiting of this.#waiting.values()) waiting.reject(error)
        this.#waiting.clear()
      },
    },
  )
  #lastId = 0

  /** Until `close` of a file. */
  need(): void {
    this.#thread.need()
  }

  ask(work: Work): Promise<boolean> {
    const waiting = Promise.withResolvers<boolean>()
    const id = ++this.#lastId
    this.#waiting.set(id, waiting)
    this.#thread.post({ ...work, id })
    return waiting.promise
  }

  /** After all that was asked before. */
  close(file: number): void {
    this.#thread.post({ kind: 'close', file })
    this.#thread.release()
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#thread[Symbol.asyncDispose]()
  }
}
