import { isRepository } from '../../lib/protocol/reference.ts'
import { ApiError } from './api-error.ts'

/** What a path below /v2/ names (OCI distribution-spec, "Endpoints"). */
export type OciTarget =
  | { readonly kind: 'base' }
  | { readonly kind: 'catalog' }
  | { readonly kind: 'uploads'; readonly repository: string }
  | { readonly kind: 'upload'; readonly repository: string; readonly id: string }
  | { readonly kind: 'blob'; readonly repository: string; readonly digest: string }
  | { readonly kind: 'manifest'; readonly repository: string; readonly reference: string }
  | { readonly kind: 'tags'; readonly repository: string }
  | { readonly kind: 'referrers'; readonly repository: string; readonly digest: string }

/** Names have slashes, so one pattern with a greedy name reads them all. @throws ApiError `NAME_INVALID` or `UNSUPPORTED` */
export function parseOciPath(path: string): OciTarget {
  const decoded = decode(path)
  if (decoded === '' || decoded === '/') return { kind: 'base' }
  if (decoded === '_catalog') return { kind: 'catalog' }
  const match =
    /^(?<name>.+)\/blobs\/(?<uploads>uploads)\/?$/.exec(decoded) ??
    /^(?<name>.+)\/blobs\/uploads\/(?<upload>[^/]+)$/.exec(decoded) ??
    /^(?<name>.+)\/tags\/(?<tags>list)$/.exec(decoded) ??
    /^(?<name>.+)\/blobs\/(?<blob>[^/]+)$/.exec(decoded) ??
    /^(?<name>.+)\/manifests\/(?<manifest>[^/]+)$/.exec(decoded) ??
    /^(?<name>.+)\/referrers\/(?<referrers>[^/]+)$/.exec(decoded)
  const parts = match?.groups
  const repository = parts?.['name']
  if (!parts || repository === undefined)
    throw new ApiError(404, 'UNSUPPORTED', 'There is no such endpoint below /v2/')
  if (!isRepository(repository)) {
    throw new ApiError(
      400,
      'NAME_INVALID',
      `Cannot use name ${JSON.stringify(repository.slice(0, 100))}: need lower-case letters, digits and single . _ - inside parts separated by /`,
    )
  }
  if (parts['uploads'] !== undefined) return { kind: 'uploads', repository }
  if (parts['upload'] !== undefined) return { kind: 'upload', repository, id: parts['upload'] }
  if (parts['tags'] !== undefined) return { kind: 'tags', repository }
  if (parts['blob'] !== undefined) return { kind: 'blob', repository, digest: parts['blob'] }
  if (parts['manifest'] !== undefined) return { kind: 'manifest', repository, reference: parts['manifest'] }
  return { kind: 'referrers', repository, digest: parts['referrers'] ?? '' }
}

function decode(path: string): string {
  try {
    return decodeURIComponent(path)
  } catch {
    throw new ApiError(400, 'NAME_INVALID', 'Cannot read the path: a percent escape is broken')
  }
}
