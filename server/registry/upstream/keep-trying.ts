import { backoff, delay } from '../../../lib/runtime/backoff.ts'
import { ApiError } from '../api-error.ts'
import { UpstreamError } from './upstream-error.ts'

export interface KeepTryingOptions {
  readonly sinceMs: number
  /** Waits for up to 24 hours where the upstream is down or wants other credentials, or the disk is full: somebody will see to it. */
  readonly patient: boolean
  readonly signal: AbortSignal
}

export interface KeepTryingDeps {
  readonly now: () => number
  /** 0 ≤ random() < 1. */
  readonly random: () => number
  readonly wait?: (ms: number, signal: AbortSignal) => Promise<void>
}

/** The first waits: an event may come before the manifest can be seen (distribution#2625). */
export const firstWaitsMs: readonly number[] = [100, 200, 400]
const laterFirstMs = 800
const waitMaxMs = 60_000
/** Some two minutes of them. */
const triesMax = 12
const patienceMs = 24 * 60 * 60 * 1000

/**
 * Tries until it works, or until there is no hope: 12 times, but as long as patience lasts for what may pass.
 *
 * @param work gets the number of the try, from 1
 * @throws what the last try threw, or the reason of the signal
 */
export async function keepTrying<Result>(
  work: (tries: number) => Promise<Result>,
  { sinceMs, patient, signal }: KeepTryingOptions,
  { now, random, wait = delay }: KeepTryingDeps,
): Promise<Result> {
  const waits = backoff({ firstMs: laterFirstMs, maxMs: waitMaxMs, random })
  let counted = 0
  for (let tries = 1; ; tries++) {
    try {
      return await work(tries)
    } catch (error) {
      signal.throwIfAborted()
      const hopeful =
        patient && mayPass(error) ? now() - sinceMs < patienceMs : !isFinal(error) && ++counted < triesMax
      if (!hopeful) throw error
      await wait(firstWaitsMs[tries - 1] ?? waits.next().value, signal)
    }
  }
}

function mayPass(error: unknown): boolean {
  if (error instanceof UpstreamError) return error.fault === 'down' || error.fault === 'refused'
  return error instanceof ApiError && [429, 503, 507].includes(error.status)
}

/** Asking again with the same credential gives the same answer. */
function isFinal(error: unknown): boolean {
  return error instanceof UpstreamError && error.fault === 'refused'
}
