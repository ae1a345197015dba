import assert from 'node:assert/strict'
import type { ChildProcess } from 'node:child_process'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import type { EngineHandle, EnginePeer } from '../../../agent/engine/engine.ts'
import { createWebtorrentEngine } from '../../../agent/engine/webtorrent/webtorrent.ts'
import { writeBlobInfo, writeTorrent } from '../../../lib/protocol/metainfo.ts'
import { aria2Options, freePort, startTinyTracker } from '../../support/foreign.ts'
import { until, untilListening } from '../../support/until.ts'
import type { Blob } from './fixtures.ts'
import {
  admission,
  blobFile,
  mebibyte,
  peerAt,
  peerFeed,
  randomBlob,
  temporaryDirectory,
  withDeadline,
} from './fixtures.ts'
import { assertFetched, engineConfig, startEngine, startFetch, startSeeder, unlimited } from './own-engine.ts'

/** Not a whole number of pieces, nor of blocks. */
const sizeBytes = 24 * mebibyte + 12_345

/** A client of somebody else, with a whole copy or none. */
interface Foreign {
  readonly peer: EnginePeer
  /** Its copy, once it has one. */
  readonly file: string
  /** It has everything. */
  readonly done: Promise<void>
}

/** Where it works, whether it seeds, and the ports of the peers that it is told of. */
interface Place {
  readonly blob: Blob
  readonly directory: string
  readonly whole: boolean
  readonly peers: readonly number[]
}

type Start = (t: TestContext, place: Place) => Promise<Foreign>

const clients: Record<string, Start> = {
  aria2: startAria2,
  libtorrent: startLibtorrent,
  webtorrent: startWebtorrent,
}

for (const [name, start] of Object.entries(clients)) {
  test(`rackswarm fetches from ${name}`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(sizeBytes)
    const seeder = await start(t, { blob, directory, whole: true, peers: [] })
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    await assertFetched(startFetch(engine, blob, file, peerFeed(seeder.peer)), blob, file)
  })

  test(`${name} fetches from rackswarm`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(sizeBytes)
    const seeder = await startSeeder(t, directory, blob)
    const fetcher = await start(t, { blob, directory, whole: false, peers: [seeder.engine.port] })
    await assertForeign(fetcher, blob)
    assert.ok(uploaded(seeder.handle) >= sizeBytes)
  })

  test(`${name} fetches from rackswarm what that has not whole yet`, async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(16 * mebibyte)
    const seeder = await startSeeder(t, directory, blob, {
      limits: { ...unlimited, uploadBytesPerSecond: 8 * mebibyte },
    })
    const engine = await startEngine(t)
    const foreign = await start(t, { blob, directory, whole: false, peers: [engine.port] })
    const file = join(directory, 'copy')
    const handle = startFetch(engine, blob, file, peerFeed(peerAt(seeder.engine.port), foreign.peer))
    await Promise.all([assertFetched(handle, blob, file), assertForeign(foreign, blob)])
    assert.ok(uploaded(handle) >= blob.bytes.length)
  })
}

test('agents with one engine or the other show each other their tokens', async (t) => {
  const directory = await temporaryDirectory(t)
  const blob = randomBlob(2 * mebibyte)
  const seed = {
    metainfo: blob.metainfo,
    file: await blobFile(directory, 'seed', blob.bytes),
    peers: peerFeed(),
  }
  const { signal } = new AbortController()
  const startOther = async () => {
    const other = await createWebtorrentEngine(engineConfig(admission('good')), {
      monotonic: () => performance.now(),
      random: Math.random,
    })
    t.after(() => other[Symbol.asyncDispose]())
    return other
  }
  const start = () => startEngine(t, admission('good'))
  for (const [from, to] of [
    [await startOther(), await start()],
    [await start(), await startOther()],
  ] as const) {
    from.seed({ ...seed, signal })
    const file = join(directory, `copy-${to.port}`)
    await assertFetched(startFetch(to, blob, file, peerFeed(peerAt(from.port))), blob, file)
  }
})

test('rackswarm fetches from all of them at once', async (t) => {
  const blob = randomBlob(32 * mebibyte)
  const seeders = await Promise.all(
    Object.values(clients).map(async (start) => {
      const directory = await temporaryDirectory(t)
      return start(t, { blob, directory, whole: true, peers: [] })
    }),
  )
  const engine = await startEngine(t, { limits: { ...unlimited, downloadBytesPerSecond: 16 * mebibyte } })
  const directory = await temporaryDirectory(t)
  const file = join(directory, 'copy')
  const handle = startFetch(engine, blob, file, peerFeed(...seeders.map(({ peer }) => peer)))
  await assertFetched(handle, blob, file)
  assert.equal(handle.traffic().filter(({ downloadedBytes }) => downloadedBytes > 0).length, seeders.length)
})

test('a swarm of all of them is fed by one rackswarm seeder', async (t) => {
  const blob = randomBlob(16 * mebibyte)
  const directory = await temporaryDirectory(t)
  const seeder = await startSeeder(t, directory, blob, {
    limits: { ...unlimited, uploadBytesPerSecond: 12 * mebibyte },
  })
  const engine = await startEngine(t)
  const ports = [seeder.engine.port, engine.port]
  const foreigners = await Promise.all(
    Object.values(clients).map(async (start) =>
      start(t, { blob, directory: await temporaryDirectory(t), whole: false, peers: ports }),
    ),
  )
  const file = join(directory, 'copy')
  const peers = peerFeed(peerAt(seeder.engine.port), ...foreigners.map(({ peer }) => peer))
  const handle = startFetch(engine, blob, file, peers)
  await Promise.all([
    assertFetched(handle, blob, file),
    ...foreigners.map((foreign) => assertForeign(foreign, blob)),
  ])
})

async function assertForeign({ done, file }: Foreign, blob: Blob): Promise<void> {
  await withDeadline(done, () => `the foreign fetch of ${file}`, 45)
  assert.ok((await readFile(file)).equals(blob.bytes), 'the bytes are those of the blob')
}

function uploaded(handle: EngineHandle): number {
  return handle.traffic().reduce((total, { uploadedBytes }) => total + uploadedBytes, 0)
}

async function startAria2(t: TestContext, place: Place): Promise<Foreign> {
  const { home, file } = await makeHome(place)
  // Nothing else tells aria2 of a peer.
  const completed = Promise.withResolvers<undefined>()
  const peers = Buffer.concat(place.peers.map((each) => peerAt(each).endpoint.compact))
  const tracker = await startTinyTracker((announce) => {
    if (announce.get('event') === 'completed') completed.resolve(undefined)
    return peers
  })
  t.after(() => tracker[Symbol.asyncDispose]())
  const torrent = await blobFile(place.directory, 'aria2.torrent', torrentOf(place.blob, tracker.url))
  const port = await freePort()
  const child = startChild(t, 'aria2c', [
    ...aria2Options,
    `--listen-port=${port}`,
    `--dir=${home}`,
    '--check-integrity=true',
    '--seed-ratio=0.0',
    torrent,
  ])
  await Promise.race([untilListening(port), ended(child)])
  return { peer: peerAt(port), file, done: place.whole ? Promise.resolve() : completed.promise }
}

async function startLibtorrent(t: TestContext, place: Place): Promise<Foreign> {
  const { home, file } = await makeHome(place)
  const torrent = await blobFile(place.directory, 'libtorrent.torrent', place.blob.torrent)
  const port = await freePort()
  // Debian's interpreter: another Python first in PATH does not see Debian's modules.
  const child = startChild(t, '/usr/bin/python3', [
    '-c',
    libtorrentScript,
    torrent,
    home,
    String(port),
    ...place.peers.map(String),
  ])
  const words = new Set<string>()
  if (child.stdout) createInterface(child.stdout).on('line', (word) => words.add(word))
  const says = async (word: string) => {
    const isSaid = until(`libtorrent saying ${word}`, () => words.has(word), { withinMs: 30_000 })
    await Promise.race([isSaid, ended(child)])
  }
  await says('listening')
  const done = says('done')
  done.catch(() => undefined)
  if (place.whole) await done
  return { peer: peerAt(port), file, done }
}

/** Is told of the peers it may dial, says when it listens and when it has everything, and stays. */
const libtorrentScript = `
import sys, time
import libtorrent as lt
torrent, directory, port = sys.argv[1:4]
session = lt.session({'listen_interfaces': '127.0.0.1:' + port, 'enable_dht': False, 'enable_lsd': False,
                      'enable_upnp': False, 'enable_natpmp': False, 'allow_multiple_connections_per_ip': True,
                      'enable_outgoing_utp': False, 'enable_incoming_utp': False, 'min_reconnect_time': 1})
handle = session.add_torrent({'ti': lt.torrent_info(torrent), 'save_path': directory})
while session.listen_port() == 0:
    time.sleep(0.02)
print('listening', flush=True)
dialled = 0
while not handle.status().is_seeding:
    if time.time() > dialled + 2:
        dialled = time.time()
        for peer in sys.argv[4:]:
            handle.connect_peer(('127.0.0.1', int(peer)))
    time.sleep(0.02)
session.pop_alerts()
handle.flush_cache()
while not any(isinstance(alert, lt.cache_flushed_alert) for alert in session.pop_alerts()):
    time.sleep(0.02)
print('done', flush=True)
time.sleep(3600)
`

async function startWebtorrent(t: TestContext, place: Place): Promise<Foreign> {
  const { file } = await makeHome(place)
  const engine = await createWebtorrentEngine(engineConfig(), {
    monotonic: () => performance.now(),
    random: Math.random,
  })
  t.after(() => engine[Symbol.asyncDispose]())
  const { metainfo } = place.blob
  const peers = peerFeed(...place.peers.map((port) => peerAt(port)))
  const { signal } = new AbortController()
  const handle = place.whole
    ? engine.seed({ metainfo, file, peers, signal })
    : engine.fetch({ metainfo, file, peers, webseed: undefined, signal })
  handle.done.catch(() => undefined)
  return { peer: peerAt(engine.port), file, done: handle.done }
}

/** A directory for one client, where the blob lies as the torrent names it. */
async function makeHome({ blob, directory, whole }: Place): Promise<{ home: string; file: string }> {
  const home = join(directory, 'foreign')
  await mkdir(home, { recursive: true })
  const file = join(home, blob.sha256)
  if (whole) await writeFile(file, blob.bytes)
  return { home, file }
}

function torrentOf({ bytes, sha256, metainfo }: Blob, announce: string): Buffer {
  const info = writeBlobInfo({ sha256Hex: sha256, length: bytes.length, pieces: metainfo.pieces })
  return writeTorrent(info, { announce })
}

function startChild(t: TestContext, command: string, args: readonly string[]): ChildProcess {
  const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'inherit'] })
  child.stdout.resume()
  t.after(async () => {
    if (child.exitCode !== null || child.signalCode !== null) return
    const closed = once(child, 'close')
    child.kill('SIGKILL')
    await closed
  })
  return child
}

/** Rejects when a process that should stay ends. */
async function ended(child: ChildProcess): Promise<never> {
  const [code] = (await once(child, 'exit')) as [number | null]
  throw new Error(`${child.spawnfile} has ended with code ${String(code)}`)
}
