import { parseIp } from '../protocol/address.ts'
import type { Cidr } from '../protocol/cidr.ts'
import { parseCidr } from '../protocol/cidr.ts'
import { infoHashFromHex } from '../protocol/infohash.ts'
import { parsePlace } from '../protocol/place.ts'
import type { AccessClaims, AnnounceScope, Claims, ClaimsOf } from './claims.ts'
import { TokenError } from './claims.ts'

/** The `typ` of each kind of token (RFC 8725 section 3.11: one kind never passes for another). */
export const types: Readonly<Record<Claims['kind'], string>> = {
  announce: 'announce+jwt',
  host: 'host+jwt',
  api: 'api+jwt',
  access: 'at+jwt',
}

export interface Expected {
  readonly issuer: string
  readonly audience: string
  readonly clockToleranceMs: number
  readonly nowMs: number
}

/** A JSON object, as it came. */
export type Payload = Readonly<Record<string, unknown>>

interface CommonPayload {
  readonly iss: string
  readonly aud: string | readonly string[]
  readonly exp: number
  readonly nbf?: number
  readonly iat?: number
  readonly jti: string
  readonly sub: string
}

/** The shape of each kind, as JSON. What else a payload has does not matter. */
interface Payloads {
  announce: CommonPayload & {
    infohash: string
    rack?: string
    cidr?: string
    scope?: string
    cnf?: { 'x5t#S256'?: string }
  }
  host: CommonPayload & { place?: string; repositories: readonly string[] }
  api: CommonPayload & { scopes: readonly string[] }
  access: CommonPayload & { access: AccessClaims['access']; parent?: { jti: string; exp: number } }
}

const commonRequired = ['iss', 'aud', 'exp', 'jti', 'sub']
const required: Readonly<Record<Claims['kind'], readonly string[]>> = {
  announce: [...commonRequired, 'infohash'],
  host: [...commonRequired, 'repositories'],
  api: [...commonRequired, 'scopes'],
  access: [...commonRequired, 'access'],
}

/** Where a Date ends: what a token without `exp` gets, and one that lives longer. */
const neverSeconds = 8_640_000_000_000

/**
 * Checks a payload whose signature is, or is about to be, verified. By hand, and not by a schema: it runs for each
 * announce of a client that is new.
 *
 * @throws TokenError
 */
export function readClaims<Kind extends Claims['kind']>(
  payload: Payload,
  kind: Kind,
  expected: Expected,
): ClaimsOf<Kind> {
  for (const claim of required[kind]) if (payload[claim] === undefined) throw new TokenError('missing_claim')
  if (!hasCommonShape(payload) || !hasOwnShape(payload, kind)) throw new TokenError('bad_claim')
  if (payload.iss !== expected.issuer) throw new TokenError('wrong_issuer')
  if (!isFor(payload.aud, expected.audience)) throw new TokenError('wrong_audience')
  checkTimes(payload, expected)
  try {
    return build(kind, payload) as ClaimsOf<Kind>
  } catch (cause) {
    throw new TokenError('bad_claim', { cause })
  }
}

/**
 * Reads what Quay signed for chihaya: `iss`, `aud` and `infohash`, and nothing else is a must. Its `aud` is the announce
 * URL. It lives as long as its key.
 *
 * @throws TokenError
 */
export function readChihayaClaims(payload: Payload, expected: Expected): ClaimsOf<'announce'> {
  const { aud, iss, infohash } = payload
  const announceUrl = `${expected.audience}/announce`
  const audience = isAudience(aud) && isFor(aud, announceUrl) ? announceUrl : expected.audience
  // No `jti` to revoke it by, so it has the name of what it is for.
  const filled = { exp: neverSeconds, sub: iss, jti: `chihaya:${String(infohash)}`.slice(0, 200), ...payload }
  return readClaims(filled, 'announce', { ...expected, audience })
}

/** @throws TokenError `expired` or `not_yet_valid` */
export function checkTimes(
  { exp, nbf, iat }: { exp: number; nbf?: number | undefined; iat?: number | undefined },
  { nowMs, clockToleranceMs }: Pick<Expected, 'nowMs' | 'clockToleranceMs'>,
): void {
  if (nowMs - clockToleranceMs >= exp * 1000) throw new TokenError('expired')
  if (Math.max(nbf ?? 0, iat ?? 0) * 1000 > nowMs + clockToleranceMs) throw new TokenError('not_yet_valid')
}

function hasCommonShape(payload: Payload): payload is Payload & CommonPayload {
  return (
    isText(payload['iss']) &&
    isAudience(payload['aud']) &&
    isTime(payload['exp']) &&
    (payload['nbf'] === undefined || isTime(payload['nbf'])) &&
    (payload['iat'] === undefined || isTime(payload['iat'])) &&
    isName(payload['jti']) &&
    isName(payload['sub'])
  )
}

function hasOwnShape(payload: Payload, kind: Claims['kind']): boolean {
  switch (kind) {
    case 'announce':
      return (
        isText(payload['infohash']) &&
        isTextOrAbsent(payload['rack']) &&
        isTextOrAbsent(payload['cidr']) &&
        isTextOrAbsent(payload['scope']) &&
        (payload['cnf'] === undefined || isConfirmation(payload['cnf']))
      )
    case 'host':
      return isTextOrAbsent(payload['place']) && isTexts(payload['repositories'])
    case 'api':
      return isTexts(payload['scopes'])
    case 'access':
      return isAccess(payload['access']) && (payload['parent'] === undefined || isParent(payload['parent']))
  }
}

function build(kind: Claims['kind'], payload: CommonPayload): Claims {
  const id = payload.jti
  const expiresAt = dateOf(payload.exp)
  switch (kind) {
    case 'announce': {
      const { infohash, rack, cidr, scope, cnf } = payload as Payloads['announce']
      return {
        kind,
        id,
        expiresAt,
        subject: payload.sub,
        infoHash: infoHashFromHex(infohash),
        scopes: scopesOf(scope ?? 'announce scrape'),
        rack: rack === undefined ? undefined : parsePlace(rack),
        cidr: cidr === undefined ? undefined : cidrOf(cidr),
        certificate: cnf?.['x5t#S256'],
      }
    }
    case 'host': {
      const { place, repositories } = payload as Payloads['host']
      return {
        kind,
        id,
        expiresAt,
        host: payload.sub,
        place: place === undefined ? undefined : parsePlace(place),
        repositories,
      }
    }
    case 'api':
      return { kind, id, expiresAt, name: payload.sub, scopes: (payload as Payloads['api']).scopes }
    case 'access': {
      const { access, parent } = payload as Payloads['access']
      return {
        kind,
        id,
        expiresAt,
        subject: payload.sub,
        access: access.map(({ type, name, actions }) => ({ type, name, actions })),
        parent: parent && { id: parent.jti, expiresAt: dateOf(parent.exp) },
      }
    }
  }
}

function dateOf(seconds: number): Date {
  return new Date(Math.min(seconds, neverSeconds) * 1000)
}

const announceScopes: readonly AnnounceScope[] = ['announce', 'scrape', 'webseed', 'peer']
/** Every set of scopes, by the bits of its members: thousands of cached tokens share the few that there are. */
const scopeSets = Array.from(
  { length: 1 << announceScopes.length },
  (_, bits): ReadonlySet<AnnounceScope> =>
    new Set(announceScopes.filter((_scope, i) => (bits & (1 << i)) !== 0)),
)
const noScopes: ReadonlySet<AnnounceScope> = new Set()

/** Words that are not known here are a newer server's. */
function scopesOf(scope: string): ReadonlySet<AnnounceScope> {
  let bits = 0
  for (const word of scope.split(' ')) {
    const index = (announceScopes as readonly string[]).indexOf(word)
    if (index >= 0) bits |= 1 << index
  }
  return scopeSets[bits] ?? noScopes
}

/** As parseCidr; the tokens of agents name one IPv4 address, and that is read ten times as fast without it. */
function cidrOf(text: string): Cidr {
  if (text.endsWith('/32') && !text.includes(':')) {
    const ip = parseIp(text.slice(0, -3))
    if (ip) return { family: ip.family, bytes: ip.bytes, length: 32 }
  }
  return parseCidr(text)
}

function isFor(aud: string | readonly string[], audience: string): boolean {
  return typeof aud === 'string' ? aud === audience : aud.includes(audience)
}

function isText(value: unknown): value is string {
  return typeof value === 'string'
}

function isTextOrAbsent(value: unknown): boolean {
  return value === undefined || typeof value === 'string'
}

function isTexts(value: unknown): value is readonly string[] {
  return Array.isArray(value) && value.every(isText)
}

function isAudience(value: unknown): value is string | readonly string[] {
  return isText(value) || isTexts(value)
}

function isName(value: unknown): value is string {
  return typeof value === 'string' && value.length >= 1 && value.length <= 200
}

/** JSON.parse reads 1e999 as Infinity. */
function isTime(value: unknown): value is number {
  return typeof value === 'number' && Number.isFinite(value) && value >= 0
}

function isObject(value: unknown): value is Payload {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function isAccess(value: unknown): boolean {
  return (
    Array.isArray(value) &&
    value.every(
      (entry) =>
        isObject(entry) && isText(entry['type']) && isText(entry['name']) && isTexts(entry['actions']),
    )
  )
}

/** What else it may hold (RFC 7800) is not for us. */
function isConfirmation(value: unknown): boolean {
  return isObject(value) && isTextOrAbsent(value['x5t#S256'])
}

function isParent(value: unknown): boolean {
  return isObject(value) && isText(value['jti']) && isTime(value['exp'])
}
