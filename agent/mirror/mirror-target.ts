import type { Digest } from '../../lib/protocol/digest.ts'
import { parseDigest } from '../../lib/protocol/digest.ts'
import { isRepository, isTag } from '../../lib/protocol/reference.ts'

/** What a request to the mirror names: what a client needs for a pull (OCI distribution-spec, "Pull"). */
export type MirrorTarget =
  | { readonly kind: 'base' }
  | { readonly kind: 'manifest'; readonly repository: string; readonly reference: Digest | { tag: string } }
  | { readonly kind: 'blob'; readonly repository: string; readonly digest: Digest }

/** @returns undefined for what is no such thing, in whatever way */
export function parseMirrorPath(path: string): MirrorTarget | undefined {
  if (path === '/v2' || path === '/v2/') return { kind: 'base' }
  // Nothing in such a path needs an escape but the colon of a digest.
  const decoded = path.replace(/%3a/gi, ':')
  const match = /^\/v2\/(.+)\/(manifests|blobs)\/([^/]+)$/.exec(decoded)
  const [, repository = '', kind, last = ''] = match ?? []
  if (!isRepository(repository)) return undefined
  const digest = readDigest(last)
  if (kind === 'blobs') return digest && { kind: 'blob', repository, digest }
  if (digest) return { kind: 'manifest', repository, reference: digest }
  return isTag(last) ? { kind: 'manifest', repository, reference: { tag: last } } : undefined
}

function readDigest(text: string): Digest | undefined {
  try {
    return parseDigest(text)
  } catch {
    return undefined
  }
}
