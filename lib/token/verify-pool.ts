import { availableParallelism } from 'node:os'
import { Worker } from 'node:worker_threads'
import type { Ip } from '../protocol/address.ts'
import { TokenError } from './claims.ts'
import { createFairQueue } from './fair-queue.ts'
import { signatureIsValidLater } from './signature.ts'
import type { VerificationKey } from './verification-key.ts'
import type { VerifyBatch } from './verify-worker.ts'

/** Signature checks off the event loop, fair between the networks that ask for them. */
export interface VerifyPool extends AsyncDisposable {
  /** Checks that wait or run; bounded by `checksMax` and what the workers hold. */
  readonly waiting: number
  /** Rejects with TokenError `busy` when too many wait from where this one comes from, or a worker was lost. */
  verify(check: SignatureCheck): Promise<boolean>
}

export interface SignatureCheck {
  /** In compact form, ASCII. */
  readonly token: string
  readonly key: VerificationKey
  /** Who asks. What has no address shares one lane of the queue. */
  readonly from?: Ip | undefined
}

/** At some 14,000 ES256 signatures a second and core, a full queue is a second or two of work. */
export const checksMax = 20_000
/** One message for so many tokens: a batch takes a worker some 5 ms, which is what a newcomer waits for at least. */
const batchMax = 64
/** One that it works on, and one to go on with. */
const batchesPerWorker = 2

interface Waiting {
  readonly check: SignatureCheck
  /** Undefined: not checked. */
  readonly settle: (valid: boolean | undefined) => void
}

interface Slot {
  readonly worker: Worker
  /** Batches it has, oldest first: it answers in order. */
  readonly batches: Waiting[][]
}

/**
 * Starts workers as there is work for them, `size` at most; one that dies is replaced by the next check, and what it
 * had is turned away. Idle workers do not keep the process alive.
 */
export function createVerifyPool(size = Math.min(4, availableParallelism())): VerifyPool {
  const queue = createFairQueue<Waiting>(checksMax)
  const slots: (Slot | undefined)[] = Array.from({ length: size }, () => undefined)
  let running = 0
  let scheduled = false
  let closed = false

  const start = (index: number): Slot => {
    const slot: Slot = { worker: new Worker(new URL('./verify-worker.ts', import.meta.url)), batches: [] }
    slots[index] = slot
    slot.worker.unref()
    slot.worker.on('message', (verdicts: Uint8Array) => {
      const batch = slot.batches.shift() ?? []
      if (slot.batches.length === 0) slot.worker.unref()
      for (const [i, { settle }] of batch.entries()) settle(verdicts[i] === 1)
      running -= batch.length
      dispatch()
    })
    const lost = () => {
      if (slots[index] === slot) slots[index] = undefined
      for (const batch of slot.batches.splice(0)) {
        running -= batch.length
        for (const { settle } of batch) settle(undefined)
      }
      schedule()
    }
    slot.worker.on('error', lost)
    slot.worker.on('exit', lost)
    return slot
  }

  /** Idle workers first, then a second batch each; what there is is spread evenly. */
  const dispatch = () => {
    scheduled = false
    if (closed) return
    for (let depth = 0; depth < batchesPerWorker; depth++) {
      for (let index = 0; index < size && queue.size > 0; index++) {
        const slot = slots[index] ?? start(index)
        if (slot.batches.length !== depth) continue
        const batch = queue.take(Math.min(batchMax, Math.ceil(queue.size / (size - index))))
        running += batch.length
        if (depth === 0) slot.worker.ref()
        slot.batches.push(batch)
        slot.worker.postMessage(messageOf(batch))
      }
    }
  }

  /** What one turn of the event loop brings becomes one message. */
  const schedule = () => {
    if (scheduled || queue.size === 0) return
    scheduled = true
    setImmediate(dispatch)
  }

  return {
    get waiting() {
      return queue.size + running
    },
    verify: (check) =>
      new Promise((resolve, reject) => {
        const settle = (valid: boolean | undefined) => {
          if (valid === undefined) reject(new TokenError('busy'))
          else resolve(valid)
        }
        if (closed || !queue.push({ check, settle }, laneOf(check.from))) settle(undefined)
        else schedule()
      }),
    [Symbol.asyncDispose]: async () => {
      closed = true
      for (const { settle } of queue.take(queue.size)) settle(undefined)
      await Promise.all(slots.map(async (slot) => slot?.worker.terminate()))
    },
  }
}

/** For a process that checks a few tokens at a time: on the threads that Node has anyway, `checksMax` at once. */
export function createSmallVerifyPool(checksMax: number): VerifyPool {
  let waiting = 0
  return {
    get waiting() {
      return waiting
    },
    verify: async ({ token, key }) => {
      if (waiting >= checksMax) throw new TokenError('busy')
      waiting++
      try {
        return await signatureIsValidLater(token, key)
      } finally {
        waiting--
      }
    },
    [Symbol.asyncDispose]: () => Promise.resolve(),
  }
}

/** One lane for each /24, or /48: what one attacker usually has. */
export function laneOf(from: Ip | undefined): number {
  if (!from) return -1
  const [a = 0, b = 0, c = 0, d = 0, e = 0, f = 0] = from.bytes
  const first = a * 0x10000 + b * 0x100 + c
  return from.family === 4 ? first : 2 ** 48 + first * 2 ** 24 + d * 0x10000 + e * 0x100 + f
}

function messageOf(batch: readonly Waiting[]): VerifyBatch {
  const keys: VerificationKey[] = []
  const tokens: string[] = []
  const keyOf: number[] = []
  for (const { check } of batch) {
    let index = keys.indexOf(check.key)
    if (index < 0) index = keys.push(check.key) - 1
    tokens.push(check.token)
    keyOf.push(index)
  }
  return { keys: keys.map(({ publicKey, algorithm }) => ({ publicKey, algorithm })), tokens, keyOf }
}
