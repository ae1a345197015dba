import type { FileHandle } from 'node:fs/promises'
import { open } from 'node:fs/promises'

/** What is read at once. */
const chunkBytes = 1024 * 1024
/** For all torrents together. */
const chunksMax = 24
/** Chunks that nobody asked for during this long are given up. */
const idleMs = 10_000

interface Chunk {
  readonly key: string
  readonly buffer: Buffer
  bytes: number
  /** Sockets that have not sent all of it. */
  users: number
  usedAtMs: number
  waiting: ((error: Error | undefined) => void)[] | undefined
}

/** Bytes of a file, good until `release` is called. */
export interface Lease {
  readonly bytes: Buffer
  release(): void
}

/** A file that is seeded. It is opened when it is first read and held open until `close`, whatever it is renamed to. */
export interface SeedFile {
  /**
   * The bytes from `position` on: at least one, at most `length`. Calls back at once where they are in memory. With 0 bytes the file has
   * ended too early, or cannot be read: `error` says why.
   */
  read(position: number, length: number, done: (lease: Lease | undefined, error?: Error) => void): void
  /** Opens the file now, so that it may be renamed. @throws Error of the system */
  hold(): Promise<void>
  /** What lies there has changed: what was read of it is not given out again. */
  forget(position: number, length: number): void
  close(): Promise<void>
}

/**
 * What seeds read, in large reads that all peers share: the hosts of a rack ask for the same pieces within moments. Memory in use is at
 * most 24 MiB, and what sockets have not sent.
 */
export class ReadCache {
  readonly #chunks = new Map<string, Chunk>()
  readonly #free: Buffer[] = []
  readonly #now: () => number
  #lastFile = 0

  constructor(now: () => number) {
    this.#now = now
  }

  open(path: string): SeedFile {
    const number = ++this.#lastFile
    let handle: Promise<FileHandle> | undefined
    let closed = false
    const opened = () => {
      if (closed) return Promise.reject(new Error(`${path} is closed`))
      handle ??= open(path, 'r').catch((error: unknown) => {
        // It is tried again at the next read.
        handle = undefined
        throw error
      })
      return handle
    }
    return {
      read: (position, length, done) => {
        const index = Math.floor(position / chunkBytes)
        const key = `${number}:${index}`
        const give = (chunk: Chunk) => {
          const offset = position - index * chunkBytes
          if (offset >= chunk.bytes) {
            done(undefined, new Error(`${path} ends at byte ${index * chunkBytes + chunk.bytes}`))
            return
          }
          chunk.users++
          chunk.usedAtMs = this.#now()
          let held = true
          done({
            bytes: chunk.buffer.subarray(offset, Math.min(offset + length, chunk.bytes)),
            release: () => {
              if (!held) return
              held = false
              chunk.users--
              this.#recycle(chunk)
            },
          })
        }
        const known = this.#chunks.get(key)
        if (known) {
          // The map is in the order of use.
          this.#chunks.delete(key)
          this.#chunks.set(key, known)
          if (known.waiting === undefined) give(known)
          else known.waiting.push((error) => (error ? done(undefined, error) : give(known)))
          return
        }
        const chunk: Chunk = {
          key,
          buffer: this.#allocate(),
          bytes: 0,
          users: 0,
          usedAtMs: this.#now(),
          waiting: [(error) => (error ? done(undefined, error) : give(chunk))],
        }
        this.#chunks.set(key, chunk)
        const finish = (error: Error | undefined) => {
          const waiting = chunk.waiting ?? []
          chunk.waiting = undefined
          if (error && this.#chunks.get(key) === chunk) this.#chunks.delete(key)
          for (const each of waiting) each(error)
          if (error) this.#recycle(chunk)
        }
        void opened()
          .then((file) => {
            if (closed) throw new Error(`${path} is closed`)
            return file.read(chunk.buffer, 0, chunkBytes, index * chunkBytes)
          })
          .then(
            ({ bytesRead }) => {
              chunk.bytes = bytesRead
              finish(undefined)
            },
            (error: unknown) => {
              finish(error instanceof Error ? error : new Error(String(error)))
            },
          )
      },
      forget: (position, length) => {
        const end = position + length
        for (let index = Math.floor(position / chunkBytes); index * chunkBytes < end; index++) {
          const key = `${number}:${index}`
          const chunk = this.#chunks.get(key)
          if (chunk === undefined) continue
          this.#chunks.delete(key)
          if (chunk.waiting === undefined) this.#recycle(chunk)
        }
      },
      hold: async () => {
        await opened()
      },
      close: async () => {
        closed = true
        for (const [key, chunk] of this.#chunks) {
          if (!key.startsWith(`${number}:`) || chunk.waiting !== undefined) continue
          this.#chunks.delete(key)
          this.#recycle(chunk)
        }
        const file = await handle?.catch(() => undefined)
        await file?.close()
      },
    }
  }

  /** Gives up what nobody has asked for lately. */
  sweep(): void {
    const before = this.#now() - idleMs
    for (const [key, chunk] of this.#chunks) {
      if (chunk.usedAtMs > before || chunk.users > 0 || chunk.waiting !== undefined) continue
      this.#chunks.delete(key)
    }
    if (this.#chunks.size === 0) this.#free.length = 0
  }

  #allocate(): Buffer {
    if (this.#chunks.size >= chunksMax) {
      for (const [key, chunk] of this.#chunks) {
        if (chunk.users > 0 || chunk.waiting !== undefined) continue
        this.#chunks.delete(key)
        // More were needed while sockets were slow.
        if (this.#chunks.size < chunksMax) return chunk.buffer
      }
    }
    return this.#free.pop() ?? Buffer.allocUnsafeSlow(chunkBytes)
  }

  /** A chunk that has left the cache can be filled again once no socket needs it. */
  #recycle(chunk: Chunk): void {
    if (chunk.users > 0 || this.#chunks.get(chunk.key) === chunk) return
    if (this.#free.length < 4 && !this.#free.includes(chunk.buffer)) this.#free.push(chunk.buffer)
  }
}
