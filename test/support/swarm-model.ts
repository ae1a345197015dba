// What one tracker that never fails would know of some swarms, by what their peers told and were answered.

/** What is wrong with a peer that was handed out: nobody announced it in this swarm, it had left, its life was over, it is the one who asked, or it is there twice. */
export type WrongPeer = 'unknown' | 'stopped' | 'expired' | 'self' | 'twice'

export interface Range {
  readonly least: number
  readonly most: number
}

interface PeerRecord {
  readonly seeder: boolean
  /** When it asked for the last time, and when that was answered; Infinity while it is under way. */
  readonly askedAtMs: number
  readonly answeredAtMs: number
  readonly intervalSeconds: number
  /** Has told that it leaves. */
  readonly stopped: boolean
  /** What it was before it asked, while nothing was answered; undefined for one that was not there. */
  readonly before: 'seeder' | 'leecher' | undefined
  /** Nothing was answered, and nothing will be: it is what it was, or what it said. */
  readonly unsure: boolean
}

/** Intervals are told in whole seconds, and what is due goes when its turn comes. */
const slackMs = 1500

/** As the tracker promises it: one missed announce costs nothing. */
function lifeMs(intervalSeconds: number): number {
  return Math.max(30_000, intervalSeconds * 2500)
}

/**
 * Of one swarm. Times are of any one clock, ms. Of what is under way nothing can be said: a peer counts for both, for what it was and what it
 * becomes.
 */
export class SwarmModel {
  readonly #peers = new Map<number, PeerRecord>()
  readonly #staleMs: number

  /** @param staleMs how old what a tracker says may be */
  constructor(staleMs: number) {
    this.#staleMs = staleMs
  }

  asks(port: number, { seeder, stopped, atMs }: { seeder: boolean; stopped: boolean; atMs: number }): void {
    const known = this.#peers.get(port)
    const isNew = !known || (known.stopped && known.answeredAtMs !== Infinity)
    this.#peers.set(port, {
      seeder,
      stopped,
      askedAtMs: atMs,
      answeredAtMs: Infinity,
      intervalSeconds: known?.intervalSeconds ?? 0,
      before: isNew ? undefined : known.seeder ? 'seeder' : 'leecher',
      unsure: false,
    })
  }

  /** What it asked was not answered, or with no. */
  failed(port: number, { atMs }: { atMs: number }): void {
    const asked = this.#peers.get(port)
    if (asked) this.#peers.set(port, { ...asked, answeredAtMs: atMs, unsure: true })
  }

  answered(
    port: number,
    {
      seeder,
      stopped,
      intervalSeconds,
      atMs,
    }: { seeder: boolean; stopped: boolean; intervalSeconds: number; atMs: number },
  ): void {
    const askedAtMs = this.#peers.get(port)?.askedAtMs ?? atMs
    this.#peers.set(port, {
      seeder,
      stopped,
      askedAtMs,
      answeredAtMs: atMs,
      intervalSeconds,
      before: undefined,
      unsure: false,
    })
  }

  /** What must not stand in an answer to what `port` asked at `askedAtMs`. */
  wrongIn(port: number, ports: readonly number[], askedAtMs: number): WrongPeer[] {
    const seen = new Set<number>()
    const wrong: WrongPeer[] = []
    for (const peer of ports) {
      const fault = peer === port ? 'self' : seen.has(peer) ? 'twice' : this.#faultOf(peer, askedAtMs)
      seen.add(peer)
      if (fault) wrong.push(fault)
    }
    return wrong
  }

  /**
   * How many seeders and leechers there are, as exactly as it can be known: between the two where the life of some is about to end. Trackers that
   * have forgotten everything at `forgottenAtMs` may know those that have announced since, and may know the others.
   */
  counts(nowMs: number, forgottenAtMs = -Infinity): { complete: Range; incomplete: Range } {
    const counts = { complete: { least: 0, most: 0 }, incomplete: { least: 0, most: 0 } }
    for (const [port, peer] of this.#peers) {
      const { seeder, stopped, before, unsure, answeredAtMs, askedAtMs, intervalSeconds } = peer
      const of = seeder ? counts.complete : counts.incomplete
      const isUnderWay = answeredAtMs === Infinity
      const endsLeast = askedAtMs + lifeMs(intervalSeconds - 1) - slackMs
      const endsMost = answeredAtMs + lifeMs(intervalSeconds + 1) + slackMs
      if (isUnderWay || (unsure && nowMs < endsMost)) {
        const was = before === 'seeder' ? counts.complete : before && counts.incomplete
        if (was && was !== of) was.most++
        if (was || !stopped) of.most++
        if (was === of && !stopped && isUnderWay) of.least++
        continue
      }
      if (stopped || nowMs >= endsMost) {
        this.#forget(port, nowMs)
        continue
      }
      of.most++
      if (nowMs < endsLeast && askedAtMs > forgottenAtMs) of.least++
    }
    return counts
  }

  #faultOf(port: number, atMs: number): WrongPeer | undefined {
    const peer = this.#peers.get(port)
    if (!peer) return 'unknown'
    if (peer.answeredAtMs === Infinity) return undefined
    const lateMs = atMs - peer.answeredAtMs - this.#staleMs
    if (peer.stopped && !peer.unsure) return lateMs > 0 ? 'stopped' : undefined
    return lateMs > lifeMs(peer.intervalSeconds + 1) + slackMs ? 'expired' : undefined
  }

  /** Long enough after its end that nobody can be told of it, its record goes; until then it is what tells why it is wrong. */
  #forget(port: number, nowMs: number): void {
    const peer = this.#peers.get(port)
    if (peer && nowMs - peer.answeredAtMs > forgottenAfterMs) this.#peers.delete(port)
  }
}

const forgottenAfterMs = 10 * 60_000
