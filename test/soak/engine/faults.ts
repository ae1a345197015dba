// What may befall a host, at random times. Each ends with the right file or with a clear error, within its memory.
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { open, rename, rm, stat, truncate, writeFile } from 'node:fs/promises'
import type { AddressInfo, Socket } from 'node:net'
import { connect, createServer } from 'node:net'
import { pieceCount } from '../../../lib/protocol/metainfo.ts'
import { blobFile, mebibyte, message, mountSmallDisk, withDeadline } from '../../agent/engine/fixtures.ts'
import type { Behaviour, RawConnection } from '../../agent/engine/raw-peer.ts'
import {
  badPeers,
  blockOf,
  bytesOf,
  dialRaw,
  rangeOf,
  rawHandshake,
  startRawListener,
} from '../../agent/engine/raw-peer.ts'
import type { Owner } from '../../support/tracker.ts'
import { until } from '../../support/until.ts'
import type { HostPeer } from './host.ts'
import type { Round, Seen, SwarmFiles } from './round.ts'
import { between, boundedPeak, createSwarmFiles, endedRight, startFetcher, startSeeder } from './round.ts'
import type { Host } from './start-host.ts'

type Fault = (round: Round) => Promise<Seen>

const crowd = 5_000
const kills = 10
/** What may be asked for and not yet be verified: what is asked for ahead, and the pieces that it is part of. */
const inFlightMax = 5 * mebibyte
/** The engine gives a full disk up after 30 s. */
const diskFullSeconds = 30
/** An engine remembers so many peers of a tracker; those that it heard of last. */
const candidatesMax = 300

export const faults: Readonly<Record<string, Fault>> = {
  ...Object.fromEntries(
    Object.entries(badPeers).map(([what, behaviour]) => [
      `a peer that ${what}`,
      async (round: Round) => besideBadPeers(round, ({ blob }) => [behaviour(blob)]),
    ]),
  ),
  'all of these peers at once': async (round) =>
    besideBadPeers(round, ({ blob }) => Object.values(badPeers).map((behaviour) => behaviour(blob))),
  'two peers that never answer': async (round) => besideBadPeers(round, () => [{}, {}], 1),
  'a peer that sends every block twice': sendsTwice,
  'a peer that closes after some bytes, again and again': closesAnywhere,
  'a crowd of 5,000 connections to a seeder': async (round) => inCrowd(round, 'seeder'),
  'a crowd of 5,000 connections to a fetcher': async (round) => inCrowd(round, 'fetcher'),
  'a peer that asks a seeder for absurd ranges': asksAbsurdly,
  'a tracker that returns the host itself': async (round) =>
    withPeers(round, ({ port }) => ['127.0.0.1', '127.0.0.2', '127.0.0.3'].map((host) => ({ host, port }))),
  'a tracker that returns dead peers': async (round) => withPeers(round, () => deadPeers(100)),
  'a tracker that returns 10,000 peers': async (round) => withPeers(round, () => deadPeers(10_000)),
  'a seeder that is killed, three times, and another that is started': seedersKilled,
  'kill -9 of the fetcher, ten times': fetcherKilled,
  'a disk that is full for more than 30 s': diskFull,
  'a file that is overwritten under its seeder': async (round) =>
    changedUnderSeeder(round, async (file, bytes) => {
      await using handle = await open(file, 'r+')
      const start = Math.floor((round.random() * bytes) / 2)
      await handle.write(randomBytes(bytes - start), 0, bytes - start, start)
    }),
  'a file that is truncated under its seeder': async (round) =>
    changedUnderSeeder(round, async (file, bytes) => truncate(file, Math.floor(round.random() * bytes))),
  'a file that is replaced under its seeder': async (round) =>
    changedUnderSeeder(round, async (file, bytes) => {
      await writeFile(`${file}.new`, randomBytes(bytes))
      await rename(`${file}.new`, file)
    }),
  'a file that is removed under its seeder': async (round) =>
    changedUnderSeeder(round, async (file) => rm(file)),
}

/** The honest seeder comes while they have their turn, or once they have had it. */
async function besideBadPeers(
  round: Round,
  behavioursOf: (files: SwarmFiles) => readonly Behaviour[],
  mebibytesMax = 6,
): Promise<Seen> {
  const files = await createSwarmFiles(round, Math.round(between(round, 1, mebibytesMax) * mebibyte))
  const listeners = await Promise.all(
    behavioursOf(files).map((behaviour) => startRawListener(round.owner, files.blob.metainfo, behaviour)),
  )
  const fetcher = await startFetcher(round, files)
  fetcher.tell(...listeners)
  await until('a connection to each', () => listeners.every(({ seen }) => seen.connections > 0))
  await round.wait(0, 4000)
  const seeder = await startSeeder(round, files)
  const cameAtMs = performance.now()
  fetcher.tell(seeder)
  const seen = await endedRight(fetcher, files)
  return { ...seen, tookMs: performance.now() - cameAtMs }
}

async function sendsTwice(round: Round): Promise<Seen> {
  const files = await createSwarmFiles(round, Math.round(between(round, 1, 16) * mebibyte))
  const { blob } = files
  const twice = await startRawListener(round.owner, blob.metainfo, {
    requested: (connection, request) => {
      const block = blockOf(request, bytesOf(blob, request))
      const send = () => {
        connection.send(block)
      }
      send()
      setTimeout(send, round.random() * 20)
    },
  })
  const fetcher = await startFetcher(round, files)
  fetcher.tell(twice)
  return endedRight(fetcher, files)
}

/** An honest seeder behind a line that breaks within the handshake, within a block, wherever. */
async function closesAnywhere(round: Round): Promise<Seen> {
  const files = await createSwarmFiles(round, Math.round(between(round, 4, 16) * mebibyte))
  const seeder = await startSeeder(round, files)
  const cuts: number[] = []
  const line = await startLine(round.owner, seeder.port, () => {
    // As often within the first bytes as within the last mebibytes.
    const bytes = Math.ceil(files.blob.bytes.length ** round.random())
    cuts.push(bytes)
    return bytes
  })
  const fetcher = await startFetcher(round, files)
  fetcher.tell({ port: line })
  await round.wait(2000, 8000)
  fetcher.tell(seeder)
  const seen = await endedRight(fetcher, files)
  return { ...seen, note: `cut after ${cuts.join(', ')} bytes` }
}

/** Half of them never say who they are. All stay for as long as they are let. */
async function inCrowd(round: Round, of: 'seeder' | 'fetcher'): Promise<Seen> {
  const files = await createSwarmFiles(round, Math.round(between(round, 4, 8) * mebibyte))
  const seeder = await startSeeder(round, files, { uploadBytesPerSecond: 2 * mebibyte })
  const fetcher = await startFetcher(round, files)
  const target = of === 'seeder' ? seeder : fetcher
  const dialling = dialCrowd(round, files, target.port)
  await round.wait(0, 1500)
  fetcher.tell(seeder)
  const seen = await endedRight(fetcher, files)
  const connected = await dialling
  const peakBytes = Math.max(seen.peakBytes, await boundedPeak(target))
  assert.ok(connected >= crowd, `${connected} connections were made, need ${crowd}`)
  return { ...seen, peakBytes }
}

async function dialCrowd(round: Round, { blob }: SwarmFiles, port: number): Promise<number> {
  const atOnce = 100
  let connected = 0
  for (let i = 0; i < crowd; i += atOnce) {
    const some = Array.from({ length: atOnce }, async (_, j) => {
      await dialRaw(round.owner, port, blob.metainfo, {
        connected: (connection) => {
          if (j % 2 === 0) connection.send(rawHandshake(blob.metainfo), message(2))
        },
        shaken: () => undefined,
      })
      connected++
    })
    await withDeadline(Promise.all(some), () => `connections ${i} to ${i + atOnce}`)
    await round.wait(0, 20)
  }
  return connected
}

/** While somebody else fetches. It comes again whenever it is thrown out. */
async function asksAbsurdly(round: Round): Promise<Seen> {
  const files = await createSwarmFiles(round, Math.round(between(round, 2, 6) * mebibyte))
  const { metainfo } = files.blob
  const seeder = await startSeeder(round, files, { uploadBytesPerSecond: 2 * mebibyte })
  const fetcher = await startFetcher(round, files)
  const numbers = [0, 1, pieceCount(metainfo), metainfo.pieceLength, 2 ** 17 + 1, 2 ** 31, 2 ** 32 - 1]
  const some = () => numbers[Math.floor(round.random() * numbers.length)] ?? 0
  let asked = 0
  const askOnce = (connection: RawConnection) => {
    connection.send(message(6, rangeOf({ piece: some(), offset: some(), length: some() })))
    asked++
  }
  fetcher.tell(seeder)
  const fetched = endedRight(fetcher, files)
  for (let visit = 0; visit < 20; visit++) {
    const absurd = await dialRaw(round.owner, seeder.port, metainfo, {
      connected: (connection) => {
        connection.send(rawHandshake(metainfo, { fast: visit % 2 === 0 }), message(2))
      },
      shaken: (connection) => {
        connection.every(2, () => {
          askOnce(connection)
        })
      },
    })
    await round.wait(50, 250)
    absurd.socket.destroy()
  }
  const seen = await fetched
  assert.ok(asked > 0, 'nothing absurd was asked')
  return { ...seen, peakBytes: Math.max(seen.peakBytes, await boundedPeak(seeder)) }
}

/** The seeder is the last but some of those that the tracker returns, or comes a moment later. */
async function withPeers(round: Round, peersOf: (fetcher: Host) => HostPeer[]): Promise<Seen> {
  const files = await createSwarmFiles(round, Math.round(between(round, 1, 6) * mebibyte))
  const fetcher = await startFetcher(round, files)
  const peers = peersOf(fetcher)
  const isLate = round.random() < 0.5
  const seeder = await startSeeder(round, files)
  if (!isLate) {
    const after = Math.floor(between(round, 0, Math.min(peers.length, candidatesMax - 1)))
    peers.splice(peers.length - after, 0, { port: seeder.port })
  }
  fetcher.tell(...peers)
  await round.wait(0, 2000)
  if (isLate) fetcher.tell(seeder)
  return endedRight(fetcher, files)
}

/** Nobody listens on port 1. */
function deadPeers(count: number): HostPeer[] {
  return Array.from({ length: count }, (_, i) => ({
    host: `127.${1 + (i % 200)}.${Math.floor(i / 200)}.9`,
    port: 1,
  }))
}

async function seedersKilled(round: Round): Promise<Seen> {
  const files = await createSwarmFiles(round, Math.round(between(round, 12, 16) * mebibyte))
  const fetcher = await startFetcher(round, files)
  const fetched = endedRight(fetcher, files)
  // It is waited for below.
  fetched.catch(() => undefined)
  for (let kill = 0; kill < 3; kill++) {
    const seeder = await startSeeder(round, files, { uploadBytesPerSecond: 3 * mebibyte })
    const before = fetcher.progress.receivedBytes
    fetcher.tell(seeder)
    await until('bytes of the new seeder', () => fetcher.progress.receivedBytes > before)
    await round.wait(0, 800)
    await seeder.kill()
  }
  assert.ok(fetcher.progress.verifiedBytes < files.blob.bytes.length, 'it ended before the last kill')
  fetcher.tell(await startSeeder(round, files))
  return fetched
}

/** No verified piece is asked for again, so that no more comes than the blob and what was in flight at each kill. */
async function fetcherKilled(round: Round): Promise<Seen> {
  const files = await createSwarmFiles(round, Math.round(between(round, 24, 48) * mebibyte))
  const { blob } = files
  const pieces = pieceCount(blob.metainfo)
  const bytesPerMs = between(round, 8_000, 20_000)
  /** Of this life, by piece. */
  const sent = new Map<number, number>()
  const verified = new Set<number>()
  let sentBytes = 0
  let inFlightBytes = 0
  let again: number | undefined
  let freeAtMs = 0
  const seeder = await startRawListener(round.owner, blob.metainfo, {
    requested: (connection, request) => {
      if (verified.has(request.piece)) again = request.piece
      freeAtMs = Math.max(freeAtMs, performance.now()) + request.length / bytesPerMs
      setTimeout(() => {
        if (!connection.socket.writable) return
        sent.set(request.piece, (sent.get(request.piece) ?? 0) + request.length)
        sentBytes += request.length
        connection.send(blockOf(request, bytesOf(blob, request)))
      }, freeAtMs - performance.now())
    },
  })
  const file = `${files.directory}/killed`
  const startedAtMs = performance.now()
  let peakBytes = 0
  for (let kill = 1; kill <= kills; kill++) {
    // Some die before they have said anything: while they check what there is.
    const dies = kill % 4 === 0 ? 'early' : 'late'
    let life: Pick<Host, 'pieces' | 'kill'> | undefined
    const starting = startFetcher(round, files, { file, started: (host) => (life = host) })
    starting.catch(() => undefined)
    if (dies === 'early') await round.wait(100, 500)
    else {
      const fetcher = await starting
      fetcher.tell(seeder)
      const goal = verified.size + Math.max(1, between(round, 0.3, 1) * (pieces / kills))
      await until(`pieces before kill ${kill}`, () => verified.size + fetcher.pieces.size >= goal)
      await round.wait(0, 20)
      peakBytes = Math.max(peakBytes, await boundedPeak(fetcher))
    }
    await life?.kill()
    for (const piece of life?.pieces ?? []) verified.add(piece)
    const lost = [...sent].reduce((sum, [piece, bytes]) => (verified.has(piece) ? sum : sum + bytes), 0)
    assert.ok(lost <= inFlightMax, `${lost} bytes were in flight at kill ${kill}`)
    inFlightBytes += lost
    sent.clear()
  }
  assert.ok(verified.size < pieces, 'it ended before the last kill')
  const last = await startFetcher(round, files, { file })
  last.tell(seeder)
  const seen = await endedRight(last, files)
  assert.equal(again, undefined, `piece ${again ?? ''} was verified and asked for again`)
  const sizeBytes = blob.bytes.length
  assert.ok(
    sentBytes <= sizeBytes + inFlightBytes,
    `${sentBytes} bytes came, more than ${sizeBytes} and ${inFlightBytes} in flight`,
  )
  return {
    tookMs: performance.now() - startedAtMs,
    peakBytes: Math.max(peakBytes, seen.peakBytes),
    note: `${mib(sentBytes)} came of ${mib(sizeBytes)}, ${mib(inFlightBytes)} of it in flight at ${kills} kills`,
  }
}

/** It says why it waits, gives up with the reason, and the next try ends right. */
async function diskFull(round: Round): Promise<Seen> {
  const files = await createSwarmFiles(round, 8 * mebibyte)
  const disk = await mountSmallDisk(round.owner, 10)
  const startedAtMs = performance.now()
  const other = await blobFile(
    disk,
    'someone-elses',
    randomBytes(Math.round(between(round, 3, 9) * mebibyte)),
  )
  const seeder = await startSeeder(round, files)
  const fetcher = await startFetcher(round, files, { file: `${disk}/copy` })
  fetcher.tell(seeder)
  await until('the reason', () => /disk is full/.test(fetcher.progress.waiting ?? ''))
  const fullAtMs = performance.now()
  await assert.rejects(fetcher.fetched(2 * diskFullSeconds), /ENOSPC|no space|disk is full/)
  const waitedSeconds = (performance.now() - fullAtMs) / 1000
  assert.ok(waitedSeconds > diskFullSeconds - 2, `it gave up after ${waitedSeconds} s`)
  await round.wait(0, 3000)
  await rm(other)
  fetcher.again()
  const seen = await endedRight(fetcher, files)
  const tookMs = performance.now() - startedAtMs
  return { ...seen, tookMs, note: `gave up after ${waitedSeconds.toFixed(1)} s, ended right when told again` }
}

/** In the middle of a fetch. Another seeder comes later. */
async function changedUnderSeeder(
  round: Round,
  change: (file: string, bytes: number) => Promise<void>,
): Promise<Seen> {
  const files = await createSwarmFiles(round, Math.round(between(round, 6, 10) * mebibyte))
  const file = await blobFile(files.directory, 'changed', files.blob.bytes)
  const broken = await startSeeder(round, files, { file, uploadBytesPerSecond: 2 * mebibyte })
  const fetcher = await startFetcher(round, files)
  fetcher.tell(broken)
  await until('the first bytes', () => fetcher.progress.receivedBytes > 0)
  await round.wait(0, 1500)
  await change(file, (await stat(file)).size)
  await round.wait(0, 4000)
  fetcher.tell(await startSeeder(round, files))
  const seen = await endedRight(fetcher, files)
  return { ...seen, peakBytes: Math.max(seen.peakBytes, await boundedPeak(broken)) }
}

/** A port that passes on what another says, and breaks each connection after `bytesOf` bytes of it. */
async function startLine(owner: Owner, target: number, bytesOf: () => number): Promise<number> {
  const sockets = new Set<Socket>()
  const keep = (socket: Socket, other: Socket) => {
    sockets.add(socket)
    socket.on('error', () => undefined)
    socket.once('close', () => {
      sockets.delete(socket)
      other.destroy()
    })
  }
  const server = createServer((near) => {
    const far = connect({ port: target, host: '127.0.0.1' })
    keep(near, far)
    keep(far, near)
    near.pipe(far)
    let left = bytesOf()
    far.on('data', (chunk: Buffer) => {
      const part = chunk.subarray(0, left)
      left -= part.length
      if (left === 0) {
        far.removeAllListeners('data')
        near.end(part, () => near.destroy())
      } else if (!near.write(part)) {
        far.pause()
        near.once('drain', () => far.resume())
      }
    })
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  owner.after(() => {
    for (const socket of sockets) socket.destroy()
    server.close()
  })
  return (server.address() as AddressInfo).port
}

function mib(bytes: number): string {
  return `${(bytes / mebibyte).toFixed(1)} MiB`
}
