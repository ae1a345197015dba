import type { Ip } from '../../../lib/protocol/address.ts'
import type { Cidr } from '../../../lib/protocol/cidr.ts'
import { cidrContains } from '../../../lib/protocol/cidr.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import { isInfoHashAt } from '../../../lib/protocol/infohash.ts'
import type { Scrape } from '../../../lib/protocol/scrape.ts'
import type { Logger } from '../../../lib/runtime/log.ts'
import type {
  Admission,
  AnnounceClaims,
  AnnounceScope,
  TokenFault,
  TokenVerifier,
} from '../../../lib/token/claims.ts'
import { TokenError } from '../../../lib/token/claims.ts'
import type { AnnounceRequest, PreHook } from '../hooks.ts'

export interface TokenApprovalOptions {
  readonly verifier: TokenVerifier
  /** May scrape without a token, by UDP, which can carry none, or by HTTP: monitoring. Default: none. */
  readonly scrapeNetworks?: readonly Cidr[]
  /** Told why a request was refused; the client is not. */
  readonly refused: (fault: TokenFault | 'missing') => void
  readonly log: Logger
}

/**
 * Admits an announce or scrape only with a token for that infohash, from the address that the token is bound to, if it
 * is. A token's `rack` claim is where the announcer is; the reply's `tracker id` is the ticket for the token. The texts
 * are chihaya's; the exact reason is the operator's.
 */
export function tokenApproval({
  verifier,
  scrapeNetworks = [],
  refused,
  log,
}: TokenApprovalOptions): PreHook {
  const refuse = (error: unknown): never => {
    if (!(error instanceof TokenError)) throw error
    const { fault } = error
    refused(fault)
    if (log.isLevelEnabled('debug')) log.debug({ fault }, 'token refused')
    if (fault === 'busy') throw new ClientError('busy', 'tracker is busy, try again', { retryInMinutes: 1 })
    throw new ClientError('unapproved', 'unapproved request: invalid jwt')
  }
  const missing = (): never => {
    refused('missing')
    throw new ClientError('unapproved', 'unapproved request: missing jwt')
  }
  const late = async <Known>(answer: Promise<Known>, check: (known: Known) => void): Promise<void> => {
    try {
      check(await answer)
    } catch (error) {
      refuse(error)
    }
  }
  return {
    name: 'token',
    announce: (request) => {
      const { jwt, trackerId } = request.announce
      if (jwt === undefined || jwt === '') return missing()
      try {
        const admission = verifier.admit(jwt, { from: request.source, ticket: trackerId })
        if (admission instanceof Promise) return late(admission, (known) => approve(request, known))
        approve(request, admission)
      } catch (error) {
        refuse(error)
      }
    },
    scrape: ({ scrape, source }) => {
      const { jwt } = scrape
      if (jwt === undefined || jwt === '') {
        if (scrapeNetworks.some((network) => cidrContains(network, source))) return
        return missing()
      }
      try {
        const claims = verifier.verify(jwt, 'announce', { from: source })
        if (claims instanceof Promise) return late(claims, (known) => approveScrape(scrape, source, known))
        approveScrape(scrape, source, claims)
      } catch (error) {
        refuse(error)
      }
    },
  }
}

function approve(request: AnnounceRequest, { claims, ticket }: Admission): void {
  const { announce, source } = request
  checkBearer(claims, 'announce', source)
  const { raw } = announce
  const same = raw
    ? isInfoHashAt(claims.infoHash, raw.bytes, raw.infoHashAt)
    : claims.infoHash === announce.infoHash
  if (!same) throw new TokenError('wrong_infohash')
  request.place = claims.rack
  // A client keeps the last `tracker id` it was told, so it is told once.
  if (ticket !== announce.trackerId) request.trackerId = ticket
}

/** A scrape that names no infohash is of all, and no token is for all. */
function approveScrape({ infoHashes }: Scrape, source: Ip, claims: AnnounceClaims): void {
  checkBearer(claims, 'scrape', source)
  if (infoHashes.length === 0 || infoHashes.some((infoHash) => infoHash !== claims.infoHash))
    throw new TokenError('wrong_infohash')
}

function checkBearer({ scopes, cidr }: AnnounceClaims, scope: AnnounceScope, source: Ip): void {
  if (!scopes.has(scope)) throw new TokenError('wrong_scope')
  if (cidr && !cidrContains(cidr, source)) throw new TokenError('wrong_address')
}
