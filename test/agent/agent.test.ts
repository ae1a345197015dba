import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { mkdir, mkdtemp, readFile, readdir, rm, stat, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import type { Agent, AgentDeps } from '../../agent/agent.ts'
import { startAgent } from '../../agent/agent.ts'
import { AgentConfig } from '../../agent/config.ts'
import { createAgentClient } from '../../lib/client/agent-client.ts'
import type { AgentStatus, FetchEvent } from '../../lib/client/api.ts'
import { HostReport } from '../../lib/client/api.ts'
import { silentLog } from '../../lib/runtime/log.ts'
import { until } from '../support/until.ts'
import type { Blob } from './engine/fixtures.ts'
import { peerAt, peerFeed, randomBlob, temporaryDirectory } from './engine/fixtures.ts'
import { assertFetched, startEngine, startFetch } from './engine/own-engine.ts'
import type { MiniServer } from './mini-server.ts'
import { startMiniServer } from './mini-server.ts'

const mebibyte = 1024 * 1024

type Settings = Record<string, unknown>

/** An agent in this process; started again with the same directory it is the same host. */
async function startTestAgent(
  t: TestContext,
  server: MiniServer,
  directory: string,
  settings: Settings = {},
  deps: Partial<AgentDeps> = {},
) {
  const config = AgentConfig.parse({
    server: server.url,
    host: 'a1',
    place: 'rack-1',
    data_dir: join(directory, 'data'),
    control_socket: join(directory, 'agent.sock'),
    metrics_addr: '127.0.0.1:0',
    peer_port: 0,
    follow_jitter: '10ms',
    signatures: { policy: 'accept_unsigned' },
    ...settings,
    disk: { reserve: '0B', ...(settings['disk'] as Settings | undefined) },
  })
  const agent = await startAgent(config, {
    log: silentLog(),
    now: Date.now,
    monotonic: () => performance.now(),
    random: Math.random,
    bootstrapToken: 'bootstrap',
    ...deps,
  })
  let ended = false
  const end = async () => {
    if (!ended) await agent[Symbol.asyncDispose]()
    ended = true
  }
  t.after(end)
  const client = createAgentClient({ socketPath: agent.addresses.controlSocket })
  t.after(() => client[Symbol.asyncDispose]())
  return { agent, client, end, data: join(directory, 'data') }
}

async function fetchAll(
  client: { fetch(reference: string): AsyncIterable<FetchEvent> },
  reference: string,
): Promise<FetchEvent[]> {
  const events: FetchEvent[] = []
  for await (const event of client.fetch(reference)) events.push(event)
  return events
}

async function stateOf(client: { status(): Promise<AgentStatus> }, reference: string) {
  return (await client.status()).references.find((held) => held.reference === reference)
}

async function untilHeld(
  client: { status(): Promise<AgentStatus> },
  reference: string,
  digest?: string,
): Promise<string> {
  await until(`${reference} is held`, async () => {
    const held = await stateOf(client, reference)
    return held?.state === 'held' && (digest === undefined || held.digest === digest)
  })
  return (await stateOf(client, reference))?.path ?? ''
}

function portOf(agent: Agent): number {
  return agent.addresses.peerPort
}

test('a followed tag is fetched, exposed by name and seeded; a second version replaces it', async (t) => {
  const server = await startMiniServer(t)
  const [one, two, small] = [randomBlob(2 * mebibyte), randomBlob(2 * mebibyte), randomBlob(1000)]
  const first = server.publish('web:latest', [
    { blob: one, title: 'build.tar' },
    { blob: small, title: 'notes.txt' },
  ])
  const { client } = await startTestAgent(t, server, await temporaryDirectory(t), { follow: ['web:latest'] })
  const path = await untilHeld(client, 'web:latest', first)
  assert.ok((await readFile(join(path, 'build.tar'))).equals(one.bytes))
  assert.ok((await readFile(join(path, 'notes.txt'))).equals(small.bytes))
  assert.equal((await stat(join(path, 'build.tar'))).mode & 0o777, 0o444)

  const second = server.publish('web:latest', [{ blob: two, title: 'build.tar' }])
  const next = await untilHeld(client, 'web:latest', second)
  assert.ok((await readFile(join(next, '..', 'current', 'build.tar'))).equals(two.bytes))
  assert.ok((await readFile(join(next, '..', 'previous', 'build.tar'))).equals(one.bytes))
  const { blobs } = await client.status()
  assert.deepEqual(
    blobs
      .filter(({ seeding }) => seeding)
      .map(({ digest }) => digest)
      .toSorted(),
    [`sha256:${one.sha256}`, `sha256:${two.sha256}`].toSorted(),
  )
  await until('a report of it', () =>
    server.reports.some(({ held }) =>
      held.some(({ digest, state }) => digest === second && state === 'held'),
    ),
  )
})

test('an agent fetches from another agent, and says from which rack the bytes came', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(3 * mebibyte)
  server.publish('web:1', [{ blob, title: 'build.tar' }])
  const one = await startTestAgent(t, server, await temporaryDirectory(t))
  await fetchAll(one.client, 'web:1')
  server.webseed = false
  server.peers = [{ port: portOf(one.agent), distance: 0 }]
  const reads = server.blobReads.length
  const two = await startTestAgent(t, server, await temporaryDirectory(t), { host: 'a2' })
  // The first report tells an agent where it is.
  await until('a report', async () => (await two.client.status()).lastReportAt !== undefined)
  const events = await fetchAll(two.client, 'web:1')
  const done = events.at(-1)
  if (done?.event !== 'done') assert.fail(JSON.stringify(done))
  assert.ok(done.held.bytes.ownRack >= blob.bytes.length)
  assert.deepEqual([done.held.bytes.otherRacks, done.held.bytes.webseed], [0, 0])
  assert.equal(server.blobReads.length, reads)
  assert.ok((await readFile(done.files[0]?.path ?? '')).equals(blob.bytes))
  const metrics = await (await fetch(`${two.agent.addresses.metricsUrl}/metrics`)).text()
  assert.match(metrics, /rackswarm_agent_fetches_total\{outcome="ok"\} 1/)
  assert.match(metrics, /rackswarm_agent_received_bytes_total\{source="own_rack"\} [1-9]/)
})

test('an agent gives nothing to whoever only knows its address, nor to a token for something else', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(2 * mebibyte)
  server.publish('web:1', [{ blob, title: 'build.tar' }])
  const one = await startTestAgent(t, server, await temporaryDirectory(t))
  await fetchAll(one.client, 'web:1')
  server.webseed = false
  server.peers = [{ port: portOf(one.agent), distance: 0 }]
  const faults = async () =>
    (await (await fetch(`${one.agent.addresses.metricsUrl}/metrics`)).text()).match(
      /(?<=peers_refused_total\{fault=")\w+/g,
    )
  for (const [fault, claims] of [
    ['wrong_scope', { scopes: ['announce', 'scrape'] }],
    ['wrong_address', { scopes: ['peer'], cidr: '192.0.2.1/32' }],
  ] as const) {
    server.peerClaims = { ...claims, scopes: [...claims.scopes] }
    const two = await startTestAgent(t, server, await temporaryDirectory(t), { host: `a-${fault}` })
    const ending = new AbortController()
    const fetching = fetchAll(
      { fetch: (reference) => two.client.fetch(reference, ending.signal) },
      'web:1',
    ).catch(() => undefined)
    await until(`a refusal for ${fault}`, async () => (await faults())?.includes(fault) === true)
    assert.equal((await stateOf(two.client, 'web:1'))?.bytesDone, 0)
    ending.abort()
    await fetching
  }
  // Who has no token at all, as other BitTorrent clients.
  const engine = await startEngine(t)
  const handle = startFetch(
    engine,
    blob,
    join(await temporaryDirectory(t), 'copy'),
    peerFeed(peerAt(portOf(one.agent))),
  )
  await until('nothing to move', () => handle.waitingReason !== undefined)
  assert.equal(handle.bytesVerified, 0)
})

test('with peers: any an agent serves clients that have no token', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(2 * mebibyte)
  server.publish('web:1', [{ blob, title: 'build.tar' }])
  const one = await startTestAgent(t, server, await temporaryDirectory(t), { peers: 'any' })
  await fetchAll(one.client, 'web:1')
  const file = join(await temporaryDirectory(t), 'copy')
  const engine = await startEngine(t)
  await assertFetched(startFetch(engine, blob, file, peerFeed(peerAt(portOf(one.agent)))), blob, file)
})

test('agents that were started again admit each other while the server is away', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(4 * mebibyte)
  server.publish('web:1', [{ blob, title: 'build.tar' }])
  const directory = await temporaryDirectory(t)
  const one = await startTestAgent(t, server, directory)
  await fetchAll(one.client, 'web:1')
  await one.end()
  const token = JSON.parse(await readFile(join(one.data, 'torrents', `${blob.sha256}.json`), 'utf8')) as {
    peerToken: string
  }
  const seen: string[] = []
  server.intercept = (request, response) => {
    seen.push(request.url ?? '')
    response.destroy()
    return true
  }
  const again = await startTestAgent(t, server, directory)
  const engine = await startEngine(t, { peerTokens: { tokenFor: () => token.peerToken } })
  const file = join(await temporaryDirectory(t), 'copy')
  await assertFetched(startFetch(engine, blob, file, peerFeed(peerAt(portOf(again.agent)))), blob, file)
  assert.ok(seen.includes('/.well-known/jwks.json'), 'it asked for the keys, and had to do without')
})

test('agents that require TLS give each other a build, with tokens that name their certificates', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(4 * mebibyte)
  server.publish('web:1', [{ blob, title: 'build.tar' }])
  const directory = await temporaryDirectory(t)
  const start = (name: string, settings: Settings) =>
    startTestAgent(t, server, join(directory, name), settings)
  const one = await start('one', { peer_tls: 'require' })
  await fetchAll(one.client, 'web:1')
  server.webseed = false
  server.peers = [{ port: portOf(one.agent), distance: 0 }]
  const two = await start('two', { peer_tls: 'require' })
  assert.equal((await fetchAll(two.client, 'web:1')).at(-1)?.event, 'done')
  const named = server.grants.map(({ certificate }) => certificate)
  assert.equal(new Set(named).size, 2)
  assert.ok(named.every((thumbprint) => thumbprint !== undefined))
  const uploaded = (await one.client.status()).blobs.map(({ uploadedBytes }) => uploadedBytes)
  assert.deepEqual(uploaded, [blob.bytes.length])
  // Until it is started again with TLS, the token that is kept names no certificate; the first announce mends that.
  const three = await start('three', { peer_tls: 'off' })
  server.webseed = true
  await fetchAll(three.client, 'web:1')
  await three.end()
  const again = await start('three', { peer_tls: 'require' })
  server.webseed = false
  await until('the announce after the restart', () => server.announces.at(-1)?.port === portOf(again.agent))
  server.peers = [{ port: portOf(again.agent), distance: 0 }]
  const four = await start('four', { peer_tls: 'require' })
  assert.equal((await fetchAll(four.client, 'web:1')).at(-1)?.event, 'done')
})

test('a fetch that goes on after its files were lost keeps its grant again, to seed after a restart', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(4 * mebibyte)
  server.publish('web:1', [{ blob, title: 'build.tar' }])
  server.webseed = false
  const directory = await temporaryDirectory(t)
  const { client, data, end } = await startTestAgent(t, server, directory)
  const ends = new AbortController()
  const given = (async () => {
    for await (const { event } of client.fetch('web:1', ends.signal)) assert.notEqual(event, 'done')
  })().catch(() => undefined)
  const grantFile = join(data, 'torrents', `${blob.sha256}.json`)
  const isKept = () =>
    readFile(grantFile).then(
      () => true,
      () => false,
    )
  await until('the grant on disk', isKept)
  ends.abort()
  await given
  await until('the fetch to be given up', async () => (await client.transfers()).transfers.length === 0)
  // What eviction does.
  for (const name of await readdir(join(data, 'torrents'))) await rm(join(data, 'torrents', name))
  server.webseed = true
  assert.equal((await fetchAll(client, 'web:1')).at(-1)?.event, 'done')
  assert.ok(await isKept(), 'it is there again')
  await end()
  const again = await startTestAgent(t, server, directory)
  assert.ok((await again.client.status()).blobs.every(({ seeding }) => seeding))
})

test('a release that nobody has signed is refused before anything of it is asked for', async (t) => {
  const server = await startMiniServer(t)
  const digest = server.publish('web:latest', [{ blob: randomBlob(2 * mebibyte), title: 'build.tar' }])
  const { agent, client } = await startTestAgent(t, server, await temporaryDirectory(t), {
    follow: ['web:latest'],
    signatures: {},
  })
  await until('a refusal', async () => (await stateOf(client, 'web:latest'))?.state === 'failed')
  assert.match((await stateOf(client, 'web:latest'))?.reason ?? '', /^refused: this host trusts no key/)
  const { refused } = await client.transfers()
  assert.deepEqual(
    refused?.map((release) => [release.reference, release.digest]),
    [['web:latest', digest]],
  )
  assert.deepEqual([server.grants, server.blobReads, server.announces], [[], [], []])
  // The rules are read again: what was refused is looked at at once.
  const configOf = (signatures: Settings) => AgentConfig.parse({ server: server.url, signatures })
  assert.ok(
    !agent.reload(configOf({ policy: 'accept_unsigned' })).some((path) => path.startsWith('signatures')),
  )
  await untilHeld(client, 'web:latest', digest)
  assert.throws(() => agent.reload(configOf({ keys: ['/absent'] })), /signatures\.keys: .*\/absent/)
})

test('other limits are put in force while a fetch is under way; what needs a restart is named', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(16 * mebibyte)
  server.publish('web:1', [{ blob, title: 'build.tar' }])
  const directory = await temporaryDirectory(t)
  const settings = { limits: { download: '256KiB' } }
  const { agent, client } = await startTestAgent(t, server, directory, settings)
  const fetching = fetchAll(client, 'web:1')
  await until('a first piece', async () => ((await stateOf(client, 'web:1'))?.bytesDone ?? 0) > 0)
  const configOf = (next: Settings) => AgentConfig.parse({ server: server.url, ...next })
  const loosened = configOf({
    limits: { download: '512MiB', from_distance: [{ distance: 1, upload: '1MiB' }] },
    peer_port: 7000,
  })
  const restart = agent.reload(loosened)
  assert.ok(restart.includes('peer_port'))
  assert.ok(!restart.some((path) => path.startsWith('limits')))
  const startedAt = performance.now()
  assert.equal((await fetching).at(-1)?.event, 'done')
  assert.ok(performance.now() - startedAt < 20_000, 'at the old limit it would have taken a minute')
  const unusable = configOf({ engine: 'webtorrent', limits: { from_distance: [{ distance: 1 }] } })
  assert.throws(() => agent.reload(unusable), /limits\.from_distance: needs engine: rackswarm/)
})

test('settings that do not go together are named before anything starts', async (t) => {
  const server = await startMiniServer(t)
  const directory = await temporaryDirectory(t)
  const start = (settings: Settings) => startTestAgent(t, server, directory, settings)
  await assert.rejects(
    start({ engine: 'webtorrent', peer_tls: 'accept', peer_addr: '127.0.0.1' }),
    (error: Error) => {
      assert.match(error.message, /peer_addr: needs engine: rackswarm/)
      assert.match(error.message, /peer_tls: needs engine: rackswarm/)
      return true
    },
  )
  await assert.rejects(
    start({ peers: 'any', peer_tls: 'require' }),
    /peer_tls: require needs peers: approved/,
  )
})

test('an agent listens on, dials from and announces from the address it is given', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(2 * mebibyte)
  server.publish('web:1', [{ blob, title: 'build.tar' }])
  const seen = new Set<string | undefined>()
  server.intercept = (request) => {
    if (request.url?.startsWith('/announce') === true) seen.add(request.socket.remoteAddress)
    return false
  }
  const { agent, client } = await startTestAgent(t, server, await temporaryDirectory(t), {
    peer_addr: '127.0.0.5',
  })
  assert.equal((await fetchAll(client, 'web:1')).at(-1)?.event, 'done')
  assert.deepEqual([...seen], ['127.0.0.5'])
  const reaches = (host: string) =>
    new Promise<boolean>((resolve) => {
      const socket = connect(portOf(agent), host, () => {
        socket.destroy()
        resolve(true)
      })
      socket.on('error', () => {
        resolve(false)
      })
    })
  assert.deepEqual([await reaches('127.0.0.5'), await reaches('127.0.0.1')], [true, false])
})

test('after a restart it seeds what it has, without the server, and others can fetch it', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(2 * mebibyte)
  const digest = server.publish('web:1', [{ blob, title: 'build.tar' }])
  const directory = await temporaryDirectory(t)
  const first = await startTestAgent(t, server, directory, { follow: ['web:1'] })
  await untilHeld(first.client, 'web:1')
  await first.end()
  const announced = server.announces.length
  const reads = server.blobReads.length
  const again = await startTestAgent(t, server, directory, { follow: ['web:1'] })
  assert.equal((await stateOf(again.client, 'web:1'))?.digest, digest)
  assert.ok((await again.client.status()).blobs.every(({ seeding }) => seeding))
  await until('an announce as a seeder', () =>
    server.announces.slice(announced).some(({ left, event }) => left === 0 && event === 'started'),
  )
  assert.equal(server.blobReads.length, reads, 'nothing was fetched again')
})

test('bytes with another SHA-256 are never exposed, and the reason is told', async (t) => {
  const server = await startMiniServer(t)
  const good = randomBlob(mebibyte)
  // A server that signs the pieces of other bytes: SHA-1 agrees, SHA-256 does not.
  const other = randomBlob(mebibyte)
  const forged: Blob = { ...good, bytes: other.bytes }
  const { pieces } = other.metainfo
  const { parseTorrent, writeBlobInfo, writeTorrent } = await import('../../lib/protocol/metainfo.ts')
  const torrent = writeTorrent(writeBlobInfo({ sha256Hex: good.sha256, length: mebibyte, pieces }), {})
  server.publish('web:bad', [
    { blob: forged, title: 'build.tar', torrent: { ...good, torrent, metainfo: parseTorrent(torrent) } },
  ])
  const { client, data } = await startTestAgent(t, server, await temporaryDirectory(t))
  const last = (await fetchAll(client, 'web:bad')).at(-1)
  assert.match(last?.event === 'error' ? last.error.message : '', /the bytes fetched have sha256:/)
  assert.deepEqual(await readdir(join(data, 'blobs', 'sha256')), [])
  assert.deepEqual(await readdir(join(data, 'partial')), [])
  assert.deepEqual(await readdir(join(data, 'releases')), [])
  assert.equal((await stateOf(client, 'web:bad'))?.state, 'failed')
})

test('a fetch without peers and webseed asks for help, and at last takes the plain way', async (t) => {
  const server = await startMiniServer(t)
  server.webseed = false
  const blob = randomBlob(2 * mebibyte)
  server.publish('web:1', [{ blob, title: 'build.tar' }])
  const { client, agent } = await startTestAgent(t, server, await temporaryDirectory(t), {
    stall_timeout: '1s',
  })
  const done = (await fetchAll(client, 'web:1')).at(-1)
  assert.equal(done?.event, 'done')
  assert.ok(
    server.grants.some(({ stalledSeconds }) => (stalledSeconds ?? 0) >= 1),
    'the grant was asked with the time of the stall',
  )
  const metrics = await (await fetch(`${agent.addresses.metricsUrl}/metrics`)).text()
  for (const step of ['ask', 'remake', 'fallback'])
    assert.match(metrics, new RegExp(`watchdog_steps_total\\{step="${step}"\\} [1-9]`))
})

test('what is not followed nor pinned gives way when the quota is reached; what is stays', async (t) => {
  const server = await startMiniServer(t)
  const [a, b, c] = [randomBlob(mebibyte), randomBlob(mebibyte), randomBlob(mebibyte)]
  for (const [tag, blob] of Object.entries({ a, b, c }))
    server.publish(`web:${tag}`, [{ blob, title: 'build.tar' }])
  const { client, data } = await startTestAgent(t, server, await temporaryDirectory(t), {
    disk: { quota: '2.5MiB' },
  })
  await fetchAll(client, 'web:a')
  await client.pin('web:a')
  await fetchAll(client, 'web:b')
  assert.equal((await fetchAll(client, 'web:c')).at(-1)?.event, 'done')
  const names = await readdir(join(data, 'blobs', 'sha256'))
  assert.deepEqual(names.toSorted(), [a.sha256, c.sha256].toSorted())
  assert.equal(await stateOf(client, 'web:b'), undefined, 'the exposure went with the blob')
  await until('stopped for b', () =>
    server.announces.some(({ event, infoHash }) => event === 'stopped' && infoHash === b.metainfo.infoHash),
  )
})

test('a fetch that finds no room waits, says why, and goes on when there is room', async (t) => {
  const server = await startMiniServer(t)
  const [a, b] = [randomBlob(mebibyte), randomBlob(mebibyte)]
  server.publish('web:a', [{ blob: a, title: 'build.tar' }])
  server.publish('web:b', [{ blob: b, title: 'build.tar' }])
  const { client } = await startTestAgent(t, server, await temporaryDirectory(t), {
    disk: { quota: '1.5MiB' },
  })
  await fetchAll(client, 'web:a')
  await client.pin('web:a')
  const fetching = fetchAll(client, 'web:b')
  await until('it waits for room', async () => {
    const { state, reason = '' } = (await stateOf(client, 'web:b')) ?? {}
    return state === 'waiting' && /no room: the disk quota/.test(reason)
  })
  await client.unpin('web:a')
  assert.equal((await fetching).at(-1)?.event, 'done')
})

test(
  'a full disk is waited out, with the reason in status',
  { skip: process.getuid?.() !== 0 && 'needs root, to mount a small disk' },
  async (t) => {
    const server = await startMiniServer(t)
    const blob = randomBlob(3 * mebibyte)
    server.publish('web:1', [{ blob, title: 'build.tar' }])
    const directory = await mkdtemp(join(tmpdir(), 'rackswarm-small-disk-'))
    const disk = join(directory, 'disk')
    await mkdir(disk)
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=5m', 'tmpfs', disk])
    try {
      await writeFile(join(disk, 'someone-elses'), randomBytes(3 * mebibyte))
      const { client, end } = await startTestAgent(t, server, disk, {
        control_socket: join(directory, 'agent.sock'),
      })
      const fetching = fetchAll(client, 'web:1')
      await until('it waits for room', async () => {
        const { state, reason = '' } = (await stateOf(client, 'web:1')) ?? {}
        return state === 'waiting' && /no room: the disk/.test(reason)
      })
      await rm(join(disk, 'someone-elses'))
      assert.equal((await fetching).at(-1)?.event, 'done')
      await end()
    } finally {
      execFileSync('umount', ['--lazy', disk])
      await rm(directory, { recursive: true })
    }
  },
)

test('what waits for room keeps nothing else from being fetched', async (t) => {
  const server = await startMiniServer(t)
  const big = [0, 1, 2, 3].map((i) => `big${i}:latest`)
  for (const reference of big) server.publish(reference, [{ blob: randomBlob(3 * mebibyte) }])
  const small = randomBlob(1000)
  server.publish('small:1', [{ blob: small, title: 'small' }])
  const { client } = await startTestAgent(t, server, await temporaryDirectory(t), {
    follow: big,
    disk: { quota: '2MiB' },
  })
  for (const reference of big)
    await until(`${reference} waits`, async () =>
      /no room/.test((await stateOf(client, reference))?.reason ?? ''),
    )
  const done = (await fetchAll(client, 'small:1')).at(-1)
  assert.ok(done?.event === 'done')
  assert.ok((await readFile(done.files[0]?.path ?? '')).equals(small.bytes))
})

test('a new deploy takes the room of the release before the current one', async (t) => {
  const server = await startMiniServer(t)
  const { client, data } = await startTestAgent(t, server, await temporaryDirectory(t), {
    follow: ['web:latest'],
    disk: { quota: '5MiB' },
  })
  const builds = [1, 2, 3].map(() => randomBlob(2 * mebibyte))
  for (const blob of builds)
    await untilHeld(client, 'web:latest', server.publish('web:latest', [{ blob, title: 'build.tar' }]))
  const release = join(data, 'releases', 'web', 'latest')
  assert.ok(
    (await readFile(join(release, 'current', 'build.tar'))).equals(builds[2]?.bytes ?? Buffer.alloc(0)),
  )
  assert.ok((await client.status()).diskUsedBytes <= 5 * mebibyte)
})

test('a blob whose file has gone is fetched again', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(mebibyte)
  const digest = server.publish('web:latest', [{ blob, title: 'build.tar' }])
  const { client, data } = await startTestAgent(t, server, await temporaryDirectory(t), {
    follow: ['web:latest'],
  })
  await untilHeld(client, 'web:latest', digest)
  const file = join(data, 'blobs', 'sha256', blob.sha256)
  await rm(file)
  await until('the blob is back', async () =>
    stat(file).then(
      () => true,
      () => false,
    ),
  )
  const path = await untilHeld(client, 'web:latest', digest)
  assert.ok((await readFile(join(path, 'build.tar'))).equals(blob.bytes))
})

test('a clock that is set back in the middle of a fetch spoils no report', async (t) => {
  const server = await startMiniServer(t)
  const digest = server.publish('web:latest', [{ blob: randomBlob(mebibyte), title: 'build.tar' }])
  // An hour ahead at boot; NTP sets it right while the first release is fetched.
  const now = () => Date.now() + (server.grants.length > 0 ? 0 : 3_600_000)
  const { client } = await startTestAgent(
    t,
    server,
    await temporaryDirectory(t),
    { follow: ['web:latest'] },
    { now },
  )
  await untilHeld(client, 'web:latest', digest)
  await until('a report that says so', () => server.reports.at(-1)?.held[0]?.state === 'held')
  for (const report of server.reports) assert.ok(HostReport.safeParse(report).success)
})

test('a reference that is not there is an error with the words of the server; one followed is told in status', async (t) => {
  const server = await startMiniServer(t)
  const { client } = await startTestAgent(t, server, await temporaryDirectory(t), { follow: ['web:none'] })
  const last = (await fetchAll(client, 'web:nope')).at(-1)
  assert.deepEqual(last?.event === 'error' ? last.error.code : last, 'MANIFEST_UNKNOWN')
  await until('the reason in status', async () =>
    /no such tag/.test((await stateOf(client, 'web:none'))?.reason ?? ''),
  )
  await assert.rejects(fetchAll(client, 'Not A Name'), /Cannot read name/)
})

test('a server that is not there yet is waited for, and enrolment keeps the credential to itself', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(1000)
  server.publish('web:1', [{ blob, title: 'x' }])
  server.intercept = (_request, response) => {
    response.writeHead(503).end()
    return true
  }
  const { client, agent, data } = await startTestAgent(t, server, await temporaryDirectory(t), {
    follow: ['web:1'],
  })
  assert.equal((await fetch(`${agent.addresses.metricsUrl}/readyz`)).status, 503)
  assert.equal((await fetch(`${agent.addresses.metricsUrl}/livez`)).status, 200)
  server.intercept = () => false
  await untilHeld(client, 'web:1')
  assert.equal((await fetch(`${agent.addresses.metricsUrl}/readyz`)).status, 200)
  assert.equal((await stat(join(data, 'credential.json'))).mode & 0o777, 0o600)
  assert.equal((await stat(agent.addresses.controlSocket)).mode & 0o777, 0o660)
})

test('a second agent on one socket is refused; a socket file left by a dead one is replaced', async (t) => {
  const server = await startMiniServer(t)
  const directory = await temporaryDirectory(t)
  const first = await startTestAgent(t, server, directory)
  await assert.rejects(startTestAgent(t, server, directory), /another agent answers on it/)
  await first.end()
  const { createServer } = await import('node:net')
  // A process that died leaves its socket file; so does one whose file is moved away before it ends.
  const { rename } = await import('node:fs/promises')
  const socket = createServer()
  const path = join(directory, 'agent.sock')
  await new Promise<void>((resolve) => socket.listen(`${path}.live`, resolve))
  await rename(`${path}.live`, path)
  await new Promise((resolve) => socket.close(resolve))
  assert.ok((await stat(path)).isSocket())
  const { client } = await startTestAgent(t, server, directory)
  assert.equal((await client.status()).host, 'a1')
})

test('an agent that ends leaves every swarm, also in the middle of a fetch', async (t) => {
  const server = await startMiniServer(t)
  server.webseed = false
  const [held, slow] = [randomBlob(mebibyte), randomBlob(mebibyte)]
  server.publish('web:held', [{ blob: held, title: 'x' }])
  server.publish('web:slow', [{ blob: slow, title: 'x' }])
  server.webseed = true
  const { client, end } = await startTestAgent(t, server, await temporaryDirectory(t), {
    follow: ['web:slow'],
  })
  await fetchAll(client, 'web:held')
  await untilHeld(client, 'web:slow')
  await until('announces of both', () => new Set(server.announces.map(({ infoHash }) => infoHash)).size === 2)
  await end()
  const stopped = server.announces.filter(({ event }) => event === 'stopped').map(({ infoHash }) => infoHash)
  assert.deepEqual(stopped.toSorted(), [held.metainfo.infoHash, slow.metainfo.infoHash].toSorted())
})

test('what was revoked is not shared by an agent that starts again while the server is away', async (t) => {
  const server = await startMiniServer(t)
  const blob = randomBlob(mebibyte)
  server.publish('web:1', [{ blob }])
  const directory = await temporaryDirectory(t)
  const { client, end } = await startTestAgent(t, server, directory)
  await fetchAll(client, 'web:1')
  const seeds = async (from: typeof client) => (await from.status()).blobs[0]?.seeding
  assert.equal(await seeds(client), true)
  const revokedAt = new Date().toISOString()
  server.intercept = ({ url }, response) => {
    const replies: Record<string, object> = {
      '/api/v1/hosts/self/report': {
        epoch: server.epoch,
        tags: {},
        place: 'rack-1',
        revokedTorrents: 'one.1',
        reportIntervalSeconds: 0.2,
        serverTime: revokedAt,
      },
      '/api/v1/revoked-torrents': {
        version: 'one.1',
        torrents: [{ infohash: blob.metainfo.infoHash, revokedAt }],
      },
    }
    const reply = replies[url ?? '']
    if (!reply) return false
    response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify(reply))
    return true
  }
  await until('it is seeded no more', async () => !(await seeds(client)))
  const saved = join(directory, 'data', 'revoked-torrents.json')
  await until('the list on disk', async () => (await readFile(saved, 'utf8').catch(() => '')) !== '')
  await end()
  server.intercept = (_request, response) => {
    response.destroy()
    return true
  }
  const again = await startTestAgent(t, server, directory)
  assert.equal(await seeds(again.client), false)
})

test('a credential that cannot be read is set aside', async (t) => {
  const server = await startMiniServer(t)
  const directory = await temporaryDirectory(t)
  const first = await startTestAgent(t, server, directory)
  await until('a report', async () => (await first.client.status()).lastReportAt !== undefined)
  await first.end()
  await writeFile(join(directory, 'data', 'credential.json'), randomBytes(10))
  const again = await startTestAgent(t, server, directory)
  await until('a report', async () => (await again.client.status()).lastReportAt !== undefined)
})

test('what an operator does not set is as the documents say', () => {
  const { control_group, engine, peers, peer_port, signatures } = AgentConfig.parse({
    server: 'http://127.0.0.1:6969',
  })
  assert.deepEqual(
    { control_group, engine, peers, peer_port, policy: signatures.policy, keys: signatures.keys },
    {
      control_group: 'rackswarm',
      engine: 'rackswarm',
      peers: 'approved',
      peer_port: 6881,
      policy: 'require',
      keys: [],
    },
  )
})

test('plaintext to another machine needs the word of the operator', async (t) => {
  const server = await startMiniServer(t)
  const directory = await temporaryDirectory(t)
  await assert.rejects(
    startTestAgent(t, { ...server, url: 'http://registry.example:6969' }, directory),
    /insecure_plaintext/,
  )
})
