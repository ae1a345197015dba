// OCI distribution-spec 1.1, "Pull": each test says what the spec says.
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { test } from 'node:test'
import { imageManifest, refusal, sha256, useRegistry } from './registry.ts'

const registry = useRegistry()

test('determining support: GET /v2/ is answered 200, with the API version that docker looks for', async () => {
  const { call } = registry()
  for (const path of ['/v2/', '/v2']) {
    const answer = await call('GET', path)
    assert.equal(answer.status, 200)
    assert.equal(answer.headers.get('docker-distribution-api-version'), 'registry/2.0')
  }
  const unknown = await call('GET', '/v2/', { authorization: undefined })
  assert.deepEqual(refusal(unknown), [401, 'UNAUTHORIZED'])
  assert.equal(unknown.headers.get('docker-distribution-api-version'), 'registry/2.0')
})

test('pulling manifests: GET by tag and by digest returns the bytes as they were stored, their type and their digest', async () => {
  const { call, image } = registry()
  const { digest, bytes } = await image('pull/manifests', 'v1')
  for (const reference of ['v1', digest]) {
    const answer = await call('GET', `/v2/pull/manifests/manifests/${reference}`)
    assert.equal(answer.status, 200)
    assert.ok(answer.body.equals(bytes))
    assert.equal(answer.headers.get('content-type'), imageManifest, 'no parameters')
    assert.equal(answer.headers.get('docker-content-digest'), digest)
    assert.equal(answer.headers.get('content-length'), String(bytes.length))
  }
})

test('checking if content exists: HEAD has the digest and the size, and no body', async () => {
  const { call, image } = registry()
  const { digest, bytes, layer } = await image('pull/head', 'v1')
  for (const [path, its, size] of [
    ['manifests/v1', digest, bytes.length],
    [`manifests/${digest}`, digest, bytes.length],
    [`blobs/${layer.digest}`, layer.digest, layer.size],
  ] as const) {
    const answer = await call('HEAD', `/v2/pull/head/${path}`)
    assert.equal(answer.status, 200)
    assert.equal(answer.headers.get('docker-content-digest'), its)
    assert.equal(answer.headers.get('content-length'), String(size))
    assert.equal(answer.body.length, 0)
  }
})

test('if the manifest or blob does not exist, the registry must return 404', async () => {
  const { call, image } = registry()
  const { layer, digest } = await image('pull/there', 'v1')
  const missing = sha256(randomBytes(8))
  for (const [path, code] of [
    ['pull/there/manifests/v2', 'MANIFEST_UNKNOWN'],
    [`pull/there/manifests/${missing}`, 'MANIFEST_UNKNOWN'],
    ['pull/there/manifests/.impossible', 'MANIFEST_UNKNOWN'],
    [`pull/there/blobs/${missing}`, 'BLOB_UNKNOWN'],
    // What another repository has is not in this one.
    [`pull/elsewhere/blobs/${layer.digest}`, 'BLOB_UNKNOWN'],
    [`pull/elsewhere/manifests/${digest}`, 'MANIFEST_UNKNOWN'],
  ] as const) {
    assert.deepEqual(refusal(await call('GET', `/v2/${path}`)), [404, code], path)
    assert.equal((await call('HEAD', `/v2/${path}`)).status, 404)
  }
  for (const path of ['manifests/sha256:baddigeststring', 'blobs/sha256:1234', 'blobs/md5:0123'])
    assert.deepEqual(refusal(await call('GET', `/v2/pull/there/${path}`)), [400, 'DIGEST_INVALID'])
})

test('pulling blobs: GET returns the bytes, and Docker-Content-Digest is their digest', async () => {
  const { call, push } = registry()
  for (const size of [0, 1, 70_000, 600_000]) {
    const bytes = randomBytes(size)
    const { digest } = await push('pull/blobs', bytes)
    const answer = await call('GET', `/v2/pull/blobs/blobs/${digest}`)
    assert.equal(answer.status, 200)
    assert.ok(answer.body.equals(bytes))
    assert.equal(answer.headers.get('docker-content-digest'), digest)
    assert.equal(answer.headers.get('content-length'), String(size))
    assert.equal(answer.headers.get('accept-ranges'), 'bytes')
  }
})

test('registries should support the Range header: one range, open at either end, is 206 with Content-Range', async () => {
  const { call, push } = registry()
  const bytes = randomBytes(2048)
  const { digest } = await push('pull/range', bytes)
  const get = (range: string, headers = {}) =>
    call('GET', `/v2/pull/range/blobs/${digest}`, { headers: { range, ...headers } })
  for (const [range, start, end] of [
    ['bytes=500-1499', 500, 1500],
    ['bytes=500-', 500, 2048],
    ['bytes=-500', 1548, 2048],
    ['bytes=2000-5000', 2000, 2048],
    ['bytes=0-0', 0, 1],
  ] as const) {
    const answer = await get(range)
    assert.equal(answer.status, 206, range)
    assert.equal(answer.headers.get('content-range'), `bytes ${start}-${end - 1}/2048`)
    assert.equal(answer.headers.get('content-length'), String(end - start))
    assert.ok(answer.body.equals(bytes.subarray(start, end)))
  }
  for (const range of ['bytes=5000-10000', 'bytes=500-0', 'bytes=-0']) {
    const answer = await get(range)
    assert.deepEqual(refusal(answer), [416, 'SIZE_INVALID'], range)
    assert.equal(answer.headers.get('content-range'), 'bytes */2048')
  }
  for (const range of ['bytes=0-1,5-6', 'lines=1-2', 'bytes=x-']) {
    const answer = await get(range)
    assert.equal(answer.status, 200, 'what cannot be read is ignored')
    assert.ok(answer.body.equals(bytes))
  }
  assert.equal((await get('bytes=0-9', { 'if-range': `"${digest}"` })).status, 206)
  assert.equal((await get('bytes=0-9', { 'if-range': '"another"' })).status, 200)
  const head = await call('HEAD', `/v2/pull/range/blobs/${digest}`, { headers: { range: 'bytes=10-19' } })
  assert.deepEqual([head.status, head.headers.get('content-length')], [206, '10'])
})

test('conditional requests: what the client has is not sent again', async () => {
  const { call, image } = registry()
  const { layer } = await image('pull/again', 'v1')
  for (const path of ['manifests/v1', `blobs/${layer.digest}`]) {
    const etag = (await call('GET', `/v2/pull/again/${path}`)).headers.get('etag') ?? ''
    assert.notEqual(etag, '')
    for (const value of [etag, `"other", ${etag}`, '*', `W/${etag}`]) {
      const answer = await call('GET', `/v2/pull/again/${path}`, { headers: { 'if-none-match': value } })
      assert.equal(answer.status, 304, value)
      assert.equal(answer.body.length, 0)
      assert.equal(answer.headers.get('etag'), etag)
    }
    assert.equal(
      (await call('GET', `/v2/pull/again/${path}`, { headers: { 'if-none-match': '"other"' } })).status,
      200,
    )
  }
  await image('pull/again', 'v1')
  const before = await call('GET', '/v2/pull/again/manifests/v1')
  assert.equal(before.status, 200)
})

test('registry proxying: a registry may choose to ignore the ns query parameter', async () => {
  const { call, image } = registry()
  await image('pull/ns', 'v1')
  assert.equal((await call('GET', '/v2/pull/ns/manifests/v1?ns=registry.example')).status, 200)
})
