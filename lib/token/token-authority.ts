import { randomUUID } from 'node:crypto'
import { SignJWT } from 'jose'
import { ClientError } from '../protocol/errors.ts'
import type { InfoHash } from '../protocol/infohash.ts'
import { infoHashToHex } from '../protocol/infohash.ts'
import type { AccessClaims, AnnounceScope, Claims, TokenVerifier } from './claims.ts'
import type { KeyRing, KeyRingOptions } from './key-ring.ts'
import { openKeyRing } from './key-ring.ts'
import { readClaims, types } from './read-claims.ts'
import type { PublicJwk } from './signing-keys.ts'
import { publicJwk } from './signing-keys.ts'
import type { Tickets } from './ticket.ts'
import type { VerifierStats } from './verifier.ts'
import { createVerifier, tokenCharactersMax } from './verifier.ts'
import { createVerifyPool } from './verify-pool.ts'

export interface Minted {
  /** A secret. */
  readonly token: string
  /** Its `jti`, by which it is revoked. */
  readonly id: string
  /** Of the key that signed it. */
  readonly kid: string
  readonly expiresAt: Date
}

/** Signs tokens with the active key. Rejects with ClientError `TOKEN_TOO_LONG` where the claims do not fit into a token. */
export interface TokenMinter {
  /** The key that signs now. */
  readonly kid: string
  mintAnnounce(claims: {
    infoHash: InfoHash
    subject: string
    scopes?: readonly AnnounceScope[]
    rack?: string | undefined
    cidr?: string | undefined
    /** SHA-256 of the bearer's certificate, base64url. */
    certificate?: string | undefined
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
  readonly keys: KeyRing
  /** Signatures that wait or are being checked; bounded. */
  readonly verificationsWaiting: number
  verifierStats(): VerifierStats
  /** RFC 7517, public parts only. */
  jwks(): { keys: PublicJwk[] }
}

/** Whose tokens are taken, and how. */
export interface Trust {
  readonly issuer: string
  readonly audience: string
  readonly clockToleranceMs: number
  readonly now: () => number
  readonly isRevoked?: (id: string) => boolean
  /** Torrents whose announce, webseed and peer tokens count no longer. Default: none. */
  readonly isTorrentRevoked?: ((infoHash: InfoHash) => boolean) | undefined
  /** Default: none are given, and none taken. */
  readonly tickets?: Tickets | undefined
  /** Takes announce tokens as Quay signed them for chihaya. */
  readonly acceptChihaya?: boolean | undefined
}

/** Opens the signing keys of a directory, making the first. @throws Error naming a key file that cannot be used */
export async function openTokenAuthority(
  options: Trust & { keysDirectory: string } & Omit<KeyRingOptions, 'directory'>,
): Promise<TokenAuthority> {
  const { issuer, audience, now } = options
  const keys = await openKeyRing({ ...options, directory: options.keysDirectory })
  const pool = createVerifyPool()
  const verifier = createVerifier({ isRevoked: () => false, ...options, keySource: keys, pool })

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
    const { signer } = keys
    await keys.willSign(signer, expiresAt.getTime())
    const { kid, algorithm } = signer.key
    const token = await new SignJWT(payload)
      .setProtectedHeader({ alg: algorithm, kid, typ: types[kind] })
      .sign(signer.secret)
    if (token.length > tokenCharactersMax)
      throw new ClientError(
        'TOKEN_TOO_LONG',
        `Cannot make the token: it would have ${token.length} characters, at most ${tokenCharactersMax} are accepted; name fewer repositories, or a prefix such as team/*`,
      )
    verifier.remember(token, readClaims(payload, kind, { ...options, nowMs: now() }), signer.verification)
    return { token, id, kid, expiresAt }
  }

  return {
    verifier,
    keys,
    get verificationsWaiting() {
      return pool.waiting
    },
    verifierStats: () => verifier.stats(),
    minter: {
      get kid() {
        return keys.signer.key.kid
      },
      mintAnnounce: ({ infoHash, subject, scopes, rack, cidr, certificate, ttlMs }) =>
        mint('announce', subject, ttlMs, {
          infohash: infoHashToHex(infoHash),
          scope: scopes?.join(' '),
          rack,
          cidr,
          cnf: certificate === undefined ? undefined : { 'x5t#S256': certificate },
        }),
      mintHost: ({ host, place, repositories, ttlMs }) => mint('host', host, ttlMs, { place, repositories }),
      mintApi: ({ name, scopes, ttlMs }) => mint('api', name, ttlMs, { scopes }),
      mintAccess: ({ subject, access, parent, ttlMs }) =>
        mint('access', subject, ttlMs, {
          access,
          parent: parent && { jti: parent.id, exp: Math.floor(parent.expiresAt.getTime() / 1000) },
        }),
    },
    jwks: () => ({ keys: keys.list().map(publicJwk) }),
    [Symbol.asyncDispose]: async () => {
      await keys[Symbol.asyncDispose]()
      await pool[Symbol.asyncDispose]()
    },
  }
}
