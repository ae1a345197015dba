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

const input = fc.record({
  levels: fc.tuple(level(0), level(1), level(2), level(3)),
  numwant: fc.nat(100),
  gatewayRank: fc.nat(20),
  seeding: fc.boolean(),
  gatewaysPerRack: fc.integer({ min: 1, max: 4 }),
  reservePeers: fc.integer({ min: 1, max: 8 }),
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
    }),
    { numRuns: 2000 },
  )
})

test('a rack has one gateway for every eight leechers, up to the maximum', () => {
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
      }),
    ).filter(({ gateway }) => gateway).length
  assert.deepEqual([1, 2, 8, 9, 17, 40].map(gateways), [1, 1, 1, 2, 3, 3])
})
