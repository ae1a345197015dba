import assert from 'node:assert/strict'
import { execFileSync, spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { mkdir, mkdtemp, rm, truncate, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { TestContext } from 'node:test'
import { describe, test } from 'node:test'
import type { EngineHandle, PeerAdmission } from '../../../agent/engine/engine.ts'
import { pieceCount } from '../../../lib/protocol/metainfo.ts'
import type { Blob } from './fixtures.ts'
import {
  blobFile,
  eventually,
  message,
  peerAt,
  peerFeed,
  randomBlob,
  temporaryDirectory,
} from './fixtures.ts'
import { assertFetched, mebibyte, startEngine, startFetch, startSeeder, unlimited } from './own-engine.ts'
import type { Behaviour, RawConnection, RawPeer } from './raw-peer.ts'
import {
  blockOf,
  bytesOf,
  dialRaw,
  fullBitfield,
  greetAsSeeder,
  rangeOf,
  rawHandshake,
  startRawListener,
} from './raw-peer.ts'

/** What the heap and the sockets of one engine may grow by, whatever is done to it; wide, since tests share the process. */
const memoryMax = 150 * mebibyte

const claimsAll = (connection: RawConnection, blob: Blob) => greetAsSeeder(connection, blob.metainfo)

/** Each is met by a fetch that knows nobody else at first. */
const badPeers: Record<string, (blob: Blob) => Behaviour> = {
  'closes at once': () => ({
    connected: ({ socket }) => {
      socket.destroy()
    },
  }),
  'never shakes hands': () => ({ shaken: () => undefined }),
  'closes within the handshake': ({ metainfo }) => ({
    connected: ({ socket }) => {
      socket.end(rawHandshake(metainfo).subarray(0, 30))
    },
  }),
  'shakes hands at a byte a second': ({ metainfo }) => ({
    connected: (connection) => {
      let sent = 0
      connection.every(1000, () => {
        connection.send(rawHandshake(metainfo).subarray(sent, ++sent))
      })
    },
    shaken: () => undefined,
  }),
  'speaks something else': () => ({
    connected: (connection) => {
      connection.send(randomBytes(5000))
    },
    shaken: () => undefined,
  }),
  'has another torrent': () => ({
    shaken: (connection) => {
      connection.send(rawHandshake(randomBlob(mebibyte).metainfo))
    },
  }),
  'closes after its handshake': ({ metainfo }) => ({
    shaken: ({ socket }) => {
      socket.end(rawHandshake(metainfo))
    },
  }),
  'sends garbage after its handshake': ({ metainfo }) => ({
    shaken: (connection) => {
      connection.send(rawHandshake(metainfo), randomBytes(100_000))
    },
  }),
  'closes after its bitfield': ({ metainfo }) => ({
    shaken: ({ socket }) => {
      socket.end(Buffer.concat([rawHandshake(metainfo), fullBitfield(metainfo)]))
    },
  }),
  'closes within a block': (blob) => ({
    requested: ({ socket }, request) => {
      socket.end(blockOf(request, bytesOf(blob, request)).subarray(0, 9000))
    },
  }),
  'sends blocks that are too short': (blob) => ({
    requested: (connection, request) => {
      connection.send(blockOf(request, bytesOf(blob, request).subarray(1)))
    },
  }),
  'sends blocks that are too long': (blob) => ({
    requested: (connection, request) => {
      connection.send(blockOf(request, Buffer.concat([bytesOf(blob, request), Buffer.alloc(1)])))
    },
  }),
  'sends blocks of other places': (blob) => ({
    requested: (connection, request) => {
      connection.send(blockOf({ ...request, offset: request.offset + 1 }, bytesOf(blob, request)))
    },
  }),
  'sends garbage for blocks': () => ({
    requested: (connection, request) => {
      connection.send(blockOf(request, randomBytes(request.length)))
    },
  }),
  'sends the first block for ever': (blob) => {
    const begun = new Set<RawConnection>()
    return {
      requested: (connection, request) => {
        if (begun.has(connection)) return
        begun.add(connection)
        connection.every(50, () => {
          connection.send(blockOf(request, bytesOf(blob, request)))
        })
      },
    }
  },
  'sends a byte a second': (blob) => ({
    requested: (connection, request) => {
      const block = blockOf(request, bytesOf(blob, request))
      let sent = 0
      connection.every(1000, () => {
        connection.send(block.subarray(sent, ++sent))
      })
    },
  }),
  'sends a byte each 100 ms': (blob) => {
    const begun = new Set<RawConnection>()
    return {
      requested: (connection, request) => {
        if (begun.has(connection)) return
        begun.add(connection)
        const block = blockOf(request, bytesOf(blob, request))
        let sent = 0
        connection.every(100, () => {
          connection.send(block.subarray(sent, ++sent))
        })
      },
    }
  },
  'never answers': () => ({}),
  'claims what it lacks, and rejects': ({ metainfo }) => ({
    shaken: (connection) => {
      greetAsSeeder(connection, metainfo, { fast: true })
    },
    requested: (connection, request) => {
      connection.send(message(16, rangeOf(request)))
    },
  }),
  'chokes whoever asks, and unchokes later': () => ({
    requested: (connection) => {
      connection.send(message(0))
      setTimeout(() => {
        connection.send(message(1))
      }, 100)
    },
  }),
  'asks for what no piece has': (blob) => ({
    shaken: (connection) => {
      claimsAll(connection, blob)
      connection.send(message(2), message(6, rangeOf({ piece: 0, offset: 0xfffffff0, length: 0xffffffff })))
    },
  }),
  'tells of pieces that there are not': (blob) => ({
    shaken: (connection) => {
      claimsAll(connection, blob)
      connection.send(message(4, Buffer.from([0xff, 0xff, 0xff, 0xff])))
    },
  }),
}

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
      await eventually(() => bad.seen.connections > 0, 'a connection to it')
      await untilTold(handle, bad)
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
    const blob = randomBlob(6 * mebibyte)
    const late: { connection?: RawConnection; rest?: Buffer } = {}
    const liar = await startRawListener(t, blob.metainfo, {
      requested: (connection, request) => {
        if (late.connection) return
        const block = blockOf(
          request,
          Buffer.concat([bytesOf(blob, request).subarray(0, 1), Buffer.alloc(request.length - 1)]),
        )
        connection.send(block.subarray(0, 14))
        Object.assign(late, { connection, rest: block.subarray(14) })
      },
    })
    const engine = await startEngine(t, { limits: { ...unlimited, downloadBytesPerSecond: 3 * mebibyte } })
    const file = join(directory, 'copy')
    const peers = peerFeed(peerAt(liar.port))
    const handle = startFetch(engine, blob, file, peers)
    await eventually(() => late.rest !== undefined, 'the start of a block')
    const first = liar.seen.requests[0]?.piece ?? 0
    const honest = await startRawListener(t, blob.metainfo, {
      requested: (connection, request) => {
        connection.send(blockOf(request, bytesOf(blob, request)))
      },
    })
    let sentAt = 0
    handle.onPiece(() => {
      // The piece is there without the late block, and its memory serves another.
      if (!handle.has(first) || late.rest === undefined || handle.bytesVerified < sentAt) return
      sentAt = handle.bytesVerified + 256 * 1024
      late.connection?.send(late.rest.subarray(0, 4096))
      late.rest = late.rest.subarray(4096)
    })
    peers.push(peerAt(honest.port))
    await assertFetched(handle, blob, file)
    assert.equal(honest.seen.connections, 1, 'the honest peer is not blamed')
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
    await eventually(() => handle.bytesVerified > 0, 'a first piece')
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
    const seeder = await startRawListener(t, blob.metainfo, {
      requested: (connection, request) => {
        asked.push(request.piece)
        sentBytes += request.length
        // Some 10 MB/s: time to be killed in.
        setTimeout(() => {
          connection.send(blockOf(request, bytesOf(blob, request)))
        }, sentBytes / 10_000)
      },
    })
    const verified = new Set<number>()
    const kills = 4
    for (let kill = 1; kill <= kills; kill++) {
      const fetcher = startProcess(t, ['fetch', torrent, file, String(seeder.port)])
      const before = [...verified]
      fetcher.onPiece((piece) => verified.add(piece))
      await eventually(
        () => verified.size >= (kill * pieceCount(blob.metainfo)) / (kills + 1),
        `a part of the pieces before kill ${kill}`,
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
    await eventually(() => handle.bytesVerified > 0, 'a first piece')
    await eventually(() => handle.waitingReason !== undefined, 'a reason why nothing moves')
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
    await eventually(() => broken.handle.traffic().length > 0, 'bytes of the changed file')
    await eventually(() => handle.waitingReason !== undefined, 'a reason why nothing moves')
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
    const handle = startFetch(engine, blob, file, peerFeed(itself, ...dead, itself, seeder.peer))
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
    await eventually(() => handles.every((handle) => handle.peerCount === 1), 'a connection at both ends')
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
    await eventually(() => /disk is full/.test(handle.waitingReason ?? ''), 'the reason')
    assert.ok(handle.bytesVerified < blob.bytes.length)
    await rm(other)
    await assertFetched(handle, blob, file)
    assert.equal(handle.waitingReason, undefined)
    await engine[Symbol.asyncDispose]()
  })

  test('who is not admitted gets nothing, and once it is, everything', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const seeder = await startSeeder(t, directory, blob, { admission: admission('good') })
    const token = { now: 'bad' }
    const engine = await startEngine(t, { admission: { ...admission('good'), tokenFor: () => token.now } })
    const file = join(directory, 'copy')
    const handle = startFetch(engine, blob, file, peerFeed(seeder.peer))
    await eventually(() => handle.waitingReason !== undefined, 'a reason why nothing moves')
    assert.equal(handle.bytesVerified, 0)
    assert.deepEqual(seeder.handle.traffic(), [])
    token.now = 'good'
    await assertFetched(handle, blob, file)
  })

  test('who shows no token is told nothing, not even what there is', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(mebibyte)
    const seeder = await startSeeder(t, directory, blob, { admission: admission('good') })
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
        ids.filter((id) => id !== 16 && id !== 20),
        [],
      )
    }
  })

  test('an admission that ends closes the connection', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    const config = { admission: admission('good', () => Date.now() + 800) }
    const limits = { ...unlimited, uploadBytesPerSecond: mebibyte }
    const seeder = await startSeeder(t, directory, blob, { ...config, limits })
    const engine = await startEngine(t, { admission: admission('good') })
    const file = join(directory, 'copy')
    const handle = startFetch(engine, blob, file, peerFeed(seeder.peer))
    const sources = new Set<string>()
    handle.onPiece(() => {
      for (const { source } of seeder.handle.peers()) sources.add(source)
    })
    await assertFetched(handle, blob, file)
    assert.ok(sources.size > 1, 'it was admitted again')
  })

  test('limits by distance hold for that distance alone', async (t) => {
    const directory = await temporaryDirectory(t)
    const seconds = async (distance: number) => {
      const blob = randomBlob(4 * mebibyte)
      const seeder = await startSeeder(t, directory, blob, { identity: { host: 'far', place: 'rack-2' } })
      const engine = await startEngine(t, {
        limits: {
          ...unlimited,
          byDistance: new Map([[1, { ...unlimited, downloadBytesPerSecond: mebibyte }]]),
        },
      })
      const file = join(directory, `copy-${distance}`)
      const startedAt = performance.now()
      await assertFetched(startFetch(engine, blob, file, peerFeed({ ...seeder.peer, distance })), blob, file)
      return (performance.now() - startedAt) / 1000
    }
    const [far, near] = await Promise.all([seconds(1), seconds(0)])
    // Wide bounds: they only tell a limit from none.
    assert.ok(far > 1.5, `4 MiB at 1 MiB/s took ${far} s`)
    assert.ok(near < far / 1.5, `${near} s without a limit, ${far} s with it`)
  })

  test('what a lost connection was asked for is given back to the limit of its distance', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(2 * mebibyte)
    const closes = await startRawListener(t, blob.metainfo, {
      requested: ({ socket }) => {
        socket.destroy()
      },
    })
    const seeder = await startSeeder(t, directory, blob, { identity: { host: 'far', place: 'rack-2' } })
    const engine = await startEngine(t, {
      limits: {
        ...unlimited,
        byDistance: new Map([[1, { ...unlimited, downloadBytesPerSecond: 100 * 1024 }]]),
      },
    })
    const peers = peerFeed({ ...peerAt(closes.port), distance: 1 })
    const handle = startFetch(engine, blob, join(directory, 'copy'), peers)
    await eventually(() => closes.seen.closed > 0, 'the lost connection')
    const lostAt = performance.now()
    peers.push({ ...seeder.peer, distance: 1 })
    await eventually(() => handle.bytesVerified > 0, 'a first piece', 30)
    assert.ok(performance.now() - lostAt < 8000, 'the first piece did not wait for a debt')
  })
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
  await eventually(() => seeder.handle.peerCount > 0, 'connections of the crowd')
  assert.ok(seeder.handle.peerCount <= 60, `${seeder.handle.peerCount} connections`)
  const engine = await startEngine(t)
  const file = join(directory, 'copy')
  await assertFetched(startFetch(engine, blob, file, peerFeed(seeder.peer)), blob, file, 25)
  assert.ok(process.memoryUsage().rss - before < memoryMax)
})

/** Each is sent without end by a peer that never reads. */
const floods: Record<string, Buffer> = {
  'requests that are rejected': message(6, rangeOf({ piece: 0, offset: 0, length: 16_384 })),
  'interest that comes and goes': Buffer.concat([message(2), message(3)]),
  'requests and cancels': Buffer.concat([
    message(2),
    message(6, rangeOf({ piece: 0, offset: 0, length: 16_384 })),
    message(8, rangeOf({ piece: 0, offset: 0, length: 16_384 })),
  ]),
  'extended handshakes': message(20, Buffer.from('\0d1:md0:i3eee')),
}

for (const [what, part] of Object.entries(floods)) {
  test(`rackswarm: a flood of ${what} is bounded in memory`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(mebibyte)
    const seeder = await startSeeder(t, directory, blob)
    const flood = Buffer.concat(Array<Buffer>(Math.ceil((256 * 1024) / part.length)).fill(part))
    const before = process.memoryUsage().rss
    const attackers = Array.from({ length: 2 }, () => {
      const socket = connect(seeder.engine.port, '127.0.0.1')
      t.after(() => socket.destroy())
      socket.on('error', () => undefined)
      socket.pause()
      socket.write(rawHandshake(blob.metainfo, { fast: true, extended: true }))
      let left = 100
      const more = () => {
        while (left-- > 0 && !socket.destroyed && socket.write(flood));
      }
      socket.on('drain', more)
      more()
      return { socket, isOver: () => left <= 0 || socket.destroyed }
    })
    await eventually(() => {
      assert.ok(process.memoryUsage().rss - before < memoryMax, 'memory is bounded')
      return attackers.every(({ isOver }) => isOver())
    }, 'the end of the flood').catch((error: unknown) => {
      // Not read any more is as good as closed.
      if (error instanceof assert.AssertionError) throw error
    })
    for (const { socket } of attackers) socket.destroy()
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    await assertFetched(startFetch(engine, blob, file, peerFeed(seeder.peer)), blob, file)
  })
}

/** Waits until a peer has had its chance: it was asked, it has gone, or nothing moves. */
async function untilTold(handle: EngineHandle, { seen }: RawPeer): Promise<void> {
  await eventually(
    () => seen.requests.length > 0 || seen.closed > 0 || handle.waitingReason !== undefined,
    'what the bad peer does',
  )
}

function admission(good: string, until: () => number = () => Infinity): PeerAdmission {
  return {
    tokenFor: () => good,
    admit: async (token) => (token === good ? until() : undefined),
  }
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

async function mountSmallDisk(t: TestContext, mebibytes: number): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-small-disk-'))
  const disk = join(directory, 'disk')
  await mkdir(disk)
  execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${mebibytes}m`, 'tmpfs', disk])
  t.after(async () => {
    execFileSync('umount', ['--lazy', disk])
    await rm(directory, { recursive: true })
  })
  return disk
}
