import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { Ip } from '../../../lib/protocol/address.ts'
import { parseIp } from '../../../lib/protocol/address.ts'
import type { Bencoded } from '../../../lib/protocol/bencode.ts'
import { decode } from '../../../lib/protocol/bencode.ts'
import { parseCidr } from '../../../lib/protocol/cidr.ts'
import { parsePlace } from '../../../lib/protocol/place.ts'
import { silentLog } from '../../../lib/runtime/log.ts'
import type { PreHook } from '../../../server/tracker/hooks.ts'
import { createMemoryPeerStore } from '../../../server/tracker/memory/memory-peer-store.ts'
import { createTopology } from '../../../server/tracker/topology.ts'
import { createTracker } from '../../../server/tracker/tracker.ts'

const hash = 'aa'.repeat(20)

function start({
  hooks = [],
  trusted = [],
}: { hooks?: readonly PreHook[]; trusted?: readonly string[] } = {}) {
  const clock = { now: 1_000_000 }
  const outcomes: string[] = []
  const topology = createTopology({
    levels: ['rack', 'row'],
    places: {
      'rack-1': { parents: ['row-1'] },
      'rack-2': { parents: ['row-1'] },
      'rack-3': { parents: ['row-2'] },
    },
    prefixes: [
      { cidr: parseCidr('10.1.0.0/16'), place: parsePlace('rack-1') },
      { cidr: parseCidr('10.2.0.0/16'), place: parsePlace('rack-2') },
      { cidr: parseCidr('10.3.0.0/16'), place: parsePlace('rack-3') },
      { cidr: parseCidr('fd00::/16'), place: parsePlace('rack-1') },
    ],
    ipv4PrefixLength: 24,
    ipv6PrefixLength: 64,
  })
  const now = () => clock.now
  const tracker = createTracker({
    store: createMemoryPeerStore({
      peersMax: 10_000,
      swarmsMax: 100,
      levels: topology.levels,
      sampleMax: 100,
      random: Math.random,
      now,
    }),
    rules: {
      topology,
      hooks,
      config: {
        announceIntervalMs: 1_800_000,
        minAnnounceIntervalMs: 10_000,
        numwantDefault: 50,
        numwantMax: 100,
        scrapeMax: 3,
        gatewaysPerRack: 3,
        reservePeers: 2,
        trustedAnnouncers: trusted.map(parseCidr),
        fullScrapeNetworks: [parseCidr('10.250.0.0/16')],
      },
    },
    after: undefined,
    epoch: 'epoch-1',
    now,
    observer: {
      handled: (frontend, action, family, outcome) =>
        outcomes.push(`${frontend} ${action} ${family} ${outcome}`),
      refused: () => undefined,
    },
    log: silentLog(),
  })
  const announce = async (source: string, options: Record<string, string | number> = {}) => {
    const values = {
      port: 6881,
      uploaded: 0,
      downloaded: 0,
      left: 1,
      peer_id: `-RS0001-${source.padEnd(12, '.').slice(-12)}`,
      ...options,
    }
    const query = Object.entries(values).map(([key, value]) => `${key}=${encodeURIComponent(value)}`)
    return read(await tracker.announce(`info_hash=${escaped(hash)}&${query.join('&')}`, ip(source)))
  }
  return { tracker, announce, clock, outcomes }
}

test('the announcer is counted in its own reply, and is not among its peers', async () => {
  const { announce } = start()
  const reply = await announce('10.1.0.1', { left: 0, event: 'started' })
  assert.deepEqual([reply['complete'], reply['incomplete'], reply['downloaded']], [1, 0, 0])
  assert.deepEqual(text(reply['peers']), '', '`peers` is always there')
  assert.ok(!('rackswarm' in reply), 'a client that did not ask gets a standard reply')
})

test('the keys of a reply are sorted and stand as BEP 3, 7, 23 and 24 have them', async () => {
  const { announce, tracker } = start()
  await announce('10.1.0.1', { left: 0 })
  await announce('fd00::1', { left: 0 })
  const raw = Buffer.from(await tracker.announce(query('10.1.0.9'), ip('10.1.0.9'))).toString('latin1')
  const keys = [
    'complete',
    'downloaded',
    'external ip',
    'incomplete',
    'interval',
    'min interval',
    'peers',
    'peers6',
  ]
  const places = keys.map((key) => raw.indexOf(`${key.length}:${key}`))
  assert.deepEqual(
    places,
    places.toSorted((a, b) => a - b),
  )
  assert.ok(
    places.every((place) => place > 0),
    raw,
  )
  const reply = await announce('10.1.0.9')
  assert.equal(text(reply['peers']), Buffer.from([10, 1, 0, 1, 0x1a, 0xe1]).toString('latin1'))
  assert.equal((reply['peers6'] as Uint8Array).length, 18)
  assert.deepEqual([...(reply['external ip'] as Uint8Array)], [10, 1, 0, 9])
})

test('compact=0 gets a list of dictionaries with peer ids', async () => {
  const { announce } = start()
  await announce('10.1.0.1', { left: 0, peer_id: '-RS0001-seeder-seed1' })
  const reply = await announce('10.1.0.2', { compact: 0 })
  const [peer] = reply['peers'] as { ip: Uint8Array; port: number; 'peer id': Uint8Array }[]
  assert.deepEqual(
    [text(peer?.ip), peer?.port, text(peer?.['peer id'])],
    ['10.1.0.1', 6881, '-RS0001-seeder-seed1'],
  )
})

test('numwant: absent 50, 0 none, at most 100; a peer that stops gets none', async () => {
  const { announce } = start()
  for (let i = 0; i < 150; i++) await announce(`10.1.1.${i}`, { left: i % 2 })
  const count = async (options: Record<string, string | number>) =>
    ((await announce('10.1.0.1', options))['peers'] as Uint8Array).length / 6
  assert.equal(await count({}), 50)
  assert.equal(await count({ numwant: 0 }), 0)
  assert.equal(await count({ numwant: 7 }), 7)
  assert.equal(await count({ numwant: 100_000 }), 100)
  assert.equal(await count({ event: 'stopped' }), 0)
})

test('stopped leaves, completed counts once, a new peer_id at an address replaces the old peer', async () => {
  const { announce } = start()
  const counts = async (options: Record<string, string | number>) => {
    const { complete, incomplete, downloaded } = await announce('10.1.0.1', options)
    return [complete, incomplete, downloaded]
  }
  assert.deepEqual(await counts({ event: 'started' }), [0, 1, 0])
  assert.deepEqual(await counts({ event: 'completed', left: 0 }), [1, 0, 1])
  assert.deepEqual(await counts({ event: 'completed', left: 0 }), [1, 0, 1])
  assert.deepEqual(await counts({ left: 0, peer_id: '-RS0001-another-one.' }), [1, 0, 1])
  assert.deepEqual(await counts({ event: 'stopped', left: 0 }), [0, 0, 1])
  assert.deepEqual(
    await counts({ event: 'paused', left: 5 }),
    [0, 1, 1],
    'BEP 21: a partial seed has something left',
  )
})

test('a peer that is not heard of again is forgotten', async () => {
  const { announce, clock } = start()
  const { interval } = await announce('10.1.0.1', { left: 0 })
  clock.now += Number(interval) * 2000
  assert.equal((await announce('10.1.0.2'))['complete'], 1)
  clock.now += Number(interval) * 1000
  assert.equal((await announce('10.1.0.2'))['complete'], 0)
})

test('our agents are told distances, epoch and gateway; nearest come first', async () => {
  const { announce } = start()
  for (const source of ['10.3.0.1', '10.2.0.1', '10.1.0.1', '192.168.7.1'])
    await announce(source, { left: 0 })
  const reply = await announce('10.1.0.9', { rackswarm: 1 })
  const hints = reply['rackswarm'] as { d: Uint8Array; epoch: Uint8Array; v: number }
  assert.deepEqual([hints.v, text(hints.epoch)], [1, 'epoch-1'])
  assert.deepEqual([...hints.d].slice(0, 3), [0, 1, 2])
  assert.equal(hints.d.length, (reply['peers'] as Uint8Array).length / 6)
})

test('ip= counts from trusted networks alone, and 0.0.0.0 means the source', async () => {
  const { announce } = start({ trusted: ['10.9.0.0/16'] })
  const seen = async (source: string, claimed: string) => [
    ...((await announce(source, { ip: claimed }))['external ip'] as Uint8Array),
  ]
  assert.deepEqual(await seen('10.1.0.1', '10.2.0.2'), [10, 1, 0, 1])
  assert.deepEqual(await seen('10.9.0.1', '10.2.0.2'), [10, 2, 0, 2])
  assert.deepEqual(await seen('10.9.0.1', '0.0.0.0'), [10, 9, 0, 1])
  assert.equal(
    text((await announce('10.9.0.1', { ip: 'here' }))['failure reason']),
    'failed to parse peer IP address',
  )
})

test('each malformed announce and scrape gets the words that chihaya has for it', async () => {
  const { tracker, outcomes } = start()
  const good = query('10.1.0.1')
  const without = (key: string) => good.replace(new RegExp(`&${key}=[^&]*`), '')
  const cases: readonly (readonly [string, string])[] = [
    ['', 'no info_hash parameter supplied'],
    [good.replace(/info_hash=[^&]*&/, ''), 'no info_hash parameter supplied'],
    [good.replace(/info_hash=[^&]*/, 'info_hash=short'), 'provided invalid infohash'],
    [`${good}&info_hash=${escaped(hash)}`, 'multiple info_hash parameters supplied'],
    [without('peer_id'), 'failed to parse parameter: peer_id'],
    [good.replace(/peer_id=[^&]*/, 'peer_id=short'), 'failed to provide valid peer_id'],
    [without('port'), 'failed to parse parameter: port'],
    [good.replace('port=6881', 'port=0'), 'invalid port'],
    [good.replace('port=6881', 'port=65536'), 'failed to parse parameter: port'],
    [good.replace('left=1', 'left=-1'), 'failed to parse parameter: left'],
    [good.replace('left=1', 'left=0x10'), 'failed to parse parameter: left'],
    [good.replace('left=1', `left=${'9'.repeat(30)}`), 'failed to parse parameter: left'],
    [without('uploaded'), 'failed to parse parameter: uploaded'],
    [without('downloaded'), 'failed to parse parameter: downloaded'],
    [`${good}&numwant=many`, 'failed to parse parameter: numwant'],
  ]
  for (const [raw, reason] of cases) {
    const reply = read(await tracker.announce(raw, ip('10.1.0.1')))
    assert.equal(text(reply['failure reason']), reason, raw)
    assert.deepEqual(Object.keys(reply), ['failure reason'])
  }
  assert.deepEqual(new Set(outcomes), new Set(['http announce 4 refused']))
  assert.equal(tracker.totals().leechers, 0, 'none of them is in a swarm')
})

test('a scrape tells each hash it was asked for, within its limit', async () => {
  const { announce, tracker } = start()
  await announce('10.1.0.1', { left: 0 })
  const scrape = async (...hashes: string[]) =>
    read(await tracker.scrape(hashes.map((hex) => `info_hash=${escaped(hex)}`).join('&'), ip('10.1.0.1')))
  const files = (await scrape(hash, 'bb'.repeat(20)))['files'] as Record<string, unknown>
  assert.deepEqual(files[Buffer.from(hash, 'hex').toString('latin1')], {
    complete: 1,
    downloaded: 0,
    incomplete: 0,
  })
  assert.match(text((await scrape(...Array.from({ length: 4 }, () => hash)))['failure reason']), /at most 3/)
  assert.ok('failure reason' in (await scrape()))
})

test('a hook that fails by itself is an internal error for the client, and the next request is answered', async () => {
  let fail = true
  const { announce } = start({
    hooks: [
      {
        name: 'broken',
        announce: async () => {
          await Promise.resolve()
          if (fail) throw new Error('the database is gone')
        },
      },
    ],
  })
  assert.equal(text((await announce('10.1.0.1'))['failure reason']), 'internal server error')
  fail = false
  assert.equal((await announce('10.1.0.1'))['incomplete'], 1)
})

function query(source: string): string {
  return `info_hash=${escaped(hash)}&peer_id=-RS0001-${source.padEnd(12, '.').slice(-12)}&port=6881&uploaded=0&downloaded=0&left=1`
}

function escaped(hex: string): string {
  return hex.replace(/../g, '%$&')
}

function ip(text: string): Ip {
  const parsed = parseIp(text)
  assert.ok(parsed)
  return parsed
}

function text(value: unknown): string {
  assert.ok(value instanceof Uint8Array, String(value))
  return Buffer.from(value).toString('latin1')
}

/** A reply with its dictionaries as plain objects. */
function read(bytes: Uint8Array): Record<string, unknown> {
  const plain = (value: Bencoded): unknown => {
    if (value instanceof Map)
      return Object.fromEntries([...value].map(([key, member]) => [key, plain(member)]))
    return Array.isArray(value) ? value.map(plain) : value
  }
  return plain(decode(bytes)) as Record<string, unknown>
}
