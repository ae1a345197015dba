import { holdLease } from './lease.ts'
import type { StateStore } from './state-store.ts'

/**
 * Does long work under a name on one server at a time, again on another where the first one fails, until `signal` aborts or the work ends by
 * itself. The work's own signal aborts when it is not this server's any more.
 */
export type OnOneServer = (
  name: string,
  signal: AbortSignal,
  work: (signal: AbortSignal) => Promise<void>,
) => Promise<void>

/** There is one server. */
export const onThisServer: OnOneServer = async (_name, signal, work) => work(signal)

const leaseMs = 15_000

/** Of servers that share a state the one that has a lease in it. */
export function onOneServerOf(
  state: StateStore,
  { holder, random }: { holder: string; random: () => number },
): OnOneServer {
  return async (name, signal, work) =>
    holdLease(state, name, { ttlMs: leaseMs, holder, signal, random }, (lease) => work(lease.signal))
}
