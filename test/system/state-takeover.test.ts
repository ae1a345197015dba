import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { access, mkdtemp, readFile, rename, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { blockAfter } from '../support/doc-examples.ts'
import type { FleetServer } from '../support/fleet.ts'
import { deployctlOk, fetchOn, startFleetAgent, startFleetServer, writeRandomFile } from '../support/fleet.ts'
import { freePort } from '../support/foreign.ts'
import { ociClient } from '../support/oci.ts'
import { startRedis } from '../support/redis.ts'

async function until(what: string, isTrue: () => Promise<boolean>, withinMs = 15_000): Promise<void> {
  const end = performance.now() + withinMs
  while (!(await isTrue().catch(() => false))) {
    assert.ok(performance.now() < end, what)
    await sleep(50)
  }
}

/** All that the state has, as its users see it. */
async function allOf(url: string, token: string): Promise<Record<string, unknown>> {
  const client = ociClient(url, token)
  const lists = ['hosts', 'tokens', 'bootstrap-tokens', 'pins', 'revoked-torrents']
  const entries = await Promise.all(
    lists.map(async (name) => {
      const response = await client.call(`/api/v1/${name}`)
      assert.equal(response.status, 200, name)
      // When a host was heard last, and by which server, is no state.
      const text = JSON.stringify(await response.json(), (key, value: unknown) =>
        ['seenAt', 'agentVersion'].includes(key) ? undefined : value,
      )
      return [name, JSON.parse(text) as unknown] as const
    }),
  )
  return Object.fromEntries(entries)
}

async function killed(server: FleetServer): Promise<void> {
  server.process.kill('SIGKILL')
  await server.exited
}

test('a server with a state of its own becomes one of several over Redis as the document says, and loses nothing; another one is refused', async (t) => {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-takeover-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const redis = await startRedis(join(directory, 'redis'))
  t.after(() => redis[Symbol.asyncDispose]())
  const ports = { a: await freePort(), b: await freePort() }
  const publicUrl = `http://127.0.0.1:${ports.a}`
  const shared = join(directory, 'shared')
  const start = async (t: TestContext, name: 'a' | 'b', settings: string) => {
    const server = await startFleetServer(join(directory, name), {
      http: `addr: 127.0.0.1:${ports[name]}`,
      settings: `public_url: ${publicUrl}\n${settings}`,
    })
    t.after(() => server[Symbol.asyncDispose]())
    return server
  }
  const several = (name: string) => `server_name: ${name}
redis: { url: 'redis://127.0.0.1:${redis.port}' }
storage: { name: redis }
state: { name: redis }
registry: { shared_dir: ${shared}, shared_settle: 300ms }
`

  const alone = await start(t, 'a', '')
  const admin = (await readFile(alone.adminTokenFile, 'utf8')).trim()
  const agent = await startFleetAgent(join(directory, 'h1'), alone, { host: 'h1', place: 'r1' })
  t.after(() => agent[Symbol.asyncDispose]())
  const gone = await startFleetAgent(join(directory, 'h2'), alone, { host: 'h2', place: 'r1' })
  t.after(() => gone[Symbol.asyncDispose]())
  const client = ociClient(publicUrl, admin)
  const call = async (method: string, path: string, body?: object) =>
    client.call(`/api/v1/${path}`, {
      method,
      ...(body && { headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) }),
    })
  for (const tag of ['one', 'two']) {
    const file = join(directory, `${tag}.tar`)
    await writeRandomFile(file, 500_000)
    await deployctlOk(alone, ['publish', file, `web:${tag}`])
  }
  await fetchOn(agent, 'web:one')
  const [good, revoked] = await Promise.all(
    ['good', 'revoked'].map(
      async (name) =>
        (await (await call('POST', 'tokens', { name, scopes: ['pull:*'] })).json()) as {
          id: string
          token: string
        },
    ),
  )
  assert.ok(good && revoked)
  assert.equal((await call('DELETE', `tokens/${revoked.id}`)).status, 204)
  await until('h2 is enrolled', async () => (await call('DELETE', 'hosts/h2')).status === 204)
  await gone[Symbol.asyncDispose]()
  assert.equal((await call('PUT', `pins/${encodeURIComponent('web:one')}`)).status, 200)
  assert.equal((await call('PUT', `revoked-torrents/${'ab'.repeat(20)}`)).status, 204)
  assert.equal((await call('POST', 'bootstrap-tokens', { usesMax: 3 })).status, 201)
  const before = await allOf(publicUrl, admin)
  assert.match(JSON.stringify(before), /"h1".*"h2".*"good".*"usesLeft":3.*"web:one".*abababab/)
  // At its worst: with all it wrote last still beside the file.
  await killed(alone)

  const steps = (await blockAfter('operations.md', 'From one server to several'))
    .replaceAll('/var/lib/rackswarm/server', join(directory, 'a', 'server'))
    .replaceAll('/mnt/nfs/rackswarm', shared)
  execFileSync('sh', ['-euc', steps])
  const [a, b] = await Promise.all([start(t, 'a', several('a')), start(t, 'b', several('b'))])
  await assert.rejects(access(join(a.dataDirectory, 'state.sqlite')))
  for (const port of Object.values(ports)) {
    const url = `http://127.0.0.1:${port}`
    await until(`${url} knows all`, async () => {
      assert.deepEqual(await allOf(url, admin), before)
      return true
    })
    assert.equal(await ociClient(url, revoked.token).statusOf('/v2/'), 401)
    assert.equal(await ociClient(url, good.token).statusOf('/v2/web/manifests/two'), 200)
  }
  const door = { ...a, adminTokenFile: join(shared, 'admin-token') }
  await fetchOn(agent, 'web:two')
  assert.match(await deployctlOk(door, ['audit', '--verify']), /./)
  assert.doesNotMatch(await readFile(join(directory, 'a', 'server.log'), 'utf8'), /has lost its state/)

  // It is done once: what is deleted while it is off stays so.
  await killed(a)
  const atB = ociClient(`http://127.0.0.1:${ports.b}`, admin)
  assert.equal(await atB.statusOf(`/api/v1/pins/${encodeURIComponent('web:one')}`, { method: 'DELETE' }), 204)
  const again = await start(t, 'a', several('a'))
  assert.deepEqual((await allOf(publicUrl, admin))['pins'], { pins: [] })

  const other = join(directory, 'other')
  await (await startFleetServer(other))[Symbol.asyncDispose]()
  const joinWithOther = () =>
    startFleetServer(other, {
      settings: several('c').replace(`shared_dir: ${shared}, `, `shared_dir: ${other}/s, `),
    })
  await assert.rejects(joinWithOther(), /ended with code 1/)
  await assert.rejects(joinWithOther(), /ended with code 1/, 'and not at the next start either')
  const told = /Cannot take over the state of this server.*that of another one, \{"from":"a"/
  assert.match(await readFile(join(other, 'server.log'), 'utf8'), told)
  assert.deepEqual((await allOf(publicUrl, admin))['tokens'], before['tokens'])

  // And back.
  await again[Symbol.asyncDispose]()
  await killed(b)
  await rename(join(directory, 'a', 'server', 'state-copy.sqlite'), join(shared, 'state.sqlite'))
  await rm(join(directory, 'a', 'server'), { recursive: true })
  await rename(shared, join(directory, 'a', 'server'))
  await start(t, 'a', '')
  assert.deepEqual(await allOf(publicUrl, admin), { ...before, pins: { pins: [] } })
})
