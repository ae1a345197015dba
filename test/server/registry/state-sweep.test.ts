import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { digestOf } from '../../../lib/protocol/digest.ts'
import { silentLog } from '../../../lib/runtime/log.ts'
import { startDiskBlobStore } from '../../../server/registry/disk-blob-store.ts'
import { createBootstrapToken, sweepBootstrapTokens } from '../../../server/registry/enrolment.ts'
import { sweepTokens } from '../../../server/registry/tokens.ts'
import { createTorrentReferrers } from '../../../server/registry/torrent-referrers.ts'
import { openSqliteStateStore } from '../../../server/state/sqlite-state-store.ts'
import { push } from './blob-store.contract.ts'

const day = 86_400_000
const { signal } = new AbortController()
const mediaType = 'application/vnd.oci.image.manifest.v1+json'

test('tokens that expired, and bootstrap tokens that are used up, are forgotten; the others stay', async (t) => {
  const { state } = await open(t)
  const now = () => Date.parse('2026-01-01T00:00:00Z')
  const tokens = Array.from({ length: 2500 }, (_, i) => `tokens/${String(i).padStart(5, '0')}`)
  for (const [i, key] of tokens.entries())
    await state.put(key, {
      name: 'x',
      scopes: [],
      createdAt: new Date(now() - 10 * day).toISOString(),
      expiresAt: new Date(now() + (i % 5 === 0 ? day : -day)).toISOString(),
    })
  const bootstrap = (id: string, usesMax: number | undefined, ttlMs: number) =>
    createBootstrapToken({ state, now }, { id, places: 'any', usesMax, ttlMs })
  await bootstrap('aa', undefined, day)
  await bootstrap('bb', 1, day)
  await bootstrap('cc', 0, day)
  await bootstrap('dd', undefined, -day)
  assert.equal(await sweepTokens(state, now(), signal), 2000)
  assert.equal((await state.list('tokens/')).length, 500)
  assert.equal(await sweepBootstrapTokens(state, now(), signal), 2)
  assert.deepEqual(
    (await state.list('bootstrap/')).map(({ key }) => key),
    ['bootstrap/aa', 'bootstrap/bb'],
  )
})

test('notes of computed torrents go with their manifests and blobs, and come back with them', async (t) => {
  const { state, store } = await open(t)
  const torrents = createTorrentReferrers({ store, state, publicUrl: 'http://registry.example' })
  const release = async (repository: string, bytes: Buffer) => {
    const layer = await push(store, repository, bytes)
    const manifest = Buffer.from(
      JSON.stringify({ schemaVersion: 2, layers: [{ mediaType, digest: layer, size: bytes.length }] }),
    )
    const digest = digestOf(manifest)
    await store.putManifest(repository, { digest, mediaType, bytes: manifest })
    const artifact = await torrents.of(repository, digest)
    assert.ok(artifact)
    return { layer, digest, artifact: artifact.digest }
  }
  const bytes = randomBytes(400_000)
  const [kept, gone] = [await release('a', randomBytes(400_000)), await release('b', bytes)]
  assert.equal(await torrents.sweep(signal), 0)
  await store.deleteManifests('b', [gone.digest])
  await store.unlinkBlob('b', gone.layer, Infinity)
  await store.deleteBlob(gone.layer, Infinity)
  assert.equal(await torrents.sweep(signal), 2)
  assert.equal(await torrents.sweep(signal), 0)
  assert.ok(await torrents.manifest('a', kept.artifact))
  assert.equal(await torrents.manifest('b', gone.artifact), undefined)
  await release('b', bytes)
  assert.ok(await torrents.manifest('b', gone.artifact))
})

async function open(t: TestContext) {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-state-sweep-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const state = await openSqliteStateStore({ file: join(directory, 'state.sqlite') })
  t.after(() => state[Symbol.asyncDispose]())
  const store = await startDiskBlobStore({
    directory,
    blobMaxBytes: 2 ** 30,
    uploadsMax: 4,
    uploadTtlMs: day,
    diskReserveBytes: 0,
    now: Date.now,
    log: silentLog(),
  })
  t.after(() => store[Symbol.asyncDispose]())
  return { state, store }
}
