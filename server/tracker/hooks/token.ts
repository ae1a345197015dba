import { cidrContains } from '../../../lib/protocol/cidr.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import type { Logger } from '../../../lib/runtime/log.ts'
import type { AnnounceClaims, TokenFault, TokenVerifier } from '../../../lib/token/claims.ts'
import { TokenError } from '../../../lib/token/claims.ts'
import type { PreHook } from '../hooks.ts'

export interface TokenApprovalOptions {
  readonly verifier: TokenVerifier
  /** Told why a request was refused; the client is not. */
  readonly refused: (fault: TokenFault | 'missing') => void
  readonly log: Logger
}

/**
 * Admits an announce or scrape only with a token for that infohash, from the address that the token is bound to, if it
 * is. A token's `rack` claim is where the announcer is. The texts are chihaya's; the exact reason is the operator's.
 */
export function tokenApproval({ verifier, refused, log }: TokenApprovalOptions): PreHook {
  const refuse = (error: unknown): never => {
    if (!(error instanceof TokenError)) throw error
    refused(error.fault)
    log.debug({ fault: error.fault }, 'token refused')
    throw new ClientError('unapproved', 'unapproved request: invalid jwt')
  }
  const withClaims = (
    jwt: string | undefined,
    check: (claims: AnnounceClaims) => void,
  ): void | Promise<void> => {
    if (jwt === undefined || jwt === '') {
      refused('missing')
      throw new ClientError('unapproved', 'unapproved request: missing jwt')
    }
    try {
      const claims = verifier.verify(jwt, 'announce')
      if (claims instanceof Promise) return claims.then(check).catch(refuse)
      check(claims)
    } catch (error) {
      refuse(error)
    }
  }
  return {
    name: 'token',
    announce: (request) =>
      withClaims(request.announce.jwt, (claims) => {
        if (!claims.scopes.has('announce')) throw new TokenError('wrong_scope')
        if (claims.infoHash !== request.announce.infoHash) throw new TokenError('wrong_infohash')
        if (claims.cidr && !cidrContains(claims.cidr, request.source)) throw new TokenError('wrong_address')
        request.place = claims.rack
      }),
    scrape: ({ scrape, source }) =>
      withClaims(scrape.jwt, (claims) => {
        if (!claims.scopes.has('scrape')) throw new TokenError('wrong_scope')
        if (scrape.infoHashes.some((infoHash) => infoHash !== claims.infoHash))
          throw new TokenError('wrong_infohash')
        if (claims.cidr && !cidrContains(claims.cidr, source)) throw new TokenError('wrong_address')
      }),
  }
}
