import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { mkdir, mkdtemp, readFile, readdir, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { crc32 } from 'node:zlib'
import fc from 'fast-check'
import type { Family } from '../../../lib/protocol/address.ts'
import { infoHashFromBytes } from '../../../lib/protocol/infohash.ts'
import { parsePlace } from '../../../lib/protocol/place.ts'
import { silentLog } from '../../../lib/runtime/log.ts'
import type { MemoryPeerStore } from '../../../server/tracker/memory/memory-peer-store.ts'
import { createMemoryPeerStore } from '../../../server/tracker/memory/memory-peer-store.ts'
import { loadSnapshot, saveSnapshot } from '../../../server/tracker/memory/snapshot.ts'
import { startSnapshots } from '../../../server/tracker/memory/snapshots.ts'
import type { StoreAnnounce, SwarmView } from '../../../server/tracker/peer-store.ts'
import { createTopology } from '../../../server/tracker/topology.ts'
import { fuzzRuns } from '../../support/fuzz.ts'

const savedAtMs = 1_700_000_000_000

test('thousands of peers of both families come back with every field, and their swarms with their counts', async (t) => {
  const directory = await temporaryDirectory(t)
  const file = join(directory, 'swarms.snapshot')
  await using before = openStore()
  populate(before, { peers: 6000, swarms: 300 })
  const saved = await saveSnapshot(before, file, savedAtMs)
  const { seeders, leechers } = before.totals()
  assert.equal(saved.peers, seeders + leechers)
  assert.equal((await stat(file)).size, saved.bytes)
  assert.equal((await stat(file)).mode & 0o777, 0o600)
  assert.deepEqual(await readdir(directory), ['swarms.snapshot'])

  // Another process has another clock and another seed.
  await using after = openStore({ nowMs: 77_000 })
  const loaded = await loadSnapshot(after, file, { topology, nowMs: savedAtMs })
  assert.deepEqual(loaded, { peers: saved.peers, ageMs: 0, fault: undefined })
  assert.deepEqual(after.totals(), { ...before.totals(), refused: 0 })
  const [was, is] = [peersIn(before), peersIn(after)]
  assert.equal(was.size, saved.peers)
  for (const [peer, { lifeSeconds, ...fields }] of was) {
    const { lifeSeconds: lifeNow, ...fieldsNow } = is.get(peer) ?? assert.fail(`${peer} is lost`)
    assert.deepEqual(fieldsNow, fields)
    assert.ok(Math.abs(lifeNow - lifeSeconds) <= 1, `${lifeNow} s instead of ${lifeSeconds}`)
  }
  const counts = await countsIn(before)
  assert.deepEqual(await countsIn(after), counts)
  assert.ok([...counts.values()].some(({ complete, incomplete }) => complete + incomplete === 0))
  // A newcomer finds the same peers at the same distances.
  for (let swarm = 0; swarm < 300; swarm += 7)
    for (const place of ['a1', 'b1', 'nowhere'])
      assert.deepEqual(viewOf(after, swarm, place), viewOf(before, swarm, place))
})

test('lives go on while the tracker is gone; whoever is due gets two minutes to come back, after an hour nobody', async (t) => {
  const file = join(await temporaryDirectory(t), 'swarms.snapshot')
  await using before = openStore()
  for (const [port, lifeMs] of [
    [1, 100_000],
    [2, 1_000_000],
    [3, 5_000_000],
  ] as const)
    before.announce(announceOf({ swarm: 1, port, lifeMs }))
  before.announce(announceOf({ swarm: 1, port: 1, left: 0, event: 'completed', lifeMs: 100_000 }))
  await saveSnapshot(before, file, savedAtMs)
  const livesAfter = async (ageMs: number) => {
    await using store = openStore()
    const loaded = await loadSnapshot(store, file, { topology, nowMs: savedAtMs + ageMs })
    assert.equal(loaded?.fault, undefined)
    assert.equal(loaded?.ageMs, Math.max(0, ageMs))
    const [counts] = [...(await countsIn(store)).values()]
    assert.equal(counts?.downloaded, 1)
    const lives = [...peersIn(store).values()].map(({ lifeSeconds }) => lifeSeconds)
    return lives.sort((a, b) => a - b)
  }
  assert.deepEqual(await livesAfter(0), [120, 1000, 5000])
  assert.deepEqual(await livesAfter(600_000), [120, 400, 4400])
  assert.deepEqual(await livesAfter(3_599_000), [120, 120, 1401])
  assert.deepEqual(await livesAfter(3_601_000), [])
  // A clock that was put back.
  assert.deepEqual(await livesAfter(-86_400_000), [120, 1000, 5000])
})

test('no snapshot is no fault; what is none, cannot be read or is empty is one, and nothing comes of it', async (t) => {
  const directory = await temporaryDirectory(t)
  const load = async (name: string, bytes?: Uint8Array) => {
    const file = join(directory, name)
    if (bytes) await writeFile(file, bytes)
    await using store = openStore()
    const loaded = await loadSnapshot(store, file, { topology, nowMs: savedAtMs })
    assert.equal(store.totals().swarms, 0)
    return loaded
  }
  assert.equal(await load('none'), undefined)
  await mkdir(join(directory, 'directory'))
  assert.match((await load('directory'))?.fault ?? '', /EISDIR/)
  assert.match((await load('empty', Buffer.alloc(0)))?.fault ?? '', /cut short/)
  assert.match((await load('foreign', randomBytes(5000)))?.fault ?? '', /not a snapshot of this version/)
  const ageless = Buffer.concat([Buffer.from('RSWARMS1'), Buffer.alloc(8, 0xff), Buffer.alloc(100)])
  assert.match((await load('ageless', ageless))?.fault ?? '', /does not say when/)
})

test('a snapshot that was cut short is good up to there, wherever it was cut', async (t) => {
  const file = join(await temporaryDirectory(t), 'swarms.snapshot')
  const { bytes, peers } = await snapshotOf(file, { peers: 1500, swarms: 40 })
  let most = 0
  for (let length = 0; length < bytes.length; length += 1 + Math.floor(bytes.length / 61)) {
    await writeFile(file, bytes.subarray(0, length))
    await using store = openStore()
    const loaded = await loadSnapshot(store, file, { topology, nowMs: savedAtMs })
    assert.match(loaded?.fault ?? '', /cut short/)
    assert.ok((loaded?.peers ?? 0) >= most)
    most = loaded?.peers ?? 0
    assertSubset(store, peers)
  }
  assert.ok(most > 0)
})

test('a damaged snapshot gives what is before the damage, and nothing that was never saved', async (t) => {
  const file = join(await temporaryDirectory(t), 'swarms.snapshot')
  const { bytes, peers } = await snapshotOf(file, { peers: 40, swarms: 5 })
  const change = fc.record({
    kind: fc.constantFrom('set', 'cut', 'put', 'double'),
    at: fc.nat(bytes.length - 1),
    byte: fc.nat(255),
    length: fc.integer({ min: 1, max: 60 }),
  })
  await fc.assert(
    fc.asyncProperty(fc.array(change, { minLength: 1, maxLength: 3 }), async (changes) => {
      let damaged: Buffer = Buffer.from(bytes)
      for (const { kind, at, byte, length } of changes) {
        const [head, tail] = [damaged.subarray(0, at), damaged.subarray(at)]
        if (kind === 'set') damaged = Buffer.concat([head, Buffer.of(byte), tail.subarray(1)])
        else if (kind === 'cut') damaged = Buffer.concat([head, tail.subarray(length)])
        else if (kind === 'put') damaged = Buffer.concat([head, Buffer.alloc(length, byte), tail])
        else damaged = Buffer.concat([head, tail.subarray(0, length), tail])
      }
      await writeFile(file, damaged)
      await using store = openStore()
      const loaded = await loadSnapshot(store, file, { topology, nowMs: savedAtMs })
      assert.equal(typeof loaded?.peers, 'number')
      assertSubset(store, peers)
    }),
    { numRuns: fuzzRuns / 10 },
  )
})

test('a snapshot with right checksums and any content is read without harm to the store', async (t) => {
  const file = join(await temporaryDirectory(t), 'swarms.snapshot')
  const { bytes } = await snapshotOf(file, { peers: 40, swarms: 5 })
  const frames = framesOf(bytes)
  const change = fc.record({
    frame: fc.nat(frames.length - 1),
    at: fc.nat(),
    value: fc.oneof(fc.uint8Array({ minLength: 1, maxLength: 24 }), fc.constant(Uint8Array.of(0, 0, 0, 0))),
  })
  await fc.assert(
    fc.asyncProperty(fc.array(change, { minLength: 1, maxLength: 8 }), fc.double(), async (changes, when) => {
      const changed = frames.map((payload) => Buffer.from(payload))
      for (const { frame, at, value } of changes) {
        const payload = changed[frame] ?? Buffer.alloc(0)
        payload.set(value.subarray(0, payload.length), at % Math.max(1, payload.length - value.length + 1))
      }
      const head = Buffer.from(bytes.subarray(0, 16))
      if (changes.length % 3 === 0) head.writeDoubleBE(when, 8)
      await writeFile(file, Buffer.concat([head, ...changed.map(sealed)]))
      const clock = { nowMs: 0 }
      await using store = openStore(clock)
      await loadSnapshot(store, file, { topology, nowMs: savedAtMs })
      // The store goes on: it takes a peer, and lets go of all the others.
      store.announce(announceOf({ swarm: 1, port: 1, lifeMs: 10_000 }))
      const { seeders, leechers } = store.totals()
      assert.equal(seeders + leechers, peersIn(store).size)
      clock.nowMs += 10 * 3600 * 1000
      for (let turns = 0; turns < 10; turns++) store.scrape(hashOf(99))
      assert.deepEqual(
        { seeders: store.totals().seeders, leechers: store.totals().leechers },
        { seeders: 0, leechers: 0 },
      )
    }),
    { numRuns: fuzzRuns / 10 },
  )
})

test('a store that is smaller than the snapshot takes what fits', async (t) => {
  const file = join(await temporaryDirectory(t), 'swarms.snapshot')
  const { peers } = await snapshotOf(file, { peers: 3000, swarms: 200 })
  for (const bounds of [{ peersMax: 500 }, { swarmsMax: 20 }, { peersMax: 1, swarmsMax: 1 }]) {
    await using store = openStore({ nowMs: 0 }, bounds)
    const loaded = await loadSnapshot(store, file, { topology, nowMs: savedAtMs })
    const { seeders, leechers, swarms } = store.totals()
    assert.equal(loaded?.fault, undefined)
    assert.equal(loaded?.peers, seeders + leechers)
    assert.ok(seeders + leechers > 0)
    if ('peersMax' in bounds) assert.equal(seeders + leechers, bounds.peersMax)
    if ('swarmsMax' in bounds) assert.equal(swarms, bounds.swarmsMax)
    assertSubset(store, peers)
  }
})

test('snapshots are saved beside the announces, in turn, and a last one at the end', async (t) => {
  const file = join(await temporaryDirectory(t), 'swarms.snapshot')
  const warnings: string[] = []
  const warned = (warning: Error) => warnings.push(warning.message)
  process.on('warning', warned)
  t.after(() => process.off('warning', warned))
  await using store = openStore({ nowMs: 0 }, { now: () => performance.now() })
  populate(store, { peers: 4000, swarms: 50 })
  const steady = peersIn(store)
  const options = {
    store,
    file,
    intervalMs: 5,
    topology,
    saveAtEnd: () => true,
    now: Date.now,
    log: silentLog(),
  }
  {
    await using snapshots = await startSnapshots(options)
    assert.ok(snapshots.ageSeconds() < 10)
    for (let round = 0; round < 25; round++) {
      const saving = snapshots.save()
      let saved = false
      void saving.finally(() => (saved = true))
      while (!saved) {
        for (let i = 0; i < 50; i++)
          store.announce(
            announceOf({ swarm: 500 + (i % 3), port: 1 + i, event: i % 2 ? 'stopped' : undefined }),
          )
        await new Promise((resolve) => setImmediate(resolve))
      }
      await saving
    }
    await using other = openStore()
    const loaded = await loadSnapshot(other, file, { topology, nowMs: Date.now() })
    assert.equal(loaded?.fault, undefined)
    const found = peersIn(other)
    for (const peer of steady.keys()) assert.ok(found.has(peer), `${peer} was not saved`)
    store.announce(announceOf({ swarm: 600, port: 600 }))
  }
  await using last = openStore()
  await loadSnapshot(last, file, { topology, nowMs: Date.now() })
  assert.deepEqual([...peersIn(last).keys()].sort(), [...peersIn(store).keys()].sort())
  assert.deepEqual(warnings, [])
})

test('a snapshot that cannot be saved says why, and the next one can be', async (t) => {
  const directory = join(await temporaryDirectory(t), 'not-there')
  const file = join(directory, 'swarms.snapshot')
  await using store = openStore()
  populate(store, { peers: 10, swarms: 2 })
  const options = {
    store,
    file,
    intervalMs: 60_000,
    topology,
    saveAtEnd: () => true,
    now: Date.now,
    log: silentLog(),
  }
  await using snapshots = await startSnapshots(options)
  await assert.rejects(
    snapshots.save(),
    /^Error: Cannot save the swarms to .*not-there\/swarms\.snapshot: ENOENT/,
  )
  await mkdir(directory)
  await snapshots.save()
  assert.ok((await stat(file)).size > 0)
})

test(
  'a full disk keeps the snapshot that is there, whole',
  { skip: process.getuid?.() !== 0 && 'needs root, to mount a small disk' },
  async (t) => {
    const disk = await temporaryDirectory(t)
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=128k', 'tmpfs', disk])
    using mounted = new DisposableStack()
    mounted.defer(() => execFileSync('umount', [disk]))
    const file = join(disk, 'swarms.snapshot')
    await using store = openStore()
    populate(store, { peers: 500, swarms: 5 })
    const good = await saveSnapshot(store, file, savedAtMs)
    populate(store, { peers: 2600, swarms: 5 })
    await assert.rejects(saveSnapshot(store, file, savedAtMs), { code: 'ENOSPC' })
    assert.deepEqual(await readdir(disk), ['swarms.snapshot'])
    await using other = openStore()
    const loaded = await loadSnapshot(other, file, { topology, nowMs: savedAtMs })
    assert.deepEqual(loaded, { peers: good.peers, ageMs: 0, fault: undefined })
  },
)

const levels = ['rack', 'row', 'datacentre']
const places = { a1: ['r1', 'ams'], a2: ['r1', 'ams'], b1: ['r2', 'ams'], f1: ['r1', 'fra'] }
const topology = createTopology({
  levels,
  places: Object.fromEntries(Object.entries(places).map(([name, parents]) => [name, { parents }])),
  prefixes: [],
  ipv4PrefixLength: 24,
  ipv6PrefixLength: 64,
})
const placeNames = [...Object.keys(places), ...Array.from({ length: 30 }, (_, i) => `stranger${i}`)]

function openStore(
  clock: { nowMs: number } = { nowMs: 0 },
  bounds: { peersMax?: number; swarmsMax?: number; now?: () => number } = {},
): MemoryPeerStore {
  return createMemoryPeerStore({
    peersMax: 10_000,
    swarmsMax: 1000,
    levels: levels.length,
    sampleMax: 100,
    random: Math.random,
    now: () => clock.nowMs,
    ...bounds,
  })
}

function hashOf(swarm: number) {
  const bytes = Buffer.alloc(20, 0x5a)
  bytes.writeUInt32BE(swarm)
  return infoHashFromBytes(bytes)
}

interface Fields {
  readonly swarm: number
  readonly port: number
  readonly address?: Uint8Array
  readonly peerId?: Uint8Array
  readonly place?: string
  readonly left?: number
  readonly event?: StoreAnnounce['event']
  readonly lifeMs?: number
}

function announceOf(fields: Fields, seen: { view?: SwarmView } = {}): StoreAnnounce {
  const place = topology.idOf(parsePlace(fields.place ?? 'a1'))
  const bytes = fields.address ?? Uint8Array.of(10, 0, 0, 1)
  const family: Family = bytes.length === 4 ? 4 : 6
  return {
    infoHash: hashOf(fields.swarm),
    source: { family, bytes },
    port: fields.port,
    peerId: fields.peerId ?? Buffer.alloc(20, 1),
    place,
    ancestors: topology.ancestorsOf(place),
    left: fields.left ?? 1,
    event: fields.event,
    ownFamilyOnly: false,
    withPeerIds: false,
    lifetimeMs: () => fields.lifeMs ?? 600_000,
    choose: (view) => {
      seen.view = structuredClone(view)
      return { rack: 0, seeders: [], leechers: [], gateway: false }
    },
  }
}

/** Random peers of both families; some have left again, some have completed, some swarms are empty. */
function populate(store: MemoryPeerStore, { peers, swarms }: { peers: number; swarms: number }): void {
  const random = (below: number) => Math.floor(Math.random() * below)
  for (let i = 0; i < peers; i++) {
    const fields: Fields = {
      swarm: random(swarms),
      port: 1 + random(65_535),
      address: randomBytes(random(2) === 0 ? 4 : 16),
      peerId: randomBytes(20),
      place: placeNames[random(placeNames.length)] ?? '',
      left: random(3),
      lifeMs: 121_000 + random(20_000_000),
    }
    if (fields.address?.length === 16) fields.address[0] = 0xfd
    store.announce(announceOf(fields))
    if (i % 5 === 0) store.announce(announceOf({ ...fields, left: 0, event: 'completed' }))
    if (i % 7 === 0) store.announce(announceOf({ ...fields, event: 'stopped' }))
  }
  for (let swarm = swarms; swarm < swarms + 20; swarm++)
    for (const event of ['started', 'completed', 'stopped'] as const)
      store.announce(announceOf({ swarm, port: 1, left: event === 'started' ? 1 : 0, event }))
}

interface PeerFields {
  readonly kind: number
  readonly lifeSeconds: number
  readonly place: number
  readonly peerId: string
}

/** All peers by swarm and endpoint. */
function peersIn(store: MemoryPeerStore): Map<string, PeerFields> {
  const peers = new Map<string, PeerFields>()
  const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex')
  store.locked(({ families, swarms }) => {
    for (const family of [4, 6] as const) {
      const own = families[family]
      for (let handle = 0; handle < own.touched; handle++) {
        if (!own.isUsed(handle)) continue
        peers.set(`${swarms.infoHashOf(own.swarmOf(handle))} ${family} ${hex(own.endpointOf(handle))}`, {
          kind: own.kindOf(handle),
          lifeSeconds: own.expiryTick(handle) - store.nowTick(),
          place: own.placeOf(handle),
          peerId: hex(own.peerIdOf(handle)),
        })
      }
    }
  })
  return peers
}

async function countsIn(store: MemoryPeerStore) {
  const counts = new Map<string, { complete: number; incomplete: number; downloaded: number }>()
  for await (const part of store.swarms()) for (const [infoHash, swarm] of part) counts.set(infoHash, swarm)
  return new Map([...counts].sort(([a], [b]) => (a < b ? -1 : 1)))
}

/** What a newcomer in a place is shown of a swarm; it leaves again. */
function viewOf(store: MemoryPeerStore, swarm: number, place: string): SwarmView | undefined {
  const seen: { view?: SwarmView } = {}
  store.announce(announceOf({ swarm, port: 7, place }, seen))
  store.announce(announceOf({ swarm, port: 7, place, event: 'stopped' }))
  return seen.view
}

async function snapshotOf(file: string, size: { peers: number; swarms: number }) {
  await using store = openStore()
  populate(store, size)
  await saveSnapshot(store, file, savedAtMs)
  return { bytes: await readFile(file), peers: peersIn(store) }
}

function assertSubset(store: MemoryPeerStore, saved: ReadonlyMap<string, PeerFields>): void {
  for (const [peer, { kind, place, peerId }] of peersIn(store)) {
    const was = saved.get(peer)
    assert.deepEqual({ kind, place, peerId }, was && { kind: was.kind, place: was.place, peerId: was.peerId })
  }
}

/** Payloads of the frames of a good snapshot. */
function framesOf(bytes: Buffer): Buffer[] {
  const frames: Buffer[] = []
  for (let at = 16; at < bytes.length;) {
    const length = bytes.readUInt32BE(at)
    frames.push(bytes.subarray(at + 8, at + 8 + length))
    at += 8 + length
  }
  return frames
}

function sealed(payload: Buffer): Buffer {
  const head = Buffer.alloc(8)
  head.writeUInt32BE(payload.length)
  head.writeUInt32BE(crc32(payload), 4)
  return Buffer.concat([head, payload])
}

async function temporaryDirectory(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-snapshot-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return directory
}
