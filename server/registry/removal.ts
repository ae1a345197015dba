import type { ContentDigest } from '../../lib/protocol/digest.ts'
import type { InTurn } from '../../lib/runtime/turn.ts'
import { ApiError } from './api-error.ts'
import type { BlobStore, Tag } from './blob-store.ts'
import { isSameTag } from './blob-store.ts'
import { referencesOf } from './oci-manifest.ts'

export interface RemovalDeps {
  readonly store: BlobStore
  /** The turn of a repository. */
  readonly inTurn: InTurn
  /** Called after a tag went, durably. */
  readonly onTag: (repository: string, tag: string) => void
}

/**
 * Removes a tag; `unchanged`: only if it still is what it was then. What it named counts as used until now: the grace period of a
 * collection begins here, and a tag that went by mistake can be put back.
 *
 * @returns whether it did
 */
export async function removeTag(
  { store, inTurn, onTag }: RemovalDeps,
  repository: string,
  tag: string,
  unchanged?: Tag,
): Promise<boolean> {
  const removed = await inTurn(repository, async () => {
    const found = await store.getTag(repository, tag)
    if (!found) return false
    if (unchanged && !isSameTag(found, unchanged)) return false
    await store.claimManifest(repository, found.digest)
    return store.deleteTag(repository, tag, unchanged)
  })
  if (removed) onTag(repository, tag)
  return removed
}

/**
 * Removes a manifest and the tags that name it. As with a tag, what it named counts as used until now. `around` is told of these tags,
 * and does the work.
 *
 * @returns whether there was such a manifest
 */
export async function removeManifest(
  { store, inTurn, onTag }: RemovalDeps,
  repository: string,
  digest: ContentDigest,
  around: (tags: readonly string[], work: () => Promise<boolean>) => Promise<boolean> = (_tags, work) =>
    work(),
): Promise<boolean> {
  const remove = (isNeeded?: () => Promise<boolean>) =>
    store.deleteManifests(repository, [digest], { isNeeded })
  const removed = await inTurn(repository, async () => {
    const manifest = await store.getManifest(repository, digest)
    if (!manifest) return false
    const tags = (await store.listTags(repository))
      .filter((one) => one.digest === digest)
      .map(({ tag }) => tag)
    return around(tags, async () => {
      for (const named of referencesOf(manifest.bytes)?.names ?? []) {
        await store.claimBlob(repository, named)
        await store.claimManifest(repository, named)
      }
      for (const tag of tags) {
        await store.deleteTag(repository, tag)
        onTag(repository, tag)
      }
      return isShared(store) || remove()
    })
  })
  if (!removed || !isShared(store)) return removed
  // Outside of the turn, which takes its time; a tag that was put through another server meanwhile keeps the manifest.
  return remove(async () => (await store.listTags(repository)).some((tag) => tag.digest === digest))
}

/** Where servers see late what the others do, removals wait, and ask at the end; no turn of this server would help. */
export function isShared({ settleMs }: Pick<BlobStore, 'settleMs'>): boolean {
  return settleMs !== undefined
}

/**
 * Takes a blob away from a repository. Its bytes stay for those that have it too; if there are none, a collection removes them.
 *
 * @throws ApiError 404 `BLOB_UNKNOWN`; 405 `UNSUPPORTED` while a manifest of the repository names it
 */
export async function removeBlob(
  { store, inTurn }: Omit<RemovalDeps, 'onTag'>,
  repository: string,
  digest: ContentDigest,
): Promise<void> {
  if (!(await store.statBlob(repository, digest)))
    throw new ApiError(404, 'BLOB_UNKNOWN', `There is no blob ${digest} in ${repository}`)
  const read = new Set<ContentDigest>()
  const namedBy = async (): Promise<ContentDigest | undefined> => {
    for await (const { digest: manifest } of store.scanManifests(repository)) {
      if (read.has(manifest)) continue
      const found = await store.getManifest(repository, manifest)
      if (found && (referencesOf(found.bytes)?.names.includes(digest) ?? true)) return manifest
      read.add(manifest)
    }
    return undefined
  }
  // Most are read before the turn: pushes to the repository only wait for those that came meanwhile.
  let named = await namedBy()
  const remove = async () => {
    named ??= await namedBy()
    if (named === undefined)
      await store.unlinkBlob(
        repository,
        digest,
        Number.POSITIVE_INFINITY,
        async () => (named ??= await namedBy()) !== undefined,
      )
  }
  await (isShared(store) ? remove() : inTurn(repository, remove))
  if (named === undefined) return
  throw new ApiError(
    405,
    'UNSUPPORTED',
    `Cannot delete blob ${digest}: manifest ${named} of ${repository} needs it; delete that one first`,
  )
}
