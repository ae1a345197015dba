import { backoff, delay } from '../../../lib/runtime/backoff.ts'
import { ApiError } from '../api-error.ts'
import { UpstreamError } from './upstream-error.ts'

export interface KeepTryingDeps {
  readonly now: () => number
  /** 0 ≤ random() < 1. */
  readonly random: () => number
}

/** The first waits: an event may come before the manifest can be seen (distribution#2625). */
export const firstWaitsMs: readonly number[] = [100, 200, 400]
const laterFirstMs = 800
const waitMaxMs = 60_000
/** Tries where the upstream is there and does not give what is wanted: some two minutes of them. */
const triesMax = 12
/** An upstream that is down, and a server that has no room, are waited for this long. */
const passingMaxMs = 24 * 60 * 60 * 1000

/**
 * Tries until it works, or until there is no hope: 12 tries where the upstream answers, 24 hours where it does not, or where the disk is
 * full.
 *
 * @param work gets the number of the try, from 1
 * @throws what the last try threw, or the reason of the signal
 */
export async function keepTrying<Result>(
  work: (tries: number) => Promise<Result>,
  sinceMs: number,
  signal: AbortSignal,
  { now, random }: KeepTryingDeps,
): Promise<Result> {
  const waits = backoff({ firstMs: laterFirstMs, maxMs: waitMaxMs, random })
  let answered = 0
  for (let tries = 1; ; tries++) {
    try {
      return await work(tries)
    } catch (error) {
      signal.throwIfAborted()
      if (mayPass(error)) {
        if (now() - sinceMs >= passingMaxMs) throw error
      } else if (++answered >= triesMax) throw error
      await delay(firstWaitsMs[tries - 1] ?? waits.next().value, signal)
    }
  }
}

function mayPass(error: unknown): boolean {
  if (error instanceof UpstreamError) return error.fault === 'down'
  return error instanceof ApiError && [429, 503, 507].includes(error.status)
}
