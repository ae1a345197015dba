import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { chainStart, createChainCheck, hashOfLine, parseLink } from '../../../lib/protocol/audit-chain.ts'
import { spoiltText } from '../../support/fuzz.ts'

test('a chain that is whole holds, from its first line or from any later one', () => {
  const lines = chainOf(20)
  for (let first = 0; first < lines.length; first++) {
    const check = createChainCheck()
    assert.deepEqual(
      lines.slice(first).flatMap((line) => check.follow(line) ?? []),
      [],
    )
    assert.deepEqual(check.head, { seq: 20, hash: hashOfLine(lines.at(-1) ?? '') })
  }
})

test('a line that was removed, changed, put in or moved shows, wherever it was', () => {
  const lines = chainOf(12)
  const place = fc.integer({ min: 1, max: 10 })
  const edit = fc.oneof(
    place.map((at) => lines.toSpliced(at, 1)),
    place.map((at) => lines.with(at, (lines[at] ?? '').replace('act', 'ACT'))),
    place.map((at) => lines.toSpliced(at, 0, lines[at] ?? '')),
    place.map((at) => [...lines.slice(0, at), lines[at + 1] ?? '', lines[at] ?? '', ...lines.slice(at + 2)]),
    place.map((at) => lines.toSpliced(at, 0, 'nonsense')),
  )
  fc.assert(
    fc.property(edit, (edited) => {
      const check = createChainCheck()
      assert.ok(edited.some((line) => check.follow(line) !== undefined))
    }),
  )
})

test('the first line of all begins the chain, and another one cannot pass for it', () => {
  const [first = ''] = chainOf(1)
  const check = createChainCheck()
  assert.match(
    check.follow(first.replace(chainStart, 'a'.repeat(64))) ?? '',
    /line 0 is not what line 1 says/,
  )
})

test('any text is a link or none', () => {
  fc.assert(
    fc.property(spoiltText(chainOf(2)), (text) => {
      const link = parseLink(text)
      if (link) assert.match(link.prev, /^[0-9a-f]{64}$/)
    }),
  )
})

function chainOf(count: number): string[] {
  let prev = chainStart
  return Array.from({ length: count }, (_, i) => {
    const line = JSON.stringify({ seq: i + 1, prev, target: `act ${i}` })
    prev = hashOfLine(line)
    return line
  })
}
