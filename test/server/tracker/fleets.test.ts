// Fleets of odd shapes through the real tracker and store: nobody may be left alone with peers that have nothing.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { endpointIp, formatIp, parseIp } from '../../../lib/protocol/address.ts'
import { parseAnnounceReply, writeAnnounce } from '../../../lib/protocol/announce.ts'
import { parseCidr } from '../../../lib/protocol/cidr.ts'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import { parsePlace } from '../../../lib/protocol/place.ts'
import { silentLog } from '../../../lib/runtime/log.ts'
import { createMemoryPeerStore } from '../../../server/tracker/memory/memory-peer-store.ts'
import type { Level, TopologyConfig } from '../../../server/tracker/topology.ts'
import { createTopology } from '../../../server/tracker/topology.ts'
import { createTracker } from '../../../server/tracker/tracker.ts'

const seeder = '10.255.0.1'

test('a thousand racks of one host: each hears of the one that has it, and of others', async () => {
  const fleet = start({})
  const hosts = Array.from({ length: 1000 }, (_, i) => `10.${i >> 8}.${i & 255}.1`)
  await fleet.announce(seeder, { left: 0 })
  for (const host of hosts) await fleet.announce(host)
  const replies = await fleet.all(hosts)
  for (const [host, peers] of replies) {
    assert.ok(peers.includes(seeder), `${host} does not hear of the seeder`)
    assert.equal(peers.length, 50)
  }
  assertConnected(replies)
})

test('one rack of two thousand beside ten of ten: each hears of who has it, far away as it is, and not of its rack alone', async () => {
  const fleet = start({ places: { '10.0.0.0/16': 'huge' } })
  const huge = Array.from({ length: 2000 }, (_, i) => `10.0.${i >> 8}.${i & 255}`)
  const small = Array.from({ length: 100 }, (_, i) => `10.1.${i % 10}.${i}`)
  await fleet.announce(seeder, { left: 0 })
  for (const host of [...huge, ...small]) await fleet.announce(host)
  const replies = await fleet.all([...huge, ...small])
  for (const [host, peers] of replies)
    assert.ok(peers.includes(seeder), `${host} does not hear of the seeder`)
  for (const host of huge) {
    const near = replies.get(host)?.filter((peer) => peer.startsWith('10.0.')).length ?? 0
    assert.ok(near >= 25, `${host} hears of ${near} of its rack`)
  }
  assert.equal(huge.filter((host) => fleet.gateways.has(host)).length, 3)
  assertConnected(replies)
})

test('racks that vanish are heard of no more, and those that appear are neighbours from their first announce on', async () => {
  const fleet = start({ places: { '10.1.0.0/16': 'r1', '10.2.0.0/16': 'r2' } })
  const rack = (number: number) => Array.from({ length: 20 }, (_, i) => `10.${number}.0.${i + 1}`)
  await fleet.announce(seeder, { left: 0 })
  for (const host of [...rack(1), ...rack(2)]) await fleet.announce(host)
  for (const host of rack(2)) await fleet.announce(host, { event: 'stopped' })
  for (const [, peers] of await fleet.all(rack(1)))
    assert.ok(
      peers.every((peer) => !peer.startsWith('10.2.')),
      'of a rack that is gone',
    )
  // A rack that the table does not know yet.
  for (const host of rack(3)) await fleet.announce(host)
  const replies = await fleet.all(rack(3))
  for (const [host, peers] of replies) {
    assert.ok(peers.includes(seeder), `${host} does not hear of the seeder`)
    assert.equal(peers.filter((peer) => peer.startsWith('10.3.')).length, 19)
  }
  // Now it does: the same hosts are still neighbours, under another name.
  fleet.reload({ places: { '10.1.0.0/16': 'r1', '10.2.0.0/16': 'r2', '10.3.0.0/16': 'r3' } })
  for (const [, peers] of await fleet.all(rack(3)))
    assert.equal(peers.filter((peer) => peer.startsWith('10.3.')).length, 19)
})

test('a host that moves has the neighbours of its new rack from its next announce on, and none of the old see it nearby', async () => {
  const fleet = start({ places: { '10.1.0.0/16': 'r1', '10.2.0.0/16': 'r2' } })
  const hosts = ['10.1.0.1', '10.1.0.2', '10.2.0.1', '10.2.0.2']
  for (const host of hosts) await fleet.announce(host)
  await fleet.announce('10.1.0.1')
  assert.deepEqual(fleet.distances('10.1.0.1'), { '10.1.0.2': 0, '10.2.0.1': 1, '10.2.0.2': 1 })
  fleet.reload({ places: { '10.1.0.0/16': 'r1', '10.1.0.1/32': 'r2', '10.2.0.0/16': 'r2' } })
  for (const host of hosts) await fleet.announce(host)
  assert.deepEqual(fleet.distances('10.1.0.1'), { '10.1.0.2': 1, '10.2.0.1': 0, '10.2.0.2': 0 })
  assert.deepEqual(fleet.distances('10.1.0.2'), { '10.1.0.1': 1, '10.2.0.1': 1, '10.2.0.2': 1 })
  assert.deepEqual(fleet.distances('10.2.0.2'), { '10.1.0.1': 0, '10.1.0.2': 1, '10.2.0.1': 0 })
})

test('hosts in no rack hear of who has it, and are heard of; those of one network are neighbours', async () => {
  const fleet = start({ places: { '10.1.0.0/16': 'r1' } })
  const strangers = ['192.0.2.1', '192.0.2.2', '198.51.100.1', '203.0.113.1']
  const rack = Array.from({ length: 30 }, (_, i) => `10.1.0.${i + 1}`)
  await fleet.announce('10.1.255.1', { left: 0 })
  for (const host of [...rack, ...strangers]) await fleet.announce(host)
  const replies = await fleet.all([...rack, ...strangers])
  for (const host of strangers) assert.ok(replies.get(host)?.includes('10.1.255.1'))
  assert.equal(fleet.distances('192.0.2.1')['192.0.2.2'], 0)
  assert.equal(fleet.distances('192.0.2.1')['198.51.100.1'], 1)
  assertConnected(replies)
})

test('zones between which bytes are dear hear of each other nevertheless, even where nobody holds all', async () => {
  const shape = {
    levels: ['rack', { name: 'zone', cost: 1000 }] satisfies Level[],
    places: Object.fromEntries(Array.from({ length: 10 }, (_, i) => [`10.${i}.0.0/16`, `r${i}`] as const)),
    zones: Object.fromEntries(Array.from({ length: 10 }, (_, i) => [`r${i}`, [i < 5 ? 'z1' : 'z2']])),
  }
  const fleet = start(shape)
  const hosts = Array.from({ length: 200 }, (_, i) => `10.${i % 10}.0.${i + 1}`)
  for (const host of hosts) await fleet.announce(host)
  const replies = await fleet.all(hosts)
  const zoneOf = (host: string) => (Number(host.split('.')[1]) < 5 ? 'z1' : 'z2')
  let across = 0
  for (const [host, peers] of replies) {
    const foreign = peers.filter((peer) => zoneOf(peer) !== zoneOf(host)).length
    assert.ok(foreign > 0, `${host} hears of no other zone`)
    across += foreign
  }
  assert.equal(across, hosts.length, 'one each: what leaves a zone is dear')
  assertConnected(replies)
  // The same fleet where it is not.
  fleet.reload({ ...shape, levels: ['rack', 'zone'] })
  const plain = await fleet.all(hosts)
  assert.ok(
    [...plain].flatMap(([host, peers]) => peers.filter((peer) => zoneOf(peer) !== zoneOf(host))).length >
      5 * hosts.length,
  )
})

interface Shape {
  readonly levels?: readonly Level[]
  /** Networks and their racks. */
  readonly places?: Readonly<Record<string, string>>
  /** Racks and their parents. */
  readonly zones?: Readonly<Record<string, readonly string[]>>
}

function start(shape: Shape) {
  const config = {
    announceIntervalMs: 1_800_000,
    minAnnounceIntervalMs: 10_000,
    numwantDefault: 50,
    numwantMax: 100,
    scrapeMax: 1,
    gatewaysPerRack: 3,
    reservePeers: 4,
    trustedAnnouncers: [],
    fullScrapeNetworks: [],
  }
  const rules = (next: Shape) => ({ topology: createTopology(topologyOf(next)), hooks: [], config })
  const tracker = createTracker({
    store: createMemoryPeerStore({
      peersMax: 10_000,
      swarmsMax: 10,
      levels: createTopology(topologyOf(shape)).levels,
      sampleMax: 100,
      random: Math.random,
      now: () => 1_000_000,
    }),
    rules: rules(shape),
    after: undefined,
    epoch: 'epoch',
    now: () => 1_000_000,
    observer: { handled: () => undefined, refused: () => undefined },
    log: silentLog(),
  })
  const gateways = new Set<string>()
  const heard = new Map<string, Record<string, number>>()
  const announce = async (
    host: string,
    { left = 1, event }: { left?: number; event?: 'stopped' } = {},
  ): Promise<string[]> => {
    const query = writeAnnounce({
      infoHash: infoHashFromHex('aa'.repeat(20)),
      peerId: Buffer.from(`-RS0001-${host.padEnd(12, '.').slice(-12)}`),
      port: 6881,
      uploaded: 0,
      downloaded: 0,
      left,
      event,
      numwant: 50,
      rackswarm: true,
    })
    const source = parseIp(host) ?? assert.fail(host)
    const { peers, rackswarm } = parseAnnounceReply(await tracker.announce(query, source))
    if (rackswarm?.gateway === true) gateways.add(host)
    heard.set(
      host,
      Object.fromEntries(peers.map(({ endpoint, distance }) => [formatIp(endpointIp(endpoint)), distance])),
    )
    return peers.map(({ endpoint }) => formatIp(endpointIp(endpoint)))
  }
  return {
    gateways,
    announce,
    /** Once more, now that all are there. */
    all: async (hosts: readonly string[]) => {
      gateways.clear()
      const replies = new Map<string, string[]>()
      for (const host of hosts) replies.set(host, await announce(host))
      return replies
    },
    /** Of the peers in the last reply. */
    distances: (host: string) => heard.get(host) ?? {},
    reload: (next: Shape) => {
      tracker.replaceRules(rules(next))
    },
  }
}

function topologyOf({ levels = ['rack'], places = {}, zones = {} }: Shape): TopologyConfig {
  return {
    levels,
    places: Object.fromEntries(Object.entries(zones).map(([rack, parents]) => [rack, { parents }])),
    prefixes: Object.entries(places).map(([cidr, place]) => ({
      cidr: parseCidr(cidr),
      place: parsePlace(place),
    })),
    ipv4PrefixLength: 24,
    ipv6PrefixLength: 64,
  }
}

/** What one has reaches everyone, since whoever hears of a peer connects to it. */
function assertConnected(replies: ReadonlyMap<string, readonly string[]>): void {
  const neighbours = new Map<string, Set<string>>()
  const link = (a: string, b: string) => {
    neighbours.set(a, (neighbours.get(a) ?? new Set()).add(b))
  }
  for (const [host, peers] of replies)
    for (const peer of peers) {
      link(host, peer)
      link(peer, host)
    }
  const [start] = neighbours.keys()
  const reached = new Set([start])
  const queue = [start]
  for (let at = queue.pop(); at !== undefined; at = queue.pop())
    for (const next of neighbours.get(at) ?? [])
      if (!reached.has(next)) {
        reached.add(next)
        queue.push(next)
      }
  assert.equal(reached.size, neighbours.size, 'a part of the swarm is by itself')
}
