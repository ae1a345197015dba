import assert from 'node:assert/strict'
import { once } from 'node:events'
import { mkdir, readFile, stat, writeFile } from 'node:fs/promises'
import type { AddressInfo, Socket } from 'node:net'
import { connect, createServer } from 'node:net'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { TestContext } from 'node:test'
import { suite, test } from 'node:test'
import type { PeerTraffic } from '../../../agent/engine/engine.ts'
import type { Family } from '../../../lib/protocol/address.ts'
import { infoHashToBytes } from '../../../lib/protocol/infohash.ts'
import { escapeBytes } from '../../../lib/protocol/query.ts'
import { writeBlobInfo, writeTorrent } from '../../../lib/protocol/metainfo.ts'
import { aria2Options } from '../../support/foreign.ts'
import type { Namespace, RunningChild } from '../../support/namespaces.ts'
import { startNetwork } from '../../support/namespaces.ts'
import type { Address } from '../../support/tracker.ts'
import { announceQuery, bencoded, fileOwner, httpGet, startTracker } from '../../support/tracker.ts'
import { until, untilListening } from '../../support/until.ts'
import type { EngineProcessOptions } from './engine-namespace-process.ts'
import type { Blob } from './fixtures.ts'
import { blobFile, mebibyte, randomBlob, temporaryDirectory, withDeadline } from './fixtures.ts'

/** Everyone's, each in a namespace of its own. */
const peerPort = 6881
const transmissionRpcPort = 9091
/** Between questions to the tracker, which has enough to do. */
const pollMs = 200
const engineProcess = join(import.meta.dirname, 'engine-namespace-process.ts')

const owner = fileOwner()
const network = await startNetwork(owner)
const { ipv4, ipv6 } = network.bridge
const tracker = await startTracker(
  owner,
  [
    `http: { addr: '${ipv4}:0', tracker_addr: ['[${ipv6}]:0'], insecure_plaintext: true }`,
    'tracker: { approval: none }',
    'announce_interval: 2s',
    'min_announce_interval: 1s',
  ].join('\n'),
)

/** A blob and those who want it or have it, each in a namespace of its own. */
interface Swarm {
  readonly namespaces: readonly Namespace[]
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

// Transmission unchokes nobody in its first ten seconds; meanwhile others run.
suite('peers in namespaces of their own', { concurrency: 8 }, () => {
  for (const [seeder, mebibytes] of [
    ['rackswarm', 48],
    ['transmission', 16],
  ] as const) {
    test(`a mixed swarm is fed by one ${seeder}`, async (t) => {
      const swarm = await startSwarm(t, 6, { bytes: mebibytes * mebibyte + 12_345 })
      const [one, two, three, four, five, six] = swarm.namespaces
      assert.ok(one && two && three && four && five && six)
      const owns =
        seeder === 'rackswarm'
          ? [await startOwn(swarm, one, true, { uploadBytesPerSecond: 12 * mebibyte })]
          : [await startOwn(swarm, one, false)]
      const [transmission, aria2, libtorrent, webtorrent, own] = await Promise.all([
        startTransmission(swarm, two, seeder === 'transmission', { uploadBytesPerSecond: 12 * mebibyte }),
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

  test('rackswarm fetches from transmission', async (t) => {
    const swarm = await startSwarm(t, 2, { bytes: 12 * mebibyte + 12_345 })
    const [one, two] = pair(swarm)
    await startTransmission(swarm, one, true)
    const engine = await startOwn(swarm, two, false)
    await assertAllWhole(swarm, [engine])
    assert.deepEqual(await sourcesOf(engine), [`${one.ipv4}:${peerPort}`])
  })

  test('transmission fetches from rackswarm', async (t) => {
    const swarm = await startSwarm(t, 2, { bytes: 12 * mebibyte + 12_345 })
    const [one, two] = pair(swarm)
    const engine = await startOwn(swarm, one, true)
    const transmission = await startTransmission(swarm, two, false)
    await assertAllWhole(swarm, [transmission])
    assert.ok(
      sum((await engine.traffic()).map(({ uploadedBytes }) => uploadedBytes)) >= swarm.blob.bytes.length,
    )
  })

  test('rackswarm fetches from rackswarm over IPv6, told by a tracker over IPv6', async (t) => {
    const swarm = await startSwarm(t, 2, { bytes: 12 * mebibyte + 12_345, family: 6 })
    const [one, two] = pair(swarm)
    await startOwn(swarm, one, true)
    const engine = await startOwn(swarm, two, false)
    await assertAllWhole(swarm, [engine])
    assert.deepEqual(await sourcesOf(engine), [`[${one.ipv6}]:${peerPort}`])
  })

  // No client has an option for the fast extension (BEP 6), and all have it, which the relay sees: it takes the bit out of both
  // handshakes. Where they meet without a relay, they use it.
  for (const [name, start] of Object.entries(foreign)) {
    test(`rackswarm fetches from ${name} without the fast extension`, async (t) => {
      const swarm = await startSwarm(t, 2, { bytes: 4 * mebibyte + 12_345 })
      const [one, two] = pair(swarm)
      await start(swarm, one, true)
      const relay = await startRelay(t, one)
      const engine = await startOwn(swarm, two, false, { peers: [relay.address] })
      await engine.done
      await assertWhole(swarm, engine)
      assert.deepEqual(relay.hadFastBit(), { dialler: true, dialled: true })
    })

    test(`${name} fetches from rackswarm without the fast extension`, async (t) => {
      const swarm = await startSwarm(t, 2, { bytes: 4 * mebibyte + 12_345 })
      const [one, two] = pair(swarm)
      const engine = await startOwn(swarm, one, true, { peers: [] })
      const relay = await startRelay(t, one)
      await announceSeeder(t, swarm, relay.address)
      const client = await start(swarm, two, false)
      await assertAllWhole(swarm, [client])
      assert.deepEqual(relay.hadFastBit(), { dialler: true, dialled: true })
      const sent = sum((await engine.traffic()).map(({ uploadedBytes }) => uploadedBytes))
      assert.ok(sent >= swarm.blob.bytes.length)
    })
  }
})

async function startSwarm(
  t: TestContext,
  count: number,
  { bytes, family = 4 }: { bytes: number; family?: Family },
): Promise<Swarm> {
  // First, so that at the end its processes are gone before their files are.
  const namespaces = await network.addNamespaces(t, count)
  const directory = await temporaryDirectory(t)
  const { host, port } = trackerAddress(family)
  const announceUrl = `http://${family === 6 ? `[${host}]` : host}:${port}/announce`
  const blob = randomBlob(bytes)
  const { sha256, metainfo } = blob
  const info = writeBlobInfo({ sha256Hex: sha256, length: bytes, pieces: metainfo.pieces })
  const torrent = await blobFile(directory, 'torrent', writeTorrent(info, { announce: announceUrl }))
  return { namespaces, announceUrl, directory, blob, torrent }
}

function trackerAddress(family: Family): Address {
  const address = tracker.http.find(({ host }) => host.includes(':') === (family === 6))
  assert.ok(address)
  return address
}

function pair({ namespaces }: Swarm): [Namespace, Namespace] {
  const [one, two] = namespaces
  assert.ok(one && two)
  return [one, two]
}

/** The seeders that the tracker counts say that everyone has said so; then it is the files that count. */
async function assertAllWhole(swarm: Swarm, clients: readonly Client[]): Promise<void> {
  const wanted = swarm.namespaces.length
  await until(`${wanted} seeders at the tracker`, async () => (await seedersOf(swarm)) >= wanted, {
    withinMs: 40_000,
    everyMs: pollMs,
  })
  for (const client of clients) await assertWhole(swarm, client)
}

async function seedersOf({ blob }: Swarm): Promise<number> {
  const key = infoHashToBytes(blob.metainfo.infoHash)
  const { body } = await httpGet(trackerAddress(4), `/scrape?info_hash=${escapeBytes(key)}`)
  const files = bencoded(body).get('files')
  assert.ok(files instanceof Map, body)
  const counts = [...files.values()][0]
  return counts instanceof Map ? Number(counts.get('complete')) : 0
}

/** A client may say that it has everything before it has written the last of it. */
async function assertWhole({ blob }: Swarm, { file }: Client): Promise<void> {
  await until(
    `the right bytes in ${file}`,
    async () => (await stat(file)).size === blob.bytes.length && (await readFile(file)).equals(blob.bytes),
    { withinMs: 5_000 },
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
  await lines.says('ready')
  const done = lines.says('done', 50_000)
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
  await untilListening(peerPort, namespace.ipv4)
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
  await lines.says(whole ? 'done' : 'listening')
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
  await untilListening(transmissionRpcPort, namespace.ipv4)
  const url = `http://${namespace.ipv4}:${transmissionRpcPort}/transmission/rpc`
  const { 'torrent-added': added } = await askTransmission(url, 'torrent-add', { filename: swarm.torrent })
  assert.ok(added, 'transmission has added the torrent')
  if (whole) {
    await until('transmission seeding', async () => {
      const { torrents } = await askTransmission(url, 'torrent-get', { fields: ['percentDone', 'status'] })
      const seeding = 6
      return torrents?.[0]?.percentDone === 1 && torrents[0].status === seeding
    })
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
    says: async (line: string, withinMs = 40_000) => {
      const isSaid = () => {
        assert.equal(child.exitCode, null, `it has ended before it said ${line}`)
        return seen.has(line)
      }
      await until(`a process saying ${line}`, isSaid, { withinMs })
    },
  }
}

/** The tracker is told of a seeder that does not announce, again and again, as it would forget it. */
async function announceSeeder(t: TestContext, swarm: Swarm, { host, port }: Address): Promise<void> {
  const query = announceQuery({ infoHash: swarm.blob.metainfo.infoHash, port, left: 0 })
  const announce = async () => httpGet(trackerAddress(4), `/announce?${query}`, { from: host })
  const { body } = await announce()
  assert.ok(!bencoded(body).has('failure reason'), body)
  const timer = setInterval(() => {
    // A tracker that is gone fails the test elsewhere.
    announce().catch(() => undefined)
  }, 2000)
  t.after(() => {
    clearInterval(timer)
  })
}

const handshakeBytes = 68
const fastByte = 27
const fastBit = 0x04

/** Passes connections on to a peer, without the fast bit of the handshakes. */
async function startRelay(t: TestContext, to: Namespace) {
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
        // aria2 tries an encrypted handshake first.
        if (head.toString('latin1', 1, 20) === 'BitTorrent protocol') {
          const flags = head[fastByte] ?? 0
          bits.set(who, (flags & fastBit) !== 0)
          head[fastByte] = flags & ~fastBit
        }
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
  server.listen(0, ipv4)
  await once(server, 'listening')
  t.after(() => {
    for (const socket of sockets) socket.destroy()
    server.close()
  })
  return {
    address: { host: ipv4, port: (server.address() as AddressInfo).port },
    hadFastBit: () => Object.fromEntries(bits),
  }
}

function sum(numbers: readonly number[]): number {
  return numbers.reduce((total, each) => total + each, 0)
}
