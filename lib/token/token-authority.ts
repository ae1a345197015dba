import { randomUUID } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import type { JWK } from 'jose'
import { SignJWT, calculateJwkThumbprint, importJWK } from 'jose'
import { ClientError } from '../protocol/errors.ts'
import type { InfoHash } from '../protocol/infohash.ts'
import { infoHashToHex } from '../protocol/infohash.ts'
import type { Algorithm } from './algorithms.ts'
import { algorithmOf } from './algorithms.ts'
import type { AccessClaims, AnnounceScope, Claims, TokenVerifier } from './claims.ts'
import { readClaims, types } from './read-claims.ts'
import type { PublicJwk } from './signing-keys.ts'
import { activeKey, openSigningKeys, publicJwk } from './signing-keys.ts'
import type { VerificationKey } from './verifier.ts'
import { createVerifier, tokenCharactersMax } from './verifier.ts'
import { createVerifyPool } from './verify-pool.ts'

export interface Minted {
  /** A secret. */
  readonly token: string
  /** Its `jti`, by which it is revoked. */
  readonly id: string
  readonly expiresAt: Date
}

/** Signs tokens with the active key. Rejects with ClientError `TOKEN_TOO_LONG` where the claims do not fit into a token. */
export interface TokenMinter {
  mintAnnounce(claims: {
    infoHash: InfoHash
    subject: string
    scopes?: readonly AnnounceScope[]
    rack?: string | undefined
    cidr?: string | undefined
    ttlMs: number
  }): Promise<Minted>
  mintHost(claims: {
    host: string
    place?: string | undefined
    repositories: readonly string[]
    ttlMs: number
  }): Promise<Minted>
  mintApi(claims: { name: string; scopes: readonly string[]; ttlMs: number }): Promise<Minted>
  mintAccess(claims: {
    subject: string
    access: AccessClaims['access']
    parent: AccessClaims['parent']
    ttlMs: number
  }): Promise<Minted>
}

/** Keys, and what is done with them. */
export interface TokenAuthority extends AsyncDisposable {
  readonly minter: TokenMinter
  readonly verifier: TokenVerifier
  /** Signatures that wait or are being checked; bounded. */
  readonly verificationsWaiting: number
  /** RFC 7517, public parts only. */
  jwks(): { keys: PublicJwk[] }
}

interface Trust {
  readonly issuer: string
  readonly audience: string
  readonly clockToleranceMs: number
  readonly now: () => number
  readonly isRevoked?: (id: string) => boolean
}

/** Opens the signing keys of a directory, making the first. @throws Error naming a key file that cannot be used */
export async function openTokenAuthority(
  options: Trust & { keysDirectory: string; algorithm: Algorithm },
): Promise<TokenAuthority> {
  const { issuer, audience, now } = options
  const keys = await openSigningKeys({ directory: options.keysDirectory, algorithm: options.algorithm, now })
  const signer = activeKey(keys)
  const signingKey = await importJWK(signer.privateJwk, signer.algorithm)
  const pool = createVerifyPool()
  const verificationKeys = new Map(
    keys.map((key): [string, VerificationKey] => [
      key.kid,
      { kid: key.kid, algorithm: key.algorithm, jwk: publicJwk(key) },
    ]),
  )
  const verifier = createVerifier({ isRevoked: () => false, ...options, keys: () => verificationKeys, pool })

  const mint = async (
    kind: Claims['kind'],
    subject: string,
    ttlMs: number,
    own: Record<string, unknown>,
  ): Promise<Minted> => {
    const id = randomUUID()
    const nowSeconds = Math.floor(now() / 1000)
    const expiresAt = new Date((nowSeconds + Math.max(1, Math.floor(ttlMs / 1000))) * 1000)
    const payload = {
      iss: issuer,
      aud: audience,
      sub: subject,
      iat: nowSeconds,
      nbf: nowSeconds,
      exp: expiresAt.getTime() / 1000,
      jti: id,
      ...own,
    }
    const token = await new SignJWT(payload)
      .setProtectedHeader({ alg: signer.algorithm, kid: signer.kid, typ: types[kind] })
      .sign(signingKey)
    if (token.length > tokenCharactersMax)
      throw new ClientError(
        'TOKEN_TOO_LONG',
        `Cannot make the token: it would have ${token.length} characters, at most ${tokenCharactersMax} are accepted; name fewer repositories, or a prefix such as team/*`,
      )
    verifier.remember(token, readClaims(payload, kind, { ...options, nowMs: now() }))
    return { token, id, expiresAt }
  }

  return {
    verifier,
    get verificationsWaiting() {
      return pool.waiting
    },
    minter: {
      mintAnnounce: ({ infoHash, subject, scopes, rack, cidr, ttlMs }) =>
        mint('announce', subject, ttlMs, {
          infohash: infoHashToHex(infoHash),
          scope: scopes?.join(' '),
          rack,
          cidr,
        }),
      mintHost: ({ host, place, repositories, ttlMs }) => mint('host', host, ttlMs, { place, repositories }),
      mintApi: ({ name, scopes, ttlMs }) => mint('api', name, ttlMs, { scopes }),
      mintAccess: ({ subject, access, parent, ttlMs }) =>
        mint('access', subject, ttlMs, {
          access,
          parent: parent && { jti: parent.id, exp: Math.floor(parent.expiresAt.getTime() / 1000) },
        }),
    },
    jwks: () => ({ keys: keys.map(publicJwk) }),
    [Symbol.asyncDispose]: () => pool[Symbol.asyncDispose](),
  }
}

/** A verifier for a tracker without a registry, from a JWKS file. `reload` keeps the last good set when the new one is bad. */
export async function openKeySetVerifier(
  options: Trust & { jwksFile: string },
): Promise<TokenVerifier & AsyncDisposable & { reload(): Promise<void> }> {
  let keys = await readKeySet(options.jwksFile)
  const pool = createVerifyPool()
  const verifier = createVerifier({ isRevoked: () => false, ...options, keys: () => keys, pool })
  return {
    verify: (token, kind) => verifier.verify(token, kind),
    reload: async () => {
      keys = await readKeySet(options.jwksFile)
      verifier.clear()
    },
    [Symbol.asyncDispose]: () => pool[Symbol.asyncDispose](),
  }
}

/** @throws Error naming the file and what is wrong; a key of a foreign kind is passed over, an empty set is not accepted */
async function readKeySet(file: string): Promise<Map<string, VerificationKey>> {
  let keys: unknown
  try {
    keys = (JSON.parse(await readFile(file, 'utf8')) as { keys?: unknown }).keys
  } catch (cause) {
    throw new Error(`Cannot read key set ${file}: ${(cause as Error).message}`, { cause })
  }
  if (!Array.isArray(keys)) throw new Error(`Cannot read key set ${file}: need {"keys": [...]}`)
  const usable = new Map<string, VerificationKey>()
  for (const jwk of keys as JWK[]) {
    const algorithm = algorithmOf(jwk)
    if (algorithm === undefined) continue
    const kid = jwk.kid ?? (await calculateJwkThumbprint(jwk))
    usable.set(kid, { kid, algorithm, jwk })
  }
  if (usable.size === 0) throw new Error(`Cannot read key set ${file}: it has no ES256, Ed25519 or RS256 key`)
  return usable
}
