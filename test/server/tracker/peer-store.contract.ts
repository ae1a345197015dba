import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { endpoint } from '../../../lib/protocol/address.ts'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import type { PeerStore, StoreAnnounce } from '../../../server/tracker/peer-store.ts'

export interface Clock {
  nowMs: number
}

const announceOf = (peer: number, fields: Partial<StoreAnnounce> & { swarm?: number }): StoreAnnounce => ({
  infoHash: infoHashFromHex(String(fields.swarm ?? 0).padStart(40, '0')),
  endpoint: endpoint({ family: 4, bytes: Uint8Array.of(10, 0, 0, peer) }, 6881),
  peerId: Buffer.alloc(20, peer),
  place: peer % 3,
  left: 1,
  event: undefined,
  lifetimeMs: () => 60_000,
  distanceTo: (place) => (place === peer % 3 ? 0 : 1),
  perLevelMax: 1000,
  ...fields,
})

/** What every PeerStore must do; `open` gives an empty one that reads the time from `clock`. */
export function peerStoreContract(name: string, open: (clock: Clock) => Promise<PeerStore>): void {
  test(`${name}: counts, samples, completions and expiry are those of a plain model`, async () => {
    const step = fc.oneof(
      fc.record({
        kind: fc.constant('announce' as const),
        swarm: fc.nat(1),
        peer: fc.integer({ min: 1, max: 12 }),
        left: fc.nat(1),
        event: fc.constantFrom(undefined, 'started' as const, 'stopped' as const, 'completed' as const),
        place: fc.nat(2),
      }),
      fc.record({ kind: fc.constant('wait' as const), ms: fc.integer({ min: 1000, max: 70_000 }) }),
    )
    await fc.assert(
      fc.asyncProperty(fc.array(step, { maxLength: 60 }), async (steps) => {
        const clock = { nowMs: 1_000_000 }
        await using store = await open(clock)
        const model = [0, 1].map(() => new Map<number, { seeder: boolean; place: number; until: number }>())
        for (const one of steps) {
          if (one.kind === 'wait') {
            clock.nowMs += one.ms
            continue
          }
          const swarm = model[one.swarm] ?? assert.fail()
          for (const [peer, { until }] of swarm) if (until + 2000 < clock.nowMs) swarm.delete(peer)
          // Between due and two ticks later either answer is right; such steps are left out.
          if ([...swarm.values()].some(({ until }) => until <= clock.nowMs)) continue
          const seeder = one.left === 0 || one.event === 'completed'
          if (one.event === 'stopped') swarm.delete(one.peer)
          else swarm.set(one.peer, { seeder, place: one.place, until: clock.nowMs + 60_000 })
          const view = await store.announce(
            announceOf(one.peer, {
              swarm: one.swarm,
              left: seeder ? 0 : 1,
              event: one.event,
              place: one.place,
              distanceTo: (place) => (place === one.place ? 0 : 1),
            }),
          )
          const all = [...swarm]
          assert.equal(view.counts.complete, all.filter(([, peer]) => peer.seeder).length, 'complete')
          assert.equal(view.counts.incomplete, all.filter(([, peer]) => !peer.seeder).length, 'incomplete')
          const sampled = view.levels
            .flatMap(({ distance, seeders, leechers }) => [
              ...seeders.map((peer) => [peer.endpoint.compact[3], distance, true]),
              ...leechers.map((peer) => [peer.endpoint.compact[3], distance, false]),
            ])
            .sort((a, b) => Number(a[0]) - Number(b[0]))
          const expected =
            one.event === 'stopped'
              ? []
              : all
                  .filter(([peer]) => peer !== one.peer)
                  .map(([peer, { place, seeder: seeds }]) => [peer, place === one.place ? 0 : 1, seeds])
                  .sort((a, b) => Number(a[0]) - Number(b[0]))
          assert.deepEqual(sampled, expected)
        }
      }),
      { numRuns: 300 },
    )
  })

  test(`${name}: a completion is counted once`, async () => {
    await using store = await open({ nowMs: 0 })
    const infoHash = infoHashFromHex('0'.repeat(40))
    await store.announce(announceOf(1, { left: 5, event: 'started' }))
    await store.announce(announceOf(1, { left: 0, event: 'completed' }))
    await store.announce(announceOf(1, { left: 0, event: 'completed' }))
    await store.announce(announceOf(2, { left: 0, event: 'started' }))
    assert.deepEqual(await store.scrape(infoHash), { complete: 2, incomplete: 0, downloaded: 1 })
  })

  test(`${name}: a sample is bounded and every peer is as likely to be in it`, async () => {
    await using store = await open({ nowMs: 0 })
    for (let peer = 1; peer <= 100; peer++) await store.announce(announceOf(peer, { place: 0, left: 1 }))
    const seen = new Map<number, number>()
    for (let i = 0; i < 2000; i++) {
      const { levels } = await store.announce(
        announceOf(101, { place: 0, perLevelMax: 10, distanceTo: () => 0 }),
      )
      assert.equal(levels[0]?.leechers.length, 10)
      for (const {
        endpoint: { compact },
      } of levels[0].leechers)
        seen.set(compact[3] ?? 0, (seen.get(compact[3] ?? 0) ?? 0) + 1)
    }
    // 200 expected of each, σ ≈ 13: five σ either way.
    for (let peer = 1; peer <= 100; peer++)
      assert.ok(Math.abs((seen.get(peer) ?? 0) - 200) < 68, `peer ${peer}: ${seen.get(peer) ?? 0}`)
  })
}
