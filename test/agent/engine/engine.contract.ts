import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { readFile, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import type { Engine, EngineConfig, EngineHandle, Webseed } from '../../../agent/engine/engine.ts'
import { infoHashToBytes } from '../../../lib/protocol/infohash.ts'
import { pieceCount } from '../../../lib/protocol/metainfo.ts'
import { until } from '../../support/until.ts'
import type { Blob } from './fixtures.ts'
import {
  admission,
  blobFile,
  handshake,
  mebibyte,
  message,
  peerAt,
  peerFeed,
  randomBlob,
  startRawPeer,
  startWebseed,
  temporaryDirectory,
  withDeadline,
} from './fixtures.ts'

/** What every Engine promises. `start` makes one that listens. */
export function engineContract(name: string, start: (config: EngineConfig) => Promise<Engine>): void {
  const startEngine = async (t: TestContext, config: Partial<EngineConfig> = {}): Promise<Engine> => {
    const engine = await start({
      port: 0,
      connectionsMax: 30,
      identity: { host: 'test', place: 'rack-1' },
      limits: { downloadBytesPerSecond: undefined, uploadBytesPerSecond: undefined },
      ...config,
    })
    t.after(() => engine[Symbol.asyncDispose]())
    return engine
  }

  /** An engine that seeds the blob. */
  const startSeeder = async (
    t: TestContext,
    directory: string,
    blob: Blob,
    config: Partial<EngineConfig> = {},
  ) => {
    const engine = await startEngine(t, config)
    const file = await blobFile(directory, `seed-${engine.port}`, blob.bytes)
    const handle = engine.seed({ metainfo: blob.metainfo, file, peers: peerFeed(), signal: neverAborted() })
    await handle.done
    return { engine, handle, peer: peerAt(engine.port), file }
  }

  const fetch = (
    engine: Engine,
    blob: Blob,
    file: string,
    options: { peers?: ReturnType<typeof peerFeed>; webseed?: Webseed; signal?: AbortSignal } = {},
  ): EngineHandle =>
    engine.fetch({
      metainfo: blob.metainfo,
      file,
      peers: options.peers ?? peerFeed(),
      webseed: options.webseed,
      signal: options.signal ?? neverAborted(),
    })

  const assertFetched = async (handle: EngineHandle, blob: Blob, file: string) => {
    await withDeadline(handle.done, () => 'the fetch')
    assert.equal(handle.bytesVerified, blob.bytes.length)
    assert.ok((await readFile(file)).equals(blob.bytes), 'the bytes are those of the blob')
  }

  test(`${name}: fetches from one seeder`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(3 * mebibyte + 12_345)
    const { peer } = await startSeeder(t, directory, blob)
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const handle = fetch(engine, blob, file, { peers: peerFeed(peer) })
    await assertFetched(handle, blob, file)
    assert.equal(handle.waitingReason, undefined)
  })

  test(`${name}: fetches from two seeders, and sums traffic by source and place`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(6 * mebibyte)
    const limits = { downloadBytesPerSecond: undefined, uploadBytesPerSecond: 4 * mebibyte }
    const one = await startSeeder(t, directory, blob, { identity: { host: 'one', place: 'rack-1' }, limits })
    const two = await startSeeder(t, directory, blob, { identity: { host: 'two', place: 'rack-2' }, limits })
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const handle = fetch(engine, blob, file, { peers: peerFeed(one.peer, two.peer) })
    await assertFetched(handle, blob, file)
    const traffic = handle.traffic()
    assert.deepEqual(new Set(traffic.map(({ place }) => place)), new Set(['rack-1', 'rack-2']))
    assert.ok(sum(traffic.map(({ downloadedBytes }) => downloadedBytes)) >= blob.bytes.length)
    const given = [...one.handle.traffic(), ...two.handle.traffic()]
    assert.ok(sum(given.map(({ uploadedBytes }) => uploadedBytes)) >= blob.bytes.length)
    assert.deepEqual(
      new Set(given.map(({ place }) => place)),
      new Set(['rack-1']),
      'incoming connections say where they are',
    )
  })

  test(`${name}: fetches from a webseed alone`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(3 * mebibyte + 1)
    const webseed = await startWebseed(t, blob.bytes)
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const handle = fetch(engine, blob, file, { webseed })
    await assertFetched(handle, blob, file)
    assert.deepEqual(
      handle.traffic().map(({ kind, downloadedBytes }) => [kind, downloadedBytes]),
      [['webseed', blob.bytes.length]],
    )
  })

  test(`${name}: what comes from a webseed keeps to the download limit, all requests together`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(16 * mebibyte)
    const webseed = await startWebseed(t, blob.bytes)
    const engine = await startEngine(t, {
      limits: { downloadBytesPerSecond: 8 * mebibyte, uploadBytesPerSecond: undefined },
    })
    const startedAt = performance.now()
    const file = join(directory, 'copy')
    await assertFetched(fetch(engine, blob, file, { webseed }), blob, file)
    const tookMs = performance.now() - startedAt
    assert.ok(tookMs > 1900, `16 MiB at 8 MiB/s took ${Math.round(tookMs)} ms`)
  })

  test(`${name}: a webseed that is busy, broken and wrong at first is used later`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    let refused = 0
    const webseed = await startWebseed(t, blob.bytes, (request, response) => {
      const turn = refused++
      if (turn === 0) response.writeHead(503, { 'retry-after': '1' }).end()
      else if (turn === 1) request.socket.destroy()
      else if (turn === 2) response.writeHead(500).end()
      else if (turn === 3) {
        const [start = 0, end = 0] = (request.headers.range ?? '')
          .replace('bytes=', '')
          .split('-')
          .map(Number)
        response.writeHead(206).end(Buffer.alloc(end - start + 1))
      } else return false
      return true
    })
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    await assertFetched(fetch(engine, blob, file, { webseed }), blob, file)
  })

  test(`${name}: setWebseed() starts and ends the use of a webseed`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const refusing = await startWebseed(t, blob.bytes, (_request, response) => {
      response.writeHead(503, { 'retry-after': '60' }).end()
      return true
    })
    const webseed = await startWebseed(t, blob.bytes)
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const handle = fetch(engine, blob, file, { webseed: refusing })
    await until('a request to the first webseed', () => refusing.requests.length > 0)
    handle.setWebseed(undefined)
    assert.equal(webseed.requests.length, 0)
    handle.setWebseed(webseed)
    await assertFetched(handle, blob, file)
  })

  test(`${name}: goes on from the part on disk, and fetches a spoilt piece of it again`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    const part = Buffer.from(blob.bytes.subarray(0, 3 * mebibyte))
    part[mebibyte] = (part[mebibyte] ?? 0) ^ 1
    const file = await blobFile(directory, 'copy', part)
    const webseed = await startWebseed(t, blob.bytes)
    const engine = await startEngine(t)
    const handle = fetch(engine, blob, file, { webseed })
    await assertFetched(handle, blob, file)
    const fetched = sum(handle.traffic().map(({ downloadedBytes }) => downloadedBytes))
    assert.equal(fetched, mebibyte + blob.metainfo.pieceLength, 'the missing part and the spoilt piece')
  })

  test(`${name}: tells each piece once, after its write, and has() agrees`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte + 7)
    const { peer } = await startSeeder(t, directory, blob)
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const handle = fetch(engine, blob, file, { peers: peerFeed(peer) })
    const pieces: number[] = []
    const wrong: number[] = []
    const checks: Promise<void>[] = []
    handle.onPiece((piece) => {
      pieces.push(piece)
      if (!handle.has(piece)) wrong.push(piece)
      const { pieceLength } = blob.metainfo
      checks.push(
        readFile(file).then((bytes) => {
          const range = [piece * pieceLength, Math.min((piece + 1) * pieceLength, blob.bytes.length)] as const
          if (!bytes.subarray(...range).equals(blob.bytes.subarray(...range))) wrong.push(piece)
        }),
      )
    })
    await assertFetched(handle, blob, file)
    await Promise.all(checks)
    assert.deepEqual(wrong, [])
    assert.deepEqual(
      pieces.toSorted((a, b) => a - b),
      Array.from({ length: pieceCount(blob.metainfo) }, (_, i) => i),
    )
  })

  test(`${name}: seeds a file without hashing it`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(mebibyte)
    const engine = await startEngine(t)
    // Bytes that no hash would accept: a seeder that read them would know.
    const file = await blobFile(directory, 'seed', Buffer.alloc(mebibyte))
    const handle = engine.seed({ metainfo: blob.metainfo, file, peers: peerFeed(), signal: neverAborted() })
    await handle.done
    assert.ok(handle.has(0) && handle.has(pieceCount(blob.metainfo) - 1))
    assert.equal(handle.bytesVerified, mebibyte)
  })

  test(`${name}: who has fetched gives to others`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const { engine: seeder, peer } = await startSeeder(t, directory, blob)
    const first = await startEngine(t)
    const file = join(directory, 'first')
    await assertFetched(fetch(first, blob, file, { peers: peerFeed(peer) }), blob, file)
    await seeder[Symbol.asyncDispose]()
    const second = await startEngine(t)
    const copy = join(directory, 'second')
    await assertFetched(fetch(second, blob, copy, { peers: peerFeed(peerAt(first.port)) }), blob, copy)
  })

  test(`${name}: outlives its seeder when another appears`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    const slow = await startSeeder(t, directory, blob, {
      limits: { downloadBytesPerSecond: undefined, uploadBytesPerSecond: mebibyte },
    })
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const peers = peerFeed(slow.peer)
    const handle = fetch(engine, blob, file, { peers })
    await until('a first piece', () => handle.bytesVerified > 0)
    await slow.engine[Symbol.asyncDispose]()
    const other = await startSeeder(t, directory, blob)
    peers.push(other.peer)
    await assertFetched(handle, blob, file)
  })

  test(`${name}: a peer in reserve is asked when nothing near moves`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(mebibyte)
    const { engine: seeder } = await startSeeder(t, directory, blob)
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const handle = fetch(engine, blob, file, { peers: peerFeed(peerAt(seeder.port, { reserve: true })) })
    await assertFetched(handle, blob, file)
  })

  test(`${name}: a gateway asks nothing far away while a near peer has everything`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const far = await startSeeder(t, directory, blob, { identity: { host: 'far', place: 'rack-2' } })
    const near = await startSeeder(t, directory, blob)
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const peers = peerFeed(near.peer, { ...far.peer, distance: 1 })
    const handle = fetch(engine, blob, file, { peers })
    await assertFetched(handle, blob, file)
    assert.deepEqual(
      handle.traffic().map(({ place }) => place),
      ['rack-1'],
    )
  })

  test(`${name}: a peer that sends wrong bytes costs time only`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const liar = await startRawPeer(t, blob.metainfo, ({ length }) => Buffer.alloc(length, 0x66))
    const banned: string[] = []
    const engine = await startEngine(t, {
      peerBanned: (address, infoHash) => banned.push(`${address} ${infoHash}`),
    })
    const file = join(directory, 'copy')
    const peers = peerFeed(peerAt(liar.port))
    const handle = fetch(engine, blob, file, { peers })
    await until('a request to the liar', () => liar.seen.requests > 0)
    const { peer } = await startSeeder(t, directory, blob)
    peers.push(peer)
    await assertFetched(handle, blob, file)
    assert.deepEqual(banned, [`127.0.0.1:${liar.port} ${blob.metainfo.infoHash}`])
  })

  test(`${name}: a peer that accepts requests and is silent costs time only`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const silent = await startRawPeer(t, blob.metainfo, () => undefined)
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const peers = peerFeed(peerAt(silent.port))
    const handle = fetch(engine, blob, file, { peers })
    await until('a request to the silent peer', () => silent.seen.requests > 0)
    await until('a reason why nothing moves', () => handle.waitingReason !== undefined)
    const { peer } = await startSeeder(t, directory, blob)
    peers.push(peer)
    await assertFetched(handle, blob, file)
  })

  test(`${name}: whatever bytes a stranger sends, at worst its own connection ends`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(mebibyte)
    const { engine, peer } = await startSeeder(t, directory, blob)
    const before = process.memoryUsage().rss
    const own = infoHashToBytes(blob.metainfo.infoHash)
    const extended = (id: number, text: string) =>
      message(20, Buffer.concat([Buffer.from([id]), Buffer.from(text)]))
    const request = message(6, Buffer.from([0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0]))
    const hostile: Record<string, Buffer[]> = {
      'an extended handshake with a trap, for a torrent that is not here': [
        handshake(randomBytes(20), { extended: true }),
        extended(0, 'd1:md1:xd8:toStringi1eeee'),
      ],
      'a request for metadata without having offered the extension': [
        handshake(own, { extended: true }),
        extended(2, 'd8:msg_typei0e5:piecei0ee'),
      ],
      'a message of 2 GiB': [handshake(own), Buffer.from([0x7f, 0xff, 0xff, 0xff]), randomBytes(mebibyte)],
      'requests without end, unread': [handshake(own), message(2), ...Array<Buffer>(4000).fill(request)],
      'a bitfield that does not fit': [handshake(own), message(5, randomBytes(1000))],
      'pieces that nobody asked for': [handshake(own), message(7, randomBytes(2000))],
      'random bytes': [randomBytes(5000)],
    }
    for (const [what, parts] of Object.entries(hostile)) {
      const socket = connect(engine.port, '127.0.0.1')
      t.after(() => socket.destroy())
      socket.on('error', () => undefined)
      socket.pause()
      await new Promise((written) => socket.write(Buffer.concat(parts), written))
      // Its neighbours notice nothing.
      const file = join(directory, what.replaceAll(/\W/g, '-'))
      const fetcher = await startEngine(t)
      await assertFetched(fetch(fetcher, blob, file, { peers: peerFeed(peer) }), blob, file)
    }
    const grown = process.memoryUsage().rss - before
    assert.ok(grown < 200 * mebibyte, `memory has grown by ${Math.round(grown / mebibyte)} MiB`)
  })

  test(`${name}: an abort rejects done with its reason and leaves the part`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    const slow = await startSeeder(t, directory, blob, {
      limits: { downloadBytesPerSecond: undefined, uploadBytesPerSecond: mebibyte },
    })
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const abort = new AbortController()
    const handle = fetch(engine, blob, file, { peers: peerFeed(slow.peer), signal: abort.signal })
    await until('a first piece', () => handle.bytesVerified > 0)
    const reason = new Error('no longer wanted')
    abort.abort(reason)
    await assert.rejects(handle.done, reason)
    await handle.close()
    assert.ok((await readFile(file)).length > 0)
    const again = fetch(engine, blob, file, { webseed: await startWebseed(t, blob.bytes) })
    await assertFetched(again, blob, file)
  })

  test(`${name}: keeps to its download limit`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(3 * mebibyte)
    const { peer } = await startSeeder(t, directory, blob)
    const engine = await startEngine(t, {
      limits: { downloadBytesPerSecond: mebibyte, uploadBytesPerSecond: undefined },
    })
    const file = join(directory, 'copy')
    const handle = fetch(engine, blob, file, { peers: peerFeed(peer) })
    await until('a first piece', () => handle.bytesVerified > 0)
    const seen = Date.now()
    const before = handle.bytesVerified
    await withDeadline(handle.done, () => 'the limited fetch')
    const seconds = (Date.now() - seen) / 1000
    // A wide bound: it only tells a limit from none.
    assert.ok((blob.bytes.length - before) / seconds < 4 * mebibyte)
  })

  test(`${name}: of a webseed it fetches only the range that it may, and says when there is no more of it`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    const { pieceLength } = blob.metainfo
    const pieces = pieceCount(blob.metainfo)
    const { url, requests } = await startWebseed(t, blob.bytes)
    const ranges = [
      { firstPiece: 3, pieceCount: 5 },
      { firstPiece: 0, pieceCount: 3 },
      { firstPiece: 8, pieceCount: pieces - 8 },
    ]
    const told: number[] = []
    const rangeDone = () => {
      told.push(handle.bytesVerified)
      const range = ranges.shift()
      if (range) handle.setWebseed({ url, range, rangeDone })
    }
    const file = join(directory, 'copy')
    const handle = fetch(await startEngine(t), blob, file, {
      webseed: { url, range: ranges.shift(), rangeDone },
    })
    await assertFetched(handle, blob, file)
    assert.ok(told.length >= 2)
    const starts = requests.map((range) => Number(/^bytes=(\d+)-/.exec(range)?.[1]) / pieceLength)
    assert.ok((starts[0] ?? 0) >= 3 && (starts[0] ?? 0) < 8, 'the first range came first')
    const bytes = requests.reduce((sum, range) => {
      const [, from = '0', to = '0'] = /^bytes=(\d+)-(\d+)$/.exec(range) ?? []
      return sum + Number(to) + 1 - Number(from)
    }, 0)
    assert.equal(bytes, blob.bytes.length, 'nothing was fetched twice')
  })

  test(`${name}: close() ends connections, and the engine can be closed with fetches under way`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    const slow = await startSeeder(t, directory, blob, {
      limits: { downloadBytesPerSecond: undefined, uploadBytesPerSecond: mebibyte },
    })
    const engine = await startEngine(t)
    const handle = fetch(engine, blob, join(directory, 'copy'), { peers: peerFeed(slow.peer) })
    await until('a connection', () => handle.peerCount > 0)
    await engine[Symbol.asyncDispose]()
    await assert.rejects(handle.done)
    assert.equal(handle.peerCount, 0)
    await until('the seeder to see the connection end', () => slow.handle.peerCount === 0)
  })

  test(`${name}: with tokens between peers, whoever has none or a wrong one gets nothing`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(mebibyte)
    const seeder = await startSeeder(t, directory, blob, admission('good'))
    const liar = await startEngine(t, { ...admission('good'), peerTokens: { tokenFor: () => 'bad' } })
    const refused = fetch(liar, blob, join(directory, 'refused'), { peers: peerFeed(seeder.peer) })
    const stranger = connect(seeder.engine.port, '127.0.0.1')
    stranger.on('error', () => undefined)
    const received: Buffer[] = []
    stranger.on('data', (bytes: Buffer) => received.push(bytes))
    stranger.write(handshake(infoHashToBytes(blob.metainfo.infoHash)))
    const block = Buffer.alloc(12)
    block.writeUInt32BE(16_384, 8)
    stranger.write(Buffer.concat([message(2), message(6, block)]))
    await until('the seeder to let the stranger go', () => stranger.closed)
    assert.ok(Buffer.concat(received).length < 1000, 'no block')
    assert.equal(refused.bytesVerified, 0)
    const engine = await startEngine(t, admission('good'))
    const file = join(directory, 'copy')
    await assertFetched(fetch(engine, blob, file, { peers: peerFeed(seeder.peer) }), blob, file)
    assert.equal(refused.bytesVerified, 0)
    assert.ok(!Buffer.concat(received).includes('good'), 'the token is not shown to strangers')
  })

  test(`${name}: what is asked while a token is still being looked at is answered after that`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(mebibyte)
    const slow = admission('good')
    const seeder = await startSeeder(t, directory, blob, {
      ...slow,
      admission: {
        admit: async (...asked) => {
          await new Promise((resolve) => setTimeout(resolve, 500))
          return slow.admission?.admit(...asked)
        },
      },
    })
    const engine = await startEngine(t, admission('good'))
    const file = join(directory, 'copy')
    await assertFetched(fetch(engine, blob, file, { peers: peerFeed(seeder.peer) }), blob, file)
  })

  test(`${name}: a disk that fails ends the fetch with the system's word`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(mebibyte)
    const { peer } = await startSeeder(t, directory, blob)
    const engine = await startEngine(t)
    // A file cannot be made below a file.
    await writeFile(join(directory, 'plain'), '')
    const handle = fetch(engine, blob, join(directory, 'plain', 'copy'), { peers: peerFeed(peer) })
    await assert.rejects(
      withDeadline(handle.done, () => 'the refusal'),
      { code: 'ENOTDIR' },
    )
  })
}

function neverAborted(): AbortSignal {
  return new AbortController().signal
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0)
}
