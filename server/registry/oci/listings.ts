import type { FastifyReply, FastifyRequest } from 'fastify'
import type { ContentDigest } from '../../../lib/protocol/digest.ts'
import { isSha256 } from '../../../lib/protocol/digest.ts'
import type { ReleaseKey } from '../../../lib/token/release-keys.ts'
import { parseReleaseKey } from '../../../lib/token/release-keys.ts'
import { ApiError } from '../api-error.ts'
import { imageIndexType } from '../oci-manifest.ts'
import type { ReferrerDescriptor } from '../referrers.ts'
import { describeReferrer } from '../referrers.ts'
import type { Context } from './context.ts'
import { patiently, queryOf } from './context.ts'

const pageMax = 1000
/** What clients take as a manifest, and so as a list of referrers. */
const referrersMaxBytes = 4 * 1024 * 1024

/** `GET /v2/<name>/tags/list` (spec: "Listing Tags"). */
export async function listTags(
  repository: string,
  { request, reply, store }: Context,
): Promise<FastifyReply> {
  const all = (await store.listTags(repository)).map(({ tag }) => tag)
  if (all.length === 0 && !(await store.hasRepository(repository)))
    throw new ApiError(404, 'NAME_UNKNOWN', `There is no repository ${repository}`)
  const page = paginate(all, request, reply, `/v2/${repository}/tags/list`)
  return reply.send({ name: repository, tags: page })
}

/** `GET /v2/_catalog`: what the caller may pull. Not in the OCI spec, and in every registry. */
export async function listCatalog({ request, reply, store, caller }: Context): Promise<FastifyReply> {
  const visible = (await store.listRepositories()).filter((repository) => caller.may('pull', repository))
  return reply.send({ repositories: paginate(visible, request, reply, '/v2/_catalog') })
}

/** `GET /v2/<name>/referrers/<digest>` (spec: "Listing Referrers"), with what this server attaches by itself. */
export async function listReferrers(
  repository: string,
  subject: ContentDigest,
  context: Context,
): Promise<FastifyReply> {
  const { request, reply, store, torrents, pullThrough } = context
  if (isSha256(subject) && pullThrough.upstreamOf(repository))
    await patiently(request, () => pullThrough.fetchReferrers(repository, subject))
  const query = queryOf(request)
  const artifactType = query.get('artifactType')
  const signedBy = query.get('signedBy')
  if (signedBy !== null) return listSignature(repository, subject, signedBy, context)
  const last = query.get('last') ?? ''
  const torrent = await torrents.of(repository, subject)
  const digests = new Set([
    ...(await store.listReferrers(repository, subject)),
    ...(torrent ? [torrent.digest] : []),
  ])
  const page: ReferrerDescriptor[] = []
  let pageBytes = 0
  for (const digest of [...digests].sort()) {
    if (digest <= last) continue
    const manifest = await store.getManifest(repository, digest)
    const descriptor = describeReferrer(manifest ?? (torrent?.digest === digest ? torrent : undefined))
    if (!descriptor || (artifactType !== null && descriptor.artifactType !== artifactType)) continue
    pageBytes += JSON.stringify(descriptor).length
    const end = page.at(-1)
    if (end && (pageBytes > referrersMaxBytes || page.length === pageMax)) {
      const next = new URLSearchParams({
        ...(artifactType === null ? {} : { artifactType }),
        last: end.digest,
      })
      reply.header('link', `</v2/${repository}/referrers/${subject}?${next.toString()}>; rel="next"`)
      break
    }
    page.push(descriptor)
  }
  if (artifactType !== null) reply.header('oci-filters-applied', 'artifactType')
  return sendReferrers(page, reply)
}

/** Of the signatures alone the one that is good by a key, for the tag that is named or for any. */
async function listSignature(
  repository: string,
  subject: ContentDigest,
  spki: string,
  { request, reply, store, signatures }: Context,
): Promise<FastifyReply> {
  const query = queryOf(request)
  const key = readKey(spki)
  const tag = query.get('tag') ?? undefined
  const digest = isSha256(subject)
    ? await patiently(request, () => signatures.find({ repository, tag, digest: subject }, key))
    : undefined
  const found = digest && describeReferrer(await store.getManifest(repository, digest))
  reply.header('oci-filters-applied', 'artifactType,signedBy')
  return sendReferrers(found ? [found] : [], reply)
}

/** @throws ApiError 400 */
function readKey(spki: string): ReleaseKey {
  try {
    return parseReleaseKey(spki)
  } catch (cause) {
    throw new ApiError(
      400,
      'UNSUPPORTED',
      `Cannot use signedBy: need a public key as SubjectPublicKeyInfo in DER, base64url: ${(cause as Error).message}`,
      { cause },
    )
  }
}

function sendReferrers(manifests: readonly ReferrerDescriptor[], reply: FastifyReply): FastifyReply {
  const index = { schemaVersion: 2, mediaType: imageIndexType, manifests }
  return reply.header('content-type', imageIndexType).send(Buffer.from(JSON.stringify(index)))
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
      'UNSUPPORTED',
      `Cannot page by n=${JSON.stringify(n.slice(0, 20))}: need a number of entries`,
    )
  const size = Math.min(n === null ? pageMax : Number(n), pageMax)
  const rest = last === null ? sorted : sorted.filter((name) => name > last)
  const page = rest.slice(0, size)
  const end = page.at(-1)
  if (rest.length > size && end !== undefined)
    reply.header('link', `<${path}?n=${size}&last=${encodeURIComponent(end)}>; rel="next"`)
  return page
}
