import { Worker } from 'node:worker_threads'

export type HashRequest =
  | { readonly kind: 'open'; readonly id: number; readonly file: string; readonly length: number }
  | { readonly kind: 'advance'; readonly id: number; readonly bytes: number }
  | { readonly kind: 'close'; readonly id: number }

export type HashReply =
  { readonly id: number; readonly hex: string } | { readonly id: number; readonly error: string }

/** The SHA-256 of one file that grows from its start. */
export interface PrefixHash extends Disposable {
  /** The first `bytes` are final and on disk. */
  advance(bytes: number): void
  /** Resolves with the hex digest once the whole length was advanced to. */
  readonly digest: Promise<string>
}

/** Hashes in a thread of its own, so that a fetch leaves the event loop to the peers. */
export interface PrefixHasher extends AsyncDisposable {
  open(file: string, length: number): PrefixHash
}

export function startPrefixHasher(): PrefixHasher {
  const worker = new Worker(new URL('./hash-worker.ts', import.meta.url))
  worker.unref()
  const waiting = new Map<number, PromiseWithResolvers<string>>()
  let lastId = 0
  let broken: Error | undefined
  worker.on('message', (message: HashReply) => {
    const outcome = waiting.get(message.id)
    waiting.delete(message.id)
    if ('hex' in message) outcome?.resolve(message.hex)
    else outcome?.reject(new Error(message.error))
  })
  const fail = (error: Error) => {
    broken ??= error
    for (const outcome of waiting.values()) outcome.reject(broken)
    waiting.clear()
  }
  worker.on('error', (error) => {
    fail(error instanceof Error ? error : new Error(String(error)))
  })
  worker.on('exit', () => {
    fail(new Error('the hash worker has ended'))
  })
  const post = (message: HashRequest) => {
    worker.postMessage(message)
  }
  return {
    open: (file, length) => {
      if (broken) throw broken
      const id = ++lastId
      const outcome = Promise.withResolvers<string>()
      // Who closes it before the end does not look at it.
      outcome.promise.catch(() => undefined)
      waiting.set(id, outcome)
      post({ kind: 'open', id, file, length })
      return {
        digest: outcome.promise,
        advance: (bytes) => {
          post({ kind: 'advance', id, bytes })
        },
        [Symbol.dispose]: () => {
          if (!waiting.delete(id)) return
          post({ kind: 'close', id })
          outcome.reject(new Error('the hash was closed'))
        },
      }
    },
    [Symbol.asyncDispose]: async () => {
      await worker.terminate()
    },
  }
}
