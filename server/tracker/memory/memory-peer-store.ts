import type { Family } from '../../../lib/protocol/address.ts'
import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import type { SwarmCounts } from '../../../lib/protocol/scrape.ts'
import type {
  LevelCounts,
  PeerStore,
  StoreAnnounce,
  StoreReply,
  StoreTotals,
  SwarmView,
} from '../peer-store.ts'
import { PeerSample } from '../peer-store.ts'
import type { Kind } from './family-swarms.ts'
import { FamilySwarms, leecher, seeder, wheelSlots } from './family-swarms.ts'
import { Lock } from './lock.ts'
import { pickPeers } from './pick-peers.ts'
import { createSharedArrays } from './shared-arrays.ts'
import { SwarmTable } from './swarm-table.ts'

/** The memory of a store, and what its other users must know of it; goes through `workerData`. */
export interface SharedStore {
  readonly buffers: ReadonlyMap<string, SharedArrayBuffer>
  readonly peersMax: number
  readonly swarmsMax: number
  readonly levels: number
  readonly seed: number
}

export interface MemoryPeerStoreOptions {
  readonly peersMax: number
  /** Swarms kept, empty ones included: those are remembered for their `downloaded`, oldest forgotten first. */
  readonly swarmsMax: number
  /** Levels of the topology. */
  readonly levels: number
  /** Peers in a reply at most. */
  readonly sampleMax: number
  /** 0 ≤ random() < 1. */
  readonly random: () => number
  /** Milliseconds that never go back; the same in every thread that shares the store. */
  readonly now: () => number
}

export interface MemoryPeerStore extends PeerStore {
  announce(announce: StoreAnnounce): StoreReply
  scrape(infoHash: InfoHash): SwarmCounts
  readonly shared: SharedStore
  /** Whole seconds that peers of the store are due at. */
  nowTick(): number
  /** Keeps a peer that is known at least so long from now on. */
  prolong(peer: Pick<StoreAnnounce, 'infoHash' | 'source' | 'port'>, lifetimeMs: number): void
  /** Removes a peer that is known, as its stop would. */
  forget(peer: Pick<StoreAnnounce, 'infoHash' | 'source' | 'port'>): void
  /** Runs `work` while no other thread touches the store; it must be quick and must not wait. */
  locked<Result>(work: (parts: StoreParts) => Result): Result
  /** Adds a peer of an earlier run, unless it is there or there is no room. @returns whether it was added */
  restore(peer: RestoredPeer): boolean
  /** Sets the completions of a swarm of an earlier run, unless it has some or there is no room. */
  restoreDownloaded(infoHash: InfoHash, downloaded: number): void
}

/** The structures under the store, for those who save and restore it. */
export interface StoreParts {
  readonly swarms: SwarmTable
  readonly families: Readonly<Record<Family, FamilySwarms>>
}

export interface RestoredPeer extends Pick<
  StoreAnnounce,
  'infoHash' | 'source' | 'port' | 'peerId' | 'place' | 'ancestors'
> {
  readonly kind: Kind
  /** From now on. */
  readonly lifeSeconds: number
}

const tickMs = 1000
/** Expired peers that one announce, or one turn of the timer, removes at most: 0.1 ms and 2 ms. The rest waits for the next turn. */
const expiredPerAnnounce = 64
const expiredPerTurn = 2000

/** Header words. */
const lockWord = 0
const tickWord = 1
const totalWords: readonly [number, number] = [2, 3]
const refusedWord = 4

/** Swarms in the memory of this process; several threads may share them, each with a store of its own over the same memory. */
export function createMemoryPeerStore(options: MemoryPeerStoreOptions): MemoryPeerStore {
  const { peersMax, swarmsMax, levels, random } = options
  const seed = Math.floor(random() * 2 ** 32)
  const store = openMemoryPeerStore({ buffers: new Map(), peersMax, swarmsMax, levels, seed }, options)
  // One thread is enough to look after what is due.
  let turn: NodeJS.Immediate | undefined
  const expire = () => {
    turn = store.expire(expiredPerTurn) ? undefined : setImmediate(expire)
  }
  const timer = setInterval(() => {
    if (turn === undefined) expire()
  }, tickMs)
  timer.unref()
  return {
    ...store,
    [Symbol.asyncDispose]: async () => {
      clearInterval(timer)
      clearImmediate(turn)
      await Promise.resolve()
    },
  }
}

/** A further thread's store over the memory of another's. */
export function openMemoryPeerStore(
  { buffers, peersMax, swarmsMax, levels, seed }: SharedStore,
  { random, now, sampleMax }: Pick<MemoryPeerStoreOptions, 'random' | 'now' | 'sampleMax'>,
): MemoryPeerStore & { expire(budget: number): boolean } {
  const arrays = createSharedArrays(buffers)
  const header = arrays.i32('header', 16)
  const lock = new Lock(header.subarray(lockWord, lockWord + 1))
  const swarms = new SwarmTable(arrays, { swarmsMax, seed })
  const family = (of: Family) =>
    new FamilySwarms(
      arrays,
      { roots: swarms.roots[of], infoHashes: swarms.infoHashes },
      { family: of, peersMax, swarmsMax, levels, seed },
    )
  const families: Readonly<Record<Family, FamilySwarms>> = { 4: family(4), 6: family(6) }
  const sample = new PeerSample(sampleMax)
  const pick = pickPeers({ families, sample, sampleMax, random })
  const endpoints = { 4: new Uint8Array(6), 6: new Uint8Array(18) }
  /** Scratch: the groups of one announcer. */
  const groups = { 4: new Int32Array(levels + 1), 6: new Int32Array(levels + 1) }
  const nowTick = () => Math.floor(now() / tickMs)
  if (header[tickWord] === 0) header[tickWord] = nowTick()

  const countsOf = (swarm: number): SwarmCounts => ({
    complete: countIn(4, swarm, seeder) + countIn(6, swarm, seeder),
    incomplete: countIn(4, swarm, leecher) + countIn(6, swarm, leecher),
    downloaded: swarms.downloaded(swarm),
  })
  const countIn = (of: Family, swarm: number, kind: Kind) =>
    families[of].count((swarms.roots[of][swarm] ?? 0) - 1, kind)

  const addTotal = (kind: Kind, by: number) => {
    header[totalWords[kind]] = (header[totalWords[kind]] ?? 0) + by
  }

  const remove = (peers: FamilySwarms, handle: number) => {
    const swarm = peers.swarmOf(handle)
    addTotal(peers.kindOf(handle), -1)
    peers.remove(handle)
    if (!swarms.hasPeers(swarm)) swarms.becameEmpty(swarm)
  }

  /** Looks after what is due, `budget` peers at most: those that announced since stay. @returns whether nothing is due any more */
  const expire = (budget: number, until = nowTick()): boolean => {
    let tick = Math.max(header[tickWord] ?? 0, until - wheelSlots)
    if (tick >= until) return true
    let left = budget
    for (; tick < until; tick++) {
      for (const peers of [families[4], families[6]]) {
        for (let handle = peers.inSlot(tick); handle >= 0; handle = peers.inSlot(tick)) {
          if (left-- === 0) {
            header[tickWord] = tick
            return false
          }
          if (peers.expiryTick(handle) > tick) peers.postpone(handle)
          else remove(peers, handle)
        }
      }
    }
    header[tickWord] = tick
    return true
  }

  const schedule = (peers: FamilySwarms, handle: number, lifetimeMs: number, nowMs: number) => {
    const lifeMs = Math.min(lifetimeMs, (wheelSlots - 2) * tickMs)
    peers.schedule(handle, Math.ceil((nowMs + lifeMs) / tickMs))
  }

  const endpointBytes = ({ source, port }: Pick<StoreAnnounce, 'source' | 'port'>): Uint8Array => {
    const bytes = endpoints[source.family]
    const length = source.bytes.length
    for (let i = 0; i < length; i++) bytes[i] = source.bytes[i] ?? 0
    bytes[length] = port >> 8
    bytes[length + 1] = port & 0xff
    return bytes
  }

  /** @returns -1 where it is not known */
  const findPeer = (peer: Pick<StoreAnnounce, 'infoHash' | 'source' | 'port'>): number => {
    const swarm = swarms.find(peer.infoHash)
    return swarm < 0 ? -1 : families[peer.source.family].find(swarm, endpointBytes(peer))
  }

  const findSwarm = (announce: StoreAnnounce): number =>
    announce.raw ? swarms.findAt(announce.raw.bytes, announce.raw.infoHashAt) : swarms.find(announce.infoHash)

  /** The swarm, added where it is not known and a peer would fit; -1 where the store is full. */
  const swarmFor = (infoHash: InfoHash, peers: FamilySwarms): number => {
    if (families[4].used + families[6].used >= peersMax || !peers.hasRoom()) return -1
    const known = swarms.find(infoHash)
    return known >= 0 ? known : swarms.add(infoHash)
  }

  const addPeer = (
    swarm: number,
    peers: FamilySwarms,
    endpoint: Uint8Array,
    where: Pick<StoreAnnounce, 'place' | 'ancestors'>,
    kind: Kind,
  ): number => {
    swarms.leaveEmpty(swarm)
    const handle = peers.add(swarm, endpoint, where, kind)
    addTotal(kind, 1)
    return handle
  }

  /** @returns the swarm and the announcer's handle, -1 each where it is not stored */
  const record = (announce: StoreAnnounce, peers: FamilySwarms): { swarm: number; handle: number } => {
    const endpoint = endpointBytes(announce)
    const kind = announce.left === 0 ? seeder : leecher
    const known = findSwarm(announce)
    const handle = known < 0 ? -1 : peers.find(known, endpoint)
    if (handle >= 0) {
      const before = peers.kindOf(handle)
      peers.move(handle, announce, kind)
      if (before !== kind) {
        addTotal(before, -1)
        addTotal(kind, 1)
        if (kind === seeder) swarms.setDownloaded(known, swarms.downloaded(known) + 1)
      }
      return { swarm: known, handle }
    }
    const swarm = swarmFor(announce.infoHash, peers)
    if (swarm < 0) {
      header[refusedWord] = (header[refusedWord] ?? 0) + 1
      return { swarm: known, handle: -1 }
    }
    if (kind === seeder && announce.event === 'completed')
      swarms.setDownloaded(swarm, swarms.downloaded(swarm) + 1)
    return { swarm, handle: addPeer(swarm, peers, endpoint, announce, kind) }
  }

  const announceLocked = (announce: StoreAnnounce): StoreReply => {
    const nowMs = now()
    expire(expiredPerAnnounce, Math.floor(nowMs / tickMs))
    const peers = families[announce.source.family]
    sample.clear()
    if (announce.event === 'stopped') {
      const swarm = findSwarm(announce)
      const handle = swarm < 0 ? -1 : peers.find(swarm, endpointBytes(announce))
      if (handle >= 0) remove(peers, handle)
      // The swarm may have gone with its last peer, and its number with it.
      const still = handle < 0 ? swarm : swarms.find(announce.infoHash)
      return { counts: still < 0 ? unknownSwarm : countsOf(still), peers: sample }
    }
    const { swarm, handle } = record(announce, peers)
    const counts = swarm < 0 ? unknownSwarm : countsOf(swarm)
    if (handle >= 0) {
      const { raw } = announce
      if (raw) peers.setPeerId(handle, raw.bytes, raw.peerIdAt)
      else peers.setPeerId(handle, announce.peerId, 0)
      schedule(peers, handle, announce.lifetimeMs(counts), nowMs)
    }
    findGroups(swarm, announce, handle)
    const self = handle < 0 ? undefined : peers.kindOf(handle)
    const view: SwarmView = {
      counts,
      gatewayRank: self === leecher ? peers.rankOf(handle) : 0,
      levels: levelsOf(announce, self),
    }
    pick(groups, announce, announce.choose(view), handle)
    return { counts, peers: sample }
  }

  /** Finds the groups of the announcer's place and of the nodes above it, in the families that it may hear of. */
  const findGroups = (swarm: number, announce: StoreAnnounce, self: number) => {
    const own = announce.source.family
    for (const family of [4, 6] as const) {
      const found = groups[family]
      const peers = families[family]
      if (swarm < 0 || (family !== own && announce.ownFamilyOnly)) {
        for (let i = 0; i <= levels; i++) found[i] = -1
        continue
      }
      // Whoever is stored is in them.
      if (family === own && self >= 0) {
        let group = peers.groupOf(self)
        for (let i = 0; i <= announce.ancestors.length; i++) {
          found[i] = group
          group = peers.parentOf(group)
        }
        continue
      }
      found[0] = peers.groupAt(swarm, announce.place)
      for (const [i, { node }] of announce.ancestors.entries()) found[i + 1] = peers.groupAt(swarm, node)
    }
  }

  /** Peers by distance; the announcer itself is not counted. */
  const levelsOf = (announce: StoreAnnounce, self: Kind | undefined): LevelCounts[] => {
    const count = (level: number, kind: Kind) =>
      families[4].count(groups[4][level] ?? -1, kind) + families[6].count(groups[6][level] ?? -1, kind)
    let seeders = self === seeder ? 1 : 0
    let leechers = self === leecher ? 1 : 0
    const result: LevelCounts[] = []
    for (let i = 0; i <= announce.ancestors.length; i++) {
      const [seedersHere, leechersHere] = [count(i, seeder), count(i, leecher)]
      result.push({
        distance: i === 0 ? 0 : (announce.ancestors[i - 1]?.distance ?? 0),
        seeders: seedersHere - seeders,
        leechers: leechersHere - leechers,
      })
      seeders = seedersHere
      leechers = leechersHere
    }
    return result
  }

  const locked = <Result>(work: () => Result): Result => {
    lock.acquire()
    try {
      return work()
    } finally {
      lock.release()
    }
  }

  return {
    shared: { buffers: arrays.buffers, peersMax, swarmsMax, levels, seed },
    announce: (announce) => {
      lock.acquire()
      try {
        return announceLocked(announce)
      } finally {
        lock.release()
      }
    },
    scrape: (infoHash) =>
      locked(() => {
        expire(expiredPerAnnounce)
        const swarm = swarms.find(infoHash)
        return swarm < 0 ? unknownSwarm : countsOf(swarm)
      }),
    swarms: async function* () {
      const step = 1024
      for (let from = 0; from < swarms.touched; from += step) {
        yield locked(() => {
          const part: [InfoHash, SwarmCounts][] = []
          for (let swarm = from; swarm < Math.min(from + step, swarms.touched); swarm++)
            if (swarms.isUsed(swarm)) part.push([swarms.infoHashOf(swarm), countsOf(swarm)])
          return part
        })
        await new Promise((resolve) => setImmediate(resolve))
      }
    },
    totals: (): StoreTotals => ({
      swarms: swarms.used,
      seeders: header[totalWords[seeder]] ?? 0,
      leechers: header[totalWords[leecher]] ?? 0,
      refused: header[refusedWord] ?? 0,
    }),
    prolong: (peer, lifetimeMs) => {
      locked(() => {
        const peers = families[peer.source.family]
        const handle = findPeer(peer)
        if (handle < 0 || peers.expiryTick(handle) * tickMs >= now() + lifetimeMs) return
        schedule(peers, handle, lifetimeMs, now())
      })
    },
    forget: (peer) => {
      locked(() => {
        const handle = findPeer(peer)
        if (handle >= 0) remove(families[peer.source.family], handle)
      })
    },
    nowTick,
    locked: (work) => locked(() => work({ swarms, families })),
    restore: ({ kind, lifeSeconds, ...peer }) =>
      locked(() => {
        const peers = families[peer.source.family]
        const swarm = swarmFor(peer.infoHash, peers)
        const endpoint = endpointBytes(peer)
        if (swarm < 0 || peers.find(swarm, endpoint) >= 0) return false
        const handle = addPeer(swarm, peers, endpoint, peer, kind)
        peers.setPeerId(handle, peer.peerId, 0)
        schedule(peers, handle, lifeSeconds * 1000, now())
        return true
      }),
    restoreDownloaded: (infoHash, downloaded) => {
      if (downloaded === 0) return
      locked(() => {
        const known = swarms.find(infoHash)
        const swarm = known >= 0 ? known : swarms.used < swarmsMax ? swarms.add(infoHash) : -1
        if (swarm < 0 || swarms.downloaded(swarm) > 0) return
        swarms.setDownloaded(swarm, downloaded)
        if (known < 0) swarms.becameEmpty(swarm)
      })
    },
    expire: (budget) => locked(() => expire(budget)),
    [Symbol.asyncDispose]: async () => {
      await Promise.resolve()
    },
  }
}

const unknownSwarm: SwarmCounts = { complete: 0, incomplete: 0, downloaded: 0 }
