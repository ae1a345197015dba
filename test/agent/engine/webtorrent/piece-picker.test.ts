import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { createPiecePicker } from '../../../../agent/engine/webtorrent/piece-picker.ts'

const open = { _chunks: 4, _reservations: 0, _cancellations: null }
const begun = { ...open, _reservations: 2 }
const asked = { ...open, _reservations: 4 }

test('the rarest piece that the peer has and nobody was asked for whole; one begun already goes first', () => {
  const piece = fc.record({
    state: fc.constantFrom(null, open, begun, asked),
    peers: fc.nat(5),
    has: fc.boolean(),
  })
  fc.assert(
    fc.property(fc.array(piece, { maxLength: 40 }), (given) => {
      const picker = createPiecePicker(given.length, Math.random)
      const next = picker.next(
        given.map(({ state }) => state),
        given.map(({ peers }) => peers),
        (index) => given[index]?.has === true,
      )
      const wanted = given.filter(({ state, has }) => has && state !== null && state !== asked)
      if (next === undefined) return assert.equal(wanted.length, 0)
      const chosen = given[next]
      assert.ok(chosen && wanted.includes(chosen))
      if (wanted.some(({ state }) => state === begun)) return assert.equal(chosen.state, begun)
      assert.equal(chosen.peers, Math.min(...wanted.map(({ peers }) => peers)))
    }),
  )
})

test('hosts begin with different pieces', () => {
  const first = new Set(
    Array.from({ length: 50 }, () =>
      createPiecePicker(1000, Math.random).next(
        Array(1000).fill(open) as (typeof open)[],
        Array(1000).fill(1) as number[],
        () => true,
      ),
    ),
  )
  assert.ok(first.size > 40)
})
