// Spoilt requests by the million: to the tracker in this process, where its own faults would show, then to the ports of a running one.
// `npm run soak -- tracker-fuzz [INPUTS] [SEED]` (default: two million for each parser and for UDP, a fiftieth of them for TCP).
import assert from 'node:assert/strict'
import { randomInt } from 'node:crypto'
import { once } from 'node:events'
import { connect } from 'node:net'
import fc from 'fast-check'
import { ipFromBytes } from '../../lib/protocol/address.ts'
import { decode } from '../../lib/protocol/bencode.ts'
import { infoHashFromBytes } from '../../lib/protocol/infohash.ts'
import { udpReplyMax, writeUdpAnnounce, writeUdpConnect, writeUdpScrape } from '../../lib/protocol/udp.ts'
import { silentLog } from '../../lib/runtime/log.ts'
import { createMemoryPeerStore } from '../../server/tracker/memory/memory-peer-store.ts'
import { createTopology } from '../../server/tracker/topology.ts'
import type { Tracker } from '../../server/tracker/tracker.ts'
import { createTracker } from '../../server/tracker/tracker.ts'
import { randomOf } from '../agent/engine/fixtures.ts'
import { hostileStreams, packetsOf, readerVerdict } from '../support/http-streams.ts'
import type { TrackerProcess } from '../support/tracker.ts'
import {
  announceFields,
  announceQuery,
  first,
  httpGet,
  startTracker,
  testHash,
  udpProbe,
} from '../support/tracker.ts'

export interface FuzzCounts {
  readonly queries: number
  readonly packets: number
  readonly heads: number
  readonly livePackets: number
  readonly liveStreams: number
}

/** @throws AssertionError with the input, where something else than an answer or a refusal comes of it */
export async function fuzzTracker(inputs: number, seed: number): Promise<FuzzCounts> {
  const random = randomOf(seed)
  const { tracker, faults } = createSubject(random)
  const queries = await fuzzQueries(tracker, faults, inputs, random)
  const packets = await fuzzPackets(tracker, faults, inputs, random)
  const heads = fuzzHeads(inputs, random)
  await using owned = new AsyncDisposableStack()
  const owner = {
    after: (undo: () => PromiseLike<void> | void) => {
      owned.defer(async () => undo())
    },
  }
  const server = await startTracker(
    owner,
    `http: { addr: 127.0.0.1:0, request_timeout: 2s, idle_timeout: 2s }
tracker: { approval: none, full_scrape_networks: [127.0.0.0/8], trusted_announcers: [127.0.0.0/8] }
storage: { config: { peers_max: 100000, swarms_max: 20000 } }
`,
  )
  const livePackets = await fuzzUdpPort(server, owner, inputs, random)
  const liveStreams = await fuzzTcpPort(server, Math.ceil(inputs / 50), seed)
  await isWell(server)
  return { queries, packets, heads, livePackets, liveStreams }
}

/** A tracker in this process. What it calls an internal error goes to `faults`. */
function createSubject(random: () => number): { tracker: Tracker; faults: unknown[] } {
  const faults: unknown[] = []
  const log = silentLog()
  log.error = (fields: unknown) => {
    faults.push(fields)
  }
  const started = performance.now()
  const now = () => performance.now() - started
  const topology = createTopology({
    levels: ['rack'],
    places: {},
    prefixes: [],
    ipv4PrefixLength: 24,
    ipv6PrefixLength: 64,
  })
  const tracker = createTracker({
    store: createMemoryPeerStore({
      peersMax: 50_000,
      swarmsMax: 10_000,
      levels: 1,
      sampleMax: 1000,
      random,
      now,
    }),
    rules: {
      topology,
      hooks: [],
      config: {
        announceIntervalMs: 1_800_000,
        minAnnounceIntervalMs: 5000,
        numwantDefault: 50,
        numwantMax: 1000,
        scrapeMax: 100,
        gatewaysPerRack: 3,
        reservePeers: 4,
        trustedAnnouncers: [{ family: 4, bytes: new Uint8Array(4), length: 0 }],
        fullScrapeNetworks: [],
      },
    },
    after: undefined,
    epoch: 'epoch',
    now,
    observer: { handled: () => undefined, refused: () => undefined },
    log,
  })
  return { tracker, faults }
}

const hash = '%aa'.repeat(20)
const goodQueries = [
  announceQuery({ numwant: 30 }, 'compact=1&ip=10.0.0.1&rackswarm=1&trackerid=abc'),
  announceQuery({ left: 0, event: 'completed' }, 'compact=0&no_peer_id=1&ipv6=%3a%3a1&jwt=a.b.c'),
  announceQuery({ left: 0, event: 'stopped' }, 'ipv4=0.0.0.0;key=1'),
  `info_hash=${hash}&info_hash=${hash}&jwt=a.b.c`,
]

async function fuzzQueries(
  tracker: Tracker,
  faults: readonly unknown[],
  inputs: number,
  random: () => number,
): Promise<number> {
  const good = goodQueries.map((query) => Buffer.from(query, 'latin1'))
  for (let i = 0; i < inputs; i++) {
    const query = spoil(good, '%&;=+0a:.-\0\xff', random).toString('latin1')
    const action = i % 4 === 3 ? 'scrape' : 'announce'
    const reply = await tracker[action](query, sourceOf(random))
    const about = () => `${action} ${JSON.stringify(query)}`
    assert.deepEqual(faults, [], about())
    assert.ok(decode(reply) instanceof Map, about())
  }
  return inputs
}

function goodPackets(connectionId: Uint8Array): Buffer[] {
  const ids = { connectionId, transactionId: 0x01020304 }
  const announce = writeUdpAnnounce(
    ids,
    announceFields({ numwant: 200, ip: '10.0.0.1' }),
    '/a?jwt=a.b.c&trackerid=%41',
  )
  const old = Buffer.concat([announce.subarray(0, 84), Buffer.alloc(16, 1), announce.subarray(88)])
  old.writeUInt32BE(4, 8)
  return [
    announce,
    writeUdpAnnounce(ids, announceFields({ left: 0, event: 'completed' }), `/${'b'.repeat(600)}`),
    old,
    writeUdpScrape(ids, [testHash(0xaa), testHash(0xbb), testHash(0xcc)]),
  ]
}

async function fuzzPackets(
  tracker: Tracker,
  faults: readonly unknown[],
  inputs: number,
  random: () => number,
): Promise<number> {
  const good = goodPackets(Buffer.alloc(8))
  for (let i = 0; i < inputs; i++) {
    const packet = spoil(good, '\0\x01\x02\x03\x04\xff/?=&%', random)
    // The frontend lets nothing through that is shorter, or has another action.
    if (packet.length < 16) continue
    const action = i % 4 === 3 ? 'scrape' : 'announce'
    packet.writeUInt32BE(action === 'scrape' ? 2 : i % 4 === 2 ? 4 : 1, 8)
    const source = sourceOf(random)
    const reply = await tracker.packet(packet, action, source)
    const about = () => `${action} ${packet.toString('hex')}`
    assert.deepEqual(faults, [], about())
    assert.ok(
      reply.length >= 8 && reply.length <= udpReplyMax[source.family],
      `${reply.length} bytes to ${about()}`,
    )
    assert.ok([1, 2, 3, 4].includes(reply.readUInt32BE(0)), about())
    assert.equal(reply.readUInt32BE(4), packet.readUInt32BE(12), about())
  }
  return inputs
}

const goodHeads = [
  'GET /announce?a=%00b HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 1.2.3.4\r\nConnection: keep-alive\r\n\r\n',
  'GET http://host/scrape?x HTTP/1.0\r\nUser-Agent: x\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n',
  'POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc',
]

/** However the bytes are cut into packets, the reader makes the same of them. */
function fuzzHeads(inputs: number, random: () => number): number {
  const good = goodHeads.map((head) => Buffer.from(head, 'latin1'))
  const verdict = (packets: readonly Buffer[]) => {
    const { requests, end } = readerVerdict(packets)
    // What is wrong with a head that is not whole is seen sooner or later, as its packets come.
    return { requests, end: end === 'clean' || end === 'closed' ? end : 'refused' }
  }
  for (let i = 0; i < inputs; i++) {
    const bytes = spoil(good, '\r\n: \t\0?/\xff', random)
    const [first, second] = [random(), random()]
      .map((place) => Math.floor(place * bytes.length))
      .sort((a, b) => a - b)
    const cut = [bytes.subarray(0, first), bytes.subarray(first, second), bytes.subarray(second)]
    assert.deepEqual(
      verdict(cut),
      verdict([bytes]),
      `cut at ${String(first)} and ${String(second)}: ${JSON.stringify(bytes.toString('latin1'))}`,
    )
  }
  return inputs
}

/** Both with a good connection id and without one; who has none gets no more bytes than it has sent. */
async function fuzzUdpPort(
  server: TrackerProcess,
  owner: Parameters<typeof udpProbe>[0],
  inputs: number,
  random: () => number,
): Promise<number> {
  const [proven, unproven] = [
    await udpProbe(owner, first(server.udp)),
    await udpProbe(owner, first(server.udp), { from: '127.0.0.2' }),
  ]
  let sent = 0
  const burst = 50
  while (sent < inputs) {
    const id = await proven.connectionId()
    const good = goodPackets(id)
    const packets = Array.from({ length: burst }, () => {
      const packet = spoil(good, '\0\x01\x02\x03\x04\xff/?=&%', random)
      if (random() < 0.8 && packet.length >= 8) packet.set(id)
      return packet
    })
    await proven.replies(...packets)
    const strange = Array.from({ length: burst }, () => {
      const packet = spoil([...good, writeUdpConnect(1)], '\0\x01\x02\x03\x04\xff', random)
      // The id of the other address is as bad as any; most are not even that.
      if (random() < 0.5 && packet.length >= 8) packet.writeUInt32BE(randomInt(2 ** 32), 0)
      return packet
    })
    const answers = await unproven.replies(...strange)
    const [bytesIn, bytesOut] = [strange, answers].map((list) =>
      list.reduce((sum, { length }) => sum + length, 0),
    )
    assert.ok((bytesOut ?? 0) <= (bytesIn ?? 0), `${String(bytesOut)} bytes for ${String(bytesIn)}`)
    sent += 2 * burst
  }
  return sent
}

const streamsAtOnce = 50
const streamEndMs = 15_000

/** Every connection comes to an end, and what it is told is HTTP. */
async function fuzzTcpPort(server: TrackerProcess, inputs: number, seed: number): Promise<number> {
  let left = inputs
  const work = async (worker: number) => {
    while (left > 0) {
      const batch = Math.min(100, left)
      left -= batch
      for (const stream of fc.sample(hostileStreams(), { numRuns: batch, seed: seed + worker + left })) {
        const told = await tell(server, packetsOf(stream))
        assert.match(told, /^(HTTP\/1\.1 (200|400|404|405|413|431) |$)/, JSON.stringify(stream.text))
      }
    }
  }
  await Promise.all(Array.from({ length: streamsAtOnce }, (_, worker) => work(worker)))
  return inputs
}

async function tell(server: TrackerProcess, packets: readonly Buffer[]): Promise<string> {
  const socket = connect({ ...first(server.http), noDelay: true })
  let told = ''
  socket.setEncoding('latin1').on('data', (chunk: string) => (told += chunk))
  socket.on('error', () => undefined)
  for (const packet of packets) socket.write(packet)
  socket.end()
  await once(socket, 'close', { signal: AbortSignal.timeout(streamEndMs) })
  return told
}

/** The most that the server may have used by the end. */
const peakBytesMax = 500 * 1024 * 1024

async function isWell(server: TrackerProcess): Promise<void> {
  assert.equal(server.process.exitCode, null)
  const { body } = await httpGet(
    first(server.http),
    `/announce?${announceQuery({ infoHash: infoHashFromBytes(Buffer.alloc(20, 7)) })}`,
  )
  assert.match(body, /^d8:completei/)
  const faults = (await server.log())
    .split('\n')
    .filter((line) => /"level":(50|60|"error"|"fatal")/.test(line))
  assert.deepEqual(faults.slice(0, 5), [])
  const peakBytes = await server.peakBytes()
  assert.ok(peakBytes < peakBytesMax, `${peakBytes} bytes of memory`)
}

/** A good input with up to four places changed, put in or cut out; now and then nothing but random bytes. */
function spoil(good: readonly Buffer[], likely: string, random: () => number): Buffer {
  const below = (max: number) => Math.floor(random() * max)
  if (below(20) === 0) return Buffer.from(Array.from({ length: below(400) }, () => below(256)))
  let bytes = Buffer.from(good[below(good.length)] ?? [])
  for (let changes = below(5); changes > 0; changes--) {
    const at = below(bytes.length + 1)
    const byte = below(2) === 0 ? below(256) : likely.charCodeAt(below(likely.length))
    switch (below(4)) {
      case 0:
        bytes = Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + 1 + below(8))])
        break
      case 1:
        bytes = Buffer.concat([bytes.subarray(0, at), Buffer.from([byte]), bytes.subarray(at)])
        break
      case 2:
        bytes = bytes.subarray(0, at)
        break
      default:
        if (at < bytes.length) bytes[at] = byte
    }
  }
  return bytes
}

function sourceOf(random: () => number) {
  const length = random() < 0.5 ? 4 : 16
  return ipFromBytes(Uint8Array.from({ length }, () => Math.floor(random() * 256)))
}

if (import.meta.main) {
  const inputs = Number(process.argv[2] ?? 2_000_000)
  const seed = Number(process.argv[3] ?? randomInt(2 ** 31))
  process.stdout.write(`seed ${seed}\n`)
  const counts = await fuzzTracker(inputs, seed)
  process.stdout.write(
    `${counts.queries} queries, ${counts.packets} packets and ${counts.heads} heads here; ${counts.livePackets} packets and ${counts.liveStreams} connections to a running tracker: each answered or refused, none a fault\n`,
  )
}
