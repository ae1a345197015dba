import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { access, mkdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { connect as connectTls } from 'node:tls'
import { formatEndpoint } from '../../lib/protocol/address.ts'
import { parseAnnounceReply } from '../../lib/protocol/announce.ts'
import type { InfoHash } from '../../lib/protocol/infohash.ts'
import { infoHashFromBytes } from '../../lib/protocol/infohash.ts'
import { writeUdpAnnounce } from '../../lib/protocol/udp.ts'
import { createAuthority } from '../support/certificates.ts'
import { rawClient } from '../support/http-client.ts'
import type { TrackerProcess } from '../support/tracker.ts'
import {
  announceFields,
  announceQuery,
  bencoded,
  first,
  httpGet,
  startTracker,
  temporaryDirectory,
  testHash,
  udpProbe,
} from '../support/tracker.ts'
import { until } from '../support/until.ts'

const settings = (
  storage = '',
) => `tracker: { approval: none, trusted_announcers: [127.0.0.0/8], full_scrape_networks: [127.0.0.0/8] }
http: { addr: 127.0.0.1:0, tracker_addr: '[::1]:0' }
udp: { addr: ['127.0.0.1:0', '[::1]:0'] }
storage: { config: { ${storage} } }
`

test('SIGTERM and start: every swarm has its counts, its peers are handed out, completions are kept, connection ids are good', async (t) => {
  const directory = await temporaryDirectory(t)
  const before = await startTracker(t, settings(), { directory })
  const swarms = await populate(t, before, 300)
  const counts = await scrapeAll(before)
  assert.equal(counts.size, swarms.length)
  const connectionId = await (await udpProbe(t, first(before.udp))).connectionId()
  const sentAt = performance.now()
  before.process.kill('SIGTERM')
  assert.equal(await before.exited, 0)
  assert.ok(performance.now() - sentAt < 5000)

  const after = await startTracker(t, settings(), { directory })
  assert.match(await after.log(), /"msg":"swarms restored"/)
  assert.deepEqual(await scrapeAll(after), counts)
  for (const infoHash of swarms.slice(0, 10)) {
    const peers = await peersOf(after, infoHash)
    const { complete = 0, incomplete = 0 } = counts.get(infoHash) ?? {}
    assert.equal(peers.length, complete + incomplete, infoHash)
  }
  const probe = await udpProbe(t, first(after.udp))
  const reply = await probe.ask(writeUdpAnnounce({ connectionId, transactionId: 1 }, announceFields()))
  assert.equal(reply.readUInt32BE(0), 1, 'a connection id of before')
  // A third start finds what changed since the second.
  await stop(after)
  const last = await startTracker(t, settings(), { directory })
  const total = (await last.stats()).leechers
  assert.equal(total, [...counts.values()].reduce((sum, { incomplete }) => sum + incomplete, 0) + 1)
})

test('kill -9: what the last snapshot had is there', async (t) => {
  const directory = await temporaryDirectory(t)
  const options = { directory }
  const before = await startTracker(t, settings('snapshot_interval: 100ms'), options)
  const swarms = await populate(t, before, 200)
  const counts = await scrapeAll(before)
  await savedAgain(before)
  before.process.kill('SIGKILL')
  await before.exited
  const after = await startTracker(t, settings('snapshot_interval: 100ms'), options)
  assert.deepEqual(await scrapeAll(after), counts)
  assert.ok((await peersOf(after, swarms[0] ?? testHash(0))).length > 0)
  // Without snapshots nothing is kept, and nothing is read.
  after.process.kill('SIGKILL')
  await after.exited
  const without = await startTracker(t, settings('snapshot: false'), options)
  assert.equal((await without.stats()).swarms, 0)
})

test('a snapshot that is damaged, cut short or none at all does not keep the server from starting with what is good', async (t) => {
  const directory = await temporaryDirectory(t)
  const file = join(directory, 'data', 'swarms.snapshot')
  const before = await startTracker(t, settings(), { directory })
  await populate(t, before, 1500, 20)
  const { seeders, leechers } = await before.stats()
  await stop(before)
  const good = await readFile(file)
  const damaged = Buffer.from(good)
  damaged[Math.floor(good.length * 0.7)] = (damaged[Math.floor(good.length * 0.7)] ?? 0) ^ 1
  const cases: Record<string, readonly [Buffer, RegExp, boolean]> = {
    damaged: [damaged, /a checksum is wrong/, true],
    'cut short': [good.subarray(0, good.length * 0.8), /it was cut short/, true],
    foreign: [randomBytes(10_000), /it is not a snapshot of this version/, false],
  }
  for (const [name, [bytes, words, hasSome]] of Object.entries(cases)) {
    await writeFile(file, bytes)
    const server = await startTracker(t, settings(), { directory })
    const { fault = '', level } = lastLine(await server.log(), 'snapshot of the swarms was not whole')
    assert.match(fault, words, name)
    assert.equal(level, 40)
    const now = await server.stats()
    assert.equal(now.seeders + now.leechers > 0, hasSome, name)
    assert.ok(now.seeders + now.leechers < seeders + leechers, name)
    // It ends with a good one in its place.
    await stop(server)
    const next = await startTracker(t, settings(), { directory })
    assert.doesNotMatch((await next.log()).split('server is listening').at(-2) ?? '', /not whole/, name)
    assert.deepEqual((await next.stats()).leechers, now.leechers, name)
    await stop(next)
  }
  await rm(file)
  await mkdir(file)
  const server = await startTracker(t, settings(), { directory })
  assert.match(lastLine(await server.log(), 'snapshot of the swarms was not whole').fault ?? '', /EISDIR/)
  assert.equal((await httpGet(first(server.http), `/announce?${announceQuery()}`)).status, 200)
  await stop(server)
})

test('of a snapshot that is older than an hour only the completions count', async (t) => {
  const directory = await temporaryDirectory(t)
  const file = join(directory, 'data', 'swarms.snapshot')
  const before = await startTracker(t, settings(), { directory })
  await populate(t, before, 100)
  const counts = await scrapeAll(before)
  await stop(before)
  const bytes = await readFile(file)
  bytes.writeDoubleBE(Date.now() - 3_700_000, 8)
  await writeFile(file, bytes)
  const after = await startTracker(t, settings(), { directory })
  const { seeders, leechers } = await after.stats()
  assert.deepEqual({ seeders, leechers }, { seeders: 0, leechers: 0 })
  const completed = [...counts].filter(([, { downloaded }]) => downloaded > 0)
  assert.ok(completed.length > 0)
  assert.deepEqual(
    await scrapeAll(after),
    new Map(
      completed.map(([infoHash, { downloaded }]) => [infoHash, { complete: 0, incomplete: 0, downloaded }]),
    ),
  )
})

test('a start that fails leaves the snapshot of the server that runs alone', async (t) => {
  const directory = await temporaryDirectory(t)
  const file = join(directory, 'data', 'swarms.snapshot')
  const before = await startTracker(t, settings(), { directory })
  await populate(t, before, 50)
  await stop(before)
  const server = await startTracker(t, settings(), { directory })
  const { mtimeMs } = await stat(file)
  const { port } = server.main
  const taken = settings().replace('127.0.0.1:0,', `127.0.0.1:${port},`)
  await assert.rejects(startTracker(t, taken, { directory }), /ended with code 1/)
  assert.match(await server.log(), /EADDRINUSE/)
  assert.equal((await stat(file)).mtimeMs, mtimeMs)
})

test(
  'a full disk: the server goes on, says that swarms were not saved, and saves them once there is room',
  { skip: process.getuid?.() !== 0 && 'needs root, to mount a small disk' },
  async (t) => {
    const directory = await temporaryDirectory(t)
    const disk = join(directory, 'data')
    await mkdir(disk)
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=96k', 'tmpfs', disk])
    using mounted = new DisposableStack()
    mounted.defer(() => execFileSync('umount', [disk]))
    const config = settings('snapshot_interval: 100ms')
    await using server = await startTracker(t, config, { directory })
    await populate(t, server, 20)
    await savedAgain(server)
    await populate(t, server, 1500)
    const failed = 'swarms were not saved; a restart would lose what changed since'
    await until('the failure is logged', async () => (await server.log()).includes(failed))
    const { err } = lastLine(await server.log(), failed)
    assert.match(err?.message ?? '', /Cannot save the swarms to .*swarms\.snapshot: ENOSPC/)
    const counts = await scrapeAll(server)
    assert.equal((await httpGet(first(server.http), `/announce?${announceQuery()}`)).status, 200)
    // The next try may be writing one; what failed leaves none.
    const isThere = () =>
      access(join(disk, 'swarms.snapshot.tmp')).then(
        () => true,
        () => false,
      )
    await until('the file is gone', async () => !(await isThere()))
    execFileSync('mount', ['-o', 'remount,size=16m', disk])
    await savedAgain(server)
    server.process.kill('SIGKILL')
    await server.exited
    await using after = await startTracker(t, config, { directory })
    assert.equal((await scrapeAll(after)).size, counts.size + 1)
    await stop(after)
  },
)

test('a server ends within seconds, whoever holds a connection and says nothing', async (t) => {
  const directory = await temporaryDirectory(t)
  const { cert, key } = createAuthority('Acme').issue('tracker')
  await writeFile(join(directory, 'cert.pem'), cert)
  await writeFile(join(directory, 'key.pem'), key)
  for (const roles of ['[tracker]', '[tracker, registry]']) {
    const server = await startTracker(
      t,
      `http: { addr: 127.0.0.1:0, tracker_addr: 127.0.0.1:0, tls_addr: 127.0.0.1:0, tls: { cert: ${directory}/cert.pem, key: ${directory}/key.pem } }
${roles === '[tracker]' ? 'tracker: { approval: none }\n' : ''}`,
      { directory, roles },
    )
    const [main, plain, tls] = [server.main, ...server.http.slice(-2)]
    for (const { port } of [main, plain, tls].filter((address) => address !== undefined)) {
      const silent = connect(port, '127.0.0.1')
      t.after(() => silent.destroy())
      silent.on('error', () => undefined)
      await once(silent, 'connect')
    }
    const kept = connectTls({ port: main.port, host: '127.0.0.1', ca: cert, rejectUnauthorized: false })
    t.after(() => kept.destroy())
    kept.on('error', () => undefined)
    await once(kept, 'secureConnect')
    kept.write('GET /announce HTTP/1.1\r\nhost: x\r\n\r\n')
    await once(kept, 'data')
    const sentAt = performance.now()
    await stop(server)
    assert.ok(performance.now() - sentAt < 5000, roles)
  }
})

async function stop(server: TrackerProcess): Promise<void> {
  server.process.kill('SIGTERM')
  assert.equal(await server.exited, 0)
}

/** Waits until a snapshot has been begun and saved after now. */
async function savedAgain(server: TrackerProcess): Promise<void> {
  const file = join(server.directory, 'data', 'swarms.snapshot')
  const inode = async () =>
    stat(file).then(
      ({ ino, mtimeMs }) => `${ino} ${mtimeMs}`,
      () => '',
    )
  // The first of the two may have been under way.
  for (let saved = 0; saved < 2; saved++) {
    const before = await inode()
    await until('another snapshot is written', async () => (await inode()) !== before)
  }
}

/** Peers of both families over both frontends: leechers, seeders, some that completed, some that left. @returns the swarms */
async function populate(
  t: TestContext,
  server: TrackerProcess,
  peers: number,
  swarms = 40,
): Promise<InfoHash[]> {
  const hashes = Array.from({ length: swarms }, () => infoHashFromBytes(randomBytes(20)))
  const http = await rawClient(t, first(server.http).port)
  const udp = [await probeOf(t, server, 0), await probeOf(t, server, 1)]
  for (let i = 0; i < peers; i++) {
    const infoHash = hashes[i % swarms] ?? testHash(0)
    const fields = announceFields({ infoHash, port: 1000 + i, left: i % 3, peerId: randomBytes(20) })
    const events = [
      undefined,
      ...(i % 11 === 1 ? ['completed' as const] : []),
      ...(i % 13 === 0 ? ['stopped' as const] : []),
    ]
    for (const event of events) {
      const now = { ...fields, event, ...(event === 'completed' && { left: 0 }) }
      if (i % 2 === 0) {
        const { connectionId, probe } = udp[(i / 2) % 2] ?? assert.fail()
        const reply = await probe.ask(writeUdpAnnounce({ connectionId, transactionId: i + 1 }, now))
        assert.equal(reply.readUInt32BE(0), 1)
      } else {
        const ip = i % 4 === 1 ? `10.1.${i >> 8}.${i & 255}` : `fd00::${i.toString(16)}`
        http.send(`GET /announce?${announceQuery(now, `ip=${ip}`)} HTTP/1.1\r\nhost: x\r\n\r\n`)
        assert.match((await http.reply()).body, /^d8:complete/)
      }
    }
  }
  http.socket.destroy()
  return hashes
}

async function probeOf(t: TestContext, server: TrackerProcess, index: number) {
  const probe = await udpProbe(t, server.udp[index] ?? assert.fail())
  return { probe, connectionId: await probe.connectionId() }
}

interface Counts {
  readonly complete: number
  readonly incomplete: number
  readonly downloaded: number
}

/** All swarms, by a scrape that names none. */
async function scrapeAll(server: TrackerProcess): Promise<Map<InfoHash, Counts>> {
  const { body } = await httpGet(first(server.http), '/scrape')
  const files = bencoded(body).get('files')
  assert.ok(files instanceof Map)
  const counts = [...files].map(([key, value]) => {
    assert.ok(value instanceof Map)
    const numbers = Object.fromEntries(value) as unknown as Counts
    return [infoHashFromBytes(Buffer.from(key, 'latin1')), { ...numbers }] as const
  })
  return new Map(counts.sort(([a], [b]) => (a < b ? -1 : 1)))
}

/** The peers that a newcomer, who leaves again, is told of. */
async function peersOf(server: TrackerProcess, infoHash: InfoHash): Promise<string[]> {
  const ask = async (event: 'started' | 'stopped') =>
    httpGet(first(server.http), `/announce?${announceQuery({ infoHash, port: 9, event, numwant: 100 })}`)
  const { body } = await ask('started')
  await ask('stopped')
  return parseAnnounceReply(Buffer.from(body, 'latin1')).peers.map(({ endpoint }) => formatEndpoint(endpoint))
}

interface Line {
  readonly msg: string
  readonly level: number
  readonly fault?: string
  readonly err?: { readonly message: string }
}

function lastLine(log: string, msg: string): Line {
  const lines = log
    .split('\n')
    .filter((line) => line.endsWith('}'))
    .map((line) => JSON.parse(line) as Line)
  return lines.findLast((line) => line.msg === msg) ?? assert.fail(`the log has no line "${msg}"`)
}
