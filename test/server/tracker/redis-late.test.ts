import assert from 'node:assert/strict'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, test } from 'node:test'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import { delay } from '../../../lib/runtime/backoff.ts'
import { monotonicMs } from '../../../lib/runtime/clock.ts'
import { createLog } from '../../../lib/runtime/log.ts'
import { createRandom } from '../../../lib/runtime/random.ts'
import { RedisUnavailable, openRedis } from '../../../server/redis/connection.ts'
import { openRedisPeerStore } from '../../../server/tracker/redis/redis-peer-store.ts'
import { redisSettings, startRedis } from '../../support/redis.ts'
import { until } from '../../support/until.ts'
import type { Clock } from './peer-store.contract.ts'
import { announceOf } from './peer-store.contract.ts'

const directory = mkdtempSync(join(tmpdir(), 'rackswarm-redis-late-'))
const redis = await startRedis(directory)
const random = createRandom(Math.random)
const connection = openRedis(redisSettings(redis.port), { random, log: createLog('test', 'error') })
after(async () => {
  await connection[Symbol.asyncDispose]()
  await redis[Symbol.asyncDispose]()
  rmSync(directory, { recursive: true, force: true })
})
await until('Redis answers', () => connection.stats().isUp)

const open = async (clock: Clock) => {
  await connection.call('FLUSHALL')
  return openRedisPeerStore(connection, {
    sampleMax: 1000,
    random,
    now: () => clock.nowMs,
    housekeeping: false,
  })
}

test('redis: what is told late gives way to what has been heard since, stops included', async () => {
  const clock = { nowMs: 1_000_000_000 }
  await using store = await open(clock)
  const tell = async (fields: Parameters<typeof announceOf>[0], belatedMs?: number) =>
    store.announce({ ...announceOf(fields).announce, ...(belatedMs !== undefined && { belatedMs }) })
  const swarm = async () => {
    const { complete, incomplete, downloaded } = await store.scrape(infoHashFromHex('0'.repeat(40)))
    return [complete, incomplete, downloaded]
  }
  await tell({ peer: 1 })
  clock.nowMs += 10_000
  await tell({ peer: 1, left: 0, event: 'stopped' }, 20_000)
  assert.deepEqual(await swarm(), [0, 1, 0], 'it has announced since')
  await tell({ peer: 1, left: 0, event: 'completed' }, 5000)
  assert.deepEqual(await swarm(), [1, 0, 1], 'news is news')
  await tell({ peer: 1 }, 7000)
  assert.deepEqual(await swarm(), [1, 0, 1])
  await tell({ peer: 1, event: 'stopped' })
  await tell({ peer: 1 }, 3000)
  assert.deepEqual(await swarm(), [0, 0, 1], 'who has stopped since stays away')
  await tell({ peer: 1 })
  assert.deepEqual(await swarm(), [0, 1, 1])
  assert.equal(store.totals().refused, 0)
})

test('redis: an announce that a Redis which stood still comes to too late is not done', async () => {
  const deadline = { ms: 200, monotonic: monotonicMs }
  const impatient = openRedis(redisSettings(redis.port, { commandTimeoutMs: 200 }), {
    random,
    log: createLog('test', 'error'),
  })
  await using store = openRedisPeerStore(impatient, { sampleMax: 50, random, housekeeping: false, deadline })
  await connection.call('FLUSHALL')
  await until('it answers', () => impatient.stats().isUp)
  await store.announce(announceOf({ peer: 1 }).announce)
  redis.kill('SIGSTOP')
  try {
    await assert.rejects(async () => store.announce(announceOf({ peer: 2 }).announce), RedisUnavailable)
    await delay(300, new AbortController().signal)
  } finally {
    redis.kill('SIGCONT')
  }
  await store.announce(announceOf({ peer: 3 }).announce)
  assert.equal((await store.scrape(infoHashFromHex('0'.repeat(40)))).incomplete, 2)
  await impatient[Symbol.asyncDispose]()
})
