import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { setTimeout } from 'node:timers/promises'
import type { ContentDigest, Digest } from '../../../lib/protocol/digest.ts'
import { digestHex, digestOf, parseContentDigest } from '../../../lib/protocol/digest.ts'
import { infoHashToHex } from '../../../lib/protocol/infohash.ts'
import { pieceLengthFor, swarmLengthMin } from '../../../lib/protocol/metainfo.ts'
import type { BlobStore, BlobUpload } from '../../../server/registry/blob-store.ts'

/** A store that a test may close and open again over the same data. */
export interface StoreUnderTest {
  readonly store: BlobStore
  /** As after a crash: nothing is told to the old store. @returns a new one over the same data */
  readonly reopen: () => Promise<BlobStore>
  /** The store's clock. */
  readonly now: () => number
  /** Time goes by for the store. */
  readonly advance: (ms: number) => void
}

/** What blob-store.ts promises; run by every implementation. */
export function blobStoreContract(name: string, start: (t: TestContext) => Promise<StoreUnderTest>): void {
  test(`${name}: a blob comes back as it was pushed, whole and in parts, with the torrent of its bytes`, async (t) => {
    const { store } = await start(t)
    for (const size of [0, 1, swarmLengthMin, swarmLengthMin + 1, 3_000_000]) {
      const bytes = randomBytes(size)
      // Declared, not declared, declared wrong: the torrent is the same.
      for (const [i, hint] of [size, undefined, size + 1].entries()) {
        const upload = await store.startUpload(`repo${i}`, hint)
        await append(upload, bytes)
        assert.deepEqual(await upload.commit(digestOf(bytes)), { digest: digestOf(bytes), sizeBytes: size })
        await assertTorrent(store, bytes)
      }
      const stat = await store.statBlob('repo0', digestOf(bytes))
      assert.equal(stat?.sizeBytes, size)
      assert.ok((await read(store, digestOf(bytes), 0, size)).equals(bytes))
      const [from, to] = [Math.floor(size / 3), Math.floor(size / 2)]
      assert.ok((await read(store, digestOf(bytes), from, to)).equals(bytes.subarray(from, to)))
    }
  })

  test(`${name}: bytes with another digest are refused, and the session is gone`, async (t) => {
    const { store } = await start(t)
    const upload = await store.startUpload('web', undefined)
    await append(upload, Buffer.from('what came'))
    const wanted = digestOf(Buffer.from('what was promised'))
    await assert.rejects(upload.commit(wanted), { code: 'DIGEST_INVALID' })
    assert.equal(await store.resumeUpload('web', upload.id), undefined)
    assert.equal(await store.statBlob('web', wanted), undefined)
  })

  test(`${name}: what came of an upload can be read while more comes`, async (t) => {
    const { store } = await start(t)
    const bytes = randomBytes(2_500_000)
    const upload = await store.startUpload('web', bytes.length)
    await append(upload, bytes.subarray(0, 1_500_000))
    const signal = new AbortController().signal
    const parts = await Array.fromAsync(upload.read({ start: 500_000, end: upload.offset }, signal), (part) =>
      Buffer.from(part),
    )
    assert.ok(Buffer.concat(parts).equals(bytes.subarray(500_000, 1_500_000)))
    await append(upload, bytes.subarray(1_500_000))
    await upload.commit(digestOf(bytes))
    await assert.rejects(Array.fromAsync(upload.read({ start: 0, end: 1 }, signal)), { code: 'ENOENT' })
    assert.ok((await read(store, digestOf(bytes), 0, bytes.length)).equals(bytes))
  })

  test(`${name}: many readers at once, fast, slow and leaving early, each get their own bytes`, async (t) => {
    const { store } = await start(t)
    const blobs = await Promise.all(
      Array.from({ length: 4 }, async () => {
        const bytes = randomBytes(1_300_000)
        const upload = await store.startUpload('web', bytes.length)
        await append(upload, bytes)
        await upload.commit(digestOf(bytes))
        return bytes
      }),
    )
    await Promise.all(
      Array.from({ length: 40 }, async (_, i) => {
        const bytes = blobs[i % blobs.length] ?? assert.fail()
        const [start, end] = [i * 1000, bytes.length - i]
        let at = start
        const chunks = store.readBlob(digestOf(bytes), { start, end }, new AbortController().signal)
        for await (const chunk of chunks) {
          if (i % 2 === 0) await setTimeout(i / 4)
          assert.ok(
            bytes.subarray(at, at + chunk.length).equals(chunk),
            'the bytes of this blob, at this place',
          )
          at += chunk.length
          if (i % 5 === 0) return
        }
        assert.equal(at, end)
      }),
    )
  })

  test(`${name}: uploads of the same blob at once end as one`, async (t) => {
    const { store } = await start(t)
    const bytes = randomBytes(700_000)
    const uploads = await Promise.all(
      Array.from({ length: 8 }, (_, i) => store.startUpload(`repo${i}`, bytes.length)),
    )
    await Promise.all(
      uploads.map(async (upload) => {
        await append(upload, bytes)
        await upload.commit(digestOf(bytes))
      }),
    )
    for (let i = 0; i < 8; i++) assert.ok(await store.statBlob(`repo${i}`, digestOf(bytes)))
    assert.ok((await read(store, digestOf(bytes), 0, bytes.length)).equals(bytes))
  })

  test(`${name}: a blob that is named by SHA-512 is found by that name alone, and has no torrent`, async (t) => {
    const { store, ...underTest } = await start(t)
    const bytes = randomBytes(600_000)
    const digest = parseContentDigest(`sha512:${createHash('sha512').update(bytes).digest('hex')}`)
    for (const repository of ['web', 'again']) {
      const upload = await store.startUpload(repository, bytes.length)
      await append(upload, bytes)
      assert.deepEqual(await upload.commit(digest), { digest, sizeBytes: bytes.length })
    }
    const after = await underTest.reopen()
    assert.equal((await after.statBlob('web', digest))?.sizeBytes, bytes.length)
    assert.ok((await read(after, digest, 0, bytes.length)).equals(bytes))
    assert.equal(await after.statBlob('web', digestOf(bytes)), undefined)
    assert.equal(await after.torrentOf(digest), undefined)
    const wrong = await after.startUpload('web', undefined)
    await append(wrong, Buffer.from('other bytes'))
    await assert.rejects(wrong.commit(digest), { code: 'DIGEST_INVALID' })
  })

  test(`${name}: referrers are the manifests whose subject it is, before it is there, after a crash, and until they go`, async (t) => {
    const { store, ...underTest } = await start(t)
    const subject = digestOf(Buffer.from('subject'))
    const referrer = (round: number) => {
      const bytes = Buffer.from(
        JSON.stringify({ round, subject: { mediaType: 'a/b', digest: subject, size: 7 } }),
      )
      return { digest: digestOf(bytes), mediaType: 'a/b', bytes }
    }
    const all = [1, 2, 3].map(referrer)
    assert.deepEqual(await store.listReferrers('web', subject), [])
    await Promise.all(all.map((manifest) => store.putManifest('web', manifest)))
    await store.putManifest('web', { digest: subject, mediaType: 'a/b', bytes: Buffer.from('subject') })
    const digests = all.map(({ digest }) => digest).sort()
    assert.deepEqual(await store.listReferrers('web', subject), digests)
    assert.deepEqual(await store.listReferrers('other', subject), [])
    const after = await underTest.reopen()
    assert.deepEqual(await after.listReferrers('web', subject), digests)
    const [first, second] = digests
    assert.ok(first && second)
    assert.equal(await after.deleteManifests('web', [first]), true)
    assert.deepEqual(await after.listReferrers('web', subject), digests.slice(1))
    // At once, and over and over: a manifest that is there is among them.
    const again = all.find(({ digest }) => digest === second)
    assert.ok(again)
    for (let round = 0; round < 20; round++)
      await Promise.all([after.deleteManifests('web', [second]), after.putManifest('web', again)])
    const there = (await after.getManifest('web', second)) !== undefined
    assert.equal((await after.listReferrers('web', subject)).includes(second), there)
  })

  test(`${name}: repositories are there from the first push, and those that hold a blob are found`, async (t) => {
    const { store } = await start(t)
    assert.equal(await store.hasRepository('team/app'), false)
    const digest = await push(store, 'team/app', Buffer.from('layer'))
    assert.equal(await store.hasRepository('team/app'), true)
    assert.equal(await store.hasRepository('team'), false)
    await store.mountBlob('other', digest, 'team/app')
    assert.deepEqual((await store.repositoriesWith(digest)).sort(), ['other', 'team/app'])
    assert.deepEqual(await store.repositoriesWith(digestOf(Buffer.from('nothing'))), [])
  })

  test(`${name}: a blob is readable only where it was pushed or mounted`, async (t) => {
    const { store } = await start(t)
    const digest = await push(store, 'team/app', Buffer.from('layer'))
    assert.equal(await store.statBlob('other', digest), undefined)
    assert.equal(await store.mountBlob('other', digest, 'nowhere'), false)
    assert.equal(await store.mountBlob('other', digest, 'team/app'), true)
    assert.ok(await store.statBlob('other', digest))
  })

  test(`${name}: what is written of a stream that stands still is told`, async (t) => {
    const { store } = await start(t)
    const bytes = randomBytes(2_500_000)
    const upload = await store.startUpload('web', bytes.length)
    const goOn = Promise.withResolvers<undefined>()
    const told = Promise.withResolvers<number>()
    async function* halting() {
      yield bytes.subarray(0, 2_200_000)
      await goOn.promise
      yield bytes.subarray(2_200_000)
    }
    const appended = upload.append(halting(), new AbortController().signal, () => {
      if (upload.offset >= 2_000_000) told.resolve(upload.offset)
    })
    assert.ok((await told.promise) <= 2_200_000)
    goOn.resolve(undefined)
    await appended
    await upload.commit(digestOf(bytes))
  })

  test(`${name}: a stream that breaks leaves what came, and the upload goes on from there`, async (t) => {
    const { store } = await start(t)
    const bytes = randomBytes(2_500_000)
    const upload = await store.startUpload('web', bytes.length)
    await assert.rejects(
      upload.append(breaking(bytes.subarray(0, 1_300_000)), new AbortController().signal),
      /the cable/,
    )
    assert.equal(upload.offset, 1_300_000)
    await append(upload, bytes.subarray(upload.offset))
    await upload.commit(digestOf(bytes))
    await assertTorrent(store, bytes)
  })

  test(`${name}: one request at a time uses an upload`, async (t) => {
    const { store } = await start(t)
    const upload = await store.startUpload('web', undefined)
    const gate = Promise.withResolvers<undefined>()
    const first = upload.append(slowly(gate.promise), new AbortController().signal)
    await assert.rejects(append(upload, Buffer.from('b')), /another request/)
    gate.resolve(undefined)
    await first
    assert.equal(upload.offset, 1)
  })

  test(`${name}: what was acknowledged is there after a crash, and an upload is resumed by all who ask at once`, async (t) => {
    const { store, ...underTest } = await start(t)
    const blob = randomBytes(400_000)
    const manifest = { digest: digestOf(blob), mediaType: 'text/plain', bytes: Buffer.from('{}\n{}') }
    await push(store, 'web', blob)
    await store.putManifest('web', manifest)
    await store.putTag('web', 'latest', manifest.digest)
    const bytes = randomBytes(1_500_000)
    const upload = await store.startUpload('web', bytes.length)
    await append(upload, bytes.subarray(0, 1_000_000))
    const after = await underTest.reopen()
    assert.ok((await read(after, digestOf(blob), 0, blob.length)).equals(blob))
    assert.deepEqual(await after.getManifest('web', manifest.digest), manifest)
    assert.equal((await after.getTag('web', 'latest'))?.digest, manifest.digest)
    assert.equal(await after.resumeUpload('other', upload.id), undefined)
    assert.equal(await after.resumeUpload('web', 'no such upload'), undefined)
    const [resumed, ...others] = await Promise.all(
      Array.from({ length: 5 }, () => after.resumeUpload('web', upload.id)),
    )
    assert.ok(resumed)
    assert.deepEqual(
      [resumed, ...others].map((one) => one?.offset),
      Array(5).fill(1_000_000),
    )
    await append(resumed, bytes.subarray(1_000_000))
    await resumed.commit(digestOf(bytes))
    await assertTorrent(after, bytes)
  })

  test(`${name}: a cancelled upload is gone`, async (t) => {
    const { store } = await start(t)
    const upload = await store.startUpload('web', undefined)
    await append(upload, Buffer.from('a'))
    await upload.cancel()
    assert.equal(await store.resumeUpload('web', upload.id), undefined)
  })

  test(`${name}: tags move, are listed in order, and end; manifests are of their repository alone`, async (t) => {
    const { store } = await start(t)
    const manifest = (text: string) => ({
      digest: digestOf(Buffer.from(text)),
      mediaType: 'application/vnd.oci.image.manifest.v1+json',
      bytes: Buffer.from(text),
    })
    const [one, two] = [manifest('1'), manifest('2')]
    for (const repository of ['b/c', 'a', 'b']) await store.putManifest(repository, one)
    await store.putManifest('a', two)
    assert.deepEqual(await store.listRepositories(), ['a', 'b', 'b/c'])
    assert.deepEqual((await store.listManifests('a')).sort(), [one.digest, two.digest].sort())
    assert.equal(await store.getManifest('b', two.digest), undefined)
    for (const tag of ['v2', 'V1', 'latest']) await store.putTag('a', tag, one.digest)
    await store.putTag('a', 'latest', two.digest)
    assert.deepEqual(
      (await store.listTags('a')).map(({ tag, digest }) => [tag, digest]),
      [
        ['V1', one.digest],
        ['latest', two.digest],
        ['v2', one.digest],
      ],
    )
    assert.deepEqual([await store.deleteTag('a', 'v2'), await store.deleteTag('a', 'v2')], [true, false])
    assert.equal(await store.getTag('a', 'v2'), undefined)
    assert.deepEqual(
      [await store.deleteManifests('a', [one.digest]), await store.deleteManifests('a', [one.digest])],
      [true, false],
    )
    assert.equal(await store.getManifest('a', one.digest), undefined)
    assert.ok(await store.getManifest('b', one.digest))
  })

  test(`${name}: what is there can be scanned, with when it was used last`, async (t) => {
    const { store, now, advance } = await start(t)
    const startMs = now()
    const digest = await push(store, 'team/app', Buffer.from('layer'))
    const alone = await push(store, 'only/blobs', randomBytes(300_000))
    advance(5000)
    await store.mountBlob('web', digest, 'team/app')
    const manifest = { digest: digestOf(Buffer.from('{}')), mediaType: 'a/b', bytes: Buffer.from('{}') }
    await store.putManifest('web', manifest)
    assert.deepEqual((await all(store.scanRepositories())).sort(), ['only/blobs', 'team/app', 'web'])
    assert.deepEqual(await store.listRepositories(), ['web'])
    const blobs = await all(store.scanBlobs())
    assert.deepEqual(
      new Map(blobs.map((blob) => [blob.digest, blob.sizeBytes])),
      new Map([
        [digest, 5],
        [alone, 300_000],
      ]),
    )
    for (const { digest: its, usedAtMs } of blobs)
      assert.ok(
        its === digest ? usedAtMs >= startMs + 5000 : usedAtMs < startMs + 5000,
        'a mount is a use of the bytes',
      )
    const [before] = await all(store.scanLinks('team/app'))
    const [after] = await all(store.scanLinks('web'))
    const [stored] = await all(store.scanManifests('web'))
    assert.deepEqual([before?.digest, after?.digest, stored?.digest], [digest, digest, manifest.digest])
    assert.ok(before && before.usedAtMs >= startMs && before.usedAtMs < startMs + 5000)
    assert.ok(after && stored && after.usedAtMs >= startMs + 5000 && stored.usedAtMs >= startMs + 5000)
    assert.deepEqual(await all(store.scanLinks('nowhere')), [])
    assert.deepEqual(await all(store.scanManifests('only/blobs')), [])
  })

  test(`${name}: what was pushed, mounted or claimed since is not removed`, async (t) => {
    const { store, now, advance } = await start(t)
    const bytes = randomBytes(300_000)
    const digest = await push(store, 'web', bytes)
    const pushedMs = now()
    assert.equal(await store.claimBlob('other', digest), undefined)
    advance(1000)
    assert.deepEqual(await store.claimBlob('web', digest), { digest, sizeBytes: bytes.length })
    assert.equal(await store.unlinkBlob('web', digest, pushedMs + 1000), false)
    assert.equal(await store.unlinkBlob('other', digest, now() + 1), false)
    advance(1000)
    await push(store, 'web', bytes)
    assert.equal(await store.unlinkBlob('web', digest, pushedMs + 2000), false)
    assert.equal(await store.deleteBlob(digest, pushedMs + 2000), false)
    assert.ok((await read(store, digest, 0, bytes.length)).equals(bytes))
    advance(1000)
    assert.equal(await store.mountBlob('other', digest, 'web'), true)
    assert.equal(await store.unlinkBlob('web', digest, pushedMs + 3000), true, 'nobody used it here since')
    assert.equal(await store.statBlob('web', digest), undefined)
    assert.ok(await store.statBlob('other', digest))
    assert.equal(await store.deleteBlob(digest, pushedMs + 3000), false)

    const manifest = { digest, mediaType: 'a/b', bytes: Buffer.from('{}') }
    await store.putManifest('web', manifest)
    const putMs = now()
    advance(1000)
    assert.equal(await store.claimManifest('web', digest), true)
    assert.equal(await store.claimManifest('other', digest), false)
    assert.ok((await store.manifestUsedAtMs('web', digest)) ?? 0 >= putMs + 1000)
    assert.equal(await store.manifestUsedAtMs('other', digest), undefined)
  })

  test(`${name}: bytes that were removed can be pushed again, after a restart too, and their swarm is found again`, async (t) => {
    const { store, reopen, now, advance } = await start(t)
    const bytes = randomBytes(600_000)
    const digest = await push(store, 'web', bytes)
    const torrent = await store.torrentOf(digest)
    assert.ok(torrent)
    const remove = async (from: BlobStore) => {
      advance(1000)
      assert.equal(await from.unlinkBlob('web', digest, now()), true)
      assert.equal(await from.deleteBlob(digest, now()), true)
      assert.equal(await from.deleteBlob(digest, now()), false)
      assert.equal(await from.torrentOf(digest), undefined)
      assert.equal(await from.blobOfInfoHash(infoHashToHex(torrent.infoHash)), undefined)
      assert.deepEqual(await all(from.scanBlobs()), [])
    }
    await remove(store)
    assert.equal(await store.mountBlob('other', digest, 'web'), false)
    await push(store, 'web', bytes)
    await assertTorrent(store, bytes)
    await remove(store)
    const after = await reopen()
    await push(after, 'web', bytes)
    await assertTorrent(after, bytes)
    assert.ok((await read(after, digest, 0, bytes.length)).equals(bytes))
  })

  test(`${name}: of a claim, a mount or a push and a removal at the same time one comes first, and the other knows`, async (t) => {
    const { store, now, advance } = await start(t)
    for (let round = 0; round < 60; round++) {
      const bytes = Buffer.from(`blob ${round}`)
      const digest = await push(store, 'web', bytes)
      advance(1000)
      const unusedSinceMs = now()
      const collect = async () => {
        const unlinked = await store.unlinkBlob('web', digest, unusedSinceMs)
        if (unlinked) await store.deleteBlob(digest, unusedSinceMs)
        return unlinked
      }
      const works = [
        collect,
        () => store.claimBlob('web', digest),
        () => store.mountBlob('other', digest, 'web'),
        () => push(store, 'third', bytes),
      ]
      // Each comes first in some rounds.
      const results = new Map(
        await Promise.all(
          works.map(async (_, i) => {
            const at = (i + round) % works.length
            return [at, await works[at]?.()] as const
          }),
        ),
      )
      const unlinked = results.get(0) === true
      assert.equal(results.get(1) === undefined, unlinked, 'who claimed it has it')
      assert.equal((await store.statBlob('web', digest)) === undefined, unlinked)
      assert.equal((await store.statBlob('other', digest)) !== undefined, results.get(2))
      assert.ok(await store.statBlob('third', digest))
      assert.ok((await read(store, digest, 0, bytes.length)).equals(bytes))
    }
  })
}

async function all<Item>(items: AsyncIterable<Item>): Promise<Item[]> {
  return Array.fromAsync(items)
}

/** The torrent that a store computed while the bytes arrived is the one of the bytes. */
async function assertTorrent(store: BlobStore, bytes: Buffer): Promise<void> {
  const torrent = await store.torrentOf(digestOf(bytes))
  if (bytes.length <= swarmLengthMin) {
    assert.equal(torrent, undefined, 'small blobs travel over plain HTTP')
    return
  }
  const pieceLength = pieceLengthFor(bytes.length)
  const pieces = Array.from({ length: Math.ceil(bytes.length / pieceLength) }, (_, i) =>
    createHash('sha1')
      .update(bytes.subarray(i * pieceLength, (i + 1) * pieceLength))
      .digest(),
  )
  assert.ok(torrent)
  assert.deepEqual(Buffer.from(torrent.pieces), Buffer.concat(pieces))
  assert.deepEqual(
    [torrent.name, torrent.length, torrent.pieceLength, torrent.private],
    [digestHex(digestOf(bytes)), bytes.length, pieceLength, true],
  )
  const blob = await store.blobOfInfoHash(infoHashToHex(torrent.infoHash))
  assert.deepEqual(blob, { digest: digestOf(bytes), sizeBytes: bytes.length })
}

export async function push(store: BlobStore, repository: string, bytes: Buffer): Promise<Digest> {
  const upload = await store.startUpload(repository, bytes.length)
  await append(upload, bytes)
  await upload.commit(digestOf(bytes))
  return digestOf(bytes)
}

export async function append(upload: BlobUpload, bytes: Buffer): Promise<void> {
  await upload.append(chunks(bytes), new AbortController().signal)
}

/** In pieces of odd sizes, as a socket would yield them. */
async function* chunks(bytes: Buffer): AsyncGenerator<Uint8Array> {
  for (let at = 0, size = 1; at < bytes.length; at += size, size = Math.min(65_536, size * 3 + 1))
    yield await Promise.resolve(bytes.subarray(at, at + size))
}

async function* breaking(bytes: Buffer): AsyncGenerator<Uint8Array> {
  yield* chunks(bytes)
  throw new Error('the cable')
}

async function* slowly(until: Promise<unknown>): AsyncGenerator<Uint8Array> {
  await until
  yield Buffer.from('a')
}

async function read(store: BlobStore, digest: ContentDigest, start: number, end: number): Promise<Buffer> {
  const parts: Uint8Array[] = []
  for await (const part of store.readBlob(digest, { start, end }, new AbortController().signal))
    parts.push(Buffer.from(part))
  return Buffer.concat(parts)
}
