// A thread that counts under a lock, without any other care. In: LockHammer. Out: 'done'. With `die` it ends while it holds the lock.
import { parentPort, workerData } from 'node:worker_threads'
import { Lock } from '../../server/tracker/memory/lock.ts'

export interface LockHammer {
  /** The lock, the counter in two words that must stay alike, and how many threads are there. */
  readonly words: Int32Array
  readonly rounds: number
  /** All begin together. */
  readonly threads: number
  readonly die: boolean
}

const { words, rounds, threads, die } = workerData as LockHammer
const lock = new Lock(words.subarray(0, 1))
Atomics.add(words, 3, 1)
while (Atomics.load(words, 3) < threads);
for (let round = 0; round < rounds; round++) {
  lock.acquire()
  const [a = 0, b = 0] = [words[1], words[2]]
  if (a !== b) throw new Error(`Another thread is in the section: ${a} and ${b}`)
  words[1] = a + 1
  // Every now and then the holder takes so long that the others go to sleep.
  if (round % 1000 === 0) for (let i = 0; i < 100_000; i++) words[2] = b
  words[2] = b + 1
  lock.release()
}
if (die) {
  lock.acquire()
  process.exit(1)
}
parentPort?.postMessage('done')
