import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { rm, truncate, writeFile } from 'node:fs/promises'
import type { Socket } from 'node:net'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { TestContext } from 'node:test'
import { describe, test } from 'node:test'
import type { EngineHandle } from '../../../agent/engine/engine.ts'
import { pieceCount } from '../../../lib/protocol/metainfo.ts'
import { until } from '../../support/until.ts'
import {
  admission,
  blobFile,
  mebibyte,
  message,
  mountSmallDisk,
  peakBytesOf,
  peerAt,
  peerFeed,
  randomBlob,
  startWebseed,
  temporaryDirectory,
  withDeadline,
} from './fixtures.ts'
import { assertFetched, startEngine, startFetch, startSeeder, unlimited } from './own-engine.ts'
import type { RawConnection, RawPeer } from './raw-peer.ts'
import {
  badPeers,
  blockOf,
  bytesOf,
  dialRaw,
  fullBitfield,
  greetAsAgent,
  greetAsSeeder,
  numberOf,
  rangeOf,
  rawHandshake,
  startRawListener,
} from './raw-peer.ts'

/** What the heap and the sockets of one engine may grow by, whatever is done to it; wide, since tests share the process. */
const memoryMax = 150 * mebibyte

describe('rackswarm: a peer that', { concurrency: 8 }, () => {
  for (const [what, behaviour] of Object.entries(badPeers)) {
    test(`${what} costs time only`, async (t) => {
      const directory = await temporaryDirectory(t)
      const blob = randomBlob(2 * mebibyte)
      const bad = await startRawListener(t, blob.metainfo, behaviour(blob))
      const engine = await startEngine(t)
      const file = join(directory, 'copy')
      const peers = peerFeed(peerAt(bad.port))
      const handle = startFetch(engine, blob, file, peers)
      await until('a connection to it', () => bad.seen.connections > 0)
      await untilTried(handle, bad)
      const { peer } = await startSeeder(t, directory, blob)
      peers.push(peer)
      await assertFetched(handle, blob, file)
    })
  }
})

describe('rackswarm: with peers that come and go,', { concurrency: 4 }, () => {
  test('blocks that come twice count once', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const twice = await startRawListener(t, blob.metainfo, {
      requested: (connection, request) => {
        const block = blockOf(request, bytesOf(blob, request))
        connection.send(block, block)
      },
    })
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const handle = startFetch(engine, blob, file, peerFeed(peerAt(twice.port)))
    await assertFetched(handle, blob, file)
  })

  test('what is left of a late block spoils nothing that others have brought since', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const greetWithFirstPiece = (connection: RawConnection) => {
      connection.send(rawHandshake(blob.metainfo), message(5, Buffer.from([0x80])), message(1))
    }
    const rest = { connection: undefined as RawConnection | undefined, bytes: Buffer.alloc(0) as Buffer }
    const liar = await startRawListener(t, blob.metainfo, {
      shaken: greetWithFirstPiece,
      requested: (connection, request) => {
        if (rest.connection) return
        const block = blockOf(request, Buffer.alloc(request.length))
        connection.send(block.subarray(0, 14))
        rest.connection = connection
        rest.bytes = block.subarray(14)
      },
    })
    const honest = await startRawListener(t, blob.metainfo, {
      shaken: greetWithFirstPiece,
      requested: (connection, request) => {
        const answer = () => {
          connection.send(blockOf(request, bytesOf(blob, request)))
        }
        if (request.piece === 0 || request.offset === 0) answer()
        // The other blocks of a piece come after what is left of the late one.
        else setTimeout(answer, 200)
        if (request.piece === 0 || request.offset > 0) return
        setTimeout(() => {
          rest.connection?.send(rest.bytes.subarray(0, 1000))
          rest.bytes = rest.bytes.subarray(1000)
        }, 100)
      },
      told: (connection, { id, body }) => {
        // It has the first piece: there is more.
        if (id === 4 && body.readUInt32BE() === 0) connection.send(fullBitfield(blob.metainfo))
      },
    })
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const peers = peerFeed(peerAt(liar.port))
    const handle = startFetch(engine, blob, file, peers)
    await until('the start of a block', () => rest.connection !== undefined)
    peers.push(peerAt(honest.port))
    await assertFetched(handle, blob, file, 15)
    assert.equal(honest.seen.connections, 1, 'the honest peer is not blamed')
    assert.ok(rest.bytes.length < 16_000, 'the late block has gone on')
  })

  test('what is given away while more comes in is right', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const pieces = pieceCount(blob.metainfo)
    let offer: (piece: number) => void = () => undefined
    const source = await startRawListener(t, blob.metainfo, {
      shaken: (connection) => {
        connection.send(rawHandshake(blob.metainfo), message(1))
        offer = (piece) => {
          connection.send(message(4, numberOf(piece)))
        }
        offer(0)
      },
      requested: (connection, request) => {
        connection.send(blockOf(request, bytesOf(blob, request)))
      },
    })
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const handle = startFetch(engine, blob, file, peerFeed(peerAt(source.port)))
    await until('the first piece', () => handle.has(0))
    const right: boolean[] = []
    const leecher = await dialRaw(t, engine.port, blob.metainfo, {
      connected: (connection) => {
        connection.send(rawHandshake(blob.metainfo), message(2))
      },
      shaken: () => undefined,
      told: (connection, { id, body }) => {
        const ask = (piece: number) => {
          connection.send(message(6, rangeOf({ piece, offset: 0, length: 16_384 })))
        }
        if (id === 1) ask(0)
        if (id === 4) ask(body.readUInt32BE())
        if (id !== 7) return
        const piece = body.readUInt32BE()
        right[piece] = body.subarray(8).equals(bytesOf(blob, { piece, offset: 0, length: 16_384 }))
        if (piece + 1 < pieces) offer(piece + 1)
      },
    })
    await assertFetched(handle, blob, file, 15)
    await until('a block of the last piece', () => right.length === pieces || leecher.socket.closed)
    assert.deepEqual(right, Array<boolean>(pieces).fill(true))
  })

  test('a peer that refuses a burst once is asked again soon', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    let refusals = 0
    const peer = await startRawListener(t, blob.metainfo, {
      shaken: (connection) => {
        greetAsSeeder(connection, blob.metainfo, { fast: true })
      },
      requested: (connection, request) => {
        if (refusals++ < 40) connection.send(message(16, rangeOf(request)))
        else connection.send(blockOf(request, bytesOf(blob, request)))
      },
    })
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const handle = startFetch(engine, blob, file, peerFeed(peerAt(peer.port)))
    await assertFetched(handle, blob, file, 5)
  })

  test('a seeder that is killed is replaced by another', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(8 * mebibyte)
    const torrent = await blobFile(directory, 'torrent', blob.torrent)
    const seed = await blobFile(directory, 'seed', blob.bytes)
    const first = startProcess(t, ['seed', torrent, seed, '0', String(2 * mebibyte)])
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const peers = peerFeed(peerAt(await first.port))
    const handle = startFetch(engine, blob, file, peers)
    await until('a first piece', () => handle.bytesVerified > 0)
    await first.kill()
    const second = startProcess(t, ['seed', torrent, seed])
    peers.push(peerAt(await second.port))
    await assertFetched(handle, blob, file)
  })

  test('kill -9 of the fetcher loses no verified piece, and costs little', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(16 * mebibyte)
    const torrent = await blobFile(directory, 'torrent', blob.torrent)
    const file = join(directory, 'copy')
    const asked: number[] = []
    let sentBytes = 0
    let freeAtMs = 0
    const seeder = await startRawListener(t, blob.metainfo, {
      requested: (connection, request) => {
        asked.push(request.piece)
        sentBytes += request.length
        // Some 10 MB/s: time to be killed in.
        freeAtMs = Math.max(freeAtMs, performance.now()) + request.length / 10_000
        setTimeout(() => {
          connection.send(blockOf(request, bytesOf(blob, request)))
        }, freeAtMs - performance.now())
      },
    })
    const verified = new Set<number>()
    const kills = 4
    for (let kill = 1; kill <= kills; kill++) {
      const fetcher = startProcess(t, ['fetch', torrent, file, String(seeder.port)])
      const before = [...verified]
      fetcher.onPiece((piece) => verified.add(piece))
      await until(
        `a part of the pieces before kill ${kill}`,
        () => verified.size >= (kill * pieceCount(blob.metainfo)) / (kills + 1),
      )
      await fetcher.kill()
      assertNoneAgain(asked.splice(0), before)
    }
    const before = [...verified]
    const last = startProcess(t, ['fetch', torrent, file, String(seeder.port)])
    await last.done
    assertNoneAgain(asked, before)
    const engine = await startEngine(t)
    const handle = startFetch(engine, blob, file, peerFeed())
    await assertFetched(handle, blob, file)
    assert.ok(sentBytes < blob.bytes.length + kills * 5 * mebibyte, `${sentBytes} bytes were sent`)
  })

  test('a file that is truncated under its seeder is fetched from another', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    const broken = await startSeeder(t, directory, blob)
    await truncate(broken.file, 2 * mebibyte + 1000)
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const peers = peerFeed(broken.peer)
    const handle = startFetch(engine, blob, file, peers)
    await until('a first piece', () => handle.bytesVerified > 0)
    await until('a reason why nothing moves', () => handle.waitingReason !== undefined)
    const whole = await startSeeder(t, directory, blob)
    peers.push(whole.peer)
    await assertFetched(handle, blob, file)
  })

  test('a file that has changed under its seeder is fetched from another', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    const broken = await startSeeder(t, directory, blob)
    await writeFile(broken.file, randomBytes(blob.bytes.length))
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const peers = peerFeed(broken.peer)
    const handle = startFetch(engine, blob, file, peers)
    await until('bytes of the changed file', () => broken.handle.traffic().length > 0)
    await until('a reason why nothing moves', () => handle.waitingReason !== undefined)
    assert.equal(handle.bytesVerified, 0)
    const whole = await startSeeder(t, directory, blob)
    peers.push(whole.peer)
    await assertFetched(handle, blob, file)
  })

  test('the host itself, dead addresses and 10,000 peers at once hide no seeder', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const seeder = await startSeeder(t, directory, blob)
    const engine = await startEngine(t)
    const dead = Array.from({ length: 10_000 }, (_, i) =>
      peerAt(1, { host: `127.${1 + (i % 200)}.${Math.floor(i / 200)}.9` }),
    )
    const itself = peerAt(engine.port)
    const file = join(directory, 'copy')
    const handle = startFetch(
      engine,
      blob,
      file,
      peerFeed(itself, ...dead.slice(0, 4000), seeder.peer, ...dead.slice(4000), itself),
    )
    await assertFetched(handle, blob, file)
  })

  test('two engines that dial each other keep one connection', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    const half = blob.bytes.length / 2
    const ends = await Promise.all(
      [0, 1].map(async (i) => {
        const part = Buffer.alloc(blob.bytes.length)
        blob.bytes.copy(part, i * half, i * half, (i + 1) * half)
        const engine = await startEngine(t, { limits: { ...unlimited, uploadBytesPerSecond: mebibyte } })
        return { engine, file: await blobFile(directory, `part-${i}`, part) }
      }),
    )
    const [one, other] = ends
    assert.ok(one && other)
    const handles = [
      startFetch(one.engine, blob, one.file, peerFeed(peerAt(other.engine.port))),
      startFetch(other.engine, blob, other.file, peerFeed(peerAt(one.engine.port))),
    ]
    await until('a connection at both ends', () => handles.every((handle) => handle.peerCount === 1))
    const seen = handles.map(() => new Set<string>())
    for (const [i, handle] of handles.entries())
      handle.onPiece(() => {
        for (const { source } of handle.peers()) seen[i]?.add(source)
      })
    for (const [i, handle] of handles.entries()) await assertFetched(handle, blob, ends[i]?.file ?? '')
    assert.deepEqual(
      seen.map(({ size }) => size),
      [1, 1],
    )
  })

  test('a full disk is waited out, with the reason', async (t) => {
    const disk = await mountSmallDisk(t, 6)
    const blob = randomBlob(4 * mebibyte)
    const other = await blobFile(disk, 'someone-elses', randomBytes(4 * mebibyte))
    const directory = await temporaryDirectory(t)
    const seeder = await startSeeder(t, directory, blob)
    const engine = await startEngine(t)
    const file = join(disk, 'copy')
    const handle = startFetch(engine, blob, file, peerFeed(seeder.peer))
    await until('the reason', () => /disk is full/.test(handle.waitingReason ?? ''))
    assert.ok(handle.bytesVerified < blob.bytes.length)
    await rm(other)
    await assertFetched(handle, blob, file)
    assert.equal(handle.waitingReason, undefined)
    await engine[Symbol.asyncDispose]()
  })

  test('who is not admitted gets nothing, and once it is, everything', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const seeder = await startSeeder(t, directory, blob, admission('good'))
    const token = { now: 'bad' }
    const engine = await startEngine(t, { ...admission('good'), peerTokens: { tokenFor: () => token.now } })
    const file = join(directory, 'copy')
    const handle = startFetch(engine, blob, file, peerFeed(seeder.peer))
    await until('a reason why nothing moves', () => handle.waitingReason !== undefined)
    assert.equal(handle.bytesVerified, 0)
    assert.deepEqual(seeder.handle.traffic(), [])
    token.now = 'good'
    await assertFetched(handle, blob, file)
  })

  test('who shows no token is told nothing, not even what there is', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(mebibyte)
    const seeder = await startSeeder(t, directory, blob, admission('good'))
    for (const extended of [false, true]) {
      const ids: number[] = []
      const stranger = await dialRaw(t, seeder.engine.port, blob.metainfo, {
        connected: (connection) => {
          connection.send(rawHandshake(blob.metainfo, { extended, fast: true }), message(2))
          connection.send(message(6, rangeOf({ piece: 0, offset: 0, length: 16_384 })))
        },
        shaken: () => undefined,
        told: (_, { id }) => ids.push(id),
      })
      if (!stranger.socket.closed) await once(stranger.socket, 'close')
      assert.deepEqual(
        ids.filter((id) => id !== 16),
        [],
      )
    }
  })

  test('an admission that ends closes the connection', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    const config = admission('good', () => Date.now() + 800)
    const limits = { ...unlimited, uploadBytesPerSecond: mebibyte }
    const seeder = await startSeeder(t, directory, blob, { ...config, limits })
    const engine = await startEngine(t, admission('good'))
    const file = join(directory, 'copy')
    const handle = startFetch(engine, blob, file, peerFeed(seeder.peer))
    const sources = new Set<string>()
    handle.onPiece(() => {
      for (const { source } of seeder.handle.peers()) sources.add(source)
    })
    await assertFetched(handle, blob, file)
    assert.ok(sources.size > 1, 'it was admitted again')
  })

  test('limits by distance hold for that distance and what is farther', async (t) => {
    const directory = await temporaryDirectory(t)
    const seconds = async (distance: number) => {
      const blob = randomBlob(4 * mebibyte)
      const seeder = await startSeeder(t, directory, blob, { identity: { host: 'far', place: 'rack-2' } })
      const engine = await startEngine(t, {
        limits: {
          ...unlimited,
          fromDistance: new Map([[1, { ...unlimited, downloadBytesPerSecond: mebibyte }]]),
        },
      })
      const file = join(directory, `copy-${distance}`)
      const startedAt = performance.now()
      await assertFetched(startFetch(engine, blob, file, peerFeed({ ...seeder.peer, distance })), blob, file)
      return (performance.now() - startedAt) / 1000
    }
    const [unknown, far, near] = await Promise.all([seconds(255), seconds(1), seconds(0)])
    // Wide bounds: they only tell a limit from none.
    assert.ok(far > 1.5, `4 MiB at 1 MiB/s took ${far} s`)
    assert.ok(unknown > 1.5, `4 MiB at 1 MiB/s took ${unknown} s`)
    assert.ok(near < far / 1.5, `${near} s without a limit, ${far} s with it`)
  })

  test('a webseed and peers together keep to the download limit', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(12 * mebibyte)
    const webseed = await startWebseed(t, blob.bytes)
    const { peer } = await startSeeder(t, directory, blob)
    const engine = await startEngine(t, {
      limits: { ...unlimited, downloadBytesPerSecond: 4 * mebibyte },
    })
    const file = join(directory, 'copy')
    const startedAt = performance.now()
    const handle = engine.fetch({
      metainfo: blob.metainfo,
      file,
      peers: peerFeed(peer),
      webseed,
      signal: new AbortController().signal,
    })
    await assertFetched(handle, blob, file)
    const tookMs = performance.now() - startedAt
    assert.ok(tookMs > 2300, `12 MiB at 4 MiB/s took ${Math.round(tookMs)} ms`)
    const sources = new Set(handle.traffic().map(({ kind }) => kind))
    assert.deepEqual([...sources].sort(), ['peer', 'webseed'])
  })

  test('where a webseed may be used no longer, what was asked of it still comes', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    const goOn = Promise.withResolvers<undefined>()
    // It asks for all of it at once.
    const { url, requests } = await startWebseed(t, blob.bytes, (request, response) => {
      const [start = 0, end = 0] = (request.headers.range ?? '').replace('bytes=', '').split('-').map(Number)
      response.writeHead(206, { 'content-length': end - start + 1 })
      response.write(blob.bytes.subarray(start, start + mebibyte))
      void goOn.promise.then(() => response.end(blob.bytes.subarray(start + mebibyte, end + 1)))
      return true
    })
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const handle = engine.fetch({
      metainfo: blob.metainfo,
      file,
      peers: peerFeed(),
      webseed: { url, range: { firstPiece: 0, pieceCount: blob.metainfo.pieces.length / 20 } },
      signal: new AbortController().signal,
    })
    await until('a request', () => requests.length === 1)
    handle.setWebseed(undefined)
    goOn.resolve(undefined)
    await assertFetched(handle, blob, file)
    assert.equal(requests.length, 1)
  })

  test('what a peer had sent a part of before it went comes from the webseed', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    let sent = 0
    const peer = await startRawListener(t, blob.metainfo, {
      shaken: (connection) => {
        if (sent === 0) greetAsSeeder(connection, blob.metainfo)
        else connection.socket.destroy()
      },
      requested: (connection, request) => {
        if (sent++ < 3) connection.send(blockOf(request, bytesOf(blob, request)))
        else connection.socket.destroy()
      },
    })
    const { url } = await startWebseed(t, blob.bytes)
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const handle = startFetch(engine, blob, file, peerFeed(peerAt(peer.port)))
    await until('its end', () => sent > 3 && handle.peerCount === 0)
    handle.setWebseed({ url, range: { firstPiece: 0, pieceCount: pieceCount(blob.metainfo) } })
    await assertFetched(handle, blob, file, 8)
  })

  for (const [then, isLast] of [
    ['another range is given', false],
    ['no other range is given', true],
  ] as const)
    test(`what the webseed broke off of a range is fetched although ${then}`, async (t) => {
      const directory = await temporaryDirectory(t)
      const blob = randomBlob(4 * mebibyte)
      const pieces = pieceCount(blob.metainfo)
      const done = Promise.withResolvers<undefined>()
      let isFirst = true
      const { url, requests } = await startWebseed(t, blob.bytes, (request, response) => {
        if (!isFirst) return false
        isFirst = false
        const [start = 0, end = 0] = (request.headers.range ?? '')
          .replace('bytes=', '')
          .split('-')
          .map(Number)
        response.writeHead(206, { 'content-length': end - start + 1 })
        // All but the end of the last piece.
        response.write(blob.bytes.subarray(start, end))
        void done.promise.then(() => response.destroy())
        return true
      })
      const engine = await startEngine(t)
      const file = join(directory, 'copy')
      const first = isLast ? pieces : 2
      const handle = engine.fetch({
        metainfo: blob.metainfo,
        file,
        peers: peerFeed(),
        webseed: {
          url,
          range: { firstPiece: 0, pieceCount: first },
          rangeDone: () => {
            handle.setWebseed(
              isLast ? undefined : { url, range: { firstPiece: first, pieceCount: pieces - first } },
            )
            done.resolve(undefined)
          },
        },
        signal: new AbortController().signal,
      })
      await assertFetched(handle, blob, file)
      assert.ok(requests.length > 1)
    })

  test('what a lost connection was asked for is given back to the limit of its distance', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const closes = await startRawListener(t, blob.metainfo, {
      shaken: (connection) => {
        greetAsAgent(connection, blob.metainfo)
      },
      requested: ({ socket }) => {
        socket.destroy()
      },
    })
    const seeder = await startSeeder(t, directory, blob, { identity: { host: 'far', place: 'rack-2' } })
    const engine = await startEngine(t, {
      limits: {
        ...unlimited,
        fromDistance: new Map([[1, { ...unlimited, downloadBytesPerSecond: 40 * 1024 }]]),
      },
    })
    const peers = peerFeed({ ...peerAt(closes.port), distance: 1 })
    const handle = startFetch(engine, blob, join(directory, 'copy'), peers)
    await until('the lost connection', () => closes.seen.closed > 0)
    const lostAt = performance.now()
    peers.push({ ...seeder.peer, distance: 1 })
    await until('a first piece', () => handle.bytesVerified > 0, { withinMs: 30_000 })
    assert.ok(performance.now() - lostAt < 4000, 'the first piece did not wait for a debt')
  })
})

test('rackswarm: a large block that stops in the middle is fetched elsewhere, and what comes of it later harms nothing', async (t) => {
  const directory = await temporaryDirectory(t)
  const blob = randomBlob(2 * mebibyte)
  const half = randomBytes(100 * 1024)
  const stops = await startRawListener(t, blob.metainfo, {
    shaken: (connection) => {
      greetAsAgent(connection, blob.metainfo)
    },
    requested: (connection, request) => {
      if (stops.seen.requests.length > 1) return
      const whole = blockOf(request, Buffer.concat([half, randomBytes(request.length - half.length)]))
      connection.send(whole.subarray(0, 13 + half.length))
      // Goes on, in small parts, whatever it is told.
      let at = 13 + half.length
      setTimeout(() => {
        connection.every(20, () => {
          connection.send(whole.subarray(at, at + 1000))
          at += 1000
        })
      }, 1200)
    },
  })
  const engine = await startEngine(t)
  const file = join(directory, 'copy')
  const peers = peerFeed(peerAt(stops.port))
  const handle = startFetch(engine, blob, file, peers)
  await until('its requests', () => stops.seen.requests.length > 1)
  const seeder = await startSeeder(t, directory, blob)
  peers.push(seeder.peer)
  await assertFetched(handle, blob, file, 20)
})

test('rackswarm: a piece that a peer has just got is asked for at once', async (t) => {
  const directory = await temporaryDirectory(t)
  const blob = randomBlob(2 * mebibyte)
  const pieces = pieceCount(blob.metainfo)
  const waits: number[] = []
  let toldAt = 0
  let piece = 0
  const tell = (connection: RawConnection) => {
    toldAt = performance.now()
    connection.send(message(4, numberOf(piece++)))
  }
  const slow = await startRawListener(t, blob.metainfo, {
    shaken: (connection) => {
      connection.send(rawHandshake(blob.metainfo), message(1))
      tell(connection)
    },
    requested: (connection, request) => {
      if (toldAt > 0) waits.push(performance.now() - toldAt)
      toldAt = 0
      connection.send(blockOf(request, bytesOf(blob, request)))
      const { pieceLength } = blob.metainfo
      if (request.offset + request.length < pieceLength || piece === pieces) return
      // Long enough for all to be quiet, and another time of its clock each time.
      setTimeout(tell, 60 + 37 * piece, connection)
    },
  })
  const file = join(directory, 'copy')
  const handle = startFetch(await startEngine(t), blob, file, peerFeed(peerAt(slow.port)))
  await assertFetched(handle, blob, file)
  const sorted = waits.toSorted((a, b) => a - b)
  const median = sorted[sorted.length >> 1] ?? Infinity
  assert.equal(waits.length, pieces)
  assert.ok(median < 60, `${median} ms, where the clock looks every 250`)
})

test('rackswarm: hundreds of idle connections keep nobody from a seeder', async (t) => {
  const directory = await temporaryDirectory(t)
  const blob = randomBlob(2 * mebibyte)
  const seeder = await startSeeder(t, directory, blob)
  const before = process.memoryUsage().rss
  await Promise.all(
    Array.from({ length: 800 }, async (_, i) =>
      dialRaw(t, seeder.engine.port, blob.metainfo, {
        connected: (connection) => {
          // Half of them never say who they are.
          if (i % 2 === 0) connection.send(rawHandshake(blob.metainfo), message(2))
        },
        shaken: () => undefined,
      }),
    ),
  )
  await until('connections of the crowd', () => seeder.handle.peerCount > 0)
  assert.ok(seeder.handle.peerCount <= 60, `${seeder.handle.peerCount} connections`)
  const engine = await startEngine(t)
  const file = join(directory, 'copy')
  await assertFetched(startFetch(engine, blob, file, peerFeed(seeder.peer)), blob, file, 25)
  assert.ok(process.memoryUsage().rss - before < memoryMax)
})

const request = message(6, rangeOf({ piece: 0, offset: 0, length: 16_384 }))
const cancel = message(8, rangeOf({ piece: 0, offset: 0, length: 16_384 }))

/** What is sent again and again by a peer that never reads; `mebibytes` of it. */
const floods: Record<string, { part: Buffer; mebibytes: number }> = {
  'requests that are rejected': { part: request, mebibytes: 250 },
  'interest that comes and goes': { part: Buffer.concat([message(2), message(3)]), mebibytes: 150 },
  'requests and cancels': { part: Buffer.concat([message(2), request, cancel]), mebibytes: 250 },
  'extended handshakes': { part: message(20, Buffer.from('\0d1:md0:i3eee')), mebibytes: 100 },
}

describe('rackswarm: memory is bounded under a flood of', { concurrency: 2 }, () => {
  for (const [what, { part, mebibytes }] of Object.entries(floods)) {
    test(what, async (t) => {
      const directory = await temporaryDirectory(t)
      const blob = randomBlob(mebibyte)
      const torrent = await blobFile(directory, 'torrent', blob.torrent)
      const seed = await blobFile(directory, 'seed', blob.bytes)
      const seeder = startProcess(t, ['seed', torrent, seed])
      const port = await seeder.port
      const before = await seeder.peakBytes()
      const { socket } = await dialRaw(t, port, blob.metainfo, {
        connected: (connection) => {
          connection.socket.pause()
          connection.send(rawHandshake(blob.metainfo, { fast: true, extended: true }))
        },
      })
      await flood(socket, part, mebibytes)
      const grown = (await seeder.peakBytes()) - before
      assert.ok(grown < memoryMax, `grown by ${grown} bytes`)
      socket.destroy()
      const engine = await startEngine(t)
      const file = join(directory, 'copy')
      await assertFetched(startFetch(engine, blob, file, peerFeed(peerAt(port))), blob, file)
    })
  }

  test('chokes and unchokes, which ask for requests', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const torrent = await blobFile(directory, 'torrent', blob.torrent)
    const flooded = Promise.withResolvers<undefined>()
    const fickle = await startRawListener(t, blob.metainfo, {
      shaken: (connection) => {
        connection.socket.pause()
        connection.send(rawHandshake(blob.metainfo), fullBitfield(blob.metainfo))
        void flood(connection.socket, Buffer.concat([message(0), message(1)]), 50).then(() => {
          flooded.resolve(undefined)
        })
      },
    })
    const seeder = await startSeeder(t, directory, blob, {
      limits: { ...unlimited, uploadBytesPerSecond: mebibyte / 2 },
    })
    const ports = `${fickle.port},${seeder.engine.port}`
    const fetcher = startProcess(t, ['fetch', torrent, join(directory, 'copy'), ports])
    await fetcher.port
    const before = await fetcher.peakBytes()
    await flooded.promise
    const grown = (await fetcher.peakBytes()) - before
    assert.ok(grown < memoryMax, `grown by ${grown} bytes`)
    await withDeadline(fetcher.done, () => 'the fetch', 45)
  })
})

/** Resolves when all is written, or the other side takes no more. */
async function flood(socket: Socket, part: Buffer, mebibytes: number): Promise<void> {
  const some = Buffer.concat(Array<Buffer>(Math.ceil((256 * 1024) / part.length)).fill(part))
  const patienceMs = 5000
  for (let left = 4 * mebibytes; left > 0 && !socket.destroyed; left--) {
    if (socket.write(some)) continue
    const drained = once(socket, 'drain', { signal: AbortSignal.timeout(patienceMs) })
    const ended = new Promise((resolve) => socket.once('close', resolve))
    try {
      await Promise.race([drained, ended])
    } catch {
      return
    }
  }
}

/** Waits until a peer has had its chance: it has gone, or nothing moves any more. */
async function untilTried(handle: EngineHandle, { seen }: RawPeer): Promise<void> {
  await until('what the bad peer does', () => seen.closed > 0 || handle.waitingReason !== undefined)
}

function assertNoneAgain(asked: readonly number[], verified: readonly number[]): void {
  const known = new Set(verified)
  assert.deepEqual(
    asked.filter((piece) => known.has(piece)),
    [],
    'no verified piece is asked for again',
  )
}

function startProcess(t: TestContext, args: readonly string[]) {
  const child = spawn(process.execPath, [join(import.meta.dirname, 'engine-process.ts'), ...args], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  t.after(() => child.kill('SIGKILL'))
  const listeners: ((piece: number) => void)[] = []
  const port = Promise.withResolvers<number>()
  const done = Promise.withResolvers<number>()
  createInterface(child.stdout).on('line', (line) => {
    const [word, number] = line.split(' ')
    if (word === 'port') port.resolve(Number(number))
    else if (word === 'done') done.resolve(Number(number))
    else for (const listener of listeners) listener(Number(number))
  })
  return {
    port: port.promise,
    peakBytes: () => peakBytesOf(child.pid),
    done: done.promise,
    onPiece: (listener: (piece: number) => void) => {
      listeners.push(listener)
    },
    kill: async () => {
      const closed = once(child, 'close')
      child.kill('SIGKILL')
      await closed
    },
  }
}
