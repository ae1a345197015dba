import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import type { TLSSocket } from 'node:tls'
import { connect as connectTls } from 'node:tls'
import { Worker } from 'node:worker_threads'
import { parseAnnounceReply } from '../../lib/protocol/announce.ts'
import { parseUdpAnnounceReply, writeUdpAnnounce } from '../../lib/protocol/udp.ts'
import { Lock } from '../../server/tracker/memory/lock.ts'
import { scrapeCounts } from '../support/announcing-crowd.ts'
import { createAuthority } from '../support/certificates.ts'
import { bin } from '../support/fleet.ts'
import { rawClient } from '../support/http-client.ts'
import { startRedis } from '../support/redis.ts'
import { startTcpProxy } from '../support/tcp-proxy.ts'
import type { LockHammer } from '../support/lock-hammer.ts'
import type { Crowd } from '../support/tracker-crowd.ts'
import { fateOf } from '../support/tracker-crowd.ts'
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

/**
 * Shows in each reply which thread gave it, by the thousands of its interval. The peer at port 6666 ends the thread that it meets, unless
 * that is the first. With `fail` it cannot be made in another thread than the first.
 */
const threadHook = `import { isMainThread, threadId } from 'node:worker_threads'
export default ({ fail, refused }, { log }) => {
  if (fail && !isMainThread) throw new Error('not in this thread')
  return {
    name: 'thread',
    announce: (request) => {
      log.debug({ threadId }, 'hook has seen an announce')
      request.extraIntervalSeconds = threadId * 1000
      if (request.announce.port === refused) throw new Error('refused')
      if (request.announce.port === 6666 && !isMainThread) setImmediate(() => { throw new Error('the hook is broken') })
    },
  }
}
`
const settings = (hook = '{}') => `workers: 2
tracker: { approval: none, full_scrape_networks: [127.0.0.0/8] }
prehooks: [{ name: ./thread.mjs, options: ${hook} }]
`

test('both threads answer over both frontends, of the same swarms, and the metrics are of both', async (t) => {
  const server = await start(t)
  const announces = { http: 0, udp: 0 }
  const seen = { http: new Map<number, number>(), udp: new Map<number, number>() }
  const enough = () => [seen.http, seen.udp].every((threads) => threads.size === 2)
  // The kernel chooses a thread for each client; a hundred that are all given the same one are as rare as a hash collision.
  for (let port = 1; !enough() && port < 100; port++) {
    const viaHttp = await announceHttp(server, port)
    const viaUdp = await announceUdp(t, server, 1000 + port)
    seen.http.set(viaHttp.thread, viaHttp.peers)
    seen.udp.set(viaUdp.thread, viaUdp.peers)
    announces.http++
    announces.udp++
    // Whoever was announced before, through whichever thread, is handed out.
    assert.equal(viaHttp.peers, Math.min(2 * (port - 1), 50))
    assert.equal(viaUdp.peers, Math.min(2 * port - 1, 50))
  }
  assert.ok(enough(), 'one thread gets everything')
  assert.deepEqual([...seen.http.keys()].sort(), [...seen.udp.keys()].sort())
  const metrics = await server.metrics()
  for (const [frontend, count] of Object.entries(announces))
    assert.match(
      metrics,
      new RegExp(
        `_request_duration_seconds_count\\{frontend="${frontend}",action="announce",family="ipv4",outcome="ok"\\} ${count}\\n`,
      ),
    )
  assert.match(metrics, new RegExp(`_udp_connects_total ${announces.udp}\\n`))
  assert.equal((await server.stats()).leechers, announces.http + announces.udp)

  for (let i = 0; i < 40; i++) await rawClient(t, first(server.http).port)
  await until('all connections are counted', async () =>
    /_http_connections 40\n/.test(await server.metrics()),
  )
})

test('SIGHUP reaches both threads: hooks, limits, log level; what one of them cannot use none has', async (t) => {
  const server = await start(t)
  await bothThreads(server, (reply) => assert.equal(reply.status, 'ok'))
  await reload(server, (text) =>
    text.replace('approval: none', 'approval: none, numwant_max: 1').concat('log_level: debug\n'),
  )
  await bothThreads(server, (reply) => assert.ok(reply.peers <= 1))
  // A line of the other thread may come after the reply that it tells of.
  await until('both threads have answered', async () => {
    const debugged = linesOf(await server.log()).filter(({ msg }) => msg === 'hook has seen an announce')
    return new Set(debugged.map(({ threadId }) => threadId)).size === 2
  })

  const before = await readFile(join(server.directory, 'server.yaml'), 'utf8')
  await reload(
    server,
    (text) =>
      text.replace('options: {}', 'options: { fail: true }').replace('numwant_max: 1', 'numwant_max: 9'),
    /not in this thread/,
  )
  await bothThreads(server, (reply) => assert.ok(reply.peers <= 1))
  await reload(server, () => before)
})

test('a new certificate is shown by both threads', async (t) => {
  const directory = await temporaryDirectory(t)
  const authority = createAuthority('Acme')
  const install = async (name: string) => {
    const { cert, key } = authority.issue(name)
    await writeFile(join(directory, 'cert.pem'), cert)
    await writeFile(join(directory, 'key.pem'), key)
  }
  await install('first')
  const server = await start(t, {
    directory,
    more: `http: { addr: 127.0.0.1:0, tls: { cert: ${directory}/cert.pem, key: ${directory}/key.pem } }\n`,
  })
  const { port } = first(server.http)
  const subjects = async () => {
    const names = new Set<string>()
    for (let i = 0; i < 30; i++) {
      const socket: TLSSocket = connectTls({ port, host: '127.0.0.1', ca: authority.cert, servername: '' })
      await once(socket, 'secureConnect')
      names.add(socket.getPeerX509Certificate()?.subject ?? '')
      socket.destroy()
    }
    return [...names]
  }
  assert.deepEqual(await subjects(), ['CN=first'])
  await install('second')
  await reload(server)
  assert.deepEqual(await subjects(), ['CN=second'])
})

test('SIGTERM ends both threads in order, within seconds, and the swarms are saved', async (t) => {
  const directory = await temporaryDirectory(t)
  const server = await start(t, { directory })
  for (let port = 1; port <= 60; port++) await announceHttp(server, port)
  const kept = await Promise.all(
    Array.from({ length: 20 }, async () => rawClient(t, first(server.http).port)),
  )
  for (const client of kept) {
    client.send(`GET /announce?${announceQuery({ port: 61 })} HTTP/1.1\r\nhost: x\r\n\r\n`)
    assert.equal((await client.reply()).status, 200)
  }
  const sentAt = performance.now()
  server.process.kill('SIGTERM')
  assert.equal(await server.exited, 0)
  assert.ok(performance.now() - sentAt < 5000)
  assert.doesNotMatch(await server.log(), /did not end in order/)
  const again = await start(t, { directory })
  assert.equal((await again.stats()).leechers, 61)
  await bothThreads(again, (reply) => assert.equal(reply.peers, 50))
})

test('a thread that fails is replaced by one with the settings in force; the others answer, and no swarm is lost', async (t) => {
  const server = await start(t)
  for (let port = 1; port <= 30; port++) await announceHttp(server, port)
  await reload(server, (text) => text.replace('approval: none', 'approval: none, numwant_max: 3'))
  const failures = async () =>
    linesOf(await server.log()).filter(({ msg }) => msg === 'tracker thread failed').length
  for (let round = 1; round <= 2; round++) {
    while ((await failures()) < round) {
      // Through the first thread nothing happens; through the other, its reply may be lost with it.
      await announceHttp(server, 6666).catch(() => undefined)
      assert.equal((await server.stats()).leechers, 31)
    }
    await until(
      'the thread was started again',
      async () =>
        linesOf(await server.log()).filter(({ msg }) => msg === 'tracker thread was started again').length ===
        round,
    )
    await bothThreads(server, ({ status, peers }) =>
      assert.deepEqual({ status, peers }, { status: 'ok', peers: 3 }),
    )
  }
  const { err } =
    linesOf(await server.log()).find(({ msg }) => msg === 'tracker thread failed') ?? assert.fail()
  assert.match(err?.message ?? '', /the hook is broken/)
  await reload(server, (text) => text.replace('numwant_max: 3', 'numwant_max: 4'))
  await bothThreads(server, ({ peers }) => assert.equal(peers, 4))
  server.process.kill('SIGTERM')
  assert.equal(await server.exited, 0)
})

test('a server whose second thread cannot start says why, and ends', async (t) => {
  const directory = await temporaryDirectory(t)
  await writeFile(join(directory, 'thread.mjs'), threadHook)
  await writeFile(
    join(directory, 'server.yaml'),
    `roles: [tracker]\ndata_dir: ${directory}/data\nmetrics_addr: none\nhttp: { addr: 127.0.0.1:0 }\n${settings('{ fail: true }')}`,
  )
  const child = spawn(
    process.execPath,
    [bin('rackswarm-server'), '--config', join(directory, 'server.yaml')],
    {
      stdio: ['ignore', 'ignore', 'pipe'],
    },
  )
  let stderr = ''
  child.stderr.on('data', (chunk: Buffer) => (stderr += chunk.toString()))
  const timer = setTimeout(() => child.kill('SIGKILL'), 20_000)
  const [code] = (await once(child, 'close')) as [number | null]
  clearTimeout(timer)
  assert.equal(code, 1, stderr)
  assert.match(stderr, /not in this thread/)
})

test('with several processes that announce at once through both threads every count is exact', async (t) => {
  const server = await start(t)
  const infoHashes = Array.from({ length: 7 }, (_, i) => testHash(0x10 + i))
  const peers = 3000
  const { port: udp } = first(server.udp)
  const urls = [`udp://127.0.0.1:${udp}`, `udp://127.0.0.1:${udp}`, server.publicUrl]
  await Promise.all(
    [...urls.slice(0, 2), `http://127.0.0.1:${first(server.http).port}`].map(async (url, i) =>
      crowd({ url, firstPort: 10_000 + i * peers, peers, infoHashes, clients: 12 }),
    ),
  )
  const expected = new Map(
    infoHashes.map((hash) => [
      Buffer.from(hash, 'hex').toString('latin1'),
      { complete: 0, incomplete: 0, downloaded: 0 },
    ]),
  )
  for (let port = 10_000; port < 10_000 + 3 * peers; port++) {
    const counts = expected.get(
      Buffer.from(infoHashes[port % infoHashes.length] ?? '', 'hex').toString('latin1'),
    )
    assert.ok(counts)
    const fate = fateOf(port)
    if (fate === 'leecher') counts.incomplete++
    if (fate === 'seeder') {
      counts.complete++
      counts.downloaded++
    }
  }
  const { body } = await httpGet(first(server.http), '/scrape')
  const files = bencoded(body).get('files')
  assert.ok(files instanceof Map)
  const found = new Map(
    [...files].map(([key, counts]) => [key, Object.fromEntries(counts as Map<string, number>)]),
  )
  assert.deepEqual(new Map([...found].sort()), new Map([...expected].sort()))
  const { seeders, leechers } = await server.stats()
  const sum = (key: 'complete' | 'incomplete') =>
    [...expected.values()].reduce((all, counts) => all + counts[key], 0)
  assert.deepEqual({ seeders, leechers }, { seeders: sum('complete'), leechers: sum('incomplete') })
})

test('with the swarms in Redis both threads and another server are one tracker, and what Redis has missed the end tells it', async (t) => {
  const directory = await temporaryDirectory(t)
  const redis = await startRedis(join(directory, 'redis'))
  t.after(() => redis[Symbol.asyncDispose]())
  const way = await startTcpProxy([{ port: redis.port }])
  t.after(() => way[Symbol.asyncDispose]())
  const inRedis = (port: number, config = '') =>
    `redis: { url: 'redis://127.0.0.1:${port}' }\nstorage: { name: redis, config: { ${config} } }\n`
  // At one a second it would take a minute to tell what is told at the end.
  const server = await start(t, { more: inRedis(way.port, 'reconcile_rate: 1') })
  const other = await start(t, { more: inRedis(redis.port) })
  const countsAt = async ({ http }: TrackerProcess) =>
    scrapeCounts(`http://127.0.0.1:${first(http).port}`, testHash(0xaa))
  const announces = async () => {
    const counted = /_request_duration_seconds_count\{[^}]*action="announce"[^}]*\} (\d+)\n/g
    return [...(await server.metrics()).matchAll(counted)].reduce((sum, [, count]) => sum + Number(count), 0)
  }
  const sent = { toServer: 0 }
  /** Announces peers from a port on, until both threads have answered and so many are there. @returns the port behind the last one */
  const announceAt = async (
    at: TrackerProcess,
    { from, peers }: { from: number; peers: number },
    check: (seen: Seen, port: number) => void = () => undefined,
  ) => {
    const threads = new Set<number>()
    let port = from
    for (; port < from + peers || (threads.size < 2 && port < from + 100); port++) {
      const seen = await announceHttp(at, port)
      assert.equal(seen.status, 'ok')
      threads.add(seen.thread)
      if (at === server) sent.toServer++
      check(seen, port)
    }
    assert.equal(threads.size, 2)
    return port
  }

  // Whoever was announced before, through whichever thread of whichever server, is handed out.
  const handsOutAll = ({ peers }: Seen, port: number) => {
    assert.equal(peers, Math.min(port - 1, 50))
  }
  const middle = await announceAt(server, { from: 1, peers: 20 }, handsOutAll)
  const afterBoth = await announceAt(other, { from: middle, peers: 20 }, handsOutAll)
  for (const each of [server, other])
    assert.deepEqual(await countsAt(each), { complete: 0, incomplete: afterBoth - 1 })
  assert.equal(await announces(), sent.toServer)

  way.links[0]?.cut()
  // A thread finds out with its own first announce; each knows what the other one was told.
  const end = await announceAt(server, { from: afterBoth, peers: 60 }, ({ peers }, port) => {
    assert.ok(peers >= Math.min(port - afterBoth, 50), `${peers} peers for ${port}`)
  })
  await until(
    'the peers are untold',
    async () => metricOf(await server.metrics(), 'rackswarm_store_untold_peers') === end - afterBoth,
  )
  assert.equal(metricOf(await server.metrics(), 'rackswarm_store_degraded'), 1)
  assert.equal(await announces(), sent.toServer)
  assert.equal((await countsAt(other)).incomplete, afterBoth - 1)
  way.links[0]?.mend()
  await until(
    'it is whole again',
    async () => metricOf(await server.metrics(), 'rackswarm_store_degraded') === 0,
  )
  assert.ok(metricOf(await server.metrics(), 'rackswarm_store_untold_peers') > 30)
  server.process.kill('SIGTERM')
  assert.equal(await server.exited, 0)
  assert.doesNotMatch(await server.log(), /did not end in order/)
  assert.deepEqual(await countsAt(other), { complete: 0, incomplete: end - 1 })
})

test('the lock lets one thread in at a time', async (t) => {
  const words = new Int32Array(new SharedArrayBuffer(16))
  const rounds = 1_000_000
  const threads = 4
  const options = { words, rounds, threads, die: false }
  await Promise.all(Array.from({ length: threads }, async () => hammer(t, options)))
  assert.deepEqual([...words.subarray(0, 3)], [0, threads * rounds, threads * rounds])
})

test('a lock whose holder has died is not waited for for ever', async (t) => {
  const words = new Int32Array(new SharedArrayBuffer(16))
  await assert.rejects(hammer(t, { words, rounds: 10, threads: 1, die: true }), /ended/)
  const lock = new Lock(words.subarray(0, 1), 100)
  assert.throws(() => {
    lock.acquire()
  }, /Cannot get a lock: it has been held for 0\.1 s/)
})

async function start(
  t: TestContext,
  { directory, more = '' }: { directory?: string; more?: string } = {},
): Promise<TrackerProcess> {
  const own = directory ?? (await temporaryDirectory(t))
  await writeFile(join(own, 'thread.mjs'), threadHook)
  return startTracker(t, settings() + more, { directory: own })
}

function metricOf(metrics: string, name: string): number {
  return Number(new RegExp(`^${name} (\\S+)$`, 'm').exec(metrics)?.[1])
}

interface Seen {
  readonly status: 'ok' | 'refused'
  readonly thread: number
  readonly peers: number
}

/** An announce on a connection of its own. */
async function announceHttp(server: TrackerProcess, port: number): Promise<Seen> {
  const { body } = await httpGet(first(server.http), `/announce?${announceQuery({ port })}`)
  if (body.startsWith('d14:failure')) return { status: 'refused', thread: -1, peers: 0 }
  return seenIn(parseAnnounceReply(Buffer.from(body, 'latin1')))
}

async function announceUdp(t: TestContext, server: TrackerProcess, port: number): Promise<Seen> {
  const probe = await udpProbe(t, first(server.udp))
  const ids = { connectionId: await probe.connectionId(), transactionId: 1 }
  return seenIn(parseUdpAnnounceReply(await probe.ask(writeUdpAnnounce(ids, announceFields({ port }))), 4))
}

function seenIn({ intervalSeconds, peers }: ReturnType<typeof parseAnnounceReply>): Seen {
  return { status: 'ok', thread: Math.floor(intervalSeconds / 1000), peers: peers.length }
}

/** Announces a peer that is there already until both threads have answered, and checks each answer. */
async function bothThreads(server: TrackerProcess, check: (seen: Seen) => void): Promise<void> {
  const threads = new Set<number>()
  for (let tries = 0; threads.size < 2 && tries < 100; tries++) {
    const seen = await announceHttp(server, 1)
    check(seen)
    threads.add(seen.thread)
  }
  assert.equal(threads.size, 2)
}

/** Changes the configuration file, sends SIGHUP, and waits for what the log says of it: that it failed with `words`, if they are given. */
async function reload(
  server: TrackerProcess,
  change: (text: string) => string = (text) => text,
  words?: RegExp,
): Promise<void> {
  const file = join(server.directory, 'server.yaml')
  await writeFile(file, change(await readFile(file, 'utf8')))
  const outcomes = async () =>
    linesOf(await server.log()).filter(({ msg }) => msg === 'reloaded' || msg.startsWith('reload failed'))
  const seen = (await outcomes()).length
  server.process.kill('SIGHUP')
  await until('the reload has ended', async () => (await outcomes()).length > seen)
  const { msg, err } = (await outcomes())[seen] ?? assert.fail()
  if (words) assert.match(err?.message ?? '', words)
  else assert.equal(msg, 'reloaded', err?.message ?? '')
}

interface Line {
  readonly msg: string
  readonly threadId?: number
  readonly err?: { readonly message: string }
}

function linesOf(log: string): Line[] {
  return log
    .split('\n')
    .filter((line) => line.endsWith('}'))
    .map((line) => JSON.parse(line) as Line)
}

async function crowd(options: Crowd): Promise<void> {
  const file = join(import.meta.dirname, '..', 'support', 'tracker-crowd.ts')
  const child = spawn(process.execPath, [file, JSON.stringify(options)], {
    stdio: ['ignore', 'ignore', 'inherit'],
  })
  const [code] = (await once(child, 'exit')) as [number | null]
  assert.equal(code, 0, options.url)
}

async function hammer(t: TestContext, workerData: LockHammer): Promise<void> {
  const worker = new Worker(new URL('../support/lock-hammer.ts', import.meta.url), { workerData })
  t.after(() => worker.terminate())
  await new Promise<void>((resolve, reject) => {
    worker.once('message', () => {
      resolve()
    })
    worker.once('error', reject)
    worker.once('exit', (code) => {
      reject(new Error(`the thread ended with code ${code}`))
    })
  })
}
