import type { KeyObject } from 'node:crypto'
import { createPrivateKey, createPublicKey, sign } from 'node:crypto'
import type { JWK } from 'jose'
import type { Algorithm } from './algorithms.ts'
import { algorithmOf } from './algorithms.ts'
import { signatureIsValid } from './signature.ts'
import { importVerificationKey } from './verification-key.ts'

export interface PrivateKey {
  /** With its private part. */
  readonly jwk: JWK
  readonly algorithm: Algorithm
  /** The name that a JWK gives itself. */
  readonly kid: string | undefined
}

/** An RSA key of 8192 bits has 6.5 KB as PEM, 5 KB as JWK. */
const charactersMax = 32 * 1024

/**
 * Reads a private key: PEM (PKCS #8, SEC 1, PKCS #1), a JWK, or a key file of ours.
 *
 * @throws Error saying what is wrong with it, without a word of it
 */
export function readPrivateKey(text: string): PrivateKey {
  if (text.length > charactersMax) throw new Error(`it has more than ${charactersMax} characters`)
  const { key, kid } = text.trimStart().startsWith('-----')
    ? { key: ofPem(text), kid: undefined }
    : ofJson(text)
  const jwk = key.export({ format: 'jwk' }) as JWK
  const algorithm = algorithmOf(jwk)
  if (algorithm === undefined)
    throw new Error(
      `need an EC P-256, Ed25519 or RSA key for ES256, Ed25519 or RS256, got ${key.asymmetricKeyType ?? 'none'} ${jwk.crv ?? ''}`.trim(),
    )
  const publicKey = createPublicKey(key)
  importVerificationKey(publicKey.export({ format: 'jwk' }))
  if (!signatureIsValid(`probe.${signProbe(key, algorithm)}`, { publicKey, algorithm }))
    throw new Error('its private part does not belong to its public part')
  return { jwk, algorithm, kid }
}

function ofPem(text: string): KeyObject {
  if (/-----BEGIN (ENCRYPTED PRIVATE KEY|[A-Z ]*PRIVATE KEY-----\s+Proc-Type: 4,ENCRYPTED)/.test(text))
    throw new Error('it is encrypted: decrypt it first, with openssl pkcs8 or openssl pkey')
  if (!/-----BEGIN ([A-Z]+ )?PRIVATE KEY-----/.test(text))
    throw new Error('the PEM has no private key: need PRIVATE KEY, EC PRIVATE KEY or RSA PRIVATE KEY')
  try {
    return createPrivateKey(text)
  } catch (cause) {
    throw new Error('the PEM is damaged, or of a kind that is not known', { cause })
  }
}

/** A JWK, alone or as our key files hold it. */
function ofJson(text: string): { key: KeyObject; kid: string | undefined } {
  const file = parseObject(text)
  const jwk = isObject(file['jwk']) ? file['jwk'] : file
  if (typeof jwk['d'] !== 'string') throw new Error('it has no private part')
  const kid = file['kid'] ?? jwk['kid']
  try {
    return {
      key: createPrivateKey({ key: jwk, format: 'jwk' }),
      kid: typeof kid === 'string' && kid !== '' ? kid : undefined,
    }
  } catch (cause) {
    throw new Error('the JWK is damaged, or of a kind that is not known', { cause })
  }
}

function parseObject(text: string): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(text)
    if (isObject(value)) return value
  } catch {
    // Told below: what JSON.parse says may quote the key.
  }
  throw new Error('it is neither PEM nor a JWK')
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function signProbe(key: KeyObject, algorithm: Algorithm): string {
  const hash = algorithm === 'Ed25519' ? null : 'sha256'
  const signer = algorithm === 'ES256' ? { key, dsaEncoding: 'ieee-p1363' as const } : key
  return sign(hash, Buffer.from('probe'), signer).toString('base64url')
}
