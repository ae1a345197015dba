// Attacks on a running tracker, each from a process of its own. While one lasts, honest clients are answered within a second and the
// server's memory stays within its bound; afterwards the server is as it was.
import assert from 'node:assert/strict'
import type { ChildProcess } from 'node:child_process'
import { execFileSync, spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { createUdpTracker } from '../../lib/client/udp-tracker.ts'
import type { InfoHash } from '../../lib/protocol/infohash.ts'
import { infoHashFromBytes } from '../../lib/protocol/infohash.ts'
import { mintOffline } from '../../lib/token/offline.ts'
import { rawClientOn } from '../support/http-client.ts'
import { makeTestKey } from '../support/key-server.ts'
import type { AttackKind, AttackOptions, AttackStats } from '../support/tracker-attacker.ts'
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
} from '../support/tracker.ts'
import { until } from '../support/until.ts'

/** An attack lasts so long, and on a slow machine until it has had its strength. */
const attackMs = 3000
const attackMaxMs = 60_000
const answerMs = 1000
/** A server at rest has some 110 MB, most of it Node's own. */
const MiB = 1024 * 1024
const open = 'tracker: { approval: none }\n'

interface Attack {
  /** What the attacker has seen so far. */
  readonly seen: AttackStats
  /** Ends it. @returns what the attacker has seen */
  stop(): Promise<AttackStats>
}

/** Starts an attack; resolves once it is in full swing. */
async function startAttack(
  t: TestContext,
  server: TrackerProcess,
  kind: AttackKind,
  options: Omit<AttackOptions, 'http' | 'udp'>,
): Promise<Attack> {
  const program = join(import.meta.dirname, '..', 'support', 'tracker-attacker.ts')
  const all: AttackOptions = { http: first(server.http), udp: first(server.udp), ...options }
  const child: ChildProcess = spawn(process.execPath, [program, kind, JSON.stringify(all)], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  t.after(() => void child.kill('SIGKILL'))
  assert.ok(child.stdout && child.stdin)
  const lines = createInterface({ input: child.stdout })
  const [ready] = (await once(lines, 'line')) as [string]
  assert.equal(ready, '"ready"')
  let seen: AttackStats = { sent: 0, answered: 0, closed: 0, open: 0 }
  lines.on('line', (line) => {
    seen = JSON.parse(line) as AttackStats
  })
  const { stdin } = child
  return {
    get seen() {
      return seen
    },
    stop: async () => {
      const ended = once(lines, 'close')
      stdin.end()
      await ended
      return seen
    },
  }
}

interface Honest {
  readonly infoHash?: InfoHash
  readonly from?: string
  /** A token for each announce. */
  readonly jwt?: () => string
}

/** The seeder that the honest peer must hear of all the time. */
async function seed(
  server: TrackerProcess,
  { infoHash = testHash(0xee), from = '127.0.1.1', jwt }: Honest,
): Promise<void> {
  const query = announceQuery({ infoHash, port: 7001, left: 0 }, tokenOf(jwt))
  assert.equal((await httpGet(first(server.http), `/announce?${query}`, { from })).status, 200)
}

/** An honest leecher: announces over both protocols, on a connection of its own each time, until the attack has lasted long enough. */
async function announceHonestly(
  t: TestContext,
  server: TrackerProcess,
  { infoHash = testHash(0xee), from = '127.0.1.1', jwt }: Honest,
  isEnough = () => true,
): Promise<{ announces: number; slowestMs: number }> {
  const { host, port } = first(server.udp)
  // BEP 15 has clients ask again, since packets get lost.
  const udp = createUdpTracker({
    url: `udp://${host}:${port}/announce`,
    localAddress: from,
    firstTimeoutMs: 400,
    triesMax: 2,
  })
  t.after(() => udp[Symbol.asyncDispose]())
  const beganMs = performance.now()
  const isOver = () => {
    const passedMs = performance.now() - beganMs
    return passedMs > attackMaxMs || (passedMs > attackMs && isEnough())
  }
  let announces = 0
  let slowestMs = 0
  const timed = async (work: (signal: AbortSignal) => Promise<void>) => {
    const startMs = performance.now()
    await work(AbortSignal.timeout(answerMs))
    slowestMs = Math.max(slowestMs, performance.now() - startMs)
    announces++
  }
  while (!isOver()) {
    await timed(async (signal) => {
      const query = announceQuery({ infoHash, port: 7002 }, tokenOf(jwt))
      const { body } = await httpGet(first(server.http), `/announce?${query}`, { from, signal })
      const reply = bencoded(body)
      assert.deepEqual([reply.get('complete'), reply.get('incomplete')], [1, 1], body)
    })
    await timed(async (signal) => {
      const fields = announceFields({ infoHash, port: 7002 })
      const reply = await udp.announce({ ...fields, ...(jwt && { jwt: jwt() }) }, { signal })
      assert.deepEqual([reply.complete, reply.incomplete, reply.peers.length], [1, 1, 1])
    })
  }
  return { announces, slowestMs }
}

function tokenOf(jwt: (() => string) | undefined): string {
  return jwt ? `jwt=${jwt()}` : ''
}

/** Attacks, and has an honest client announce meanwhile. */
async function underAttack(
  t: TestContext,
  server: TrackerProcess,
  attack: Omit<AttackOptions, 'http' | 'udp'> & {
    readonly kind: AttackKind
    readonly peakMax: number
    /** It has had the strength that it needs to mean something. */
    readonly isEnough: (seen: AttackStats) => boolean
  },
  honest: Honest = {},
): Promise<AttackStats> {
  const { kind, peakMax, isEnough, ...options } = attack
  await seed(server, honest)
  const running = await startAttack(t, server, kind, options)
  const { announces, slowestMs } = await announceHonestly(t, server, honest, () => isEnough(running.seen))
  const seen = await running.stop()
  const peakBytes = await server.peakBytes()
  const report = `${announces} honest announces, the slowest in ${Math.round(slowestMs)} ms; attacker: ${JSON.stringify(seen)}; peak: ${Math.round(peakBytes / MiB)} MiB`
  t.diagnostic(report)
  assert.ok(slowestMs < answerMs, report)
  assert.ok(announces >= 10, report)
  assert.ok(isEnough(seen), report)
  assert.ok(peakBytes < peakMax, report)
  await isWell(server, honest)
  return seen
}

/** It answers as before, and has let go of all connections. */
async function isWell(
  server: TrackerProcess,
  { infoHash, from = '127.0.1.1', jwt }: Honest = {},
): Promise<void> {
  assert.equal(server.process.exitCode, null)
  const query = announceQuery({ ...(infoHash && { infoHash }), port: 7003 }, tokenOf(jwt))
  const startMs = performance.now()
  const { body } = await httpGet(first(server.http), `/announce?${query}`, { from })
  assert.match(body, /^d8:completei/)
  assert.ok(performance.now() - startMs < answerMs)
  await until('no connection is left', async () => (await openConnections(server)) === 0)
}

async function openConnections(server: TrackerProcess): Promise<number> {
  return Number(/^rackswarm_tracker_http_connections (\d+)$/m.exec(await server.metrics())?.[1])
}

test('clients that say nothing, that say a byte at a time, or do not read what they ask for', async (t) => {
  const server = await startTracker(
    t,
    `http: { addr: 127.0.0.1:0, request_timeout: 1s, idle_timeout: 1s }\n${open}`,
  )
  const count = 300
  await underAttack(t, server, {
    ...{ kind: 'slow', count, peakMax: 400 * MiB },
    isEnough: ({ closed }) => closed >= count / 3,
  })
})

test('sockets up to nine tenths of the file limit; beyond it new ones are refused and UDP is answered still', async (t) => {
  const server = await startTracker(t, open)
  const filesMax = 1024
  execFileSync('prlimit', ['--pid', String(server.pid), `--nofile=${filesMax}:${filesMax}`])
  const early = rawClientOn(connect(first(server.http)))
  t.after(() => early.socket.destroy())
  const announce = `GET /announce?${announceQuery({ port: 7100 })} HTTP/1.1\r\nHost: t\r\n\r\n`
  early.send(announce)
  assert.equal((await early.reply()).status, 200)
  await seed(server, {})
  const most = await startAttack(t, server, 'sockets', { count: Math.floor(filesMax * 0.9) })
  const { slowestMs } = await announceHonestly(t, server, {})
  assert.ok(slowestMs < answerMs, `${slowestMs} ms`)
  assert.ok((await openConnections(server)) >= Math.floor(filesMax * 0.9))

  const more = await startAttack(t, server, 'sockets', { count: 300 })
  const udp = createUdpTracker({
    url: `udp://127.0.0.1:${first(server.udp).port}`,
    firstTimeoutMs: 1000,
    triesMax: 1,
  })
  t.after(() => udp[Symbol.asyncDispose]())
  for (let i = 0; i < 20; i++)
    assert.equal((await udp.announce(announceFields({ infoHash: testHash(0xee), port: 7002 }))).complete, 1)
  early.send(announce)
  assert.equal((await early.reply()).status, 200, 'a connection that was there is served')
  const turnedAway = await more.stop()
  const held = await most.stop()
  assert.equal(held.open, Math.floor(filesMax * 0.9))
  assert.ok(turnedAway.closed >= 200, JSON.stringify(turnedAway))
  early.socket.destroy()
  assert.ok((await server.peakBytes()) < 300 * MiB)
  await until(
    'it answers again',
    async () => (await httpGet(first(server.http), '/scrape').catch(() => undefined))?.status === 200,
  )
  await isWell(server)
})

test('bombs of headers, queries and bodies', async (t) => {
  const server = await startTracker(t, open)
  await underAttack(t, server, {
    ...{ kind: 'bombs', count: 40, peakMax: 400 * MiB },
    isEnough: ({ answered }) => answered > 100,
  })
})

test('a flood of tokens with wrong signatures, from one network', async (t) => {
  const directory = await temporaryDirectory(t)
  const key = makeTestKey('the-key')
  const [keyFile, keysFile] = [join(directory, 'key.pem'), join(directory, 'keys.json')]
  await writeFile(keyFile, key.privateKey.export({ format: 'pem', type: 'pkcs8' }))
  await writeFile(keysFile, JSON.stringify({ keys: [key.jwk] }))
  const issuer = 'https://registry.example.com'
  const server = await startTracker(
    t,
    `tokens: { issuer: ${issuer}, audience: ${issuer}, keys_file: ${keysFile} }\n`,
    { directory },
  )
  const infoHash = testHash(0xee)
  const mint = async () =>
    (
      await mintOffline({
        ...{ keyFile, kid: 'the-key', issuer, audience: issuer, infoHash },
        ...{ subject: 'h1', ttlMs: 600_000, now: Date.now },
      })
    ).token
  // New ones, as long as there are some: they are not known yet, so each has to pass the queue that the flood is in.
  const tokens = await Promise.all(Array.from({ length: 1000 }, mint))
  let used = 0
  const jwt = () => tokens[used++ % tokens.length] ?? ''
  await underAttack(
    t,
    server,
    {
      ...{ kind: 'tokens', count: 100, token: jwt(), infoHash, peakMax: 450 * MiB },
      isEnough: ({ sent }) => sent > 1000,
    },
    { infoHash, jwt },
  )
  const { tokensRefused, leechers } = await server.stats()
  assert.ok((tokensRefused['bad_signature'] ?? 0) > 500, JSON.stringify(tokensRefused))
  assert.equal(leechers, 2, 'nobody of them is in the swarm')
})

test('a flood of new swarms and new peers: the store stays within its limits and known peers are answered', async (t) => {
  const [peersMax, swarmsMax] = [20_000, 5000]
  const server = await startTracker(
    t,
    `${open}storage: { config: { peers_max: ${peersMax}, swarms_max: ${swarmsMax}, snapshot: false } }\n`,
  )
  const infoHash = infoHashFromBytes(randomBytes(20))
  await httpGet(first(server.http), `/announce?${announceQuery({ infoHash, port: 7002 })}`, {
    from: '127.0.1.1',
  })
  await underAttack(
    t,
    server,
    {
      ...{ kind: 'swarms', count: 20, peakMax: 300 * MiB },
      isEnough: ({ answered }) => answered > 2 * swarmsMax,
    },
    { infoHash },
  )
  const { swarms, seeders, leechers } = await server.stats()
  assert.equal(swarms, swarmsMax)
  assert.ok(seeders + leechers <= peersMax)
})

test('random bytes to both ports', async (t) => {
  const server = await startTracker(t, open)
  await underAttack(t, server, {
    ...{ kind: 'garbage', count: 50, peakMax: 400 * MiB },
    isEnough: ({ sent }) => sent > 5000,
  })
  const { udp } = await server.stats()
  assert.ok((udp.dropped['no_request'] ?? 0) > 0 && (udp.dropped['bad_connection_id'] ?? 0) > 0)
})
