import type { JsonWebKeyInput, KeyObject } from 'node:crypto'
import { createHash, createPrivateKey, createPublicKey, generateKeyPairSync } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { readSecret } from '../runtime/secret-file.ts'
import type { Algorithm } from './algorithms.ts'
import { importVerificationKey } from './verification-key.ts'

/** A public key that releases are checked with. */
export interface ReleaseKey {
  /** SHA-256 of the key in DER (SubjectPublicKeyInfo), base64: what sigstore's tools take as a hint. */
  readonly id: string
  /** SubjectPublicKeyInfo in DER, base64url: the key as a registry is told it. */
  readonly spki: string
  readonly algorithm: Algorithm
  readonly publicKey: KeyObject
}

/** A private key that signs releases. Its public part is in it. */
export interface ReleaseSigner extends ReleaseKey {
  readonly privateKey: KeyObject
}

/** Each may cost a verification for every signature of a release. */
export const releaseKeysMax = 32
/** An RSA key of 8192 bits has 1411; what is longer is there to cost time. */
const spkiMaxLength = 2048

/**
 * Reads public keys from a file: PEM, one block after the other, or a JWK, or a JWK Set.
 *
 * @throws Error naming the file and why it cannot be used
 */
export function readReleaseKeys(file: string): ReleaseKey[] {
  try {
    return parseReleaseKeys(readFileSync(file, 'utf8'))
  } catch (cause) {
    throw new Error(`Cannot use public key ${file}: ${(cause as Error).message}`, { cause })
  }
}

/** @throws Error saying why the text holds no public key that can be used */
export function parseReleaseKeys(text: string): ReleaseKey[] {
  const keys = text.trimStart().startsWith('{') ? fromJson(text) : fromPem(text)
  if (keys.length === 0) throw new Error('it has no public key, as PEM or JWK')
  return keys
}

/** Reads a public key as `spki` has it. @throws Error saying why it cannot be used */
export function parseReleaseKey(spki: string): ReleaseKey {
  if (spki.length > spkiMaxLength)
    throw new Error(`it has ${spki.length} characters, at most ${spkiMaxLength} are read`)
  return releaseKeyOf(createPublicKey({ key: Buffer.from(spki, 'base64url'), format: 'der', type: 'spki' }))
}

/**
 * Reads a private key that its owner alone can read: PEM (PKCS #8, SEC 1, PKCS #1) or a JWK.
 *
 * @throws Error naming the file and why it cannot be used
 */
export async function readReleaseSigner(file: string): Promise<ReleaseSigner> {
  const text = await readSecret(file)
  try {
    // OpenSSL would ask for the passphrase at the terminal.
    if (text.includes('ENCRYPTED')) throw new Error('it is encrypted; need one without a passphrase')
    const privateKey = text.startsWith('{')
      ? createPrivateKey({ key: JSON.parse(text) as JsonWebKeyInput['key'], format: 'jwk' })
      : createPrivateKey(text)
    return { ...releaseKeyOf(createPublicKey(privateKey)), privateKey }
  } catch (cause) {
    throw new Error(`Cannot sign with ${file}: ${(cause as Error).message}`, { cause })
  }
}

/** A new pair of keys in PEM, PKCS #8 and SubjectPublicKeyInfo. */
export function generateReleaseKeys(algorithm: Algorithm): {
  id: string
  privatePem: string
  publicPem: string
} {
  const { publicKey, privateKey } = {
    ES256: () => generateKeyPairSync('ec', { namedCurve: 'P-256' }),
    Ed25519: () => generateKeyPairSync('ed25519'),
    RS256: () => generateKeyPairSync('rsa', { modulusLength: 3072 }),
  }[algorithm]()
  return {
    id: releaseKeyOf(publicKey).id,
    privatePem: privateKey.export({ type: 'pkcs8', format: 'pem' }),
    publicPem: publicKey.export({ type: 'spki', format: 'pem' }),
  }
}

function fromPem(text: string): ReleaseKey[] {
  if (text.includes('PRIVATE KEY-----'))
    throw new Error('it is a private key, which is nobody else’s: need the public one')
  const blocks =
    text.match(/-----BEGIN (?:RSA )?PUBLIC KEY-----[^-]*-----END (?:RSA )?PUBLIC KEY-----/g) ?? []
  return blocks.map((pem) => releaseKeyOf(createPublicKey(pem)))
}

function fromJson(text: string): ReleaseKey[] {
  const json = JSON.parse(text) as { keys?: unknown }
  const list: unknown[] = Array.isArray(json.keys) ? json.keys : [json]
  return list.map((jwk) => {
    if (typeof jwk !== 'object' || jwk === null) throw new Error('it has a key that is no object')
    if ('d' in jwk) throw new Error('it is a private key, which is nobody else’s: need the public one')
    return releaseKeyOf(createPublicKey({ key: jwk, format: 'jwk' }))
  })
}

function releaseKeyOf(publicKey: KeyObject): ReleaseKey {
  const { algorithm } = importVerificationKey(publicKey.export({ format: 'jwk' }))
  const der = publicKey.export({ type: 'spki', format: 'der' })
  const id = createHash('sha256').update(der).digest('base64')
  return { id, spki: der.toString('base64url'), algorithm, publicKey }
}
