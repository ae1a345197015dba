import type { Endpoint } from '../../lib/protocol/address.ts'
import type { PlaceId } from './topology.ts'

/**
 * Peers as fixed records in chunks of typed arrays; a handle is an index. No object per peer: a million of them
 * would cost the collector a walk each time.
 *
 * A record, in bytes: endpoint 18, peer_id 20, family and seeder flags 1, place 4, expiry tick 4, position 4, rank 4.
 */
export interface PeerSlab {
  allocate(endpoint: Endpoint, rank: number): number
  free(handle: number): void
  used(): number
  /** 6 or 18 bytes: a copy, since the record may be reused. */
  compact(handle: number): Uint8Array
  endpoint(handle: number): Endpoint
  peerId(handle: number): Uint8Array
  setPeerId(handle: number, peerId: Uint8Array): void
  place(handle: number): PlaceId
  isSeeder(handle: number): boolean
  /** Index in the bucket's list. */
  position(handle: number): number
  setState(handle: number, state: { place: PlaceId; seeder: boolean; position: number }): void
  expiryTick(handle: number): number
  setExpiryTick(handle: number, tick: number): void
  rank(handle: number): number
}

const chunkBits = 12
const chunkSize = 1 << chunkBits
const endpointBytes = 18
const peerIdBytes = 20
const flagIpv6 = 1
const flagSeeder = 2

class Chunk {
  readonly endpoints = new Uint8Array(chunkSize * endpointBytes)
  readonly peerIds = new Uint8Array(chunkSize * peerIdBytes)
  readonly flags = new Uint8Array(chunkSize)
  readonly places = new Uint32Array(chunkSize)
  readonly expiryTicks = new Uint32Array(chunkSize)
  readonly positions = new Uint32Array(chunkSize)
  readonly ranks = new Uint32Array(chunkSize)
}

export function createPeerSlab(): PeerSlab {
  const chunks: Chunk[] = []
  const freed: number[] = []
  let next = 0
  const chunkOf = (handle: number): Chunk => {
    const chunk = chunks[handle >>> chunkBits]
    if (!chunk) throw new RangeError(`Cannot find peer ${handle}: there is no such record`)
    return chunk
  }
  const slot = (handle: number) => handle & (chunkSize - 1)
  const flag = (handle: number, bit: number) => ((chunkOf(handle).flags[slot(handle)] ?? 0) & bit) !== 0
  const compact = (handle: number) => {
    const at = slot(handle) * endpointBytes
    return chunkOf(handle).endpoints.slice(at, at + (flag(handle, flagIpv6) ? 18 : 6))
  }
  return {
    allocate: (endpoint, rank) => {
      const handle = freed.pop() ?? next++
      if (handle >>> chunkBits >= chunks.length) chunks.push(new Chunk())
      const chunk = chunkOf(handle)
      chunk.endpoints.set(endpoint.compact, slot(handle) * endpointBytes)
      chunk.flags[slot(handle)] = endpoint.family === 6 ? flagIpv6 : 0
      chunk.expiryTicks[slot(handle)] = 0
      chunk.ranks[slot(handle)] = rank
      return handle
    },
    free: (handle) => {
      freed.push(handle)
    },
    used: () => next - freed.length,
    compact,
    endpoint: (handle) => ({ family: flag(handle, flagIpv6) ? 6 : 4, compact: compact(handle) }),
    peerId: (handle) => {
      const at = slot(handle) * peerIdBytes
      return chunkOf(handle).peerIds.slice(at, at + peerIdBytes)
    },
    setPeerId: (handle, peerId) => {
      chunkOf(handle).peerIds.set(peerId, slot(handle) * peerIdBytes)
    },
    place: (handle) => chunkOf(handle).places[slot(handle)] ?? 0,
    isSeeder: (handle) => flag(handle, flagSeeder),
    position: (handle) => chunkOf(handle).positions[slot(handle)] ?? 0,
    setState: (handle, { place, seeder, position }) => {
      const chunk = chunkOf(handle)
      const flags = chunk.flags[slot(handle)] ?? 0
      chunk.flags[slot(handle)] = seeder ? flags | flagSeeder : flags & ~flagSeeder
      chunk.places[slot(handle)] = place
      chunk.positions[slot(handle)] = position
    },
    expiryTick: (handle) => chunkOf(handle).expiryTicks[slot(handle)] ?? 0,
    setExpiryTick: (handle, tick) => {
      chunkOf(handle).expiryTicks[slot(handle)] = tick
    },
    rank: (handle) => chunkOf(handle).ranks[slot(handle)] ?? 0,
  }
}
