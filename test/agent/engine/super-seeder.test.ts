import assert from 'node:assert/strict'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import fc from 'fast-check'
import type { EngineConfig, PeerAdmission } from '../../../agent/engine/engine.ts'
import { SuperSeeder } from '../../../agent/engine/super-seeder.ts'
import { endpointPort } from '../../../lib/protocol/address.ts'
import { parseTorrent, pieceCount } from '../../../lib/protocol/metainfo.ts'
import { until } from '../../support/until.ts'
import type { Blob } from './fixtures.ts'
import {
  admission,
  blobFile,
  mebibyte,
  message,
  peerAt,
  peerFeed,
  randomBlob,
  randomOf,
  temporaryDirectory,
} from './fixtures.ts'
import { assertFetched, startEngine, startFetch, unlimited } from './own-engine.ts'
import { dialRaw, rawHandshake } from './raw-peer.ts'

const moving = { ahead: 3, stillForMs: 0, nowMs: 0 }

test('each piece is told to one peer, in order, while all of them take what they are told of', () => {
  fc.assert(
    fc.property(
      fc.integer({ min: 1, max: 60 }),
      fc.integer({ min: 1, max: 8 }),
      fc.integer(),
      (pieces, peers, seed) => {
        const random = randomOf(seed)
        const seeder = new SuperSeeder<number>(pieces)
        const toldOf: number[] = []
        const open = Array.from({ length: peers }, (): number[] => [])
        const tell = (peer: number) => {
          const told = seeder.next(peer, moving)
          toldOf.push(...told)
          open[peer]?.push(...told)
        }
        for (let peer = 0; peer < peers; peer++) {
          seeder.join(peer)
          tell(peer)
        }
        while (!seeder.isOver) {
          const busy = open.flatMap((list, peer) => (list.length > 0 ? [peer] : []))
          const peer = busy[Math.floor(random() * busy.length)] ?? 0
          const piece = open[peer]?.shift()
          assert.ok(piece !== undefined, 'nobody waits while pieces are missing')
          seeder.gained(peer, piece)
          // The others have it from that peer soon after.
          for (let other = 0; other < peers; other++) if (random() < 0.5) seeder.gained(other, piece)
          tell(peer)
        }
        assert.deepEqual(
          toldOf,
          Array.from({ length: pieces }, (_, piece) => piece),
        )
      },
    ),
  )
})

test('what a peer that left or stands still was told of is told to others; what another is being sent, to who waits', () => {
  const seeder = new SuperSeeder<string>(4)
  for (const peer of ['a', 'b', 'c']) seeder.join(peer)
  assert.deepEqual(seeder.next('a', { ...moving, ahead: 2 }), [0, 1])
  assert.deepEqual(seeder.next('b', { ...moving, ahead: 2 }), [2, 3])
  assert.deepEqual(seeder.next('c', { ...moving, ahead: 2 }), [])
  assert.deepEqual(
    seeder.next('c', { ...moving, ahead: 2, nowMs: 400 }),
    [],
    'it may come from the others yet',
  )
  seeder.leave('a')
  assert.deepEqual(seeder.next('c', { ...moving, ahead: 1, nowMs: 450 }), [0])
  assert.deepEqual(
    seeder.next('b', { ...moving, stillForMs: 5000, nowMs: 500 }),
    [],
    'nothing more for who takes nothing',
  )
  assert.deepEqual(seeder.next('c', { ...moving, ahead: 4, nowMs: 600 }), [1, 2, 3])
  for (const piece of [0, 1, 2]) seeder.gained('c', piece)
  seeder.join('d')
  assert.deepEqual(seeder.next('d', { ...moving, nowMs: 1000 }), [])
  assert.deepEqual(
    seeder.next('d', { ...moving, nowMs: 3100 }),
    [3],
    'it waits for a piece that nobody has got yet',
  )
  seeder.gained('d', 3)
  assert.ok(seeder.isOver)
  assert.deepEqual(seeder.hiddenFrom('d'), [0, 1, 2])
})

async function startOnlySeed(
  t: TestContext,
  directory: string,
  blob: Blob,
  seeds: () => number,
  rate?: number,
  config: Partial<EngineConfig> = {},
) {
  const engine = await startEngine(t, {
    limits: { ...unlimited, uploadBytesPerSecond: rate },
    ...config,
  })
  const file = await blobFile(directory, 'seed', blob.bytes)
  const signal = new AbortController().signal
  const handle = engine.seed({ metainfo: parseTorrent(blob.torrent), file, peers: peerFeed(), seeds, signal })
  const uploaded = () => handle.traffic().reduce((total, { uploadedBytes }) => total + uploadedBytes, 0)
  return { peer: peerAt(engine.port), uploaded, handle }
}

test('the only seed of five fetchers sends little more than one copy', async (t) => {
  const directory = await temporaryDirectory(t)
  const blob = randomBlob(48 * mebibyte)
  const seed = await startOnlySeed(t, directory, blob, () => 1, 16 * mebibyte)
  const engines = await Promise.all(Array.from({ length: 5 }, () => startEngine(t)))
  const peers = [seed.peer, ...engines.map(({ port }) => peerAt(port))]
  await Promise.all(
    engines.map(async (engine, i) => {
      const file = join(directory, `copy-${i}`)
      await assertFetched(startFetch(engine, blob, file, peerFeed(...peers)), blob, file)
    }),
  )
  const copies = seed.uploaded() / blob.bytes.length
  assert.ok(copies < 1.15, `${copies} copies`)
})

test('what the only seed tells of while its token is looked at is not forgotten', async (t) => {
  const directory = await temporaryDirectory(t)
  const blob = randomBlob(4 * mebibyte)
  const good = admission('good')
  const slow = {
    admit: async (...asked: Parameters<PeerAdmission['admit']>) => {
      await new Promise((resolve) => setTimeout(resolve, 300))
      return good.admission?.admit(...asked)
    },
  }
  const seed = await startOnlySeed(t, directory, blob, () => 1, undefined, good)
  const engine = await startEngine(t, { ...good, admission: slow })
  const file = join(directory, 'copy')
  await assertFetched(startFetch(engine, blob, file, peerFeed(seed.peer)), blob, file, 10)
})

test('a lone fetcher gets everything from the only seed, and both part', async (t) => {
  const directory = await temporaryDirectory(t)
  const blob = randomBlob(24 * mebibyte)
  const seed = await startOnlySeed(t, directory, blob, () => 1)
  const file = join(directory, 'copy')
  await assertFetched(startFetch(await startEngine(t), blob, file, peerFeed(seed.peer)), blob, file)
  assert.equal(seed.uploaded(), blob.bytes.length)
  await until('the connection to end', () => seed.handle.peerCount === 0)
})

test('a seed says that it has all of it as soon as it is not the only one', async (t) => {
  const directory = await temporaryDirectory(t)
  const blob = randomBlob(48 * mebibyte)
  let seeds = 1
  const seed = await startOnlySeed(t, directory, blob, () => seeds)
  const told: number[] = []
  const ids: number[] = []
  await dialRaw(t, endpointPort(seed.peer.endpoint), blob.metainfo, {
    connected: (connection) => {
      connection.send(rawHandshake(blob.metainfo, { fast: true }), message(15))
    },
    shaken: () => undefined,
    told: (_connection, { id, body }) => {
      ids.push(id)
      if (id === 4) told.push(body.readUInt32BE())
    },
  })
  await until('the first pieces', () => told.length >= 4)
  assert.ok(ids.includes(15), 'it says first that it has nothing')
  const pieces = pieceCount(blob.metainfo)
  assert.ok(told.length < pieces / 2, `told of ${told.length}`)
  seeds = 2
  await until('all pieces', () => told.length === pieces)
  assert.deepEqual(new Set(told).size, pieces)
})
