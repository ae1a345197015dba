import assert from 'node:assert/strict'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { endpointPort, parseCompactPeers } from '../../lib/protocol/address.ts'
import { startRedis } from '../support/redis.ts'
import type { TrackerProcess } from '../support/tracker.ts'
import { announceQuery, bencoded, httpGet, startTracker, temporaryDirectory } from '../support/tracker.ts'
import { until } from '../support/until.ts'

interface Ready {
  readonly code: number
  readonly status: string
  readonly checks: Readonly<Record<string, string>>
}

async function readiness({ ready }: TrackerProcess): Promise<Ready> {
  const response = await fetch(`${String(ready['metricsUrl'])}/readyz`)
  return { code: response.status, ...((await response.json()) as Omit<Ready, 'code'>) }
}

/** Announces as the peer at a port. @returns the ports of the peers in the reply */
async function announce(server: TrackerProcess, port: number, more = ''): Promise<number[]> {
  const { body } = await httpGet(server.main, `/announce?${announceQuery({ port }, more)}`)
  const peers = bencoded(body).get('peers')
  assert.ok(peers instanceof Uint8Array, body)
  return parseCompactPeers(peers, 4).map(endpointPort).sort()
}

async function startTwo(t: TestContext, storage = '') {
  const directory = await temporaryDirectory(t)
  const redis = await startRedis(join(directory, 'redis'))
  t.after(() => redis[Symbol.asyncDispose]())
  const start = () =>
    startTracker(
      t,
      `tracker: { approval: none }
redis: { url: 'redis://127.0.0.1:${redis.port}', command_timeout: 300ms }
storage: { name: redis${storage} }
`,
    )
  const [one, two] = await Promise.all([start(), start()])
  return { redis, one, two, directory }
}

const metric = (text: string, name: string) =>
  Number(new RegExp(`^${name} (\\S+)$`, 'm').exec(text)?.[1] ?? assert.fail(`no ${name}`))

test('while Redis stands still announces are answered at once, /readyz says so and stays 200, and afterwards nothing is missing', async (t) => {
  const { redis, one, two } = await startTwo(t)
  await announce(one, 1001)
  assert.deepEqual(await announce(two, 1002), [1001])
  redis.kill('SIGSTOP')
  t.after(() => {
    redis.kill('SIGCONT')
  })
  await announce(one, 1003)
  const times: number[] = []
  for (let port = 2000; port < 2050; port++) {
    const startMs = performance.now()
    await announce(one, port)
    times.push(performance.now() - startMs)
  }
  const [slowest = 0] = times.sort((a, b) => b - a)
  assert.ok(slowest < 250, `${slowest} ms`)
  const { code, status, checks } = await readiness(one)
  assert.deepEqual({ code, status }, { code: 200, status: 'degraded' })
  assert.match(checks['swarms'] ?? '', /^degraded: answered from what this server knows, for \d+ s: /)
  await until('the metrics say so', async () => metric(await one.metrics(), 'rackswarm_store_degraded') === 1)
  assert.ok(metric(await one.metrics(), 'rackswarm_store_answered_locally_total') >= 51)
  await announce(one, 1001, 'event=stopped')
  redis.kill('SIGCONT')
  await until('all is told', async () => {
    const text = await one.metrics()
    return (
      metric(text, 'rackswarm_store_degraded') === 0 && metric(text, 'rackswarm_store_untold_peers') === 0
    )
  })
  assert.equal((await readiness(one)).status, 'ok')
  const ports = await announce(two, 1002, 'numwant=100')
  assert.deepEqual(ports, [1003, ...Array.from({ length: 50 }, (_, i) => 2000 + i)])
})

test('a Redis that comes back empty is told what servers have heard meanwhile', async (t) => {
  const { redis, one, two, directory } = await startTwo(t)
  await announce(one, 1001)
  redis.kill('SIGKILL')
  await redis.ended
  await announce(one, 1002)
  await announce(two, 1003)
  const again = await startRedis(join(directory, 'redis'), { port: redis.port })
  t.after(() => again[Symbol.asyncDispose]())
  for (const server of [one, two])
    await until('it is whole', async () => {
      const text = await server.metrics()
      return (
        metric(text, 'rackswarm_store_degraded') === 0 && metric(text, 'rackswarm_store_untold_peers') === 0
      )
    })
  const ports = await announce(two, 1004)
  assert.deepEqual(
    ports.filter((port) => port !== 1001),
    [1002, 1003],
  )
})

test('a server that starts without Redis answers, and after degraded_max refuses with a time to come back', async (t) => {
  const server = await startTracker(
    t,
    `tracker: { approval: none }
redis: { url: 'redis://127.0.0.1:1', connect_timeout: 200ms }
storage: { name: redis, config: { degraded_max: 1s } }
`,
  )
  assert.deepEqual(await announce(server, 1001), [])
  assert.deepEqual(await announce(server, 1002), [1001])
  await until('it refuses', async () => (await readiness(server)).code === 503)
  const { body } = await httpGet(server.main, `/announce?${announceQuery({ port: 1003 })}`)
  assert.match(body, /failure reason.*has not reached its store of swarms.*retry in/)
  assert.match((await readiness(server)).checks['swarms'] ?? '', /^announces are refused: /)
})
