import assert from 'node:assert/strict'
import { once } from 'node:events'
import { mkdtemp } from 'node:fs/promises'
import type { AddressInfo } from 'node:net'
import { connect, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { createLog } from '../../../lib/runtime/log.ts'
import { openRedis, RedisRefused, redisScript, RedisUnavailable } from '../../../server/redis/connection.ts'
import { redisSettings, startRedis } from '../../support/redis.ts'
import { until } from '../../support/until.ts'

const deps = { random: Math.random, log: createLog('test', 'silent') }

test('a connection runs scripts, names what Redis refuses, and comes back by itself', async () => {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-redis-'))
  await using redis = await startRedis(directory)
  const settings = redisSettings(redis.port)
  await using connection = openRedis(settings, deps)
  const changes: boolean[] = []
  connection.onChange((isUp) => changes.push(isUp))
  await until('it is up', () => connection.stats().isUp)

  const script = redisScript('echo', "redis.call('SET', KEYS[1], ARGV[1]) return {ARGV[1], 7}")
  for (let i = 0; i < 2; i++)
    assert.deepEqual(await connection.run(script, ['rackswarm:{a}'], [Buffer.from([0, 255])]), [
      Buffer.from([0, 255]),
      7,
    ])
  await connection.call('SCRIPT', 'FLUSH')
  assert.deepEqual(await connection.run(script, ['rackswarm:{a}'], ['x']), [Buffer.from('x'), 7])
  await assert.rejects(
    connection.call('HGET', 'rackswarm:{a}', 'x'),
    (error) => error instanceof RedisRefused && error.code === 'WRONGTYPE',
  )

  redis.kill('SIGSTOP')
  const startedAt = performance.now()
  await assert.rejects(connection.call('PING'), RedisUnavailable)
  assert.ok(performance.now() - startedAt < 1000, 'the deadline holds')
  redis.kill('SIGCONT')
  await connection.call('PING')
  assert.equal(connection.stats().isUp, true)

  redis.kill('SIGKILL')
  await redis.ended
  await until('it is down', () => !connection.stats().isUp)
  await assert.rejects(connection.call('PING'), RedisUnavailable)
  await using again = await startRedis(directory, { port: redis.port })
  assert.equal(again.port, redis.port)
  await until('it is up again', () => connection.stats().isUp)
  assert.deepEqual(await connection.run(script, ['rackswarm:{a}'], ['y']), [Buffer.from('y'), 7])
  assert.deepEqual(changes.at(-1), true)
})

test('what is published is heard until the signal aborts', async () => {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-redis-'))
  await using redis = await startRedis(directory)
  await using connection = openRedis(redisSettings(redis.port), deps)
  await until('it is up', () => connection.stats().isUp)
  const heard: string[] = []
  const ending = new AbortController()
  await connection.subscribe('rackswarm:news', (message) => heard.push(message.toString()), ending.signal)
  await connection.call('PUBLISH', 'rackswarm:news', 'one')
  await until('the message is heard', () => heard.length === 1)
  ending.abort()
  await sleep(100)
  await connection.call('PUBLISH', 'rackswarm:news', 'two')
  await sleep(100)
  assert.deepEqual(heard, ['one'])
})

test('a subscription that is lost while it is made anew comes back by itself', async (t) => {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-redis-'))
  await using redis = await startRedis(directory)
  let cuts = 0
  const proxy = createServer((socket) => {
    const upstream = connect(redis.port, '127.0.0.1')
    for (const end of [socket, upstream]) end.on('error', () => undefined)
    socket
      .on('close', () => upstream.destroy())
      .on('data', (bytes) => {
        if (cuts > 0 && /subscribe/i.test(bytes.toString())) {
          cuts--
          socket.destroy()
        } else upstream.write(bytes)
      })
    upstream.on('close', () => socket.destroy()).pipe(socket)
  })
  t.after(() => proxy.close())
  await once(proxy.listen(0, '127.0.0.1'), 'listening')
  await using connection = openRedis(redisSettings((proxy.address() as AddressInfo).port), deps)
  await until('it is up', () => connection.stats().isUp)
  let heard = 0
  const ending = new AbortController()
  await connection.subscribe('rackswarm:news', () => heard++, ending.signal)
  cuts = 2
  await redis.ask('CLIENT', 'KILL', 'TYPE', 'pubsub')
  await until('it is heard again', async () => {
    await redis.ask('PUBLISH', 'rackswarm:news', 'one')
    return heard > 0
  })
  assert.equal(cuts, 0)
  ending.abort()
})

test('no more commands are under way than were allowed', async () => {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-redis-'))
  await using redis = await startRedis(directory)
  await using connection = openRedis(redisSettings(redis.port, { callsMax: 5 }), deps)
  await until('it is up', () => connection.stats().isUp)
  const asked = await Promise.allSettled(Array.from({ length: 8 }, async () => connection.call('PING')))
  assert.equal(asked.filter(({ status }) => status === 'fulfilled').length, 5)
  assert.equal(connection.stats().calls, 0)
})
