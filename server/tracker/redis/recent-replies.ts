import { LRUCache } from 'lru-cache'
import type { Family } from '../../../lib/protocol/address.ts'
import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import type { SwarmCounts } from '../../../lib/protocol/scrape.ts'
import type { StoreAnnounce, StoreReply } from '../peer-store.ts'
import { PeerSample } from '../peer-store.ts'

/** Swarms, by those who asked: from one rack, and as seeders or not. Some 0.5 KiB each, at 50 peers a reply. */
const repliesMax = 8192
/** Swarms whose counts are remembered, some 200 bytes each. */
const countsMax = 16_384
/** Peers that have just stopped, here or as other servers tell. */
const stoppedMax = 65_536

interface Remembered {
  readonly atMs: number
  readonly lengths: Readonly<Record<Family, number>>
  readonly compact: Readonly<Record<Family, Uint8Array>>
  readonly distances: Readonly<Record<Family, Uint8Array>>
}

/**
 * What a shared store has just answered: whom it named to which rack, and how large each swarm is. A peer is good for `staleMs`
 * after it was named, unless it stops.
 */
export class RecentReplies {
  readonly #staleMs: number
  readonly #now: () => number
  readonly #replies = new LRUCache<string, Remembered>({ max: repliesMax })
  readonly #counts = new LRUCache<InfoHash, { counts: SwarmCounts; atMs: number }>({ max: countsMax })
  readonly #stopped = new LRUCache<string, number>({ max: stoppedMax })

  constructor({ staleMs, now }: { staleMs: number; now: () => number }) {
    this.#staleMs = staleMs
    this.#now = now
  }

  get size(): number {
    return this.#replies.size
  }

  remember(announce: StoreAnnounce, { counts, peers }: StoreReply): void {
    const atMs = this.#now()
    const { infoHash } = announce
    this.#counts.set(infoHash, { counts, atMs })
    // Whoever wanted nobody tells nothing; and what names peer ids is for few.
    if (peers.lengths[4] + peers.lengths[6] === 0) return
    const copy = (part: Readonly<Record<Family, Uint8Array>>, sizes: Record<Family, number>) => ({
      4: part[4].slice(0, peers.lengths[4] * sizes[4]),
      6: part[6].slice(0, peers.lengths[6] * sizes[6]),
    })
    this.#replies.set(askerKey(announce), {
      atMs,
      lengths: { ...peers.lengths },
      compact: copy(peers.compact, { 4: 6, 6: 18 }),
      distances: copy(peers.distances, { 4: 1, 6: 1 }),
    })
  }

  /** As they were when the swarm was last asked for, however long that is ago. */
  lastCounts(infoHash: InfoHash): SwarmCounts | undefined {
    return this.#counts.get(infoHash)?.counts
  }

  /** Not older than `staleMs`. */
  freshCounts(infoHash: InfoHash): SwarmCounts | undefined {
    const known = this.#counts.get(infoHash)
    return known && this.#isFresh(known.atMs) ? known.counts : undefined
  }

  stopped(infoHash: InfoHash, compact: Uint8Array): void {
    this.#stopped.set(stoppedKey(infoHash, compact), this.#now())
  }

  /**
   * Adds peers that were just named to the announcer's rack, up to what it wanted and the sample has room for.
   *
   * @param own the announcer's endpoint
   */
  addTo(sample: PeerSample, announce: StoreAnnounce, own: Uint8Array): void {
    const known = this.#replies.get(askerKey(announce))
    if (!known || !this.#isFresh(known.atMs) || announce.withPeerIds || announce.event === 'stopped') return
    let room = (announce.numwant ?? defaultNumwant) - sample.lengths[4] - sample.lengths[6]
    if (room <= 0) return
    for (const family of [4, 6] as const) {
      if (announce.ownFamilyOnly && family !== announce.source.family) continue
      const size = family === 4 ? 6 : 18
      const named = new Set<string>([text(own)])
      for (let i = 0; i < sample.lengths[family]; i++)
        named.add(text(sample.compact[family].subarray(i * size, (i + 1) * size)))
      for (let i = 0; i < known.lengths[family] && room > 0; i++) {
        const compact = known.compact[family].subarray(i * size, (i + 1) * size)
        const at = sample.lengths[family]
        if (at >= sample.distances[family].length) break
        if (named.has(text(compact)) || this.#stoppedSince(announce.infoHash, compact, known.atMs)) continue
        sample.compact[family].set(compact, at * size)
        sample.distances[family][at] = known.distances[family][i] ?? 0
        sample.lengths[family] = at + 1
        room--
      }
    }
  }

  #stoppedSince(infoHash: InfoHash, compact: Uint8Array, atMs: number): boolean {
    return (this.#stopped.get(stoppedKey(infoHash, compact)) ?? -Infinity) >= atMs
  }

  #isFresh(atMs: number): boolean {
    return this.#now() - atMs < this.#staleMs
  }
}

/** Of a client that does not say. */
const defaultNumwant = 50

function askerKey({ infoHash, place, left }: StoreAnnounce): string {
  return `${infoHash}${place}${left === 0 ? 's' : 'l'}`
}

function stoppedKey(infoHash: InfoHash, compact: Uint8Array): string {
  return `${infoHash}${text(compact)}`
}

function text(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('latin1')
}

/** A sample that lasts, with room for some more. */
export function copySample(sample: PeerSample, room: number): PeerSample {
  const copy = new PeerSample(Math.max(sample.lengths[4], sample.lengths[6]) + room)
  for (const family of [4, 6] as const) {
    const length = sample.lengths[family]
    copy.compact[family].set(sample.compact[family].subarray(0, length * (family === 4 ? 6 : 18)))
    copy.distances[family].set(sample.distances[family].subarray(0, length))
    copy.peerIds[family].set(sample.peerIds[family].subarray(0, length * 20))
    copy.lengths[family] = length
  }
  return copy
}

/** Adds the peers of another sample that are not in it, while there is room and they are wanted. */
export function addPeers(sample: PeerSample, more: PeerSample, wanted: number): void {
  for (const family of [4, 6] as const) {
    const size = family === 4 ? 6 : 18
    const named = new Set<string>()
    for (let i = 0; i < sample.lengths[family]; i++)
      named.add(text(sample.compact[family].subarray(i * size, (i + 1) * size)))
    for (let i = 0; i < more.lengths[family]; i++) {
      const at = sample.lengths[family]
      if (at >= sample.distances[family].length || sample.lengths[4] + sample.lengths[6] >= wanted) break
      const compact = more.compact[family].subarray(i * size, (i + 1) * size)
      if (named.has(text(compact))) continue
      sample.compact[family].set(compact, at * size)
      sample.distances[family][at] = more.distances[family][i] ?? 0
      sample.peerIds[family].set(more.peerIds[family].subarray(i * 20, (i + 1) * 20), at * 20)
      sample.lengths[family] = at + 1
    }
  }
}
