import { RestingThread } from '../lib/runtime/resting-thread.ts'

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

/** Between two deploys the thread need not be there. */
const restMs = 30_000

export function createPrefixHasher(): PrefixHasher {
  const waiting = new Map<number, PromiseWithResolvers<string>>()
  let lastId = 0
  const thread = new RestingThread<HashRequest, HashReply>(new URL('./hash-worker.ts', import.meta.url), {
    restMs,
    replied: (message) => {
      const outcome = settled(message.id)
      if ('hex' in message) outcome?.resolve(message.hex)
      else outcome?.reject(new Error(message.error))
    },
    lost: (error) => {
      for (const id of [...waiting.keys()]) settled(id)?.reject(error)
    },
  })
  const settled = (id: number) => {
    const outcome = waiting.get(id)
    if (waiting.delete(id)) thread.release()
    return outcome
  }
  return {
    open: (file, length) => {
      const id = ++lastId
      const outcome = Promise.withResolvers<string>()
      // Who closes it before the end does not look at it.
      outcome.promise.catch(() => undefined)
      waiting.set(id, outcome)
      thread.need()
      thread.post({ kind: 'open', id, file, length })
      return {
        digest: outcome.promise,
        advance: (bytes) => {
          if (waiting.has(id)) thread.post({ kind: 'advance', id, bytes })
        },
        [Symbol.dispose]: () => {
          if (!waiting.has(id)) return
          thread.post({ kind: 'close', id })
          settled(id)?.reject(new Error('the hash was closed'))
        },
      }
    },
    [Symbol.asyncDispose]: () => thread[Symbol.asyncDispose](),
  }
}
