import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import type { ContentDigest } from '../../lib/protocol/digest.ts'
import { digestHex, parseDigest } from '../../lib/protocol/digest.ts'
import { writeTorrent } from '../../lib/protocol/metainfo.ts'
import { isRepository } from '../../lib/protocol/reference.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { TokenMinter } from '../../lib/token/token-authority.ts'
import type { AccessControl, Caller } from './access.ts'
import { ApiError } from './api-error.ts'
import type { BlobStore } from './blob-store.ts'
import { sendError } from './oci/send-error.ts'
import type { RevokedTorrents } from './revoked-torrents.ts'
import { refuseRevoked } from './revoked-torrents.ts'

export interface TorrentDeps {
  readonly store: BlobStore
  readonly access: AccessControl
  readonly minter: TokenMinter
  readonly revokedTorrents: RevokedTorrents
  readonly publicUrl: string
  readonly torrentTtlMs: number
  /** Life of an announce token of a host. */
  readonly agentTtlMs: number
  /** The network that a host's announce tokens are bound to, if any. */
  readonly cidrOf: (caller: Caller, request: FastifyRequest) => string | undefined
  readonly now: () => number
}

/** An announce token asked for with a longer life than this many usual ones gets this. */
const ttlFactorMax = 30

/**
 * Quay's `GET /c1/torrent/<name>/blobs/<digest>`: a .torrent with a signed announce URL. Statuses are Quay's: 404 for what is not
 * there or has no torrent, 403 for who may not pull, with a credential or without, 405 for what cannot be a torrent's, 406 for
 * who does not take one.
 */
export function registerTorrentRoutes(app: FastifyInstance, deps: TorrentDeps & { log: Logger }): void {
  void app.register((scope, _options, done) => {
    scope.removeAllContentTypeParsers()
    scope.addContentTypeParser('*', (_request, _payload, parsed) => {
      parsed(null)
    })
    scope.setErrorHandler((error, _request, reply) => sendError(error, reply, deps.log))
    scope.route<{ Params: { '*': string } }>({
      method: ['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE'],
      url: '/c1/torrent/*',
      handler: async (request, reply) => {
        if (request.method !== 'GET' && request.method !== 'HEAD')
          throw new ApiError(405, 'UNSUPPORTED', `${request.method} is not supported here`, {
            headers: { allow: 'GET, HEAD' },
          })
        const match = /^(.+)\/blobs\/([^/]+)$/.exec(request.params['*'])
        const [, repository = '', digest = ''] = match ?? []
        if (!isRepository(repository)) throw new ApiError(404, 'NAME_UNKNOWN', 'There is no such repository')
        const caller = await callerOf(request, deps.access)
        if (!caller.may('pull', repository))
          throw new ApiError(403, 'DENIED', `${caller.name} may not pull ${repository}`)
        const { accept } = request.headers
        if (accept !== undefined && !torrentTaken(accept))
          throw new ApiError(406, 'UNSUPPORTED', 'Only application/x-bittorrent is to be had here')
        return sendTorrent(request, reply, { repository, digest: parseDigest(digest), caller }, deps)
      },
    })
    done()
  })
}

/** Quay knew no challenge here: who shows nothing is forbidden what is not public. */
async function callerOf(request: FastifyRequest, access: AccessControl): Promise<Caller> {
  try {
    return await access.callerOf(request.headers)
  } catch (error) {
    if (!(error instanceof ApiError) || error.status !== 401 || request.headers.authorization !== undefined)
      throw error
    throw new ApiError(403, 'DENIED', error.message, {
      cause: error,
      ...(error.hint && { hint: error.hint }),
    })
  }
}

export const torrentType = 'application/x-bittorrent'

/** Whether an Accept header names a torrent, and whether it takes the bytes of a blob as well (RFC 9110 section 12.5.1). */
export function torrentAccepted(accept: string | undefined): { torrent: boolean; bytes: boolean } {
  const ranges = mediaRanges(accept ?? '*/*')
  return {
    torrent: ranges.includes(torrentType),
    bytes: ranges.some((range) => ['*/*', 'application/*', 'application/octet-stream'].includes(range)),
  }
}

function torrentTaken(accept: string): boolean {
  return mediaRanges(accept).some((range) => ['*/*', 'application/*', torrentType].includes(range))
}

/** The media ranges of an Accept header but those with a weight of 0, in lower case and without parameters. */
function mediaRanges(accept: string): string[] {
  return accept
    .split(',')
    .map((range) => range.split(';').map((part) => part.trim().toLowerCase()))
    .filter(([, ...parameters]) => !parameters.some((parameter) => /^q=0(\.0{0,3})?$/.test(parameter)))
    .map(([range = '']) => range)
}

/**
 * Answers with the .torrent of a blob: `?webseed=0` leaves the webseed out, `?ttl=SECONDS` sets the life of its token.
 *
 * @throws ApiError 404 for a blob that is not there or too small to have a torrent
 */
export async function sendTorrent(
  request: FastifyRequest,
  reply: FastifyReply,
  { repository, digest, caller }: { repository: string; digest: ContentDigest; caller: Caller },
  {
    store,
    minter,
    revokedTorrents,
    publicUrl,
    torrentTtlMs,
    agentTtlMs,
    cidrOf,
    now,
  }: Omit<TorrentDeps, 'access'>,
): Promise<FastifyReply> {
  const torrent = (await store.statBlob(repository, digest)) && (await store.torrentOf(digest))
  if (!torrent) throw new ApiError(404, 'BLOB_UNKNOWN', `There is no torrent for ${digest} in ${repository}`)
  refuseRevoked(revokedTorrents, torrent.infoHash, `${digest} of ${repository}`)
  const query = new URL(request.raw.url ?? '/', 'http://registry').searchParams
  const ttl = query.get('ttl')
  if (ttl !== null && !/^[1-9]\d{0,8}$/.test(ttl))
    throw new ApiError(400, 'UNSUPPORTED', `Cannot use ttl ${JSON.stringify(ttl.slice(0, 20))}: need seconds`)
  const askedMs = ttl === null ? undefined : Number(ttl) * 1000
  const ttlMs = announceTtlMs({
    askedMs,
    usualMs: torrentTtlMs,
    hostMs: agentTtlMs,
    caller,
    nowMs: now(),
  })
  const mint = (scopes: readonly ('announce' | 'scrape' | 'webseed')[]) =>
    minter.mintAnnounce({
      infoHash: torrent.infoHash,
      subject: caller.name,
      scopes,
      rack: caller.place,
      cidr: cidrOf(caller, request),
      ttlMs,
    })
  const { token } = await mint(['announce', 'scrape'])
  const urlList =
    query.get('webseed') === '0' ? [] : [webseedUrl(publicUrl, (await mint(['webseed'])).token, digest)]
  const bytes = writeTorrent(torrent.info, {
    announce: signedAnnounceUrl(publicUrl, token),
    createdBy: 'Rackswarm',
    urlList,
  })
  return reply
    .headers({
      'content-type': torrentType,
      'content-disposition': `attachment; filename="${torrent.name}.torrent"`,
      'cache-control': 'no-store',
      vary: 'Accept',
    })
    .send(bytes)
}

/**
 * How long an announce token lives that somebody asks for: as asked, within bounds, and no longer than the credential behind the
 * call. A host gets no more than it gets with a grant, or its revocation would come too late.
 */
export function announceTtlMs({
  askedMs,
  usualMs,
  hostMs,
  caller,
  nowMs,
}: {
  askedMs: number | undefined
  usualMs: number
  hostMs: number
  caller: Caller
  nowMs: number
}): number {
  if (caller.kind === 'host') return Math.min(askedMs ?? hostMs, hostMs)
  // Nobody stands behind an anonymous one.
  if (caller.credential === undefined) return Math.min(askedMs ?? usualMs, usualMs)
  const leftMs = caller.credential.expiresAt.getTime() - nowMs
  return Math.min(askedMs ?? usualMs, usualMs * ttlFactorMax, leftMs)
}

/** The announce URL with a token in its query; the public URL may have a query of its own. */
export function signedAnnounceUrl(publicUrl: string, token: string): string {
  const url = announceUrl(publicUrl)
  url.searchParams.set('jwt', token)
  return url.href
}

export function announceUrl(publicUrl: string): URL {
  const url = new URL(publicUrl)
  url.pathname = `${url.pathname.replace(/\/$/, '')}/announce`
  return url
}

/** Token in the path: libtorrent refuses webseeds with a query in private torrents. A secret. */
export function webseedUrl(publicUrl: string, token: string, digest: ContentDigest): string {
  return `${publicUrl}/webseed/${token}/${digestHex(digest)}`
}
