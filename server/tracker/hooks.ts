import type { Ip } from '../../lib/protocol/address.ts'
import type { Announce } from '../../lib/protocol/announce.ts'
import type { Place } from '../../lib/protocol/place.ts'
import type { Scrape } from '../../lib/protocol/scrape.ts'

/** One announce on its way through the hooks; the same object whichever frontend it came through. */
export interface AnnounceRequest {
  readonly announce: Announce
  /** The address the peer is registered under. */
  readonly source: Ip
  /** Set by a hook that knows where the peer is (the token's `rack` claim); else the address table decides. */
  place: Place | undefined
}

export interface ScrapeRequest {
  readonly scrape: Scrape
  readonly source: Ip
}

/**
 * Runs before the reply, in configured order. Refuses by throwing ClientError; anything else thrown becomes
 * "internal error" on the wire. A hook that answers synchronously costs the hot path no promise.
 */
export interface PreHook {
  readonly name: string
  announce?(request: AnnounceRequest): void | Promise<void>
  scrape?(request: ScrapeRequest): void | Promise<void>
}
