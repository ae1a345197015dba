import assert from 'node:assert/strict'
import { once } from 'node:events'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import type { IncomingMessage } from 'node:http'
import { request as httpRequest } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { createAgentClient } from '../../lib/client/agent-client.ts'
import type { Digest } from '../../lib/protocol/digest.ts'
import { digestOf } from '../../lib/protocol/digest.ts'
import type { DockerRegistry } from '../support/docker-registry.ts'
import { pushImage, pushIndex, pushReferrer, startDockerRegistry } from '../support/docker-registry.ts'
import type { FleetServer } from '../support/fleet.ts'
import { deployctlOk, fetchOn, startFleetAgent, startFleetServer } from '../support/fleet.ts'
import { freePort } from '../support/foreign.ts'
import type { RegistryFront } from '../support/registry-front.ts'
import { startHttp, startRegistryFront, wantTokens } from '../support/registry-front.ts'
import { until } from '../support/until.ts'
import { skopeoCopy, writeAuthFile, writeImage } from './oci-image.ts'

const follow = 'follow: ["team/app:1"]\nfollow_jitter: 100ms\n'
const eventsType = 'application/vnd.docker.distribution.events.v1+json'
const manifestType = 'application/vnd.oci.image.manifest.v1+json'

test('what skopeo pushes to docker-registry is pulled here, and an agent that follows the tag gets it', async (t) => {
  const port = await freePort()
  const { server, directory, admin } = await startedServer(t, { upstream: `http://127.0.0.1:${port}` })
  const agent = await startFleetAgent(join(directory, 'a1'), server, {
    host: 'a1',
    place: 'a',
    extra: follow,
  })
  t.after(() => agent[Symbol.asyncDispose]())
  const registry = await startDockerRegistry(join(directory, 'upstream'), {
    port,
    notify: {
      url: `${server.publicUrl}/registry/notifications`,
      token: await makeToken(server, admin, ['publish:team/*']),
    },
  })
  t.after(() => registry[Symbol.asyncDispose]())
  const image = join(directory, 'image')
  const layer = await writeImage(image)
  const authFile = join(directory, 'auth.json')
  await writeAuthFile(authFile, server.publicUrl, admin)
  await skopeoCopy(
    authFile,
    '--dest-tls-verify=false',
    `oci:${image}:1`,
    `docker://${registry.host}/team/app:1`,
  )
  const path = await heldBy(agent.socketPath, 'team/app:1')
  const bytes = await readFile(join(path, layer))
  assert.equal(digestOf(bytes), `sha256:${layer}`)

  // As any release: it has a torrent, and docker's clients pull it from here.
  const torrent = await get(server, admin, `/v2/team/app/blobs/sha256:${layer}`, {
    accept: 'application/x-bittorrent',
  })
  assert.equal(torrent.headers.get('content-type'), 'application/x-bittorrent')
  const copied = join(directory, 'copied')
  const source = `docker://${new URL(server.publicUrl).host}/team/app:1`
  await skopeoCopy(authFile, '--src-tls-verify=false', source, `oci:${copied}:1`)
  assert.ok(bytes.equals(await readFile(join(copied, 'blobs', 'sha256', layer))))
})

test('a blob that is not here streams through, once for all who ask, and is stored with its torrent', async (t) => {
  const { server, admin, front, registry } = await startedAll(t)
  const image = await pushImage(registry.url, 'team/app', { tag: '1', sizeBytes: 9_000_000 })
  const manifest = await get(server, admin, '/v2/team/app/manifests/1')
  assert.equal(manifest.headers.get('docker-content-digest'), image.digest)
  assert.equal(manifest.headers.get('content-type'), manifestType)
  const path = `/v2/team/app/blobs/${image.layer}`
  const head = await get(server, admin, path, {}, 'HEAD')
  assert.equal(head.headers.get('content-length'), '9000000')

  // The upstream stands still in the middle: what has come so far is given to everyone.
  const goOn = Promise.withResolvers<undefined>()
  front.intercept = (request, response) => {
    if (request.url !== path || request.method !== 'GET') return false
    response.writeHead(200, { 'content-length': '9000000' })
    response.write(image.layerBytes.subarray(0, 6_000_000))
    void goOn.promise.then(() => response.end(image.layerBytes.subarray(6_000_000)))
    return true
  }
  const first = await openGet(server, admin, path)
  const early = await readUntil(first, 3_000_000)
  assert.ok(early.equals(image.layerBytes.subarray(0, early.length)))
  const others = Array.from({ length: 8 }, async (_, i) => {
    const response = await get(server, admin, path, i % 2 === 0 ? {} : { range: 'bytes=5000000-7000000' })
    assert.equal(response.status, i % 2 === 0 ? 200 : 206)
    return Buffer.from(await response.arrayBuffer())
  })
  await sleep(100)
  goOn.resolve(undefined)
  const rest = Buffer.concat((await first.toArray()) as Buffer[])
  assert.ok(Buffer.concat([early, rest]).equals(image.layerBytes))
  for (const [i, bytes] of (await Promise.all(others)).entries())
    assert.ok(bytes.equals(i % 2 === 0 ? image.layerBytes : image.layerBytes.subarray(5_000_000, 7_000_001)))
  assert.equal(fetches(front, path), 1)
  front.intercept = () => false
  const torrent = await get(server, admin, path, { accept: 'application/x-bittorrent' })
  assert.equal(torrent.status, 200)
  assert.equal(fetches(front, path), 1)
})

test('a connection to the upstream that breaks in the middle of a blob goes on where it broke', async (t) => {
  const { server, admin, front, registry } = await startedAll(t)
  const image = await pushImage(registry.url, 'team/app', { tag: '1', sizeBytes: 5_000_000 })
  const path = `/v2/team/app/blobs/${image.layer}`
  let cut = false
  front.intercept = (request, response) => {
    if (request.url !== path || cut) return false
    cut = true
    response.writeHead(200, { 'content-length': '5000000' })
    response.write(image.layerBytes.subarray(0, 2_500_000), () => setTimeout(() => response.destroy(), 100))
    return true
  }
  const response = await get(server, admin, path)
  assert.ok(Buffer.from(await response.arrayBuffer()).equals(image.layerBytes))
  assert.equal(fetches(front, path), 2)
})

test('a tag that moves upstream moves here when its time is over, and other tags of this server are left alone', async (t) => {
  const { server, admin, front, registry } = await startedAll(t, { settings: 'tag_ttl: 3s' })
  const first = await pushImage(registry.url, 'team/app', { tag: '1' })
  const tag = async () =>
    (await get(server, admin, '/v2/team/app/manifests/1')).headers.get('docker-content-digest')
  assert.equal(await tag(), first.digest)
  const asked = front.seen.length
  await Promise.all(Array.from({ length: 20 }, tag))
  assert.equal(front.seen.length, asked, 'a fresh tag is not asked about')
  const second = await pushImage(registry.url, 'team/app', { tag: '1' })
  await until('the tag has moved', async () => (await tag()) === second.digest)
  const audit = await deployctlOk(server, ['audit', '--json'])
  const moves = [...audit.matchAll(/"kind":"upstream".*"tag.move".*/g)].map(([line]) => line)
  assert.equal(moves.length, 2, audit)
  assert.match(
    moves[1] ?? '',
    new RegExp(`"target":"team/app:1".*"${second.digest}".*"was":"${first.digest}"`),
  )

  // Pushed here: it is not the upstream's to move.
  const bytes = await (await get(server, admin, `/v2/team/app/manifests/${second.digest}`)).text()
  for (const blob of [second.config, second.layer])
    await (await get(server, admin, `/v2/team/app/blobs/${blob}`)).arrayBuffer()
  const pushed = await fetch(`${server.publicUrl}/v2/team/app/manifests/ours`, {
    method: 'PUT',
    headers: { authorization: `Bearer ${admin}`, 'content-type': manifestType },
    body: bytes,
  })
  assert.equal(pushed.status, 201)
  await pushImage(registry.url, 'team/app', { tag: 'ours' })
  const ours = await get(server, admin, '/v2/team/app/manifests/ours')
  assert.equal(ours.headers.get('docker-content-digest'), second.digest)
})

test('what the upstream does not have is 404, and what no upstream has is not asked for', async (t) => {
  const { server, admin, front } = await startedAll(t)
  const none = `sha256:${'0'.repeat(64)}`
  for (const path of ['team/app/manifests/none', `team/app/manifests/${none}`, `team/app/blobs/${none}`]) {
    const response = await get(server, admin, `/v2/${path}`)
    assert.equal(response.status, 404, path)
    assert.match(await response.text(), /_UNKNOWN/)
  }
  const asked = front.seen.length
  assert.equal((await get(server, admin, '/v2/other/app/manifests/1')).status, 404)
  assert.equal(front.seen.length, asked)
})

test('while the upstream is down what is here is served, with a warning, and the rest is 503 with words', async (t) => {
  const { server, admin, registry, upstreamDirectory } = await startedAll(t, { settings: 'tag_ttl: 100ms' })
  const image = await pushImage(registry.url, 'team/app', { tag: '1' })
  const layer = `/v2/team/app/blobs/${image.layer}`
  await (await get(server, admin, '/v2/team/app/manifests/1')).text()
  await (await get(server, admin, layer)).arrayBuffer()
  await registry[Symbol.asyncDispose]()
  await until(
    'the old manifest comes with a warning',
    async () =>
      (await get(server, admin, '/v2/team/app/manifests/1')).headers.get('warning') ===
      '299 - "The upstream is down: this is what the tag was when it was last asked."',
  )
  const held = await get(server, admin, layer)
  assert.ok(Buffer.from(await held.arrayBuffer()).equals(image.layerBytes))
  for (const path of ['manifests/2', `blobs/${image.config}`]) {
    const response = await get(server, admin, `/v2/team/app/${path}`)
    assert.equal(response.status, 503, path)
    assert.match(await response.text(), /Cannot pull .* from corp/)
  }
  assert.match(await metrics(server), /rackswarm_upstream_stale_total\{upstream="corp"\} [1-9]/)

  await using again = await startDockerRegistry(upstreamDirectory, {
    port: Number(new URL(registry.url).port),
  })
  assert.ok(again.url)
  await until(
    'the blob is there',
    async () => (await get(server, admin, `/v2/team/app/blobs/${image.config}`)).status === 200,
    { withinMs: 15_000 },
  )
})

test('a push into a repository of an upstream goes well, whether that is up or down', async (t) => {
  const { server, admin, front, registry, directory } = await startedAll(t)
  const image = join(directory, 'image')
  const layer = await writeImage(image)
  const authFile = join(directory, 'auth.json')
  await writeAuthFile(authFile, server.publicUrl, admin)
  const upstream = `docker://${registry.host}/team/app:1`
  await skopeoCopy(authFile, '--dest-tls-verify=false', `oci:${image}:1`, upstream)
  const push = (tag: string) =>
    skopeoCopy(
      authFile,
      '--dest-tls-verify=false',
      `oci:${image}:1`,
      `docker://${new URL(server.publicUrl).host}/team/app:${tag}`,
    )
  // What the upstream has is not pushed again: it comes from there.
  await push('up')
  assert.equal(fetches(front, `/v2/team/app/blobs/sha256:${layer}`), 1)
  await rm(image, { recursive: true })
  const other = await writeImage(image)
  await registry[Symbol.asyncDispose]()
  await push('down')
  const found = await get(server, admin, `/v2/team/app/blobs/sha256:${other}`)
  assert.equal(found.status, 200)
})

test('other bytes than were asked for are refused, not stored, and never given whole', async (t) => {
  const { server, admin, front, registry } = await startedAll(t)
  const small = await pushImage(registry.url, 'team/app', { tag: '1', sizeBytes: 300_000 })
  const large = await pushImage(registry.url, 'team/app', { tag: '2', sizeBytes: 5_000_000 })
  front.rewrite = (path, bytes) => {
    if (!path.includes('/blobs/') && !path.includes('/manifests/')) return bytes
    const wrong = Buffer.from(bytes)
    const at = wrong.length - 10
    wrong[at] = (wrong[at] ?? 0) ^ 1
    return wrong
  }
  const refused = await get(server, admin, `/v2/team/app/blobs/${small.layer}`)
  assert.equal(refused.status, 502)
  assert.match(await refused.text(), /other bytes/)
  const cut = await get(server, admin, `/v2/team/app/blobs/${large.layer}`)
  assert.equal(cut.status, 200)
  await assert.rejects(cut.arrayBuffer())
  for (const reference of ['1', small.digest]) {
    const manifest = await get(server, admin, `/v2/team/app/manifests/${reference}`)
    assert.equal(manifest.status, 502)
    assert.match(await manifest.text(), /the bytes of the manifest have sha256/)
  }
  front.rewrite = undefined
  for (const { layer, layerBytes } of [small, large]) {
    const before = fetches(front, `/v2/team/app/blobs/${layer}`)
    const right = await get(server, admin, `/v2/team/app/blobs/${layer}`)
    assert.ok(Buffer.from(await right.arrayBuffer()).equals(layerBytes))
    assert.equal(fetches(front, `/v2/team/app/blobs/${layer}`), before + 1, 'nothing of it was stored')
  }
})

test('the token flow: the password goes to the server of tokens alone, the token to the upstream alone', async (t) => {
  const credential = { user: 'puller', password: 'a:b secret' }
  const { server, admin, front, registry } = await startedAll(t, { credential })
  const image = await pushImage(registry.url, 'team/app', { tag: '1' })
  const { asked } = await wantTokens(t, front, credential)
  const storage: { authorization: string | undefined }[] = []
  const { url } = await startHttp(t, (request, response) => {
    storage.push({ authorization: request.headers.authorization })
    response.setHeader('content-length', String(image.layerBytes.length))
    response.end(image.layerBytes)
  })
  const passed = front.intercept
  let redirected = false
  front.intercept = (request, response) => {
    if (passed(request, response)) return true
    if (request.url !== `/v2/team/app/blobs/${image.layer}`) return false
    redirected = true
    response.writeHead(307, { location: `${url}/signed?signature=1` }).end()
    return true
  }
  const manifest = await get(server, admin, '/v2/team/app/manifests/1')
  assert.equal(manifest.headers.get('docker-content-digest'), image.digest)
  const layer = await get(server, admin, `/v2/team/app/blobs/${image.layer}`)
  assert.ok(Buffer.from(await layer.arrayBuffer()).equals(image.layerBytes))
  assert.ok(redirected)
  assert.deepEqual(storage, [{ authorization: undefined }])
  const basic = `Basic ${Buffer.from('puller:a:b secret').toString('base64')}`
  assert.deepEqual(asked, [
    { scope: 'repository:team/app:pull', service: 'registry.test', authorization: basic },
  ])
  assert.ok(front.seen.every(({ authorization }) => !(authorization?.startsWith('Basic') ?? false)))
})

test('a credential that the upstream refuses is told as that', async (t) => {
  const { server, admin, front, registry } = await startedAll(t, {
    credential: { user: 'puller', password: 'wrong' },
  })
  await pushImage(registry.url, 'team/app', { tag: '1' })
  await wantTokens(t, front, { user: 'puller', password: 'right' })
  const response = await get(server, admin, '/v2/team/app/manifests/1')
  assert.equal(response.status, 502)
  assert.match(await response.text(), /gives no token: it answered 401/)
})

test('an upstream may send us to no address of this machine or its link, and an event to none at all', async (t) => {
  const requests: string[] = []
  const victim = await startHttp(t, (request, response) => {
    requests.push(request.url ?? '')
    response.end('secret')
  })
  const { server, admin, front, registry } = await startedAll(t)
  const image = await pushImage(registry.url, 'team/app', { tag: '1' })
  front.intercept = (request, response) => {
    if (!(request.url ?? '').includes('/blobs/')) return false
    response.writeHead(307, { location: 'http://169.254.169.254/latest/meta-data' }).end()
    return true
  }
  const blob = await get(server, admin, `/v2/team/app/blobs/${image.layer}`)
  assert.equal(blob.status, 502)
  assert.match(await blob.text(), /leads to 169\.254\.169\.254/)
  front.intercept = () => false
  const event = pushEvent('e1', 'team/app', image.digest, '1')
  event.events[0].target.url = `${victim.url}/v2/team/app/manifests/1`
  assert.equal((await notify(server, admin, event)).status, 202)
  await until(
    'the image is here',
    async () => (await tagHere(server, admin, 'team/app', '1')) === image.digest,
  )
  assert.deepEqual(requests, [])
})

test('the same event, sent again and replayed later, is pulled once; who may not publish may not send any', async (t) => {
  const { server, admin, front, registry } = await startedAll(t)
  const image = await pushImage(registry.url, 'team/app', { tag: '1' })
  const event = pushEvent('e1', 'team/app', image.digest, '1')
  const answers = await Promise.all([1, 2, 3].map(async () => (await notify(server, admin, event)).json()))
  const counts = answers as { accepted: number; duplicates: number }[]
  assert.deepEqual(
    [
      counts.reduce((sum, { accepted }) => sum + accepted, 0),
      counts.reduce((sum, { duplicates }) => sum + duplicates, 0),
    ],
    [1, 2],
  )
  await until(
    'the image is here',
    async () => (await tagHere(server, admin, 'team/app', '1')) === image.digest,
  )
  const asked = front.seen.length
  assert.deepEqual(await (await notify(server, admin, event)).json(), {
    accepted: 0,
    duplicates: 1,
    ignored: [],
  })
  await sleep(300)
  assert.equal(front.seen.length, asked)

  const elsewhere = pushEvent('e2', 'nobody/knows', image.digest, '1')
  const ignored = (await (await notify(server, admin, elsewhere)).json()) as { ignored: { reason: string }[] }
  assert.match(ignored.ignored[0]?.reason ?? '', /no upstream/)
  const puller = await makeToken(server, admin, ['pull:*'])
  assert.equal((await notify(server, puller, event)).status, 403)
  assert.equal((await notify(server, undefined, event)).status, 401)
  assert.equal((await notify(server, admin, { events: 1 })).status, 400)
  const version2 = await fetch(`${server.publicUrl}/registry/notifications`, {
    method: 'POST',
    headers: {
      'content-type': 'application/vnd.docker.distribution.events.v2+json',
      authorization: `Bearer ${admin}`,
    },
    body: JSON.stringify(event),
  })
  assert.deepEqual(await version2.json(), { accepted: 0, duplicates: 1, ignored: [] })
  assert.equal((await fetch(`${server.publicUrl}/health`)).status, 200)
})

test('an event that comes before the manifest can be seen waits for it; one that comes late takes what the tag is now', async (t) => {
  const { server, admin, front, registry } = await startedAll(t)
  const image = await pushImage(registry.url, 'team/app', { tag: '1' })
  let hidden = 3
  front.intercept = (request, response) => {
    if (!(request.url ?? '').includes('/manifests/') || hidden-- <= 0) return false
    response.writeHead(404).end()
    return true
  }
  await notify(server, admin, pushEvent('e1', 'team/app', image.digest, '1'))
  await until(
    'the image is here',
    async () => (await tagHere(server, admin, 'team/app', '1')) === image.digest,
  )

  const newer = await pushImage(registry.url, 'team/app', { tag: '1' })
  await notify(server, admin, pushEvent('e2', 'team/app', image.digest, '1'))
  await until(
    'the newer image is here',
    async () => (await tagHere(server, admin, 'team/app', '1')) === newer.digest,
  )
})

test('an index comes with its platforms, and a tag appears only when all of it is here', async (t) => {
  const { server, admin, front, registry } = await startedAll(t)
  const images = [await pushImage(registry.url, 'team/app'), await pushImage(registry.url, 'team/app')]
  const index = await pushIndex(registry.url, 'team/app', '1', images)
  const last = images[1]?.layer ?? ''
  const release = Promise.withResolvers<undefined>()
  front.intercept = (request, response) => {
    if (request.method !== 'GET' || !(request.url ?? '').endsWith(last)) return false
    void release.promise.then(() => response.end(images[1]?.layerBytes))
    return true
  }
  await notify(server, admin, pushEvent('e1', 'team/app', index, '1'))
  await until('the last blob is fetched', () => fetches(front, `/v2/team/app/blobs/${last}`) === 1)
  assert.equal(await tagHere(server, admin, 'team/app', '1'), undefined)
  release.resolve(undefined)
  await until('the index is here', async () => (await tagHere(server, admin, 'team/app', '1')) === index)
  await registry[Symbol.asyncDispose]()
  front.intercept = (_, response) => {
    response.destroy()
    return true
  }
  for (const { digest, config, layer } of images)
    for (const path of [`manifests/${digest}`, `blobs/${config}`, `blobs/${layer}`])
      assert.equal((await get(server, admin, `/v2/team/app/${path}`)).status, 200, path)
})

test('what refers to a manifest comes with it, and when somebody lists it', async (t) => {
  const { server, admin, front, registry } = await startedAll(t)
  const image = await pushImage(registry.url, 'team/app', { tag: '1' })
  const signature = await pushReferrer(registry.url, 'team/app', image.digest)
  await notify(server, admin, pushEvent('e1', 'team/app', image.digest, '1'))
  await until(
    'the image is here',
    async () => (await tagHere(server, admin, 'team/app', '1')) === image.digest,
  )
  const other = await pushImage(registry.url, 'team/app', { tag: '2' })
  const late = await pushReferrer(registry.url, 'team/app', other.digest)
  const type = 'application/vnd.test.signature'
  const referrersOf = async (digest: Digest) => {
    const response = await get(server, admin, `/v2/team/app/referrers/${digest}`)
    const { manifests } = (await response.json()) as { manifests: { digest: string; artifactType: string }[] }
    // The server lists torrents of the layers too.
    return manifests
      .filter(({ artifactType }) => artifactType === type)
      .map((each) => [each.digest, each.artifactType])
  }
  assert.deepEqual(await referrersOf(other.digest), [[late, type]])
  await registry[Symbol.asyncDispose]()
  front.intercept = (_, response) => {
    response.destroy()
    return true
  }
  assert.deepEqual(await referrersOf(image.digest), [[signature, type]])
})

test('kill -9 of the server between the 202 and the pull: it is done after the next start', async (t) => {
  const { server, admin, front, registry, directory, settings } = await startedAll(t)
  const image = await pushImage(registry.url, 'team/app', { tag: '1' })
  front.intercept = (request) => (request.url ?? '').includes('/v2/')
  assert.equal((await notify(server, admin, pushEvent('e1', 'team/app', image.digest, '1'))).status, 202)
  server.process.kill('SIGKILL')
  await server.exited
  front.intercept = () => false
  await using again = await startFleetServer(directory, {
    settings,
    http: `addr: 127.0.0.1:${new URL(server.publicUrl).port}`,
  })
  await until(
    'the image is here',
    async () => (await tagHere(again, admin, 'team/app', '1')) === image.digest,
  )
  const layer = await get(again, admin, `/v2/team/app/blobs/${image.layer}`)
  assert.ok(Buffer.from(await layer.arrayBuffer()).equals(image.layerBytes))
  const repeated = await notify(again, admin, pushEvent('e1', 'team/app', image.digest, '1'))
  assert.deepEqual(await repeated.json(), { accepted: 0, duplicates: 1, ignored: [] })
})

test("Harbor's Kraken driver: capitalised keys, application/json, basic authentication", async (t) => {
  const { server, admin, registry } = await startedAll(t)
  const image = await pushImage(registry.url, 'team/app', { tag: '1' })
  const response = await fetch(`${server.publicUrl}/registry/notifications`, {
    method: 'POST',
    headers: {
      'content-type': 'application/json',
      authorization: `Basic ${Buffer.from(`harbor:${admin}`).toString('base64')}`,
    },
    body: JSON.stringify({
      Events: [
        {
          Id: 'h1',
          TimeStamp: '2026-11-23T10:00:00Z',
          Action: 'push',
          Target: {
            MediaType: 'application/vnd.docker.distribution.manifest.v2+json',
            Digest: image.digest,
            Repository: 'team/app',
            Url: 'http://169.254.169.254/',
            Tag: '1',
          },
          Request: null,
          Actor: null,
        },
      ],
    }),
  })
  assert.equal(response.status, 202)
  await until(
    'the image is here',
    async () => (await tagHere(server, admin, 'team/app', '1')) === image.digest,
  )
})

test("Harbor's Dragonfly driver: a job pulls with its own credential and says which hosts have the image", async (t) => {
  const { server, admin, front, registry, directory } = await startedAll(t)
  const agent = await startFleetAgent(join(directory, 'a1'), server, {
    host: 'a1',
    place: 'a',
    extra: follow,
  })
  t.after(() => agent[Symbol.asyncDispose]())
  const image = await pushImage(registry.url, 'team/app', { tag: '1' })
  const held = Promise.withResolvers<undefined>()
  front.intercept = (request, response) => {
    if (request.headers.authorization === 'Bearer of-the-job') {
      if (!(request.url ?? '').endsWith(image.layer)) return false
      void held.promise.then(() => response.end(image.layerBytes))
      return true
    }
    response.writeHead(401).end()
    return true
  }
  const job = (url: string, token: string | undefined = admin) =>
    fetch(`${server.publicUrl}/oapi/v1/jobs`, {
      method: 'POST',
      headers: {
        'content-type': 'application/json',
        ...(token === '' ? {} : { authorization: `Bearer ${token}` }),
      },
      body: JSON.stringify({
        type: 'preheat',
        args: {
          type: 'image',
          url,
          headers: { Authorization: 'Bearer of-the-job' },
          scope: 'all_peers',
          tag: '',
          timeout: 1800000000000,
        },
        scheduler_cluster_ids: [1],
      }),
    })
  assert.equal((await fetch(`${server.publicUrl}/healthy`)).status, 200)
  const url = `${front.url}/v2/team/app/manifests/1`
  assert.equal((await job(url, '')).status, 401)
  const wrong = await job('https://other.example/v2/team/app/manifests/1')
  assert.equal(wrong.status, 400)
  assert.match(await wrong.text(), new RegExp(front.host))
  const created = (await (await job(url)).json()) as Job
  assert.equal(created.state, 'PENDING')
  assert.equal(typeof created.id, 'number')
  const ask = async () => (await (await get(server, admin, `/oapi/v1/jobs/${created.id}`)).json()) as Job
  await until('the layer is fetched', () => fetches(front, `/v2/team/app/blobs/${image.layer}`) === 1)
  assert.equal((await ask()).state, 'PENDING')
  held.resolve(undefined)
  await until('the job succeeds', async () => (await ask()).state === 'SUCCESS', { withinMs: 30_000 })
  const [result] = (await ask()).result.job_states[0]?.results ?? []
  assert.deepEqual(result?.success_tasks, [{ url, hostname: 'a1', ip: '127.0.0.1' }])
  const text = await (await get(server, admin, `/oapi/v1/jobs/${created.id}`)).text()
  assert.ok(!text.includes('of-the-job'))
  const files = await readFile(join(server.dataDirectory, 'state.sqlite-wal')).catch(() => Buffer.alloc(0))
  assert.ok(!files.includes('of-the-job'), 'the credential of a job is on no disk')
})

test('a job whose credential is refused has failed, and says why', async (t) => {
  const { server, admin, front, registry } = await startedAll(t)
  await pushImage(registry.url, 'team/app', { tag: '1' })
  await wantTokens(t, front, { user: 'nobody', password: 'knows' })
  const created = await fetch(`${server.publicUrl}/oapi/v1/jobs`, {
    method: 'POST',
    headers: { authorization: `Bearer ${admin}`, 'content-type': 'application/json' },
    body: JSON.stringify({
      type: 'preheat',
      args: { url: `${front.url}/v2/team/app/manifests/1`, headers: { authorization: 'Bearer expired' } },
    }),
  })
  const { id } = (await created.json()) as Job
  const ask = async () => (await (await get(server, admin, `/oapi/v1/jobs/${id}`)).json()) as Job
  await until('the job fails', async () => (await ask()).state === 'FAILURE')
  assert.match((await ask()).result.job_states[0]?.error ?? '', /refuses the credential/)
})

test('a server that is told to end does so in the middle of a pull, and goes on with it when it starts again', async (t) => {
  const { server, admin, front, registry, directory, settings } = await startedAll(t)
  const image = await pushImage(registry.url, 'team/app', { tag: '1', sizeBytes: 5_000_000 })
  const path = `/v2/team/app/blobs/${image.layer}`
  front.intercept = (request, response) => {
    if (request.url !== path) return false
    response.writeHead(200, { 'content-length': '5000000' })
    response.write(image.layerBytes.subarray(0, 3_000_000))
    return true
  }
  await notify(server, admin, pushEvent('e1', 'team/app', image.digest, '1'))
  await until('the blob is fetched', () => fetches(front, path) === 1)
  server.process.kill('SIGTERM')
  assert.equal(await server.exited, 0)
  front.intercept = () => false
  await using again = await startFleetServer(directory, {
    settings,
    http: `addr: 127.0.0.1:${new URL(server.publicUrl).port}`,
  })
  await until(
    'the image is here',
    async () => (await tagHere(again, admin, 'team/app', '1')) === image.digest,
  )
})

test('a blob beyond the largest is refused, whether its length was said or not', async (t) => {
  const { server, admin, front, registry } = await startedAll(t, { settings: 'blob_max: 1MiB' })
  const image = await pushImage(registry.url, 'team/app', { tag: '1', sizeBytes: 3_000_000 })
  const path = `/v2/team/app/blobs/${image.layer}`
  for (const said of [true, false]) {
    front.intercept = (request, response) => {
      if (said || request.url !== path) return false
      response.writeHead(200)
      response.write(image.layerBytes)
      response.end()
      return true
    }
    const response = await get(server, admin, path)
    assert.equal(response.status, 502)
    assert.match(await response.text(), /larger than 1048576 bytes/)
  }
})

test('jobs and events without a credential are taken only where the configuration says so', async (t) => {
  const { server, admin, registry } = await startedAll(t, { settings: 'anonymous_notifications: true' })
  const image = await pushImage(registry.url, 'team/app', { tag: '1' })
  const answer = await notify(server, undefined, pushEvent('e1', 'team/app', image.digest, '1'))
  assert.equal(answer.status, 202)
  await until(
    'the image is here',
    async () => (await tagHere(server, admin, 'team/app', '1')) === image.digest,
  )
})

test('reconciling finds what no notification told of', async (t) => {
  const { server, admin, front, registry } = await startedAll(t, {
    settings: 'reconcile_interval: 300ms',
  })
  const first = await pushImage(registry.url, 'team/app', { tag: '1' })
  const other = await pushImage(registry.url, 'team/deep/er', { tag: 'x' })
  await until(
    'the first image is here',
    async () => (await tagHere(server, admin, 'team/app', '1')) === first.digest,
  )
  await until(
    'the other image is here',
    async () => (await tagHere(server, admin, 'team/deep/er', 'x')) === other.digest,
  )
  // The upstream gives one tag a page.
  front.intercept = (request, response) => {
    const url = new URL(request.url ?? '', front.url)
    if (!url.pathname.endsWith('/tags/list') || url.searchParams.get('n') === '1') return false
    response.setHeader('link', `<${url.pathname}?n=1>; rel="next"`)
    response.end(JSON.stringify({ name: 'x', tags: ['gone'] }))
    return true
  }
  const second = await pushImage(registry.url, 'team/app', { tag: '1' })
  await until(
    'the second image is here',
    async () => (await tagHere(server, admin, 'team/app', '1')) === second.digest,
  )
})

test('an agent fetches a tag that nobody has pulled yet: its blobs come when it asks for them', async (t) => {
  const { server, admin, registry, directory } = await startedAll(t)
  const image = await pushImage(registry.url, 'team/app', { tag: '1', sizeBytes: 3_000_000 })
  const agent = await startFleetAgent(join(directory, 'a1'), server, { host: 'a1', place: 'a' })
  t.after(() => agent[Symbol.asyncDispose]())
  const { held } = await fetchOn(agent, 'team/app:1')
  assert.equal(held.state, 'held')
  assert.equal(held.digest, image.digest)
  assert.equal(await tagHere(server, admin, 'team/app', '1'), image.digest)
})

test('a credential that others can read, or that is none, is a fault of the configuration', async (t) => {
  const directory = await temporaryDirectory(t)
  const file = join(directory, 'credential')
  const settings = `registry: { upstreams: [{ name: corp, url: "http://127.0.0.1:5000", repositories: ["*"], credential_file: ${file} }] }\n`
  for (const [content, mode, words] of [
    ['no colon', 0o600, /registry\.upstreams\.0\.credential_file: need one line/],
    ['user:password', 0o644, /registry\.upstreams\.0\.credential_file: .*others can read it/],
  ] as const) {
    await rm(file, { force: true })
    await writeFile(file, `${content}\n`, { mode })
    await assert.rejects(startFleetServer(directory, { settings }), /ended with code 78/)
    assert.match(await readFile(join(directory, 'server.log'), 'utf8'), words)
  }
})

interface Job {
  readonly id: number
  readonly state: string
  readonly result: {
    readonly job_states: readonly {
      readonly error: string
      readonly results: readonly { readonly success_tasks: readonly object[] }[]
    }[]
  }
}

async function temporaryDirectory(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-upstreams-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return directory
}

async function startedServer(
  t: TestContext,
  {
    upstream,
    settings = '',
    credential,
  }: { upstream: string; settings?: string; credential?: { user: string; password: string } },
) {
  const directory = await temporaryDirectory(t)
  const file = join(directory, 'upstream-credential')
  if (credential) await writeFile(file, `${credential.user}:${credential.password}\n`, { mode: 0o600 })
  const registry = `registry:
  upstreams:
    - { name: corp, url: "${upstream}", repositories: ["team/*"]${credential ? `, credential_file: ${file}` : ''} }
  ${settings}
`
  const server = await startFleetServer(directory, { settings: registry })
  t.after(() => server[Symbol.asyncDispose]())
  const admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
  return { server, directory, admin, settings: registry }
}

/** docker-registry, a front before it, and a server whose upstream that is. */
async function startedAll(
  t: TestContext,
  options: { settings?: string; credential?: { user: string; password: string } } = {},
) {
  const upstreamDirectory = await temporaryDirectory(t)
  const registry: DockerRegistry = await startDockerRegistry(upstreamDirectory, { port: await freePort() })
  t.after(() => registry[Symbol.asyncDispose]())
  const front = await startRegistryFront(t, registry.url)
  const started = await startedServer(t, { upstream: front.url, ...options })
  return { ...started, registry, front, upstreamDirectory }
}

async function makeToken(server: FleetServer, admin: string, scopes: readonly string[]): Promise<string> {
  const response = await fetch(`${server.publicUrl}/api/v1/tokens`, {
    method: 'POST',
    headers: { authorization: `Bearer ${admin}`, 'content-type': 'application/json' },
    body: JSON.stringify({ name: 'sender', scopes }),
  })
  assert.equal(response.status, 201)
  return ((await response.json()) as { token: string }).token
}

async function get(
  server: FleetServer,
  token: string,
  path: string,
  headers: Record<string, string> = {},
  method = 'GET',
): Promise<Response> {
  return fetch(`${server.publicUrl}${path}`, {
    method,
    headers: { authorization: `Bearer ${token}`, ...headers },
  })
}

/** A GET whose body can be read little by little. */
async function openGet(server: FleetServer, token: string, path: string): Promise<IncomingMessage> {
  const request = httpRequest(`${server.publicUrl}${path}`, { headers: { authorization: `Bearer ${token}` } })
  request.end()
  const [response] = (await once(request, 'response')) as [IncomingMessage]
  assert.equal(response.statusCode, 200)
  return response
}

async function readUntil(response: IncomingMessage, sizeBytes: number): Promise<Buffer> {
  const parts: Buffer[] = []
  let total = 0
  for await (const part of response.iterator({ destroyOnReturn: false }) as AsyncIterable<Buffer>) {
    parts.push(part)
    total += part.length
    if (total >= sizeBytes) break
  }
  return Buffer.concat(parts)
}

/** What a tag is in the store, without asking upstream: as agents that follow it see it. */
async function tagHere(
  server: FleetServer,
  token: string,
  repository: string,
  tag: string,
): Promise<string | undefined> {
  const response = await get(server, token, `/api/v1/releases?repository=${repository}`)
  const { releases } = (await response.json()) as { releases: { tag: string; digest: string }[] }
  return releases.find((release) => release.tag === tag)?.digest
}

function pushEvent(id: string, repository: string, digest: Digest, tag: string) {
  const target: Record<string, unknown> = { mediaType: manifestType, size: 1, digest, repository, tag }
  return { events: [{ id, timestamp: '2026-11-23T10:00:00Z', action: 'push', target }] as const }
}

async function notify(server: FleetServer, token: string | undefined, body: unknown): Promise<Response> {
  return fetch(`${server.publicUrl}/registry/notifications`, {
    method: 'POST',
    headers: {
      'content-type': eventsType,
      ...(token === undefined ? {} : { authorization: `Bearer ${token}` }),
    },
    body: JSON.stringify(body),
  })
}

function fetches({ seen }: RegistryFront, path: string): number {
  return seen.filter((request) => request.method === 'GET' && request.path === path).length
}

async function metrics(server: FleetServer): Promise<string> {
  return (await fetch(`${server.metricsUrl}/metrics`)).text()
}

/** Waits until an agent holds a reference. @returns where it is */
async function heldBy(socketPath: string, reference: string): Promise<string> {
  await using client = createAgentClient({ socketPath })
  return await until(
    `${reference} is held`,
    async () => {
      const found = (await client.status()).references.find((each) => each.reference === reference)
      return found?.state === 'held' ? found.path : undefined
    },
    { withinMs: 60_000 },
  )
}
