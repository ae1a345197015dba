import assert from 'node:assert/strict'
import { test } from 'node:test'
import { endpoint } from '../../../lib/protocol/address.ts'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import { createMemoryPeerStore } from '../../../server/tracker/memory-peer-store.ts'
import { peerStoreContract } from './peer-store.contract.ts'

peerStoreContract('memory', async (clock) =>
  createMemoryPeerStore({ peersMax: 1000, swarmsMax: 100, random: Math.random, now: () => clock.nowMs }),
)

test('memory: an announce beyond the bound is answered, not stored, and counted', async () => {
  await using store = createMemoryPeerStore({ peersMax: 2, swarmsMax: 10, random: Math.random, now: () => 0 })
  for (let peer = 1; peer <= 5; peer++) {
    const view = await store.announce({
      infoHash: infoHashFromHex('0'.repeat(40)),
      endpoint: endpoint({ family: 4, bytes: Uint8Array.of(10, 0, 0, peer) }, 6881),
      peerId: Buffer.alloc(20),
      place: 0,
      left: 1,
      event: 'started',
      lifetimeMs: () => 60_000,
      distanceTo: () => 0,
      perLevelMax: 10,
    })
    assert.ok(view.levels.length <= 1)
  }
  const { leechers, refused } = store.totals()
  assert.deepEqual({ leechers, refused }, { leechers: 2, refused: 3 })
})
