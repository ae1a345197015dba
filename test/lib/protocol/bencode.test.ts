import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { Bencoded } from '../../../lib/protocol/bencode.ts'
import { decode, encode } from '../../../lib/protocol/bencode.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import { answersOrRefuses, spoilt } from '../../support/fuzz.ts'

const value: fc.Arbitrary<Bencoded> = fc.letrec<{ value: Bencoded }>((tie) => ({
  value: fc.oneof(
    { maxDepth: 4 },
    fc.maxSafeInteger(),
    fc.uint8Array({ maxLength: 40 }),
    fc.array(tie('value'), { maxLength: 5 }),
    fc
      .array(fc.tuple(fc.string({ unit: 'binary-ascii', maxLength: 8 }), tie('value')), { maxLength: 5 })
      .map((pairs) => new Map(pairs)),
  ),
})).value

test('what encode() writes, decode() reads back, and writing that again gives the same bytes', () => {
  fc.assert(
    fc.property(value, (original) => {
      const bytes = encode(original)
      assert.deepEqual(encode(decode(bytes)), bytes)
    }),
    { numRuns: 2000 },
  )
})

test('decode() answers or throws ClientError, whatever the bytes', () => {
  const good = ['d8:completei1e8:intervali30e5:peers6:abcdefe', 'li1ei2e3:abce', 'd1:ad1:bi0eee'].map(
    (text) => Buffer.from(text),
  )
  answersOrRefuses(spoilt(good), (bytes) => decode(bytes))
})

test('decode() is strict', () => {
  for (const text of [
    '',
    'i01e',
    'i-0e',
    'ie',
    'i1',
    '01:a',
    '2:a',
    'd1:bi1e1:ai1ee',
    'd1:ai1e1:ai2ee',
    'le1',
    'di1ei1ee',
    'i9007199254740993e',
    '99999999999:a',
    '-1:a',
    'x',
  ])
    assert.throws(() => decode(Buffer.from(text)), ClientError, text)
})

test('bencode bombs are refused before they cost memory', () => {
  assert.throws(() => decode(Buffer.from('l'.repeat(1_000_000))), ClientError)
  assert.throws(() => decode(Buffer.from(`l${'le'.repeat(1_000_000)}e`)), ClientError)
  assert.throws(() => decode(Buffer.from('4294967296:')), ClientError)
})
