import type { FastifyReply } from 'fastify'
import type { ContentDigest } from '../../../lib/protocol/digest.ts'
import { isSha256 } from '../../../lib/protocol/digest.ts'
import { ApiError } from '../api-error.ts'
import { answerRange, contentRange, etagOf } from '../../../lib/protocol/http-range.ts'
import { removeBlob } from '../removal.ts'
import { torrentAccepted } from '../torrents.ts'
import type { IncomingBlob } from '../upstream/incoming-blob.ts'
import type { Context } from './context.ts'
import { patiently } from './context.ts'
import { sendBytes } from './send-bytes.ts'

/** GET and HEAD of a blob, whole or one range of it (spec: "Pulling blobs"), or its torrent where Accept names one. */
export async function getBlob(
  repository: string,
  digest: ContentDigest,
  context: Context,
): Promise<FastifyReply> {
  const { request, reply, store, torrents, caller } = context
  reply.header('vary', 'Accept')
  const accepted = torrentAccepted(request.headers.accept)
  const found = await findBlob(repository, digest, accepted.torrent, context)
  // A torrent that is a layer of a referrer of ours: small, and made when it is asked for.
  const made = found ? undefined : await torrents.blob(repository, digest)
  const sizeBytes = found?.sizeBytes ?? made?.length
  if (sizeBytes === undefined)
    throw new ApiError(404, 'BLOB_UNKNOWN', `There is no blob ${digest} in ${repository}`)
  if (accepted.torrent) {
    if (await store.torrentOf(digest))
      return context.torrentReply(request, reply, { repository, digest, caller })
    if (!accepted.bytes)
      throw new ApiError(406, 'UNSUPPORTED', `${digest} has no torrent: it is too small for one`, {
        hint: 'Ask for it without Accept: application/x-bittorrent.',
      })
  }
  const etag = etagOf(digest)
  reply.headers({
    'docker-content-digest': digest,
    'accept-ranges': 'bytes',
    etag,
    'content-type': 'application/octet-stream',
  })
  const answer = answerRange(request.headers, etag, sizeBytes)
  if (answer.status === 304) return reply.code(304).send()
  if (answer.status === 416) {
    throw new ApiError(416, 'SIZE_INVALID', `Cannot serve the range: the blob has ${sizeBytes} bytes`, {
      headers: { 'content-range': contentRange(undefined, sizeBytes) },
    })
  }
  const { start, end } = answer
  if (answer.status === 206) reply.code(206).header('content-range', contentRange(answer, sizeBytes))
  reply.header('content-length', String(end - start))
  if (request.method === 'HEAD') return reply.send()
  if (made) return reply.send(made.subarray(start, end))
  return sendBytes(
    reply,
    (signal) =>
      found?.incoming?.read({ start, end }, signal) ?? store.readBlob(digest, { start, end }, signal),
    context.log,
  )
}

/** DELETE (spec: "Deleting Blobs"): from this repository, unless one of its manifests names it. */
export async function deleteBlob(
  repository: string,
  digest: ContentDigest,
  context: Context,
): Promise<FastifyReply> {
  const { request, reply, caller, audit } = context
  const act = { action: 'blob.delete', target: `${repository}@${digest}` } as const
  await audit(request, caller, act, () => removeBlob(context, repository, digest))
  return reply.code(202).send()
}

/** A blob that is here, or else at the upstream of its repository: `whole` waits until it is here. */
async function findBlob(
  repository: string,
  digest: ContentDigest,
  whole: boolean,
  { request, store, pullThrough, caller }: Context,
): Promise<{ readonly sizeBytes: number; readonly incoming?: IncomingBlob } | undefined> {
  // Who may push and asks whether a blob is here pushes only the manifest if it is.
  const pushes = request.method === 'HEAD' && caller.may('publish', repository)
  const held = await (pushes ? store.claimBlob(repository, digest) : store.statBlob(repository, digest))
  if (held || !isSha256(digest) || !pullThrough.upstreamOf(repository)) return held
  return patiently(request, () => {
    if (whole) return pullThrough.fetchBlob(repository, digest)
    if (request.method === 'HEAD')
      return pullThrough.statBlob(repository, digest).catch((error: unknown) => {
        // Whoever may push asks whether it has to: yes, while the upstream does not help.
        if (caller.may('publish', repository) && error instanceof ApiError && error.status > 500)
          return undefined
        throw error
      })
    return pullThrough.openBlob(repository, digest)
  })
}
