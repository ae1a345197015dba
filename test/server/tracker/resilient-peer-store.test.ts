import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import { createLog } from '../../../lib/runtime/log.ts'
import { createRandom } from '../../../lib/runtime/random.ts'
import { RedisUnavailable } from '../../../server/redis/connection.ts'
import { createMemoryPeerStore } from '../../../server/tracker/memory/memory-peer-store.ts'
import type { PeerStore, StoreAnnounce } from '../../../server/tracker/peer-store.ts'
import type { ResilientPeerStoreOptions } from '../../../server/tracker/redis/resilient-peer-store.ts'
import { createResilientPeerStore } from '../../../server/tracker/redis/resilient-peer-store.ts'
import { until } from '../../support/until.ts'
import { announceOf, peerStoreContract, peersOf } from './peer-store.contract.ts'

interface Clock {
  nowMs: number
}

const memory = (clock: Clock) =>
  createMemoryPeerStore({
    peersMax: 5000,
    swarmsMax: 100,
    levels: 2,
    sampleMax: 1000,
    random: createRandom(Math.random),
    now: () => clock.nowMs,
  })

/** How a server finds the store that it shares with others: it answers, does not, or says that it cannot. */
type Way = 'up' | 'hangs' | 'fails'

/** Changes nothing, and samples nobody. */
const idle: StoreAnnounce = announceOf({ peer: 65_000, swarm: 99, event: 'stopped' }).announce

/**
 * A store that several servers share, over a memory store, with what belongs to such a store alone: what it is told late gives way to what
 * it has heard since.
 */
function sharedStore(clock: Clock) {
  const store = memory(clock)
  const heardAt = new Map<string, number>()
  const never = new Promise<never>(() => undefined)
  const heard = (announce: StoreAnnounce) => {
    const { infoHash, source, port, belatedMs = 0 } = announce
    const key = `${infoHash} ${source.family} ${source.bytes.join('.')}:${port}`
    const madeAt = clock.nowMs - belatedMs
    if ((heardAt.get(key) ?? -Infinity) > madeAt)
      return { counts: store.scrape(infoHash), peers: store.announce(idle).peers }
    heardAt.set(key, madeAt)
    return store.announce(announce)
  }
  const open = () => {
    const server = { way: 'up' as Way, broken: new Set<string>(), announces: 0, asked: 0 }
    const pass = <Answer>(infoHash: string, work: () => Answer): Answer | Promise<Answer> => {
      server.asked++
      if (server.way === 'hangs') return never
      if (server.way === 'fails' || server.broken.has(infoHash))
        return Promise.reject(new RedisUnavailable('it is away'))
      return work()
    }
    const way: PeerStore = {
      ...store,
      announce: (announce) =>
        pass(announce.infoHash, () => {
          server.announces++
          return heard(announce)
        }),
      scrape: (infoHash) => pass(infoHash, () => store.scrape(infoHash)),
      [Symbol.asyncDispose]: () => Promise.resolve(),
    }
    return Object.assign(server, { store: way })
  }
  return { store, open, [Symbol.asyncDispose]: () => store[Symbol.asyncDispose]() }
}

function resilient(shared: PeerStore, clock: Clock, options: Partial<ResilientPeerStoreOptions> = {}) {
  const local = memory(clock)
  const store = createResilientPeerStore({
    shared,
    local,
    isPartitioned: false,
    deadlineMs: 20,
    staleMs: 5000,
    degradedMaxMs: 600_000,
    toldPerSecond: 100_000,
    untoldMax: 10_000,
    probeFirstMs: 2,
    tellJitterMs: 1,
    now: () => clock.nowMs,
    random: createRandom(Math.random),
    log: createLog('test', 'error'),
    ...options,
  })
  return {
    ...store,
    local,
    [Symbol.asyncDispose]: async () => {
      await store[Symbol.asyncDispose]()
      await local[Symbol.asyncDispose]()
    },
  }
}

const swarmHash = (swarm: number) => infoHashFromHex(String(swarm).padStart(40, '0'))

const statusOf = (store: PeerStore) => store.status?.() ?? assert.fail()

function isWhole(store: PeerStore): boolean {
  const { degraded, untold } = statusOf(store)
  return degraded === undefined && untold === 0
}

peerStoreContract('resilient over a store that is away', async (clock) => {
  const shared = sharedStore(clock)
  const server = shared.open()
  server.way = 'fails'
  const store = resilient(server.store, clock, { degradedMaxMs: Infinity })
  // From here on it is known to be away.
  await store.scrape(swarmHash(0))
  return {
    ...store,
    [Symbol.asyncDispose]: async () => {
      await store[Symbol.asyncDispose]()
      await shared[Symbol.asyncDispose]()
    },
  }
})

test('resilient: after outages, hangs and cuts the shared store has what one memory store would have', async () => {
  const step = fc.oneof(
    {
      weight: 8,
      arbitrary: fc.record({
        kind: fc.constant('announce' as const),
        server: fc.nat(1),
        swarm: fc.nat(1),
        peer: fc.integer({ min: 1, max: 12 }),
        left: fc.nat(1),
        event: fc.constantFrom(undefined, 'started' as const, 'stopped' as const),
      }),
    },
    {
      weight: 3,
      arbitrary: fc.record({
        kind: fc.constant('way' as const),
        server: fc.nat(1),
        way: fc.constantFrom('up' as const, 'up' as const, 'hangs' as const, 'fails' as const),
      }),
    },
    { weight: 1, arbitrary: fc.record({ kind: fc.constant('settle' as const) }) },
  )
  await fc.assert(
    fc.asyncProperty(fc.array(step, { maxLength: 60 }), async (steps) => {
      const clock = { nowMs: 1_000_000 }
      await using shared = sharedStore(clock)
      await using model = memory(clock)
      const servers = [shared.open(), shared.open()]
      const stores = servers.map(({ store }) => resilient(store, clock, { deadlineMs: 3 }))
      const allUp = () => servers.every(({ way }) => way === 'up')
      try {
        for (const one of steps) {
          clock.nowMs += 7
          if (one.kind === 'way') {
            const server = servers[one.server]
            if (server) server.way = one.way
          } else if (one.kind === 'announce') {
            const announce = () => announceOf({ ...one, lifeMs: 600_000 }).announce
            const wasWhole = allUp() && stores.every(isWhole)
            const wanted = peersOf(model.announce(announce())).map(({ peer }) => peer)
            const reply = await stores[one.server]?.announce(announce())
            // Where nothing is missing the answer is that of the memory store.
            if (reply && wasWhole)
              assert.deepEqual(
                peersOf(reply)
                  .map(({ peer }) => peer)
                  .sort(),
                wanted.sort(),
              )
          } else if (allUp()) {
            await until('all is told', () => stores.every(isWhole))
          }
        }
        for (const server of servers) server.way = 'up'
        await until('all is told', () => stores.every(isWhole))
        for (const swarm of [0, 1]) {
          const [{ complete, incomplete }, wanted] = [shared.store, model].map((store) =>
            store.scrape(swarmHash(swarm)),
          ) as [ReturnType<typeof model.scrape>, ReturnType<typeof model.scrape>]
          assert.deepEqual([complete, incomplete], [wanted.complete, wanted.incomplete])
          const peers = (store: typeof model) =>
            peersOf(store.announce(announceOf({ peer: 500, swarm, place: 1 }).announce))
              .map(({ peer, distance }) => `${peer} ${distance}`)
              .sort()
          assert.deepEqual(peers(shared.store), peers(model))
        }
      } finally {
        for (const store of stores) await store[Symbol.asyncDispose]()
      }
    }),
    { numRuns: 60 },
  )
})

test('resilient: completions of an outage are counted once', async () => {
  const clock = { nowMs: 1_000_000 }
  await using shared = sharedStore(clock)
  const server = shared.open()
  await using store = resilient(server.store, clock)
  const announce = async (fields: Parameters<typeof announceOf>[0]) =>
    store.announce(announceOf(fields).announce)
  await announce({ peer: 1 })
  server.way = 'fails'
  await announce({ peer: 1, left: 0, event: 'completed' })
  await announce({ peer: 2 })
  await announce({ peer: 2, left: 0, event: 'completed' })
  await announce({ peer: 3, left: 0, event: 'completed' })
  await announce({ peer: 3, left: 0, event: 'stopped' })
  await announce({ peer: 4, left: 0, event: 'started' })
  server.way = 'up'
  await until('all is told', () => isWhole(store))
  assert.deepEqual(shared.store.scrape(swarmHash(0)), { complete: 3, incomplete: 0, downloaded: 3 })
})

test('resilient: while it hangs those who had asked wait for the deadline once, and nobody after that', async () => {
  const clock = { nowMs: 1_000_000 }
  await using shared = sharedStore(clock)
  const server = shared.open()
  await using store = resilient(server.store, clock, { deadlineMs: 100, probeFirstMs: 100 })
  for (let peer = 1; peer <= 100; peer++) await store.announce(announceOf({ peer }).announce)
  server.way = 'hangs'
  const startMs = performance.now()
  const replies = await Promise.all(
    Array.from({ length: 50 }, async (_, i) => {
      await new Promise((resolve) => setTimeout(resolve, i))
      return store.announce(announceOf({ peer: 200 + i }).announce)
    }),
  )
  const tookMs = performance.now() - startMs
  assert.ok(tookMs < 140, `all were answered when the first one's time was up: ${tookMs} ms`)
  for (const reply of replies) assert.ok(peersOf(reply).length >= 100)
  const { asked } = server
  const times: number[] = []
  for (let i = 0; i < 5000; i++) {
    const atMs = performance.now()
    const reply = store.announce(announceOf({ peer: 300 + (i % 500), swarm: i % 7 }, 10).announce)
    assert.ok(!(reply instanceof Promise), 'nobody waits')
    times.push(performance.now() - atMs)
  }
  times.sort((a, b) => a - b)
  const p99Ms = times[Math.floor(times.length * 0.99)] ?? assert.fail()
  assert.ok(p99Ms < 10, `p99 ${p99Ms} ms`)
  const lookedAt = server.asked - asked
  assert.ok(lookedAt <= 2 + (performance.now() - startMs) / 50, `looked at ${lookedAt} times`)
  const { degraded, answeredLocally } = statusOf(store)
  assert.match(degraded?.reason ?? '', /no answer within 100 ms/)
  assert.equal(answeredLocally, 5050)
})

test('resilient: what it has missed is told at a bounded rate, the newest of each peer', async () => {
  const clock = { nowMs: 1_000_000 }
  await using shared = sharedStore(clock)
  const server = shared.open()
  await using store = resilient(server.store, clock, { toldPerSecond: 1000, tellJitterMs: 0 })
  server.way = 'fails'
  for (let round = 0; round < 10; round++)
    for (let peer = 1; peer <= 400; peer++)
      await store.announce(announceOf({ peer, left: round < 9 ? 1 : 0 }).announce)
  assert.equal(statusOf(store).untold, 400)
  server.way = 'up'
  const startMs = performance.now()
  await until('all is told', () => isWhole(store))
  const tookMs = performance.now() - startMs
  assert.ok(server.announces <= 402, `${server.announces} announces for 400 peers`)
  assert.ok(tookMs > 300, `400 peers at 1,000 a second took ${tookMs} ms`)
  assert.equal(shared.store.scrape(swarmHash(0)).complete, 400)
})

test('resilient: of whom has stopped it is told at once, before all others', async () => {
  const clock = { nowMs: 1_000_000 }
  await using shared = sharedStore(clock)
  const server = shared.open()
  await using store = resilient(server.store, clock, { tellJitterMs: 60_000, random: () => 0.9 })
  for (let peer = 1; peer <= 100; peer++) await store.announce(announceOf({ peer }).announce)
  server.way = 'fails'
  for (let peer = 101; peer <= 200; peer++) await store.announce(announceOf({ peer }).announce)
  for (let peer = 1; peer <= 40; peer++) await store.announce(announceOf({ peer, event: 'stopped' }).announce)
  server.way = 'up'
  await until('the stops are told', () => shared.store.scrape(swarmHash(0)).incomplete === 60)
  assert.equal(statusOf(store).untold, 100)
})

test('resilient: who has stopped at a server that cannot say so is not named any more, and the shared store is told', async () => {
  const clock = { nowMs: 1_000_000 }
  await using shared = sharedStore(clock)
  const [server, cutOff] = [shared.open(), shared.open()]
  await using store = resilient(server.store, clock, { toldPerSecond: 1 })
  await using elsewhere = resilient(cutOff.store, clock, {
    stopped: (peer, isTold) => {
      if (!isTold) store.stoppedElsewhere(peer, 0)
    },
  })
  for (let peer = 1; peer <= 20; peer++) await elsewhere.announce(announceOf({ peer, place: 1 }).announce)
  server.way = cutOff.way = 'fails'
  await store.scrape(swarmHash(0))
  await elsewhere.scrape(swarmHash(0))
  for (let peer = 1; peer <= 15; peer++)
    await elsewhere.announce(announceOf({ peer, place: 1, event: 'stopped' }).announce)
  server.way = 'up'
  await until('it answers again', () => statusOf(store).degraded === undefined)
  // One of them a second is told, so most are still there.
  assert.ok(shared.store.scrape(swarmHash(0)).incomplete > 10)
  const { announce } = announceOf({ peer: 100, place: 1 })
  const { peers } = await store.announce({ ...announce, numwant: 50, withPeerIds: false })
  assert.equal(peers.lengths[4], 5)
  await using quick = resilient(server.store, clock)
  for (let peer = 1; peer <= 15; peer++) quick.stoppedElsewhere(announceOf({ peer, place: 1 }).announce, 0)
  await until('the shared store knows', () => shared.store.scrape(swarmHash(0)).incomplete === 6)
})

test('resilient: the memory for what was missed is bounded, and the oldest go', async () => {
  const clock = { nowMs: 1_000_000 }
  await using shared = sharedStore(clock)
  const server = shared.open()
  await using store = resilient(server.store, clock, { untoldMax: 100 })
  server.way = 'fails'
  for (let peer = 1; peer <= 300; peer++) await store.announce(announceOf({ peer }).announce)
  const { untold, dropped } = statusOf(store)
  assert.deepEqual({ untold, dropped }, { untold: 100, dropped: 200 })
  server.way = 'up'
  await until('all is told', () => isWhole(store))
  assert.equal(shared.store.scrape(swarmHash(0)).incomplete, 100)
})

test('resilient: whom the shared store named is handed out for its staleness and no longer, and not once it stops', async () => {
  const clock = { nowMs: 1_000_000 }
  await using shared = sharedStore(clock)
  const [server, other] = [shared.open(), shared.open()]
  await using store = resilient(server.store, clock)
  await using elsewhere = resilient(other.store, clock)
  for (let peer = 1; peer <= 20; peer++) await elsewhere.announce(announceOf({ peer, place: 1 }).announce)
  const ask = async () => {
    const { announce } = announceOf({ peer: 100, place: 1 })
    const { peers, counts } = await store.announce({ ...announce, withPeerIds: false })
    return { peers: peers.lengths[4], complete: counts.complete, incomplete: counts.incomplete }
  }
  assert.deepEqual(await ask(), { peers: 20, complete: 0, incomplete: 21 })
  server.way = 'fails'
  clock.nowMs += 4000
  assert.deepEqual(await ask(), { peers: 20, complete: 0, incomplete: 21 })
  await store.announce(announceOf({ peer: 3, place: 1, event: 'stopped' }).announce)
  assert.equal((await ask()).peers, 19)
  clock.nowMs += 1001
  assert.deepEqual(await ask(), { peers: 0, complete: 0, incomplete: 1 })
})

test('resilient: until it was told all of a swarm, answers are those of both', async () => {
  const clock = { nowMs: 1_000_000 }
  await using shared = sharedStore(clock)
  const [server, other] = [shared.open(), shared.open()]
  await using store = resilient(server.store, clock, { toldPerSecond: 100, tellJitterMs: 0 })
  await using elsewhere = resilient(other.store, clock)
  server.way = 'fails'
  for (let peer = 1; peer <= 60; peer++) await store.announce(announceOf({ peer }).announce)
  for (let peer = 101; peer <= 120; peer++) await elsewhere.announce(announceOf({ peer }).announce)
  server.way = 'up'
  await until('it is asked again', () => statusOf(store).degraded === undefined)
  assert.ok(statusOf(store).untold > 0)
  const { announce } = announceOf({ peer: 200 })
  const reply = await store.announce({ ...announce, numwant: 1000 })
  assert.equal(new Set(peersOf(reply).map(({ peer }) => peer)).size, 80)
  assert.ok(reply.counts.incomplete >= 61)
})

test('resilient: where a part of the shared store is gone, the other swarms are asked as before', async () => {
  const clock = { nowMs: 1_000_000 }
  await using shared = sharedStore(clock)
  const server = shared.open()
  await using store = resilient(server.store, clock, { isPartitioned: true })
  server.broken.add(swarmHash(1))
  for (let round = 0; round < 5; round++)
    for (let swarm = 0; swarm < 5; swarm++)
      await store.announce(announceOf({ peer: round + 1, swarm }).announce)
  for (const swarm of [0, 2, 3, 4]) assert.equal(shared.store.scrape(swarmHash(swarm)).incomplete, 5)
  assert.equal(shared.store.scrape(swarmHash(1)).incomplete, 0)
  assert.equal((await store.scrape(swarmHash(1))).incomplete, 5)
  server.broken.clear()
  await until('all is told', () => isWhole(store))
  assert.equal(shared.store.scrape(swarmHash(1)).incomplete, 5)
})

test('resilient: after the longest time without the shared store announces are refused, until it answers', async () => {
  const clock = { nowMs: 1_000_000 }
  await using shared = sharedStore(clock)
  const server = shared.open()
  await using store = resilient(server.store, clock)
  server.way = 'fails'
  await store.announce(announceOf({ peer: 1 }).announce)
  clock.nowMs += 600_001
  assert.throws(() => store.announce(announceOf({ peer: 1 }).announce), {
    code: 'degraded',
    retryInMinutes: 1,
  })
  assert.equal(statusOf(store).degraded?.isRefusing, true)
  server.way = 'up'
  await until('it is asked again', () => statusOf(store).degraded === undefined)
  await store.announce(announceOf({ peer: 1 }).announce)
  assert.equal(shared.store.scrape(swarmHash(0)).incomplete, 1)
})

test('resilient: an announce that is overtaken by the next one of its peer does not undo it', async () => {
  const clock = { nowMs: 1_000_000 }
  await using shared = sharedStore(clock)
  const server = shared.open()
  await using store = resilient(server.store, clock, { deadlineMs: 30, probeFirstMs: 1000 })
  server.way = 'hangs'
  const started = store.announce(announceOf({ peer: 1, event: 'started' }).announce)
  const stopped = store.announce(announceOf({ peer: 1, event: 'stopped' }).announce)
  await Promise.all([started, stopped])
  assert.equal(store.local.scrape(swarmHash(0)).incomplete, 0)
  assert.equal(statusOf(store).untold, 1)
})
