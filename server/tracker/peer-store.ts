import type { Endpoint } from '../../lib/protocol/address.ts'
import type { AnnounceEvent } from '../../lib/protocol/announce.ts'
import type { InfoHash } from '../../lib/protocol/infohash.ts'
import type { SwarmCounts } from '../../lib/protocol/scrape.ts'
import type { PlaceId } from './topology.ts'

/** One announce as a store sees it: who, where, how far, and what it wants to hear of. */
export interface StoreAnnounce {
  readonly infoHash: InfoHash
  /** The peer's identity: a new peer_id at the same address and port replaces the old one. */
  readonly endpoint: Endpoint
  /** 20 bytes. */
  readonly peerId: Uint8Array
  readonly place: PlaceId
  /** Bytes missing; 0 means a seeder. */
  readonly left: number
  readonly event: AnnounceEvent | undefined
  /** How long the peer is kept unless it announces again; called once, with the counts that include it. */
  readonly lifetimeMs: (counts: SwarmCounts) => number
  /** How far each place is from the announcer: 0 its own rack, 1 the next level … 255 unknown. */
  readonly distanceTo: (place: PlaceId) => number
  /** Peers wanted of each kind (seeders, leechers) at each distance; 0 to hear only counts. */
  readonly perLevelMax: number
}

export interface SampledPeer {
  readonly endpoint: Endpoint
  readonly peerId: Uint8Array
  readonly place: PlaceId
}

/** A random sample of the peers at one distance; every peer of that distance is equally likely to be in it. */
export interface LevelSample {
  readonly distance: number
  readonly seeders: readonly SampledPeer[]
  readonly leechers: readonly SampledPeer[]
}

/** What a store answers to an announce. */
export interface SwarmView {
  /** The whole swarm, the announcer included (unless it stopped). */
  readonly counts: SwarmCounts
  /** The announcer's place, the announcer not included. */
  readonly rack: { readonly seeders: number; readonly leechers: number }
  /**
   * How many leechers of the announcer's place come before it in the order of their rendezvous hash
   * (of infohash, place and endpoint, so that every server gives the same answer). Gateways are those with the lowest.
   */
  readonly gatewayRank: number
  /** Nearest first; distances without peers are left out; the announcer is never in it. */
  readonly levels: readonly LevelSample[]
}

/**
 * Swarms: who holds or fetches what, and where they are. Every implementation promises, and the contract suite
 * (test/server/tracker/peer-store.contract.ts) checks:
 *
 * - `announce` is one operation: it records the announcer, then counts, then samples without it. A `stopped`
 *   announce removes the peer and samples nothing.
 * - A peer is its endpoint. It is a seeder or a leecher, never both; it moves when `left` says so.
 * - `downloaded` counts a peer's change from leecher to `completed` or `left` 0, once.
 * - A peer is gone its lifetime after its last announce, without anyone scanning for it on the announce path;
 *   a swarm is gone with its last peer, but its `downloaded` count is kept while memory bounds allow.
 * - Memory is bounded by `peersMax`; an announce beyond it is answered, not stored, and counted as refused.
 */
export interface PeerStore extends AsyncDisposable {
  announce(announce: StoreAnnounce): SwarmView | Promise<SwarmView>
  /** Counts of one swarm; zeros where it is unknown. */
  scrape(infoHash: InfoHash): SwarmCounts | Promise<SwarmCounts>
  /** Totals for metrics; may be up to a second old. */
  totals(): StoreTotals
}

export interface StoreTotals {
  readonly swarms: number
  readonly seeders: number
  readonly leechers: number
  /** Announces not stored since the start because the store was full. */
  readonly refused: number
}
