import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { LevelCounts } from '../../../server/tracker/peer-store.ts'
import { planSelection } from '../../../server/tracker/selection.ts'

const level = (distance: number) =>
  // Often nobody holds all, nearby or anywhere: that is when selection matters.
  fc
    .tuple(fc.oneof(fc.constant(0), fc.nat(60)), fc.nat(60))
    .map(([seeders, leechers]): LevelCounts => ({ distance, seeders, leechers }))

const between = { min: 1e-6, max: 1, noNaN: true }
const input = fc.record({
  levels: fc.tuple(level(0), level(1), level(2), level(3)),
  numwant: fc.nat(100),
  gatewayRank: fc.nat(20),
  seeding: fc.boolean(),
  gatewaysPerRack: fc.integer({ min: 1, max: 4 }),
  reservePeers: fc.integer({ min: 1, max: 8 }),
  // As without costs, or however dear the ways are.
  shares: fc.oneof(
    fc.constant([0, 1 / 2, 1 / 2, 1]),
    fc.tuple(fc.double(between), fc.double(between)).map(([a, b]) => [0, a, b, 1]),
  ),
})

const sum = (values: readonly number[]) => values.reduce((total, value) => total + value, 0)

test('planSelection(): as many as wanted, no more than there are, and no rack nor row is an island', () => {
  fc.assert(
    fc.property(input, ({ levels, gatewayRank, ...rest }) => {
      const view = { counts: { complete: 0, incomplete: 0, downloaded: 0 }, gatewayRank, levels }
      const { rack, seeders, leechers, gateway } = planSelection({ view, ...rest })
      assert.ok(rack >= 0 && rack <= levels[0].seeders + levels[0].leechers, 'more than the rack has')
      for (const [i, there] of levels.entries()) {
        const [seedersChosen, leechersChosen] = [seeders[i] ?? assert.fail(), leechers[i] ?? assert.fail()]
        assert.ok(seedersChosen >= 0 && seedersChosen <= there.seeders, 'seeders that are not there')
        assert.ok(leechersChosen >= 0 && leechersChosen <= there.leechers, 'leechers that are not there')
      }
      const available = sum(levels.map((there) => there.leechers + (rest.seeding ? 0 : there.seeders)))
      assert.equal(rack + sum(seeders) + sum(leechers), Math.min(rest.numwant, available))
      if (rest.seeding) {
        assert.equal(gateway, false)
        assert.equal(rack + sum(seeders), 0)
        return
      }
      if (rest.numwant < 2) return
      const far = levels.slice(1)
      const farChosen = sum(seeders.slice(1)) + sum(leechers.slice(1))
      if (far.some((there) => there.seeders + there.leechers > 0)) assert.ok(farChosen > 0, 'an island')
      const holding = far.findIndex((there) => there.seeders > 0)
      if (holding >= 0)
        assert.ok((seeders[holding + 1] ?? 0) > 0, 'nobody that holds all, though there is one')
      if (levels[0].seeders + levels[0].leechers > 0) assert.ok(rack > 0, 'the own rack was left out')
      const populated = far.filter((there) => there.seeders + there.leechers > 0).length
      // Two of three may be of one level, which holds all.
      if (populated > 1 && farChosen > 2) {
        const heardOf = far.filter((_, i) => (seeders[i + 1] ?? 0) + (leechers[i + 1] ?? 0) > 0).length
        assert.ok(heardOf > 1, 'a row or zone that is an island, since the way out of it is dear')
      }
    }),
    { numRuns: 2000 },
  )
})

test('a rack has one gateway for every four leechers, two at least, up to the maximum', () => {
  const gateways = (leechers: number) =>
    Array.from({ length: leechers }, (_, gatewayRank) =>
      planSelection({
        view: {
          counts: { complete: 0, incomplete: leechers, downloaded: 0 },
          gatewayRank,
          levels: [{ distance: 0, seeders: 0, leechers: leechers - 1 }],
        },
        seeding: false,
        numwant: 50,
        gatewaysPerRack: 3,
        reservePeers: 4,
        shares: [0, 1],
      }),
    ).filter(({ gateway }) => gateway).length
  assert.deepEqual([1, 2, 4, 8, 9, 40].map(gateways), [1, 2, 2, 2, 3, 3])
})

test('without costs each far level has half of what nearer ones leave; dear ways get less, and cheap ones what others cannot use', () => {
  const everywhere = [60, 100, 100, 100]
  const half = [0, 1 / 2, 1 / 2, 1]
  assert.deepEqual(farOf(half, everywhere), [13, 6, 6])
  assert.deepEqual(farOf([0, 1 / 3, 1 / 2, 1], everywhere), [9, 8, 8])
  // However dear: one place each, for what only they have.
  assert.deepEqual(farOf([0, 1, 1, 1], everywhere), [23, 1, 1])
  assert.deepEqual(farOf([0, 0.8, 0.999, 1], everywhere), [20, 4, 1])
  assert.deepEqual(farOf([0, 0.9, 0.9, 1], [60, 0, 100, 100]), [0, 23, 2])
  assert.deepEqual(farOf([0, 0.1, 0.1, 1], [60, 100, 0, 3]), [22, 0, 3])
})

/** Far leechers by distance that a gateway of a rack without seeders hears of; it wants 75, and a third of them are far. */
function farOf(shares: readonly number[], peers: readonly number[]): readonly number[] {
  const { leechers } = planSelection({
    view: {
      counts: { complete: 0, incomplete: 0, downloaded: 0 },
      gatewayRank: 0,
      levels: peers.map((leechersThere, distance) => ({ distance, seeders: 0, leechers: leechersThere })),
    },
    seeding: false,
    numwant: 75,
    gatewaysPerRack: 3,
    reservePeers: 4,
    shares,
  })
  return leechers.slice(1)
}
