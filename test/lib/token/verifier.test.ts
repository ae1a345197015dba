import assert from 'node:assert/strict'
import { createHmac, generateKeyPairSync } from 'node:crypto'
import { mkdtemp, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import fc from 'fast-check'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import type { Claims, TokenFault, TokenVerifier } from '../../../lib/token/claims.ts'
import { TokenError } from '../../../lib/token/claims.ts'
import { mintOffline } from '../../../lib/token/offline.ts'
import { importVerificationKey } from '../../../lib/token/verification-key.ts'
import {
  cachedBytesMax,
  cachedTokensMax,
  createVerifier,
  tokenCharactersMax,
} from '../../../lib/token/verifier.ts'
import { createVerifyPool } from '../../../lib/token/verify-pool.ts'
import { openKeySetVerifier } from '../../../lib/token/key-set-verifier.ts'
import { openTokenAuthority } from '../../../lib/token/token-authority.ts'
import { fuzzRuns } from '../../support/fuzz.ts'

const issuer = 'https://rackswarm.example.com'
const infoHash = infoHashFromHex('0123456789abcdef0123456789abcdef01234567')
const hour = 3_600_000
const toleranceMs = 120_000

test('a token is accepted until its life and the tolerance of clocks have passed, cached or not', async (t) => {
  const { authority, clock } = await startAuthority(t)
  const { token } = await authority.minter.mintAnnounce({ infoHash, subject: 'a1', ttlMs: hour })
  // Minted here, so in the cache: no promise.
  assert.equal((authority.verifier.verify(token, 'announce') as Claims).kind, 'announce')
  clock.now += hour + toleranceMs - 1
  assert.equal(await faultOf(authority.verifier, token), undefined)
  clock.now += 1
  assert.equal(await faultOf(authority.verifier, token), 'expired')
})

test('a token that another process signed is verified by its key, and then from the cache', async (t) => {
  const { authority, clock, mintElsewhere } = await startAuthority(t)
  const token = await mintElsewhere({ ttlMs: hour })
  const claims = await authority.verifier.verify(token, 'announce')
  assert.equal(claims.infoHash, infoHash)
  assert.equal((authority.verifier.verify(token, 'announce') as Claims).id, claims.id)
  clock.now += hour + toleranceMs
  assert.equal(await faultOf(authority.verifier, token), 'expired')
})

test('the tokens of a torrent that is revoked are refused, cached or not, and count again once it is not', async (t) => {
  const revoked = new Set<string>()
  const { authority, mintElsewhere } = await startAuthority(t, {
    isTorrentRevoked: (infoHash) => revoked.has(infoHash),
  })
  const [known, fresh] = [await mintElsewhere({ ttlMs: hour }), await mintElsewhere({ ttlMs: hour })]
  assert.equal(await faultOf(authority.verifier, known), undefined)
  revoked.add(infoHash)
  for (const token of [known, fresh]) assert.equal(await faultOf(authority.verifier, token), 'revoked')
  revoked.clear()
  for (const token of [known, fresh]) assert.equal(await faultOf(authority.verifier, token), undefined)
})

test('a token from the future is refused until the clock has caught up', async (t) => {
  const { authority, clock, mintElsewhere } = await startAuthority(t)
  const token = await mintElsewhere({ ttlMs: hour, startsInMs: toleranceMs + 5000 })
  assert.equal(await faultOf(authority.verifier, token), 'not_yet_valid')
  clock.now += 5000
  assert.equal(await faultOf(authority.verifier, token), undefined)
})

test('each forged or foreign token is refused for its own reason', async (t) => {
  const { authority, directory, mintElsewhere } = await startAuthority(t)
  const good = await mintElsewhere({ ttlMs: hour })
  const [header = '', payload = '', signature = ''] = good.split('.')
  const jwk = authority.jwks().keys[0]
  const kid = jwk?.kid
  const encode = (value: object) => Buffer.from(JSON.stringify(value)).toString('base64url')
  const headerOf = (alg: string, key = kid, typ = 'announce+jwt') => encode({ alg, kid: key, typ })
  const hmacInput = `${headerOf('HS256')}.${payload}`
  const hmac = createHmac('sha256', JSON.stringify(jwk)).update(hmacInput).digest('base64url')
  const otherKey = join(directory, 'other.pem')
  const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  await writeFile(otherKey, privateKey.export({ type: 'pkcs8', format: 'pem' }))
  const claims = JSON.parse(Buffer.from(payload, 'base64url').toString()) as Record<string, unknown>
  const without = (claim: string) => `${header}.${encode({ ...claims, [claim]: undefined })}.${signature}`
  const wrong: readonly (readonly [string, TokenFault])[] = [
    [`${headerOf('none')}.${payload}.`, 'wrong_algorithm'],
    [`${hmacInput}.${hmac}`, 'wrong_algorithm'],
    [`${headerOf('RS256')}.${payload}.${signature}`, 'wrong_algorithm'],
    [`${headerOf('ES256', 'nobody')}.${payload}.${signature}`, 'unknown_key'],
    [await mintElsewhere({ ttlMs: hour, keyFile: otherKey }), 'unknown_key'],
    [await mintElsewhere({ ttlMs: hour, keyFile: otherKey, kid: kid ?? '' }), 'bad_signature'],
    [`${header}.${encode({ ...claims, infohash: 'f'.repeat(40) })}.${signature}`, 'bad_signature'],
    [`${header}.${payload}.`, 'bad_signature'],
    [`${headerOf('ES256', kid, 'host+jwt')}.${payload}.${signature}`, 'missing_claim'],
    [`${headerOf('ES256', kid, 'JWT')}.${payload}.${signature}`, 'wrong_type'],
    [await mintElsewhere({ ttlMs: hour, issuer: 'https://elsewhere.example.com' }), 'wrong_issuer'],
    [await mintElsewhere({ ttlMs: hour, audience: 'https://elsewhere.example.com' }), 'wrong_audience'],
    [without('exp'), 'missing_claim'],
    [without('infohash'), 'missing_claim'],
    [without('jti'), 'missing_claim'],
    [`${header}.${encode({ ...claims, infohash: 'g'.repeat(40) })}.${signature}`, 'bad_claim'],
    [`${header}.${encode({ ...claims, exp: 'tomorrow' })}.${signature}`, 'bad_claim'],
    [`${header}.${encode({ ...claims, rack: 'a/../b\n' })}.${signature}`, 'bad_claim'],
    [`${header}.${encode({ ...claims, cidr: '10.0.0.0/99' })}.${signature}`, 'bad_claim'],
    [good.slice(0, -1), 'bad_signature'],
    ['', 'malformed'],
    ['a.b.c', 'malformed'],
    [`${good}.x`, 'malformed'],
    ['x'.repeat(5000), 'malformed'],
  ]
  for (const [token, fault] of wrong) assert.equal(await faultOf(authority.verifier, token), fault, token)
  assert.equal(await faultOf(authority.verifier, good), undefined, 'and the good one is still good')
})

test('a revoked token is refused at once, though it is in the cache', async (t) => {
  const { authority, revoked } = await startAuthority(t)
  const { token, id } = await authority.minter.mintApi({ name: 'ci', scopes: ['pull:*'], ttlMs: hour })
  assert.equal(await faultOf(authority.verifier, token, 'api'), undefined)
  revoked.add(id)
  assert.equal(await faultOf(authority.verifier, token, 'api'), 'revoked')
  assert.equal(await faultOf(authority.verifier, token, 'announce'), 'wrong_type')
})

test('the keys are made once, readable by their owner alone, and outlive a restart', async (t) => {
  const { authority, directory, keyFile, open } = await startAuthority(t)
  assert.equal((await stat(keyFile)).mode & 0o777, 0o600)
  const { token } = await authority.minter.mintHost({ host: 'a1', repositories: ['*'], ttlMs: hour })
  await using again = await open(directory)
  assert.deepEqual(again.jwks(), authority.jwks())
  assert.ok(!JSON.stringify(again.jwks()).includes('"d":'), 'the private part is not published')
  assert.equal((await again.verifier.verify(token, 'host')).host, 'a1')
})

test('a tracker without a registry verifies by a key set, of each algorithm, and keeps the last good one', async (t) => {
  const { directory, clock, mintElsewhere } = await startAuthority(t)
  const pairs = [
    generateKeyPairSync('rsa', { modulusLength: 2048 }),
    generateKeyPairSync('ed25519'),
    generateKeyPairSync('ec', { namedCurve: 'P-256' }),
  ]
  const jwksFile = join(directory, 'jwks.json')
  const keys = pairs.map(({ publicKey }, i) => ({ ...publicKey.export({ format: 'jwk' }), kid: `key-${i}` }))
  await writeFile(jwksFile, JSON.stringify({ keys: [{ kty: 'oct', k: 'c2VjcmV0', kid: 'hmac' }, ...keys] }))
  const trust = { issuer, audience: issuer, clockToleranceMs: toleranceMs, now: () => clock.now }
  await using verifier = await openKeySetVerifier({ ...trust, keySet: { file: jwksFile } })
  const check = async () => {
    for (const [i, { privateKey }] of pairs.entries()) {
      const file = join(directory, `key-${i}.pem`)
      await writeFile(file, privateKey.export({ type: 'pkcs8', format: 'pem' }))
      const token = await mintElsewhere({ ttlMs: hour, keyFile: file, kid: `key-${i}` })
      assert.equal((await verifier.verify(token, 'announce')).infoHash, infoHash)
    }
  }
  await check()
  await writeFile(jwksFile, '{"keys": []}')
  await assert.rejects(verifier.reload(), /jwks\.json.*ES256, Ed25519 or RS256/)
  await check()
})

test('a key set that gives a new key the name of an old one is believed, by every worker', async (t) => {
  const { directory, clock, mintElsewhere } = await startAuthority(t)
  const jwksFile = join(directory, 'jwks.json')
  const makeKey = async (name: string) => {
    const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
    const keyFile = join(directory, `${name}.pem`)
    await writeFile(keyFile, privateKey.export({ type: 'pkcs8', format: 'pem' }))
    const keySet = JSON.stringify({ keys: [{ ...publicKey.export({ format: 'jwk' }), kid: 'main' }] })
    return { keySet, mint: () => mintElsewhere({ ttlMs: hour, keyFile, kid: 'main' }) }
  }
  const [old, replaced] = [await makeKey('old'), await makeKey('replaced')]
  await writeFile(jwksFile, old.keySet)
  const trust = { issuer, audience: issuer, clockToleranceMs: toleranceMs, now: () => clock.now }
  await using verifier = await openKeySetVerifier({ ...trust, keySet: { file: jwksFile } })
  /** Each token is new, so each goes to the next worker. */
  const faultsOf = async ({ mint }: { mint: () => Promise<string> }) => {
    const faults = new Set<TokenFault | undefined>()
    for (let i = 0; i < 8; i++) faults.add(await faultOf(verifier, await mint()))
    return [...faults]
  }
  assert.deepEqual([await faultsOf(old), await faultsOf(replaced)], [[undefined], ['bad_signature']])
  await writeFile(jwksFile, replaced.keySet)
  await verifier.reload()
  assert.deepEqual([await faultsOf(replaced), await faultsOf(old)], [[undefined], ['bad_signature']])
})

test('the cache is bounded by the number of tokens, and by their text', async (t) => {
  const { publicKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  const key = importVerificationKey(publicKey.export({ format: 'jwk' }))
  const claims: Claims = {
    kind: 'api',
    name: 'a',
    scopes: [],
    id: 'a',
    expiresAt: new Date(8_640_000_000_000_000),
  }
  const start = () => {
    const pool = createVerifyPool(1)
    t.after(() => pool[Symbol.asyncDispose]())
    return createVerifier({
      keySource: { keys: new Map([[key.kid, key]]) },
      pool,
      issuer,
      audience: issuer,
      clockToleranceMs: toleranceMs,
      now: Date.now,
      isRevoked: () => false,
    })
  }
  const [many, long] = [start(), start()]
  for (let i = 0; i < cachedTokensMax + 10; i++) many.remember(`a.b.${i}`, claims, key)
  assert.equal(many.stats().cachedTokens, cachedTokensMax)
  const last = `a.b.${cachedTokensMax + 9}`
  assert.equal(many.verify(last, 'api'), claims)
  assert.equal(await faultOf(many, 'a.b.0', 'api'), 'malformed', 'the oldest has gone')
  const head = 'a.b.'.padEnd(tokenCharactersMax - 8, 'x')
  const fitting = Math.floor(cachedBytesMax / tokenCharactersMax)
  for (let i = 0; i < fitting + 10; i++) long.remember(`${head}${10_000_000 + i}`, claims, key)
  const { cachedTokens, cachedBytes, waiting } = long.stats()
  assert.deepEqual([cachedTokens, cachedBytes, waiting], [fitting, fitting * tokenCharactersMax, 0])
})

test('a token that ends as a good one does is looked at itself, and does not push that one out', async (t) => {
  const { authority, mintElsewhere } = await startAuthority(t)
  const { verifier } = authority
  const good = await mintElsewhere({ ttlMs: hour })
  const claims = await verifier.verify(good, 'announce')
  const [header = '', payload = '', signature = ''] = good.split('.')
  const other = Buffer.from(payload, 'base64url').toString().replace('{', '{ ')
  const forged = `${header}.${Buffer.from(other).toString('base64url')}.${signature}`
  assert.equal(await faultOf(verifier, forged), 'bad_signature')
  assert.equal(verifier.verify(good, 'announce'), claims, 'answered from the cache')
})

test('a token that many ask for at once is checked once', async (t) => {
  const { authority, mintElsewhere } = await startAuthority(t)
  const token = await mintElsewhere({ ttlMs: hour })
  const answers = Array.from({ length: 100 }, () => authority.verifier.verify(token, 'announce'))
  assert.equal(authority.verificationsWaiting, 1)
  const [first, ...others] = await Promise.all(answers.map(async (answer) => answer))
  assert.ok(others.every((claims) => claims === first))
  assert.equal(authority.verificationsWaiting, 0)
  assert.equal(authority.verifierStats().cachedTokens, 1)
})

test('no garbage gets through, and each is refused with a fault of the closed set', async (t) => {
  const { authority, mintElsewhere } = await startAuthority(t)
  const good = await mintElsewhere({ ttlMs: hour })
  const parts = fc.constantFrom(...good.split('.'), '', 'e30', 'bnVsbA', 'W10')
  const garbage = fc.oneof(
    fc.string({ maxLength: 200 }),
    fc.array(parts, { maxLength: 5 }).map((list) => list.join('.')),
    fc
      .tuple(fc.nat(good.length - 1), fc.constantFrom('A', '.', '=', '%', '\0'))
      .map(([at, letter]) => good.slice(0, at) + letter + good.slice(at + 1)),
  )
  await fc.assert(
    fc.asyncProperty(garbage, async (token) => {
      const fault = await faultOf(authority.verifier, token)
      // The last letter of a signature holds bits that base64url does not use.
      if (fault === undefined) assert.deepEqual(signatureOf(token), signatureOf(good))
    }),
    { numRuns: Math.min(fuzzRuns, 3000) },
  )
})

function signatureOf(token: string) {
  const [header, payload, signature = ''] = token.split('.')
  return [header, payload, Buffer.from(signature, 'base64url').toString('hex')]
}

async function startAuthority(
  t: TestContext,
  more: { isTorrentRevoked?: (infoHash: string) => boolean } = {},
) {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-token-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const clock = { now: 1_800_000_000_000 }
  const revoked = new Set<string>()
  const open = async (keysDirectory: string) =>
    openTokenAuthority({
      issuer,
      audience: issuer,
      clockToleranceMs: toleranceMs,
      now: () => clock.now,
      isRevoked: (id) => revoked.has(id),
      keysDirectory,
      algorithm: 'ES256',
      ...more,
    })
  const authority = await open(directory)
  t.after(() => authority[Symbol.asyncDispose]())
  const keyFile = join(directory, `${authority.jwks().keys[0]?.kid ?? ''}.json`)
  const mintElsewhere = async (options: {
    ttlMs: number
    startsInMs?: number
    keyFile?: string
    kid?: string
    issuer?: string
    audience?: string
  }) => {
    const { startsInMs = 0, ...rest } = options
    const { token } = await mintOffline({
      keyFile,
      issuer,
      audience: issuer,
      infoHash,
      subject: 'elsewhere',
      ...rest,
      now: () => clock.now + startsInMs,
    })
    return token
  }
  return { authority, clock, revoked, directory, keyFile, open, mintElsewhere }
}

async function faultOf(
  verifier: TokenVerifier,
  token: string,
  kind: Claims['kind'] = 'announce',
): Promise<TokenFault | undefined> {
  try {
    await verifier.verify(token, kind)
    return undefined
  } catch (error) {
    assert.ok(error instanceof TokenError, String(error))
    return error.fault
  }
}
