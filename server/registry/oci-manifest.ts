import { z } from 'zod'
import type { ContentDigest } from '../../lib/protocol/digest.ts'
import { isSha256, isSha512, parseContentDigest } from '../../lib/protocol/digest.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import { ApiError } from './api-error.ts'
import type { BlobStore } from './blob-store.ts'

export const imageManifestType = 'application/vnd.oci.image.manifest.v1+json'
export const imageIndexType = 'application/vnd.oci.image.index.v1+json'
/** Media types whose manifests must say `schemaVersion: 2`; those of others may have any members besides the ones below. */
const versionedTypes = new Set([
  imageManifestType,
  imageIndexType,
  'application/vnd.docker.distribution.manifest.v2+json',
  'application/vnd.docker.distribution.manifest.list.v2+json',
])

const descriptor = z.looseObject({
  mediaType: z.string(),
  digest: z.string(),
  size: z.number(),
  urls: z.array(z.string()).optional(),
  annotations: z.record(z.string(), z.string()).optional(),
})

/**
 * An image or artifact manifest, or an index; what the image-spec's, docker's schema 2 and artifacts of other media types have
 * in common. `blobs` are those of the artifact manifest that the image-spec had for a while.
 */
const ManifestShape = z.looseObject({
  schemaVersion: z.literal(2).optional(),
  mediaType: z.string().optional(),
  artifactType: z.string().optional(),
  config: descriptor.optional(),
  layers: z.array(descriptor).max(10_000).optional(),
  blobs: z.array(descriptor).max(10_000).optional(),
  manifests: z.array(descriptor).max(10_000).optional(),
  subject: descriptor.optional(),
  annotations: z.record(z.string(), z.string()).optional(),
})
export type ManifestContent = z.output<typeof ManifestShape>
export type Descriptor = z.output<typeof descriptor>

/** @throws ApiError `MANIFEST_INVALID`, naming the member that is wrong */
export function parseManifest(bytes: Uint8Array): ManifestContent {
  const json = parseJson(bytes)
  if (json === undefined) throw new ApiError(400, 'MANIFEST_INVALID', 'Cannot read manifest: it is not JSON')
  const parsed = ManifestShape.safeParse(json)
  if (parsed.success) return parsed.data
  const [issue] = parsed.error.issues
  throw new ApiError(
    400,
    'MANIFEST_INVALID',
    `Cannot read manifest: ${issue?.path.join('.') ?? ''}: ${issue?.message ?? ''}`,
  )
}

/** Blobs that a manifest needs; layers with `urls` live elsewhere (image-spec, non-distributable layers). */
export function blobsOf({ config, layers, blobs }: ManifestContent): Descriptor[] {
  return [...(config ? [config] : []), ...(layers ?? []), ...(blobs ?? [])].filter(
    ({ urls }) => urls === undefined || urls.length === 0,
  )
}

/** What a manifest keeps, and what it is about. */
export interface ManifestReferences {
  /** Everything that it names in a descriptor: configuration, layers, manifests, and what later specs may add. */
  readonly names: readonly ContentDigest[]
  readonly subject: ContentDigest | undefined
}

/**
 * Reads what a stored manifest refers to, whatever its type. Too much would keep a blob that could go, too little would lose one
 * that is needed: so every `digest` member counts, wherever it stands, but the subject's, which is a reference the other way.
 *
 * @returns undefined where it is not JSON: nobody can tell what such a manifest needs
 */
export function referencesOf(bytes: Uint8Array): ManifestReferences | undefined {
  const json = parseJson(bytes)
  if (json === undefined) return undefined
  const names = new Set<ContentDigest>()
  let subject: ContentDigest | undefined
  // No recursion: how deep a manifest is nested is its author's choice.
  const open: unknown[] = [json]
  while (open.length > 0) {
    const value = open.pop()
    if (typeof value !== 'object' || value === null) continue
    for (const [key, member] of Object.entries(value)) {
      if (key === 'subject' && value === json) subject = digestIn(member)
      else if (key === 'digest' && isDigest(member)) names.add(member)
      else open.push(member)
    }
  }
  return { names: [...names], subject }
}

function digestIn(descriptor: unknown): ContentDigest | undefined {
  const digest = (descriptor as { digest?: unknown } | null | undefined)?.digest
  return isDigest(digest) ? digest : undefined
}

function isDigest(value: unknown): value is ContentDigest {
  return typeof value === 'string' && (isSha256(value) || isSha512(value))
}

/** The digest that a manifest refers to as its subject. @throws ClientError `DIGEST_INVALID` */
export function subjectOf({ subject }: ManifestContent): ContentDigest | undefined {
  return subject && parseContentDigest(subject.digest)
}

/** The subject in the bytes of a manifest; undefined also where they cannot be read. */
export function subjectIn(bytes: Uint8Array): ContentDigest | undefined {
  try {
    return subjectOf(parseManifest(bytes))
  } catch (error) {
    if (error instanceof ApiError || error instanceof ClientError) return undefined
    throw error
  }
}

/**
 * Reads what a client pushes. Parameters of the Content-Type are ignored, and without one the manifest's own word counts.
 *
 * @throws ApiError `MANIFEST_INVALID`
 */
export function readManifest(
  contentType: string | undefined,
  bytes: Uint8Array,
): { mediaType: string; content: ManifestContent } {
  const content = parseManifest(bytes)
  const mediaType = contentType?.split(';')[0]?.trim() ?? content.mediaType ?? ''
  const invalid = (why: string) => new ApiError(400, 'MANIFEST_INVALID', `Cannot store manifest: ${why}`)
  if (!/^[\w.+-]+\/[\w.+-]+$/.test(mediaType))
    throw invalid(`Content-Type ${JSON.stringify(mediaType.slice(0, 100))} is not a media type`)
  if (content.mediaType !== undefined && content.mediaType !== mediaType)
    throw invalid(`it says ${content.mediaType}, Content-Type says ${mediaType}`)
  if (versionedTypes.has(mediaType) && content.schemaVersion === undefined)
    throw invalid(`schemaVersion is missing, and ${mediaType} has 2`)
  return { mediaType, content }
}

/**
 * All that a manifest names must be in the repository before it, but its subject. It is claimed while we look: between here and the manifest's
 * being stored no collection takes it away.
 *
 * @throws ApiError `MANIFEST_INVALID`, `MANIFEST_BLOB_UNKNOWN`
 */
export async function checkReferences(
  repository: string,
  content: ManifestContent,
  store: BlobStore,
): Promise<void> {
  for (const { digest, size } of blobsOf(content)) {
    const found = await store.claimBlob(repository, parseContentDigest(digest))
    if (!found)
      throw new ApiError(
        404,
        'MANIFEST_BLOB_UNKNOWN',
        `Cannot store manifest: blob ${digest} is not in ${repository}; push it first`,
      )
    if (found.sizeBytes !== size) {
      throw new ApiError(
        400,
        'MANIFEST_INVALID',
        `Cannot store manifest: it says ${digest} has ${size} bytes, it has ${found.sizeBytes}`,
      )
    }
  }
  for (const { digest } of content.manifests ?? []) {
    if (!(await store.claimManifest(repository, parseContentDigest(digest)))) {
      throw new ApiError(
        404,
        'MANIFEST_BLOB_UNKNOWN',
        `Cannot store index: manifest ${digest} is not in ${repository}; push it first`,
      )
    }
  }
  // It need not be there; where it is, what is said about it keeps it for a while.
  const subject = subjectOf(content)
  if (subject) await store.claimManifest(repository, subject)
}

/** Undefined where it is not JSON; no JSON text means undefined. */
function parseJson(bytes: Uint8Array): unknown {
  try {
    return JSON.parse(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString())
  } catch {
    return undefined
  }
}
