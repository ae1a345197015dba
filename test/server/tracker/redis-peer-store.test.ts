import assert from 'node:assert/strict'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, test } from 'node:test'
import fc from 'fast-check'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import { createLog } from '../../../lib/runtime/log.ts'
import { createRandom } from '../../../lib/runtime/random.ts'
import type { RedisConnection, RedisSettings } from '../../../server/redis/connection.ts'
import { openRedis } from '../../../server/redis/connection.ts'
import { createMemoryPeerStore } from '../../../server/tracker/memory/memory-peer-store.ts'
import { openRedisPeerStore } from '../../../server/tracker/redis/redis-peer-store.ts'
import { startHousekeeping } from '../../../server/tracker/redis/housekeeping.ts'
import { openSwarmList } from '../../../server/tracker/redis/swarm-list.ts'
import { redisSettings, startCluster, startRedis } from '../../support/redis.ts'
import { until } from '../../support/until.ts'
import type { Clock } from './peer-store.contract.ts'
import { announceOf, peerStoreContract, peersOf } from './peer-store.contract.ts'

const directory = mkdtempSync(join(tmpdir(), 'rackswarm-redis-peers-'))
const random = createRandom(Math.random)
const log = createLog('test', 'error')
const redis = await startRedis(join(directory, 'single'))
const connection = await connect(redisSettings(redis.port))
after(async () => {
  await connection[Symbol.asyncDispose]()
  await redis[Symbol.asyncDispose]()
  rmSync(directory, { recursive: true, force: true })
})

/** Connected to what stands there, whatever other tests have left. */
async function connect(settings: RedisSettings): Promise<RedisConnection> {
  const opened = openRedis(settings, { random, log })
  await until('Redis answers', () => opened.stats().isUp)
  return opened
}

const open = async (clock: Clock, over: RedisConnection = connection) => {
  await over.callEach('FLUSHALL')
  return openRedisPeerStore(over, { sampleMax: 1000, random, now: () => clock.nowMs, housekeeping: false })
}
const infoHash = (swarm: number) => infoHashFromHex(String(swarm).padStart(40, '0'))
/** All keys of a Redis, which only tests may ask for. */
const allKeys = async (over: RedisConnection = connection) =>
  ((await over.callEach('KEYS', '*')) as Buffer[][]).flat().map(String)

peerStoreContract('redis', open)

test('redis: a random history gives the same counts, ranks and peers as in memory', async () => {
  const step = fc.record({
    waitMs: fc.constantFrom(0, 0, 0, 0, 1000, 20_000, 50_000),
    swarm: fc.nat(1),
    peer: fc.integer({ min: 1, max: 25 }),
    family: fc.constantFrom(4 as const, 4 as const, 6 as const),
    place: fc.integer({ min: 1, max: 5 }),
    left: fc.constantFrom(0, 1, 1),
    event: fc.constantFrom(
      undefined,
      undefined,
      'started' as const,
      'completed' as const,
      'stopped' as const,
    ),
    lifeMs: fc.constantFrom(30_000, 60_000, 600_000),
    ownFamilyOnly: fc.boolean(),
  })
  await fc.assert(
    fc.asyncProperty(fc.array(step, { minLength: 20, maxLength: 150 }), async (steps) => {
      const clock = { nowMs: 1_000_000 }
      await using inRedis = await open(clock)
      await using inMemory = createMemoryPeerStore({
        peersMax: 1000,
        swarmsMax: 10,
        levels: 2,
        sampleMax: 1000,
        random,
        now: () => clock.nowMs,
      })
      const untils = new Map<string, number>()
      for (const { waitMs, ...fields } of steps) {
        clock.nowMs += waitMs
        // The second in which a peer goes is the one in memory, and the one before it in Redis.
        for (const until of untils.values())
          if (until <= clock.nowMs && clock.nowMs < until + 3000) clock.nowMs = until + 3000
        const announces = [announceOf(fields), announceOf(fields)] as const
        const seen = [await inRedis.announce(announces[0].announce), inMemory.announce(announces[1].announce)]
        const key = `${fields.swarm} ${fields.family} ${fields.peer}`
        if (fields.event === 'stopped') untils.delete(key)
        else untils.set(key, clock.nowMs + fields.lifeMs)
        const [ours, theirs] = seen.map(({ counts }) => counts)
        assert.deepEqual(ours, theirs)
        assert.deepEqual(announces[0].seen.view, announces[1].seen.view)
        const [peers, same] = seen.map((reply) =>
          peersOf(reply)
            .map(({ peer, family, distance }) => `${family} ${peer} ${distance}`)
            .sort(),
        )
        assert.deepEqual(peers, same)
      }
    }),
    { numRuns: 40 },
  )
})

test('redis: every key has the prefix and an end, those of a swarm one hash tag', async () => {
  await using store = openRedisPeerStore(connection, { sampleMax: 1000, random, housekeeping: false })
  await connection.callEach('FLUSHALL')
  await using house = startHousekeeping({
    connection,
    list: openSwarmList(connection),
    sweep: async (of) => Promise.resolve(store.scrape(of)),
  })
  for (let peer = 1; peer <= 60; peer++) await store.announce(announceOf({ peer, swarm: peer % 3 }).announce)
  // One that has ended and begun again.
  await store.announce(announceOf({ peer: 1, swarm: 7 }).announce)
  await store.announce(announceOf({ peer: 1, swarm: 7, event: 'stopped' }).announce)
  await store.announce(announceOf({ peer: 1, swarm: 7 }).announce)
  await house.turn()
  const keys = await allKeys()
  assert.ok(keys.length >= 10)
  for (const key of keys) {
    assert.match(key, /^rackswarm:(\{[0-9a-f]{40}\}(:due|:gone)?|swarms:[0-9a-f]{2}|totals|housekeeping)$/)
    assert.ok(Number(await connection.call('TTL', key)) > 0, `${key} has an end`)
  }
})

test('redis: stores on one Redis know the same peers, whichever was told of them', async () => {
  const clock = { nowMs: 1000 }
  await using one = await open(clock)
  await using other = openRedisPeerStore(connection, {
    sampleMax: 1000,
    random,
    now: () => clock.nowMs,
    housekeeping: false,
  })
  for (let peer = 1; peer <= 20; peer++) {
    const { announce } = announceOf({ peer })
    const { counts, peers } = await (peer % 2 === 0 ? one : other).announce(announce)
    assert.equal(counts.incomplete, peer)
    assert.equal(peers.lengths[4], peer - 1)
  }
  await other.announce(announceOf({ peer: 4, event: 'stopped' }).announce)
  const { peers } = await one.announce(announceOf({ peer: 1 }).announce)
  assert.ok(!peersOf({ peers, counts: await one.scrape(infoHash(0)) }).some(({ peer }) => peer === 4))
})

test('redis: by its own clock, so that servers whose clocks differ agree', async () => {
  await connection.callEach('FLUSHALL')
  await using store = openRedisPeerStore(connection, { sampleMax: 1000, random, housekeeping: false })
  await store.announce(announceOf({ peer: 1, lifeMs: 30_000 }).announce)
  await using late = openRedisPeerStore(connection, {
    sampleMax: 1000,
    random,
    housekeeping: false,
    now: () => Date.now() + 90_000,
  })
  assert.equal((await store.scrape(infoHash(0))).incomplete, 1)
  assert.equal((await late.scrape(infoHash(0))).incomplete, 0, 'as a clock that is trusted would have it')
})

test('redis: an announce for which it has no memory is answered, not stored, and counted; who is known stays', async (t) => {
  const small = await startRedis(join(directory, 'small'))
  t.after(() => small[Symbol.asyncDispose]())
  const over = await connect(redisSettings(small.port))
  t.after(() => over[Symbol.asyncDispose]())
  const clock = { nowMs: 1_000_000 }
  await using store = await open(clock, over)
  for (let peer = 1; peer <= 20; peer++) await store.announce(announceOf({ peer, place: 1 }).announce)
  await over.call('CONFIG', 'SET', 'maxmemory', '1')
  const { announce, seen } = announceOf({ peer: 99, place: 1 })
  const { counts, peers } = await store.announce(announce)
  assert.equal(counts.incomplete, 20)
  assert.equal(peers.lengths[4], 20)
  assert.equal(seen.view?.levels[0]?.leechers, 20)
  assert.equal(store.totals().refused, 1)
  // All but the first say that they are still there, one has it all, one goes.
  clock.nowMs += 40_000
  for (let peer = 2; peer <= 20; peer++) await store.announce(announceOf({ peer, place: 1 }).announce)
  await store.announce(announceOf({ peer: 3, place: 1, left: 0 }).announce)
  await store.announce(announceOf({ peer: 4, place: 1, event: 'stopped' }).announce)
  clock.nowMs += 40_000
  assert.deepEqual(await store.scrape(infoHash(0)), { complete: 1, incomplete: 17, downloaded: 1 })
  assert.equal(store.totals().refused, 1)
})

test('redis: one of several keeps house: swarms that are forgotten go, and all know the totals', async () => {
  const clock = { nowMs: 1_000_000 }
  await using store = await open(clock)
  const houses = [1, 2].map(() =>
    startHousekeeping({
      connection,
      list: openSwarmList(connection),
      sweep: async (of) => {
        const counts = await store.scrape(of)
        return counts.complete + counts.incomplete + counts.downloaded > 0 ? counts : undefined
      },
    }),
  )
  try {
    for (let swarm = 0; swarm < 30; swarm++) {
      await store.announce(announceOf({ peer: 1, swarm, lifeMs: swarm < 20 ? 30_000 : 600_000 }).announce)
      if (swarm === 25)
        await store.announce(announceOf({ peer: 1, swarm, left: 0, lifeMs: 600_000 }).announce)
    }
    for (const house of houses) await house.turn()
    for (const house of houses) assert.deepEqual(house.totals(), { swarms: 30, seeders: 1, leechers: 29 })
    clock.nowMs += 60_000
    for (const house of houses) await house.turn()
    for (const house of houses) assert.deepEqual(house.totals(), { swarms: 10, seeders: 1, leechers: 9 })
    assert.equal((await allKeys()).filter((key) => key.includes('{')).length, 20, 'ten swarms are left')
  } finally {
    for (const house of houses) await house[Symbol.asyncDispose]()
  }
  assert.equal(await connection.call('EXISTS', 'rackswarm:housekeeping'), 0, 'the lease is given up')
})

test('redis: swarms on a Cluster of three', async (t) => {
  const cluster = await startCluster(join(directory, 'cluster'))
  t.after(() => cluster[Symbol.asyncDispose]())
  const over = await connect(cluster.settings)
  t.after(() => over[Symbol.asyncDispose]())
  await using store = await open({ nowMs: 1_000_000 }, over)
  for (let peer = 1; peer <= 300; peer++)
    await store.announce(announceOf({ peer, swarm: peer % 30, left: peer % 2 }).announce)
  for (let swarm = 0; swarm < 30; swarm++) {
    const { counts, peers } = await store.announce(announceOf({ peer: swarm + 30, swarm, left: 1 }).announce)
    assert.equal(counts.complete + counts.incomplete, 10)
    assert.equal(peers.lengths[4], 9)
  }
  let listed = 0
  for await (const part of store.swarms()) listed += part.length
  assert.equal(listed, 30)
  for (const keys of await over.callEach('DBSIZE')) assert.ok(Number(keys) > 10, 'each node has some')
})
