import { createPrivateKey, randomUUID } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import type { JWK } from 'jose'
import { SignJWT, calculateJwkThumbprint, decodeJwt, decodeProtectedHeader, importJWK } from 'jose'
import type { InfoHash } from '../protocol/infohash.ts'
import { infoHashToHex } from '../protocol/infohash.ts'
import { algorithmOf } from './algorithms.ts'
import type { AnnounceScope } from './claims.ts'
import { types } from './read-claims.ts'
import type { Minted } from './token-authority.ts'

/**
 * Signs an announce token without a server, with a key file of ours, a private JWK, or a PKCS #8 PEM.
 *
 * @throws Error when the file holds no usable private key
 */
export async function mintOffline(options: {
  keyFile: string
  /** Default: the key's thumbprint (RFC 7638), as our servers name keys. */
  kid?: string
  issuer: string
  audience: string
  infoHash: InfoHash
  subject: string
  scopes?: readonly AnnounceScope[]
  rack?: string | undefined
  cidr?: string | undefined
  ttlMs: number
  now: () => number
}): Promise<Minted> {
  const jwk = await readPrivateJwk(options.keyFile)
  const algorithm = algorithmOf(jwk)
  if (algorithm === undefined)
    throw new Error(`Cannot sign with ${options.keyFile}: need an EC P-256, Ed25519 or RSA key`)
  const id = randomUUID()
  const nowSeconds = Math.floor(options.now() / 1000)
  const exp = nowSeconds + Math.max(1, Math.floor(options.ttlMs / 1000))
  const token = await new SignJWT({
    iss: options.issuer,
    aud: options.audience,
    sub: options.subject,
    infohash: infoHashToHex(options.infoHash),
    iat: nowSeconds,
    nbf: nowSeconds,
    exp,
    jti: id,
    scope: options.scopes?.join(' '),
    rack: options.rack,
    cidr: options.cidr,
  })
    .setProtectedHeader({
      alg: algorithm,
      kid: options.kid ?? (await calculateJwkThumbprint(jwk)),
      typ: types.announce,
    })
    .sign(await importJWK(jwk, algorithm))
  return { token, id, expiresAt: new Date(exp * 1000) }
}

/** What a token says, unproven: for a person who must find out why it was refused. @throws Error if it is no JWT */
export function inspectToken(token: string): {
  header: Record<string, unknown>
  claims: Record<string, unknown>
} {
  try {
    return { header: { ...decodeProtectedHeader(token) }, claims: decodeJwt(token) }
  } catch (cause) {
    throw new Error('Cannot read token: it is not a JWT in compact form', { cause })
  }
}

async function readPrivateJwk(file: string): Promise<JWK> {
  const text = await readFile(file, 'utf8')
  try {
    if (text.trimStart().startsWith('-----')) return createPrivateKey(text).export({ format: 'jwk' })
    const json = JSON.parse(text) as { jwk?: JWK } & JWK
    const jwk = json.jwk ?? json
    if (typeof jwk.d !== 'string') throw new Error('it has no private part')
    return jwk
  } catch (cause) {
    throw new Error(`Cannot read private key ${file}: ${(cause as Error).message}`, { cause })
  }
}
