import { z } from 'zod'
import { parseCidr } from '../protocol/cidr.ts'
import { infoHashFromHex } from '../protocol/infohash.ts'
import { parsePlace } from '../protocol/place.ts'
import type { AnnounceScope, Claims, ClaimsOf } from './claims.ts'
import { TokenError } from './claims.ts'

/** The `typ` of each kind of token (RFC 8725 section 3.11: one kind never passes for another). */
export const types: Readonly<Record<Claims['kind'], string>> = {
  announce: 'announce+jwt',
  host: 'host+jwt',
  api: 'api+jwt',
  access: 'at+jwt',
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

const shapes = {
  announce: z.looseObject({
    ...common,
    infohash: z.string(),
    rack: z.string().optional(),
    cidr: z.string().optional(),
    scope: z.string().default('announce scrape'),
  }),
  host: z.looseObject({ ...common, place: z.string().optional(), repositories: z.array(z.string()) }),
  api: z.looseObject({ ...common, scopes: z.array(z.string()) }),
  access: z.looseObject({
    ...common,
    access: z.array(z.object({ type: z.string(), name: z.string(), actions: z.array(z.string()) })),
    parent: z.object({ jti: z.string(), exp: time }).optional(),
  }),
}

const announceScopes: ReadonlySet<string> = new Set<AnnounceScope>(['announce', 'scrape', 'webseed', 'peer'])

export interface Expected {
  readonly issuer: string
  readonly audience: string
  readonly clockToleranceMs: number
  readonly nowMs: number
}

/** Checks a payload whose signature is, or is about to be, verified. @throws TokenError */
export function readClaims<Kind extends Claims['kind']>(
  payload: unknown,
  kind: Kind,
  expected: Expected,
): ClaimsOf<Kind> {
  const parsed = shapes[kind].safeParse(payload)
  if (!parsed.success) {
    const missing = parsed.error.issues.some(
      ({ path: [claim] }) =>
        claim !== undefined && (payload as Record<PropertyKey, unknown>)[claim] === undefined,
    )
    throw new TokenError(missing ? 'missing_claim' : 'bad_claim', { cause: parsed.error })
  }
  const claims = parsed.data
  if (claims.iss !== expected.issuer) throw new TokenError('wrong_issuer')
  if (![claims.aud].flat().includes(expected.audience)) throw new TokenError('wrong_audience')
  checkTimes(claims, expected)
  try {
    return build(kind, claims) as ClaimsOf<Kind>
  } catch (cause) {
    throw new TokenError('bad_claim', { cause })
  }
}

/** @throws TokenError `expired` or `not_yet_valid` */
export function checkTimes(
  { exp, nbf, iat }: { exp: number; nbf?: number | undefined; iat?: number | undefined },
  { nowMs, clockToleranceMs }: Pick<Expected, 'nowMs' | 'clockToleranceMs'>,
): void {
  if (nowMs - clockToleranceMs >= exp * 1000) throw new TokenError('expired')
  if (Math.max(nbf ?? 0, iat ?? 0) * 1000 > nowMs + clockToleranceMs) throw new TokenError('not_yet_valid')
}

function build(kind: Claims['kind'], claims: z.output<(typeof shapes)[Claims['kind']]>): Claims {
  const shared = { id: claims.jti, expiresAt: new Date(claims.exp * 1000) }
  switch (kind) {
    case 'announce': {
      const { infohash, rack, cidr, scope } = claims as z.output<typeof shapes.announce>
      return {
        kind,
        ...shared,
        subject: claims.sub,
        infoHash: infoHashFromHex(infohash),
        scopes: new Set(scope.split(' ').filter((word): word is AnnounceScope => announceScopes.has(word))),
        rack: rack === undefined ? undefined : parsePlace(rack),
        cidr: cidr === undefined ? undefined : parseCidr(cidr),
      }
    }
    case 'host': {
      const { place, repositories } = claims as z.output<typeof shapes.host>
      return {
        kind,
        ...shared,
        host: claims.sub,
        place: place === undefined ? undefined : parsePlace(place),
        repositories,
      }
    }
    case 'api':
      return { kind, ...shared, name: claims.sub, scopes: (claims as z.output<typeof shapes.api>).scopes }
    case 'access': {
      const { access, parent } = claims as z.output<typeof shapes.access>
      return {
        kind,
        ...shared,
        subject: claims.sub,
        access,
        parent: parent && { id: parent.jti, expiresAt: new Date(parent.exp * 1000) },
      }
    }
  }
}
