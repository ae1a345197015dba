import type { Digest } from '../../lib/protocol/digest.ts'
import type { BlobStore } from './blob-store.ts'
import { parseManifest } from './oci-manifest.ts'

export interface ReferrerDescriptor {
  readonly mediaType: string
  readonly digest: Digest
  readonly size: number
  readonly artifactType: string | undefined
  readonly annotations: Record<string, string> | undefined
}

/** Manifests of a repository whose subject is `subject` (distribution-spec 1.1, "Listing Referrers"). */
export async function referrersOf(
  store: BlobStore,
  repository: string,
  subject: Digest,
): Promise<ReferrerDescriptor[]> {
  const found: ReferrerDescriptor[] = []
  for (const digest of await store.listManifests(repository)) {
    const manifest = await store.getManifest(repository, digest)
    if (!manifest) continue
    const content = parseManifest(manifest.bytes)
    if (content.subject?.digest !== subject) continue
    found.push({
      mediaType: manifest.mediaType,
      digest,
      size: manifest.bytes.length,
      artifactType: content.artifactType ?? content.config?.mediaType,
      annotations: content.annotations,
    })
  }
  return found
}
