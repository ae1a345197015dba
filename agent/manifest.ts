import { z } from 'zod'
import type { Digest } from '../lib/protocol/digest.ts'
import { digestHex, parseDigest } from '../lib/protocol/digest.ts'
import { ClientError } from '../lib/protocol/errors.ts'

export interface ManifestBlob {
  readonly digest: Digest
  readonly sizeBytes: number
  /** The name under which it is exposed. */
  readonly name: string
}

/** What a release consists of: blobs, or for an index further manifests. */
export interface ManifestContent {
  readonly blobs: readonly ManifestBlob[]
  readonly manifests: readonly Digest[]
}

/** Layers of one manifest, manifests of one index. More is a bomb. */
const entriesMax = 2000

const Descriptor = z.looseObject({
  mediaType: z.string().optional(),
  digest: z.string(),
  size: z.int().nonnegative(),
  annotations: z.record(z.string(), z.string()).optional(),
})
const Manifest = z.looseObject({
  config: Descriptor.optional(),
  layers: z.array(Descriptor).max(entriesMax).optional(),
  manifests: z.array(Descriptor).max(entriesMax).optional(),
})

/** @throws ClientError `MANIFEST_INVALID` */
export function parseManifest(bytes: Uint8Array): ManifestContent {
  let json: unknown
  try {
    json = JSON.parse(Buffer.from(bytes).toString('utf8'))
  } catch (cause) {
    throw new ClientError('MANIFEST_INVALID', 'Cannot read manifest: it is not JSON', { cause })
  }
  const parsed = Manifest.safeParse(json)
  if (!parsed.success) {
    const [issue] = parsed.error.issues
    throw new ClientError(
      'MANIFEST_INVALID',
      `Cannot read manifest: ${issue?.path.join('.') ?? ''}: ${issue?.message ?? ''}`,
    )
  }
  const { config, layers = [], manifests = [] } = parsed.data
  const descriptors =
    config === undefined || config.mediaType === 'application/vnd.oci.empty.v1+json'
      ? layers
      : [config, ...layers]
  const names = new Set<string>()
  const blobs = descriptors.map(({ digest: text, size, annotations }) => {
    const digest = parseDigest(text)
    const title = safeFileName(annotations?.['org.opencontainers.image.title'])
    const name = title === undefined || names.has(title) ? digestHex(digest) : title
    names.add(name)
    return { digest, sizeBytes: size, name }
  })
  return { blobs, manifests: manifests.map(({ digest }) => parseDigest(digest)) }
}

/** A title comes from whoever published: only a plain file name is used as one. */
export function safeFileName(title: string | undefined): string | undefined {
  if (title === undefined || title === '' || Buffer.byteLength(title) > 200) return undefined
  // No separators, no control characters, nothing hidden, nothing that a shell or a person may take for an option.
  return /^[^./\\\p{C}-][^/\\\p{C}]*$/u.test(title) ? title : undefined
}
