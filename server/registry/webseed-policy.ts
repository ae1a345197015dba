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
  /**
   * The first piece of a lease of which the host has asked the webseed for all; true for whichever it holds. A host that asks twice at once
   * must not be taken to have fetched what it has just been given.
   */
  readonly rangeDone: number | boolean
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
export const waves = {
  /** A build is leased in so many parts, none of fewer pieces than that. */
  partsMax: 32,
  partPiecesMin: 4,
  /** Hosts of a first wave: each piece leaves the server once, and all of them pass on what they get. */
  firstHostsMax: 8,
  /**
   * A part that was fetched, of a swarm that has no seeder after as long again as the swarm is known, within these bounds, is leased again once
   * all were: whoever had it may be gone.
   */
  doneMs: 10_000,
  doneMinMs: 1_000,
  /**
   * While parts are leased, a host without one that stands still waits for them, and gets all of the build only after so long: most often it
   * is the server that gives too little, or was away, and then every host stands still at once.
   */
  patienceMs: 20_000,
  /** Who takes so many times as long for its part as half of the others did is slow: once no part is left, others go on with it. */
  slowFactor: 2,
  /** …and longer than this. */
  slowMinMs: 1_000,
  /** …once that many parts were fetched. */
  partsTimedMin: 3,
} as const
const swarmsMax = 10_000

interface Part extends WebseedLease {
  /** Who has it, or had it. */
  host: string | undefined
  isDone: boolean
  /** When that host got it. */
  sinceMs: number
  untilMs: number
  /** What it took the first who had it. */
  tookMs: number | undefined
}

interface Swarm {
  readonly parts: readonly Part[]
  readonly knownSinceMs: number
}

/**
 * While a swarm has no seeder, its first hosts hold leases of different parts of the build, and get further ones until all are leased: each byte
 * leaves the server once, over several hosts, which together can pass it on faster than the server sends it. Leases end by
 * themselves, so a host that dies with one costs its swarm `leaseMs`. A host on a slow link would have everybody wait for its part: it ends what it
 * has begun, and the rest is leased to one that is done with its own.
 */
export function createWebseedPolicy({ leaseMs, hostsMax, now }: WebseedPolicyOptions): WebseedPolicy {
  const swarms = new LRUCache<InfoHash, Swarm>({ max: swarmsMax })
  /** When the leases end of hosts that may have all of a build without a seeder: they are renewed. */
  const stalled = new LRUCache<string, number>({ max: swarmsMax })
  const { admits, admit } = hostAdmission({ hostsMax })
  const firstWave = (
    { host, rangeDone }: WebseedAsk,
    { parts, knownSinceMs }: Swarm,
    nowMs: number,
  ): WebseedLease | undefined => {
    // Who comes late goes on with its own, unless another host has it by now.
    const own = parts.find((part) => part.host === host && !part.isDone)
    if (own && rangeDone !== true && rangeDone !== own.firstPiece) {
      own.untilMs = nowMs + leaseMs
      return own
    }
    if (own) {
      own.tookMs ??= nowMs - own.sinceMs
      own.isDone = true
      own.untilMs = nowMs + Math.min(waves.doneMs, Math.max(waves.doneMinMs, nowMs - knownSinceMs))
    }
    const leased = parts.filter(({ isDone, untilMs }) => !isDone && untilMs > nowMs)
    if (new Set(leased.map((part) => part.host)).size >= waves.firstHostsMax) return undefined
    // One that has, or had, a part.
    const isFirst = parts.some((part) => part.host === host)
    const free =
      parts.find((part) => part.host === undefined) ??
      (isFirst ? slowest(parts, leased, nowMs) : undefined) ??
      parts.find(({ untilMs }) => untilMs <= nowMs)
    if (free === undefined) return undefined
    free.isDone = false
    free.host = host
    free.sinceMs = nowMs
    free.untilMs = nowMs + leaseMs
    return free
  }

  const withoutSeeder = (ask: WebseedAsk, nowMs: number): WebseedLease | undefined => {
    const { infoHash, host, pieceCount } = ask
    const own = `${infoHash} ${host}`
    const swarm = swarms.get(infoHash) ?? { parts: partsOf(pieceCount), knownSinceMs: nowMs }
    swarms.set(infoHash, swarm)
    const mayHaveAll = (stalled.get(own) ?? 0) > nowMs
    const part = mayHaveAll ? undefined : firstWave(ask, swarm, nowMs)
    if (part) return part
    if (!mayHaveAll && !hasWaited(ask, nowMs - swarm.knownSinceMs)) return undefined
    stalled.set(own, nowMs + leaseMs)
    return { firstPiece: 0, pieceCount }
  }

  return {
    mayUse: (ask) => {
      const nowMs = now()
      const { host, counts, pieceCount } = ask
      if (!admits(host, nowMs)) return undefined
      const lease =
        counts.complete === 0
          ? withoutSeeder(ask, nowMs)
          : isStandingStill(ask)
            ? { firstPiece: 0, pieceCount }
            : undefined
      if (lease === undefined) return undefined
      admit(host, nowMs + leaseMs)
      return { firstPiece: lease.firstPiece, pieceCount: lease.pieceCount }
    },
  }
}

/** Says of how many hosts a server has leases out. */
export function hostAdmission({ hostsMax }: Pick<WebseedPolicyOptions, 'hostsMax'>) {
  /** When the last lease of a host ends. */
  const hosts = new Map<string, number>()
  return {
    /** Whether the host holds a lease, or one more may. */
    admits: (host: string, nowMs: number): boolean => {
      if (hosts.has(host) || hosts.size < hostsMax) return true
      for (const [other, untilMs] of hosts) if (untilMs <= nowMs) hosts.delete(other)
      return hosts.size < hostsMax
    },
    admit: (host: string, untilMs: number) => {
      hosts.set(host, untilMs)
    },
  }
}

/** Whether the swarm does not serve the host. */
export function isStandingStill({ stalledSeconds }: Pick<WebseedAsk, 'stalledSeconds'>): boolean {
  return stalledSeconds !== undefined && stalledSeconds >= stalledSecondsMin
}

/** Whether a host has stood still for longer than others need to fetch what they were leased. */
function hasWaited({ stalledSeconds }: Pick<WebseedAsk, 'stalledSeconds'>, knownForMs: number): boolean {
  return stalledSeconds !== undefined && Math.min(stalledSeconds * 1000, knownForMs) >= waves.patienceMs
}

/** Of the parts that are leased the one that somebody has for longest, and for too long. */
function slowest(parts: readonly Part[], leased: readonly Part[], nowMs: number): Part | undefined {
  const took = parts.flatMap(({ tookMs }) => tookMs ?? []).sort((one, other) => one - other)
  const median = took[took.length >> 1]
  if (median === undefined || took.length < waves.partsTimedMin) return undefined
  const tooLongMs = Math.max(waves.slowMinMs, waves.slowFactor * median)
  return leased
    .filter(({ sinceMs }) => nowMs - sinceMs > tooLongMs)
    .sort((one, other) => one.sinceMs - other.sinceMs)[0]
}

function partsOf(pieceCount: number): Part[] {
  const count = Math.max(1, Math.min(waves.partsMax, Math.floor(pieceCount / waves.partPiecesMin)))
  return Array.from({ length: count }, (_, i) => {
    const firstPiece = Math.floor((i * pieceCount) / count)
    const end = Math.floor(((i + 1) * pieceCount) / count)
    return {
      firstPiece,
      pieceCount: end - firstPiece,
      host: undefined,
      isDone: false,
      sinceMs: 0,
      untilMs: 0,
      tookMs: undefined,
    }
  })
}
