import assert from 'node:assert/strict'
import { test } from 'node:test'
import { createRandom } from '../../../lib/runtime/random.ts'
import { createMemoryPeerStore } from '../../../server/tracker/memory/memory-peer-store.ts'
import { announceOf, peerStoreContract } from './peer-store.contract.ts'

const open = (clock: { nowMs: number }, bounds: { peersMax?: number; swarmsMax?: number } = {}) =>
  createMemoryPeerStore({
    peersMax: 5000,
    swarmsMax: 100,
    levels: 2,
    sampleMax: 1000,
    random: createRandom(Math.random),
    now: () => clock.nowMs,
    ...bounds,
  })

peerStoreContract('memory', async (clock) => open(clock))

test('memory: an announce beyond the bound is answered, not stored, and counted', async () => {
  await using store = open({ nowMs: 0 }, { peersMax: 2 })
  for (let peer = 1; peer <= 5; peer++) {
    const { announce, seen } = announceOf({ peer, place: 1 })
    store.announce(announce)
    const [rack] = seen.view?.levels ?? []
    assert.equal(rack?.leechers, Math.min(peer - 1, 2))
  }
  const { leechers, refused } = store.totals()
  assert.deepEqual({ leechers, refused }, { leechers: 2, refused: 3 })
})

test('memory: a new swarm takes the place of one that is empty, however many that have peers are older', async () => {
  await using store = open({ nowMs: 0 })
  const announce = (fields: Partial<Parameters<typeof announceOf>[0]>) =>
    store.announce(announceOf({ peer: 1, ...fields }).announce)
  for (let swarm = 0; swarm < 70; swarm++) announce({ swarm })
  for (let swarm = 70; swarm < 100; swarm++) {
    announce({ swarm })
    announce({ swarm, left: 0, event: 'completed' })
    announce({ swarm, left: 0, event: 'stopped' })
  }
  for (let swarm = 100; swarm < 130; swarm++) {
    const { counts } = announce({ swarm })
    assert.equal(counts.complete + counts.incomplete, 1)
  }
  assert.equal(store.totals().refused, 0)
  // All that is left has peers.
  announce({ swarm: 130 })
  const { swarms, refused } = store.totals()
  assert.deepEqual({ swarms, refused }, { swarms: 100, refused: 1 })
})

test('memory: a store that was full and emptied takes as many peers again, time after time', async () => {
  const clock = { nowMs: 1_000_000 }
  await using store = open(clock, { peersMax: 300, swarmsMax: 300 })
  for (let round = 0; round < 20; round++) {
    for (let peer = 0; peer < 300; peer++)
      store.announce(
        announceOf({ peer, swarm: round % 2 === 0 ? peer : peer % 7, place: (peer % (round + 1)) + 1 })
          .announce,
      )
    assert.deepEqual(store.totals(), {
      swarms: round % 2 === 0 ? 300 : 7,
      seeders: 0,
      leechers: 300,
      refused: 0,
    })
    clock.nowMs += 70_000
    while (store.totals().leechers > 0) store.announce(announceOf({ peer: 1, event: 'stopped' }).announce)
    assert.equal(store.totals().swarms, 0)
  }
})
