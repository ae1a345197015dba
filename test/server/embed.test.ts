import assert from 'node:assert/strict'
import { access, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { join } from 'node:path'
import { test } from 'node:test'
import type { TestContext } from 'node:test'
import { parseAnnounceReply } from '../../lib/protocol/announce.ts'
import { udpActions } from '../../lib/protocol/udp.ts'
import { createUdpTracker } from '../../lib/client/udp-tracker.ts'
import type {
  AnnounceRecord,
  EmbedDeps,
  EmbeddedSettings,
  EmbeddedTracker,
  HookDeps,
  Logger,
  PeerStore,
  PostHook,
  PreHook,
  StoreDeps,
} from '../../server/embed.ts'
import {
  ClientError,
  ConfigError,
  endpointIp,
  formatEndpoint,
  formatIp,
  infoHashToHex,
  startTracker,
} from '../../server/embed.ts'
import { createMemoryPeerStore } from '../../server/tracker/memory/memory-peer-store.ts'
import { createAuthority } from '../support/certificates.ts'
import { keys, makeTestKey, startKeyServer } from '../support/key-server.ts'
import {
  announceFields,
  announceQuery,
  bencoded,
  failure,
  first,
  httpGet,
  temporaryDirectory,
  testHash,
  udpProbe,
} from '../support/tracker.ts'
import { until } from '../support/until.ts'

/** An open tracker on free ports. */
const open = {
  http: { addr: '127.0.0.1:0' },
  udp: { addr: '127.0.0.1:0' },
  tracker: { approval: 'none' },
} as const satisfies EmbeddedSettings

async function embed(
  t: TestContext,
  settings: EmbeddedSettings = {},
  deps: EmbedDeps = {},
): Promise<EmbeddedTracker> {
  const tracker = await startTracker({ ...open, ...settings }, deps)
  t.after(() => tracker.close())
  return tracker
}

const announce = async ({ addresses }: EmbeddedTracker, query: string, from?: string) =>
  (await httpGet(first(addresses.http), `/announce?${query}`, from === undefined ? {} : { from })).body

/** The addresses of the peers in a reply. */
const hostsOf = (reply: string | Uint8Array) =>
  parseAnnounceReply(typeof reply === 'string' ? Buffer.from(reply, 'latin1') : reply).peers.map(
    ({ endpoint }) => formatIp(endpointIp(endpoint)),
  )

/** Runs a function that makes a part, and tells whether the part was disposed. */
function watched<Part extends object>(
  part: Part,
): { part: Part & AsyncDisposable; isDisposed: () => boolean } {
  let disposed = false
  return {
    part: {
      ...part,
      [Symbol.asyncDispose]: async () => {
        disposed = true
        await Promise.resolve()
      },
    },
    isDisposed: () => disposed,
  }
}

test('an embedded tracker answers over HTTP and UDP, on the ports it says, and in the process', async (t) => {
  const tracker = await embed(t)
  const [http, udp] = [first(tracker.addresses.http), first(tracker.addresses.udp)]
  assert.ok(http.port > 0 && udp.port > 0)
  assert.equal(tracker.addresses.metricsUrl, undefined)
  await announce(tracker, announceQuery({ left: 0 }), '127.0.0.1')
  await using client = createUdpTracker({
    url: `udp://${udp.host}:${udp.port}`,
    localAddress: '127.0.0.2',
  })
  assert.deepEqual(
    (await client.announce(announceFields())).peers.map((peer) => formatEndpoint(peer.endpoint)),
    ['127.0.0.1:6881'],
  )
  const query = announceQuery()
  assert.deepEqual(hostsOf(await tracker.announce(query, 'fd00::1')).sort(), ['127.0.0.1', '127.0.0.2'])
  assert.deepEqual(
    hostsOf(await tracker.announce(query, { family: 4, bytes: Uint8Array.of(10, 0, 0, 1) })).length,
    3,
  )
  const infoHash = infoHashToHex(testHash(0xaa))
  assert.deepEqual(await tracker.counts(infoHash), { complete: 1, incomplete: 3, downloaded: 0 })
  assert.deepEqual(await tracker.counts('0'.repeat(40)), { complete: 0, incomplete: 0, downloaded: 0 })
  await assert.rejects(tracker.counts('abc'), ClientError)
  const { seeders, leechers, swarms } = tracker.totals()
  assert.deepEqual({ seeders, leechers, swarms }, { seeders: 1, leechers: 3, swarms: 1 })
  const scraped = Buffer.from(await tracker.scrape(query, '10.0.0.1')).toString('latin1')
  assert.match(scraped, /8:completei1e10:downloadedi0e10:incompletei3e/)
  const faulty = await tracker.announce('info_hash=short', '10.0.0.1')
  assert.equal(Buffer.from(faulty).toString('latin1'), failure('provided invalid infohash'))
  await assert.rejects(tracker.announce(query, 'localhost'), { code: 'bad_address' })
})

test('a reply that was given out stays as it is, whatever is announced after it', async (t) => {
  const tracker = await embed(t)
  await tracker.announce(announceQuery(), '10.0.0.1')
  const reply = await tracker.announce(announceQuery(), '10.0.0.2')
  await tracker.announce(announceQuery(), '10.0.0.3')
  assert.deepEqual(hostsOf(reply), ['10.0.0.1'])
})

test('all that is wrong with the settings is said at once', async () => {
  const store = createMemoryPeerStore({
    peersMax: 10,
    swarmsMax: 10,
    levels: 1,
    sampleMax: 10,
    random: Math.random,
    now: () => 0,
  })
  const wrong = {
    http: { addr: 'nowhere' },
    announce_interval: '5 minutes',
    surprise: true,
    roles: ['registry'],
    log_level: 'info',
    workers: 2,
    storage: { name: 'memory' },
  } as unknown as EmbeddedSettings
  const faultsOf = async (settings: EmbeddedSettings, deps: EmbedDeps = {}) => {
    const error = await startTracker(settings, deps).then(
      () => assert.fail('it started'),
      (reason: unknown) => reason,
    )
    assert.ok(error instanceof ConfigError, String(error))
    for (const fault of error.faults) assert.ok(error.message.includes(fault))
    return error.faults.map((fault) => fault.slice(0, fault.indexOf(': '))).sort()
  }
  assert.deepEqual(await faultsOf(wrong, { store, hooks: [{} as PreHook] }), [
    'announce_interval',
    'deps.hooks.0',
    'http.addr',
    'log_level',
    'roles',
    'storage',
    'surprise',
    'workers',
  ])
  // What only settings together can get wrong, and what needs a place on the disk.
  assert.deepEqual(
    await faultsOf({
      http: { addr: '0.0.0.0:0' },
      min_announce_interval: '1h',
      prehooks: [{ name: 'unheard-of' }],
      storage: { config: { snapshot: true } },
    }),
    ['http.addr', 'min_announce_interval', 'prehooks.0.name', 'storage.config.snapshot', 'tokens.keys_file'],
  )
  assert.deepEqual(await faultsOf({ ...open, storage: { config: { peers_max: 0 } } }), [
    'storage.config.peers_max',
  ])
  assert.deepEqual(await faultsOf(7 as unknown as EmbeddedSettings), ['settings'])
  assert.deepEqual(await faultsOf({ http: open.http }), ['tokens.keys_file'])
})

test('a whole server.yaml of a tracker may say its role', async (t) => {
  const settings = { roles: ['tracker'] } as unknown as EmbeddedSettings
  assert.ok(first((await embed(t, settings)).addresses.http).port > 0)
})

test('two trackers in a process share nothing, and the process notices neither', async (t) => {
  const signals = () => process.eventNames().map((name) => [name, process.listenerCount(name)])
  const before = signals()
  process.env['RACKSWARM_UDP_PRIVATE_KEY'] = 'known to everyone who reads the environment'
  t.after(() => delete process.env['RACKSWARM_UDP_PRIVATE_KEY'])
  const [one, other] = [await embed(t), await embed(t)]
  assert.notEqual(first(one.addresses.http).port, first(other.addresses.http).port)
  await announce(one, announceQuery())
  assert.equal(one.totals().leechers, 1)
  assert.equal(other.totals().leechers, 0)
  assert.match(await one.metrics(), /^rackswarm_tracker_leechers 1$/m)
  assert.match(await other.metrics(), /^rackswarm_tracker_leechers 0$/m)
  assert.doesNotMatch(await one.metrics(), /process_cpu/, 'metrics of the process are the program’s own')
  // A connection id of the one is none of the other.
  const scrape = (connectionId: Uint8Array) =>
    Buffer.concat([
      connectionId,
      Buffer.from([0, 0, 0, udpActions.scrape, 0, 0, 0, 7]),
      Buffer.alloc(20, 0xaa),
    ])
  const [toOne, toOther] = [
    await udpProbe(t, first(one.addresses.udp)),
    await udpProbe(t, first(other.addresses.udp)),
  ]
  const connectionId = await toOne.connectionId()
  assert.equal((await toOne.replies(scrape(connectionId)))[0]?.readUInt32BE(0), udpActions.scrape)
  assert.notEqual((await toOther.replies(scrape(connectionId)))[0]?.readUInt32BE(0), udpActions.scrape)
  await one.close()
  assert.equal(other.totals().leechers, 0)
  assert.equal(
    parseAnnounceReply(Buffer.from(await announce(other, announceQuery()), 'latin1')).incomplete,
    1,
  )
  assert.deepEqual(signals(), before)
  assert.equal(process.exitCode, undefined)
})

test('hooks that are objects run after the named ones, refuse, shape the list, and stay the caller’s', async (t) => {
  const order: string[] = []
  const hook = watched<PreHook>({
    name: 'objecting',
    announce: (request) => {
      order.push('object')
      if (request.announce.port === 1) throw new ClientError('no_port', 'not this port')
      if (request.announce.port === 2) throw new Error('our own fault')
    },
    scrape: () => {
      throw new ClientError('no_scrape', 'no scrapes today')
    },
    peers: (_request, peers) => peers.filter(({ endpoint }) => formatIp(endpointIp(endpoint)) !== '10.0.0.1'),
  })
  const records: AnnounceRecord[] = []
  const postHook = watched<PostHook>({ name: 'told', announced: (record) => void records.push(record) })
  const directory = await temporaryDirectory(t)
  await writeFile(
    join(directory, 'named.mjs'),
    `export default (options) => ({ name: 'named', announce: () => { globalThis[options.call]() } })`,
  )
  const call = 'namedHookOfEmbedTest'
  Reflect.set(globalThis, call, () => order.push('named'))
  t.after(() => Reflect.deleteProperty(globalThis, call))
  const tracker = await embed(
    t,
    { prehooks: [{ name: './named.mjs', options: { call } }] },
    { hooks: [hook.part], postHooks: [postHook.part], directory },
  )
  await tracker.announce(announceQuery(), '10.0.0.1')
  await tracker.announce(announceQuery({ event: 'completed', left: 0 }), '10.0.0.2')
  assert.deepEqual(order, ['named', 'object', 'named', 'object'])
  assert.deepEqual(hostsOf(await announce(tracker, announceQuery())), ['10.0.0.2'])
  assert.equal(await announce(tracker, announceQuery({ port: 1 })), failure('not this port'))
  assert.equal(await announce(tracker, announceQuery({ port: 2 })), failure('internal server error'))
  const scraped = Buffer.from(await tracker.scrape(announceQuery(), '10.0.0.1')).toString('latin1')
  assert.equal(scraped, failure('no scrapes today'))
  // A reload makes the named hooks anew; objects go on.
  await tracker.reload(open)
  order.length = 0
  await tracker.announce(announceQuery(), '10.0.0.1')
  assert.deepEqual(order, ['object'])
  await tracker.close()
  assert.deepEqual(
    records.map(({ endpoint, announce: { event } }) => [formatEndpoint(endpoint), event]),
    [
      ['10.0.0.1:6881', undefined],
      ['10.0.0.2:6881', 'completed'],
      ['127.0.0.1:6881', undefined],
      ['10.0.0.1:6881', undefined],
    ],
  )
  assert.deepEqual([hook.isDisposed(), postHook.isDisposed()], [false, false])
})

test('what functions make is told of the log and the clocks, and ends with the tracker, after what was queued', async (t) => {
  const lines: unknown[] = []
  const line = (fields: object | string, message?: string) => lines.push([fields, message])
  const log: Logger = {
    level: 'info',
    isLevelEnabled: () => true,
    trace: line,
    debug: line,
    info: line,
    warn: line,
    error: line,
    fatal: line,
  }
  const told: unknown[] = []
  const hook = watched<PreHook>({ name: 'made' })
  const slow = Promise.withResolvers<undefined>()
  const postHook = watched<PostHook>({
    name: 'slow',
    announced: async ({ announce: { port } }) => {
      await slow.promise
      told.push([port, postHook.isDisposed()])
    },
  })
  const tracker = await embed(
    t,
    {},
    {
      log,
      hooks: [
        async ({ log: given, now, random }: HookDeps) => {
          assert.equal(given, log)
          assert.ok(Math.abs(now() - Date.now()) < 10_000)
          assert.ok(random() >= 0 && random() < 1)
          given.info({ hook: 'made' }, 'made')
          return Promise.resolve(hook.part)
        },
      ],
      postHooks: [() => postHook.part],
    },
  )
  assert.deepEqual(lines.at(0), [{ hook: 'made' }, 'made'])
  for (const port of [1, 2, 3]) await tracker.announce(announceQuery({ port }), '10.0.0.1')
  const closed = tracker.close()
  slow.resolve(undefined)
  await closed
  assert.deepEqual(told, [
    [1, false],
    [2, false],
    [3, false],
  ])
  assert.deepEqual([hook.isDisposed(), postHook.isDisposed()], [true, true])
})

test('where a hook cannot be made, those made before end and nothing listens', async (t) => {
  const hook = watched<PreHook>({ name: 'made' })
  const port = await freePort(t)
  const settings = { ...open, http: { addr: `127.0.0.1:${port}` } }
  await assert.rejects(
    startTracker(settings, {
      hooks: [
        () => hook.part,
        () => {
          throw new Error('no such list')
        },
      ],
    }),
    /no such list/,
  )
  assert.ok(hook.isDisposed())
  await using tracker = await startTracker(settings)
  assert.equal(first(tracker.addresses.http).port, port)
})

test('a store is an object of the caller’s, or is opened and ended by the tracker', async (t) => {
  const options = { peersMax: 2, swarmsMax: 10, sampleMax: 10, random: Math.random, now: () => 0 }
  const own = watched<PeerStore>(createMemoryPeerStore({ ...options, levels: 1 }))
  const one = await embed(t, {}, { store: own.part })
  for (const host of ['10.0.0.1', '10.0.0.2', '10.0.0.3']) await one.announce(announceQuery(), host)
  assert.deepEqual(one.totals(), own.part.totals())
  assert.deepEqual({ ...own.part.totals() }, { swarms: 1, seeders: 0, leechers: 2, refused: 1 })
  await one.close()
  assert.equal(own.isDisposed(), false)

  const opened: StoreDeps[] = []
  const made = watched<PeerStore>(createMemoryPeerStore({ ...options, levels: 3 }))
  const other = await embed(
    t,
    { topology: { levels: ['rack', 'row', 'hall'] } },
    {
      store: (deps) => {
        opened.push(deps)
        return made.part
      },
    },
  )
  await other.announce(announceQuery(), '10.0.0.1')
  assert.equal(made.part.totals().leechers, 1)
  assert.deepEqual(
    opened.map(({ levels, sampleMax }) => ({ levels, sampleMax })),
    [{ levels: 3, sampleMax: 1000 }],
  )
  await other.close()
  assert.ok(made.isDisposed())
})

test('a reload puts other settings in force, or leaves those that were', async (t) => {
  const tracker = await embed(t)
  const intervals = async () => {
    const { intervalSeconds, minIntervalSeconds } = parseAnnounceReply(
      await tracker.announce(announceQuery({ left: 0 }), '10.0.0.1'),
    )
    return [intervalSeconds, minIntervalSeconds]
  }
  const [, before] = await intervals()
  assert.equal(before, 5)
  assert.deepEqual(await tracker.reload({ ...open, min_announce_interval: '77s' }), [])
  assert.equal((await intervals())[1], 77)
  await assert.rejects(tracker.reload({ ...open, min_announce_interval: '77' }), ConfigError)
  await assert.rejects(
    tracker.reload({ ...open, prehooks: [{ name: './is-not-there.js' }] }),
    /is-not-there\.js/,
  )
  assert.equal((await intervals())[1], 77)
  assert.deepEqual(await tracker.reload({ ...open, storage: { config: { peers_max: 7 } } }), [
    'storage.config.peers_max',
  ])
  assert.equal((await tracker.counts(infoHashToHex(testHash(0xaa)))).complete, 1, 'no swarm is lost')
})

test('swarms last over a restart where there is a data directory, and without one nothing is kept', async (t) => {
  const directory = join(await temporaryDirectory(t), 'data')
  const settings = { ...open, data_dir: directory }
  const restarted = async (with_: EmbeddedSettings) => {
    await using first = await startTracker(with_)
    await first.announce(announceQuery(), '10.0.0.1')
    await first.close()
    await using second = await startTracker(with_)
    return second.totals().leechers
  }
  assert.equal(await restarted(open), 0)
  await assert.rejects(access(directory))
  assert.equal(await restarted(settings), 1)
  assert.equal(await restarted({ ...settings, storage: { config: { snapshot: false } } }), 0)
})

test('the health port is there where it is asked for', async (t) => {
  const tracker = await embed(t, { metrics_addr: '127.0.0.1:0' })
  await tracker.announce(announceQuery(), '10.0.0.1')
  const scraped = await (await fetch(`${tracker.addresses.metricsUrl ?? ''}/metrics`)).text()
  assert.match(scraped, /^rackswarm_tracker_leechers 1$/m)
})

test('keys come from a URL whose authority is the caller’s own, and from nowhere else', async (t) => {
  const directory = await temporaryDirectory(t)
  const authority = createAuthority('keys')
  const keysCa = join(directory, 'authority.pem')
  await writeFile(keysCa, authority.cert)
  const { cert, key } = authority.issue('keys.example')
  const server = await startKeyServer(t, keys(makeTestKey('first')), {
    tls: { cert: cert.toString(), key: key.toString() },
  })
  const settings: EmbeddedSettings = {
    tracker: { approval: 'token' },
    public_url: 'https://tracker.example',
    tokens: { keys_url: server.url },
  }
  const keysOf = async (tracker: EmbeddedTracker) =>
    /^rackswarm_jwks_keys (\d+)$/m.exec(await tracker.metrics())?.[1]
  const stranger = await embed(t, settings)
  const tracker = await embed(t, { ...settings, tokens: { ...settings.tokens, keys_ca: keysCa } })
  await until('the keys came', async () => (await keysOf(tracker)) === '1')
  assert.equal(await keysOf(stranger), '0')
  const unapproved = Buffer.from(await tracker.announce(announceQuery(), '10.0.0.1')).toString('latin1')
  assert.equal(unapproved, failure('unapproved request: missing jwt'))
  const missing = join(directory, 'missing.pem')
  await assert.rejects(
    startTracker({ ...open, ...settings, tokens: { ...settings.tokens, keys_ca: missing } }),
    (error: unknown) => error instanceof ConfigError && error.message.includes(`cannot read ${missing}`),
  )
})

test('a tracker can be ended more than once; each waits for the end, and its ports are free', async (t) => {
  const tracker = await embed(t)
  const [http, udp] = [first(tracker.addresses.http), first(tracker.addresses.udp)]
  await Promise.all([tracker.close(), tracker[Symbol.asyncDispose]()])
  await tracker.close()
  const socket = connect(http)
  const refused = await new Promise<NodeJS.ErrnoException>((resolve, reject) => {
    socket.once('error', resolve).once('connect', () => {
      reject(new Error('it still listens'))
    })
  })
  assert.equal(refused.code, 'ECONNREFUSED')
  await using again = await startTracker({
    ...open,
    http: { addr: `${http.host}:${http.port}` },
    udp: { addr: `${udp.host}:${udp.port}` },
  })
  assert.deepEqual([first(again.addresses.http), first(again.addresses.udp)], [http, udp])
})

test('further threads answer on the same ports, from the same swarms', async (t) => {
  const tracker = await embed(t, { workers: 2 })
  const hosts = Array.from({ length: 40 }, (_, i) => `127.0.1.${i + 1}`)
  await Promise.all(hosts.map((host) => announce(tracker, announceQuery(), host)))
  await until('all hosts are there', () => tracker.totals().leechers === hosts.length)
  assert.ok(bencoded(await announce(tracker, announceQuery())).has('peers'))
})

async function freePort(t: TestContext): Promise<number> {
  const tracker = await embed(t)
  const { port } = first(tracker.addresses.http)
  await tracker.close()
  return port
}
