import type { FastifyReply, FastifyRequest } from 'fastify'
import type { ContentDigest } from '../../../lib/protocol/digest.ts'
import { contentDigestOf, digestOf, isSha256, parseContentDigest } from '../../../lib/protocol/digest.ts'
import { etagOf, isUnchanged } from '../../../lib/protocol/http-range.ts'
import { isTag } from '../../../lib/protocol/reference.ts'
import { monotonicMs } from '../../../lib/runtime/clock.ts'
import type { Caller } from '../access.ts'
import { ApiError } from '../api-error.ts'
import type { Manifest } from '../blob-store.ts'
import type { ManifestContent } from '../oci-manifest.ts'
import { blobsOf, checkReferences, readManifest, subjectOf } from '../oci-manifest.ts'
import type { OciTarget } from '../oci-path.ts'
import { removeManifest, removeTag } from '../removal.ts'
import type { Context } from './context.ts'
import { bodyOf, checkTag, contentLength, created, patiently, queryOf } from './context.ts'

type ManifestTarget = Extract<OciTarget, { kind: 'manifest' }>

/** GET and HEAD (spec: "Pulling manifests"): the bytes and the media type as they were pushed. */
export async function getManifest(target: ManifestTarget, context: Context): Promise<FastifyReply> {
  const { request, reply } = context
  const { manifest, stale } = await findManifest(target, context)
  // The spec knows no other code ("Warnings").
  if (stale)
    reply.header('warning', '299 - "The upstream is down: this is what the tag was when it was last asked."')
  // As with blobs: an index may be all that is pushed.
  if (request.method === 'HEAD' && context.caller.may('publish', target.repository))
    await claim(target, manifest.digest, context)
  const etag = etagOf(manifest.digest)
  reply.headers({
    'docker-content-digest': manifest.digest,
    // Set on the raw reply: fastify would add a charset, and clients compare the type as a whole.
    'content-length': String(manifest.bytes.length),
    etag,
  })
  if (isUnchanged(request.headers, etag)) return reply.code(304).removeHeader('content-length').send()
  reply.header('content-type', manifest.mediaType)
  return request.method === 'HEAD' ? reply.send() : reply.send(manifest.bytes)
}

/** @throws ApiError 404 where a collection was faster */
async function claim(
  target: ManifestTarget,
  digest: ContentDigest,
  { store, torrents, inTurn }: Context,
): Promise<void> {
  const { repository } = target
  if (await inTurn(repository, () => store.claimManifest(repository, digest))) return
  if (!(await torrents.manifest(repository, digest))) throw unknownManifest(target)
}

function unknownManifest({ repository, reference }: ManifestTarget): ApiError {
  return new ApiError(404, 'MANIFEST_UNKNOWN', `There is no manifest ${repository}:${reference}`)
}

async function findManifest(
  target: ManifestTarget,
  { request, store, torrents, pullThrough }: Context,
): Promise<{ manifest: Manifest; stale: boolean }> {
  const { repository, reference } = target
  const named = reference.includes(':') ? parseContentDigest(reference) : undefined
  if (pullThrough.upstreamOf(repository) && (named ? isSha256(named) : isTag(reference))) {
    const found = await patiently(request, () => pullThrough.manifest(repository, reference))
    if (found) return found
  }
  const digest = named ?? (isTag(reference) ? (await store.getTag(repository, reference))?.digest : undefined)
  const manifest =
    digest && ((await store.getManifest(repository, digest)) ?? (await torrents.manifest(repository, digest)))
  if (!manifest) throw unknownManifest(target)
  return { manifest, stale: false }
}

/** In a line of the audit log. */
const tagsTold = 20
/** Tags of one push by digest; the spec wants at least ten. */
const tagsMax = 100

/** PUT (spec: "Pushing Manifests", "Pushing a manifest with a subject field"), by digest with any number of `tag` parameters. */
export async function putManifest(
  { repository, reference }: ManifestTarget,
  context: Context,
): Promise<FastifyReply> {
  const { request, reply, store, caller, audit } = context
  const byDigest = reference.includes(':') ? parseContentDigest(reference) : undefined
  const tags = byDigest ? tagsOf(byDigest, request) : [checkTag(reference)]
  const bytes = await readBody(request, context.manifestMaxBytes)
  // A tag names a manifest by SHA-256, as those who follow it do.
  const digest = byDigest ? contentDigestOf(bytes, byDigest) : digestOf(bytes)
  if (byDigest && byDigest !== digest) {
    throw new ApiError(
      400,
      'DIGEST_INVALID',
      `Cannot store manifest: its bytes have ${digest}, not ${reference}`,
    )
  }
  const { mediaType, content } = readManifest(request.headers['content-type'], bytes)
  const subject = subjectOf(content)
  await keepTorrents(repository, content, context)
  if (context.pullThrough.upstreamOf(repository))
    await patiently(request, () => fetchMissing(repository, content, context))
  // In one turn, so that a collection either sees the manifest or finds what it names claimed.
  await context.inTurn(repository, async () => {
    const claimedMs = monotonicMs()
    await checkReferences(repository, content, store)
    const put = async () => {
      await store.putManifest(repository, { digest, mediaType, bytes })
      // Now that it is named it is only looked whether all of it is still there.
      if (monotonicMs() - claimedMs > store.claimHoldsMs) await checkReferences(repository, content, store)
    }
    if (byDigest)
      await audit(request, caller, { action: 'manifest.put', target: `${repository}@${digest}` }, put)
    for (const tag of tags) {
      const was = (await store.getTag(repository, tag))?.digest
      const act = { action: 'tag.move', target: `${repository}:${tag}`, details: { digest, was } } as const
      await audit(request, caller, act, async () => {
        if (!byDigest) await put()
        // The release before stays for a while yet.
        if (was !== undefined) await store.claimManifest(repository, was)
        await store.putTag(repository, tag, digestOf(bytes))
      })
    }
  })
  for (const tag of tags) {
    context.onTag(repository, tag)
    context.log.info({ repository, tag, digest, by: context.caller.name }, 'tag moved')
  }
  if (byDigest && tags.length > 0) reply.header('oci-tag', tags)
  if (subject !== undefined) reply.header('oci-subject', subject)
  const warning = expiryWarning(context.caller, context.now())
  if (warning !== undefined) reply.header('warning', warning)
  return created(reply, `/v2/${repository}/manifests/${digest}`, digest)
}

/** A client does not push what it was told is there, and that may be at the upstream. */
async function fetchMissing(
  repository: string,
  content: ManifestContent,
  { store, pullThrough }: Context,
): Promise<void> {
  for (const { digest: text } of blobsOf(content)) {
    const digest = parseContentDigest(text)
    if (isSha256(digest) && !(await store.statBlob(repository, digest)))
      await pullThrough.fetchBlob(repository, digest)
  }
}

/** The `tag` parameters of a push by digest; none where they cannot name the manifest, and then the answer has no `OCI-Tag`. */
function tagsOf(digest: ContentDigest, request: FastifyRequest): string[] {
  if (!isSha256(digest)) return []
  const tags = queryOf(request).getAll('tag')
  if (tags.length > tagsMax)
    throw new ApiError(414, 'UNSUPPORTED', `Cannot set ${tags.length} tags at once: need at most ${tagsMax}`)
  return tags.map(checkTag)
}

/**
 * A client that found a torrent of ours in the repository does not push it. What it then names it in must not depend on whether
 * the torrent can be made again, so the torrent becomes a blob like any other.
 */
async function keepTorrents(
  repository: string,
  content: ManifestContent,
  { store, torrents }: Context,
): Promise<void> {
  for (const { digest: text } of blobsOf(content)) {
    const digest = parseContentDigest(text)
    if (await store.statBlob(repository, digest)) continue
    const bytes = await torrents.blob(repository, digest)
    if (!bytes) return
    const upload = await store.startUpload(repository, bytes.length)
    await upload.append(oneChunk(bytes), new AbortController().signal)
    await upload.commit(digest)
  }
}

async function* oneChunk(bytes: Uint8Array): AsyncGenerator<Uint8Array> {
  yield await Promise.resolve(bytes)
}

/** A token is warned of for this long before it ends, where whoever reads the log of a push can do something about it. */
const warnedMs = 7 * 86_400_000

/** A warning of the spec (RFC 7234 section 5.5), in a form that holds no quotes and little text. */
function expiryWarning({ kind, credential }: Caller, nowMs: number): string | undefined {
  if (credential === undefined || kind === 'host' || kind === 'anonymous') return undefined
  if (credential.expiresAt.getTime() - nowMs > warnedMs) return undefined
  return `299 - "The token of this push ends at ${credential.expiresAt.toISOString()}: ask an administrator for another."`
}

/** DELETE of a tag, or of a manifest with all tags that name it (spec: "Deleting tags", "Deleting Manifests"). */
export async function deleteManifest(
  { repository, reference }: ManifestTarget,
  context: Context,
): Promise<FastifyReply> {
  const { reply } = context
  const found = reference.includes(':')
    ? await deleteByDigest(repository, parseContentDigest(reference), context)
    : isTag(reference) && (await deleteTag(repository, reference, context))
  if (!found) throw unknownManifest({ kind: 'manifest', repository, reference })
  return reply.code(202).send()
}

async function deleteTag(repository: string, tag: string, context: Context): Promise<boolean> {
  const { request, store, caller, audit } = context
  const was = (await store.getTag(repository, tag))?.digest
  if (was === undefined) return false
  const act = { action: 'tag.delete', target: `${repository}:${tag}`, details: { was } } as const
  return audit(request, caller, act, () => removeTag(context, repository, tag))
}

async function deleteByDigest(repository: string, digest: ContentDigest, context: Context): Promise<boolean> {
  const { request, caller, audit } = context
  return removeManifest(context, repository, digest, (tags, remove) => {
    const details = { tags: tags.slice(0, tagsTold) }
    const act = { action: 'manifest.delete', target: `${repository}@${digest}`, details } as const
    return audit(request, caller, act, remove)
  })
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
