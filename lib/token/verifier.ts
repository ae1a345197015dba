import { LRUCache } from 'lru-cache'
import type { InfoHash } from '../protocol/infohash.ts'
import { namesAlgorithm } from './algorithms.ts'
import type { Admission, AnnounceClaims, Claims, ClaimsOf, TokenVerifier, VerifyHints } from './claims.ts'
import { TokenError } from './claims.ts'
import { readCompact } from './compact.ts'
import type { Expected, Payload } from './read-claims.ts'
import { readChihayaClaims, readClaims, types } from './read-claims.ts'
import type { Tickets } from './ticket.ts'
import type { KeySource, VerificationKey } from './verification-key.ts'
import type { VerifyPool } from './verify-pool.ts'

export interface VerifierOptions {
  readonly keySource: KeySource
  readonly pool: VerifyPool
  readonly issuer: string
  readonly audience: string
  readonly clockToleranceMs: number
  readonly now: () => number
  readonly isRevoked: (id: string) => boolean
  /** Torrents whose tokens count no longer, whoever has them. Default: none. */
  readonly isTorrentRevoked?: ((infoHash: InfoHash) => boolean) | undefined
  /** Default: none are given, and none taken. */
  readonly tickets?: Tickets | undefined
  /** Accepted tokens to remember. Room for all of them is taken at once: 36 bytes each. Default: `cachedTokensMax`. */
  readonly rememberedMax?: number | undefined
  /** Takes announce tokens as Quay signed them for chihaya: RS256, without `typ`, and without `exp`. */
  readonly acceptChihaya?: boolean | undefined
}

export interface VerifierStats {
  /** Accepted tokens that are remembered, at most `cachedTokensMax`. */
  readonly cachedTokens: number
  /** What their text takes, at most `cachedBytesMax`. */
  readonly cachedBytes: number
  /** Signatures that wait or are being checked. */
  readonly waiting: number
}

export interface CachingVerifier extends TokenVerifier {
  /** Enters a token that this process has just signed, so that its first use costs no signature check. */
  remember(token: string, claims: Claims, key: VerificationKey): void
  stats(): VerifierStats
}

/** Our usual tokens have some 700 characters, Quay's RS256 ones 900; a longer one is neither made nor looked at. */
export const tokenCharactersMax = 4096
/** 100,000 hosts × a swarm or two. The claims of a token cost about as much again as its text. */
export const cachedTokensMax = 200_000
export const cachedBytesMax = 96 * 1024 * 1024
/** Tokens whose signature was wrong are remembered shortly and separately, so that they cannot push out good ones. */
const refusedMax = 10_000
const refusedBytesMax = 8 * 1024 * 1024
const refusedForMs = 5_000
/** Tokens that wait for a key set to be fetched again. */
const awaitingKeyMax = 5_000

interface Accepted {
  readonly token: string
  readonly claims: Claims
  /** What proved it: once that is no longer in force, the token is looked at anew. */
  readonly key: VerificationKey
  /** Made when it is first asked for. */
  ticket: string | undefined
}

/**
 * A verifier with a cache. Hits answer without a promise, and so do tokens with a ticket; other misses share one check.
 * Accepted tokens are found by the end of their signature and compared whole; no one but a signer could make two of one name.
 */
export function createVerifier(options: VerifierOptions): CachingVerifier {
  const { keySource, pool, tickets, issuer, audience, clockToleranceMs, now, isRevoked } = options
  const accepted = new LRUCache<string, Accepted>({
    max: options.rememberedMax ?? cachedTokensMax,
    maxSize: cachedBytesMax,
    sizeCalculation: ({ token }) => token.length,
  })
  const refused = new LRUCache<string, { key: VerificationKey; untilMs: number }>({
    max: Math.min(refusedMax, options.rememberedMax ?? refusedMax),
    maxSize: refusedBytesMax,
    sizeCalculation: (_, token) => token.length,
  })
  const underWay = new Map<string, Promise<Accepted>>()
  let awaitingKey = 0

  const isInForce = (key: VerificationKey) => keySource.keys.get(key.kid) === key

  const find = (token: string, kind: Claims['kind'], hints: VerifyHints): Accepted | Promise<Accepted> => {
    if (token.length > tokenCharactersMax) throw new TokenError('malformed')
    const known = accepted.get(nameOf(token))
    if (known?.token === token) {
      if (isInForce(known.key)) return known
      accepted.delete(nameOf(token))
    }
    const bad = refused.get(token)
    if (bad && bad.untilMs > now() && isInForce(bad.key)) throw new TokenError('bad_signature')
    return underWay.get(token) ?? check(token, kind, hints)
  }

  /** Most of what is wrong is found before the first wait. */
  const check = (token: string, kind: Claims['kind'], hints: VerifyHints): Accepted | Promise<Accepted> => {
    const unproven = readToken(token, options.acceptChihaya === true)
    const key = keyOf(unproven, keySource)
    const claims = claimsOf(unproven, { issuer, audience, clockToleranceMs, nowMs: now() })
    if (claims.kind !== kind) throw new TokenError('wrong_type')
    if (key) return prove(token, claims, key, hints)
    const looking = unproven.kid === undefined ? undefined : keySource.lookAgain?.()
    if (!looking) throw new TokenError('unknown_key')
    if (awaitingKey >= awaitingKeyMax) throw new TokenError('busy')
    awaitingKey++
    return share(token, async () => {
      await looking.finally(() => awaitingKey--)
      const late = keyOf(unproven, keySource)
      if (!late) throw new TokenError('unknown_key')
      return prove(token, claims, late, hints)
    })
  }

  const prove = (
    token: string,
    claims: Claims,
    key: VerificationKey,
    { from, ticket }: VerifyHints,
  ): Accepted | Promise<Accepted> => {
    const good = ticket === undefined ? undefined : tickets?.check(token, key, ticket)
    if (good !== undefined) return accept(token, claims, key, good)
    return share(token, async () => {
      if (await pool.verify({ token, key, from })) return accept(token, claims, key)
      refused.set(ownText(token), { key, untilMs: now() + refusedForMs })
      throw new TokenError('bad_signature')
    })
  }

  const accept = (token: string, claims: Claims, key: VerificationKey, ticket?: string): Accepted => {
    const entry = { token: ownText(token), claims, key, ticket }
    accepted.set(nameOf(entry.token), entry)
    return entry
  }

  /** A token that many ask for is checked once. */
  const share = (token: string, work: () => Promise<Accepted>): Promise<Accepted> => {
    const run = async () => {
      try {
        return await work()
      } finally {
        // Not when the work has handed over to other work.
        if (underWay.get(token) === checking) underWay.delete(token)
      }
    }
    const checking = run()
    underWay.set(token, checking)
    return checking
  }

  const allow = ({ claims, key }: Accepted, kind: Claims['kind']): void => {
    if (claims.kind !== kind) throw new TokenError('wrong_type')
    if (!isInForce(key)) throw new TokenError('unknown_key')
    if (now() - clockToleranceMs >= claims.expiresAt.getTime()) throw new TokenError('expired')
    if (isRevoked(claims.id) || (claims.kind === 'access' && claims.parent && isRevoked(claims.parent.id)))
      throw new TokenError('revoked')
    if (claims.kind === 'announce' && options.isTorrentRevoked?.(claims.infoHash) === true)
      throw new TokenError('revoked')
  }

  const allowed = <Kind extends Claims['kind']>(entry: Accepted, kind: Kind): ClaimsOf<Kind> => {
    allow(entry, kind)
    return entry.claims as ClaimsOf<Kind>
  }

  const admitted = (entry: Accepted, token: string): Admission => {
    allow(entry, 'announce')
    if (tickets && entry.ticket === undefined) entry.ticket = tickets.issue(token, entry.key)
    return entry as Accepted & { claims: AnnounceClaims }
  }

  return {
    verify: (token, kind, hints = {}) => {
      const entry = find(token, kind, hints)
      return entry instanceof Promise ? entry.then((late) => allowed(late, kind)) : allowed(entry, kind)
    },
    admit: (token, hints) => {
      const entry = find(token, 'announce', hints)
      return entry instanceof Promise ? entry.then((late) => admitted(late, token)) : admitted(entry, token)
    },
    remember: (token, claims, key) => {
      accept(token, claims, key)
    },
    stats: () => ({
      cachedTokens: accepted.size,
      cachedBytes: accepted.calculatedSize,
      waiting: pool.waiting + awaitingKey,
    }),
  }
}

/** Who signed a token and for whom, unproven: for tokens that came from whom we trust anyway. @throws TokenError */
export function issuerOf(token: string): { readonly issuer: string; readonly audience: string } {
  const { iss, aud } = readToken(token, false).payload
  if (typeof iss !== 'string' || typeof aud !== 'string') throw new TokenError('missing_claim')
  return { issuer: iss, audience: aud }
}

/** What a token says of itself, all of it unproven. */
interface Unproven {
  readonly alg: unknown
  readonly kid: string | undefined
  /** `chihaya`: an announce token that does not say so. */
  readonly shape: Claims['kind'] | 'chihaya'
  readonly payload: Payload
}

const kinds = new Map<unknown, Claims['kind']>(
  (Object.keys(types) as Claims['kind'][]).map((kind) => [types[kind], kind]),
)

function readToken(token: string, acceptChihaya: boolean): Unproven {
  const { header, payload } = readCompact(token)
  const { alg, kid, typ } = header
  const chihaya = acceptChihaya && alg === 'RS256' && (typ === undefined || typ === 'JWT')
  const shape = chihaya ? 'chihaya' : kinds.get(typ)
  if (shape === undefined) throw new TokenError('wrong_type')
  return {
    alg,
    kid: typeof kid === 'string' ? kid : undefined,
    shape,
    payload,
  }
}

/** Undefined when there is none of that name. */
function keyOf({ kid, alg }: Unproven, { keys }: KeySource): VerificationKey | undefined {
  const key = kid === undefined ? undefined : keys.get(kid)
  if (key && !namesAlgorithm(alg, key.algorithm)) throw new TokenError('wrong_algorithm')
  return key
}

function claimsOf({ shape, payload }: Unproven, expected: Expected): Claims {
  return shape === 'chihaya' ? readChihayaClaims(payload, expected) : readClaims(payload, shape, expected)
}

/** 240 bits of a signature that was found right. */
function nameOf(token: string): string {
  return token.slice(-40)
}

/** A copy that keeps nothing else alive: what comes in is a slice of a request, which may be 16 KB long. */
function ownText(token: string): string {
  return Buffer.from(token, 'latin1').toString('latin1')
}
