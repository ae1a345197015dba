import assert from 'node:assert/strict'
import { test } from 'node:test'
import { endpoint } from '../../../lib/protocol/address.ts'
import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import { createMemoryPeerStore } from '../../../server/tracker/memory-peer-store.ts'
import type { StoreAnnounce } from '../../../server/tracker/peer-store.ts'
import { peerStoreContract } from './peer-store.contract.ts'

peerStoreContract('memory', async (clock) =>
  createMemoryPeerStore({ peersMax: 1000, swarmsMax: 100, random: Math.random, now: () => clock.nowMs }),
)

const announce = (fields: Partial<StoreAnnounce>): StoreAnnounce => ({
  infoHash: infoHashOf(0),
  endpoint: endpoint({ family: 4, bytes: Uint8Array.of(10, 0, 0, 1) }, 6881),
  peerId: Buffer.alloc(20),
  place: 0,
  left: 1,
  event: 'started',
  lifetimeMs: () => 60_000,
  distanceTo: () => 0,
  perLevelMax: 10,
  ...fields,
})

test('memory: an announce beyond the bound is answered, not stored, and counted', async () => {
  await using store = createMemoryPeerStore({ peersMax: 2, swarmsMax: 10, random: Math.random, now: () => 0 })
  for (let peer = 1; peer <= 5; peer++) {
    const view = await store.announce(
      announce({ endpoint: endpoint({ family: 4, bytes: Uint8Array.of(10, 0, 0, peer) }, 6881) }),
    )
    assert.ok(view.levels.length <= 1)
  }
  const { leechers, refused } = store.totals()
  assert.deepEqual({ leechers, refused }, { leechers: 2, refused: 3 })
})

test('memory: a new swarm takes the place of one that is empty, however many that have peers are older', async () => {
  await using store = createMemoryPeerStore({
    peersMax: 1000,
    swarmsMax: 100,
    random: Math.random,
    now: () => 0,
  })
  for (let swarm = 0; swarm < 70; swarm++) await store.announce(announce({ infoHash: infoHashOf(swarm) }))
  for (let swarm = 70; swarm < 100; swarm++) {
    const infoHash = infoHashOf(swarm)
    await store.announce(announce({ infoHash }))
    await store.announce(announce({ infoHash, left: 0, event: 'completed' }))
    await store.announce(announce({ infoHash, left: 0, event: 'stopped' }))
  }
  for (let swarm = 100; swarm < 130; swarm++) {
    const { counts } = await store.announce(announce({ infoHash: infoHashOf(swarm) }))
    assert.equal(counts.complete + counts.incomplete, 1)
  }
  const { refused } = store.totals()
  assert.equal(refused, 0)
  // All that is left has peers.
  await store.announce(announce({ infoHash: infoHashOf(130) }))
  const { swarms, refused: refusedThen } = store.totals()
  assert.deepEqual({ swarms, refused: refusedThen }, { swarms: 100, refused: 1 })
})

function infoHashOf(swarm: number): InfoHash {
  return infoHashFromHex(String(swarm).padStart(40, '0'))
}
