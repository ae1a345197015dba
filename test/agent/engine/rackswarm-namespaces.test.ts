import assert from 'node:assert/strict'
import { once } from 'node:events'
import { mkdir, readFile, stat, writeFile } from 'node:fs/promises'
import type { AddressInfo, Socket } from 'node:net'
import { connect, createServer } from 'node:net'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import type { PeerTraffic } from '../../../agent/engine/engine.ts'
import { writeBlobInfo, writeTorrent } from '../../../lib/protocol/metainfo.ts'
import { aria2Options } from '../../support/foreign.ts'
import type { Namespace, Network, RunningChild } from '../../support/namespaces.ts'
import { startNetwork, untilListening } from '../../support/namespaces.ts'
import type { TrackerProcess } from '../../support/tracker.ts'
import { announceQuery, bencoded, httpGet, startTracker } from '../../support/tracker.ts'
import type { EngineProcessOptions } from './engine-namespace-process.ts'
import type { Blob } from './fixtures.ts'
import { blobFile, eventually, mebibyte, randomBlob, temporaryDirectory, withDeadline } from './fixtures.ts'

/** Everyone's, each in a namespace of its own. */
const peerPort = 6881
const transmissionRpcPort = 9091
const engineProcess = join(import.meta.dirname, 'engine-namespace-process.ts')

/** A blob, and the tracker that all are told by. */
interface Swarm {
  readonly network: Network
  readonly tracker: TrackerProcess
  readonly announceUrl: string
  readonly directory: string
  readonly blob: Blob
  readonly torrent: string
}

interface Client {
  /** Its copy, once it has one. */
  readonly file: string
}

type Start = (swarm: Swarm, namespace: Namespace, whole: boolean) => Promise<Client>

const foreign: Record<string, Start> = {
  aria2: startAria2,
  libtorrent: startLibtorrent,
  transmission: startTransmission,
}

test('rackswarm fetches from transmission, in namespaces of their own', async (t) => {
  const swarm = await startSwarm(t, 2, { bytes: 24 * mebibyte + 12_345 })
  const [one, two] = pair(swarm)
  await startTransmission(swarm, one, true)
  const engine = await startOwn(swarm, two, false)
  await assertAllWhole(swarm, [engine])
  assert.deepEqual(await sourcesOf(engine), [`${one.ipv4}:${peerPort}`])
})

test('transmission fetches from rackswarm, in namespaces of their own', async (t) => {
  const swarm = await startSwarm(t, 2, { bytes: 24 * mebibyte + 12_345 })
  const [one, two] = pair(swarm)
  const engine = await startOwn(swarm, one, true)
  const transmission = await startTransmission(swarm, two, false)
  await assertAllWhole(swarm, [transmission])
  assert.ok(
    sum((await engine.traffic()).map(({ uploadedBytes }) => uploadedBytes)) >= swarm.blob.bytes.length,
  )
})

for (const seeder of ['rackswarm', 'transmission'] as const) {
  test(`a mixed swarm is fed by one ${seeder}, each peer in a namespace of its own`, async (t) => {
    const swarm = await startSwarm(t, 6, { bytes: 100 * mebibyte + 12_345 })
    const [one, two, three, four, five, six] = swarm.network.namespaces
    assert.ok(one && two && three && four && five && six)
    const owns =
      seeder === 'rackswarm'
        ? [await startOwn(swarm, one, true, { uploadBytesPerSecond: 24 * mebibyte })]
        : [await startOwn(swarm, one, false)]
    const [transmission, aria2, libtorrent, webtorrent, own] = await Promise.all([
      startTransmission(swarm, two, seeder === 'transmission', { uploadBytesPerSecond: 24 * mebibyte }),
      startAria2(swarm, three, false),
      startLibtorrent(swarm, four, false),
      startOwn(swarm, five, false, { engine: 'webtorrent' }),
      startOwn(swarm, six, false),
    ])
    owns.push(own)
    await assertAllWhole(swarm, [...owns, transmission, aria2, libtorrent, webtorrent])
    for (const each of owns) {
      const traffic = await each.traffic()
      assert.ok(
        traffic.some(({ uploadedBytes }) => uploadedBytes > 0),
        'each of ours has fed another',
      )
    }
  })
}

test('rackswarm fetches from rackswarm over IPv6, told by a tracker over IPv6', async (t) => {
  const swarm = await startSwarm(t, 2, { bytes: 24 * mebibyte + 12_345, family: 'ipv6' })
  const [one, two] = pair(swarm)
  await startOwn(swarm, one, true)
  const engine = await startOwn(swarm, two, false)
  await assertAllWhole(swarm, [engine])
  assert.deepEqual(await sourcesOf(engine), [`[${one.ipv6}]:${peerPort}`])
})

// No client has an option for the fast extension (BEP 6): what stands between the two takes its bit out of both handshakes.
for (const [name, start] of Object.entries(foreign)) {
  for (const fast of [true, false]) {
    const how = fast ? 'with the fast extension' : 'without the fast extension'

    test(`rackswarm fetches from ${name} ${how}`, async (t) => {
      const swarm = await startSwarm(t, 2, { bytes: 8 * mebibyte + 12_345 })
      const [one, two] = pair(swarm)
      await start(swarm, one, true)
      const relay = await startRelay(t, swarm, one, fast)
      const engine = await startOwn(swarm, two, false, { peers: [relay.address] })
      await withDeadline(engine.done, () => 'the fetch', 20)
      await assertWhole(swarm, engine)
      assert.deepEqual(relay.fastBits(), [true, true])
    })

    test(`${name} fetches from rackswarm ${how}`, async (t) => {
      const swarm = await startSwarm(t, 2, { bytes: 8 * mebibyte + 12_345 })
      const [one, two] = pair(swarm)
      const engine = await startOwn(swarm, one, true, { peers: [] })
      const relay = await startRelay(t, swarm, one, fast)
      await announceSeeder(swarm, relay.address)
      const client = await start(swarm, two, false)
      await assertAllWhole(swarm, [client])
      assert.deepEqual(relay.fastBits(), [true, true])
      const sent = sum((await engine.traffic()).map(({ uploadedBytes }) => uploadedBytes))
      assert.ok(sent >= swarm.blob.bytes.length)
    })
  }
}

async function startSwarm(
  t: TestContext,
  count: number,
  { bytes, family = 'ipv4' }: { bytes: number; family?: 'ipv4' | 'ipv6' },
): Promise<Swarm> {
  // First, so that at the end its processes are gone before their files are.
  const network = await startNetwork(t, count)
  const directory = await temporaryDirectory(t)
  const host = family === 'ipv4' ? network.bridge.ipv4 : `[${network.bridge.ipv6}]`
  const tracker = await startTracker(
    t,
    `http: { addr: '${host}:0', insecure_plaintext: true }\ntracker: { approval: none }\nannounce_interval: 2s\nmin_announce_interval: 1s\n`,
  )
  const announceUrl = `http://${host}:${tracker.main.port}/announce`
  const blob = randomBlob(bytes)
  const { sha256, metainfo } = blob
  const info = writeBlobInfo({ sha256Hex: sha256, length: bytes, pieces: metainfo.pieces })
  const torrent = await blobFile(directory, 'torrent', writeTorrent(info, { announce: announceUrl }))
  return { network, tracker, announceUrl, directory, blob, torrent }
}

function pair({ network }: Swarm): [Namespace, Namespace] {
  const [one, two] = network.namespaces
  assert.ok(one && two)
  return [one, two]
}

/** The seeders that the tracker counts say that everyone has said so; then it is the files that count. */
async function assertAllWhole(swarm: Swarm, clients: readonly Client[]): Promise<void> {
  const wanted = swarm.network.namespaces.length
  await eventually(
    async () => (await swarm.tracker.stats()).seeders >= wanted,
    `${wanted} seeders at the tracker`,
    40,
  )
  for (const client of clients) await assertWhole(swarm, client)
}

/** A client may say that it has everything before it has written the last of it. */
async function assertWhole({ blob }: Swarm, { file }: Client): Promise<void> {
  await eventually(
    async () => (await stat(file)).size === blob.bytes.length && (await readFile(file)).equals(blob.bytes),
    `the right bytes in ${file}`,
    5,
  )
}

interface Own extends Client {
  readonly done: Promise<void>
  traffic(): Promise<PeerTraffic[]>
}

/** An engine of our own, and webtorrent, which runs as one. */
async function startOwn(
  swarm: Swarm,
  namespace: Namespace,
  whole: boolean,
  over: Partial<Pick<EngineProcessOptions, 'engine' | 'peers' | 'uploadBytesPerSecond'>> = {},
): Promise<Own> {
  const { file } = await makeHome(swarm, namespace, whole)
  const options: EngineProcessOptions = {
    engine: 'rackswarm',
    kind: whole ? 'seed' : 'fetch',
    port: peerPort,
    torrent: swarm.torrent,
    file,
    peers: swarm.announceUrl,
    ...over,
  }
  const child = namespace.spawn(process.execPath, [engineProcess, JSON.stringify(options)])
  const lines = linesOf(child)
  await lines.until('ready')
  const done = lines.until('done', 50)
  done.catch(() => undefined)
  return {
    file,
    done,
    traffic: async () => {
      const next = once(lines.reader, 'line') as Promise<[string]>
      child.stdin.write('\n')
      const [line] = await withDeadline(next, () => 'the traffic of an engine')
      return JSON.parse(line) as PeerTraffic[]
    },
  }
}

async function sourcesOf(engine: Own): Promise<string[]> {
  return (await engine.traffic())
    .filter(({ downloadedBytes }) => downloadedBytes > 0)
    .map(({ source }) => source)
}

async function startAria2(swarm: Swarm, namespace: Namespace, whole: boolean): Promise<Client> {
  const { home, file } = await makeHome(swarm, namespace, whole)
  namespace.spawn('aria2c', [
    ...aria2Options,
    `--listen-port=${peerPort}`,
    `--dir=${home}`,
    '--check-integrity=true',
    '--seed-ratio=0.0',
    swarm.torrent,
  ])
  await untilListening(namespace.ipv4, peerPort)
  return { file }
}

async function startLibtorrent(swarm: Swarm, namespace: Namespace, whole: boolean): Promise<Client> {
  const { home, file } = await makeHome(swarm, namespace, whole)
  // Debian's interpreter: another Python first in PATH does not see Debian's modules.
  const child = namespace.spawn('/usr/bin/python3', [
    '-c',
    libtorrentScript,
    swarm.torrent,
    home,
    `${namespace.ipv4}:${peerPort}`,
  ])
  const lines = linesOf(child)
  await lines.until(whole ? 'done' : 'listening')
  return { file }
}

const libtorrentScript = `
import sys, time
import libtorrent as lt
torrent, directory, address = sys.argv[1:4]
session = lt.session({'listen_interfaces': address, 'enable_dht': False, 'enable_lsd': False, 'enable_upnp': False,
                      'enable_natpmp': False, 'enable_outgoing_utp': False, 'enable_incoming_utp': False,
                      'min_reconnect_time': 1, 'min_announce_interval': 1})
handle = session.add_torrent({'ti': lt.torrent_info(torrent), 'save_path': directory})
while session.listen_port() == 0:
    time.sleep(0.02)
print('listening', flush=True)
while not handle.status().is_seeding:
    time.sleep(0.02)
handle.flush_cache()
print('done', flush=True)
time.sleep(3600)
`

async function startTransmission(
  swarm: Swarm,
  namespace: Namespace,
  whole: boolean,
  { uploadBytesPerSecond }: { uploadBytesPerSecond?: number } = {},
): Promise<Client> {
  const { home, file } = await makeHome(swarm, namespace, whole)
  const config = join(swarm.directory, `${namespace.name}-transmission`)
  await mkdir(config)
  const settings = {
    'dht-enabled': false,
    'lpd-enabled': false,
    'pex-enabled': false,
    'utp-enabled': false,
    'port-forwarding-enabled': false,
    // Prefers what is not encrypted.
    encryption: 0,
    'peer-port': peerPort,
    'download-dir': home,
    'speed-limit-up-enabled': uploadBytesPerSecond !== undefined,
    'speed-limit-up': Math.round((uploadBytesPerSecond ?? 0) / 1000),
    'rpc-bind-address': namespace.ipv4,
    'rpc-port': transmissionRpcPort,
    'rpc-whitelist-enabled': false,
  }
  await writeFile(join(config, 'settings.json'), JSON.stringify(settings))
  namespace.spawn('transmission-daemon', ['--foreground', '--log-error', '--config-dir', config])
  await untilListening(namespace.ipv4, transmissionRpcPort)
  const url = `http://${namespace.ipv4}:${transmissionRpcPort}/transmission/rpc`
  const { 'torrent-added': added } = await askTransmission(url, 'torrent-add', { filename: swarm.torrent })
  assert.ok(added, 'transmission has added the torrent')
  if (whole) {
    await eventually(async () => {
      const { torrents } = await askTransmission(url, 'torrent-get', { fields: ['percentDone', 'status'] })
      const seeding = 6
      return torrents?.[0]?.percentDone === 1 && torrents[0].status === seeding
    }, 'transmission seeding')
  }
  return { file }
}

interface TransmissionAnswer {
  readonly 'torrent-added'?: unknown
  readonly torrents?: readonly { readonly percentDone: number; readonly status: number }[]
}

async function askTransmission(url: string, method: string, args: object): Promise<TransmissionAnswer> {
  const ask = async (session: string) =>
    fetch(url, {
      method: 'POST',
      headers: { 'x-transmission-session-id': session },
      body: JSON.stringify({ method, arguments: args }),
      signal: AbortSignal.timeout(10_000),
    })
  // The first request is refused with the id that it wants to see.
  const refused = await ask('')
  await refused.text()
  const reply = await ask(refused.headers.get('x-transmission-session-id') ?? '')
  assert.equal(reply.status, 200)
  return ((await reply.json()) as { arguments: TransmissionAnswer }).arguments
}

/** A directory for one peer, where the blob lies as the torrent names it. */
async function makeHome({ directory, blob }: Swarm, namespace: Namespace, whole: boolean) {
  const home = join(directory, namespace.name)
  await mkdir(home)
  const file = join(home, blob.sha256)
  if (whole) await writeFile(file, blob.bytes)
  return { home, file }
}

function linesOf(child: RunningChild) {
  const reader = createInterface(child.stdout)
  const seen = new Set<string>()
  reader.on('line', (line) => seen.add(line))
  return {
    reader,
    until: async (line: string, seconds = 20) =>
      eventually(
        () => {
          assert.equal(child.exitCode, null, `it has ended before it said ${line}`)
          return seen.has(line)
        },
        `a process saying ${line}`,
        seconds,
      ),
  }
}

/** The tracker is told of a seeder that does not announce. */
async function announceSeeder(
  swarm: Swarm,
  { host, port }: { readonly host: string; readonly port: number },
): Promise<void> {
  const query = announceQuery({ infoHash: swarm.blob.metainfo.infoHash, port, left: 0, event: 'started' })
  const { body } = await httpGet(swarm.tracker.main, `/announce?${query}`, { from: host })
  assert.ok(!bencoded(body).has('failure reason'), body)
}

const handshakeBytes = 68
const fastByte = 27
const fastBit = 0x04

/** Passes connections on to a peer, with the fast bit of the handshakes as it is or gone. */
async function startRelay(t: TestContext, { network }: Swarm, to: Namespace, fast: boolean) {
  const sockets = new Set<Socket>()
  const bits = new Map<'dialler' | 'dialled', boolean>()
  const pass = (from: Socket, into: Socket, who: 'dialler' | 'dialled') => {
    sockets.add(from)
    let head: Buffer | undefined = Buffer.alloc(0)
    from.on('error', () => undefined)
    from.on('close', () => into.destroy())
    from.on('data', (chunk: Buffer) => {
      let out = chunk
      if (head) {
        head = Buffer.concat([head, chunk])
        if (head.length < handshakeBytes) return
        assert.equal(head.toString('latin1', 1, 20), 'BitTorrent protocol')
        const flags = head[fastByte] ?? 0
        bits.set(who, (flags & fastBit) !== 0)
        if (!fast) head[fastByte] = flags & ~fastBit
        out = head
        head = undefined
      }
      if (!into.write(out)) {
        from.pause()
        into.once('drain', () => from.resume())
      }
    })
  }
  const server = createServer((dialler) => {
    const dialled = connect(peerPort, to.ipv4)
    pass(dialler, dialled, 'dialler')
    pass(dialled, dialler, 'dialled')
  })
  const host = network.bridge.ipv4
  server.listen(0, host)
  await once(server, 'listening')
  t.after(() => {
    for (const socket of sockets) socket.destroy()
    server.close()
  })
  return {
    address: { host, port: (server.address() as AddressInfo).port },
    /** Whether those who dialled had the bit, and those who were dialled. */
    fastBits: () => [bits.get('dialler'), bits.get('dialled')],
  }
}

function sum(numbers: readonly number[]): number {
  return numbers.reduce((total, each) => total + each, 0)
}
