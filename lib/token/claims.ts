import type { Ip } from '../protocol/address.ts'
import type { Cidr } from '../protocol/cidr.ts'
import type { InfoHash } from '../protocol/infohash.ts'
import type { Place } from '../protocol/place.ts'

/** Why a token was refused: a closed set, for a metric label and a debug line. The wire says only "invalid". */
export type TokenFault =
  | 'malformed'
  | 'wrong_type'
  | 'wrong_algorithm'
  | 'unknown_key'
  | 'bad_signature'
  | 'expired'
  | 'not_yet_valid'
  | 'wrong_issuer'
  | 'wrong_audience'
  | 'missing_claim'
  | 'bad_claim'
  | 'revoked'
  | 'wrong_infohash'
  | 'wrong_address'
  | 'wrong_certificate'
  | 'wrong_scope'
  /** Not looked at: too many others were waiting. */
  | 'busy'

export class TokenError extends Error {
  override readonly name = 'TokenError'
  readonly fault: TokenFault

  constructor(fault: TokenFault, options?: ErrorOptions) {
    super(`Cannot accept token: ${fault.replaceAll('_', ' ')}`, options)
    this.fault = fault
  }
}

export type AnnounceScope = 'announce' | 'scrape' | 'webseed' | 'peer'

/** `typ: announce+jwt`: its bearer may take part in one swarm. */
export interface AnnounceClaims {
  readonly kind: 'announce'
  readonly infoHash: InfoHash
  /** Who it was made for: a host, or the name of an API token. */
  readonly subject: string
  readonly scopes: ReadonlySet<AnnounceScope>
  /** The operator's word on where the bearer is. */
  readonly rack: Place | undefined
  /** The announcing address must lie in it. */
  readonly cidr: Cidr | undefined
  /** `cnf.x5t#S256` (RFC 8705): over TLS its bearer must hold the key of the certificate with this SHA-256, base64url. */
  readonly certificate: string | undefined
  readonly id: string
  readonly expiresAt: Date
}

/** `typ: host+jwt`: an enrolled host. */
export interface HostClaims {
  readonly kind: 'host'
  readonly host: string
  readonly place: Place | undefined
  /** Repository prefixes it may fetch: `web`, `team/*`, `*`. */
  readonly repositories: readonly string[]
  readonly id: string
  readonly expiresAt: Date
}

/** `typ: api+jwt`: a person or a CI job; also what `docker login` takes as the password. */
export interface ApiClaims {
  readonly kind: 'api'
  readonly name: string
  /** `admin`, `pull:PREFIX`, `publish:PREFIX`, `delete:PREFIX`. */
  readonly scopes: readonly string[]
  readonly id: string
  readonly expiresAt: Date
}

/** `typ: at+jwt` (RFC 9068): a short registry token from the token flow, for named repositories. */
export interface AccessClaims {
  readonly kind: 'access'
  readonly subject: string
  readonly access: readonly {
    readonly type: string
    readonly name: string
    readonly actions: readonly string[]
  }[]
  /** The credential it was made with: revoking that ends this. */
  readonly parent: { readonly id: string; readonly expiresAt: Date } | undefined
  readonly id: string
  readonly expiresAt: Date
}

export type Claims = AnnounceClaims | HostClaims | ApiClaims | AccessClaims
export type ClaimsOf<Kind extends Claims['kind']> = Extract<Claims, { kind: Kind }>

/** What may make a check cheaper, or fair. */
export interface VerifyHints {
  /** Who asks: each network gets its share of the signature checks. */
  readonly from?: Ip | undefined
  /** What this server, or a sibling, gave for the token before. One that is wrong is as good as none. */
  readonly ticket?: string | undefined
}

/** An announce token that was accepted. */
export interface Admission {
  readonly claims: AnnounceClaims
  /** To be brought along with the same token the next time; undefined where there are no tickets. */
  readonly ticket: string | undefined
}

/**
 * Checks tokens: signature by the recorded algorithm of the `kid`'s key, type, issuer, audience, times, revocation.
 * A token seen before is answered from a bounded cache without a promise.
 */
export interface TokenVerifier {
  /** @throws TokenError (or rejects with it) */
  verify<Kind extends Claims['kind']>(
    token: string,
    kind: Kind,
    hints?: VerifyHints,
  ): ClaimsOf<Kind> | Promise<ClaimsOf<Kind>>
  /** The same for an announce token, with the ticket for it. @throws TokenError (or rejects with it) */
  admit(token: string, hints: VerifyHints): Admission | Promise<Admission>
}
