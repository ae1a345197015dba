import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { answerRange, etagOf, parseRange } from '../../../lib/protocol/http-range.ts'

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

test('conditions: what the client has is not sent again, and a range counts only for the same bytes', () => {
  const etag = etagOf('sha256:ab')
  const part = { status: 206, start: 2, end: 4 }
  const whole = { status: 200, start: 0, end: 10 }
  for (const [headers, answer] of [
    [{}, whole],
    [{ range: 'bytes=2-3' }, part],
    [{ range: 'bytes=2-3', 'if-range': etag }, part],
    [{ range: 'bytes=2-3', 'if-range': '"sha256:cd"' }, whole],
    [{ range: 'bytes=2-3', 'if-range': `W/${etag}` }, whole],
    [{ range: 'bytes=2-3', 'if-range': 'Sun, 06 Nov 1994 08:49:37 GMT' }, whole],
    [{ range: 'bytes=10-' }, { status: 416 }],
    [{ 'if-none-match': etag, range: 'bytes=2-3' }, { status: 304 }],
    [{ 'if-none-match': `"x", W/${etag}` }, { status: 304 }],
    [{ 'if-none-match': ' * ' }, { status: 304 }],
    [{ 'if-none-match': '"sha256:abc"' }, whole],
  ] as const)
    assert.deepEqual(answerRange(headers, etag, 10), answer, JSON.stringify(headers))
})
