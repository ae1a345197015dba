import type { FastifyReply } from 'fastify'
import type { ContentDigest } from '../../../lib/protocol/digest.ts'
import { parseContentDigest } from '../../../lib/protocol/digest.ts'
import { isRepository } from '../../../lib/protocol/reference.ts'
import { ApiError } from '../api-error.ts'
import type { BlobUpload } from '../blob-store.ts'
import type { OciTarget } from '../oci-path.ts'
import { mayMountFrom } from './authorize.ts'
import type { Context } from './context.ts'
import { bodyOf, contentLength, created, queryOf, unsupported, patiently } from './context.ts'

/** `POST /v2/<name>/blobs/uploads/`: a session, a whole blob in one request, or a mount (spec: "Pushing blobs"). */
export async function startUpload(repository: string, context: Context): Promise<FastifyReply> {
  const { request, reply, store } = context
  const query = queryOf(request)
  const mount = query.get('mount')
  if (mount !== null) {
    const digest = parseContentDigest(mount)
    if (await mountBlob(repository, digest, query.get('from'), context))
      return created(reply, `/v2/${repository}/blobs/${digest}`, digest)
  }
  const wanted = query.get('digest')
  const digest = wanted === null ? undefined : parseContentDigest(wanted)
  const algorithm = query.get('digest-algorithm')
  if (algorithm !== null && algorithm !== 'sha256' && algorithm !== 'sha512')
    throw new ApiError(
      400,
      'UNSUPPORTED',
      `Cannot use digest-algorithm ${JSON.stringify(algorithm.slice(0, 40))}: need sha256 or sha512`,
    )
  const declared = query.get('length')
  if (declared !== null && !/^\d{1,15}$/.test(declared))
    throw new ApiError(
      400,
      'SIZE_INVALID',
      `Cannot use length ${JSON.stringify(declared.slice(0, 40))}: need a number of bytes`,
    )
  const lengthHint =
    declared === null ? (digest === undefined ? undefined : contentLength(request)) : Number(declared)
  const upload = await store.startUpload(repository, lengthHint)
  if (digest === undefined) return uploadState(reply.code(202), repository, upload)
  await receive(upload, context)
  return finishUpload(repository, upload, digest, context)
}

/** Without `from` any repository that the caller may pull from will do. */
async function mountBlob(
  repository: string,
  digest: ContentDigest,
  from: string | null,
  context: Context,
): Promise<boolean> {
  const { store, caller } = context
  if (from !== null)
    return (
      isRepository(from) &&
      mayMountFrom(context, repository, from) &&
      (await store.mountBlob(repository, digest, from))
    )
  for (const holder of await store.repositoriesWith(digest))
    if (caller.may('pull', holder) && (await store.mountBlob(repository, digest, holder))) return true
  return false
}

/** GET, PATCH, PUT and DELETE of a session (spec: "Pushing a blob in chunks", "Cancel a blob upload"). */
export async function continueUpload(
  target: Extract<OciTarget, { kind: 'upload' }>,
  context: Context,
): Promise<FastifyReply> {
  const { request, reply, store } = context
  const { repository } = target
  if (request.method === 'GET' || request.method === 'HEAD') {
    const stands = await store.statUpload(repository, target.id)
    if (stands) return uploadState(reply.code(204), repository, stands)
  }
  // After a restart, and where another server has it, all that was received is read again first.
  const upload = await patiently(request, () => store.resumeUpload(repository, target.id))
  if (!upload) {
    const wanted = queryOf(request).get('digest')
    // The answer to a PUT was lost on its way, and the client asks again.
    if (
      request.method === 'PUT' &&
      wanted !== null &&
      (await store.claimBlob(repository, parseContentDigest(wanted)))
    )
      return created(reply, `/v2/${repository}/blobs/${wanted}`, parseContentDigest(wanted))
    throw new ApiError(
      404,
      'BLOB_UPLOAD_UNKNOWN',
      'There is no such upload: it was finished, cancelled, or abandoned for too long',
    )
  }
  switch (request.method) {
    case 'DELETE':
      await upload.cancel()
      return reply.code(204).send()
    case 'PATCH':
      checkOffset(repository, upload, context)
      await receive(upload, context)
      return uploadState(reply.code(202), repository, upload)
    case 'PUT': {
      const digest = queryOf(request).get('digest')
      if (digest === null)
        throw new ApiError(400, 'DIGEST_INVALID', 'Cannot finish the upload: the query has no digest')
      const wanted = parseContentDigest(digest)
      checkOffset(repository, upload, context)
      await receive(upload, context)
      return finishUpload(repository, upload, wanted, context)
    }
    default:
      throw unsupported(request.method)
  }
}

async function finishUpload(
  repository: string,
  upload: BlobUpload,
  digest: ContentDigest,
  { request, reply }: Context,
): Promise<FastifyReply> {
  // Syncing takes its time, and so does hashing pieces whose length was not declared.
  await patiently(request, () => upload.commit(digest))
  return created(reply, `/v2/${repository}/blobs/${digest}`, digest)
}

/** Chunks come in order: one that starts elsewhere is answered with where the upload stands. */
function checkOffset(repository: string, upload: BlobUpload, { request }: Context): void {
  const header = request.headers['content-range']
  if (header === undefined) return
  const match = /^(?:bytes )?(\d+)-(\d+)(?:\/.*)?$/.exec(header)
  const length = contentLength(request)
  if (!match || (length !== undefined && Number(match[2]) - Number(match[1]) + 1 !== length)) {
    throw new ApiError(
      400,
      'BLOB_UPLOAD_INVALID',
      `Cannot read Content-Range ${JSON.stringify(header.slice(0, 60))}: need START-END that fits Content-Length`,
    )
  }
  if (Number(match[1]) !== upload.offset) {
    throw new ApiError(
      416,
      'BLOB_UPLOAD_INVALID',
      `Cannot append at ${match[1] ?? ''}: the upload stands at ${upload.offset}`,
      { headers: uploadHeaders(repository, upload) },
    )
  }
}

async function receive(upload: BlobUpload, { request }: Context): Promise<void> {
  const length = contentLength(request)
  if (length === 0 || (length === undefined && request.headers['transfer-encoding'] === undefined)) return
  const before = upload.offset
  const gone = new AbortController()
  request.raw.once('close', () => {
    if (!request.raw.complete)
      gone.abort(new ApiError(499, 'BLOB_UPLOAD_INVALID', 'the client closed the connection'))
  })
  await upload.append(bodyOf(request), gone.signal)
  if (length !== undefined && upload.offset - before !== length) {
    throw new ApiError(
      400,
      'SIZE_INVALID',
      `Cannot take the chunk: got ${upload.offset - before} bytes, Content-Length says ${length}`,
    )
  }
}

type UploadStat = Pick<BlobUpload, 'id' | 'offset'>

function uploadHeaders(repository: string, upload: UploadStat): Record<string, string> {
  return {
    location: `/v2/${repository}/blobs/uploads/${upload.id}`,
    range: `0-${Math.max(0, upload.offset - 1)}`,
    // `Range: 0-0` says one byte or none; this says which.
    'upload-offset': String(upload.offset),
    'docker-upload-uuid': upload.id,
  }
}

function uploadState(reply: FastifyReply, repository: string, upload: UploadStat): FastifyReply {
  return reply.headers({ ...uploadHeaders(repository, upload), 'content-length': '0' }).send()
}
