import type { FileHandle } from 'node:fs/promises'
import { open } from 'node:fs/promises'

type Done<Value = void> = (error: Error | null, value?: Value) => void

/**
 * A blob on disk as webtorrent's chunk store wants it (abstract-chunk-store). Opened at the first access and held open
 * until `close`, so that the file may be renamed and made read-only while it is seeded.
 */
export class PieceFile {
  readonly chunkLength: number
  readonly #file: string
  readonly #length: number
  readonly #flags: string
  #handle: Promise<FileHandle> | undefined
  #closed = false
  readonly #pending = new Set<Promise<unknown>>()

  constructor(file: string, length: number, pieceLength: number, access: 'read' | 'write') {
    this.chunkLength = pieceLength
    this.#file = file
    this.#length = length
    this.#flags = access
  }

  put(index: number, bytes: Uint8Array, done: Done = ignore): void {
    this.#run(done, async (handle) => {
      await writeAll(handle, bytes, index * this.chunkLength)
    })
  }

  get(
    index: number,
    options: { offset?: number; length?: number } | null | undefined,
    done: Done<Uint8Array> = ignore,
  ): void {
    const size = Math.min(this.chunkLength, this.#length - index * this.chunkLength)
    const offset = options?.offset ?? 0
    const length = options?.length ?? size - offset
    this.#run(done, async (handle) => {
      if (offset < 0 || length < 0 || offset + length > size)
        throw new RangeError(`Cannot read ${length} bytes at ${offset} of piece ${index}: it has ${size}`)
      // Not from Buffer's pool: webtorrent keeps the bytes in its send queues.
      const bytes = Buffer.allocUnsafeSlow(length)
      const { bytesRead } = await handle.read(bytes, 0, length, index * this.chunkLength + offset)
      if (bytesRead !== length) throw new Error(`Cannot read piece ${index}: the file ends early`)
      return bytes
    })
  }

  close(done: Done = ignore): void {
    this.#closed = true
    void Promise.allSettled(this.#pending)
      .then(async () => {
        const handle = await this.#handle?.catch(() => undefined)
        await handle?.close()
      })
      .then(
        () => {
          done(null)
        },
        (error: unknown) => {
          done(asError(error))
        },
      )
  }

  /** The file belongs to the cache, which alone removes it. */
  destroy(done: Done = ignore): void {
    this.close(done)
  }

  #run<Value>(done: Done<Value>, act: (handle: FileHandle) => Promise<Value>): void {
    if (this.#closed) {
      queueMicrotask(() => {
        done(new Error(`Cannot use ${this.#file}: it is closed`))
      })
      return
    }
    this.#handle ??= openFile(this.#file, this.#flags)
    const work = this.#handle.then(act)
    this.#pending.add(work)
    work.then(
      (value) => {
        this.#pending.delete(work)
        done(null, value)
      },
      (error: unknown) => {
        this.#pending.delete(work)
        // A file that could not be opened is tried again at the next access.
        if (!this.#closed) void this.#handle?.catch(() => (this.#handle = undefined))
        done(asError(error))
      },
    )
  }
}

async function openFile(file: string, access: string): Promise<FileHandle> {
  if (access === 'read') return open(file, 'r')
  return open(file, 'r+').catch((error: unknown) => {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return open(file, 'wx+', 0o640)
    throw error
  })
}

async function writeAll(handle: FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  for (let done = 0; done < bytes.length;) {
    const { bytesWritten } = await handle.write(bytes, done, bytes.length - done, position + done)
    done += bytesWritten
  }
}

function asError(error: unknown): Error {
  return error instanceof Error ? error : new Error(String(error))
}

function ignore(): void {
  // The caller does not want to know.
}
