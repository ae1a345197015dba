import { join } from 'node:path'
import { infoHashFromHex, infoHashToHex } from '../lib/protocol/infohash.ts'
import type { InfoHash } from '../lib/protocol/infohash.ts'
import { createLog } from '../lib/runtime/log.ts'
import { createSeededRandom } from '../lib/runtime/random.ts'
import type { RedisConnection } from '../server/redis/connection.ts'
import { openRedis, redisScript } from '../server/redis/connection.ts'
import type { StoreAnnounce } from '../server/tracker/peer-store.ts'
import { samplePeersMax } from '../server/tracker/peer-store.ts'
import { openRedisPeerStore } from '../server/tracker/redis/redis-peer-store.ts'
import { planSelection } from '../server/tracker/selection.ts'
import { rootPlace } from '../server/tracker/topology.ts'
import { redisSettings, startRedis } from '../test/support/redis.ts'
import { until } from '../test/support/until.ts'
import type { BenchOptions, Benchmark, Side } from './harness.ts'
import { cpuSecondsOf } from './harness.ts'

const [small, large] = [50, 10_000]
const memoryPeers = 100_000
const hostsPerRack = 40
const racksPerRow = 10
const numwant = 50
/** Announces that are under way at once where the rate is measured. */
const underWay = 32
const oneAtATimeMs = 1500
const severalMs = 2500
/** Longer than the benchmark: what is measured are announces of peers that are there. */
const lifeMs = 3_600_000

/** What an announce costs with the swarms in Redis, beside the least that a script can cost, and beside chihaya's way of keeping them. */
export const redis: Benchmark = {
  name: 'redis',
  summary: `announces to the store in Redis, in process: swarms of ${small} and of ${large.toLocaleString('en')}, beside an empty script and chihaya's data model`,
  figures: [
    { name: 'one at a time', unit: 'µs' },
    { name: `each of ${underWay} under way`, unit: 'µs' },
    { name: 'rate', unit: '/s' },
    { name: 'CPU here', unit: 'µs' },
    { name: 'CPU of Redis', unit: 'µs' },
    { name: 'peers a reply', unit: '' },
    { name: 'memory', unit: 'bytes/peer' },
  ],
  ignoresSize: true,
  prepare,
}

async function prepare(stack: AsyncDisposableStack, { directory }: BenchOptions): Promise<Side[]> {
  const server = stack.use(await startRedis(join(directory, 'redis')))
  const random = createSeededRandom(7)
  const connection = stack.use(
    openRedis(redisSettings(server.port, { commandTimeoutMs: 30_000 }), {
      random,
      log: createLog('bench', 'error'),
    }),
  )
  await until('Redis answers', () => connection.stats().isUp)
  const pids = { here: process.pid, redis: server.pid }
  const empty = redisScript('empty', 'return 1')
  const store = stack.use(
    openRedisPeerStore(connection, { sampleMax: samplePeersMax, random, housekeeping: false }),
  )
  const chihaya = createChihaya(connection)
  for (const [swarm, peers] of [
    [1, small],
    [2, large],
  ] as const) {
    await severally(peers, (i) => Promise.resolve(store.announce(announceOf(swarm, i))))
    await severally(peers, (i) => chihaya.put(announceOf(swarm, i)))
  }

  const side = (name: string, settings: string, one: () => Promise<number>): Side => ({
    name,
    settings,
    run: async () => {
      const alone = await during(oneAtATimeMs, 1, one)
      const { result: several, cpu } = await cpuSecondsOf(pids, () => during(severalMs, underWay, one))
      const us = (seconds: number | undefined) => ((seconds ?? 0) * 1e6) / several.calls
      return {
        'one at a time': alone.us,
        [`each of ${underWay} under way`]: several.us,
        rate: 1e6 / several.us,
        'CPU here': us(cpu['here']),
        'CPU of Redis': us(cpu['redis']),
        'peers a reply': several.sum / several.calls,
      }
    },
  })
  const ownSide = (swarm: number, peers: number) =>
    side(
      `announce, ${peers} peers`,
      `peers that are there announce again, in random order; racks of ${hostsPerRack}, rows of ${racksPerRow} racks, a tenth seeds, numwant ${numwant}`,
      async () => {
        const { peers: sample } = await store.announce(announceOf(swarm, Math.floor(random() * peers)))
        return sample.lengths[4]
      },
    )
  const chihayaSide = (swarm: number, peers: number) =>
    side(
      `chihaya's data model, ${peers} peers`,
      'HKEYS of the seeders and of the leechers, HLEN of both, and MULTI HSET HSET EXEC, in two round trips; the same announces through the same client',
      () => chihaya.announce(announceOf(swarm, Math.floor(random() * peers))),
    )
  const memorySide = (
    name: string,
    swarmOf: number,
    put: (announce: StoreAnnounce) => Promise<unknown>,
  ): Side => ({
    name,
    settings: `used_memory of a Redis with nothing else, before and after ${memoryPeers.toLocaleString('en')} peers`,
    run: async () => {
      await connection.call('SELECT', 1)
      try {
        await connection.call('FLUSHDB', 'SYNC')
        const before = await usedMemory(connection)
        await severally(memoryPeers, (i) => put(announceOf(1000 + Math.floor(i / swarmOf), i % swarmOf)))
        const after = await usedMemory(connection)
        return { memory: (after - before) / memoryPeers }
      } finally {
        await connection.call('FLUSHDB', 'SYNC')
        await connection.call('SELECT', 0)
      }
    },
  })
  const example = announceOf(2, 77)
  const request = [Buffer.alloc(6), Buffer.alloc(57), Buffer.alloc(8 * 13)]
  const key = `${connection.keyPrefix}{${infoHashToHex(example.infoHash)}}`
  return [
    side('an empty script', 'EVALSHA of `return 1` with one key', async () => {
      await connection.run(empty, [key], [])
      return 0
    }),
    side(
      'an empty script that is given as much',
      'the same with two keys and three arguments, as long as those of an announce',
      async () => {
        await connection.run(empty, [key, `${key}:due`], request)
        return 0
      },
    ),
    ownSide(1, small),
    ownSide(2, large),
    chihayaSide(1, small),
    chihayaSide(2, large),
    ...[large, small].flatMap((swarmOf) => [
      memorySide(`memory, swarms of ${swarmOf}`, swarmOf, async (announce) => store.announce(announce)),
      memorySide(`memory of chihaya's data model, swarms of ${swarmOf}`, swarmOf, (announce) =>
        chihaya.put(announce),
      ),
    ]),
  ]
}

/** Swarms as chihaya keeps them in Redis: a hash of the seeders and one of the leechers of each, read as a whole for every announce. */
function createChihaya(connection: RedisConnection) {
  const keyOf = (infoHash: InfoHash, kind: 'S' | 'L') => `chihaya:IPv4_${kind}_${infoHashToHex(infoHash)}`
  const peerKey = ({ peerId, source, port }: StoreAnnounce) =>
    Buffer.concat([peerId, Buffer.from([port >> 8, port & 0xff]), source.bytes])
  const put = async (announce: StoreAnnounce): Promise<void> => {
    const key = keyOf(announce.infoHash, announce.left === 0 ? 'S' : 'L')
    const now = String(Date.now() * 1_000_000)
    // Sent in one go, so that no other announce comes between.
    await Promise.all([
      connection.call('MULTI'),
      connection.call('HSET', key, peerKey(announce), now),
      connection.call('HSET', 'chihaya:IPv4', key, now),
      connection.call('EXEC'),
    ])
  }
  return {
    put,
    announce: async (announce: StoreAnnounce): Promise<number> => {
      const [seeders, leechers] = [keyOf(announce.infoHash, 'S'), keyOf(announce.infoHash, 'L')]
      const [holders, others] = (await Promise.all([
        connection.call('HKEYS', seeders),
        connection.call('HKEYS', leechers),
        connection.call('HLEN', seeders),
        connection.call('HLEN', leechers),
      ])) as [Buffer[], Buffer[], number, number]
      const own = peerKey(announce)
      const peers = announce.left === 0 ? [] : holders.slice(0, numwant)
      for (const other of others) {
        if (peers.length >= numwant) break
        if (!own.equals(other)) peers.push(other)
      }
      await put(announce)
      return peers.length
    },
  }
}

/** The announce of a host: one in ten has everything. */
function announceOf(swarm: number, host: number): StoreAnnounce {
  const place = 1 + Math.floor(host / hostsPerRack)
  const seeding = host % 10 === 0
  return {
    infoHash: infoHashFromHex(swarm.toString(16).padStart(40, '0')),
    source: { family: 4, bytes: Uint8Array.of(10, host >> 16, (host >> 8) & 0xff, host & 0xff) },
    port: 6881,
    peerId: Buffer.from(String(host).padStart(20, '-')),
    place,
    ancestors: [
      { node: 0x80000001 + Math.floor(place / racksPerRow), distance: 1 },
      { node: rootPlace, distance: 2 },
    ],
    left: seeding ? 0 : 1,
    event: undefined,
    ownFamilyOnly: false,
    withPeerIds: false,
    numwant,
    lifetimeMs: () => lifeMs,
    choose: (view) =>
      planSelection({ view, seeding, numwant, gatewaysPerRack: 4, reservePeers: 5, shares: [1, 0.5, 1] }),
  }
}

/** Does something again and again, so many at once. @returns how long each took */
async function during(ms: number, atOnce: number, one: () => Promise<number>) {
  let calls = 0
  let sum = 0
  const start = performance.now()
  await Promise.all(
    Array.from({ length: atOnce }, async () => {
      while (performance.now() - start < ms) {
        const peers = await one()
        sum += peers
        calls++
      }
    }),
  )
  return { calls, sum, us: ((performance.now() - start) * 1000) / calls }
}

async function severally(times: number, work: (i: number) => Promise<unknown>): Promise<void> {
  let next = 0
  await Promise.all(
    Array.from({ length: underWay }, async () => {
      while (next < times) await work(next++)
    }),
  )
}

async function usedMemory(connection: RedisConnection): Promise<number> {
  return Number(/used_memory:(\d+)/.exec(String(await connection.call('INFO', 'memory')))?.[1])
}
