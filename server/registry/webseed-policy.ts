import { LRUCache } from 'lru-cache'
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
  readonly pieceCount: number
  readonly host: string
  readonly counts: SwarmCounts
  /** Since the host last got a byte; undefined for one that is not stuck. */
  readonly stalledSeconds: number | undefined
  /** The host has asked the webseed for all of the range that it was given. */
  readonly rangeDone: boolean
}

/** The pieces that a host may fetch from the server. */
export interface WebseedLease {
  readonly firstPiece: number
  readonly pieceCount: number
}

/** Says who may use the server as a seed, and for what: the first hosts of a swarm, and those whom the swarm does not serve. */
export interface WebseedPolicy {
  mayUse(ask: WebseedAsk): WebseedLease | undefined
}

/** A host that has waited this long without a byte is not being served by its swarm. */
const stalledSecondsMin = 3
/** A build is leased in so many parts, none of fewer pieces than that. */
const partsMax = 32
const partPiecesMin = 4
/** Hosts of a first wave: each piece leaves the server once, and all of them pass on what they get. */
const firstHostsMax = 8
/** A part that was fetched, of a swarm that has no seeder after so long, is leased again: whoever had it may be gone. */
const doneMs = 60_000
const swarmsMax = 10_000

interface Part extends WebseedLease {
  /** Who has it, or had it. */
  host: string | undefined
  isDone: boolean
  untilMs: number
}

/**
 * While a swarm has no seeder, its first hosts hold leases of different parts of the build, and get further ones until all are leased: each byte
 * leaves the server once, over several hosts, which together can pass it on faster than the server sends it. Leases end by
 * themselves, so a host that dies with one costs its swarm `leaseMs`.
 */
export function createWebseedPolicy({ leaseMs, hostsMax, now }: WebseedPolicyOptions): WebseedPolicy {
  const swarms = new LRUCache<InfoHash, Part[]>({ max: swarmsMax })
  /** When the leases of hosts that stood still end: of a swarm without a seeder they are renewed. */
  const stalled = new LRUCache<string, number>({ max: swarmsMax })
  /** When the last lease of a host ends. */
  const hosts = new Map<string, number>()

  /** Whether the host holds a lease, or one more may. */
  const admits = (host: string, nowMs: number): boolean => {
    if (hosts.has(host) || hosts.size < hostsMax) return true
    for (const [other, untilMs] of hosts) if (untilMs <= nowMs) hosts.delete(other)
    return hosts.size < hostsMax
  }
  const firstWave = (
    { infoHash, pieceCount, host, rangeDone }: WebseedAsk,
    nowMs: number,
  ): WebseedLease | undefined => {
    const parts = swarms.get(infoHash) ?? partsOf(pieceCount)
    swarms.set(infoHash, parts)
    for (const part of parts) {
      if (part.host === undefined || part.untilMs > nowMs) continue
      part.host = undefined
      part.isDone = false
    }
    const own = parts.find((part) => part.host === host && !part.isDone)
    if (own && !rangeDone) {
      own.untilMs = nowMs + leaseMs
      return own
    }
    if (own) {
      own.isDone = true
      own.untilMs = nowMs + doneMs
    }
    const holders = new Set(parts.flatMap((part) => (part.isDone ? [] : (part.host ?? []))))
    const free = holders.size < firstHostsMax ? parts.find((part) => part.host === undefined) : undefined
    if (free === undefined) return undefined
    free.host = host
    free.untilMs = nowMs + leaseMs
    return free
  }

  return {
    mayUse: (ask) => {
      const nowMs = now()
      const { host, counts, stalledSeconds, pieceCount } = ask
      if (!admits(host, nowMs)) return undefined
      const own = `${ask.infoHash} ${host}`
      const isStalled =
        (stalledSeconds !== undefined && stalledSeconds >= stalledSecondsMin) ||
        (counts.complete === 0 && (stalled.get(own) ?? 0) > nowMs)
      if (isStalled) stalled.set(own, nowMs + leaseMs)
      const whole = { firstPiece: 0, pieceCount }
      const lease = isStalled ? whole : counts.complete === 0 ? firstWave(ask, nowMs) : undefined
      if (lease === undefined) return undefined
      hosts.set(host, nowMs + leaseMs)
      return { firstPiece: lease.firstPiece, pieceCount: lease.pieceCount }
    },
  }
}

function partsOf(pieceCount: number): Part[] {
  const count = Math.max(1, Math.min(partsMax, Math.floor(pieceCount / partPiecesMin)))
  return Array.from({ length: count }, (_, i) => {
    const firstPiece = Math.floor((i * pieceCount) / count)
    const end = Math.floor(((i + 1) * pieceCount) / count)
    return { firstPiece, pieceCount: end - firstPiece, host: undefined, isDone: false, untilMs: 0 }
  })
}
