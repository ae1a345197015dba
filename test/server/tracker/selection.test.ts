import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { endpoint } from '../../../lib/protocol/address.ts'
import type { LevelSample, SampledPeer } from '../../../server/tracker/peer-store.ts'
import { selectPeers } from '../../../server/tracker/selection.ts'

let nextPort = 1
const peers = (count: number): SampledPeer[] =>
  Array.from({ length: count }, () => ({
    endpoint: endpoint({ family: 4, bytes: Uint8Array.of(10, 0, 0, 1) }, (nextPort++ % 65_535) + 1),
    peerId: new Uint8Array(20),
    place: 0,
  }))

const level = (distance: number) =>
  // Often nobody holds all, nearby or anywhere: that is when selection matters.
  fc.tuple(fc.oneof(fc.constant(0), fc.nat(60)), fc.nat(60)).map(([seeders, leechers]): LevelSample => ({
    distance,
    seeders: peers(seeders),
    leechers: peers(leechers),
  }))

const input = fc.record({
  levels: fc.tuple(level(0), level(1), level(2), level(255)),
  numwant: fc.nat(100),
  gatewayRank: fc.nat(20),
  seeding: fc.boolean(),
  gatewaysPerRack: fc.integer({ min: 1, max: 4 }),
  reservePeers: fc.integer({ min: 1, max: 8 }),
  seed: fc.infiniteStream(fc.double({ min: 0, max: 0.999, noNaN: true })),
})

test('selectPeers(): never more than wanted, nearest first, nobody twice, and no rack nor row is an island', () => {
  fc.assert(
    fc.property(input, ({ levels, seed, gatewayRank, ...rest }) => {
      const rack = { seeders: levels[0].seeders.length, leechers: levels[0].leechers.length }
      const view = { counts: { complete: 0, incomplete: 0, downloaded: 0 }, rack, gatewayRank, levels }
      const random = () => Number(seed.next().value)
      const { peers: chosen, gateway } = selectPeers({ view, random, ...rest })
      assert.ok(chosen.length <= rest.numwant)
      const distances = chosen.map(({ distance }) => distance)
      assert.deepEqual(
        distances,
        [...distances].sort((a, b) => a - b),
      )
      assert.equal(
        new Set(chosen.map(({ endpoint: { compact } }) => Buffer.from(compact).toString('hex'))).size,
        chosen.length,
      )
      if (rest.seeding) {
        assert.equal(gateway, false)
        return
      }
      const farThere = levels.slice(1).some(({ seeders, leechers }) => seeders.length + leechers.length > 0)
      if (rest.numwant >= 2 && farThere)
        assert.ok(
          distances.some((distance) => distance > 0),
          'an island',
        )
      const holding = levels.slice(1).find(({ seeders }) => seeders.length > 0)
      if (rest.numwant >= 2 && holding)
        assert.ok(
          chosen.some(
            (peer) =>
              peer.distance === holding.distance &&
              holding.seeders.some((seeder) => seeder.endpoint === peer.endpoint),
          ),
          'nobody that holds all, though there is one',
        )
      const nearThere = rack.seeders + rack.leechers > 0
      if (rest.numwant >= 2 && nearThere) assert.equal(distances[0], 0, 'the own rack was left out')
      // As many as wanted, where there are as many.
      const available = levels.reduce(
        (sum, { seeders, leechers }) => sum + seeders.length + leechers.length,
        0,
      )
      assert.equal(chosen.length, Math.min(rest.numwant, available))
    }),
    { numRuns: 2000 },
  )
})

test('a rack has one gateway for every eight leechers, up to the maximum', () => {
  const gateways = (leechers: number) => {
    const view = (gatewayRank: number) => ({
      counts: { complete: 0, incomplete: leechers, downloaded: 0 },
      rack: { seeders: 0, leechers: leechers - 1 },
      gatewayRank,
      levels: [],
    })
    return Array.from({ length: leechers }, (_, rank) =>
      selectPeers({
        view: view(rank),
        seeding: false,
        numwant: 50,
        gatewaysPerRack: 3,
        reservePeers: 4,
        random: Math.random,
      }),
    ).filter(({ gateway }) => gateway).length
  }
  assert.deepEqual([1, 2, 8, 9, 17, 40].map(gateways), [1, 1, 1, 2, 3, 3])
})
