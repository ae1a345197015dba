import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { z } from 'zod'
import { parseCidr } from '../../../lib/protocol/cidr.ts'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import { parsePlace } from '../../../lib/protocol/place.ts'
import type { Claims, TokenFault } from '../../../lib/token/claims.ts'
import { TokenError } from '../../../lib/token/claims.ts'
import type { Payload } from '../../../lib/token/read-claims.ts'
import { readChihayaClaims, readClaims } from '../../../lib/token/read-claims.ts'
import { fuzzRuns } from '../../support/fuzz.ts'

const hex = 'ab'.repeat(20)
const nowSeconds = 1_800_000_000
const expected = {
  issuer: 'https://a.example',
  audience: 'https://b.example',
  clockToleranceMs: 120_000,
  nowMs: nowSeconds * 1000,
}
const good: Record<string, unknown> = {
  iss: expected.issuer,
  aud: expected.audience,
  sub: 'host-1',
  iat: nowSeconds,
  nbf: nowSeconds,
  exp: nowSeconds + 900,
  jti: 'id-1',
  infohash: hex,
  rack: 'rack-1',
  cidr: '10.0.0.7/32',
  cnf: { 'x5t#S256': 'a-thumbprint', more: 1 },
  scope: 'announce scrape',
  place: 'rack-2',
  repositories: ['web', 'team/*'],
  scopes: ['admin'],
  access: [{ type: 'repository', name: 'web', actions: ['pull'], more: 1 }],
  parent: { jti: 'id-0', exp: nowSeconds + 90, more: 1 },
}
const kinds: readonly Claims['kind'][] = ['announce', 'host', 'api', 'access']

/** Values that are right for one claim or another, or nearly. */
const values = fc.oneof(
  fc.constantFrom<unknown>(...Object.values(good)),
  fc.constantFrom<unknown>(
    undefined,
    null,
    '',
    'x'.repeat(200),
    'x'.repeat(201),
    0,
    -0,
    -1,
    1.5,
    1e300,
    8_640_000_000_000,
    Infinity,
    nowSeconds - 120,
    nowSeconds - 119,
    nowSeconds + 120,
    nowSeconds + 121,
    true,
    [],
    ['a', 1],
    [expected.audience, 'c'],
    ['c'],
    {},
    hex.toUpperCase(),
    'g'.repeat(40),
    'a b',
    '10.0.0.7',
    '10.0.0.0/8',
    '010.0.0.1/32',
    '10.0.0.1/33',
    '10.0.1/32',
    ' 10.0.0.1/32',
    'fd00::1/128',
    'fd00::/32',
    '::ffff:10.0.0.1/32',
    '1.2.3.4/32/32',
    'peer webseed nonsense  announce',
    [{ type: 'repository', name: 'web', actions: 'pull' }],
    [{ type: 'repository', actions: [] }],
    [null],
    { jti: '', exp: 0 },
    { jti: 'x' },
    { exp: 1 },
  ),
  fc.jsonValue({ maxDepth: 2 }),
)
const changes = fc.dictionary(fc.constantFrom(...Object.keys(good)), values, { maxKeys: 3 })

test('claims are read as a schema would read them: the same claims, or the same fault', () => {
  const seen = new Set<string>()
  fc.assert(
    fc.property(fc.constantFrom(...kinds), changes, (kind, changed) => {
      const payload = { ...good, ...changed }
      const outcome = outcomeOf(() => readClaims(payload, kind, expected))
      seen.add(typeof outcome === 'string' ? outcome : 'accepted')
      assert.deepEqual(
        outcome,
        outcomeOf(() => readBySchema(payload, kind)),
      )
    }),
    { numRuns: Math.min(fuzzRuns, 20_000) },
  )
  assert.deepEqual(
    [...seen].sort(),
    ['accepted', 'bad_claim', 'expired', 'missing_claim', 'not_yet_valid', 'wrong_audience', 'wrong_issuer'],
    'each verdict was met',
  )
})

test('a Quay token needs iss, aud and infohash alone; what else it has is honoured', () => {
  const quay = { iss: expected.issuer, aud: `${expected.audience}/announce`, infohash: hex.toUpperCase() }
  const read = (more: object = {}) => outcomeOf(() => readChihayaClaims({ ...quay, ...more }, expected))
  const claims = readChihayaClaims(quay, expected)
  assert.equal(claims.infoHash, infoHashFromHex(hex))
  assert.equal(claims.subject, expected.issuer)
  assert.deepEqual([...claims.scopes], ['announce', 'scrape'])
  assert.ok(claims.expiresAt.getTime() > expected.nowMs + 1e14)
  const accepted = [
    { aud: expected.audience },
    { aud: ['https://other.example', `${expected.audience}/announce`] },
    { aud: [expected.audience] },
    { exp: nowSeconds + 60, nbf: nowSeconds, iat: nowSeconds },
  ]
  for (const more of accepted) assert.equal(typeof read(more), 'object', JSON.stringify(more))
  const refused: readonly (readonly [object, TokenFault])[] = [
    [{ aud: 'https://other.example/announce' }, 'wrong_audience'],
    [{ aud: ['https://other.example'] }, 'wrong_audience'],
    [{ aud: [1] }, 'bad_claim'],
    [{ iss: 'quay' }, 'wrong_issuer'],
    [{ iss: undefined }, 'missing_claim'],
    [{ aud: undefined }, 'missing_claim'],
    [{ infohash: undefined }, 'missing_claim'],
    [{ infohash: 'abc' }, 'bad_claim'],
    [{ exp: nowSeconds - 120 }, 'expired'],
    [{ exp: 'never' }, 'bad_claim'],
    [{ nbf: nowSeconds + 121 }, 'not_yet_valid'],
    [{ iat: nowSeconds + 121 }, 'not_yet_valid'],
  ]
  for (const [more, fault] of refused) assert.equal(read(more), fault, JSON.stringify(more))
})

function outcomeOf(read: () => Claims): Claims | TokenFault {
  try {
    return read()
  } catch (error) {
    assert.ok(error instanceof TokenError, String(error))
    return error.fault
  }
}

const time = z.number().nonnegative()
const common = {
  iss: z.string(),
  aud: z.union([z.string(), z.array(z.string())]),
  exp: time,
  nbf: time.optional(),
  iat: time.optional(),
  jti: z.string().min(1).max(200),
  sub: z.string().min(1).max(200),
}
const schemas = {
  announce: z.looseObject({
    ...common,
    infohash: z.string(),
    rack: z.string().optional(),
    cidr: z.string().optional(),
    scope: z.string().default('announce scrape'),
    cnf: z.object({ 'x5t#S256': z.string().optional() }).optional(),
  }),
  host: z.looseObject({ ...common, place: z.string().optional(), repositories: z.array(z.string()) }),
  api: z.looseObject({ ...common, scopes: z.array(z.string()) }),
  access: z.looseObject({
    ...common,
    access: z.array(z.object({ type: z.string(), name: z.string(), actions: z.array(z.string()) })),
    parent: z.object({ jti: z.string(), exp: time }).optional(),
  }),
}

/** What `readClaims` promises, said by a schema. */
function readBySchema(payload: Payload, kind: Claims['kind']): Claims {
  const parsed = schemas[kind].safeParse(payload)
  if (!parsed.success) {
    const missing = parsed.error.issues.some(
      ({ path: [claim] }) => claim !== undefined && payload[String(claim)] === undefined,
    )
    throw new TokenError(missing ? 'missing_claim' : 'bad_claim')
  }
  const claims = parsed.data
  if (claims.iss !== expected.issuer) throw new TokenError('wrong_issuer')
  if (![claims.aud].flat().includes(expected.audience)) throw new TokenError('wrong_audience')
  if (expected.nowMs - 120_000 >= claims.exp * 1000) throw new TokenError('expired')
  if (Math.max(claims.nbf ?? 0, claims.iat ?? 0) * 1000 > expected.nowMs + 120_000)
    throw new TokenError('not_yet_valid')
  try {
    return build(kind, claims)
  } catch {
    throw new TokenError('bad_claim')
  }
}

function build(kind: Claims['kind'], claims: z.output<(typeof schemas)[Claims['kind']]>): Claims {
  const date = (seconds: number) => new Date(Math.min(seconds, 8_640_000_000_000) * 1000)
  const shared = { id: claims.jti, expiresAt: date(claims.exp) }
  switch (kind) {
    case 'announce': {
      const { infohash, rack, cidr, scope, cnf } = claims as z.output<typeof schemas.announce>
      const known = (['announce', 'scrape', 'webseed', 'peer'] as const).filter((word) =>
        scope.split(' ').includes(word),
      )
      return {
        kind,
        ...shared,
        subject: claims.sub,
        infoHash: infoHashFromHex(infohash),
        scopes: new Set(known),
        rack: rack === undefined ? undefined : parsePlace(rack),
        cidr: cidr === undefined ? undefined : parseCidr(cidr),
        certificate: cnf?.['x5t#S256'],
      }
    }
    case 'host': {
      const { place, repositories } = claims as z.output<typeof schemas.host>
      return {
        kind,
        ...shared,
        host: claims.sub,
        place: place === undefined ? undefined : parsePlace(place),
        repositories,
      }
    }
    case 'api':
      return { kind, ...shared, name: claims.sub, scopes: (claims as z.output<typeof schemas.api>).scopes }
    case 'access': {
      const { access, parent } = claims as z.output<typeof schemas.access>
      return {
        kind,
        ...shared,
        subject: claims.sub,
        access,
        parent: parent && { id: parent.jti, expiresAt: date(parent.exp) },
      }
    }
  }
}
