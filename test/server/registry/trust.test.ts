import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { claimFits, fits } from '../../../server/registry/trust.ts'

test('a claim fits a text, one of several, a beginning or a pattern', () => {
  for (const [pattern, claim, expected] of [
    ['123', '123', true],
    ['123', 123, true],
    ['true', true, true],
    ['123', '1234', false],
    [['a', 'b'], 'b', true],
    [['a', 'b'], 'c', false],
    [{ prefix: 'refs/tags/' }, 'refs/tags/v1', true],
    [{ prefix: 'refs/tags/' }, 'refs/heads/refs/tags/', false],
    [{ glob: 'refs/heads/release-*' }, 'refs/heads/release-1.2', true],
    [{ glob: 'refs/heads/release-*' }, 'refs/heads/release-1/evil', false],
    [{ glob: 'refs/heads/**' }, 'refs/heads/a/b', true],
    [{ glob: 'a.c' }, 'abc', false],
    ['admins', ['users', 'admins'], true],
    ['admins', [['admins']], false],
    ['null', null, false],
    ['[object Object]', {}, false],
  ] as const)
    assert.equal(
      claimFits(pattern, claim),
      expected,
      `${JSON.stringify(pattern)} on ${JSON.stringify(claim)}`,
    )
})

test('an entry fits only its issuer, its audience, and all of its claims', () => {
  const entry = {
    issuer: 'https://i',
    audience: 'us',
    claims: { repository_id: '1', ref: 'refs/heads/main' },
  }
  const token = {
    issuer: 'https://i',
    audience: ['them', 'us'],
    claims: { repository_id: '1', ref: 'refs/heads/main' },
  }
  assert.ok(fits(entry, token))
  assert.ok(!fits(entry, { ...token, issuer: 'https://i/' }))
  assert.ok(!fits(entry, { ...token, audience: ['them'] }))
  assert.ok(!fits(entry, { ...token, claims: { repository_id: '1' } }))
  assert.ok(!fits(entry, { ...token, claims: { ...token.claims, repository_id: '2' } }))
  // What every object has is no claim.
  assert.ok(!fits({ ...entry, claims: { constructor: { glob: '**' } } }, token))
})

test('a pattern fits what a regular expression made of it does, however it is written', () => {
  const letters = fc.array(fc.constantFrom('a', 'b', '/', '.', '*', '+', '(', '\\', 'é', '😀'), {
    maxLength: 8,
  })
  fc.assert(
    fc.property(letters, letters, (pattern, text) => {
      const glob = pattern.join('')
      const source = glob
        .split(/(\*\*|\*)/)
        .map((part) =>
          part === '**' ? '.*' : part === '*' ? '[^/]*' : part.replace(/[.*+?^${}()|[\]\\/]/g, '\\$&'),
        )
        .join('')
      assert.equal(claimFits({ glob }, text.join('')), new RegExp(`^${source}$`, 'su').test(text.join('')))
    }),
    { numRuns: 5000 },
  )
})

test('a pattern of many stars takes no longer for a text that almost fits', () => {
  const startedAt = performance.now()
  assert.equal(claimFits({ glob: `${'**a'.repeat(90)}b` }, 'a'.repeat(5000)), false)
  assert.ok(performance.now() - startedAt < 5000)
})
