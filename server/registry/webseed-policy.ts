import type { InfoHash } from '../../lib/protocol/infohash.ts'
import type { SwarmCounts } from '../../lib/protocol/scrape.ts'

export interface WebseedPolicyOptions {
  /** A lease that is not renewed for this long is free again. */
  readonly leaseMs: number
  /** Leases of all swarms at once. */
  readonly leasesMax: number
  readonly now: () => number
}

export interface WebseedAsk {
  readonly infoHash: InfoHash
  readonly host: string
  readonly counts: SwarmCounts
  /** Since the host last got a byte; undefined for one that is not stuck. */
  readonly stalledSeconds: number | undefined
}

/** Says who may use the server as a seed: the first of a swarm, and those whom the swarm does not serve. */
export interface WebseedPolicy {
  mayUse(ask: WebseedAsk): boolean
}

/** A host that has waited this long without a byte is not being served by its swarm. */
const stalledSecondsMin = 10

/**
 * One host of a swarm without a seeder holds a lease: the others find it, and each byte leaves the server once. Leases
 * end by themselves, so a host that dies with one costs its swarm `leaseMs`.
 */
export function createWebseedPolicy({ leaseMs, leasesMax, now }: WebseedPolicyOptions): WebseedPolicy {
  const leases = new Map<string, { infoHash: InfoHash; untilMs: number }>()
  return {
    mayUse: ({ infoHash, host, counts, stalledSeconds }) => {
      const nowMs = now()
      for (const [holder, { untilMs }] of leases) if (untilMs <= nowMs) leases.delete(holder)
      const own = `${infoHash} ${host}`
      const stalled = stalledSeconds !== undefined && stalledSeconds >= stalledSecondsMin
      const first =
        counts.complete === 0 && ![...leases.values()].some((lease) => lease.infoHash === infoHash)
      const renewed = leases.has(own) && counts.complete === 0
      if (!(first || renewed || stalled)) {
        leases.delete(own)
        return false
      }
      if (!leases.has(own) && leases.size >= leasesMax) return false
      leases.set(own, { infoHash, untilMs: nowMs + leaseMs })
      return true
    },
  }
}
