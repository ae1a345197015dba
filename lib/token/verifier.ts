import { createHash } from 'node:crypto'
import type { JWK } from 'jose'
import { LRUCache } from 'lru-cache'
import type { Algorithm } from './algorithms.ts'
import { namesAlgorithm } from './algorithms.ts'
import type { Claims, ClaimsOf, TokenFault, TokenVerifier } from './claims.ts'
import { TokenError } from './claims.ts'
import { readClaims, types } from './read-claims.ts'
import type { VerifyPool } from './verify-pool.ts'

export interface VerificationKey {
  readonly kid: string
  readonly algorithm: Algorithm
  readonly jwk: JWK
}

export interface VerifierOptions {
  /** The keys in force; called for each token that is not in the cache. */
  readonly keys: () => ReadonlyMap<string, VerificationKey>
  readonly pool: VerifyPool
  readonly issuer: string
  readonly audience: string
  readonly clockToleranceMs: number
  readonly now: () => number
  readonly isRevoked: (id: string) => boolean
}

export interface CachingVerifier extends TokenVerifier {
  /** Enters a token that this process has just signed, so that its first use costs no signature check. */
  remember(token: string, claims: Claims): void
  /** Forgets all: the key set has changed. */
  clear(): void
}

/** Our usual tokens have some 700 characters, Quay's RS256 ones 900; a longer one is neither made nor looked at. */
export const tokenCharactersMax = 4096
/** Tokens remembered. 100,000 hosts × a few swarms fit; each costs some 500 bytes. */
const cacheMax = 200_000
/** Refused tokens are remembered shortly and separately, so that garbage cannot push out good ones. */
const refusedMax = 10_000
const refusedForMs = 5_000

/** A verifier with a cache by token hash. Hits answer without a promise; misses share one check. */
export function createVerifier(options: VerifierOptions): CachingVerifier {
  const { clockToleranceMs, now, isRevoked } = options
  const accepted = new LRUCache<string, Claims>({ max: cacheMax })
  const refused = new LRUCache<string, { fault: TokenFault; untilMs: number }>({ max: refusedMax })
  const underWay = new Map<string, Promise<Claims>>()

  const check = async (token: string, cacheKey: string): Promise<Claims> => {
    try {
      const { key, kind, payload } = peek(token, options.keys())
      const claims = readClaims(payload, kind, { ...options, nowMs: now() })
      if (!(await options.pool.verify({ token, jwk: key.jwk, algorithm: key.algorithm })))
        throw new TokenError('bad_signature')
      accepted.set(cacheKey, claims)
      return claims
    } catch (error) {
      const fault = error instanceof TokenError ? error.fault : 'malformed'
      // A clock catches up; everything else about a token stays as it is.
      if (fault !== 'not_yet_valid') refused.set(cacheKey, { fault, untilMs: now() + refusedForMs })
      throw error instanceof TokenError ? error : new TokenError('malformed', { cause: error })
    }
  }

  const admit = <Kind extends Claims['kind']>(claims: Claims, kind: Kind): ClaimsOf<Kind> => {
    if (claims.kind !== kind) throw new TokenError('wrong_type')
    if (now() - clockToleranceMs >= claims.expiresAt.getTime()) throw new TokenError('expired')
    if (isRevoked(claims.id) || (claims.kind === 'access' && claims.parent && isRevoked(claims.parent.id)))
      throw new TokenError('revoked')
    return claims as ClaimsOf<Kind>
  }

  return {
    verify: (token, kind) => {
      if (token.length > tokenCharactersMax) throw new TokenError('malformed')
      const cacheKey = hashOf(token)
      const known = accepted.get(cacheKey)
      if (known) return admit(known, kind)
      const bad = refused.get(cacheKey)
      if (bad && bad.untilMs > now()) throw new TokenError(bad.fault)
      let checking = underWay.get(cacheKey)
      if (!checking) {
        // Most garbage is refused before the first wait: the entry must end after it was made.
        checking = check(token, cacheKey).finally(() => underWay.delete(cacheKey))
        underWay.set(cacheKey, checking)
      }
      return checking.then((claims) => admit(claims, kind))
    },
    remember: (token, claims) => {
      accepted.set(hashOf(token), claims)
    },
    clear: () => {
      accepted.clear()
      refused.clear()
    },
  }
}

/** What a token says of itself, all of it unproven: enough to refuse most garbage before a signature is checked. */
function peek(
  token: string,
  keys: ReadonlyMap<string, VerificationKey>,
): { key: VerificationKey; kind: Claims['kind']; payload: unknown } {
  const parts = token.split('.')
  if (parts.length !== 3) throw new TokenError('malformed')
  const header = parsePart(parts[0])
  const payload = parsePart(parts[1])
  const kind = (Object.keys(types) as Claims['kind'][]).find(
    (candidate) => types[candidate] === header['typ'],
  )
  if (kind === undefined) throw new TokenError('wrong_type')
  const kid = header['kid']
  const key = typeof kid === 'string' ? keys.get(kid) : undefined
  if (!key) throw new TokenError('unknown_key')
  if (!namesAlgorithm(header['alg'], key.algorithm)) throw new TokenError('wrong_algorithm')
  return { key, kind, payload }
}

function parsePart(part: string | undefined): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(Buffer.from(part ?? '', 'base64url').toString())
    if (typeof value === 'object' && value !== null && !Array.isArray(value))
      return value as Record<string, unknown>
  } catch (cause) {
    throw new TokenError('malformed', { cause })
  }
  throw new TokenError('malformed')
}

function hashOf(token: string): string {
  return createHash('sha256').update(token).digest('latin1')
}
