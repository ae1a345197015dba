import type { z } from 'zod'
import type { Endpoint, Ip } from '../../lib/protocol/address.ts'
import type { Announce, ReplyPeer } from '../../lib/protocol/announce.ts'
import type { Place } from '../../lib/protocol/place.ts'
import type { Scrape, SwarmCounts } from '../../lib/protocol/scrape.ts'
import type { Logger } from '../../lib/runtime/log.ts'

/** What a request came through. */
export type Frontend = 'http' | 'udp'

/** One announce on its way through the hooks; the same object whichever frontend it came through. */
export interface AnnounceRequest {
  readonly frontend: Frontend
  readonly announce: Announce
  /** The address the peer is registered under. */
  readonly source: Ip
  /** Set by a hook that knows where the peer is (the token's `rack` claim); else the address table decides. */
  place: Place | undefined
  /** Set by a hook that wants the client to bring it along with its next announce (BEP 3 `tracker id`). */
  trackerId: string | undefined
  /** Seconds that hooks add to the `interval` of the reply, and to its `min interval`. */
  extraIntervalSeconds: number
  extraMinIntervalSeconds: number
}

export interface ScrapeRequest {
  readonly frontend: Frontend
  readonly scrape: Scrape
  readonly source: Ip
}

/**
 * Runs before the reply, in configured order. Refuses by throwing ClientError; anything else thrown becomes
 * "internal server error" on the wire. A hook that answers synchronously costs the hot path no promise.
 */
export interface PreHook extends Partial<AsyncDisposable> {
  readonly name: string
  announce?(request: AnnounceRequest): void | Promise<void>
  scrape?(request: ScrapeRequest): void | Promise<void>
  /** Shapes the peer list of a reply: filters, reorders, adds. Selection has been made; what is returned goes out. */
  peers?(request: AnnounceRequest, peers: readonly ReplyPeer[]): readonly ReplyPeer[]
}

/** What happened, told to post-hooks once the reply is on its way. */
export interface AnnounceRecord {
  readonly announce: Announce
  readonly endpoint: Endpoint
  readonly counts: SwarmCounts
}

/**
 * Runs after the reply, from a bounded queue that is drained at shutdown; when the queue is full, records are dropped and
 * counted. What it throws is logged.
 */
export interface PostHook extends Partial<AsyncDisposable> {
  readonly name: string
  announced?(record: AnnounceRecord): void | Promise<void>
}

export interface HookDeps {
  readonly log: Logger
  /** Milliseconds since 1970. */
  readonly now: () => number
  /** 0 ≤ random() < 1. */
  readonly random: () => number
}

/** A hook that ships with the tracker: its name in the configuration, its options, and how it is made of them. */
export interface PreHookDefinition<Schema extends z.ZodType> {
  readonly name: string
  readonly options: Schema
  /** @throws Error (or rejects) naming the option or file that cannot be used */
  create(options: z.output<Schema>, deps: HookDeps): PreHook | Promise<PreHook>
}
