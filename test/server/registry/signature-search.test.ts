import assert from 'node:assert/strict'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import type { Digest } from '../../../lib/protocol/digest.ts'
import { digestOf } from '../../../lib/protocol/digest.ts'
import { attachingMaxBytes, bundleType } from '../../../lib/protocol/dsse.ts'
import type { ReleaseIdentity } from '../../../lib/protocol/statement.ts'
import { releaseStatement } from '../../../lib/protocol/statement.ts'
import { monotonicMs } from '../../../lib/runtime/clock.ts'
import { silentLog } from '../../../lib/runtime/log.ts'
import type { ReleaseSigner } from '../../../lib/token/release-keys.ts'
import { generateReleaseKeys, parseReleaseKeys } from '../../../lib/token/release-keys.ts'
import { signStatement } from '../../../lib/token/release-signature.ts'
import { startDiskBlobStore } from '../../../server/registry/disk-blob-store.ts'
import { createSignatureSearch } from '../../../server/registry/signature-search.ts'
import { push } from './blob-store.contract.ts'
import { createPrivateKey } from 'node:crypto'

const mediaType = 'application/vnd.oci.image.manifest.v1+json'
const release: ReleaseIdentity = { repository: 'web', tag: '1', digest: digestOf(Buffer.from('a release')) }

test('a signature counts for its key, its release and its tag, where it can be read', async (t) => {
  const { store, attach } = await open(t)
  const [signer, other] = [newSigner(), newSigner()]
  let hours = 0
  const search = createSignatureSearch({ store, monotonicMs: () => monotonicMs() + hours * 3_600_000 })
  const find = async (wanted: ReleaseIdentity, key: ReleaseSigner) => {
    hours++
    return search.find(wanted, key)
  }
  await attach(bundleFor(release, other))
  await attach(bundleFor({ ...release, digest: digestOf(Buffer.from('another')) }, signer))
  await attach(bundleFor({ ...release, repository: 'db' }, signer))
  await attach(Buffer.from('{'))
  const good = bundleFor(release, signer)
  await attach(good, { artifactType: 'application/spdx+json' })
  await attach(good, { annotations: { padding: 'x'.repeat(attachingMaxBytes) } })
  await attach(good, { layers: [] })
  assert.equal(await find(release, signer), undefined)
  const attached = await attach(good)
  for (const tag of ['1', undefined]) assert.equal(await find({ ...release, tag }, signer), attached)
  assert.equal(await find({ ...release, tag: '2' }, signer), undefined)
  assert.equal(await find({ ...release, repository: 'db' }, signer), undefined)
  assert.notEqual(await find(release, other), attached)
  // What cannot be read now may come back.
  await store.unlinkBlob('web', digestOf(good), Infinity)
  assert.equal(await find(release, signer), undefined)
  await push(store, 'web', good)
  assert.equal(await find(release, signer), attached)
  await store.deleteManifests('web', [attached])
  assert.equal(await find(release, signer), undefined)
})

test('a search ends when its time is up, and goes on where it was; what was no good is not read again', async (t) => {
  const { store, attach } = await open(t)
  const signer = newSigner()
  const all: Digest[] = []
  for (let i = 0; i < 9; i++) all.push(await attach(bundleFor({ ...release, tag: String(i) }, signer)))
  all.sort()
  const read: string[] = []
  let nowMs = 0
  const search = createSignatureSearch({
    store: {
      ...store,
      getManifest: async (repository, digest) => {
        read.push(digest)
        nowMs += 4000
        return store.getManifest(repository, digest)
      },
    },
    monotonicMs: () => nowMs,
  })
  const absent = { ...release, tag: 'absent' }
  const goesOn = { status: 503, message: /9 things refer to sha256:\w+, and the search goes on/ }
  await assert.rejects(search.find(absent, signer), goesOn)
  assert.deepEqual(read, all.slice(0, 3))
  await assert.rejects(search.find(absent, signer), goesOn)
  assert.deepEqual(read.slice(3), all.slice(3, 6))
  assert.equal(await search.find(absent, signer), undefined)
  assert.deepEqual(read.slice(6), all.slice(6))
  // It took three times 4 s.
  const late = await attach(bundleFor(absent, signer))
  nowMs += 120_000 - 1
  assert.equal(await search.find(absent, signer), undefined)
  nowMs += 1
  assert.equal(await search.find(absent, signer), late)
  assert.deepEqual(read.slice(9), [late])
})

test('the same question asked by many is one search', async (t) => {
  const { store, attach } = await open(t)
  const signer = newSigner()
  const attached = await attach(bundleFor(release, signer))
  let lists = 0
  const search = createSignatureSearch({
    store: {
      ...store,
      listReferrers: async (repository, digest) => {
        lists++
        return store.listReferrers(repository, digest)
      },
    },
    monotonicMs,
  })
  const found = await Promise.all(Array.from({ length: 2000 }, () => search.find(release, signer)))
  assert.deepEqual([...new Set(found)], [attached])
  assert.equal(lists, 1)
  // Different ones wait in line, which has an end.
  const asked = await Promise.allSettled(
    Array.from({ length: 1010 }, (_, i) => search.find({ ...release, tag: `t${i}` }, signer)),
  )
  const refused = asked.filter(({ status }) => status === 'rejected')
  assert.equal(refused.length, 6)
  assert.equal(await search.find(release, signer), attached)
})

function newSigner(): ReleaseSigner {
  const { privatePem, publicPem } = generateReleaseKeys('ES256')
  const [key] = parseReleaseKeys(publicPem)
  assert.ok(key)
  return { ...key, privateKey: createPrivateKey(privatePem) }
}

function bundleFor({ repository, tag, digest }: ReleaseIdentity, signer: ReleaseSigner): Buffer {
  const tags = tag === undefined ? [] : [tag]
  const provenance = { buildType: 'urn:test', builderId: 'urn:test' }
  return signStatement(releaseStatement({ repository, tags, digest, files: [], provenance }), signer)
}

/** A store whose repository `web` has what is attached to the release. */
async function open(t: TestContext) {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-signature-search-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const store = await startDiskBlobStore({
    directory,
    blobMaxBytes: 2 ** 30,
    uploadsMax: 4,
    uploadTtlMs: 60_000,
    diskReserveBytes: 0,
    now: Date.now,
    log: silentLog(),
  })
  t.after(() => store[Symbol.asyncDispose]())
  return {
    store,
    attach: async (bundle: Buffer, members: object = {}): Promise<Digest> => {
      const bytes = Buffer.from(
        JSON.stringify({
          schemaVersion: 2,
          mediaType,
          artifactType: bundleType,
          layers: [{ mediaType: bundleType, digest: await push(store, 'web', bundle), size: bundle.length }],
          subject: { mediaType, digest: release.digest, size: 9 },
          ...members,
        }),
      )
      await store.putManifest('web', { digest: digestOf(bytes), mediaType, bytes })
      return digestOf(bytes)
    },
  }
}
