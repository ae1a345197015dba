import { randomUUID } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { SignJWT, calculateJwkThumbprint, decodeJwt, decodeProtectedHeader, importJWK } from 'jose'
import type { InfoHash } from '../protocol/infohash.ts'
import { infoHashToHex } from '../protocol/infohash.ts'
import type { AnnounceScope } from './claims.ts'
import type { PrivateKey } from './private-key.ts'
import { readPrivateKey } from './private-key.ts'
import { types } from './read-claims.ts'
import type { Minted } from './token-authority.ts'

/**
 * Signs an announce token without a server, with a key file of ours, a private JWK, or a PEM.
 *
 * @throws Error when the file holds no usable private key
 */
export async function mintOffline(options: {
  keyFile: string
  /** Default: the name that the file gives it, else its thumbprint (RFC 7638), as our servers name keys. */
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
  const { jwk, algorithm, ...key } = await readKeyFile(options.keyFile)
  const kid = options.kid ?? key.kid ?? (await calculateJwkThumbprint(jwk))
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
    .setProtectedHeader({ alg: algorithm, kid, typ: types.announce })
    .sign(await importJWK(jwk, algorithm))
  return { token, id, kid, expiresAt: new Date(exp * 1000) }
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

async function readKeyFile(file: string): Promise<PrivateKey> {
  const text = await readFile(file, 'utf8')
  try {
    return readPrivateKey(text)
  } catch (cause) {
    throw new Error(`Cannot read private key ${file}: ${(cause as Error).message}`, { cause })
  }
}
