// OCI distribution-spec 1.1, "Pushing Manifests": each test says what the spec says.
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { test } from 'node:test'
import {
  emptyJson,
  emptyType,
  imageIndex,
  imageManifest,
  refusal,
  sha256,
  sha512,
  useRegistry,
} from './registry.ts'

const registry = useRegistry()
const dockerManifest = 'application/vnd.docker.distribution.manifest.v2+json'
const dockerList = 'application/vnd.docker.distribution.manifest.list.v2+json'

async function put(repository: string, reference: string, content: object | string, contentType?: string) {
  return registry().call('PUT', `/v2/${repository}/manifests/${reference}`, {
    body: Buffer.from(typeof content === 'string' ? content : JSON.stringify(content)),
    headers: contentType === undefined ? {} : { 'content-type': contentType },
  })
}

async function assertStored(repository: string, content: object, mediaType: string): Promise<string> {
  const { call } = registry()
  const bytes = Buffer.from(JSON.stringify(content))
  const answer = await put(repository, 'stored', content, mediaType)
  assert.equal(answer.status, 201, answer.body.toString())
  assert.equal(answer.headers.get('docker-content-digest'), sha256(bytes))
  const pulled = await call('GET', answer.headers.get('location') ?? '')
  assert.equal(pulled.status, 200)
  assert.ok(pulled.body.equals(bytes), 'the exact byte representation')
  assert.equal(pulled.headers.get('content-type'), mediaType)
  return sha256(bytes)
}

test('the registry must store the manifest in the exact representation provided: images, indexes and lists, OCI and docker, and indexes of indexes', async () => {
  const { push } = registry()
  const repository = 'manifests/types'
  const layer = await push(repository, randomBytes(100), 'application/vnd.oci.image.layer.v1.tar+gzip')
  const config = await push(
    repository,
    Buffer.from('{"os":"linux"}'),
    'application/vnd.oci.image.config.v1+json',
  )
  const image = { schemaVersion: 2, mediaType: imageManifest, config, layers: [layer] }
  const digest = await assertStored(repository, image, imageManifest)
  const entry = {
    mediaType: imageManifest,
    digest,
    size: JSON.stringify(image).length,
    platform: { os: 'linux', architecture: 'amd64' },
  }
  const index = { schemaVersion: 2, mediaType: imageIndex, manifests: [entry] }
  const inner = await assertStored(repository, index, imageIndex)
  const nested = { mediaType: imageIndex, digest: inner, size: JSON.stringify(index).length }
  await assertStored(
    repository,
    { ...index, manifests: [nested], annotations: { nested: 'yes' } },
    imageIndex,
  )
  await assertStored(repository, { ...index, manifests: [] }, imageIndex)
  const docker = await assertStored(repository, { ...image, mediaType: dockerManifest }, dockerManifest)
  const list = {
    schemaVersion: 2,
    mediaType: dockerList,
    manifests: [{ ...entry, mediaType: dockerManifest, digest: docker }],
  }
  await assertStored(repository, list, dockerList)
  await assertStored(repository, { ...image, layers: [], 'x-mine': { of: 'any kind' } }, imageManifest)
})

test('artifacts: an empty config, an artifactType, layers of any type, and data within a descriptor', async () => {
  const { push } = registry()
  const repository = 'manifests/artifacts'
  const config = { ...(await push(repository, emptyJson, emptyType)), data: emptyJson.toString('base64') }
  const layer = await push(repository, Buffer.from('{"bom":1}'), 'application/vnd.example.sbom+json')
  const artifact = {
    schemaVersion: 2,
    mediaType: imageManifest,
    artifactType: 'application/vnd.example.sbom',
    config,
    layers: [layer],
  }
  await assertStored(repository, artifact, imageManifest)
  await assertStored(repository, { ...artifact, layers: [config] }, imageManifest)
  // What the image-spec had before artifacts were images, and what others may think of.
  const artifactManifest = 'application/vnd.oci.artifact.manifest.v1+json'
  await assertStored(
    repository,
    { mediaType: artifactManifest, artifactType: 'a/b', blobs: [layer] },
    artifactManifest,
  )
  await assertStored(repository, { hello: 'world' }, 'application/vnd.example.thing.v1+json')
})

test('layers with urls live elsewhere and need not be pushed', async () => {
  const { push } = registry()
  const repository = 'manifests/foreign'
  const config = await push(repository, emptyJson)
  const mediaType = 'application/vnd.oci.image.layer.nondistributable.v1.tar+gzip'
  const layer = {
    mediaType,
    digest: sha256(randomBytes(8)),
    size: 123456,
    urls: ['https://store.example/blob'],
  }
  await assertStored(
    repository,
    { schemaVersion: 2, mediaType: imageManifest, config, layers: [layer] },
    imageManifest,
  )
})

test('Content-Type: parameters should be ignored, without one the mediaType in it counts, and the two must not differ', async () => {
  const { push, call } = registry()
  const repository = 'manifests/content-type'
  const config = await push(repository, emptyJson)
  const image = { schemaVersion: 2, mediaType: imageManifest, config, layers: [] }
  const bare = { schemaVersion: 2, config, layers: [] }
  for (const [content, sent] of [
    [image, `${imageManifest}; charset=utf-8`],
    [image, undefined],
    [bare, imageManifest],
  ] as const) {
    assert.equal((await put(repository, 'v1', content, sent)).status, 201)
    const pulled = await call('GET', `/v2/${repository}/manifests/v1`)
    assert.equal(pulled.headers.get('content-type'), imageManifest)
  }
  for (const [content, sent] of [
    [image, imageIndex],
    [{ config, layers: [] }, imageManifest],
    [{ ...image, schemaVersion: 1 }, imageManifest],
    ['{"schemaVersion":', imageManifest],
    ['[]', imageManifest],
  ] as const)
    assert.deepEqual(refusal(await put(repository, 'v2', content, sent)), [400, 'MANIFEST_INVALID'])
})

test('a Content-Type that is none is refused in words', async () => {
  const { push } = registry()
  const config = await push('manifests/no-type', emptyJson)
  const image = { schemaVersion: 2, mediaType: imageManifest, config, layers: [] }
  assert.deepEqual(refusal(await put('manifests/no-type', 'v1', image, 'not a type')), [415, 'UNSUPPORTED'])
})

test('by digest: the digest must be that of the bytes', async () => {
  const { push, call } = registry()
  const repository = 'manifests/digest'
  const config = await push(repository, emptyJson)
  const image = { schemaVersion: 2, mediaType: imageManifest, config, layers: [] }
  const digest = sha256(Buffer.from(JSON.stringify(image)))
  assert.equal((await put(repository, digest, image, imageManifest)).status, 201)
  assert.deepEqual(refusal(await put(repository, digest, `${JSON.stringify(image)}  `, imageManifest)), [
    400,
    'DIGEST_INVALID',
  ])
  assert.deepEqual(refusal(await put(repository, 'sha256:baddigeststring', image, imageManifest)), [
    400,
    'DIGEST_INVALID',
  ])
  assert.equal((await call('HEAD', `/v2/${repository}/manifests/${digest}`)).status, 200)
})

test('sha512: manifests and indexes that are named by it, and name others by it', async () => {
  const { call } = registry()
  const repository = 'manifests/sha512'
  const layerBytes = randomBytes(1000)
  const push512 = async (bytes: Buffer) => {
    const digest = sha512(bytes)
    const answer = await call('POST', `/v2/${repository}/blobs/uploads/?digest=${digest}`, { body: bytes })
    assert.equal(answer.status, 201)
    return { mediaType: 'application/octet-stream', digest, size: bytes.length }
  }
  const image = {
    schemaVersion: 2,
    mediaType: imageManifest,
    config: await push512(emptyJson),
    layers: [await push512(layerBytes)],
  }
  const put512 = async (content: object, mediaType: string) => {
    const bytes = Buffer.from(JSON.stringify(content))
    const digest = sha512(bytes)
    const answer = await put(repository, digest, content, mediaType)
    assert.equal(answer.status, 201, answer.body.toString())
    assert.equal(answer.headers.get('docker-content-digest'), digest)
    const pulled = await call('GET', `/v2/${repository}/manifests/${digest}`)
    assert.equal(pulled.headers.get('docker-content-digest'), digest)
    assert.ok(pulled.body.equals(bytes))
    return { mediaType, digest, size: bytes.length }
  }
  const entry = await put512(image, imageManifest)
  const index = await put512({ schemaVersion: 2, mediaType: imageIndex, manifests: [entry] }, imageIndex)
  const tagged = await put(repository, 'v1', image, imageManifest)
  assert.equal(
    tagged.headers.get('docker-content-digest'),
    sha256(Buffer.from(JSON.stringify(image))),
    'a tag names SHA-256',
  )
  for (const { digest } of [index, entry]) {
    assert.equal((await call('DELETE', `/v2/${repository}/manifests/${digest}`)).status, 202)
    assert.equal((await call('HEAD', `/v2/${repository}/manifests/${digest}`)).status, 404)
  }
  assert.equal((await call('HEAD', `/v2/${repository}/manifests/v1`)).status, 200)
})

test('a manifest that names what is not in the repository is refused with MANIFEST_BLOB_UNKNOWN, and stores nothing', async () => {
  const { push, image, call } = registry()
  const repository = 'manifests/missing'
  const config = await push(repository, emptyJson)
  const { layer, digest, size } = await image('manifests/other', 'v1')
  const withLayer = { schemaVersion: 2, mediaType: imageManifest, config, layers: [layer] }
  assert.deepEqual(refusal(await put(repository, 'v1', withLayer, imageManifest)), [
    404,
    'MANIFEST_BLOB_UNKNOWN',
  ])
  const index = {
    schemaVersion: 2,
    mediaType: imageIndex,
    manifests: [{ mediaType: imageManifest, digest, size }],
  }
  assert.deepEqual(refusal(await put(repository, 'v1', index, imageIndex)), [404, 'MANIFEST_BLOB_UNKNOWN'])
  const wrongSize = { schemaVersion: 2, mediaType: imageManifest, config: { ...config, size: 3 }, layers: [] }
  assert.deepEqual(refusal(await put(repository, 'v1', wrongSize, imageManifest)), [400, 'MANIFEST_INVALID'])
  const wrongDigest = {
    schemaVersion: 2,
    mediaType: imageManifest,
    config: { ...config, digest: 'sha256:x' },
    layers: [],
  }
  assert.deepEqual(refusal(await put(repository, 'v1', wrongDigest, imageManifest)), [400, 'DIGEST_INVALID'])
  assert.equal((await call('HEAD', `/v2/${repository}/manifests/v1`)).status, 404)
})

test('the registry should enforce a limit on manifest sizes, with 413, and take 4 MiB', async () => {
  const { push } = registry()
  const repository = 'manifests/large'
  const config = await push(repository, emptyJson)
  const image = (bytes: number) => ({
    schemaVersion: 2,
    mediaType: imageManifest,
    config,
    layers: [],
    annotations: Object.fromEntries(
      Array.from({ length: bytes / 10_000 }, (_, i) => [`large-${i}`, 'A'.repeat(10_000)]),
    ),
  })
  await assertStored(repository, image(3_900_000), imageManifest)
  assert.deepEqual(refusal(await put(repository, 'v2', image(4_300_000), imageManifest)), [
    413,
    'SIZE_INVALID',
  ])
})

test('a subject: the registry must take it before the manifest it names is there, and say that it has seen it in OCI-Subject', async () => {
  const { push, call } = registry()
  const repository = 'manifests/subject'
  const config = await push(repository, emptyJson, emptyType)
  const subject = { mediaType: imageManifest, digest: sha256(randomBytes(8)), size: 1234 }
  const artifact = {
    schemaVersion: 2,
    mediaType: imageManifest,
    artifactType: 'a/b',
    config,
    layers: [config],
    subject,
  }
  const answer = await put(repository, 'attached', artifact, imageManifest)
  assert.deepEqual([answer.status, answer.headers.get('oci-subject')], [201, subject.digest])
  const plain = await put(repository, 'plain', { ...artifact, subject: undefined }, imageManifest)
  assert.deepEqual([plain.status, plain.headers.get('oci-subject')], [201, null])
  const broken = { ...artifact, subject: { ...subject, digest: 'sha256:x' } }
  assert.deepEqual(refusal(await put(repository, 'broken', broken, imageManifest)), [400, 'DIGEST_INVALID'])
  assert.equal((await call('HEAD', `/v2/${repository}/manifests/broken`)).status, 404)
})

test('by digest with tag parameters: each is set, and OCI-Tag says so; a name by SHA-512 takes none', async () => {
  const { push, call } = registry()
  const repository = 'manifests/tag-parameters'
  const config = await push(repository, emptyJson)
  const image = { schemaVersion: 2, mediaType: imageManifest, config, layers: [] }
  const bytes = Buffer.from(JSON.stringify(image))
  const tags = Array.from({ length: 12 }, (_, i) => `1.${i}`)
  const query = (names: readonly string[]) => names.map((name) => `tag=${name}`).join('&')
  const answer = await put(repository, `${sha256(bytes)}?${query(tags)}`, image, imageManifest)
  assert.equal(answer.status, 201)
  assert.equal(answer.headers.get('oci-tag'), tags.join(', '))
  for (const tag of tags) {
    const head = await call('HEAD', `/v2/${repository}/manifests/${tag}`)
    assert.equal(head.headers.get('docker-content-digest'), sha256(bytes))
  }
  const other = await put(repository, `${sha512(bytes)}?tag=other`, image, imageManifest)
  assert.deepEqual([other.status, other.headers.get('oci-tag')], [201, null])
  const bad = await put(repository, `${sha256(bytes)}?tag=-x`, image, imageManifest)
  assert.deepEqual(refusal(bad), [400, 'MANIFEST_INVALID'])
  const many = await put(
    repository,
    `${sha256(bytes)}?${query(Array<string>(101).fill('x'))}`,
    image,
    imageManifest,
  )
  assert.deepEqual(refusal(many), [414, 'UNSUPPORTED'])
})

test('a tag that is none is refused in words', async () => {
  const { push } = registry()
  const config = await push('manifests/tags', emptyJson)
  const image = { schemaVersion: 2, mediaType: imageManifest, config, layers: [] }
  for (const tag of ['.hidden', '-dash', 'a'.repeat(129), 'a%20b'])
    assert.deepEqual(
      refusal(await put('manifests/tags', tag, image, imageManifest)),
      [400, 'MANIFEST_INVALID'],
      tag,
    )
})

test('a tag moves at once for those who pull, and so does its end', async () => {
  const { image, call } = registry()
  for (let round = 0; round < 20; round++) {
    const { digest } = await image('manifests/moving', 'latest')
    const pulled = await call('HEAD', '/v2/manifests/moving/manifests/latest')
    assert.equal(pulled.headers.get('docker-content-digest'), digest)
  }
  assert.equal((await call('DELETE', '/v2/manifests/moving/manifests/latest')).status, 202)
  assert.equal((await call('HEAD', '/v2/manifests/moving/manifests/latest')).status, 404)
})
