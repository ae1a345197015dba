import assert from 'node:assert/strict'
import { mkdtemp } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import fc from 'fast-check'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import { createLog } from '../../../lib/runtime/log.ts'
import type { RedisConnection } from '../../../server/redis/connection.ts'
import { openRedis } from '../../../server/redis/connection.ts'
import { createSharedWebseedPolicy } from '../../../server/registry/shared/webseed-leases.ts'
import type { WebseedAsk } from '../../../server/registry/webseed-policy.ts'
import { createWebseedPolicy } from '../../../server/registry/webseed-policy.ts'
import { removeAll } from '../../support/fleet.ts'
import { redisSettings, startRedis } from '../../support/redis.ts'
import { until } from '../../support/until.ts'

test('servers that share the leases of the webseed give what one alone would give', async (t) => {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-leases-'))
  await using server = await startRedis(directory)
  t.after(() => removeAll(directory))
  const redis = () =>
    openRedis(redisSettings(server.port), { random: Math.random, log: createLog('test', 'error') })
  await using one = redis()
  await using other = redis()
  await until('both are connected', () => one.stats().isUp && other.stats().isUp)
  const options = { leaseMs: 60_000, hostsMax: 100, now: Date.now }
  let swarms = 0
  await fc.assert(
    fc.asyncProperty(
      fc.integer({ min: 1, max: 200 }),
      fc.array(
        fc.record({
          server: fc.nat(1),
          host: fc.integer({ min: 1, max: 12 }).map(String),
          stalledSeconds: fc.constantFrom(undefined, undefined, 1, 5, 100),
          rangeDone: fc.oneof(fc.boolean(), fc.nat(60)),
          complete: fc.constantFrom(0, 0, 0, 0, 1),
        }),
        { maxLength: 60 },
      ),
      async (pieceCount, asks) => {
        const infoHash = infoHashFromHex((++swarms).toString(16).padStart(40, '0'))
        const shared = [one, other].map((connection) => createSharedWebseedPolicy(connection, options))
        const alone = createWebseedPolicy(options)
        for (const { server: at, complete, ...rest } of asks) {
          const ask: WebseedAsk = {
            infoHash,
            pieceCount,
            counts: { complete, incomplete: 1, downloaded: 0 },
            ...rest,
          }
          assert.deepEqual(await shared[at]?.mayUse(ask), alone.mayUse(ask))
        }
      },
    ),
    { numRuns: 60 },
  )
  for (const key of (await one.call('KEYS', `${one.keyPrefix}*`)) as Buffer[])
    assert.ok(Number(await one.call('PTTL', key)) > 0, `${key.toString()} has an end`)
})

/** A connection to a Redis of its own. */
async function connectToOwn(t: TestContext) {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-leases-'))
  const server = await startRedis(directory)
  const redis = openRedis(redisSettings(server.port), {
    random: Math.random,
    log: createLog('test', 'error'),
  })
  t.after(async () => {
    await server[Symbol.asyncDispose]()
    await removeAll(directory)
  })
  await until('it is connected', () => redis.stats().isUp)
  return redis
}

/** Asks for a part of a build of sixteen pieces, which nobody has yet. */
function askOf(redis: RedisConnection, { pieceCount = 16, leaseMs = 60_000 } = {}) {
  const shared = createSharedWebseedPolicy(redis, { leaseMs, hostsMax: 100, now: Date.now })
  return (host: string, rangeDone = false) =>
    shared.mayUse({
      infoHash: infoHashFromHex('0'.repeat(40)),
      pieceCount,
      host,
      counts: { complete: 0, incomplete: 1, downloaded: 0 },
      stalledSeconds: undefined,
      rangeDone,
    })
}

test('of leases that ended in Redis, those of others go out after all that nobody had', async (t) => {
  await using redis = await connectToOwn(t)
  const leaseMs = 1
  const askNow = askOf(redis, { pieceCount: 12, leaseMs })
  const ask = async (host: string) => {
    await sleep(20 * leaseMs)
    return askNow(host)
  }
  const [first, second, third] = [0, 4, 8].map((firstPiece) => ({ firstPiece, pieceCount: 4 }))
  assert.deepEqual(await ask('a'), first)
  assert.deepEqual(await ask('b'), second)
  assert.deepEqual(await ask('a'), first, 'late, but nobody has taken it')
  assert.deepEqual(await ask('c'), third)
  assert.deepEqual(await ask('d'), first, 'there is no other any more')
})

test('servers that share leases take the part of a slow host from it too', async (t) => {
  await using redis = await connectToOwn(t)
  const ask = askOf(redis)
  const slow = await ask('slow')
  assert.ok(slow && (await ask('quick')))
  assert.ok(await ask('quick', true))
  assert.ok(await ask('quick', true))
  await sleep(1_100)
  assert.deepEqual(await ask('slow'), slow)
  assert.deepEqual(await ask('quick', true), slow)
  assert.notDeepEqual(await ask('slow'), slow)
})

test('servers that share leases give what was fetched again after as long as one alone does, and to a first host what a slow one has', async (t) => {
  await using redis = await connectToOwn(t)
  const ask = askOf(redis)
  const gone = await ask('gone')
  const first = await ask('first')
  assert.ok(gone && first)
  assert.ok(await ask('first', true))
  assert.ok(await ask('first', true))
  assert.equal(await ask('first', true), undefined, 'nobody is slow yet, and all was fetched just now')
  await sleep(1_100)
  assert.deepEqual(await ask('first'), gone)
  assert.deepEqual(await ask('late'), first, 'it was fetched a second ago')
})
