import assert from 'node:assert/strict'
import { once } from 'node:events'
import { readdir } from 'node:fs/promises'
import type { IncomingMessage } from 'node:http'
import { get } from 'node:http'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { startAgent } from '../../../agent/agent.ts'
import { AgentConfig } from '../../../agent/config.ts'
import { createAgentClient } from '../../../lib/client/agent-client.ts'
import { parseTorrent, writeBlobInfo, writeTorrent } from '../../../lib/protocol/metainfo.ts'
import { silentLog } from '../../../lib/runtime/log.ts'
import { until } from '../../support/until.ts'
import type { Blob } from '../engine/fixtures.ts'
import { mebibyte, randomBlob, temporaryDirectory } from '../engine/fixtures.ts'
import type { MiniServer } from '../mini-server.ts'
import { startMiniServer } from '../mini-server.ts'

type Settings = Record<string, unknown>

/** An agent in this process with a mirror, and its directory. */
async function startMirrorAgent(t: TestContext, server: MiniServer, settings: Settings = {}) {
  const directory = await temporaryDirectory(t)
  const config = AgentConfig.parse({
    server: server.url,
    host: 'a1',
    place: 'rack-1',
    data_dir: join(directory, 'data'),
    control_socket: join(directory, 'agent.sock'),
    metrics_addr: '127.0.0.1:0',
    peer_port: 0,
    disk: { reserve: '0B' },
    ...settings,
    signatures: { policy: 'accept_unsigned', ...(settings['signatures'] as Settings | undefined) },
    mirror: { enabled: true, addr: '127.0.0.1:0', ...(settings['mirror'] as Settings | undefined) },
  })
  const agent = await startAgent(config, {
    log: silentLog(),
    now: Date.now,
    monotonic: () => performance.now(),
    // Nothing is spread over time, and the first pieces come first.
    random: () => 0,
    bootstrapToken: 'bootstrap',
  })
  t.after(() => agent[Symbol.asyncDispose]())
  const client = createAgentClient({ socketPath: agent.addresses.controlSocket })
  t.after(() => client[Symbol.asyncDispose]())
  await until('a report', async () => (await client.status()).lastReportAt !== undefined)
  const url = agent.addresses.mirrorUrl ?? assert.fail('there is no mirror')
  const metric = async (name: string) => {
    const text = await (await fetch(`${agent.addresses.metricsUrl}/metrics`)).text()
    return Number(
      text
        .split('\n')
        .find((line) => line.startsWith(`${name} `))
        ?.slice(name.length + 1) ?? 0,
    )
  }
  return { client, url, metric, data: join(directory, 'data') }
}

const digestOf = ({ sha256 }: Blob) => `sha256:${sha256}`

test('a blob is served while it comes, whole and by range, and then from the cache', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(12 * mebibyte)
  server.publish('web:1', [{ blob }])
  const { client, url, metric } = await startMirrorAgent(t, server, { limits: { download: '4MiB' } })
  const path = `${url}/v2/web/blobs/${digestOf(blob)}`
  const whole = await fetch(path)
  assert.equal(whole.status, 200)
  const [state] = (await client.status()).blobs
  assert.equal(state?.state, 'partial', 'its head is here before its end')
  const late = fetch(path, { headers: { range: `bytes=${10 * mebibyte}-` } })
  assert.deepEqual(headersOf(whole), {
    'content-length': String(blob.bytes.length),
    'content-type': 'application/octet-stream',
    'accept-ranges': 'bytes',
    'docker-content-digest': digestOf(blob),
    'content-range': null,
  })
  assert.ok(Buffer.from(await whole.arrayBuffer()).equals(blob.bytes))
  const end = await late
  assert.equal(end.status, 206)
  assert.ok(Buffer.from(await end.arrayBuffer()).equals(blob.bytes.subarray(10 * mebibyte)))
  await until(
    'its bytes are counted',
    async () => (await metric('rackswarm_agent_mirror_sent_bytes_total{from="swarm"}')) === 14 * mebibyte,
  )
  assert.equal(await metric('rackswarm_agent_mirror_sent_bytes_total{from="cache"}'), 0)

  await until('a seed of it', async () => (await client.status()).blobs[0]?.seeding === true)
  for (const [range, status, from, to] of [
    ['bytes=0-0', 206, 0, 1],
    ['bytes=1000-300000', 206, 1000, 300_001],
    ['bytes=-5', 206, blob.bytes.length - 5, blob.bytes.length],
    [`bytes=100-${10 * blob.bytes.length}`, 206, 100, blob.bytes.length],
    ['bytes=0-1,5-6', 200, 0, blob.bytes.length],
  ] as const) {
    const part = await fetch(path, { headers: { range } })
    assert.equal(part.status, status, range)
    if (status === 206)
      assert.equal(part.headers.get('content-range'), `bytes ${from}-${to - 1}/${blob.bytes.length}`)
    assert.ok(Buffer.from(await part.arrayBuffer()).equals(blob.bytes.subarray(from, to)), range)
  }
  const beyond = await fetch(path, { headers: { range: `bytes=${blob.bytes.length}-` } })
  assert.deepEqual(
    [beyond.status, beyond.headers.get('content-range')],
    [416, `bytes */${blob.bytes.length}`],
  )
  await beyond.arrayBuffer()
  const head = await fetch(path, { method: 'HEAD' })
  assert.deepEqual(headersOf(head), headersOf(whole))
  const same = await fetch(path, { headers: { 'if-none-match': `"${digestOf(blob)}"` } })
  assert.equal(same.status, 304)
  assert.equal(await metric('rackswarm_agent_fetches_total{outcome="ok"}'), 1, 'all of them were one fetch')
})

test('manifests come as they are; by digest they are asked for once, by tag each time', async (t) => {
  const server = await startMiniServer(t)
  const first = server.publish('team/web:1', [{ blob: randomBlob(1000) }])
  const { url } = await startMirrorAgent(t, server)
  const asked = countRequests(server, '/manifests/')
  const byTag = await fetch(`${url}/v2/team/web/manifests/1`)
  assert.equal(byTag.headers.get('docker-content-digest'), first)
  assert.equal(byTag.headers.get('content-type'), 'application/vnd.oci.image.manifest.v1+json')
  const text = await byTag.text()
  const head = await fetch(`${url}/v2/team/web/manifests/${first}`, { method: 'HEAD' })
  assert.deepEqual(
    [head.status, head.headers.get('content-length'), head.headers.get('docker-content-digest')],
    [200, String(text.length), first],
  )
  assert.equal(await (await fetch(`${url}/v2/team/web/manifests/${first}`)).text(), text)
  assert.equal(asked(), 1)
  const second = server.publish('team/web:1', [{ blob: randomBlob(1000) }])
  const moved = await fetch(`${url}/v2/team/web/manifests/1`)
  assert.equal(moved.headers.get('docker-content-digest'), second)
  await moved.arrayBuffer()
  assert.equal(asked(), 2)
})

test('bytes whose pieces are right and whose SHA-256 is wrong are cut short, and nothing of them stays', async (t) => {
  const server = await startMiniServer(t)
  const [named, given] = [randomBlob(3 * mebibyte), randomBlob(3 * mebibyte)]
  const torrent = writeTorrent(
    writeBlobInfo({
      sha256Hex: named.sha256,
      length: given.bytes.length,
      pieces: Buffer.from(given.metainfo.pieces),
    }),
    {},
  )
  const blob = { bytes: given.bytes, sha256: named.sha256, torrent, metainfo: parseTorrent(torrent) }
  server.publish('web:1', [{ blob }])
  const { url, metric, data } = await startMirrorAgent(t, server)
  const response = await fetch(`${url}/v2/web/blobs/${digestOf(named)}`)
  assert.equal(response.status, 200)
  let received = 0
  await assert.rejects(async () => {
    for await (const chunk of response.body ?? []) received += (chunk as Uint8Array).length
  })
  assert.ok(received < given.bytes.length)
  await until(
    'the fetch is given up',
    async () => (await metric('rackswarm_agent_fetches_total{outcome="wrong_digest"}')) === 1,
  )
  assert.deepEqual(await readdir(join(data, 'blobs', 'sha256')), [])
})

test('while the server is away what is held is served, and the rest is 404 within a second', async (t) => {
  const server = await startMiniServer(t)
  const [held, small, other] = [randomBlob(mebibyte), randomBlob(1000), randomBlob(mebibyte)]
  const digest = server.publish('web:1', [{ blob: held }, { blob: small }])
  const unseen = server.publish('web:2', [{ blob: other }])
  const { url } = await startMirrorAgent(t, server)
  for (const path of [`manifests/1`, `blobs/${digestOf(held)}`, `blobs/${digestOf(small)}`])
    await (await fetch(`${url}/v2/web/${path}`)).arrayBuffer()
  for (const silent of [false, true]) {
    server.intercept = (_request, response) => {
      if (!silent) response.destroy()
      return true
    }
    for (const [path, status] of [
      [`manifests/1`, 200],
      [`manifests/${digest}`, 200],
      [`blobs/${digestOf(held)}`, 200],
      [`blobs/${digestOf(small)}`, 200],
      [`manifests/2`, 404],
      [`manifests/${unseen}`, 404],
      [`blobs/${digestOf(other)}`, 404],
    ] as const) {
      const startedAt = performance.now()
      const response = await fetch(`${url}/v2/web/${path}`)
      assert.equal(response.status, status, path)
      await response.arrayBuffer()
      assert.ok(performance.now() - startedAt < 1000, `${path} took too long`)
    }
  }
  const refused = (await (await fetch(`${url}/v2/web/manifests/2`)).json()) as object
  assert.match(JSON.stringify(refused), /"code":"MANIFEST_UNKNOWN".*does not answer, and web:2 is not held/)
})

test('with signatures: require what nobody has signed that is trusted is 404, and the rules say for which repositories', async (t) => {
  const server = await startMiniServer(t)
  const refused = server.publish('web:1', [{ blob: randomBlob(1000) }])
  const taken = server.publish('open/web:1', [{ blob: randomBlob(1000) }])
  const signatures = {
    policy: 'require',
    repositories: [{ match: ['open/*'], policy: 'accept_unsigned' }],
  }
  const statusOf = async (url: string, path: string) => {
    const response = await fetch(`${url}/v2/${path}`)
    return [response.status, await response.text()] as const
  }
  const { url } = await startMirrorAgent(t, server, { signatures, mirror: { signatures: 'require' } })
  for (const path of ['web/manifests/1', `web/manifests/${refused}`]) {
    const [status, text] = await statusOf(url, path)
    assert.equal(status, 404, path)
    assert.match(text, /This host does not take .*this host trusts no key for it/)
  }
  for (const path of ['open/web/manifests/1', `open/web/manifests/${taken}`])
    assert.equal((await statusOf(url, path))[0], 200, path)
})

test('what the server refuses this host is 404, also where it was allowed before', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(mebibyte)
  server.publish('web:1', [{ blob }])
  const { url } = await startMirrorAgent(t, server)
  assert.equal((await fetch(`${url}/v2/other/blobs/sha256:${'0'.repeat(64)}`)).status, 404)
  assert.equal((await fetch(`${url}/v2/web/manifests/2`)).status, 404)
  assert.equal((await fetch(`${url}/v2/web/manifests/1`)).status, 200)
  server.intercept = ({ url: path }, response) => {
    if (path?.startsWith('/v2/') !== true) return false
    response.writeHead(403, { 'content-type': 'application/json' })
    response.end('{"errors":[{"code":"DENIED","message":"a1 may not pull web"}]}')
    return true
  }
  const denied = await fetch(`${url}/v2/web/manifests/1`)
  assert.equal(denied.status, 404)
  assert.match(await denied.text(), /a1 may not pull web/)
})

test('a blob that nobody waits for any more is given up', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(24 * mebibyte)
  server.publish('web:1', [{ blob }])
  const { client, url, metric } = await startMirrorAgent(t, server, { limits: { download: '1MiB' } })
  const gone = new AbortController()
  const response = await fetch(`${url}/v2/web/blobs/${digestOf(blob)}`, { signal: gone.signal })
  assert.equal(response.status, 200)
  gone.abort()
  await response.arrayBuffer().catch(() => undefined)
  await until(
    'the request has ended',
    async () => (await metric('rackswarm_agent_mirror_requests_total{kind="blob",outcome="left"}')) === 1,
  )
  assert.equal((await client.transfers()).transfers[0]?.state, 'fetching', 'a client may come back at once')
  await until(
    'the end of the fetch',
    async () => (await metric('rackswarm_agent_fetches_total{outcome="aborted"}')) === 1,
  )
})

test('a blob that is nearly here when its client goes comes to its end', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(48 * mebibyte)
  server.publish('web:1', [{ blob }])
  // The last request, a twelfth of the blob, is answered when the test says so.
  let answerLast = () => undefined as unknown
  server.intercept = (request, response) => {
    const { headers, url } = request
    const [, start, end] = /^bytes=(\d+)-(\d+)$/.exec(headers.range ?? '') ?? []
    if (url?.startsWith('/webseed/') !== true || Number(end) !== blob.bytes.length - 1) return false
    answerLast = () =>
      response
        .writeHead(206, { 'content-range': `bytes ${start}-${end}/${blob.bytes.length}` })
        .end(blob.bytes.subarray(Number(start)))
    return true
  }
  const { url, metric } = await startMirrorAgent(t, server)
  const gone = new AbortController()
  const response = await fetch(`${url}/v2/web/blobs/${digestOf(blob)}`, { signal: gone.signal })
  let received = 0
  for await (const chunk of response.body ?? []) {
    received += (chunk as Uint8Array).length
    if (received >= 44 * mebibyte) break
  }
  gone.abort()
  const leftAt = performance.now()
  await until('the time in which a client may come back', () => performance.now() - leftAt > 6000)
  assert.equal(await metric('rackswarm_agent_mirror_requests_total{kind="blob",outcome="left"}'), 1)
  answerLast()
  await until(
    'the whole blob',
    async () => (await metric('rackswarm_agent_fetches_total{outcome="ok"}')) === 1,
  )
})

test('more readers than there may be are told 503, not 429', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(mebibyte)
  server.publish('web:1', [{ blob }])
  const { url } = await startMirrorAgent(t, server)
  const waiting: MiniServer['intercept'] = ({ url: path }) => path === '/api/v1/swarm-grants'
  server.intercept = waiting
  const gone = new AbortController()
  const statuses: number[] = []
  const readers = Array.from({ length: 80 }, () =>
    fetch(`${url}/v2/web/blobs/${digestOf(blob)}`, { signal: gone.signal }).then(
      async (response) => {
        statuses.push(response.status)
        await response.arrayBuffer()
      },
      () => undefined,
    ),
  )
  await until('answers to those beyond 64', () => statuses.length === 16)
  assert.ok(statuses.every((status) => status === 503))
  gone.abort()
  await Promise.all(readers)
})

test('what is no pull of a registry of ours is refused', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(1000)
  server.publish('web:1', [{ blob }])
  const { url, metric } = await startMirrorAgent(t, server, {
    mirror: { registries: ['registry.example', 'docker.io'] },
  })
  const statusOf = async (path: string, init: RequestInit = {}) => {
    const response = await fetch(`${url}${path}`, init)
    const text = await response.text()
    return [response.status, /"code":"(\w+)"/.exec(text)?.[1], response.headers.get('oci-namespace')]
  }
  assert.deepEqual(await statusOf('/v2/'), [200, undefined, null])
  assert.deepEqual(await statusOf('/v2/web/manifests/1?ns=docker.io'), [200, undefined, 'docker.io'])
  assert.deepEqual(await statusOf('/v2/web/manifests/1?ns=quay.io'), [404, 'NAME_UNKNOWN', null])
  assert.deepEqual(await statusOf('/v2/_catalog'), [404, 'UNSUPPORTED', null])
  assert.deepEqual(await statusOf('/v2/web/tags/list'), [404, 'UNSUPPORTED', null])
  for (const method of ['POST', 'PUT', 'PATCH', 'DELETE'])
    assert.deepEqual(await statusOf('/v2/web/blobs/uploads/', { method }), [405, 'UNSUPPORTED', null])
  const request = get(`${url}/v2/web/manifests/1`, { headers: { host: 'evil.example:5052' } })
  const [rebound] = (await once(request, 'response')) as [IncomingMessage]
  rebound.resume()
  assert.equal(rebound.statusCode, 404)
  assert.equal(
    await metric('rackswarm_agent_mirror_requests_total{kind="manifest",outcome="refused"}'),
    2,
    'ns and Host',
  )
  assert.equal(await metric('rackswarm_agent_mirror_requests'), 0)
})

test('a mirror that others could reach is refused by its configuration', () => {
  for (const addr of ['0.0.0.0:5052', '10.0.0.1:5052', '[::]:5052', 'localhost:5052', '127.0.0.1'])
    assert.equal(
      AgentConfig.safeParse({ server: 'https://r.example', mirror: { addr } }).error?.issues[0]?.message,
      'need ADDRESS:PORT with an address of loopback, such as 127.0.0.1:5052 or [::1]:5052',
      addr,
    )
  const { mirror } = AgentConfig.parse({ server: 'https://r.example', mirror: { addr: '[::1]:0' } })
  assert.deepEqual(mirror.addr, { host: '::1', port: 0 })
})

function headersOf({ headers }: Response) {
  return Object.fromEntries(
    ['content-length', 'content-type', 'accept-ranges', 'docker-content-digest', 'content-range'].map(
      (name) => [name, headers.get(name)],
    ),
  )
}

function countRequests(server: MiniServer, part: string): () => number {
  let count = 0
  server.intercept = ({ url }) => {
    if (url?.includes(part) === true) count++
    return false
  }
  return () => count
}
