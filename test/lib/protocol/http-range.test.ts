import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { parseRange } from '../../../lib/protocol/http-range.ts'

test('any Range header against any length is a part of it, all of it, or unsatisfiable', () => {
  const number = fc.oneof(
    fc.constant(''),
    fc.nat({ max: 100 }).map(String),
    fc.bigInt({ min: 0n }).map(String),
  )
  const header = fc.oneof(
    fc.string(),
    fc.tuple(number, number).map(([start, end]) => `bytes=${start}-${end}`),
  )
  fc.assert(
    fc.property(header, fc.nat({ max: 100 }), (text, length) => {
      const range = parseRange(text, length)
      if (range === undefined || range === 'unsatisfiable') return
      assert.ok(range.start >= 0 && range.start < range.end && range.end <= length, JSON.stringify(range))
    }),
  )
})
