import { setTimeout as sleep } from 'node:timers/promises'

export interface BackoffOptions {
  /** Before the second try. */
  firstMs?: number
  /** No delay is longer. */
  maxMs?: number
  /** 0 ≤ random() < 1. */
  random: () => number
}

/**
 * Delays between tries, without end: doubling from `firstMs` to `maxMs`, each drawn from the upper half of its
 * range, so that hosts that failed together do not come back together.
 */
export function* backoff({
  firstMs = 250,
  maxMs = 30_000,
  random,
}: BackoffOptions): Generator<number, never> {
  for (let ceilingMs = firstMs; ; ceilingMs = Math.min(ceilingMs * 2, maxMs)) {
    yield ceilingMs * (0.5 + random() / 2)
  }
}

/** Waits; rejects with the signal's reason when it aborts first. */
export async function delay(ms: number, signal: AbortSignal): Promise<void> {
  await sleep(ms, undefined, { signal }).catch((error: unknown) => {
    throw signal.aborted ? signal.reason : error
  })
}
