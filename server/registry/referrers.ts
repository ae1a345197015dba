import type { ContentDigest } from '../../lib/protocol/digest.ts'
import type { Manifest } from './blob-store.ts'
import { parseManifest } from './oci-manifest.ts'

export interface ReferrerDescriptor {
  readonly mediaType: string
  readonly digest: ContentDigest
  readonly size: number
  readonly artifactType: string | undefined
  readonly annotations: Record<string, string> | undefined
}

/**
 * How a manifest stands in a list of referrers (distribution-spec 1.1, "Listing Referrers"): an artifact type that is missing or
 * empty is that of the config, which an index does not have.
 */
export function describeReferrer(manifest: Manifest | undefined): ReferrerDescriptor | undefined {
  if (!manifest) return undefined
  const { artifactType = '', config, annotations } = parseManifest(manifest.bytes)
  return {
    mediaType: manifest.mediaType,
    digest: manifest.digest,
    size: manifest.bytes.length,
    artifactType: artifactType === '' ? config?.mediaType : artifactType,
    annotations,
  }
}
