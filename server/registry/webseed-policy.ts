import type { InfoHash } from '../../lib/protocol/infohash.ts'
import type { SwarmCounts } from '../../lib/protocol/scrape.ts'

export interface WebseedPolicyOptions {
  /** A lease that is not renewed for this long is free again. */
  readonly leaseMs: number
  /** Hosts that hold leases at once: what one host fetches at a time it bounds itself. */
  readonly hostsMax: number
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
export function createWebseedPolicy({ leaseMs, hostsMax, now }: WebseedPolicyOptions): WebseedPolicy {
  /** By swarm and host; the one that ends first stands first. */
  const leases = new Map<string, { infoHash: InfoHash; host: string; untilMs: number }>()
  const bySwarm = new Map<InfoHash, number>()
  const byHost = new Map<string, number>()

  const end = (key: string) => {
    const lease = leases.get(key)
    if (!lease) return
    leases.delete(key)
    count(bySwarm, lease.infoHash, -1)
    count(byHost, lease.host, -1)
  }

  return {
    mayUse: ({ infoHash, host, counts, stalledSeconds }) => {
      const nowMs = now()
      for (const [key, { untilMs }] of leases) {
        if (untilMs > nowMs) break
        end(key)
      }
      const own = `${infoHash} ${host}`
      const stalled = stalledSeconds !== undefined && stalledSeconds >= stalledSecondsMin
      const first = counts.complete === 0 && !bySwarm.has(infoHash)
      const renewed = leases.has(own) && counts.complete === 0
      const had = leases.has(own)
      // Last in line from now on.
      end(own)
      if (!(first || renewed || stalled)) return false
      if (!had && !byHost.has(host) && byHost.size >= hostsMax) return false
      leases.set(own, { infoHash, host, untilMs: nowMs + leaseMs })
      count(bySwarm, infoHash, 1)
      count(byHost, host, 1)
      return true
    },
  }
}

/** What has a count of 0 is not kept. */
function count<Key>(counts: Map<Key, number>, key: Key, by: number): void {
  const sum = (counts.get(key) ?? 0) + by
  if (sum === 0) counts.delete(key)
  else counts.set(key, sum)
}
