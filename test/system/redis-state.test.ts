import assert from 'node:assert/strict'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { deployctlOk, fetchOn, startFleetAgent, startFleetServer, writeRandomFile } from '../support/fleet.ts'
import { freePort } from '../support/foreign.ts'
import { startRedis } from '../support/redis.ts'
import { until } from '../support/until.ts'

test('a Redis that loses its memory, or is away, costs no host, no revocation and no fetch', async (t) => {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-redis-state-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  let redis = await startRedis(join(directory, 'redis'))
  t.after(() => redis[Symbol.asyncDispose]())
  const { port: redisPort } = redis
  const serverPort = await freePort()
  const startServer = () =>
    startFleetServer(directory, {
      http: `addr: 127.0.0.1:${serverPort}`,
      settings: `redis: { url: redis://127.0.0.1:${redisPort} }\nstate: { name: redis }\n`,
    })
  let server = await startServer()
  t.after(() => server[Symbol.asyncDispose]())
  const agentDirectory = join(directory, 'agent')
  const agent = await startFleetAgent(agentDirectory, server, { host: 'h1', place: 'rack-1' })
  t.after(() => agent[Symbol.asyncDispose]())
  const publish = async (tag: string) => {
    const file = join(directory, `${tag}.tar`)
    await writeRandomFile(file, 700_000)
    await deployctlOk(server, ['publish', file, `web:${tag}`])
  }
  const api = async (method: string, path: string, body?: unknown) =>
    fetch(`${server.publicUrl}/api/v1/${path}`, {
      method,
      headers: {
        authorization: `Bearer ${(await readFile(server.adminTokenFile, 'utf8')).trim()}`,
        ...(body !== undefined && { 'content-type': 'application/json' }),
      },
      ...(body !== undefined && { body: JSON.stringify(body) }),
    })
  const hosts = async () => (await api('GET', 'hosts')).text()
  const readiness = async () => {
    const reply = await fetch(`${server.metricsUrl}/readyz`)
    return { code: reply.status, body: (await reply.json()) as { status: string; checks: { state: string } } }
  }

  await publish('one')
  await publish('two')
  await publish('three')
  await fetchOn(agent, 'web:one')
  const newToken = { name: 'ci', scopes: ['pull:*'] }
  const token = (await (await api('POST', 'tokens', newToken)).json()) as { id: string; token: string }
  assert.equal((await api('DELETE', `tokens/${token.id}`)).status, 204)
  const asRevoked = async () =>
    (
      await fetch(`${server.publicUrl}/v2/web/tags/list`, {
        headers: { authorization: `Bearer ${token.token}` },
      })
    ).status
  assert.equal(await asRevoked(), 401)

  await redis.ask('FLUSHALL')
  await fetchOn(agent, 'web:two')
  assert.match(await hosts(), /"h1"/)
  assert.match(await (await api('GET', 'tokens')).text(), new RegExp(token.id))
  const metrics = await (await fetch(`${server.metricsUrl}/metrics`)).text()
  assert.match(metrics, /rackswarm_state_lost_total 1/)
  assert.match(metrics, /rackswarm_redis_up 1/)

  redis.kill('SIGKILL')
  await redis.ended
  const refused = await api('POST', 'tokens', newToken)
  assert.equal(refused.status, 503)
  assert.ok(Number(refused.headers.get('retry-after')) > 0)
  assert.match(await refused.text(), /the Redis that the servers share does not answer/)
  await fetchOn(agent, 'web:three')
  const degraded = await readiness()
  assert.equal(degraded.code, 200)
  assert.equal(degraded.body.status, 'degraded')
  assert.match(degraded.body.checks.state, /does not answer/)

  // It starts without Redis too, and knows whom it has turned away.
  await server[Symbol.asyncDispose]()
  server = await startServer()
  assert.equal(await asRevoked(), 401)
  redis = await startRedis(join(directory, 'redis'), { port: redisPort })
  await until('the state is there again', async () =>
    readiness().then(
      ({ body }) => body.status === 'ok',
      () => false,
    ),
  )
  assert.match(await hosts(), /"h1"/)

  // With the copy gone too, what is signed is still worth what it says.
  await server[Symbol.asyncDispose]()
  await redis.ask('FLUSHALL')
  await rm(join(server.dataDirectory, 'state-copy.sqlite'))
  server = await startServer()
  await until('the host is known again', async () => (await hosts()).includes('"h1"'))
  const { credential } = JSON.parse(
    await readFile(join(agentDirectory, 'data', 'credential.json'), 'utf8'),
  ) as { credential: { credential: string } }
  const renewed = await fetch(`${server.publicUrl}/api/v1/hosts/self/renew`, {
    method: 'POST',
    headers: { authorization: `Bearer ${credential.credential}` },
  })
  assert.equal(renewed.status, 200)
})
