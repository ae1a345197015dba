import { availableParallelism } from 'node:os'
import { Worker } from 'node:worker_threads'
import type { HashAnswer, HashCall } from './hash-worker.ts'

/** Uploads being hashed and written off the event loop; each stays with one worker. */
export interface HashPool extends AsyncDisposable {
  /** @throws Error with the system's `code` where there is one, such as ENOSPC */
  call(call: HashCall): Promise<HashAnswer>
}

/** Starts up to `size` workers as uploads come. A worker that dies fails its uploads; the next upload gets a new one. */
export function createHashPool(size = Math.min(4, availableParallelism())): HashPool {
  const slots = new Map<number, WorkerSlot>()
  const slotOf = new Map<string, WorkerSlot>()

  const slotFor = (upload: string): WorkerSlot => {
    const known = slotOf.get(upload)
    if (known) return known
    let least: WorkerSlot | undefined
    for (let i = 0; i < size; i++) {
      let slot = slots.get(i)
      if (!slot) {
        slot = startSlot(() => {
          slots.delete(i)
          for (const [id, its] of slotOf) if (its === slot) slotOf.delete(id)
        })
        slots.set(i, slot)
      }
      if (!least || slot.uploads < least.uploads) least = slot
      if (least.uploads === 0) break
    }
    if (!least) throw new RangeError(`Cannot hash with ${size} workers: need at least 1`)
    least.uploads++
    slotOf.set(upload, least)
    return least
  }

  return {
    call: async (call) => {
      const slot = slotFor(call.upload)
      try {
        return await slot.call(call)
      } finally {
        if ((call.op === 'finish' || call.op === 'drop') && slotOf.delete(call.upload)) slot.uploads--
      }
    },
    [Symbol.asyncDispose]: async () => {
      await Promise.all([...slots.values()].map(({ worker }) => worker.terminate()))
    },
  }
}

interface WorkerSlot {
  readonly worker: Worker
  uploads: number
  call(call: HashCall): Promise<HashAnswer>
}

interface Waiting {
  readonly resolve: (answer: HashAnswer) => void
  readonly reject: (error: Error) => void
}

function startSlot(lost: () => void): WorkerSlot {
  const worker = new Worker(new URL('./hash-worker.ts', import.meta.url))
  const waiting = new Map<number, Waiting>()
  let nextId = 0
  worker.on(
    'message',
    ({
      id,
      answer,
      error,
    }: {
      id: number
      answer?: HashAnswer
      error?: { message: string; code?: string }
    }) => {
      const caller = waiting.get(id)
      waiting.delete(id)
      if (waiting.size === 0) worker.unref()
      if (answer) caller?.resolve(answer)
      else
        caller?.reject(
          Object.assign(new Error(`Cannot write upload: ${error?.message ?? 'no answer'}`), {
            code: error?.code,
          }),
        )
    },
  )
  const end = (cause?: Error) => {
    for (const { reject } of waiting.values())
      reject(new Error('Cannot write upload: its worker ended', { cause }))
    waiting.clear()
    lost()
  }
  worker.on('error', end)
  worker.on('exit', () => {
    end()
  })
  worker.unref()
  return {
    worker,
    uploads: 0,
    call: async (call) =>
      new Promise((resolve, reject) => {
        const id = nextId++
        waiting.set(id, { resolve, reject })
        worker.ref()
        worker.postMessage({ id, call }, call.op === 'append' ? [call.bytes.buffer] : [])
      }),
  }
}
