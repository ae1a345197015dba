import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import type { StoreAnnounce } from '../peer-store.ts'

/** The newest that is known of a peer, and that the shared store has not been told. */
export interface Untold extends Pick<
  StoreAnnounce,
  'infoHash' | 'source' | 'port' | 'peerId' | 'place' | 'ancestors' | 'left'
> {
  /** It has completed since the shared store was last told of it. */
  readonly completed: boolean
  readonly stopped: boolean
  /** When it announced. */
  readonly atMs: number
  /** Until when it counts unless it announces again. */
  readonly dueMs: number
  /** Grows with each entry. */
  readonly number: number
}

/**
 * What a shared store has to be told once it answers again: one entry a peer, the newest. Bounded; beyond it the oldest go, which is no
 * more than waiting until those peers announce again. Those that have stopped come first: until they are told, other servers name them.
 */
export class Backlog {
  readonly #peersMax: number
  /** By swarm, then by endpoint, in the order in which they came. */
  readonly #swarms = new Map<InfoHash, Map<string, Untold>>()
  /** Those of them that have stopped. */
  readonly #stops = new Set<Untold>()
  #size = 0
  #dropped = 0
  #number = 0

  constructor(peersMax: number) {
    this.#peersMax = peersMax
  }

  get size(): number {
    return this.#size
  }

  /** Since the start, for want of room or because the shared store would not have them. */
  get dropped(): number {
    return this.#dropped
  }

  /** Of the last entry. */
  get number(): number {
    return this.#number
  }

  hasSwarm(infoHash: InfoHash): boolean {
    return this.#swarms.has(infoHash)
  }

  note(announce: StoreAnnounce, { atMs, dueMs }: Pick<Untold, 'atMs' | 'dueMs'>): void {
    const { infoHash, source, port, place, ancestors, left, event } = announce
    const key = endpointKey(announce)
    const before = this.#swarms.get(infoHash)?.get(key)
    const entry: Untold = {
      infoHash,
      source: { family: source.family, bytes: source.bytes.slice() },
      port,
      peerId: announce.peerId.slice(),
      place,
      ancestors,
      left,
      completed: (before?.completed ?? false) || event === 'completed',
      stopped: event === 'stopped',
      atMs,
      dueMs,
      number: ++this.#number,
    }
    if (before) this.remove(before)
    else if (this.#size >= this.#peersMax) this.#dropOldest()
    // Behind all others of its swarm: the order is that of age.
    const swarm = this.#swarms.get(infoHash) ?? new Map<string, Untold>()
    swarm.set(key, entry)
    if (entry.stopped) this.#stops.add(entry)
    this.#swarms.set(infoHash, swarm)
    this.#size++
  }

  /** The shared store has been told of the peer itself, when entries up to `number` were there. */
  told(peer: Pick<StoreAnnounce, 'infoHash' | 'source' | 'port'>, number: number): void {
    if (this.#size === 0) return
    const entry = this.#swarms.get(peer.infoHash)?.get(endpointKey(peer))
    if (entry && entry.number <= number) this.remove(entry)
  }

  /** A peer has stopped at another server, which cannot tell the shared store itself; unless it was heard of here since. */
  noteStop(stop: StoreAnnounce, atMs: number): void {
    const known = this.#swarms.get(stop.infoHash)?.get(endpointKey(stop))
    if (known === undefined || known.atMs <= atMs) this.note(stop, { atMs, dueMs: atMs })
  }

  /** Whether a peer has stopped, and the shared store has not been told. */
  hasStopped(infoHash: InfoHash, key: string): boolean {
    return this.#swarms.get(infoHash)?.get(key)?.stopped === true
  }

  /** Puts a swarm behind all others. */
  postpone(infoHash: InfoHash): void {
    const peers = this.#swarms.get(infoHash)
    if (!peers) return
    for (const entry of peers.values()) if (this.#stops.delete(entry)) this.#stops.add(entry)
    this.#swarms.delete(infoHash)
    this.#swarms.set(infoHash, peers)
  }

  /** The first few of the swarms that may be told of. */
  first(count: number, mayTell: (infoHash: InfoHash) => boolean): Untold[] {
    const found: Untold[] = []
    for (const entry of this.#stops) {
      if (found.length >= count) return found
      if (mayTell(entry.infoHash)) found.push(entry)
    }
    for (const [infoHash, peers] of this.#swarms) {
      if (!mayTell(infoHash)) continue
      for (const entry of peers.values()) {
        if (found.length >= count) return found
        if (!entry.stopped) found.push(entry)
      }
    }
    return found
  }

  /** Unless a newer one has taken its place. */
  remove(entry: Untold): void {
    const peers = this.#swarms.get(entry.infoHash)
    const key = endpointKey(entry)
    if (peers?.get(key) !== entry) return
    peers.delete(key)
    this.#stops.delete(entry)
    this.#size--
    if (peers.size === 0) this.#swarms.delete(entry.infoHash)
  }

  /** The shared store would not have it, and would not the next time either. */
  drop(entry: Untold): void {
    this.#dropped++
    this.remove(entry)
  }

  #dropOldest(): void {
    const [peers] = this.#swarms.values()
    const [oldest] = peers?.values() ?? []
    if (oldest) this.drop(oldest)
  }
}

/** Tells endpoints apart. */
export function endpointKey({ source, port }: Pick<StoreAnnounce, 'source' | 'port'>): string {
  return keyOf(source.bytes, port)
}

/** The same of an endpoint as it stands in a reply: its address, and its port in two bytes. */
export function compactKey(compact: Uint8Array): string {
  const addressBytes = compact.length - 2
  const port = ((compact[addressBytes] ?? 0) << 8) | (compact[addressBytes + 1] ?? 0)
  return keyOf(compact.subarray(0, addressBytes), port)
}

function keyOf(address: Uint8Array, port: number): string {
  return `${Buffer.from(address.buffer, address.byteOffset, address.length).toString('latin1')}${String.fromCharCode(port)}`
}
