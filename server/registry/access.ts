import type { IncomingHttpHeaders } from 'node:http'

export type Action = 'pull' | 'publish' | 'delete' | 'admin'

/** Who makes a request, after its credential was checked. */
export interface Caller {
  readonly kind: 'host' | 'api' | 'access' | 'anonymous'
  /** Host name, token name, or `anonymous`: for logs and audit. */
  readonly name: string
  /** In the words of scopes: `admin`, `pull:PREFIX`, `publish:PREFIX`, `delete:PREFIX`. */
  readonly scopes: readonly string[]
  /** Set for hosts: the operator's word on where it is. */
  readonly place: string | undefined
  /** The repositories that a registry token was asked for, granted or not; undefined for credentials that say all they allow. */
  readonly askedFor?: readonly string[] | undefined
  /** The credential behind the call; what is made with it must not outlive it. Undefined for `anonymous`. */
  readonly credential: { readonly id: string; readonly expiresAt: Date } | undefined
  /** Whether the credential covers an action on a repository (`admin` covers all; `publish` covers `pull`; `delete` covers nothing else). */
  may(action: Action, repository?: string): boolean
}

/** Turns credentials into callers. */
export interface AccessControl {
  /** The WWW-Authenticate header, without a scope: where the token flow is. */
  readonly challenge: string
  /**
   * Reads `Authorization`: Bearer with an api, host or access token, or Basic with an api token as the password.
   *
   * @throws ApiError 401 `UNAUTHORIZED` where there is none (unless anonymous pull is configured) or it is refused
   */
  callerOf(headers: IncomingHttpHeaders): Promise<Caller>
}
