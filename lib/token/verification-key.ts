import type { KeyObject } from 'node:crypto'
import { createHash, createPublicKey } from 'node:crypto'
import type { JWK } from 'jose'
import type { Algorithm } from './algorithms.ts'
import { algorithmOf } from './algorithms.ts'

/** A public key, imported once. */
export interface VerificationKey {
  readonly kid: string
  readonly algorithm: Algorithm
  readonly publicKey: KeyObject
  /** RFC 7638: names the key by all that it consists of, where a foreign key set may give a new key an old `kid`. */
  readonly thumbprint: string
}

/** Where a verifier finds its keys. */
export interface KeySource {
  /** The keys in force by `kid`. A key that stays in force stays the same object. */
  readonly keys: ReadonlyMap<string, VerificationKey>
  /**
   * Looks for a `kid` that is not in force, for all that ask at the same time. Undefined where that was done a moment
   * ago. Never rejects.
   */
  lookAgain?(): Promise<void> | undefined
}

/** Each Quay container has a key of its own, so a set may be large; each costs a few kilobytes. */
export const keysMax = 1000
/** RFC 7518 section 3.3. */
const rsaBitsMin = 2048

/** @throws Error saying why the key cannot be used */
export function importVerificationKey(jwk: JWK): VerificationKey {
  const algorithm = algorithmOf(jwk)
  if (algorithm === undefined)
    throw new Error(
      `need an EC P-256, Ed25519 or RSA key for ES256, Ed25519 or RS256, got ${nameOf(jwk.kty)} ${nameOf(jwk.crv ?? jwk.alg)}`,
    )
  if (jwk.use !== undefined && jwk.use !== 'sig')
    throw new Error(`it is for ${nameOf(jwk.use)}, not signatures`)
  const publicKey = createPublicKey({ key: { ...jwk }, format: 'jwk' })
  const bits = publicKey.asymmetricKeyDetails?.modulusLength
  if (bits !== undefined && bits < rsaBitsMin) throw new Error(`it has ${bits} bits, need ${rsaBitsMin}`)
  const thumbprint = thumbprintOf(publicKey)
  const kid = typeof jwk.kid === 'string' && jwk.kid !== '' ? jwk.kid : thumbprint
  return { kid, algorithm, publicKey, thumbprint }
}

/**
 * Reads a JWK Set (RFC 7517). A key that cannot be used is passed over alone; of all of those it is told.
 *
 * @throws Error when none can be used: an empty set is never the truth
 */
export function parseKeySet(
  json: unknown,
  passedOver: (why: readonly string[]) => void = () => undefined,
): Map<string, VerificationKey> {
  const list = (json as { keys?: unknown } | null)?.keys
  if (!Array.isArray(list)) throw new Error('need {"keys": [...]}')
  if (list.length > keysMax) throw new Error(`it has ${list.length} keys, at most ${keysMax} are taken`)
  const keys = new Map<string, VerificationKey>()
  const reasons: string[] = []
  for (const [i, jwk] of list.entries()) {
    try {
      if (typeof jwk !== 'object' || jwk === null) throw new Error('it is no object')
      const key = importVerificationKey(jwk as JWK)
      keys.set(key.kid, key)
    } catch (error) {
      reasons.push(`key ${i + 1}: ${(error as Error).message}`)
    }
  }
  passedOver(reasons)
  if (keys.size === 0) throw new Error('it has no ES256, Ed25519 or RS256 key that can be used')
  return keys
}

/** The public members of keys, as a JWK Set. */
export function writeKeySet(keys: Iterable<VerificationKey>): { keys: JWK[] } {
  return { keys: Array.from(keys, ({ kid, publicKey }) => ({ ...publicKey.export({ format: 'jwk' }), kid })) }
}

/** The new set, with the old object of each key that is in both: what was proven by such a key stays proven. */
export function keepIdentity(
  old: ReadonlyMap<string, VerificationKey>,
  fresh: ReadonlyMap<string, VerificationKey>,
): Map<string, VerificationKey> {
  return new Map(
    Array.from(fresh, ([kid, key]) => {
      const known = old.get(kid)
      return [kid, known?.thumbprint === key.thumbprint ? known : key]
    }),
  )
}

function thumbprintOf(publicKey: KeyObject): string {
  const { kty, crv, x, y, n, e } = publicKey.export({ format: 'jwk' })
  // In the order of their names, as the RFC wants; those that a kind of key does not have are left out by stringify.
  return createHash('sha256').update(JSON.stringify({ crv, e, kty, n, x, y })).digest('base64url')
}

/** A word of a foreign key set, for a message. */
function nameOf(value: unknown): string {
  return typeof value === 'string' ? JSON.stringify(value.slice(0, 32)) : 'none'
}
