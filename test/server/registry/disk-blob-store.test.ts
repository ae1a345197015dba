import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { cp, mkdir, mkdtemp, readdir, rename, rm, stat, truncate, utimes, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { digestHex, digestOf } from '../../../lib/protocol/digest.ts'
import { infoHashToHex } from '../../../lib/protocol/infohash.ts'
import { silentLog } from '../../../lib/runtime/log.ts'
import type { BlobStore } from '../../../server/registry/blob-store.ts'
import { startDiskBlobStore } from '../../../server/registry/disk-blob-store.ts'
import { until } from '../../support/until.ts'
import { append, blobStoreContract, push } from './blob-store.contract.ts'

for (const [name, settleMs] of [
  ['disk', undefined],
  ['shared disk', 20],
] as const)
  blobStoreContract(name, async (t) => {
    const directory = await temporaryDirectory(t)
    let aheadMs = 0
    const now = () => Date.now() + aheadMs
    return {
      store: await start(t, directory, { now, settleMs }),
      reopen: () => start(t, directory, { now, settleMs }),
      now,
      advance: (ms) => (aheadMs += ms),
    }
  })

test('disk: a blob that was on its way out when the server ended is gone after the next start, with the name of its swarm', async (t) => {
  const directory = await temporaryDirectory(t)
  const store = await start(t, directory)
  const [digest, again] = [
    await push(store, 'web', randomBytes(300_000)),
    await push(store, 'web', randomBytes(300_001)),
  ]
  const place = (hex: string) => join(directory, 'blobs', 'sha256', hex.slice(0, 2), hex)
  await mkdir(join(directory, 'trash'), { recursive: true })
  await rename(place(digestHex(digest)), join(directory, 'trash', `${digestHex(digest)}-1`))
  // Half of one, and it was pushed again since.
  await mkdir(join(directory, 'trash', `${digestHex(again)}-2`))
  await cp(join(place(digestHex(again)), 'info'), join(directory, 'trash', `${digestHex(again)}-2`, 'info'))
  const after = await start(t, directory)
  assert.deepEqual(await readdir(join(directory, 'trash')), [])
  assert.equal((await readdir(join(directory, 'infohashes'))).length, 1)
  const torrent = await after.torrentOf(again)
  assert.ok(torrent)
  assert.equal((await after.blobOfInfoHash(infoHashToHex(torrent.infoHash)))?.digest, again)
})

test('disk: what a write left that was killed long ago is gone after the next start; one under way is left alone', async (t) => {
  const directory = await temporaryDirectory(t)
  const store = await start(t, directory)
  const manifest = Buffer.from('{}')
  await store.putManifest('team/web', { digest: digestOf(manifest), mediaType: 'a/b', bytes: manifest })
  await store.putTag('team/web', 'v1', digestOf(manifest))
  const leftovers = ['infohashes', 'repositories/team/web/_manifests', 'repositories/team/web/_tags'].map(
    (part) => join(directory, part, '.x.0123456789ab.tmp'),
  )
  const underWay = join(directory, 'infohashes', '.y.0123456789ab.tmp')
  for (const file of [...leftovers, underWay]) await writeFile(file, 'half')
  const old = new Date(Date.now() - 2 * 3_600_000)
  for (const file of leftovers) await utimes(file, old, old)
  const after = await start(t, directory)
  await until('the leftovers are gone', async () =>
    (await Promise.all(leftovers.map(isThere))).every((there) => !there),
  )
  assert.ok(await isThere(underWay))
  assert.equal((await after.listTags('team/web'))[0]?.tag, 'v1')
  assert.ok(await after.getManifest('team/web', digestOf(manifest)))
})

test('disk: a manifest of a name that this version does not know is not passed over', async (t) => {
  const directory = await temporaryDirectory(t)
  const store = await start(t, directory)
  await store.putManifest('web', {
    digest: digestOf(Buffer.from('{}')),
    mediaType: 'a/b',
    bytes: Buffer.from('{}'),
  })
  await writeFile(join(directory, 'repositories', 'web', '_manifests', 'a'.repeat(100)), 'a/b\n{}')
  await assert.rejects(Array.fromAsync(store.scanManifests('web')), /Cannot tell what .*a{100} is/)
})

test('disk: uploads that nobody touches give way to new ones at the bound, and can be resumed', async (t) => {
  const directory = await temporaryDirectory(t)
  let nowMs = 1_000_000
  const store = await start(t, directory, { uploadsMax: 2, now: () => nowMs })
  const old = await store.startUpload('web', undefined)
  await append(old, Buffer.from('first'))
  await store.startUpload('web', undefined)
  await assert.rejects(store.startUpload('web', undefined), { status: 429 })
  nowMs += 60_000
  await store.startUpload('web', undefined)
  const resumed = await store.resumeUpload('web', old.id)
  assert.equal(resumed?.offset, 5)
})

test('disk: of many uploads that start at once no more are accepted than may be open', async (t) => {
  const store = await start(t, await temporaryDirectory(t), { uploadsMax: 5 })
  const starts = await Promise.allSettled(
    Array.from({ length: 20 }, () => store.startUpload('web', undefined)),
  )
  const refused = starts.filter((one) => one.status === 'rejected')
  assert.equal(starts.length - refused.length, 5)
  for (const { reason } of refused) assert.equal((reason as { status?: number }).status, 429)
  assert.equal(store.uploadsOpen, 5)
})

test('disk: the referrers of a repository from before they were marked are found among its manifests', async (t) => {
  const directory = await temporaryDirectory(t)
  const before = await start(t, directory)
  const subject = digestOf(Buffer.from('subject'))
  const put = async (store: BlobStore, round: number) => {
    const bytes = Buffer.from(
      JSON.stringify({ round, subject: { mediaType: 'a/b', digest: subject, size: 7 } }),
    )
    await store.putManifest('web', { digest: digestOf(bytes), mediaType: 'a/b', bytes })
    return digestOf(bytes)
  }
  const old = [await put(before, 1), await put(before, 2)]
  await before.putManifest('web', {
    digest: subject,
    mediaType: 'text/plain',
    bytes: Buffer.from('not JSON'),
  })
  const marks = join(directory, 'repositories', 'web', '_referrers')
  await rm(marks, { recursive: true })
  // What a server leaves that was killed while it made them.
  await mkdir(join(`${marks}.new`, 'half'), { recursive: true })
  const listing = await start(t, directory)
  assert.deepEqual(await listing.listReferrers('web', subject), old.toSorted())
  await rm(marks, { recursive: true })
  const pushing = await start(t, directory)
  const fresh = await put(pushing, 3)
  assert.deepEqual(await pushing.listReferrers('web', subject), [...old, fresh].sort())
})

test('disk: an upload whose session was cut short by a power failure is one that is not there', async (t) => {
  const directory = await temporaryDirectory(t)
  const before = await start(t, directory)
  const { id } = await before.startUpload('web', undefined)
  await truncate(join(directory, 'uploads', id, 'session'), 5)
  assert.equal(await (await start(t, directory)).resumeUpload('web', id), undefined)
})

test('disk: a blob beyond the largest is refused, declared or not, and an upload that is left is dropped in time', async (t) => {
  const directory = await temporaryDirectory(t)
  let nowMs = Date.now()
  const store = await start(t, directory, { blobMaxBytes: 1000, now: () => nowMs })
  await assert.rejects(store.startUpload('web', 1001), { status: 413 })
  const upload = await store.startUpload('web', undefined)
  await assert.rejects(append(upload, Buffer.alloc(1001)), { status: 413 })
  nowMs += 48 * 3_600_000
  await start(t, directory, { now: () => nowMs })
  assert.deepEqual(await readdir(join(directory, 'uploads')), [])
})

async function start(
  t: TestContext,
  directory: string,
  options: {
    uploadsMax?: number
    blobMaxBytes?: number
    settleMs?: number | undefined
    now?: () => number
  } = {},
): Promise<BlobStore> {
  const store = await startDiskBlobStore({
    directory,
    blobMaxBytes: 2 ** 40,
    uploadsMax: 100,
    uploadTtlMs: 24 * 3_600_000,
    diskReserveBytes: 0,
    now: Date.now,
    log: silentLog(),
    ...options,
  })
  t.after(() => store[Symbol.asyncDispose]())
  return store
}

async function temporaryDirectory(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-blob-store-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return directory
}

async function isThere(file: string): Promise<boolean> {
  return stat(file).then(
    () => true,
    () => false,
  )
}
