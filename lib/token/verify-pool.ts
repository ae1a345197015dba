import { availableParallelism } from 'node:os'
import { Worker } from 'node:worker_threads'
import { TokenError } from './claims.ts'
import type { VerifyRequest } from './verify-worker.ts'

/** Signature checks off the event loop. */
export interface VerifyPool extends AsyncDisposable {
  /** Checks that wait or run. */
  readonly waiting: number
  /** @throws TokenError `bad_signature` when the queue is full: a flood of new tokens must not grow memory */
  verify(request: Omit<VerifyRequest, 'id'>): Promise<boolean>
}

/** Signatures that wait or run at once. At 2,000 a second and worker the queue is some seconds long. */
const queueMax = 20_000

/** Starts workers at the first check, `size` of them at most; one that dies is replaced, and what it had is refused. */
export function createVerifyPool(size = Math.min(4, availableParallelism())): VerifyPool {
  const workers = new Map<number, { worker: Worker; waiting: Map<number, (valid: boolean) => void> }>()
  let nextId = 0
  let queued = 0

  const start = (slot: number) => {
    const waiting = new Map<number, (valid: boolean) => void>()
    const worker = new Worker(new URL('./verify-worker.ts', import.meta.url))
    const entry = { worker, waiting }
    workers.set(slot, entry)
    worker.unref()
    worker.on('message', ({ id, valid }: { id: number; valid: boolean }) => {
      waiting.get(id)?.(valid)
      waiting.delete(id)
      if (waiting.size === 0) worker.unref()
    })
    const lost = () => {
      for (const settle of waiting.values()) settle(false)
      waiting.clear()
      // An empty slot starts a new worker with the next check.
      if (workers.get(slot) === entry) workers.delete(slot)
    }
    worker.on('error', lost)
    worker.on('exit', lost)
    return entry
  }

  return {
    get waiting() {
      return queued
    },
    verify: async (request) => {
      if (queued >= queueMax)
        throw new TokenError('bad_signature', { cause: new Error('too many tokens wait to be verified') })
      const id = nextId++
      const { worker, waiting } = workers.get(id % size) ?? start(id % size)
      queued++
      try {
        return await new Promise<boolean>((resolve) => {
          waiting.set(id, resolve)
          worker.ref()
          worker.postMessage({ ...request, id } satisfies VerifyRequest)
        })
      } finally {
        queued--
      }
    },
    [Symbol.asyncDispose]: async () => {
      await Promise.all([...workers.values()].map(({ worker }) => worker.terminate()))
    },
  }
}
