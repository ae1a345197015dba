import type { FastifyReply, FastifyRequest } from 'fastify'
import type { ContentDigest } from '../../../lib/protocol/digest.ts'
import { isTag } from '../../../lib/protocol/reference.ts'
import type { Logger } from '../../../lib/runtime/log.ts'
import type { InTurn } from '../../../lib/runtime/turn.ts'
import type { AccessControl, Caller } from '../access.ts'
import { ApiError } from '../api-error.ts'
import type { Audit } from '../audit.ts'
import type { BlobStore } from '../blob-store.ts'
import type { SignatureSearch } from '../signature-search.ts'
import type { TorrentReferrers } from '../torrent-referrers.ts'
import type { PullThrough } from '../upstream/pull-through.ts'

export interface OciDeps {
  readonly store: BlobStore
  readonly access: AccessControl
  readonly manifestMaxBytes: number
  readonly audit: Audit
  /** One at a time changes the manifests and tags of a repository: a tag must not name what is being deleted. */
  readonly inTurn: InTurn
  /** Other registries, for what is not here. */
  readonly pullThrough: PullThrough
  readonly log: Logger
  readonly now: () => number
  /** Called after a tag moved or went, durably. */
  readonly onTag: (repository: string, tag: string) => void
  readonly signatures: SignatureSearch
  /** Unsigned torrents, as referrers of the manifests whose layers they are of. */
  readonly torrents: TorrentReferrers
  /** Answers a request for a blob that has a torrent, and whose Accept names one. */
  readonly torrentReply: (
    request: FastifyRequest,
    reply: FastifyReply,
    blob: { repository: string; digest: ContentDigest; caller: Caller },
  ) => Promise<FastifyReply>
}

/** One request below /v2/, its caller known. */
export interface Context extends OciDeps {
  readonly request: FastifyRequest
  readonly reply: FastifyReply
  readonly caller: Caller
}

export function queryOf(request: FastifyRequest): URLSearchParams {
  return new URL(request.raw.url ?? '/', 'http://registry').searchParams
}

export function contentLength(request: FastifyRequest): number | undefined {
  const header = request.headers['content-length']
  return header === undefined ? undefined : Number(header)
}

/**
 * The body as it comes; a chunk is good until the next is asked for. Who stops reading leaves the connection alone: the
 * refusal still has to get through.
 */
export async function* bodyOf({ raw }: FastifyRequest): AsyncGenerator<Uint8Array> {
  for await (const chunk of raw.iterator({ destroyOnReturn: false }) as AsyncIterable<Buffer<ArrayBuffer>>) {
    yield chunk
    // Freed here and now: left to the collector, each 64 MiB of a blob would have it walk the whole heap.
    if (chunk.length === chunk.buffer.byteLength) chunk.buffer.transfer(0)
  }
}

export function created(reply: FastifyReply, location: string, digest: ContentDigest): FastifyReply {
  return reply.code(201).headers({ location, 'docker-content-digest': digest, 'content-length': '0' }).send()
}

/** @throws ApiError 400 */
export function checkTag(text: string): string {
  if (!isTag(text))
    throw new ApiError(
      400,
      'MANIFEST_INVALID',
      `Cannot use tag ${JSON.stringify(text.slice(0, 140))}: need up to 128 of A-Z a-z 0-9 _ . -`,
    )
  return text
}

export function unsupported(method: string): ApiError {
  return new ApiError(405, 'UNSUPPORTED', `${method} is not supported here`)
}

/** While the server works the client is silent, and must not be cut for that. */
export async function patiently<Result>(
  { raw }: FastifyRequest,
  work: () => Promise<Result>,
): Promise<Result> {
  const { socket } = raw
  const idleMs = socket.timeout ?? 0
  socket.setTimeout(0)
  try {
    return await work()
  } finally {
    socket.setTimeout(idleMs)
  }
}
