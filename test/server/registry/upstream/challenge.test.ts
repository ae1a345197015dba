import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { parseChallenges } from '../../../../server/registry/upstream/challenge.ts'
import { answersOrRefuses, spoiltText } from '../../../support/fuzz.ts'

const bearer =
  'Bearer realm="https://auth.example/token?a=b",service="registry.example",scope="repository:team/app:pull,push"'

function plain(header: string) {
  return parseChallenges(header).map(({ scheme, parameters }) => ({
    scheme,
    ...Object.fromEntries(parameters),
  }))
}

test('parseChallenges() reads what registries send', () => {
  const wanted = {
    scheme: 'bearer',
    realm: 'https://auth.example/token?a=b',
    service: 'registry.example',
    scope: 'repository:team/app:pull,push',
  }
  assert.deepEqual(plain(bearer), [wanted])
  assert.deepEqual(plain(`${bearer},error="invalid_token"`), [{ ...wanted, error: 'invalid_token' }])
  assert.deepEqual(plain('BASIC Realm="a \\"b\\", c"'), [{ scheme: 'basic', realm: 'a "b", c' }])
  assert.deepEqual(plain(`Basic realm=plain, ${bearer}`), [{ scheme: 'basic', realm: 'plain' }, wanted])
  assert.deepEqual(plain('Basic'), [{ scheme: 'basic' }])
  assert.deepEqual(plain(''), [])
})

test('parseChallenges() answers whatever it is given, and reads back what was written', () => {
  answersOrRefuses(spoiltText([bearer, `Basic realm="x", ${bearer}`]), parseChallenges)
  const text = fc.string({ unit: fc.constantFrom('a', '"', '\\', ',', '=', ' ', 'é'), maxLength: 20 })
  fc.assert(
    fc.property(text, text, (realm, scope) => {
      const quoted = (value: string) => `"${value.replace(/["\\]/g, '\\$&')}"`
      assert.deepEqual(plain(`Bearer realm=${quoted(realm)} , scope=${quoted(scope)}`), [
        { scheme: 'bearer', realm, scope },
      ])
    }),
  )
})

test('parseChallenges() takes no more time for a header that was made to cost it', () => {
  const started = performance.now()
  for (const part of ['a', 'a=', '"', '\\', ' ', ',', '="', 'a ='])
    parseChallenges(part.repeat(100_000 / part.length))
  assert.ok(performance.now() - started < 2000)
})
