import type { Endpoint } from '../../lib/protocol/address.ts'
import type { InfoHash } from '../../lib/protocol/infohash.ts'
import type { SwarmCounts } from '../../lib/protocol/scrape.ts'
import { createPeerSlab } from './peer-slab.ts'
import type { PeerSlab } from './peer-slab.ts'
import type { LevelSample, PeerStore, SampledPeer, StoreAnnounce, SwarmView } from './peer-store.ts'
import type { PlaceId } from './topology.ts'

export interface MemoryPeerStoreOptions {
  readonly peersMax: number
  /** Swarms kept, empty ones included: those are remembered for their `downloaded`, oldest forgotten first. */
  readonly swarmsMax: number
  /** 0 ≤ random() < 1. */
  readonly random: () => number
  readonly now: () => number
}

/** Peers of one place in one swarm, as slab handles; removal swaps the last one in. */
interface Bucket {
  readonly seeders: number[]
  readonly leechers: number[]
}

interface Swarm {
  /** Handles by compact endpoint, as latin1 text. */
  readonly peers: Map<string, number>
  readonly buckets: Map<PlaceId, Bucket>
  seeders: number
  leechers: number
  downloaded: number
}

/** One turn of the wheel is longer than the longest lifetime in use, 2.5 × 1 h; later expiries wait in the last slot. */
const wheelSlots = 16_384
const tickMs = 1000

/** Swarms in this process. Peers live in typed-array slabs; expiry is a wheel that looks only at what is due. */
export function createMemoryPeerStore({
  peersMax,
  swarmsMax,
  random,
  now,
}: MemoryPeerStoreOptions): PeerStore {
  const slab = createPeerSlab()
  const swarms = new Map<InfoHash, Swarm>()
  /** Swarms without peers, remembered for their `downloaded`; the one that has been empty for longest comes first. */
  const empty = new Set<InfoHash>()
  /** Swarm of each handle. */
  const swarmOf: (Swarm | undefined)[] = []
  const hashOf: (InfoHash | undefined)[] = []
  const wheel: Set<number>[] = Array.from({ length: wheelSlots }, () => new Set())
  const totals = { seeders: 0, leechers: 0, refused: 0 }
  let wheelTick = Math.floor(now() / tickMs)

  const remove = (handle: number) => {
    const swarm = swarmOf[handle]
    if (!swarm) return
    const seeder = slab.isSeeder(handle)
    leaveBucket(swarm, slab, handle)
    swarm[seeder ? 'seeders' : 'leechers']--
    totals[seeder ? 'seeders' : 'leechers']--
    swarm.peers.delete(latin1(slab.compact(handle)))
    wheel[slab.expiryTick(handle) % wheelSlots]?.delete(handle)
    const infoHash = hashOf[handle]
    swarmOf[handle] = undefined
    hashOf[handle] = undefined
    slab.free(handle)
    if (swarm.peers.size > 0 || infoHash === undefined) return
    if (swarm.downloaded === 0) swarms.delete(infoHash)
    else empty.add(infoHash)
  }

  /** @returns whether there was one */
  const forgetEmptySwarm = (): boolean => {
    const [oldest] = empty
    if (oldest === undefined) return false
    empty.delete(oldest)
    return swarms.delete(oldest)
  }

  /** Removes what is due; each peer is looked at once per turn of the wheel at most. */
  const expire = () => {
    const nowTick = Math.floor(now() / tickMs)
    for (const last = Math.min(nowTick, wheelTick + wheelSlots); wheelTick < last; wheelTick++) {
      const slot = wheel[wheelTick % wheelSlots]
      if (!slot) continue
      for (const handle of slot) if (slab.expiryTick(handle) <= wheelTick) remove(handle)
    }
    wheelTick = Math.max(wheelTick, nowTick)
  }
  const timer = setInterval(expire, tickMs)
  timer.unref()

  const schedule = (handle: number, lifetimeMs: number) => {
    const before = slab.expiryTick(handle)
    const tick = Math.ceil((now() + lifetimeMs) / tickMs)
    if (before === tick) return
    wheel[before % wheelSlots]?.delete(handle)
    slab.setExpiryTick(handle, tick)
    wheel[tick % wheelSlots]?.add(handle)
  }

  const swarmFor = (infoHash: InfoHash): Swarm => {
    const known = swarms.get(infoHash)
    if (known) return known
    const swarm: Swarm = { peers: new Map(), buckets: new Map(), seeders: 0, leechers: 0, downloaded: 0 }
    swarms.set(infoHash, swarm)
    return swarm
  }

  /** @returns the announcer's handle; undefined when it stopped or the store is full */
  const record = (announce: StoreAnnounce): number | undefined => {
    const { infoHash, endpoint } = announce
    const key = latin1(endpoint.compact)
    let swarm = swarms.get(infoHash)
    let handle = swarm?.peers.get(key)
    if (announce.event === 'stopped') {
      if (handle !== undefined) remove(handle)
      return undefined
    }
    const seeder = announce.left === 0
    if (handle === undefined || !swarm) {
      if (slab.used() >= peersMax || (!swarm && swarms.size >= swarmsMax && !forgetEmptySwarm())) {
        totals.refused++
        return undefined
      }
      swarm = swarmFor(infoHash)
      handle = slab.allocate(endpoint, rendezvousHash(infoHash, endpoint))
      empty.delete(infoHash)
      swarm.peers.set(key, handle)
      swarmOf[handle] = swarm
      hashOf[handle] = infoHash
      enterBucket(swarm, slab, handle, announce.place, seeder)
      swarm[seeder ? 'seeders' : 'leechers']++
      totals[seeder ? 'seeders' : 'leechers']++
      if (seeder && announce.event === 'completed') swarm.downloaded++
    } else {
      const wasSeeder = slab.isSeeder(handle)
      if (wasSeeder !== seeder || slab.place(handle) !== announce.place) {
        leaveBucket(swarm, slab, handle)
        enterBucket(swarm, slab, handle, announce.place, seeder)
      }
      if (wasSeeder !== seeder) {
        swarm[wasSeeder ? 'seeders' : 'leechers']--
        totals[wasSeeder ? 'seeders' : 'leechers']--
        swarm[seeder ? 'seeders' : 'leechers']++
        totals[seeder ? 'seeders' : 'leechers']++
        if (seeder) swarm.downloaded++
      }
    }
    slab.setPeerId(handle, announce.peerId)
    schedule(handle, announce.lifetimeMs(countsOf(swarm)))
    return handle
  }

  return {
    announce: (announce) => {
      expire()
      const handle = record(announce)
      const swarm = swarms.get(announce.infoHash)
      if (!swarm) return emptyView
      return view(swarm, slab, announce, handle, random)
    },
    scrape: (infoHash) => {
      expire()
      const swarm = swarms.get(infoHash)
      return swarm ? countsOf(swarm) : emptyView.counts
    },
    totals: () => ({ swarms: swarms.size, ...totals }),
    [Symbol.asyncDispose]: async () => {
      clearInterval(timer)
      await Promise.resolve()
    },
  }
}

const emptyView: SwarmView = {
  counts: { complete: 0, incomplete: 0, downloaded: 0 },
  rack: { seeders: 0, leechers: 0 },
  gatewayRank: 0,
  levels: [],
}

function view(
  swarm: Swarm,
  slab: PeerSlab,
  announce: StoreAnnounce,
  self: number | undefined,
  random: () => number,
): SwarmView {
  const own = swarm.buckets.get(announce.place)
  const selfSeeds = self !== undefined && slab.isSeeder(self)
  const stopped = announce.event === 'stopped'
  return {
    counts: countsOf(swarm),
    rack: {
      seeders: (own?.seeders.length ?? 0) - (self !== undefined && selfSeeds ? 1 : 0),
      leechers: (own?.leechers.length ?? 0) - (self !== undefined && !selfSeeds ? 1 : 0),
    },
    gatewayRank: self === undefined || selfSeeds ? 0 : rankAmong(own?.leechers ?? [], slab, slab.rank(self)),
    levels: stopped || announce.perLevelMax === 0 ? [] : sampleLevels(swarm, slab, announce, self, random),
  }
}

/** Walks the places of the swarm, never its peers: buckets are grouped by distance, then each group is sampled. */
function sampleLevels(
  swarm: Swarm,
  slab: PeerSlab,
  announce: StoreAnnounce,
  self: number | undefined,
  random: () => number,
): LevelSample[] {
  const byDistance = new Map<number, Bucket[]>()
  for (const [place, bucket] of swarm.buckets) {
    const distance = announce.distanceTo(place)
    const group = byDistance.get(distance)
    if (group) group.push(bucket)
    else byDistance.set(distance, [bucket])
  }
  const levels: LevelSample[] = []
  for (const distance of [...byDistance.keys()].sort((a, b) => a - b)) {
    const buckets = byDistance.get(distance) ?? []
    const sample = (kind: keyof Bucket) =>
      sampleBuckets(
        buckets.map((bucket) => bucket[kind]),
        announce.perLevelMax,
        self,
        random,
      ).map((handle): SampledPeer => ({
        endpoint: slab.endpoint(handle),
        peerId: slab.peerId(handle),
        place: slab.place(handle),
      }))
    const level = { distance, seeders: sample('seeders'), leechers: sample('leechers') }
    if (level.seeders.length + level.leechers.length > 0) levels.push(level)
  }
  return levels
}

/** Draws up to `max` of all handles in the lists, each equally likely, by Floyd's algorithm over their joint index. */
function sampleBuckets(
  lists: readonly (readonly number[])[],
  max: number,
  self: number | undefined,
  random: () => number,
): number[] {
  const total = lists.reduce((sum, list) => sum + list.length, 0)
  // One more than wanted, in case the announcer is drawn.
  const want = Math.min(total, max + 1)
  const chosen = new Set<number>()
  for (let i = total - want; i < total; i++) {
    const drawn = Math.floor(random() * (i + 1))
    chosen.add(chosen.has(drawn) ? i : drawn)
  }
  const handles: number[] = []
  for (const index of chosen) {
    let rest = index
    for (const list of lists) {
      if (rest < list.length) {
        const handle = list[rest]
        if (handle !== undefined && handle !== self) handles.push(handle)
        break
      }
      rest -= list.length
    }
  }
  shuffle(handles, random)
  return handles.slice(0, max)
}

/** Floyd's set is not in random order. */
function shuffle(items: number[], random: () => number): void {
  for (let i = items.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1))
    const swapped = items[i] ?? 0
    items[i] = items[j] ?? 0
    items[j] = swapped
  }
}

/** Beyond this many nobody asks: a rack has a few gateways. */
const rankCounted = 64

function rankAmong(leechers: readonly number[], slab: PeerSlab, own: number): number {
  let rank = 0
  for (const handle of leechers) if (slab.rank(handle) < own && ++rank === rankCounted) break
  return rank
}

function countsOf({ seeders, leechers, downloaded }: Swarm): SwarmCounts {
  return { complete: seeders, incomplete: leechers, downloaded }
}

function enterBucket(swarm: Swarm, slab: PeerSlab, handle: number, place: PlaceId, seeder: boolean): void {
  let bucket = swarm.buckets.get(place)
  if (!bucket) {
    bucket = { seeders: [], leechers: [] }
    swarm.buckets.set(place, bucket)
  }
  const list = seeder ? bucket.seeders : bucket.leechers
  slab.setState(handle, { place, seeder, position: list.length })
  list.push(handle)
}

function leaveBucket(swarm: Swarm, slab: PeerSlab, handle: number): void {
  const place = slab.place(handle)
  const bucket = swarm.buckets.get(place)
  if (!bucket) return
  const list = slab.isSeeder(handle) ? bucket.seeders : bucket.leechers
  const position = slab.position(handle)
  const last = list.pop()
  if (last !== undefined && last !== handle) {
    list[position] = last
    slab.setState(last, { place, seeder: slab.isSeeder(last), position })
  }
  if (bucket.seeders.length + bucket.leechers.length === 0) swarm.buckets.delete(place)
}

/** 32 bits of (infohash, endpoint); within a place of a swarm the lowest are its gateways. FNV-1a with a finaliser. */
function rendezvousHash(infoHash: InfoHash, { compact }: Endpoint): number {
  let hash = 0x811c9dc5
  for (let i = 0; i < infoHash.length; i += 2) hash = Math.imul(hash ^ infoHash.charCodeAt(i), 0x01000193)
  for (const byte of compact) hash = Math.imul(hash ^ byte, 0x01000193)
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b)
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35)
  return (hash ^ (hash >>> 16)) >>> 0
}

function latin1(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('latin1')
}
