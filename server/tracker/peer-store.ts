import type { Family, Ip } from '../../lib/protocol/address.ts'
import type { AnnounceEvent, CompactPeers, RawIds, ReplyPeer } from '../../lib/protocol/announce.ts'
import type { InfoHash } from '../../lib/protocol/infohash.ts'
import type { SwarmCounts } from '../../lib/protocol/scrape.ts'
import type { Plan } from './selection.ts'
import type { Ancestor, PlaceId } from './topology.ts'

/** One announce as a store sees it: who, where, and what it wants to hear of. */
export interface StoreAnnounce {
  readonly infoHash: InfoHash
  /** With the port the peer's identity: a new peer_id there replaces the old one. */
  readonly source: Ip
  readonly port: number
  /** 20 bytes. */
  readonly peerId: Uint8Array
  /** Infohash and peer_id as bytes, where the request has them; a store need not look at it. */
  readonly raw?: RawIds | undefined
  readonly place: PlaceId
  /** The nodes above the place, nearest first, the root last. */
  readonly ancestors: readonly Ancestor[]
  /** Bytes missing; 0 means a seeder. */
  readonly left: number
  readonly event: AnnounceEvent | undefined
  /** Peers of the announcer's family alone: a UDP reply has no room for the other. */
  readonly ownFamilyOnly: boolean
  /** The reply names the peer ids. */
  readonly withPeerIds: boolean
  /** More than these in all `choose` will not want; a store that must ask elsewhere asks for no more. */
  readonly numwant?: number | undefined
  /**
   * How long ago it was made, where a store is told late: it changes nothing where the store has heard of the peer since. Only for stores that
   * several servers share.
   */
  readonly belatedMs?: number
  /** How long the peer is kept unless it announces again; called once, with the counts that include it. */
  lifetimeMs(counts: SwarmCounts): number
  /** How many of whom it is to hear of; called once with what there is, not at all for a peer that stops. */
  choose(view: SwarmView): Plan
}

/** Peers at one distance from the announcer, itself not counted: 0 its own rack, 1 the next level …, the last the rest of the swarm. */
export interface LevelCounts {
  readonly distance: number
  readonly seeders: number
  readonly leechers: number
}

/** What a store knows of a swarm when it records an announce. Valid only during the call it is given to. */
export interface SwarmView {
  /** The whole swarm, the announcer included. */
  readonly counts: SwarmCounts
  /**
   * How many leechers of the announcer's place come before it in the order of their rendezvous hash (of infohash, place and
   * endpoint, so that every server gives the same answer). Gateways are those with the lowest. Exact where it is below eight.
   */
  readonly gatewayRank: number
  /** Nearest first, the announcer's own place always the first; other distances without peers may be left out. */
  readonly levels: readonly LevelCounts[]
}

/**
 * Peers for a reply, as it will carry them: compact endpoints (BEP 23, BEP 7) in a row, nearest first. A store that answers at once fills
 * one table over and over: it is valid until the next announce.
 */
export class PeerSample implements CompactPeers {
  readonly compact: Readonly<Record<Family, Uint8Array>>
  readonly distances: Readonly<Record<Family, Uint8Array>>
  /** 20 bytes each; filled only where the announce asked `withPeerIds`. */
  readonly peerIds: Readonly<Record<Family, Uint8Array>>
  readonly lengths: Record<Family, number> = { 4: 0, 6: 0 }

  constructor(peersMax: number | Readonly<Record<Family, number>>, withPeerIds = true) {
    const [ipv4, ipv6] = typeof peersMax === 'number' ? [peersMax, peersMax] : [peersMax[4], peersMax[6]]
    const idBytes = withPeerIds ? 20 : 0
    this.compact = { 4: new Uint8Array(ipv4 * 6), 6: new Uint8Array(ipv6 * 18) }
    this.distances = { 4: new Uint8Array(ipv4), 6: new Uint8Array(ipv6) }
    this.peerIds = { 4: new Uint8Array(ipv4 * idBytes), 6: new Uint8Array(ipv6 * idBytes) }
  }

  clear(): void {
    this.lengths[4] = 0
    this.lengths[6] = 0
  }

  /** Leaves out all others. */
  keep(isWanted: (compact: Uint8Array) => boolean): void {
    for (const family of [4, 6] as const) {
      const size = family === 4 ? 6 : 18
      const [compact, distances, peerIds] = [
        this.compact[family],
        this.distances[family],
        this.peerIds[family],
      ]
      let kept = 0
      for (let i = 0; i < this.lengths[family]; i++) {
        if (!isWanted(compact.subarray(i * size, (i + 1) * size))) continue
        compact.copyWithin(kept * size, i * size, (i + 1) * size)
        distances.copyWithin(kept, i, i + 1)
        peerIds.copyWithin(kept * 20, i * 20, (i + 1) * 20)
        kept++
      }
      this.lengths[family] = kept
    }
  }

  /** As objects, IPv4 first; for replies that name peer ids, and for hooks that shape the list. */
  toPeers(): ReplyPeer[] {
    return ([4, 6] as const).flatMap((family) => {
      const size = family === 4 ? 6 : 18
      return Array.from({ length: this.lengths[family] }, (_, i) => ({
        endpoint: { family, compact: this.compact[family].slice(i * size, (i + 1) * size) },
        peerId: this.peerIds[family].slice(i * 20, (i + 1) * 20),
        distance: this.distances[family][i] ?? 0,
      }))
    })
  }

  /** The other way round; cut to what the table holds. */
  fill(peers: readonly ReplyPeer[]): void {
    this.clear()
    for (const { endpoint: peer, peerId, distance } of peers) {
      const { family, compact } = peer
      const at = this.lengths[family]
      if (at >= this.distances[family].length) continue
      this.compact[family].set(compact, at * compact.length)
      this.peerIds[family].set(peerId, at * 20)
      this.distances[family][at] = distance
      this.lengths[family] = at + 1
    }
  }
}

/** Peers in a reply at most, whatever the configuration says. */
export const samplePeersMax = 1000

/** What a store answers to an announce. The sample of an answer that is promised is not used for another one. */
export interface StoreReply {
  /** The whole swarm, the announcer included (unless it stopped). */
  readonly counts: SwarmCounts
  readonly peers: PeerSample
}

/**
 * Swarms: who holds or fetches what, and where they are. Every implementation promises, and the contract suite
 * (test/server/tracker/peer-store.contract.ts) checks:
 *
 * - `announce` is one operation: it records the announcer, then counts, then samples without it. A `stopped`
 *   announce removes the peer and samples nothing.
 * - A peer is its address and port. It is a seeder or a leecher, never both; it moves when `left` says so.
 * - Each peer of a level is as likely to be in its sample as any other; nobody is in it twice.
 * - `downloaded` counts a peer's change from leecher to `completed` or `left` 0, once.
 * - A peer is gone its lifetime after its last announce, without anyone scanning for it on the announce path;
 *   a swarm is gone with its last peer, but its `downloaded` count is kept while memory bounds allow.
 * - Memory is bounded; an announce beyond it is answered, not stored, and counted as refused.
 */
export interface PeerStore extends AsyncDisposable {
  announce(announce: StoreAnnounce): StoreReply | Promise<StoreReply>
  /** Counts of one swarm; zeros where it is unknown. */
  scrape(infoHash: InfoHash): SwarmCounts | Promise<SwarmCounts>
  /** All swarms and their counts, a part at a time, for a full scrape. */
  swarms(): AsyncIterable<readonly (readonly [InfoHash, SwarmCounts])[]>
  /** Totals for metrics; may be up to a second old. */
  totals(): StoreTotals
  /** Where several servers have the same swarms: another text once those were lost, the same for all. Undefined: the swarms are those of this start. */
  readonly epoch?: string | undefined
  /** Of a store that lies elsewhere: whether it is asked now, or answers are what this server knows by itself. */
  status?(): StoreStatus
}

export interface StoreStatus {
  /** Why not all swarms are answered as the store knows them; undefined where they are. */
  readonly degraded:
    { readonly sinceMs: number; readonly reason: string; readonly isRefusing: boolean } | undefined
  /** Announces answered since the start from what this server knows by itself. */
  readonly answeredLocally: number
  /** Peers that the store has not been told of yet; bounded. */
  readonly untold: number
  /** Peers that the store was told of late, since the start. */
  readonly told: number
  /** Peers that it is never told of, because too many waited or it would not have them. */
  readonly dropped: number
}

export interface StoreTotals {
  readonly swarms: number
  readonly seeders: number
  readonly leechers: number
  /** Announces not stored since the start because the store was full. */
  readonly refused: number
}
