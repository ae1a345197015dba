// OCI distribution-spec 1.1, "Content Discovery": each test says what the spec says.
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { test } from 'node:test'
import type { Descriptor } from './registry.ts'
import { emptyJson, emptyType, imageIndex, imageManifest, refusal, sha256, useRegistry } from './registry.ts'

const registry = useRegistry()

async function tagsOf(path: string) {
  const answer = await registry().call('GET', path)
  assert.equal(answer.status, 200, answer.body.toString())
  const { name, tags } = answer.json() as { name: string; tags: string[] }
  return { name, tags, link: /^<(.+)>; rel="next"$/.exec(answer.headers.get('link') ?? '')?.[1] }
}

test('listing tags: all of a repository, in the order of their characters', async () => {
  const { image } = registry()
  for (const tag of ['v2', 'V1', 'latest', '1.0', 'v10', '_x']) await image('tags/all', tag)
  assert.deepEqual(await tagsOf('/v2/tags/all/tags/list'), {
    name: 'tags/all',
    tags: ['1.0', 'V1', '_x', 'latest', 'v10', 'v2'],
    link: undefined,
  })
})

test('listing tags: a repository that exists has a list, which may be empty; one that does not is 404', async () => {
  const { push, call } = registry()
  await push('tags/empty', emptyJson)
  assert.deepEqual((await tagsOf('/v2/tags/empty/tags/list')).tags, [])
  assert.deepEqual(refusal(await call('GET', '/v2/tags/none/tags/list')), [404, 'NAME_UNKNOWN'])
})

test('listing tags: n limits them, last is where the next begin, Link says so, and n=0 is an empty list without a Link', async () => {
  const { image } = registry()
  const all = Array.from({ length: 7 }, (_, i) => `test${i}`)
  for (const tag of all) await image('tags/pages', tag)
  const list = '/v2/tags/pages/tags/list'
  assert.deepEqual(await tagsOf(`${list}?n=0`), { name: 'tags/pages', tags: [], link: undefined })
  assert.deepEqual((await tagsOf(`${list}?n=3`)).tags, all.slice(0, 3))
  assert.deepEqual((await tagsOf(`${list}?n=3&last=test2`)).tags, all.slice(3, 6))
  assert.deepEqual((await tagsOf(`${list}?last=test4`)).tags, all.slice(5))
  assert.deepEqual(
    (await tagsOf(`${list}?last=test4x`)).tags,
    all.slice(5),
    'a tag that is not there any more',
  )
  assert.equal((await tagsOf(`${list}?n=7`)).link, undefined)
  assert.equal((await tagsOf(`${list}?n=100`)).link, undefined)
  const followed: string[] = []
  let pages = 0
  for (let next: string | undefined = `${list}?n=2`; next !== undefined; pages++) {
    const page = await tagsOf(next)
    followed.push(...page.tags)
    next = page.link
  }
  assert.deepEqual([followed, pages], [all, 4])
  for (const n of ['-1', 'many', '1.5'])
    assert.deepEqual(refusal(await registry().call('GET', `${list}?n=${n}`)), [400, 'UNSUPPORTED'], n)
})

test('the catalog, which every registry has, lists repositories by pages', async () => {
  const { image, call } = registry()
  for (const name of ['catalog/a', 'catalog/b/c', 'catalog/b']) await image(name, 'v1')
  const page = async (query: string) => {
    const answer = await call('GET', `/v2/_catalog${query}`)
    return { answer, ...(answer.json() as { repositories: string[] }) }
  }
  const { repositories } = await page('?last=catalog')
  assert.deepEqual(repositories.slice(0, 3), ['catalog/a', 'catalog/b', 'catalog/b/c'])
  const { answer, repositories: two } = await page('?n=2&last=catalog')
  assert.deepEqual(two, ['catalog/a', 'catalog/b'])
  assert.equal(answer.headers.get('link'), '</v2/_catalog?n=2&last=catalog%2Fb>; rel="next"')
})

interface Referrer extends Descriptor {
  readonly artifactType?: string
  readonly annotations?: Record<string, string>
}

async function referrersOf(path: string) {
  const answer = await registry().call('GET', path)
  assert.equal(answer.status, 200, answer.body.toString())
  assert.equal(answer.headers.get('content-type'), imageIndex)
  const { schemaVersion, mediaType, manifests } = answer.json() as {
    schemaVersion: number
    mediaType: string
    manifests: Referrer[]
  }
  assert.deepEqual([schemaVersion, mediaType], [2, imageIndex])
  return { answer, manifests, link: /^<(.+)>; rel="next"$/.exec(answer.headers.get('link') ?? '')?.[1] }
}

async function attached(repository: string) {
  const { push, put, image } = registry()
  const { digest, mediaType, size } = await image(repository, 'v1')
  const subject = { mediaType, digest, size }
  const config = await push(repository, emptyJson, emptyType)
  const artifact = { schemaVersion: 2, mediaType: imageManifest, config, layers: [config], subject }
  /** @returns its descriptor alone */
  const attach = async (content: object, type = imageManifest): Promise<Descriptor> => {
    const digest = sha256(Buffer.from(JSON.stringify(content)))
    const { size } = await put(repository, digest, content, type)
    return { mediaType: type, digest, size }
  }
  return { subject, artifact, put: attach, path: `/v2/${repository}/referrers/${digest}` }
}

test('listing referrers: an image index of all manifests and indexes whose subject it is, with artifactType and annotations', async () => {
  const { subject, artifact, put, path } = await attached('referrers/all')
  const annotations = { 'org.example.kind': 'sbom' }
  const sbom = await put({ ...artifact, artifactType: 'application/vnd.example.sbom', annotations })
  const byConfig = await put(artifact)
  const emptyArtifactType = await put({ ...artifact, artifactType: '', annotations: { empty: 'type' } })
  const index = await put({ schemaVersion: 2, mediaType: imageIndex, manifests: [], subject }, imageIndex)
  const typedIndex = {
    schemaVersion: 2,
    mediaType: imageIndex,
    artifactType: 'a/index',
    manifests: [],
    subject,
  }
  const typed = await put(typedIndex, imageIndex)
  const expected: Referrer[] = [
    { ...sbom, artifactType: 'application/vnd.example.sbom', annotations },
    { ...byConfig, artifactType: emptyType },
    { ...emptyArtifactType, artifactType: emptyType, annotations: { empty: 'type' } },
    index,
    { ...typed, artifactType: 'a/index' },
  ]
  const byDigest = (a: Descriptor, b: Descriptor) => (a.digest < b.digest ? -1 : 1)
  assert.deepEqual((await referrersOf(path)).manifests, expected.sort(byDigest))
})

test('listing referrers: filtered by artifactType, which OCI-Filters-Applied says', async () => {
  const { artifact, put, path } = await attached('referrers/filter')
  const sbom = await put({ ...artifact, artifactType: 'application/vnd.example.sbom+json' })
  const byConfig = await put(artifact)
  for (const [type, expected] of [
    ['application/vnd.example.sbom+json', [sbom.digest]],
    [emptyType, [byConfig.digest]],
    ['a/nother', []],
  ] as const) {
    const { answer, manifests } = await referrersOf(`${path}?artifactType=${encodeURIComponent(type)}`)
    assert.equal(answer.headers.get('oci-filters-applied'), 'artifactType')
    assert.deepEqual(
      manifests.map(({ digest }) => digest),
      expected,
    )
  }
  assert.equal((await referrersOf(path)).answer.headers.get('oci-filters-applied'), null)
})

test('listing referrers: must not be 404; without any the list is empty, and a digest that is none is 400', async () => {
  const { call } = registry()
  for (const name of ['referrers/all', 'referrers/never/pushed'])
    assert.deepEqual((await referrersOf(`/v2/${name}/referrers/${sha256(randomBytes(8))}`)).manifests, [])
  assert.deepEqual(refusal(await call('GET', '/v2/referrers/all/referrers/v1')), [400, 'DIGEST_INVALID'])
})

test('listing referrers: what refers to a manifest that is not there yet is listed, and stays when it comes and goes', async () => {
  const { push, put, call } = registry()
  const repository = 'referrers/early'
  const config = await push(repository, emptyJson, emptyType)
  const image = { schemaVersion: 2, mediaType: imageManifest, config, layers: [] }
  const bytes = Buffer.from(JSON.stringify(image))
  const subject = { mediaType: imageManifest, digest: sha256(bytes), size: bytes.length }
  const early = await put(repository, 'signature', { ...image, subject })
  const path = `/v2/${repository}/referrers/${subject.digest}`
  const listed = async () => (await referrersOf(path)).manifests.map(({ digest }) => digest)
  assert.deepEqual(await listed(), [early.digest])
  await put(repository, 'v1', image)
  assert.deepEqual(await listed(), [early.digest])
  assert.equal((await call('DELETE', `/v2/${repository}/manifests/${subject.digest}`)).status, 202)
  assert.deepEqual(await listed(), [early.digest])
  assert.equal((await call('DELETE', `/v2/${repository}/manifests/${early.digest}`)).status, 202)
  assert.deepEqual(await listed(), [])
  await put(repository, 'signature', { ...image, subject })
  assert.deepEqual(await listed(), [early.digest])
})

test('listing referrers: what is too much for one answer comes in pages, with a Link to the next', async () => {
  const { artifact, put, path } = await attached('referrers/pages')
  const digests: string[] = []
  for (let i = 0; i < 6; i++) {
    const annotations = { round: String(i), large: 'A'.repeat(1_500_000) }
    digests.push(
      (await put({ ...artifact, artifactType: i < 5 ? 'a/large' : 'a/nother', annotations })).digest,
    )
  }
  const follow = async (first: string) => {
    const found: string[] = []
    let pages = 0
    for (let next: string | undefined = first; next !== undefined; pages++) {
      const page = await referrersOf(next)
      found.push(...page.manifests.map(({ digest }) => digest))
      next = page.link
    }
    return { found, pages }
  }
  assert.deepEqual(await follow(path), { found: digests.toSorted(), pages: 3 })
  const filtered = await follow(`${path}?artifactType=a/large`)
  assert.deepEqual(filtered.found, digests.slice(0, 5).sort())
})
