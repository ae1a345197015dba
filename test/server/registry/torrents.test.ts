import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { test } from 'node:test'
import { parseTorrent } from '../../../lib/protocol/metainfo.ts'
import { deployctlOk } from '../../support/fleet.ts'
import { emptyJson, emptyType, imageManifest, refusal, sha256, useRegistry } from './conformance/registry.ts'

const registry = useRegistry()
const torrentType = 'application/x-bittorrent'
const artifactType = 'application/vnd.deployctl.torrent.v1'

interface Artifact {
  readonly artifactType: string
  readonly config: { digest: string }
  readonly layers: { mediaType: string; digest: string; size: number; annotations: Record<string, string> }[]
  readonly subject: { digest: string }
}

/** A release with one large layer, which has a torrent, and one small layer, which has none. */
async function release(repository: string, tag: string) {
  const { push, put } = registry()
  const bytes = randomBytes(400_000)
  const large = await push(repository, bytes)
  const small = await push(repository, randomBytes(1000))
  const config = await push(repository, emptyJson, emptyType)
  const content = { schemaVersion: 2, mediaType: imageManifest, config, layers: [large, small] }
  const { digest } = await put(repository, tag, content)
  return { bytes, large, small, digest, content }
}

async function torrentReferrers(repository: string, digest: string) {
  const answer = await registry().call(
    'GET',
    `/v2/${repository}/referrers/${digest}?artifactType=${encodeURIComponent(artifactType)}`,
  )
  return (
    answer.json() as {
      manifests: { digest: string; mediaType: string; size: number; artifactType: string }[]
    }
  ).manifests
}

test('a blob with Accept: application/x-bittorrent is its torrent, by /v2 and by the path that Quay had', async () => {
  const { call } = registry()
  const { large, bytes } = await release('torrents/blob', 'v1')
  for (const path of [
    `/v2/torrents/blob/blobs/${large.digest}`,
    `/c1/torrent/torrents/blob/blobs/${large.digest}`,
  ]) {
    const answer = await call('GET', path, { headers: { accept: torrentType } })
    assert.equal(answer.status, 200)
    assert.equal(answer.headers.get('content-type'), torrentType)
    assert.match(
      answer.headers.get('content-disposition') ?? '',
      /^attachment; filename="[0-9a-f]{64}\.torrent"$/,
    )
    assert.equal(answer.headers.get('vary'), 'Accept')
    const torrent = parseTorrent(answer.body)
    assert.equal(torrent.length, bytes.length)
    assert.match(torrent.announce ?? '', /\/announce\?jwt=/)
  }
  const plain = await call('GET', `/c1/torrent/torrents/blob/blobs/${large.digest}`)
  assert.equal(plain.headers.get('content-type'), torrentType)
})

test('404: what is not there, or too small to have a torrent; 406: who takes nothing else of a blob that has none', async () => {
  const { call } = registry()
  const { small, large } = await release('torrents/none', 'v1')
  const missing = sha256(randomBytes(8))
  for (const path of [
    `torrents/none/blobs/${missing}`,
    `torrents/none/blobs/${small.digest}`,
    `torrents/never/blobs/${large.digest}`,
  ])
    assert.deepEqual(refusal(await call('GET', `/c1/torrent/${path}`)), [404, 'BLOB_UNKNOWN'], path)
  for (const path of ['torrents/none', 'NOT/A/NAME/blobs/x', 'torrents/none/manifests/v1'])
    assert.deepEqual(refusal(await call('GET', `/c1/torrent/${path}`)), [404, 'NAME_UNKNOWN'], path)
  const asTorrent = { headers: { accept: torrentType } }
  assert.deepEqual(refusal(await call('GET', `/v2/torrents/none/blobs/${missing}`, asTorrent)), [
    404,
    'BLOB_UNKNOWN',
  ])
  assert.deepEqual(refusal(await call('GET', `/v2/torrents/none/blobs/${small.digest}`, asTorrent)), [
    406,
    'UNSUPPORTED',
  ])
  const either = await call('GET', `/v2/torrents/none/blobs/${small.digest}`, {
    headers: { accept: `${torrentType}, application/octet-stream;q=0.5` },
  })
  assert.deepEqual([either.status, either.body.length], [200, 1000])
  const html = await call('GET', `/c1/torrent/torrents/none/blobs/${large.digest}`, {
    headers: { accept: 'text/html' },
  })
  assert.deepEqual(refusal(html), [406, 'UNSUPPORTED'])
})

test('403: who may not pull, with a credential or without one; 405: what is not read', async () => {
  const { server, call } = registry()
  const { large } = await release('torrents/private', 'v1')
  const path = `/c1/torrent/torrents/private/blobs/${large.digest}`
  assert.deepEqual(refusal(await call('GET', path, { authorization: undefined })), [403, 'DENIED'])
  const created = await deployctlOk(server, [
    'token',
    'create',
    '--name',
    'other',
    '--scope',
    'pull:other',
    '--json',
  ])
  const { token } = JSON.parse(created) as { token: string }
  assert.deepEqual(refusal(await call('GET', path, { authorization: `Bearer ${token}` })), [403, 'DENIED'])
  for (const method of ['POST', 'PUT', 'PATCH', 'DELETE']) {
    const answer = await call(method, path, { headers: { 'content-type': 'application/json' } })
    assert.deepEqual(refusal(answer), [405, 'UNSUPPORTED'], method)
    assert.equal(answer.headers.get('allow'), 'GET, HEAD')
  }
})

test('the unsigned torrents of a manifest are attached to it: listed, pulled by digest, the same each time, without a token', async () => {
  const { call } = registry()
  const { digest, large, bytes } = await release('torrents/attached', 'v1')
  const [referrer, ...others] = await torrentReferrers('torrents/attached', digest)
  assert.ok(referrer)
  assert.deepEqual(others, [])
  assert.equal(referrer.artifactType, artifactType)
  assert.deepEqual(await torrentReferrers('torrents/attached', digest), [referrer])
  const pulled = await call('GET', `/v2/torrents/attached/manifests/${referrer.digest}`)
  assert.equal(pulled.status, 200)
  assert.equal(sha256(pulled.body), referrer.digest)
  assert.equal(pulled.body.length, referrer.size)
  const artifact = pulled.json() as Artifact
  assert.deepEqual([artifact.artifactType, artifact.subject.digest], [artifactType, digest])
  assert.ok(
    (await call('GET', `/v2/torrents/attached/blobs/${artifact.config.digest}`)).body.equals(emptyJson),
  )
  const [layer, ...more] = artifact.layers
  assert.ok(layer)
  assert.deepEqual(more, [], 'the small layer has none')
  assert.equal(layer.mediaType, torrentType)
  assert.equal(layer.annotations['vnd.deployctl.torrent.blob'], large.digest)
  const blob = await call('GET', `/v2/torrents/attached/blobs/${layer.digest}`)
  assert.deepEqual([sha256(blob.body), blob.body.length], [layer.digest, layer.size])
  assert.equal(
    (await call('HEAD', `/v2/torrents/attached/blobs/${layer.digest}`)).headers.get('content-length'),
    String(layer.size),
  )
  const torrent = parseTorrent(blob.body)
  assert.equal(torrent.length, bytes.length)
  assert.match(torrent.announce ?? '', /\/announce$/)
  assert.ok(!blob.body.includes('jwt'))
  const part = await call('GET', `/v2/torrents/attached/blobs/${layer.digest}`, {
    headers: { range: 'bytes=1-4' },
  })
  assert.ok(part.body.equals(blob.body.subarray(1, 5)))
})

test("the attached torrents are nobody's manifest: no tag, no release, not in another repository, and gone with their subject", async () => {
  const { call, put } = registry()
  const { digest, content } = await release('torrents/gone', 'v1')
  const [referrer] = await torrentReferrers('torrents/gone', digest)
  assert.ok(referrer)
  const { tags } = (await call('GET', '/v2/torrents/gone/tags/list')).json() as { tags: string[] }
  assert.deepEqual(tags, ['v1'])
  const { releases } = (await call('GET', '/api/v1/releases?repository=torrents/gone')).json() as {
    releases: unknown[]
  }
  assert.equal(releases.length, 1)
  assert.equal((await call('GET', `/v2/torrents/elsewhere/manifests/${referrer.digest}`)).status, 404)
  const artifact = (await call('GET', `/v2/torrents/gone/manifests/${referrer.digest}`)).json() as Artifact
  const layer = artifact.layers[0]?.digest ?? ''
  assert.equal((await call('GET', `/v2/torrents/elsewhere/blobs/${layer}`)).status, 404)
  assert.equal((await call('DELETE', `/v2/torrents/gone/manifests/${digest}`)).status, 202)
  assert.equal((await call('GET', `/v2/torrents/gone/manifests/${referrer.digest}`)).status, 404)
  assert.deepEqual(await torrentReferrers('torrents/gone', digest), [])
  await put('torrents/gone', 'v1', content)
  assert.deepEqual(await torrentReferrers('torrents/gone', digest), [referrer], 'and back with it')
})

test('what names an attached torrent keeps it: a client that found it there did not push it', async () => {
  const { put, call } = registry()
  const { digest } = await release('torrents/kept', 'v1')
  const [referrer] = await torrentReferrers('torrents/kept', digest)
  const artifact = (
    await call('GET', `/v2/torrents/kept/manifests/${referrer?.digest ?? ''}`)
  ).json() as Artifact
  const [layer] = artifact.layers
  const mine = await put('torrents/kept', 'mine', { ...artifact, annotations: { mine: 'yes' } })
  assert.equal((await call('DELETE', `/v2/torrents/kept/manifests/${digest}`)).status, 202)
  for (const path of [
    `manifests/${mine.digest}`,
    `blobs/${layer?.digest ?? ''}`,
    `blobs/${artifact.config.digest}`,
  ])
    assert.equal((await call('GET', `/v2/torrents/kept/${path}`)).status, 200, path)
})
