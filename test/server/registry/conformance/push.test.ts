// OCI distribution-spec 1.1, "Push", blobs: each test says what the spec says.
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { test } from 'node:test'
import type { Answer } from './registry.ts'
import { octets, refusal, sha256, sha512, useRegistry } from './registry.ts'

const registry = useRegistry()
const headers = { 'content-type': octets }

/** Follows the Location of what was pushed, as the spec's "pullable blob URL". */
async function assertPullable(answer: Answer, bytes: Buffer, digest = sha256(bytes)): Promise<void> {
  assert.equal(answer.status, 201, answer.body.toString())
  assert.equal(answer.headers.get('docker-content-digest'), digest)
  const pulled = await registry().call('GET', answer.headers.get('location') ?? '')
  assert.equal(pulled.status, 200)
  assert.equal(pulled.headers.get('docker-content-digest'), digest)
  assert.ok(pulled.body.equals(bytes))
}

async function session(repository: string): Promise<string> {
  const started = await registry().call('POST', `/v2/${repository}/blobs/uploads/`)
  assert.equal(started.status, 202)
  const location = started.headers.get('location') ?? ''
  assert.match(location, /[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}/, 'a UUID')
  assert.equal(started.headers.get('oci-chunk-min-length'), null, 'chunks may have any size')
  return location
}

const withDigest = (location: string, digest: string) =>
  `${location}${location.includes('?') ? '&' : '?'}digest=${digest}`

function chunk(method: string, location: string, bytes: Buffer, start: number, end: number): Promise<Answer> {
  return registry().call(method, location, {
    body: bytes.subarray(start, end),
    headers: { ...headers, 'content-range': `${start}-${end - 1}` },
  })
}

test('POST then PUT: a session, and then the whole blob with its digest', async () => {
  for (const size of [0, 2, 500_000]) {
    const bytes = randomBytes(size)
    const location = withDigest(await session('push/put'), sha256(bytes))
    await assertPullable(await registry().call('PUT', location, { body: bytes, headers }), bytes)
  }
})

test('single POST: the whole blob with its digest in one request', async () => {
  for (const size of [0, 2, 500_000]) {
    const bytes = randomBytes(size)
    const path = `/v2/push/post/blobs/uploads/?digest=${sha256(bytes)}`
    await assertPullable(await registry().call('POST', path, { body: bytes, headers }), bytes)
  }
})

test('the digest must match the blob: it is refused by every way of pushing, and not there afterwards', async () => {
  const { call } = registry()
  const bytes = randomBytes(3000)
  const promised = sha256(randomBytes(8))
  const refused = async (answer: Promise<Answer>) => {
    assert.deepEqual(refusal(await answer), [400, 'DIGEST_INVALID'])
  }
  await refused(call('POST', `/v2/push/bad/blobs/uploads/?digest=${promised}`, { body: bytes, headers }))
  await refused(call('PUT', withDigest(await session('push/bad'), promised), { body: bytes, headers }))
  const location = await session('push/bad')
  assert.equal((await call('PATCH', location, { body: bytes, headers })).status, 202)
  await refused(call('PUT', withDigest(location, promised)))
  await refused(call('PUT', withDigest(await session('push/bad'), 'sha256:short'), { body: bytes, headers }))
  await refused(call('PUT', await session('push/bad'), { body: bytes, headers }))
  for (const digest of [promised, sha256(bytes)])
    assert.equal((await call('HEAD', `/v2/push/bad/blobs/${digest}`)).status, 404)
})

test('pushing a blob in chunks: each is 202 with Location and Range, and PUT closes the session, with a last chunk or without', async () => {
  const { call } = registry()
  const bytes = randomBytes(3000)
  for (const last of [2000, 3000]) {
    let location = await session('push/chunks')
    for (let start = 0; start < last; start += 1000) {
      const answer = await chunk('PATCH', location, bytes, start, start + 1000)
      assert.equal(answer.status, 202)
      assert.equal(answer.headers.get('range'), `0-${start + 999}`)
      location = answer.headers.get('location') ?? ''
    }
    const end = withDigest(location, sha256(bytes))
    const closed = last === 3000 ? await call('PUT', end) : await chunk('PUT', end, bytes, 2000, 3000)
    await assertPullable(closed, bytes)
  }
})

test('a blob may be streamed in one PATCH that says neither where it starts nor how long it is', async () => {
  const { server, admin, call } = registry()
  const bytes = randomBytes(200_000)
  const location = await session('push/stream')
  const answer = await fetch(new URL(location, server.publicUrl), {
    method: 'PATCH',
    headers: { ...headers, authorization: `Bearer ${admin}` },
    body: ReadableStream.from([new Uint8Array(bytes.subarray(0, 9)), new Uint8Array(bytes.subarray(9))]),
    duplex: 'half',
  })
  assert.equal(answer.status, 202)
  assert.equal(answer.headers.get('range'), `0-${bytes.length - 1}`)
  await assertPullable(await call('PUT', withDigest(location, sha256(bytes))), bytes)
})

test('a chunk out of order must be answered 416, and a GET tells the offset to go on from', async () => {
  const { call } = registry()
  const bytes = randomBytes(3000)
  const location = await session('push/order')
  assert.deepEqual(refusal(await chunk('PATCH', location, bytes, 1000, 2000)), [416, 'BLOB_UPLOAD_INVALID'])
  assert.equal((await chunk('PATCH', location, bytes, 0, 1000)).status, 202)
  for (const [method, start, end] of [
    ['PATCH', 2000, 3000],
    ['PATCH', 0, 1000],
    ['PUT', 2000, 3000],
  ] as const) {
    const target = method === 'PUT' ? withDigest(location, sha256(bytes)) : location
    const refused = await chunk(method, target, bytes, start, end)
    assert.equal(refused.status, 416)
    assert.equal(refused.headers.get('range'), '0-999')
    assert.notEqual(refused.headers.get('location'), null)
    const status = await call('GET', location)
    assert.equal(status.status, 204)
    assert.equal(status.headers.get('range'), '0-999')
    assert.notEqual(status.headers.get('location'), null)
  }
  assert.equal((await chunk('PATCH', location, bytes, 1000, 2000)).status, 202)
  await assertPullable(await chunk('PUT', withDigest(location, sha256(bytes)), bytes, 2000, 3000), bytes)
})

test('a Content-Range that cannot be read, or does not fit Content-Length, is refused in words', async () => {
  const { call } = registry()
  const location = await session('push/words')
  for (const range of ['0-', 'one-two', '0-5', 'bytes */3']) {
    const answer = await call('PATCH', location, {
      body: 'abc',
      headers: { ...headers, 'content-range': range },
    })
    assert.deepEqual(refusal(answer), [400, 'BLOB_UPLOAD_INVALID'], range)
  }
})

test('cancel a blob upload: DELETE is 204, and the session is gone', async () => {
  const { call } = registry()
  const location = await session('push/cancel')
  assert.equal((await call('PATCH', location, { body: 'abc', headers })).status, 202)
  assert.equal((await call('DELETE', location)).status, 204)
  for (const method of ['GET', 'PATCH', 'PUT', 'DELETE']) {
    const path = withDigest(location, sha256(Buffer.from('abc')))
    assert.deepEqual(refusal(await call(method, path)), [404, 'BLOB_UPLOAD_UNKNOWN'], method)
  }
})

test('a session belongs to its repository', async () => {
  const { call } = registry()
  const location = (await session('push/mine')).replace('push/mine', 'push/yours')
  assert.deepEqual(refusal(await call('GET', location)), [404, 'BLOB_UPLOAD_UNKNOWN'])
})

test('mounting a blob from another repository is 201 with its Location', async () => {
  const { call, push } = registry()
  const bytes = randomBytes(3000)
  const { digest } = await push('push/source', bytes)
  const path = `/v2/push/target/blobs/uploads/?mount=${digest}&from=push/source`
  await assertPullable(await call('POST', path), bytes)
})

test('the registry may treat from as optional, and mount the blob if it can be found', async () => {
  const { call, push } = registry()
  const bytes = randomBytes(3000)
  const { digest } = await push('push/anywhere', bytes)
  await assertPullable(await call('POST', `/v2/push/somewhere/blobs/uploads/?mount=${digest}`), bytes)
})

test('if it is unable to mount the blob, it should return 202, and the session can be used', async () => {
  const { call, push } = registry()
  const bytes = randomBytes(3000)
  const digest = sha256(bytes)
  for (const from of ['&from=push/nowhere', '', '&from=NOT/A/NAME']) {
    const answer = await call('POST', `/v2/push/unmounted/blobs/uploads/?mount=${digest}${from}`)
    assert.equal(answer.status, 202, from)
    assert.notEqual(answer.headers.get('location'), null)
  }
  await push('push/held', bytes)
  const started = await call('POST', `/v2/push/unmounted/blobs/uploads/?mount=${digest}&from=push/nowhere`)
  assert.equal(started.status, 202, 'only the repository that is named counts')
  const location = withDigest(started.headers.get('location') ?? '', digest)
  await assertPullable(await call('PUT', location, { body: bytes, headers }), bytes)
})

test('sha512: a blob that is named by it is pushed by every way, mounted and pulled under that name', async () => {
  const { call } = registry()
  const bytes = randomBytes(300_000)
  const digest = sha512(bytes)
  const post = `/v2/push/sha512/blobs/uploads/?digest=${digest}`
  await assertPullable(await call('POST', post, { body: bytes, headers }), bytes, digest)
  const location = await session('push/sha512')
  assert.equal((await chunk('PATCH', location, bytes, 0, 1000)).status, 202)
  await assertPullable(
    await chunk('PUT', withDigest(location, digest), bytes, 1000, bytes.length),
    bytes,
    digest,
  )
  const mount = `/v2/push/sha512-target/blobs/uploads/?mount=${digest}&from=push/sha512`
  await assertPullable(await call('POST', mount), bytes, digest)
  const hinted = await call('POST', '/v2/push/sha512/blobs/uploads/?digest-algorithm=sha512')
  assert.equal(hinted.status, 202)
  const unknown = await call('POST', '/v2/push/sha512/blobs/uploads/?digest-algorithm=md5')
  assert.deepEqual(refusal(unknown), [400, 'UNSUPPORTED'])
  const wrong = sha512(randomBytes(8))
  const refused = await call('POST', `/v2/push/sha512/blobs/uploads/?digest=${wrong}`, {
    body: bytes,
    headers,
  })
  assert.deepEqual(refusal(refused), [400, 'DIGEST_INVALID'])
  assert.equal((await call('HEAD', `/v2/push/sha512/blobs/${sha256(bytes)}`)).status, 404, 'another name')
})
