import { cidrContains } from '../lib/protocol/cidr.ts'
import type { InfoHash } from '../lib/protocol/infohash.ts'
import type { Logger } from '../lib/runtime/log.ts'
import type { TokenFault } from '../lib/token/claims.ts'
import { TokenError } from '../lib/token/claims.ts'
import type { KeySetVerifier } from '../lib/token/key-set-verifier.ts'
import { openKeySetVerifier } from '../lib/token/key-set-verifier.ts'
import { issuerOf } from '../lib/token/verifier.ts'
import { createSmallVerifyPool } from '../lib/token/verify-pool.ts'
import type { PeerAdmission, PeerTokenSource, TokenSender } from './engine/engine.ts'

/** Peers whose tokens are being looked at. */
const checksMax = 256
/** Of the peers that a host meets again. */
const rememberedMax = 2_000
const clockToleranceMs = 120_000

/** Peers show each other tokens of the `peer` scope, which the server gives with each grant; the announce token is shown to the tracker alone. */
export interface PeerTokens extends PeerAdmission, PeerTokenSource, AsyncDisposable {
  /** This host's own token for a torrent. */
  keep(infoHash: InfoHash, token: string): void
  forget(infoHash: InfoHash): void
}

export interface PeerTokenDeps {
  /** Milliseconds since 1970. */
  readonly now: () => number
  readonly random: () => number
  readonly log: Logger
  readonly refused: (fault: TokenFault) => void
  /** Torrents that nobody is let into any more. */
  readonly isRevoked: (infoHash: InfoHash) => boolean
}

/**
 * Opens the key set of the server. What was fetched is kept in `cacheFile`, so that hosts that know each other's swarms go on while the
 * server is away.
 */
export function createPeerTokens(
  source: { readonly server: string; readonly ca: string | undefined; readonly cacheFile: string },
  { now, random, log, refused, isRevoked }: PeerTokenDeps,
): PeerTokens {
  const tokens = new Map<InfoHash, string>()
  let opening: Promise<KeySetVerifier> | undefined
  let trusted = { issuer: '', audience: '' }

  /** The server signs our own tokens too: they say whose tokens we take. */
  const verifierBy = async (own: string): Promise<KeySetVerifier> => {
    const { issuer, audience } = issuerOf(own)
    if (issuer !== trusted.issuer || audience !== trusted.audience) {
      void close(opening)
      opening = undefined
      trusted = { issuer, audience }
    }
    opening ??= openKeySetVerifier({
      issuer,
      audience,
      keySet: { url: `${source.server}/.well-known/jwks.json`, ca: source.ca, cacheFile: source.cacheFile },
      pool: createSmallVerifyPool(checksMax),
      rememberedMax,
      clockToleranceMs,
      isTorrentRevoked: isRevoked,
      now,
      random,
      log,
    })
    return opening
  }

  const check = async (token: string, infoHash: InfoHash, { ip, thumbprint }: TokenSender) => {
    const own = tokens.get(infoHash)
    // Who has no token of its own yet cannot say whom it trusts.
    if (own === undefined) throw new TokenError('unknown_key')
    const { scopes, cidr, expiresAt, subject, rack, ...claims } = await (
      await verifierBy(own)
    ).verify(token, 'announce', { from: ip })
    if (!scopes.has('peer')) throw new TokenError('wrong_scope')
    if (claims.infoHash !== infoHash) throw new TokenError('wrong_infohash')
    if (cidr && !cidrContains(cidr, ip)) throw new TokenError('wrong_address')
    // Who shows another's token does not hold the key of the certificate that it names.
    if (thumbprint !== undefined && claims.certificate !== thumbprint)
      throw new TokenError('wrong_certificate')
    return { untilMs: expiresAt.getTime() + clockToleranceMs, host: subject, place: rack }
  }

  return {
    tokenFor: (infoHash) => tokens.get(infoHash),
    admit: async (token, infoHash, from) => {
      try {
        return await check(token, infoHash, from)
      } catch (error) {
        const fault = error instanceof TokenError ? error.fault : 'malformed'
        refused(fault)
        log.debug({ infoHash, fault }, 'a peer was not admitted')
        return undefined
      }
    },
    keep: (infoHash, token) => {
      tokens.set(infoHash, token)
      // Now, while the server is there: the keys are kept for when it is not.
      verifierBy(token).catch((error: unknown) => {
        log.warn({ reason: (error as Error).message }, 'the tokens of peers cannot be checked')
      })
    },
    forget: (infoHash) => {
      tokens.delete(infoHash)
    },
    [Symbol.asyncDispose]: async () => {
      await close(opening)
    },
  }
}

async function close(opening: Promise<KeySetVerifier> | undefined): Promise<void> {
  const verifier = await opening?.catch(() => undefined)
  await verifier?.[Symbol.asyncDispose]()
}
