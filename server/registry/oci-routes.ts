import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { Readable } from 'node:stream'
import type { Digest } from '../../lib/protocol/digest.ts'
import { digestOf, parseDigest } from '../../lib/protocol/digest.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import { isRepository, isTag } from '../../lib/protocol/reference.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { KeyedTurn } from '../../lib/runtime/turn.ts'
import type { AccessControl, Action, Caller } from './access.ts'
import { ApiError } from './api-error.ts'
import type { BlobStore, BlobUpload, Manifest } from './blob-store.ts'
import { parseRange } from './http-range.ts'
import { checkManifest, subjectOf } from './oci-manifest.ts'
import type { OciTarget } from './oci-path.ts'
import { parseOciPath } from './oci-path.ts'
import { referrersOf } from './referrers.ts'
import { removeBlob, removeManifest, removeTag } from './removal.ts'

export interface OciDeps {
  readonly store: BlobStore
  readonly access: AccessControl
  readonly manifestMaxBytes: number
  /** One at a time changes the manifests and tags of a repository: a tag must not name what is being deleted. */
  readonly inTurn: KeyedTurn
  readonly log: Logger
  /** Called after a tag moved or went, durably. */
  readonly onTag: (repository: string, tag: string) => void
  /** Answers a blob request whose Accept names a torrent. */
  readonly torrentReply: (
    request: FastifyRequest,
    reply: FastifyReply,
    blob: { repository: string; digest: Digest; caller: Caller },
  ) => Promise<FastifyReply>
}

const emptyIndexType = 'application/vnd.oci.image.index.v1+json'
const pageMax = 1000

/** The OCI distribution API (distribution-spec 1.1) below /v2/. Errors have the spec's body. */
export function registerOciRoutes(app: FastifyInstance, deps: OciDeps): void {
  void app.register((scope, _options, done) => {
    // Bodies are streams of any type and size; each handler reads, and bounds, its own.
    scope.removeAllContentTypeParsers()
    scope.addContentTypeParser('*', (_request, _payload, parsed) => {
      parsed(null)
    })
    scope.setErrorHandler((error, _request, reply) => sendError(error, reply, deps.log))
    const handler = async (request: FastifyRequest, reply: FastifyReply) => {
      const target = parseOciPath((request.raw.url ?? '').split('?')[0]?.replace(/^\/v2\/?/, '') ?? '')
      const caller = await deps.access.callerOf(request.headers).catch((error: unknown) => {
        throw withScope(error, target, request.method)
      })
      return dispatch(target, { request, reply, caller, ...deps })
    }
    for (const url of ['/v2', '/v2/', '/v2/*']) {
      scope.route({ method: ['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE'], url, handler })
    }
    done()
  })
}

interface Context extends OciDeps {
  readonly request: FastifyRequest
  readonly reply: FastifyReply
  readonly caller: Caller
}

async function dispatch(target: OciTarget, context: Context): Promise<FastifyReply> {
  const { request, reply } = context
  const method = request.method
  const reads = method === 'GET' || method === 'HEAD'
  switch (target.kind) {
    case 'base':
      if (!reads) throw unsupported(method)
      if (context.caller.kind === 'anonymous')
        throw new ApiError(401, 'UNAUTHORIZED', 'Cannot tell who asks: the token flow says how', {
          headers: { 'www-authenticate': context.access.challenge },
        })
      return reply.header('docker-distribution-api-version', 'registry/2.0').send({})
    case 'catalog':
      if (!reads) throw unsupported(method)
      return catalog(context)
    case 'tags':
      if (!reads) throw unsupported(method)
      require(context, 'pull', target.repository)
      return tags(target.repository, context)
    case 'referrers':
      if (!reads) throw unsupported(method)
      require(context, 'pull', target.repository)
      return referrers(target.repository, parseDigest(target.digest), context)
    case 'blob':
      if (method === 'DELETE') {
        require(context, 'publish', target.repository)
        await removeBlob(context, target.repository, parseDigest(target.digest))
        return reply.code(202).send()
      }
      if (!reads) throw unsupported(method)
      require(context, 'pull', target.repository)
      return blob(target.repository, parseDigest(target.digest), context)
    case 'manifest':
      require(context, reads ? 'pull' : 'publish', target.repository)
      if (reads) return getManifest(target, context)
      if (method === 'PUT') return putManifest(target, context)
      if (method === 'DELETE') return deleteManifest(target, context)
      throw unsupported(method)
    case 'uploads':
      if (method !== 'POST') throw unsupported(method)
      require(context, 'publish', target.repository)
      return startUpload(target.repository, context)
    case 'upload':
      require(context, 'publish', target.repository)
      return continueUpload(target, context)
  }
}

async function startUpload(repository: string, context: Context): Promise<FastifyReply> {
  const { request, reply, store, caller } = context
  const query = queryOf(request)
  const mount = query.get('mount')
  const from = query.get('from')
  if (mount !== null && from !== null && isRepository(from) && caller.may('pull', from)) {
    const digest = parseDigest(mount)
    if (await store.mountBlob(repository, digest, from))
      return created(reply, `/v2/${repository}/blobs/${digest}`, digest)
  }
  const wanted = query.get('digest')
  const digest = wanted === null ? undefined : parseDigest(wanted)
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

async function continueUpload(
  target: Extract<OciTarget, { kind: 'upload' }>,
  context: Context,
): Promise<FastifyReply> {
  const { request, reply, store } = context
  const { repository } = target
  // After a restart all that was received is read again first.
  const upload = await patiently(request, () => store.resumeUpload(repository, target.id))
  if (!upload) {
    const wanted = queryOf(request).get('digest')
    // The answer to a PUT was lost on its way, and the client asks again.
    if (
      request.method === 'PUT' &&
      wanted !== null &&
      (await store.claimBlob(repository, parseDigest(wanted)))
    )
      return created(reply, `/v2/${repository}/blobs/${wanted}`, parseDigest(wanted))
    throw new ApiError(
      404,
      'BLOB_UPLOAD_UNKNOWN',
      'There is no such upload: it was finished, cancelled, or abandoned for too long',
    )
  }
  switch (request.method) {
    case 'GET':
    case 'HEAD':
      return uploadState(reply.code(204), repository, upload)
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
      const wanted = parseDigest(digest)
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
  digest: Digest,
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
      {
        headers: uploadHeaders(repository, upload),
      },
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

/** While the server works the client is silent, and must not be cut for that. */
async function patiently<Result>({ raw }: FastifyRequest, work: () => Promise<Result>): Promise<Result> {
  const { socket } = raw
  const idleMs = socket.timeout ?? 0
  socket.setTimeout(0)
  try {
    return await work()
  } finally {
    socket.setTimeout(idleMs)
  }
}

function uploadHeaders(repository: string, upload: BlobUpload): Record<string, string> {
  return {
    location: `/v2/${repository}/blobs/uploads/${upload.id}`,
    range: `0-${Math.max(0, upload.offset - 1)}`,
    // `Range: 0-0` says one byte or none; this says which.
    'upload-offset': String(upload.offset),
    'docker-upload-uuid': upload.id,
  }
}

function uploadState(reply: FastifyReply, repository: string, upload: BlobUpload): FastifyReply {
  return reply.headers({ ...uploadHeaders(repository, upload), 'content-length': '0' }).send()
}

function created(reply: FastifyReply, location: string, digest: Digest): FastifyReply {
  return reply.code(201).headers({ location, 'docker-content-digest': digest, 'content-length': '0' }).send()
}

async function blob(repository: string, digest: Digest, context: Context): Promise<FastifyReply> {
  const { request, reply, store, caller } = context
  reply.header('vary', 'Accept')
  // Who may push and asks whether a blob is here pushes only the manifest if it is.
  const pushes = request.method === 'HEAD' && caller.may('publish', repository)
  const found = pushes ? await store.claimBlob(repository, digest) : await store.statBlob(repository, digest)
  if (!found) throw new ApiError(404, 'BLOB_UNKNOWN', `There is no blob ${digest} in ${repository}`)
  if (/application\/x-bittorrent/i.test(request.headers.accept ?? ''))
    return context.torrentReply(request, reply, { repository, digest, caller })
  const etag = `"${digest}"`
  reply.headers({
    'docker-content-digest': digest,
    'accept-ranges': 'bytes',
    etag,
    'content-type': 'application/octet-stream',
  })
  if (request.headers['if-none-match']?.includes(etag) === true) return reply.code(304).send()
  const ifRange = request.headers['if-range']
  const range =
    ifRange === undefined || ifRange === etag ? parseRange(request.headers.range, found.sizeBytes) : undefined
  if (range === 'unsatisfiable') {
    throw new ApiError(416, 'SIZE_INVALID', `Cannot serve the range: the blob has ${found.sizeBytes} bytes`, {
      headers: { 'content-range': `bytes */${found.sizeBytes}` },
    })
  }
  const { start, end } = range ?? { start: 0, end: found.sizeBytes }
  if (range) reply.code(206).header('content-range', `bytes ${start}-${end - 1}/${found.sizeBytes}`)
  reply.header('content-length', String(end - start))
  return request.method === 'HEAD'
    ? reply.send()
    : sendBytes(reply, (signal) => store.readBlob(digest, { start, end }, signal))
}

/** Streams to the client, and stops reading when it goes away. */
export function sendBytes(
  reply: FastifyReply,
  read: (signal: AbortSignal) => AsyncIterable<Uint8Array>,
): FastifyReply {
  const gone = new AbortController()
  reply.raw.once('close', () => {
    gone.abort()
  })
  if (reply.raw.destroyed) return reply.hijack()
  return reply.send(Readable.from(read(gone.signal), { objectMode: false }))
}

async function getManifest(
  target: Extract<OciTarget, { kind: 'manifest' }>,
  { request, reply, store, caller, inTurn }: Context,
): Promise<FastifyReply> {
  const { repository } = target
  const manifest = await findManifest(target, store)
  // As with blobs: an index may be all that is pushed.
  if (request.method === 'HEAD' && caller.may('publish', repository))
    if (!(await inTurn(repository, () => store.claimManifest(repository, manifest.digest))))
      throw unknownManifest(target)
  const etag = `"${manifest.digest}"`
  reply.headers({
    'docker-content-digest': manifest.digest,
    // Set on the raw reply: fastify would add a charset, and clients compare the type as a whole.
    'content-length': String(manifest.bytes.length),
    etag,
  })
  if (request.headers['if-none-match']?.includes(etag) === true)
    return reply.code(304).removeHeader('content-length').send()
  reply.header('content-type', manifest.mediaType)
  return request.method === 'HEAD' ? reply.send() : reply.send(manifest.bytes)
}

async function findManifest(
  target: { repository: string; reference: string },
  store: BlobStore,
): Promise<Manifest> {
  const { repository, reference } = target
  const digest = reference.includes(':')
    ? parseDigest(reference)
    : (await store.getTag(repository, checkTag(reference)))?.digest
  const manifest = digest && (await store.getManifest(repository, digest))
  if (!manifest) throw unknownManifest(target)
  return manifest
}

function unknownManifest({ repository, reference }: { repository: string; reference: string }): ApiError {
  return new ApiError(404, 'MANIFEST_UNKNOWN', `There is no manifest ${repository}:${reference}`)
}

async function putManifest(
  { repository, reference }: Extract<OciTarget, { kind: 'manifest' }>,
  context: Context,
): Promise<FastifyReply> {
  const { request, reply, store } = context
  const bytes = await readBody(request, context.manifestMaxBytes)
  const digest = digestOf(bytes)
  const byDigest = reference.includes(':')
  if (byDigest && parseDigest(reference) !== digest) {
    throw new ApiError(
      400,
      'DIGEST_INVALID',
      `Cannot store manifest: its bytes have ${digest}, not ${reference}`,
    )
  }
  if (!byDigest) checkTag(reference)
  const mediaType = request.headers['content-type'] ?? ''
  // In one turn, so that a collection either sees the manifest or finds what it names claimed.
  await context.inTurn(repository, async () => {
    await checkManifest({ repository, mediaType, bytes, store })
    await store.putManifest(repository, { digest, mediaType, bytes })
    if (byDigest) return
    // The release before stays for a while yet.
    const before = await store.getTag(repository, reference)
    if (before) await store.claimManifest(repository, before.digest)
    await store.putTag(repository, reference, digest)
  })
  if (!byDigest) {
    context.onTag(repository, reference)
    context.log.info({ repository, tag: reference, digest, by: context.caller.name }, 'tag moved')
  }
  const subject = subjectOf(bytes)
  if (subject !== undefined) reply.header('oci-subject', subject)
  return created(reply, `/v2/${repository}/manifests/${digest}`, digest)
}

async function deleteManifest(
  { repository, reference }: Extract<OciTarget, { kind: 'manifest' }>,
  context: Context,
): Promise<FastifyReply> {
  const byDigest = reference.includes(':')
  const found = byDigest
    ? await removeManifest(context, repository, parseDigest(reference))
    : await removeTag(context, repository, checkTag(reference))
  if (!found)
    throw byDigest
      ? new ApiError(404, 'MANIFEST_UNKNOWN', `There is no manifest ${reference} in ${repository}`)
      : new ApiError(404, 'MANIFEST_UNKNOWN', `There is no tag ${repository}:${reference}`)
  return context.reply.code(202).send()
}

async function tags(repository: string, { request, reply, store }: Context): Promise<FastifyReply> {
  const all = (await store.listTags(repository)).map(({ tag }) => tag)
  if (all.length === 0 && !(await store.listRepositories()).includes(repository))
    throw new ApiError(404, 'NAME_UNKNOWN', `There is no repository ${repository}`)
  const page = paginate(all, request, reply, `/v2/${repository}/tags/list`)
  return reply.send({ name: repository, tags: page })
}

async function catalog({ request, reply, store, caller }: Context): Promise<FastifyReply> {
  const visible = (await store.listRepositories()).filter((repository) => caller.may('pull', repository))
  return reply.send({ repositories: paginate(visible, request, reply, '/v2/_catalog') })
}

async function referrers(
  repository: string,
  digest: Digest,
  { request, reply, store }: Context,
): Promise<FastifyReply> {
  const artifactType = queryOf(request).get('artifactType')
  const all = await referrersOf(store, repository, digest)
  const manifests =
    artifactType === null ? all : all.filter((descriptor) => descriptor.artifactType === artifactType)
  if (artifactType !== null) reply.header('oci-filters-applied', 'artifactType')
  const index = Buffer.from(JSON.stringify({ schemaVersion: 2, mediaType: emptyIndexType, manifests }))
  return reply.header('content-type', emptyIndexType).send(index)
}

/** `n` and `last`, and a Link to the next page (RFC 5988). */
function paginate(
  sorted: readonly string[],
  request: FastifyRequest,
  reply: FastifyReply,
  path: string,
): string[] {
  const query = queryOf(request)
  const last = query.get('last')
  const n = query.get('n')
  if (n !== null && !/^\d{1,9}$/.test(n))
    throw new ApiError(
      400,
      'PAGINATION_NUMBER_INVALID',
      `Cannot page by ${JSON.stringify(n.slice(0, 20))}: need a number`,
    )
  const size = Math.min(n === null ? pageMax : Number(n), pageMax)
  const rest = last === null ? sorted : sorted.filter((name) => name > last)
  const page = rest.slice(0, size)
  const end = page.at(-1)
  if (rest.length > size && end !== undefined)
    reply.header('link', `<${path}?n=${size}&last=${encodeURIComponent(end)}>; rel="next"`)
  return page
}

/**
 * The body as it comes; a chunk is good until the next is asked for. Who stops reading leaves the connection alone: the
 * refusal still has to get through.
 */
async function* bodyOf({ raw }: FastifyRequest): AsyncGenerator<Uint8Array> {
  for await (const chunk of raw.iterator({ destroyOnReturn: false }) as AsyncIterable<Buffer<ArrayBuffer>>) {
    yield chunk
    // Freed here and now: left to the collector, each 64 MiB of a blob would have it walk the whole heap.
    if (chunk.length === chunk.buffer.byteLength) chunk.buffer.transfer(0)
  }
}

async function readBody(request: FastifyRequest, maxBytes: number): Promise<Buffer> {
  const tooLarge = () =>
    new ApiError(413, 'SIZE_INVALID', `Cannot store manifest: it is larger than ${maxBytes} bytes`)
  if ((contentLength(request) ?? 0) > maxBytes) throw tooLarge()
  const parts: Uint8Array[] = []
  let total = 0
  for await (const part of bodyOf(request)) {
    total += part.length
    if (total > maxBytes) throw tooLarge()
    parts.push(Uint8Array.from(part))
  }
  return Buffer.concat(parts)
}

function require({ caller, access }: Context, action: Action, repository: string): void {
  if (caller.may(action, repository)) return
  // A client that can get more with its credentials learns where; docker and skopeo send none before they are asked.
  if (caller.kind === 'anonymous' || caller.kind === 'access') {
    const actions = action === 'pull' ? 'pull' : 'pull,push'
    const error = caller.kind === 'access' ? ',error="insufficient_scope"' : ''
    throw new ApiError(401, 'UNAUTHORIZED', `${caller.name} may not ${action} ${repository}`, {
      headers: {
        'www-authenticate': `${access.challenge},scope="repository:${repository}:${actions}"${error}`,
      },
    })
  }
  throw new ApiError(403, 'DENIED', `${caller.name} may not ${action} ${repository}`)
}

/** The challenge names what the request needed, so that docker and skopeo ask for a token with that scope. */
function withScope(error: unknown, target: OciTarget, method: string): unknown {
  if (!(error instanceof ApiError) || error.status !== 401 || !('repository' in target)) return error
  const actions = method === 'GET' || method === 'HEAD' ? 'pull' : 'pull,push'
  const challenge = error.headers['www-authenticate']
  if (challenge === undefined) return error
  return new ApiError(401, error.code, error.message, {
    cause: error,
    headers: {
      ...error.headers,
      'www-authenticate': `${challenge},scope="repository:${target.repository}:${actions}"`,
    },
  })
}

async function sendError(error: unknown, reply: FastifyReply, log: Logger): Promise<FastifyReply> {
  if (reply.raw.headersSent) {
    reply.raw.destroy()
    return reply
  }
  const known =
    error instanceof ApiError
      ? error
      : error instanceof ClientError
        ? new ApiError(400, error.code, error.message)
        : undefined
  if (!known) log.error({ err: error }, 'registry request failed')
  const { status, code, message, headers } = known ?? new ApiError(500, 'UNKNOWN', 'internal error')
  // What is left of a body that is refused would be read as the next request.
  if (!reply.request.raw.complete) reply.header('connection', 'close')
  return reply
    .code(status)
    .headers(headers)
    .type('application/json')
    .send({ errors: [{ code, message }] })
}

function checkTag(text: string): string {
  if (!isTag(text))
    throw new ApiError(
      400,
      'TAG_INVALID',
      `Cannot use tag ${JSON.stringify(text.slice(0, 140))}: need up to 128 of A-Z a-z 0-9 _ . -`,
    )
  return text
}

function unsupported(method: string): ApiError {
  return new ApiError(405, 'UNSUPPORTED', `${method} is not supported here`)
}

function queryOf(request: FastifyRequest): URLSearchParams {
  return new URL(request.raw.url ?? '/', 'http://registry').searchParams
}

function contentLength(request: FastifyRequest): number | undefined {
  const header = request.headers['content-length']
  return header === undefined ? undefined : Number(header)
}
