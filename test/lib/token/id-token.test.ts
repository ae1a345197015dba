import assert from 'node:assert/strict'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import fc from 'fast-check'
import { silentLog } from '../../../lib/runtime/log.ts'
import { TokenError } from '../../../lib/token/claims.ts'
import type { IdTokenVerifier } from '../../../lib/token/id-token.ts'
import { IssuerUnavailable, openIdTokenVerifier } from '../../../lib/token/id-token.ts'
import type { KeySetUrl } from '../../../lib/token/key-set-url.ts'
import { createAuthority } from '../../support/certificates.ts'
import { spoiltText } from '../../support/fuzz.ts'
import { confusedToken, encode, signToken, startIssuer } from '../../support/issuer.ts'
import { makeTestKey } from '../../support/key-server.ts'

test('a token of a trusted issuer is read, whose keys are found by discovery, over HTTPS too', async (t) => {
  const authority = createAuthority('issuer-ca')
  const { cert, key } = authority.issue('127.0.0.1')
  for (const tls of [undefined, { cert: cert.toString(), key: key.toString() }]) {
    const issuer = await startIssuer(t, tls ? { tls } : {})
    const { verifier } = await open(t, issuer.url, tls ? { ca: authority.cert.toString() } : {})
    const read = await verifier.verify(issuer.token({ repository_id: '123', aud: ['a', 'rackswarm'] }))
    assert.deepEqual(
      [read.issuer, read.subject, read.audience, read.claims['repository_id']],
      [issuer.url, 'job', ['a', 'rackswarm'], '123'],
    )
    // The same token again is the same: whoever replays it gets what its bearer gets.
    assert.deepEqual(await verifier.verify(issuer.token()), await verifier.verify(issuer.token()))
  }
})

test('each forged or foreign token is refused for its own reason', async (t) => {
  const issuer = await startIssuer(t)
  const { verifier } = await open(t, issuer.url)
  const ec = makeTestKey('ec')
  issuer.state.keys = [issuer.key, ec]
  assert.equal(await faultOf(verifier, issuer.token({}, ec)), undefined, 'an algorithm of the list')
  const claims = { iss: issuer.url, sub: 'job', aud: 'rackswarm', exp: Math.floor(Date.now() / 1000) + 300 }
  const stranger = { ...makeTestKey('issuer-1', 'RS256') }
  const good = issuer.token()
  const unsigned = [{ alg: 'none', kid: 'issuer-1' }, claims].map(encode).join('.')
  const past = Math.floor(Date.now() / 1000) - 3600
  const tokens: [what: string, token: string, fault: string][] = [
    [
      'another issuer',
      signToken({ ...claims, iss: 'https://elsewhere.example' }, issuer.key),
      'wrong_issuer',
    ],
    ['its name with a slash', issuer.token({ iss: `${issuer.url}/` }), 'wrong_issuer'],
    ['expired', issuer.token({ exp: past }), 'expired'],
    ['without an end', issuer.token({ exp: undefined }), 'missing_claim'],
    ['without an audience', issuer.token({ aud: undefined }), 'missing_claim'],
    ['not valid yet', issuer.token({ nbf: past + 7200 }), 'not_yet_valid'],
    ['an end in words', issuer.token({ exp: 'tomorrow' }), 'bad_claim'],
    ['an audience that is none', issuer.token({ aud: [{}] }), 'bad_claim'],
    ['alg none', `${unsigned}.`, 'wrong_algorithm'],
    ['alg none with a signature', `${unsigned}.${good.split('.')[2] ?? ''}`, 'wrong_algorithm'],
    ['HMAC under the public key', confusedToken(claims, issuer.key), 'wrong_algorithm'],
    ['the algorithm of another key', signToken(claims, { ...ec, kid: 'issuer-1' }), 'wrong_algorithm'],
    ['a key of the same name', signToken(claims, stranger), 'bad_signature'],
    ['an unknown key', signToken(claims, { ...stranger, kid: 'nobody' }), 'unknown_key'],
    ['no key', issuer.token({}, issuer.key, { kid: undefined }), 'unknown_key'],
    [
      'a key that the token brings along',
      issuer.token({}, { ...stranger, kid: 'own' }, { jwk: stranger.jwk }),
      'unknown_key',
    ],
    ['something that must be understood', issuer.token({}, issuer.key, { crit: ['exp'] }), 'malformed'],
    [
      'other claims',
      `${good.split('.')[0] ?? ''}.${encode({ ...claims, sub: 'root' })}.${good.split('.')[2] ?? ''}`,
      'bad_signature',
    ],
    ['too long', issuer.token({ groups: 'x'.repeat(20_000) }), 'malformed'],
    ['nothing', '', 'malformed'],
  ]
  for (const [what, token, fault] of tokens) assert.equal(await faultOf(verifier, token), fault, what)
  assert.equal(await faultOf(verifier, good), undefined)
})

test('a key that the issuer has rotated to is found, an unknown one looked for at most every 10 s', async (t) => {
  const issuer = await startIssuer(t)
  const { verifier, clock } = await open(t, issuer.url)
  const next = makeTestKey('issuer-2', 'Ed25519')
  issuer.state.keys = [next]
  assert.equal(await faultOf(verifier, issuer.token({}, next)), undefined)
  assert.equal(await faultOf(verifier, issuer.token()), 'unknown_key', 'the old one is gone')
  const before = issuer.state.keyRequests
  for (let i = 0; i < 50; i++)
    assert.equal(await faultOf(verifier, issuer.token({}, { ...next, kid: `guess-${i}` })), 'unknown_key')
  assert.equal(issuer.state.keyRequests, before)
  clock.now += 10_000
  assert.equal(await faultOf(verifier, issuer.token({}, { ...next, kid: 'guess' })), 'unknown_key')
  assert.equal(issuer.state.keyRequests, before + 1)
})

test('while an issuer is down its last keys count, over a restart too; without any it is said so', async (t) => {
  const issuer = await startIssuer(t)
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-issuer-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const cacheFile = join(directory, 'keys.json')
  const token = issuer.token()
  {
    const { verifier } = await open(t, issuer.url, { cacheFile })
    assert.equal(await faultOf(verifier, token), undefined)
    issuer.state.isDown = true
    assert.equal(await faultOf(verifier, token), undefined)
  }
  const { verifier } = await open(t, issuer.url, { cacheFile })
  assert.equal(await faultOf(verifier, token), undefined)
  const { verifier: fresh, clock } = await open(t, issuer.url)
  await assert.rejects(
    fresh.verify(token),
    (error) => error instanceof IssuerUnavailable && /503/.test(error.message),
  )
  issuer.state.isDown = false
  clock.now += 10_000
  assert.equal(await faultOf(fresh, token), undefined)
})

test('an OpenID configuration that is not the issuer’s own is not followed', async (t) => {
  const issuer = await startIssuer(t)
  const elsewhere = await startIssuer(t)
  for (const [configuration, why] of [
    [{ issuer: elsewhere.url }, /that of another issuer/],
    [{ issuer: undefined }, /that of another issuer/],
    [{ jwks_uri: undefined }, /no jwks_uri/],
    [{ jwks_uri: 'file:///etc/passwd' }, /no jwks_uri/],
    [{ jwks_uri: 5 }, /no jwks_uri/],
  ] as const) {
    issuer.state.configuration = configuration
    const { verifier } = await open(t, issuer.url)
    await assert.rejects(
      verifier.verify(issuer.token()),
      (error) => error instanceof IssuerUnavailable && why.test(error.message),
      JSON.stringify(configuration),
    )
  }
})

test('any text is a token, or refused with a TokenError', async (t) => {
  const issuer = await startIssuer(t)
  const { verifier } = await open(t, issuer.url)
  await fc.assert(
    fc.asyncProperty(spoiltText([issuer.token()]), async (text) => {
      await faultOf(verifier, text)
    }),
    { numRuns: 500 },
  )
})

async function open(t: TestContext, issuer: string, options: Partial<KeySetUrl> = {}) {
  const clock = { now: Date.now() }
  const verifier = await openIdTokenVerifier({
    issuers: new Map([[issuer, { url: `${issuer}/.well-known/openid-configuration`, issuer, ...options }]]),
    clockToleranceMs: 120_000,
    now: () => clock.now,
    random: Math.random,
    log: silentLog(),
  })
  t.after(() => verifier[Symbol.asyncDispose]())
  return { verifier, clock }
}

async function faultOf(verifier: IdTokenVerifier, token: string): Promise<string | undefined> {
  try {
    await verifier.verify(token)
    return undefined
  } catch (error) {
    if (error instanceof TokenError) return error.fault
    throw error
  }
}
