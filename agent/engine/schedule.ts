import type { EnginePeer } from './engine.ts'
import { blockBytes, ownBlockBytes } from './wire.ts'

/** Nothing near moved for this long: far peers held in reserve are dialled, a few at a time. */
const standsStillMs = 3_000
/** …and for this long, though peers have what is missing: they are asked for all of it, also for what near ones have. */
const stuckMs = 10_000
/** Who has had nothing under way for more than this share of the last few seconds is badly served: its gateways may be on slow links. */
const idleShareMax = 0.5
const idleWindowMs = 5_000
/** Having stood still or been idle, a host that is no gateway may ask far peers for this long. */
const farGraceMs = 15_000
/** A near peer has connected and said what it has by then; a gateway without one loses no more than this. */
const nearFirstMs = 100
/** Far peers that were held in reserve are dialled so many at a time. */
export const reserveStep = 4
/** Between two dials of a peer; doubled with each failure. */
export const redialMs = 1_000
const redialMaxMs = 60_000
/** A peer that was asked and sends nothing for this long, or for twice as long as a piece usually takes, is late, and others are asked too. */
const lateMs = 1_000
/** …and for this long is let go. */
export const silentMs = 10_000
/** A connection to an agent far away that neither end may use any more is let go after this long: each piece of news over it costs both of them. */
export const uselessMs = 5_000
/** What is still under way is claimed again this often: a claim counts for three times as long, and a neighbour may be new. */
export const claimAgainMs = 5_000
/** Hosts of a datacentre do not trade tit for tat: so many clients that know no turns are served at once. */
export const uploadSlots = 50
/** No peer gave anything for this long: the webseed is asked also for what peers have. */
export const webseedAfterMs = 500
/** Below this rate, bytes a second from all peers together, a host stands still. */
export const standstillRate = 16 * 1024
/** Bytes asked for ahead: what a peer sends in this long, within bounds. */
const aheadMs = 500
const aheadMin = 256 * 1024
/** Of a slow peer: what it is asked for lies in its kernel's buffer soon, and whatever else it has to say waits behind that. */
const aheadSlowMin = 48 * 1024
/** Below these rates, bytes a second, a block of 256 or of 64 KiB keeps a connection busy for long. */
const slowRate = 4 * 1024 * 1024
const slowestRate = 512 * 1024
const aheadFirst = 1024 * 1024
const aheadMax = 4 * 1024 * 1024

/**
 * Which peers a fetch may dial and ask. Near ones always; far ones at once where this host is a gateway of its rack, as the tracker's last
 * reply says, and else once nothing has moved for a while. Pure: its clock comes from outside.
 */
export class Reach {
  #gateway = true
  #nearKnown = false
  #farFromMs = 0
  #farUntilMs = 0
  #stuckUntilMs = 0
  #awaitedAtMs = 0
  /** When there was last nothing that is missing here and that a peer has. */
  #unofferedAtMs = 0
  #idleShare = 0
  #tickedAtMs: number | undefined

  /** The tracker has named a peer. @returns in how many ms a gateway may dial far peers, said once */
  heard({ distance, reserve }: Pick<EnginePeer, 'distance' | 'reserve'>, nowMs: number): number | undefined {
    if (distance === 0) {
      this.#nearKnown = true
      return undefined
    }
    this.#gateway = !reserve
    if (this.#farFromMs > 0) return undefined
    this.#farFromMs = nowMs + nearFirstMs
    return nearFirstMs
  }

  /**
   * To be called now and then while the fetch is under way.
   *
   * @param isAwaited a neighbour says that it is fetching something from far away: where links are slow the first pieces of a build take their
   * time, and whoever waits for them does not stand still
   * @param isIdle nothing is being fetched: whatever near peers have is here, and what they are fetching comes slowly
   * @param isOffered a peer has something that is missing here; asked only where nothing moves. Who is offered nothing waits for others, and has no
   * reason to do without its neighbours
   */
  tick(
    {
      movedAtMs,
      isAwaited,
      isIdle,
      isOffered,
    }: {
      readonly movedAtMs: number
      readonly isAwaited: boolean
      readonly isIdle: boolean
      readonly isOffered: () => boolean
    },
    nowMs: number,
  ): void {
    const weight = Math.min(1, (nowMs - (this.#tickedAtMs ?? nowMs)) / idleWindowMs)
    this.#tickedAtMs = nowMs
    this.#idleShare += weight * (Number(isIdle) - this.#idleShare)
    // What neighbours fetch is left to them all the same.
    if (this.#idleShare > idleShareMax) this.#farUntilMs = Math.max(this.#farUntilMs, nowMs + farGraceMs)
    if (isAwaited) this.#awaitedAtMs = nowMs
    const stillMs = nowMs - Math.max(movedAtMs, this.#awaitedAtMs)
    if (stillMs < standsStillMs) return
    this.#farUntilMs = nowMs + farGraceMs
    if (!isOffered()) this.#unofferedAtMs = nowMs
    if (Math.min(stillMs, nowMs - this.#unofferedAtMs) >= stuckMs) this.#stuckUntilMs = nowMs + farGraceMs
  }

  /** Far peers are asked for whatever is missing. */
  isStuck(nowMs: number): boolean {
    return nowMs < this.#stuckUntilMs
  }

  #stoodStill(nowMs: number): boolean {
    return nowMs < this.#farUntilMs
  }

  mayAsk(distance: number, nowMs: number): boolean {
    return distance === 0 || this.#gateway || this.#stoodStill(nowMs)
  }

  /** `served`: a near peer has everything. What is near is asked first. */
  mayDial(
    { distance, reserve }: Pick<EnginePeer, 'distance' | 'reserve'>,
    served: boolean,
    nowMs: number,
  ): boolean {
    if (distance === 0 || this.#stoodStill(nowMs)) return true
    return !reserve && !served && !(this.#nearKnown && nowMs < this.#farFromMs)
  }
}

/** Bytes to have asked a peer for that gives `rate` bytes a second, 0 where that is not known. */
export function aheadOf(rate: number): number {
  if (rate === 0) return aheadFirst
  return Math.min(aheadMax, Math.max(aheadMinOf(rate), (rate * aheadMs) / 1000))
}

/** A peer that is owed this much need not be asked for more yet. */
export function isAskedEnough(requestedBytes: number, rate: number): boolean {
  return requestedBytes > aheadOf(rate) / 2 && requestedBytes > aheadMinOf(rate)
}

/** The longest block to ask such a peer for. */
export function blockBytesOf(rate: number): number {
  if (rate === 0 || rate >= slowRate) return ownBlockBytes
  return rate < slowestRate ? blockBytes : ownBlockBytes / 4
}

function aheadMinOf(rate: number): number {
  return rate > 0 && rate < slowestRate ? aheadSlowMin : aheadMin
}

/** When a peer is to be dialled again, in ms from now, after so many failures before this one. */
export function redialAfterMs(failures: number): number {
  return Math.min(redialMaxMs, redialMs * 2 ** failures)
}

/** In how many ms a block should be here of a peer that is to send `bytes` until its end, at `rate` bytes a second. */
export function dueInMs(bytes: number, rate: number): number {
  // Who sends nothing is late all the same; of who has begun to it is not known yet.
  return rate > 0 ? (bytes * 1000) / rate : silentMs
}

/**
 * Whether others may be asked for a block too: its peer has sent nothing for `stillMs`, or, once there is nothing else to ask for, it takes twice as
 * long as it should. On slow links, where a piece takes `usualMs`, news of anything takes long too.
 *
 * @param untouched pieces that are neither here nor begun: while there are some, what comes slowly is left to come
 */
export function isLate(
  { askedMs, dueMs }: { readonly askedMs: number; readonly dueMs: number },
  {
    stillMs,
    usualMs,
    untouched,
    nowMs,
  }: {
    readonly stillMs: number
    readonly usualMs: number
    readonly untouched: number
    readonly nowMs: number
  },
): boolean {
  const patienceMs = Math.min(silentMs, Math.max(lateMs, 2 * usualMs))
  if (stillMs > patienceMs) return true
  return untouched === 0 && nowMs - dueMs > Math.max(patienceMs, dueMs - askedMs)
}

/**
 * In how many ms a peer could bring a block, its `bytes` at the end, that another was asked for: at the end of a fetch twice what it should
 * take, else never, so that only what is given up is asked for again.
 */
export function hedgeInMs(bytes: number, rate: number, untouched: number): number {
  return untouched === 0 && rate > 0 ? 2 * dueInMs(bytes, rate) : Number.MAX_VALUE
}
