import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import type { GcStatus, HostList, ReleaseStatus, ServerInfo } from '../../lib/client/api.ts'
import { deployctlOk, fetchOn, startFleetAgent, writeRandomFile } from '../support/fleet.ts'
import type { OciClient } from '../support/oci.ts'
import { layerOf, ociClient, pushRelease, sha256Of } from '../support/oci.ts'
import type { SharedServers } from '../support/shared-servers.ts'
import { startSharedServers } from '../support/shared-servers.ts'
import { until } from '../support/until.ts'

let fleet: SharedServers
let a: OciClient
let b: OciClient

before(async () => {
  fleet = await startSharedServers(2, { registry: 'gc: { enabled: false, grace: 0s }' })
  const [first, second] = fleet.clients
  assert.ok(first && second)
  a = first
  b = second
})
after(() => fleet[Symbol.asyncDispose]())

test('servers that start for the first time at once have one set of keys, one epoch, and the same first tokens', async () => {
  const keys = await Promise.all(
    [a, b].map(async (client) => (await client.call('/.well-known/jwks.json')).json()),
  )
  assert.deepEqual(keys[0], keys[1])
  const infos = await Promise.all(
    [a, b].map(async (client) => (await (await client.call('/api/v1/server')).json()) as ServerInfo),
  )
  assert.equal(infos[0]?.epoch, infos[1]?.epoch)
  const tokens = (await (await a.call('/api/v1/tokens')).json()) as { tokens: unknown[] }
  assert.equal(tokens.tokens.length, 1)
  const bootstrap = (await (await b.call('/api/v1/bootstrap-tokens')).json()) as {
    bootstrapTokens: unknown[]
  }
  assert.equal(bootstrap.bootstrapTokens.length, 1)
})

test('an upload goes on at whatever server its next request reaches, and a server that was left behind cannot spoil it', async () => {
  const bytes = new Uint8Array(randomBytes(900_000))
  const digest = sha256Of(bytes)
  const started = await a.call('/v2/hop/blobs/uploads/?length=900000', { method: 'POST' })
  await started.arrayBuffer()
  const path = new URL(started.headers.get('location') ?? '', fleet.front.publicUrl).pathname
  const patch = async (client: OciClient, from: number, to: number) => {
    const response = await client.call(path, {
      method: 'PATCH',
      headers: { 'content-type': 'application/octet-stream', 'content-range': `${from}-${to - 1}` },
      body: bytes.slice(from, to),
    })
    await response.arrayBuffer()
    return response
  }
  assert.equal((await patch(a, 0, 300_000)).status, 202)
  assert.equal((await b.call(path)).headers.get('upload-offset'), '300000')
  assert.equal((await patch(b, 300_000, 500_000)).status, 202)
  const behind = await patch(a, 300_000, 400_000)
  assert.equal(behind.status, 416)
  assert.equal(behind.headers.get('upload-offset'), '500000')
  assert.equal((await patch(b, 500_000, 900_000)).status, 202)
  assert.equal(await a.statusOf(`${path}?digest=${digest}`, { method: 'PUT' }), 201)
  assert.equal(await b.statusOf(`${path}?digest=${digest}`, { method: 'PUT' }), 201, 'asked again elsewhere')
  for (const client of [a, b])
    assert.ok((await client.pullBlob('hop', digest))?.equals(Buffer.from(bytes)), 'the same bytes everywhere')
  // The same blob through both at once ends as one.
  const same = new Uint8Array(randomBytes(700_000))
  await Promise.all([a, b, a, b].map((client, i) => client.pushBlob(`twin${i % 3}`, same)))
  assert.ok((await a.pullBlob('twin0', sha256Of(same)))?.equals(Buffer.from(same)))
  assert.deepEqual(await readdir(join(fleet.shared, 'uploads')), [])
})

test('a build that was published by any server reaches agents, and every server says the same of them', async (t) => {
  const build = join(fleet.directory, 'build.tar')
  const sha256 = await writeRandomFile(build, 3_000_000)
  await deployctlOk(fleet.front, ['publish', build, 'web:1'])
  const agents = await Promise.all(
    ['h1', 'h2'].map((host) =>
      startFleetAgent(join(fleet.directory, host), fleet.front, {
        host,
        place: 'r1',
        extra: 'follow: [web:1]\n',
      }),
    ),
  )
  t.after(async () => {
    for (const agent of agents) {
      agent.process.kill('SIGKILL')
      await agent.exited
    }
  })
  for (const agent of agents) assert.ok((await fetchOn(agent, 'web:1')).seconds >= 0)
  assert.equal(sha256.length, 64)
  const statusAt = async (client: OciClient) =>
    (await (await client.call('/api/v1/releases/status?reference=web:1')).json()) as ReleaseStatus
  const statuses = await until('both know both hosts', async () => {
    const both = await Promise.all([statusAt(a), statusAt(b)])
    return both.every(({ fleet: its }) => its.held === 2) ? both : undefined
  })
  for (const status of statuses) {
    assert.equal(status.unheard, undefined)
    assert.deepEqual(
      status.hosts.map(({ host }) => host),
      ['h1', 'h2'],
    )
  }
  const hosts = (await (await b.call('/api/v1/hosts')).json()) as HostList
  assert.equal(hosts.hosts.filter(({ seenAt }) => seenAt !== undefined).length, 2)

  // Without Redis each says what it has heard, and that this is not all.
  fleet.redis.kill('SIGSTOP')
  const alone = await statusAt(a)
  fleet.redis.kill('SIGCONT')
  assert.deepEqual(alone.unheard, ['Redis'])

  await until(
    'the host is revoked',
    async () => (await a.statusOf('/api/v1/hosts/h1', { method: 'DELETE' })) === 204,
  )
  await until('both have lost the host', async () => {
    const both = await Promise.all([statusAt(a), statusAt(b)])
    return both.every((status) => status.hosts.every(({ host }) => host !== 'h1')) ? both : undefined
  })
})

test('what is revoked or rotated through one server counts at the others', async () => {
  const made = (await (
    await a.call('/api/v1/tokens', {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ name: 'ci', scopes: ['pull:*'] }),
    })
  ).json()) as { id: string; token: string }
  const [first, second] = fleet.servers
  assert.ok(first && second)
  const [ciA, ciB] = [ociClient(first.publicUrl, made.token), ociClient(second.publicUrl, made.token)]
  assert.equal(await ciB.statusOf('/v2/'), 200)
  assert.equal(await a.statusOf(`/api/v1/tokens/${made.id}`, { method: 'DELETE' }), 204)
  for (const client of [ciA, ciB])
    await until('the token is refused', async () => (await client.statusOf('/v2/')) === 401, {
      withinMs: 3000,
    })

  const rotated = (await (
    await a.call('/api/v1/keys/rotate', {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: '{"now":true}',
    })
  ).json()) as { kid: string; state: string }
  assert.equal(rotated.state, 'active')
  const flow = (await (await a.call('/v2/token?scope=repository:web:pull')).json()) as { token: string }
  assert.equal(await ociClient(second.publicUrl, flow.token).statusOf('/v2/web/tags/list'), 200, 'at once')
  const keysAt = async (client: OciClient) =>
    (
      (await (await client.call('/api/v1/keys')).json()) as { keys: { kid: string; state: string }[] }
    ).keys.map(({ kid, state }) => `${kid} ${state}`)
  await until(
    'both have the new key',
    async () => {
      const [atA, atB] = [await keysAt(a), await keysAt(b)]
      return atB.includes(`${rotated.kid} active`) && String(atA) === String(atB)
    },
    { withinMs: 5000 },
  )
})

test('two servers that both collect, without any grace, take nothing from pushes through either', async (t) => {
  const blobs = Array.from({ length: 24 }, (_, i) => new Uint8Array(randomBytes(i === 0 ? 300_000 : 500 + i)))
  const there = new Map<string, Uint8Array[]>()
  const outcomes = { stored: 0, refused: 0, collections: 0, gone: 0 }
  const startedAt = performance.now()
  const endsAt = startedAt + 4000
  const push = async (client: OciClient, number: number) => {
    for (let round = 0; performance.now() < endsAt; round++) {
      const repository = `race/${(number + round) % 2}`
      // A window that moves on: what it has left is collected, and pushed again when it comes by once more.
      const from = Math.floor((performance.now() - startedAt) / 250) * 3
      const mine = [0, 1].flatMap((i) => blobs[(from + ((number + round + i) % 5)) % blobs.length] ?? [])
      for (const bytes of mine)
        if ((await client.headBlob(repository, sha256Of(bytes))) !== 200)
          await client.pushBlob(repository, bytes)
      const tag = `t${number}`
      // Its own tag goes now and then, and with it what it named.
      if (round % 3 === 2) {
        there.delete(`${repository}:${tag}`)
        await client.deleteManifest(repository, tag)
      }
      const { status, code } = await client.putManifest(
        repository,
        { layers: mine.map(layerOf), annotations: { round: String(round), number: String(number) } },
        tag,
      )
      if (status === 201) {
        outcomes.stored++
        there.set(`${repository}:${tag}`, mine)
      } else {
        // Who is told that a blob is gone loses nothing.
        assert.equal(code, 'MANIFEST_BLOB_UNKNOWN')
        outcomes.refused++
      }
    }
  }
  const collect = async (client: OciClient) => {
    while (performance.now() < endsAt) {
      const response = await client.call('/api/v1/gc', {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: '{}',
      })
      const status = (await response.json()) as GcStatus
      if (response.status !== 200) await sleep(20)
      else {
        outcomes.collections++
        outcomes.gone += status.lastRun?.gone.links ?? 0
      }
    }
  }
  await Promise.all([push(a, 0), push(b, 1), push(a, 2), push(b, 3), collect(a), collect(b)])
  for (const [name, layers] of there) {
    const [repository = '', tag = ''] = name.split(':')
    for (const client of [a, b]) {
      assert.equal(await client.statusOf(`/v2/${repository}/manifests/${tag}`), 200, name)
      for (const bytes of layers)
        assert.ok((await client.pullBlob(repository, sha256Of(bytes)))?.equals(Buffer.from(bytes)), name)
    }
  }
  t.diagnostic(JSON.stringify(outcomes))
  assert.ok(outcomes.stored > 10 && outcomes.collections >= 2 && outcomes.gone > 0, JSON.stringify(outcomes))
})

test('each server has an audit log of its own, and deployctl shows and checks all of them', async () => {
  await pushRelease(a, 'told', 'from-a')
  await pushRelease(b, 'told', 'from-b')
  const lines = (await deployctlOk(fleet.front, ['audit', '--json']))
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as { time: string; target: string })
  const targets = lines.map(({ target }) => target)
  assert.ok(
    targets.includes('told:from-a') && targets.indexOf('told:from-b') > targets.indexOf('told:from-a'),
  )
  assert.deepEqual(
    lines.map(({ time }) => time),
    lines.map(({ time }) => time).sort(),
  )
  const verified = await deployctlOk(fleet.front, ['audit', '--verify', '--json'])
  assert.deepEqual(
    verified
      .trim()
      .split('\n')
      .map((line) => (JSON.parse(line) as { server: string }).server),
    ['server-0', 'server-1'],
  )
})
