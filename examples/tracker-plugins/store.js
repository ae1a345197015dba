// A store: swarms in Maps. It keeps every promise of `PeerStore`, and walks a whole swarm for each announce, so it is for swarms of some
// thousand peers.
import { PeerSample, endpoint } from 'rackswarm'

/**
 * @typedef {object} Peer
 * @property {string} key
 * @property {Swarm} swarm
 * @property {import('rackswarm').Endpoint} endpoint
 * @property {Uint8Array} peerId
 * @property {boolean} seeder
 * @property {number} place
 * @property {readonly import('rackswarm').Ancestor[]} ancestors
 * @property {number} rank
 * @property {number} dueSecond
 *
 * @typedef {object} Swarm
 * @property {import('rackswarm').InfoHash} infoHash
 * @property {Map<string, Peer>} peers
 * @property {number} seeders
 * @property {number} downloaded
 */

/**
 * Settings: `peers_max` (100,000) and `swarms_max` (10,000), beyond which announces are answered but not stored.
 *
 * @type {import('rackswarm').CreatePeerStore}
 */
export default function createMapStore(config, { sampleMax, random, now }) {
  const peersMax = readCount(config, 'peers_max', 100_000)
  const swarmsMax = readCount(config, 'swarms_max', 10_000)
  /** @type {Map<import('rackswarm').InfoHash, Swarm>} */
  const swarms = new Map()
  /** Swarms without peers, kept for their `downloaded`; the first is forgotten first. @type {Set<Swarm>} */
  const empty = new Set()
  /** Who is due in which second. @type {Map<number, Set<Peer>>} */
  const due = new Map()
  let expiredUntil = Math.floor(now() / 1000)
  let [seeders, leechers, refused] = [0, 0, 0]
  const sample = new PeerSample(sampleMax)

  const expire = () => {
    const until = Math.floor(now() / 1000)
    for (; expiredUntil < until; expiredUntil++) for (const peer of due.get(expiredUntil) ?? []) remove(peer)
  }

  /** @param {Peer} peer @param {boolean} isSeeder @param {1 | -1} by */
  const count = (peer, isSeeder, by) => {
    if (isSeeder) [seeders, peer.swarm.seeders] = [seeders + by, peer.swarm.seeders + by]
    else leechers += by
  }

  /** @param {Peer} peer */
  const unschedule = (peer) => {
    const others = due.get(peer.dueSecond)
    others?.delete(peer)
    if (others?.size === 0) due.delete(peer.dueSecond)
  }

  /** @param {Peer} peer @param {number} lifetimeMs */
  const schedule = (peer, lifetimeMs) => {
    unschedule(peer)
    peer.dueSecond = Math.ceil((now() + lifetimeMs) / 1000)
    const others = due.get(peer.dueSecond)
    if (others) others.add(peer)
    else due.set(peer.dueSecond, new Set([peer]))
  }

  /** @param {Peer} peer */
  const remove = (peer) => {
    const { swarm } = peer
    unschedule(peer)
    swarm.peers.delete(peer.key)
    count(peer, peer.seeder, -1)
    if (swarm.peers.size > 0) return
    if (swarm.downloaded > 0) empty.add(swarm)
    else swarms.delete(swarm.infoHash)
  }

  /**
   * The swarm, or a new one where there is room.
   *
   * @param {import('rackswarm').InfoHash} infoHash
   * @returns {Swarm | undefined}
   */
  const swarmFor = (infoHash) => {
    const known = swarms.get(infoHash)
    if (known) return known
    if (swarms.size >= swarmsMax) {
      const [oldest] = empty
      if (!oldest) return undefined
      empty.delete(oldest)
      swarms.delete(oldest.infoHash)
    }
    const swarm = { infoHash, peers: new Map(), seeders: 0, downloaded: 0 }
    swarms.set(infoHash, swarm)
    return swarm
  }

  /**
   * Adds the announcer, or notes what is new of it.
   *
   * @param {import('rackswarm').StoreAnnounce} announce
   * @returns {Peer | undefined} undefined where there is no room
   */
  const record = (announce) => {
    const at = endpoint(announce.source, announce.port)
    const key = Buffer.from(at.compact).toString('latin1')
    const seeder = announce.left === 0
    const { place, ancestors } = announce
    const known = swarms.get(announce.infoHash)?.peers.get(key)
    if (known) {
      if (seeder && !known.seeder) known.swarm.downloaded++
      count(known, known.seeder, -1)
      known.peerId = Uint8Array.from(announce.peerId)
      known.seeder = seeder
      if (place !== known.place) known.rank = rankOf(announce.infoHash, place, at)
      known.place = place
      known.ancestors = ancestors
      count(known, seeder, 1)
      return known
    }
    const swarm = seeders + leechers < peersMax ? swarmFor(announce.infoHash) : undefined
    if (!swarm) return undefined
    if (seeder && announce.event === 'completed') swarm.downloaded++
    /** @type {Peer} */
    const peer = {
      key,
      swarm,
      endpoint: at,
      peerId: Uint8Array.from(announce.peerId),
      seeder,
      place,
      ancestors,
      rank: rankOf(announce.infoHash, place, at),
      dueSecond: 0,
    }
    empty.delete(swarm)
    swarm.peers.set(key, peer)
    count(peer, seeder, 1)
    return peer
  }

  return {
    announce(announce) {
      expire()
      sample.clear()
      const known = swarms.get(announce.infoHash)
      if (announce.event === 'stopped') {
        const key = Buffer.from(endpoint(announce.source, announce.port).compact).toString('latin1')
        const peer = known?.peers.get(key)
        if (peer) remove(peer)
        return { counts: countsOf(known), peers: sample }
      }
      const self = record(announce)
      if (!self) refused++
      const swarm = self?.swarm ?? known
      const counts = countsOf(swarm)
      if (self) schedule(self, announce.lifetimeMs(counts))
      const levels = levelsOf(swarm, announce, self)
      const plan = announce.choose({
        counts,
        gatewayRank: self && !self.seeder ? peersBefore(self) : 0,
        levels: levels.map(({ distance, seeders, leechers }) => ({
          distance,
          seeders: seeders.length,
          leechers: leechers.length,
        })),
      })
      sample.fill(
        levels.flatMap(({ distance, seeders, leechers }, i) =>
          shuffled(
            [
              ...(i === 0 ? draw([...seeders, ...leechers], plan.rack, random) : []),
              ...draw(seeders, plan.seeders[i] ?? 0, random),
              ...draw(leechers, plan.leechers[i] ?? 0, random),
            ],
            random,
          ).map((peer) => ({ endpoint: peer.endpoint, peerId: peer.peerId, distance })),
        ),
      )
      return { counts, peers: sample }
    },
    scrape(infoHash) {
      expire()
      return countsOf(swarms.get(infoHash))
    },
    async *swarms() {
      expire()
      for (const swarm of [...swarms.values()]) yield [[swarm.infoHash, countsOf(swarm)]]
    },
    totals() {
      expire()
      return { swarms: swarms.size, seeders, leechers, refused }
    },
    async [Symbol.asyncDispose]() {
      swarms.clear()
      empty.clear()
      due.clear()
    },
  }
}

/** @param {Swarm | undefined} swarm @returns {import('rackswarm').SwarmCounts} */
function countsOf(swarm) {
  if (!swarm) return { complete: 0, incomplete: 0, downloaded: 0 }
  const { peers, seeders, downloaded } = swarm
  return { complete: seeders, incomplete: peers.size - seeders, downloaded }
}

/**
 * The others of the swarm by how far they are: the announcer's own place first, then those under each node above it.
 *
 * @param {Swarm | undefined} swarm
 * @param {import('rackswarm').StoreAnnounce} announce
 * @param {Peer | undefined} self
 * @returns {{ distance: number, seeders: Peer[], leechers: Peer[] }[]}
 */
function levelsOf(swarm, { place, ancestors, source, ownFamilyOnly }, self) {
  /** @type {{ distance: number, seeders: Peer[], leechers: Peer[] }[]} */
  const levels = [{ distance: 0 }, ...ancestors].map(({ distance }) => ({
    distance,
    seeders: [],
    leechers: [],
  }))
  for (const peer of swarm?.peers.values() ?? []) {
    if (peer === self || (ownFamilyOnly && peer.endpoint.family !== source.family)) continue
    const shared = ancestors.findIndex(({ node }) => peer.ancestors.some((other) => other.node === node))
    const level = levels[peer.place === place ? 0 : shared + 1]
    if (peer.seeder) level?.seeders.push(peer)
    else level?.leechers.push(peer)
  }
  return levels
}

/** How many leechers of its place come before this one. @param {Peer} self */
function peersBefore(self) {
  let before = 0
  for (const { seeder, place, rank, key } of self.swarm.peers.values())
    if (!seeder && place === self.place && (rank < self.rank || (rank === self.rank && key < self.key)))
      before++
  return before
}

/**
 * The same for every server that knows the peer. FNV-1a with the finaliser of MurmurHash3.
 *
 * @param {import('rackswarm').InfoHash} infoHash
 * @param {number} place
 * @param {import('rackswarm').Endpoint} endpoint
 */
function rankOf(infoHash, place, { compact }) {
  let hash = 0x811c9dc5
  for (const byte of [...Buffer.from(`${infoHash} ${place}`), ...compact])
    hash = Math.imul(hash ^ byte, 0x01000193)
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b)
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35)
  return (hash ^ (hash >>> 16)) >>> 0
}

/**
 * As many as are wanted, all equally likely; takes them out of the list.
 *
 * @param {Peer[]} peers
 * @param {number} want
 * @param {() => number} random
 * @returns {Peer[]}
 */
function draw(peers, want, random) {
  /** @type {Peer[]} */
  const drawn = []
  while (drawn.length < want && peers.length > 0) {
    const at = Math.floor(random() * peers.length)
    const [peer, last] = [peers[at], peers.pop()]
    if (peer) drawn.push(peer)
    if (last && at < peers.length) peers[at] = last
  }
  return drawn
}

/** @param {Peer[]} peers @param {() => number} random */
function shuffled(peers, random) {
  return draw(peers, peers.length, random)
}

/**
 * @param {Readonly<Record<string, unknown>>} config
 * @param {string} name
 * @param {number} fallback
 */
function readCount(config, name, fallback) {
  const value = config[name] ?? fallback
  if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < 1)
    throw new Error(`${name}: need a whole number above zero, got ${JSON.stringify(value)}`)
  return value
}
