import { z } from 'zod'
import type { Digest } from '../../lib/protocol/digest.ts'
import { parseDigest } from '../../lib/protocol/digest.ts'
import { ApiError } from './api-error.ts'
import type { BlobStore } from './blob-store.ts'

const descriptor = z.looseObject({
  mediaType: z.string(),
  digest: z.string(),
  size: z.number(),
  urls: z.array(z.string()).optional(),
  annotations: z.record(z.string(), z.string()).optional(),
})

/** An image or artifact manifest, or an index; what the image-spec's and docker's schema 2 have in common. */
const ManifestShape = z.looseObject({
  schemaVersion: z.literal(2),
  mediaType: z.string().optional(),
  artifactType: z.string().optional(),
  config: descriptor.optional(),
  layers: z.array(descriptor).max(10_000).optional(),
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
export function blobsOf({ config, layers }: ManifestContent): Descriptor[] {
  return [...(config ? [config] : []), ...(layers ?? [])].filter(
    ({ urls }) => urls === undefined || urls.length === 0,
  )
}

/** What a manifest keeps, and what it is about. */
export interface ManifestReferences {
  /** Everything that it names in a descriptor: configuration, layers, manifests, and what later specs may add. */
  readonly names: readonly Digest[]
  readonly subject: Digest | undefined
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
  const names = new Set<Digest>()
  let subject: Digest | undefined
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

function digestIn(descriptor: unknown): Digest | undefined {
  const digest = (descriptor as { digest?: unknown } | null | undefined)?.digest
  return isDigest(digest) ? digest : undefined
}

function isDigest(value: unknown): value is Digest {
  return typeof value === 'string' && /^sha256:[0-9a-f]{64}$/.test(value)
}

/** The digest that a manifest refers to as its subject; undefined where it has none or cannot be read. */
export function subjectOf(bytes: Uint8Array): Digest | undefined {
  const { subject } = parseManifest(bytes)
  return subject && parseDigest(subject.digest)
}

/**
 * All that a manifest names must be in the repository before it. It is claimed while we look: between here and the manifest's
 * being stored no collection takes it away.
 *
 * @throws ApiError `MANIFEST_INVALID`, `MANIFEST_BLOB_UNKNOWN`
 */
export async function checkManifest({
  repository,
  mediaType,
  bytes,
  store,
}: {
  repository: string
  mediaType: string
  bytes: Uint8Array
  store: BlobStore
}): Promise<void> {
  if (!/^[\w.+-]+\/[\w.+-]+$/.test(mediaType)) {
    throw new ApiError(
      400,
      'MANIFEST_INVALID',
      `Cannot store manifest: Content-Type ${JSON.stringify(mediaType.slice(0, 100))} is not a media type without parameters`,
    )
  }
  const manifest = parseManifest(bytes)
  if (manifest.mediaType !== undefined && manifest.mediaType !== mediaType) {
    throw new ApiError(
      400,
      'MANIFEST_INVALID',
      `Cannot store manifest: it says ${manifest.mediaType}, Content-Type says ${mediaType}`,
    )
  }
  for (const { digest, size } of blobsOf(manifest)) {
    const found = await store.claimBlob(repository, parseDigest(digest))
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
  for (const { digest } of manifest.manifests ?? []) {
    if (!(await store.claimManifest(repository, parseDigest(digest)))) {
      throw new ApiError(
        404,
        'MANIFEST_BLOB_UNKNOWN',
        `Cannot store index: manifest ${digest} is not in ${repository}; push it first`,
      )
    }
  }
  // It need not be there; where it is, what is said about it keeps it for a while.
  if (manifest.subject) await store.claimManifest(repository, parseDigest(manifest.subject.digest))
}

/** Undefined where it is not JSON; no JSON text means undefined. */
function parseJson(bytes: Uint8Array): unknown {
  try {
    return JSON.parse(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString())
  } catch {
    return undefined
  }
}
