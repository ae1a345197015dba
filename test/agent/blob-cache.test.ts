import assert from 'node:assert/strict'
import { readFile, readdir, stat, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import type { BlobCacheDeps } from '../../agent/blob-cache.ts'
import { NoSpaceError, openBlobCache } from '../../agent/blob-cache.ts'
import { openReleaseStore } from '../../agent/releases.ts'
import type { Digest } from '../../lib/protocol/digest.ts'
import { digestOf } from '../../lib/protocol/digest.ts'
import { parseReference } from '../../lib/protocol/reference.ts'
import { silentLog } from '../../lib/runtime/log.ts'
import { randomBlob, temporaryDirectory } from './engine/fixtures.ts'

const open = (directory: string, quotaBytes: number, deps: Partial<BlobCacheDeps> = {}) =>
  openBlobCache(
    { directory, quotaBytes, reserveBytes: 0 },
    { now: Date.now, log: silentLog(), keptFor: () => undefined, onEvict: async () => undefined, ...deps },
  )

type Cache = Awaited<ReturnType<typeof open>>

async function put(cache: Cache, text: string): Promise<Digest> {
  const bytes = Buffer.from(text)
  const digest = digestOf(bytes)
  const space = await cache.reserve(digest, bytes.length)
  await writeFile(cache.partialFile(digest), bytes)
  await cache.commit(digest)
  await space[Symbol.asyncDispose]()
  return digest
}

/** A cache whose clock a test moves, so that uses have an order. */
async function startCache(t: TestContext, quotaBytes: number, deps: Partial<BlobCacheDeps> = {}) {
  const directory = await temporaryDirectory(t)
  let time = Date.now()
  const cache = await open(directory, quotaBytes, { ...deps, now: () => (time += 120_000) })
  return { cache, directory }
}

test('a committed blob is read-only, found, and found again after a restart', async (t) => {
  const { cache, directory } = await startCache(t, 1000)
  const digest = await put(cache, 'hello')
  assert.equal((await cache.find(digest, 5))?.sizeBytes, 5)
  assert.equal((await stat(cache.file(digest))).mode & 0o777, 0o444)
  const again = await open(directory, 1000)
  assert.equal((await again.find(digest))?.sizeBytes, 5)
  assert.equal(again.usedBytes, 5)
})

test('what was used longest ago goes first when the quota is reached', async (t) => {
  const evicted: Digest[] = []
  const { cache } = await startCache(t, 10, {
    onEvict: async (digest) => {
      evicted.push(digest)
    },
  })
  const [one, two] = [await put(cache, 'aaaa'), await put(cache, 'bbbb')]
  await cache.touch(one)
  const three = await put(cache, 'cccc')
  assert.deepEqual(evicted, [two])
  assert.deepEqual(new Set(cache.list().map(({ digest }) => digest)), new Set([one, three]))
})

test('what is protected or in use is never evicted: a fetch without room is told so, and finds room later', async (t) => {
  const kept = new Set<Digest>()
  const { cache } = await startCache(t, 10, {
    keptFor: (digest) => (kept.has(digest) ? 'current' : undefined),
  })
  const one = await put(cache, 'aaaa')
  const two = await put(cache, 'bbbb')
  kept.add(one)
  const use = cache.hold(two)
  await assert.rejects(put(cache, 'cccc'), NoSpaceError)
  use[Symbol.dispose]()
  await put(cache, 'cccc')
  assert.ok(await cache.find(one))
  assert.equal(await cache.find(two), undefined)
})

test('space is set aside before a fetch, so that two fetches do not count on the same bytes', async (t) => {
  const { cache } = await startCache(t, 10)
  const first = await cache.reserve(digestOf(Buffer.from('1')), 6)
  await assert.rejects(cache.reserve(digestOf(Buffer.from('2')), 6), /quota/)
  assert.equal(cache.usedBytes, 6)
  await first[Symbol.asyncDispose]()
})

test('what a fetch was promised and did not write is free again', async (t) => {
  const { cache } = await startCache(t, 10)
  const one = await put(cache, 'aaaa')
  const refused = await cache.reserve(digestOf(Buffer.from('1')), 6)
  await refused[Symbol.asyncDispose]()
  assert.deepEqual([cache.usedBytes, cache.listParts()], [4, []])
  await put(cache, 'bbbbbb')
  assert.ok(await cache.find(one), 'nothing had to go for bytes that were never there')
})

test('what only the release before the current one needs goes last, but it goes', async (t) => {
  const kept = new Map<Digest, 'current' | 'previous'>()
  const { cache } = await startCache(t, 10, { keptFor: (digest) => kept.get(digest) })
  const current = await put(cache, 'aaaa')
  kept.set(current, 'current')
  const previous = await put(cache, 'bb')
  kept.set(previous, 'previous')
  const idle = await put(cache, 'cc')
  kept.set(await put(cache, 'dddd'), 'current')
  assert.ok(await cache.find(previous))
  assert.equal(await cache.find(idle), undefined)
  kept.set(await put(cache, 'ee'), 'current')
  assert.equal(await cache.find(previous), undefined)
  assert.ok(await cache.find(current))
})

test('a part that a crash left read-only is gone on with', async (t) => {
  const { cache, directory } = await startCache(t, 1000)
  const digest = digestOf(Buffer.from('hello'))
  await writeFile(cache.partialFile(digest), 'hel', { mode: 0o444 })
  const again = await open(directory, 1000)
  assert.equal((await stat(again.partialFile(digest))).mode & 0o777, 0o640)
})

test('a blob larger than the quota is refused in words', async (t) => {
  const { cache } = await startCache(t, 10)
  await assert.rejects(
    cache.reserve(digestOf(Buffer.from('1')), 11),
    /the blob has 11 bytes, the disk quota is 10/,
  )
})

test('a blob of the wrong size is set aside as a part and fetched again', async (t) => {
  const { cache, directory } = await startCache(t, 1000)
  const digest = await put(cache, 'hello')
  const again = await open(directory, 1000)
  await truncate(again.file(digest), 3).catch(async () => undefined)
  assert.equal(await again.find(digest, 5), undefined)
  assert.equal(await again.find(digest), undefined)
  assert.deepEqual(await readdir(join(directory, 'partial')), [digest.slice('sha256:'.length)])
})

test('a stored torrent is what seeding needs after a restart; a broken one is as good as none', async (t) => {
  const { cache, directory } = await startCache(t, 1000)
  const blob = randomBlob(300_000)
  const digest = digestOf(blob.bytes)
  await cache.putTorrent(digest, blob.torrent)
  await cache.putGrant(digest, { repository: 'team/web', peerToken: 'a.b.c' })
  const stored = await (await open(directory, 1000)).getTorrent(digest)
  assert.equal(stored?.repository, 'team/web')
  assert.equal(stored.peerToken, 'a.b.c')
  const { mode } = await stat(join(directory, 'torrents', `${blob.sha256}.json`))
  assert.equal(mode & 0o777, 0o600, 'it holds a secret')
  assert.equal(stored.metainfo.infoHash, blob.metainfo.infoHash)
  await writeFile(join(directory, 'torrents', `${blob.sha256}.torrent`), 'd4:infoe')
  assert.equal(await cache.getTorrent(digest), undefined)
})

test('a release is exposed by name; the one before stays as previous, older ones go', async (t) => {
  const { cache, directory } = await startCache(t, 1000)
  const releases = await openReleaseStore(join(directory, 'releases'), cache)
  const reference = parseReference('team/web:latest')
  const versions = []
  for (const text of ['one', 'two', 'three']) {
    const digest = await put(cache, text)
    const manifest = digestOf(Buffer.from(`manifest ${text}`))
    versions.push(manifest)
    await releases.expose(reference, manifest, [{ digest, sizeBytes: text.length, name: 'build.tar' }], 2)
  }
  const base = join(directory, 'releases', 'team+web', 'latest')
  const { readFile } = await import('node:fs/promises')
  assert.equal(await readFile(join(base, 'current', 'build.tar'), 'utf8'), 'three')
  assert.equal(await readFile(join(base, 'previous', 'build.tar'), 'utf8'), 'two')
  assert.equal((await readdir(base)).length, 4)
  const again = await openReleaseStore(join(directory, 'releases'), cache)
  assert.equal(again.current('team/web:latest')?.digest, versions[2])
  assert.equal(again.list().length, 2)
})

test('an exposure and a withdrawal at once end with what is there, whichever comes first', async (t) => {
  for (let round = 0; round < 40; round++) {
    const { cache, directory } = await startCache(t, 1000)
    const store = await openReleaseStore(join(directory, 'releases'), cache)
    const [old, fresh] = [await put(cache, 'old'), await put(cache, 'fresh')]
    const release = (blob: Digest) => [{ digest: blob, sizeBytes: blob === old ? 3 : 5, name: 'file' }]
    const reference = parseReference('web:latest')
    await store.expose(reference, digestOf(Buffer.from('one')), release(old), 1)
    const exposing = store.expose(reference, digestOf(Buffer.from('two')), release(fresh), 1)
    for (let wait = 0; wait < round % 10; wait++) await stat(directory)
    await Promise.all([exposing, store.withdraw(old)])
    const current = store.current('web:latest')
    assert.equal(await readFile(join(current?.path ?? '', 'file'), 'utf8'), 'fresh')
    assert.equal(await readFile(join(directory, 'releases/web/latest/current/file'), 'utf8'), 'fresh')
  }
})

test('a withdrawn blob takes its exposure with it', async (t) => {
  const { cache, directory } = await startCache(t, 1000)
  const releases = await openReleaseStore(join(directory, 'releases'), cache)
  const digest = await put(cache, 'one')
  await releases.expose(parseReference('web:1'), digest, [{ digest, sizeBytes: 3, name: 'a' }], 1)
  await releases.withdraw(digest)
  assert.equal(releases.current('web:1'), undefined)
  assert.deepEqual(await readdir(join(directory, 'releases', 'web')), [])
})
