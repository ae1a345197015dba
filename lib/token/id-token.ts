import type { Logger } from '../runtime/log.ts'
import { namesAlgorithm } from './algorithms.ts'
import { TokenError } from './claims.ts'
import { readCompact } from './compact.ts'
import type { KeySet } from './current-keys.ts'
import type { KeySetSource } from './key-set.ts'
import { openKeySet } from './key-set.ts'
import type { Payload } from './read-claims.ts'
import { checkTimes } from './read-claims.ts'
import { createSmallVerifyPool } from './verify-pool.ts'

/** What an issuer that is trusted says of the bearer of its token. */
export interface IdToken {
  readonly issuer: string
  readonly audience: readonly string[]
  readonly subject: string
  readonly expiresAt: Date
  /** All of it, as it came. */
  readonly claims: Payload
}

/** None of the issuer's keys is known: it could not be asked yet. */
export class IssuerUnavailable extends Error {
  override readonly name = 'IssuerUnavailable'
}

/** Checks tokens of OpenID Connect issuers: signature by the recorded algorithm of the `kid`'s key, issuer, times. */
export interface IdTokenVerifier extends AsyncDisposable {
  /** Rejects with TokenError, or with IssuerUnavailable. Whom it is for is for the caller to check. */
  verify(token: string): Promise<IdToken>
}

/** Those of GitHub have some 2,000 characters, and groups of people in others' may be many. */
export const idTokenCharactersMax = 16 * 1024
const checksMax = 256

/**
 * Opens the key sets of issuers. One that is down keeps nothing from starting, and what was fetched last stays in force.
 *
 * @throws Error naming the file that holds no key set, or saying that a URL is none
 */
export async function openIdTokenVerifier(options: {
  /** Where the keys of each issuer are. */
  issuers: ReadonlyMap<string, KeySetSource>
  clockToleranceMs: number
  now: () => number
  random: () => number
  log: Logger
}): Promise<IdTokenVerifier> {
  await using started = new AsyncDisposableStack()
  const { clockToleranceMs, now } = options
  const keySets = new Map<string, KeySet>()
  const pool = started.use(createSmallVerifyPool(checksMax))
  await Promise.all(
    Array.from(options.issuers, async ([issuer, source]) => {
      keySets.set(issuer, started.use(await openKeySet(source, options)))
    }),
  )
  const owned = started.move()
  return {
    verify: async (token) => {
      if (token.length > idTokenCharactersMax) throw new TokenError('malformed')
      const { header, payload } = readCompact(token)
      const read = readClaims(payload, { nowMs: now(), clockToleranceMs })
      const keySet = keySets.get(read.issuer)
      if (!keySet) throw new TokenError('wrong_issuer')
      const key = await findKey(keySet, header)
      if (!namesAlgorithm(header['alg'], key.algorithm)) throw new TokenError('wrong_algorithm')
      if (!(await pool.verify({ token, key }))) throw new TokenError('bad_signature')
      return read
    },
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

async function findKey(keySet: KeySet, { kid }: Payload) {
  if (typeof kid !== 'string') throw new TokenError('unknown_key')
  const known = keySet.keys.get(kid)
  if (known) return known
  await keySet.lookAgain?.()
  const late = keySet.keys.get(kid)
  if (late) return late
  const { keys, lastError } = keySet.status()
  if (keys === 0) throw new IssuerUnavailable(lastError ?? 'its keys were not fetched yet')
  throw new TokenError('unknown_key')
}

/** `iss`, `sub`, `aud` and `exp` (OpenID Connect Core 1.0 section 2). @throws TokenError */
function readClaims(claims: Payload, clock: { nowMs: number; clockToleranceMs: number }): IdToken {
  const { iss, sub, aud, exp, nbf, iat } = claims
  for (const claim of [iss, sub, aud, exp]) if (claim === undefined) throw new TokenError('missing_claim')
  const audience = [aud].flat()
  if (
    typeof iss !== 'string' ||
    typeof sub !== 'string' ||
    !isTime(exp) ||
    !(nbf === undefined || isTime(nbf)) ||
    !(iat === undefined || isTime(iat)) ||
    !audience.every((one) => typeof one === 'string')
  )
    throw new TokenError('bad_claim')
  checkTimes({ exp, nbf, iat }, clock)
  const expiresAt = new Date(Math.min(exp * 1000, dateMaxMs))
  return { issuer: iss, subject: sub, audience, expiresAt, claims }
}

/** Where a Date ends. */
const dateMaxMs = 8_640_000_000_000_000

function isTime(value: unknown): value is number {
  return typeof value === 'number' && Number.isFinite(value) && value >= 0
}
