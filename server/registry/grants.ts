import type { FastifyInstance, FastifyRequest } from 'fastify'
import { LRUCache } from 'lru-cache'
import type { SwarmGrant } from '../../lib/client/api.ts'
import { GrantRequest } from '../../lib/client/api.ts'
import type { Digest } from '../../lib/protocol/digest.ts'
import { parseDigest } from '../../lib/protocol/digest.ts'
import type { InfoHash } from '../../lib/protocol/infohash.ts'
import { pieceCount, writeTorrent } from '../../lib/protocol/metainfo.ts'
import type { SwarmCounts } from '../../lib/protocol/scrape.ts'
import type { AnnounceScope } from '../../lib/token/claims.ts'
import type { Minted, TokenMinter } from '../../lib/token/token-authority.ts'
import type { AccessControl, Caller } from './access.ts'
import { ApiError } from './api-error.ts'
import type { BlobStore } from './blob-store.ts'
import type { RevokedTorrents } from './revoked-torrents.ts'
import { refuseRevoked } from './revoked-torrents.ts'
import { announceUrl, webseedUrl } from './torrents.ts'
import { validate } from './validate.ts'
import type { PullThrough } from './upstream/pull-through.ts'
import { untilAborted } from './upstream/until-aborted.ts'
import type { WebseedAsk, WebseedLease } from './webseed-policy.ts'

export interface GrantDeps {
  readonly store: BlobStore
  readonly access: AccessControl
  readonly minter: TokenMinter
  readonly webseed: { mayUse(ask: WebseedAsk): WebseedLease | undefined | Promise<WebseedLease | undefined> }
  readonly revokedTorrents: RevokedTorrents
  readonly pullThrough: Pick<PullThrough, 'upstreamOf' | 'fetchBlob'>
  readonly publicUrl: string
  readonly agentTtlMs: number
  readonly peerTtlMs: number
  /** The network that announce tokens are bound to, if any. */
  readonly cidrOf: (request: FastifyRequest) => string | undefined
  readonly swarmCounts: (infoHash: InfoHash) => SwarmCounts | Promise<SwarmCounts>
  readonly now: () => number
}

/** Tokens kept for asking again: a host that renews early gets the one it has, which the tracker has verified already. */
const tokensCached = 200_000

/** For a blob that is on its way from an upstream; agents wait 30 s for an answer. */
const patienceMs = 10_000

/** `POST /api/v1/swarm-grants`: all that a host needs to take part in a blob's swarm. */
export function registerGrantRoutes(app: FastifyInstance, deps: GrantDeps): void {
  const { store, access, minter, pullThrough, agentTtlMs, peerTtlMs, now } = deps
  const cache = new LRUCache<string, Promise<Minted>>({ max: tokensCached })

  const tokenFor = async (
    caller: Caller,
    infoHash: InfoHash,
    cidr: string | undefined,
    scopes: readonly AnnounceScope[],
    { ttlMs = agentTtlMs, certificate }: { ttlMs?: number; certificate?: string | undefined } = {},
  ): Promise<Minted> => {
    const key = [caller.kind, caller.name, caller.place, infoHash, cidr, certificate, ...scopes].join(' ')
    const known = await cache.get(key)
    // One of a key that was rotated is still good; of a key that was revoked it is not.
    if (known?.kid === minter.kid && known.expiresAt.getTime() - now() > (ttlMs * 2) / 3) return known
    const minted = minter.mintAnnounce({
      infoHash,
      subject: caller.name,
      scopes,
      rack: caller.place,
      cidr,
      certificate,
      ttlMs,
    })
    cache.set(key, minted)
    return minted
  }

  app.post('/api/v1/swarm-grants', async (request): Promise<SwarmGrant> => {
    const caller = await access.callerOf(request.headers)
    const {
      repository,
      digest: text,
      stalledSeconds,
      rangeDone,
      certificate,
    } = validate(GrantRequest, request.body)
    const digest = parseDigest(text)
    if (!caller.may('pull', repository))
      throw new ApiError(403, 'DENIED', `${caller.name} may not pull ${repository}`)
    if (!(await store.statBlob(repository, digest)) && !(await fetchMissing(repository, digest, pullThrough)))
      throw new ApiError(404, 'BLOB_UNKNOWN', `There is no blob ${digest} in ${repository}`)
    const torrent = await store.torrentOf(digest)
    if (!torrent)
      throw new ApiError(404, 'NO_TORRENT', `${digest} is too small to have a torrent`, {
        hint: `Fetch it over HTTP: GET /v2/${repository}/blobs/${digest}`,
      })
    const { infoHash } = torrent
    refuseRevoked(deps.revokedTorrents, infoHash, `${digest} of ${repository}`)
    const cidr = deps.cidrOf(request)
    const announce = await tokenFor(caller, infoHash, cidr, ['announce', 'scrape'])
    // Peers see it, so it opens nothing but their doors.
    const peer = await tokenFor(caller, infoHash, cidr, ['peer'], {
      ttlMs: peerTtlMs,
      certificate,
    })
    const webseed = await tokenFor(caller, infoHash, cidr, ['webseed'])
    const counts = await deps.swarmCounts(infoHash)
    const range = await deps.webseed.mayUse({
      infoHash,
      pieceCount: pieceCount(torrent),
      host: caller.name,
      counts,
      stalledSeconds,
      rangeDone: rangeDone ?? false,
    })
    return {
      infohash: infoHash,
      metainfo: writeTorrent(torrent.info, {}).toString('base64'),
      announceUrl: announceUrl(deps.publicUrl).href,
      token: announce.token,
      expiresAt: announce.expiresAt.toISOString(),
      peerToken: peer.token,
      webseedUrl: webseedUrl(deps.publicUrl, webseed.token, digest),
      webseed: range !== undefined,
      ...(range && { webseedRange: range }),
    }
  })
}

/** Waits a while for a blob of an upstream: the host asks again, and its connection must not be cut for the silence. */
async function fetchMissing(
  repository: string,
  digest: Digest,
  pullThrough: GrantDeps['pullThrough'],
): Promise<boolean> {
  if (!pullThrough.upstreamOf(repository)) return false
  const patience = AbortSignal.timeout(patienceMs)
  try {
    return (await untilAborted(pullThrough.fetchBlob(repository, digest), patience)) !== undefined
  } catch (error) {
    if (!patience.aborted) throw error
    throw new ApiError(
      503,
      'UNAVAILABLE',
      `${digest} is still on its way from the upstream of ${repository}`,
      {
        hint: 'Ask again in a moment.',
        headers: { 'retry-after': '1' },
      },
    )
  }
}
