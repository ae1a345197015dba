import { setTimeout as sleep } from 'node:timers/promises'

/** Bytes a second that callers share, in the order they ask. */
export interface RateLimiter {
  /** Waits for the turn of so many bytes. Rejects when the signal aborts. */
  take(bytes: number, signal: AbortSignal): Promise<void>
}

/** Bytes may run this far ahead of the clock, so that a timer's coarseness does not cost throughput. */
const burstMs = 50

export function createRateLimiter({
  bytesPerSecond,
  now,
}: {
  bytesPerSecond: number
  now: () => number
}): RateLimiter {
  /** When all that was taken so far will have been due. */
  let dueMs = 0
  return {
    take: async (bytes, signal) => {
      const nowMs = now()
      dueMs = Math.max(dueMs, nowMs - burstMs) + (bytes / bytesPerSecond) * 1000
      if (dueMs > nowMs) await sleep(dueMs - nowMs, undefined, { signal })
    },
  }
}
