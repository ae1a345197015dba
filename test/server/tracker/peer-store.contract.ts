import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { Family, Ip } from '../../../lib/protocol/address.ts'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import type { PeerStore, StoreAnnounce, StoreReply, SwarmView } from '../../../server/tracker/peer-store.ts'
import type { Ancestor } from '../../../server/tracker/topology.ts'
import { rootPlace } from '../../../server/tracker/topology.ts'

export interface Clock {
  nowMs: number
}

/** Two rows of two racks, and a rack that no configuration names: 1 and 2 are in row one, 3 and 4 in row two, 5 in none. */
const rowOne = 0x80000001
const rowTwo = 0x80000002
const root: Ancestor = { node: rootPlace, distance: 2 }
const ancestors = (place: number): Ancestor[] =>
  place === 5 ? [root] : [{ node: place <= 2 ? rowOne : rowTwo, distance: 1 }, root]
const distanceOf = (a: number, b: number) =>
  a === b ? 0 : a !== 5 && b !== 5 && Math.ceil(a / 2) === Math.ceil(b / 2) ? 1 : 2

interface PeerFields {
  readonly peer: number
  readonly family?: Family
  readonly swarm?: number
  readonly place?: number
  readonly left?: number
  readonly event?: StoreAnnounce['event']
  readonly lifeMs?: number
  readonly ownFamilyOnly?: boolean
}

/** Peer N of a family is at 10.0.0.N or fd00::N. */
function sourceOf(peer: number, family: Family): Ip {
  const bytes = new Uint8Array(family === 4 ? 4 : 16)
  bytes.set(family === 4 ? [10, 0] : [0xfd, 0])
  bytes.set([peer >> 8, peer & 0xff], bytes.length - 2)
  return { family, bytes }
}

/** An announce that wants `most` of each kind of each level; `view` is what the store showed it. */
export function announceOf(fields: PeerFields, most = 1000) {
  const place = fields.place ?? (fields.peer % 5) + 1
  const seen: { view?: SwarmView } = {}
  const announce: StoreAnnounce = {
    infoHash: infoHashFromHex(String(fields.swarm ?? 0).padStart(40, '0')),
    source: sourceOf(fields.peer, fields.family ?? 4),
    port: 6881,
    peerId: Buffer.alloc(20, fields.peer),
    place,
    ancestors: ancestors(place),
    left: fields.left ?? 1,
    event: fields.event,
    ownFamilyOnly: fields.ownFamilyOnly ?? false,
    withPeerIds: true,
    lifetimeMs: () => fields.lifeMs ?? 60_000,
    choose: (view) => {
      seen.view = structuredClone(view)
      const upTo = (count: number) => Math.min(count, most)
      const [rack, ...far] = view.levels
      assert.equal(rack?.distance, 0)
      return {
        rack: upTo(rack.seeders + rack.leechers),
        seeders: [0, ...far.map(({ seeders }) => upTo(seeders))],
        leechers: [0, ...far.map(({ leechers }) => upTo(leechers))],
        gateway: false,
      }
    },
  }
  return { announce, seen }
}

/** Does something so many times, several at once where it takes time. */
async function severally(times: number, work: (i: number) => unknown): Promise<void> {
  const atOnce = 32
  for (let from = 0; from < times; from += atOnce)
    await Promise.all(Array.from({ length: Math.min(atOnce, times - from) }, (_, i) => work(from + i)))
}

/** The peers of a sample by number, with their distances. */
export function peersOf({ peers }: StoreReply): { peer: number; family: Family; distance: number }[] {
  return peers.toPeers().map(({ endpoint: { family, compact }, peerId, distance }) => {
    const peer = ((compact[compact.length - 4] ?? 0) << 8) | (compact[compact.length - 3] ?? 0)
    assert.deepEqual(Buffer.from(peerId), Buffer.alloc(20, peer), 'the peer id belongs to the endpoint')
    assert.deepEqual([...compact.subarray(-2)], [6881 >> 8, 6881 & 0xff])
    return { peer, family, distance }
  })
}

/** What every PeerStore must do; `open` gives an empty one for two levels that reads the time from `clock`. */
export function peerStoreContract(name: string, open: (clock: Clock) => Promise<PeerStore>): void {
  test(`${name}: counts, levels, samples, completions and expiry are those of a plain model`, async () => {
    const step = fc.oneof(
      {
        weight: 8,
        arbitrary: fc.record({
          kind: fc.constant('announce' as const),
          swarm: fc.nat(1),
          peer: fc.integer({ min: 1, max: 30 }),
          family: fc.constantFrom(4 as const, 6 as const),
          left: fc.nat(1),
          event: fc.constantFrom(undefined, 'started' as const, 'stopped' as const, 'completed' as const),
          place: fc.integer({ min: 1, max: 5 }),
          ownFamilyOnly: fc.boolean(),
        }),
      },
      {
        weight: 1,
        arbitrary: fc.record({
          kind: fc.constant('wait' as const),
          ms: fc.integer({ min: 1000, max: 70_000 }),
        }),
      },
    )
    interface Known {
      seeder: boolean
      place: number
      until: number
    }
    await fc.assert(
      fc.asyncProperty(fc.array(step, { maxLength: 150 }), async (steps) => {
        const clock = { nowMs: 1_000_000 }
        await using store = await open(clock)
        const model = [0, 1].map(() => ({ peers: new Map<string, Known>(), downloaded: 0 }))
        for (const one of steps) {
          if (one.kind === 'wait') {
            clock.nowMs += one.ms
            continue
          }
          const { peers, ...swarm } = model[one.swarm] ?? assert.fail()
          for (const { peers: all } of model)
            for (const [key, { until }] of all) if (until + 2000 < clock.nowMs) all.delete(key)
          // Between due and two ticks later either answer is right; such steps are left out.
          if ([...peers.values()].some(({ until }) => until <= clock.nowMs)) continue
          const key = `${one.family} ${one.peer}`
          const seeder = one.left === 0
          const before = peers.get(key)
          if (one.event === 'stopped') {
            peers.delete(key)
          } else {
            const completed = before ? seeder && !before.seeder : seeder && one.event === 'completed'
            if (completed) swarm.downloaded++
            peers.set(key, { seeder, place: one.place, until: clock.nowMs + 60_000 })
          }
          model[one.swarm] = { peers, ...swarm }
          const { announce, seen } = announceOf(one)
          const reply = await store.announce(announce)
          const all = [...peers]
          assert.deepEqual(reply.counts, {
            complete: all.filter(([, peer]) => peer.seeder).length,
            incomplete: all.filter(([, peer]) => !peer.seeder).length,
            downloaded: swarm.downloaded,
          })
          assert.deepEqual(await store.scrape(announce.infoHash), reply.counts)
          const others = all
            .filter(
              ([other]) => other !== key && (!one.ownFamilyOnly || other.startsWith(String(one.family))),
            )
            .map(([other, peer]) => ({ other, distance: distanceOf(peer.place, one.place), ...peer }))
          if (one.event === 'stopped') {
            assert.deepEqual(peersOf(reply), [])
            continue
          }
          for (const level of seen.view?.levels ?? assert.fail()) {
            const there = others.filter(({ distance }) => distance === level.distance)
            assert.equal(level.seeders, there.filter((peer) => peer.seeder).length)
            assert.equal(level.leechers, there.filter((peer) => !peer.seeder).length)
          }
          const sampled = peersOf(reply)
          for (const family of [4, 6]) {
            const distances = sampled.filter((peer) => peer.family === family).map(({ distance }) => distance)
            assert.deepEqual(
              distances,
              distances.toSorted((a, b) => a - b),
              'nearest first',
            )
          }
          assert.deepEqual(
            sampled.map(({ family, peer, distance }) => `${family} ${peer} ${distance}`).sort(),
            others.map(({ other, distance }) => `${other} ${distance}`).sort(),
          )
        }
      }),
      { numRuns: 200 },
    )
  })

  test(`${name}: a completion is counted once`, async () => {
    await using store = await open({ nowMs: 1000 })
    const announce = async (fields: PeerFields) => store.announce(announceOf(fields).announce)
    await announce({ peer: 1, left: 5, event: 'started' })
    await announce({ peer: 1, left: 0, event: 'completed' })
    await announce({ peer: 1, left: 0, event: 'completed' })
    await announce({ peer: 2, left: 0, event: 'started' })
    assert.deepEqual(await store.scrape(infoHashFromHex('0'.repeat(40))), {
      complete: 2,
      incomplete: 0,
      downloaded: 1,
    })
  })

  test(`${name}: a peer that is given a shorter life than before goes after the shorter one`, async () => {
    const clock = { nowMs: 1_000_000 }
    await using store = await open(clock)
    await store.announce(announceOf({ peer: 1, lifeMs: 3_000_000 }).announce)
    await store.announce(announceOf({ peer: 1, lifeMs: 30_000 }).announce)
    clock.nowMs += 33_000
    assert.equal((await store.scrape(infoHashFromHex('0'.repeat(40)))).incomplete, 0)
  })

  // Near and far, few and many, in one rack, in racks of ten, and each in a rack of its own.
  const shapes = [
    { shape: 'one rack', place: () => 1, from: 1, distance: 0 },
    { shape: 'racks of a row', place: (peer: number) => (peer % 2) + 1, from: 1, distance: 1 },
    {
      shape: 'a rack beside a large one',
      place: (peer: number) => (peer <= 100 ? 3 : 1),
      from: 1,
      distance: 2,
    },
    { shape: 'racks of one peer', place: (peer: number) => 100 + peer, from: 1, distance: 2 },
    { shape: 'one rack of thousands', place: () => 1, from: 1, distance: 0 },
    // Some racks large, some of one peer, and thousands of peers: none may be met less for its small rack.
    {
      shape: 'thousands of peers',
      place: (peer: number) => (peer % 3 === 0 ? 100 + peer : 100 + (peer % 7)),
      from: 1,
      distance: 2,
    },
  ]
  for (const { shape, place, from, distance } of shapes) {
    test(`${name}: a sample is bounded and every peer is as likely to be in it (${shape})`, async () => {
      await using store = await open({ nowMs: 1000 })
      const total = shape.includes('thousands') ? 2500 : shape === 'a rack beside a large one' ? 600 : 200
      await severally(total, (i) => {
        const peer = i + 1
        const { announce } = announceOf({ peer, place: place(peer) }, 0)
        return store.announce(
          place(peer) > 100 ? { ...announce, ancestors: [{ node: rootPlace, distance: 2 }] } : announce,
        )
      })
      const seen = new Map<number, number>()
      const rounds = 5000
      const want = shape.includes('thousands') ? 27 : 10
      const check = (reply: StoreReply) => {
        const drawn = peersOf(reply).filter((peer) => peer.distance === distance)
        assert.equal(drawn.length, want)
        assert.equal(new Set(drawn.map(({ peer }) => peer)).size, want, 'nobody twice')
        for (const { peer } of drawn) seen.set(peer, (seen.get(peer) ?? 0) + 1)
      }
      await severally(rounds, () => {
        const reply = store.announce(announceOf({ peer: 9999, place: from }, want).announce)
        if (reply instanceof Promise) return reply.then(check)
        check(reply)
        return undefined
      })
      const there = Array.from({ length: total }, (_, i) => i + 1).filter(
        (peer) => (place(peer) > 100 ? 2 : distanceOf(place(peer), from)) === distance,
      )
      const expected = (rounds * want) / there.length
      for (const peer of there)
        assert.ok(
          Math.abs((seen.get(peer) ?? 0) - expected) < 6 * Math.sqrt(expected),
          `peer ${peer}: ${seen.get(peer) ?? 0}, expected ${expected}`,
        )
      assert.equal(seen.size, there.length)
    })
  }

  test(`${name}: of the leechers of a rack, the ranks of the first eight are each given once, whoever comes and goes`, async () => {
    await using store = await open({ nowMs: 1000 })
    const rankOf = async (peer: number) => {
      const { announce, seen } = announceOf({ peer, place: 1 })
      await store.announce(announce)
      return seen.view?.gatewayRank ?? assert.fail()
    }
    const there = new Set<number>()
    const numbers = fc.sample(fc.integer({ min: 1, max: 60 }), 400)
    for (const peer of numbers) {
      if (there.delete(peer)) await store.announce(announceOf({ peer, place: 1, event: 'stopped' }).announce)
      else {
        await rankOf(peer)
        there.add(peer)
      }
      const ranks = await Promise.all([...there].map(rankOf))
      assert.deepEqual(
        ranks.filter((rank) => rank < 8).sort((a, b) => a - b),
        Array.from({ length: Math.min(8, there.size) }, (_, rank) => rank),
      )
    }
  })

  test(`${name}: all swarms can be listed, those without peers for their completions`, async () => {
    await using store = await open({ nowMs: 1000 })
    for (let swarm = 0; swarm < 50; swarm++) {
      await store.announce(announceOf({ peer: 1, swarm }).announce)
      if (swarm % 2 === 0) await store.announce(announceOf({ peer: 1, swarm, left: 0 }).announce)
      if (swarm % 3 === 0) await store.announce(announceOf({ peer: 1, swarm, event: 'stopped' }).announce)
    }
    const listed = new Map<string, unknown>()
    for await (const part of store.swarms())
      for (const [infoHash, counts] of part) listed.set(infoHash, counts)
    for (let swarm = 0; swarm < 50; swarm++) {
      const infoHash = infoHashFromHex(String(swarm).padStart(40, '0'))
      const [completed, stopped] = [swarm % 2 === 0, swarm % 3 === 0]
      assert.deepEqual(
        listed.get(infoHash),
        stopped && !completed
          ? undefined
          : {
              complete: completed && !stopped ? 1 : 0,
              incomplete: !completed && !stopped ? 1 : 0,
              downloaded: completed ? 1 : 0,
            },
      )
    }
  })
}
