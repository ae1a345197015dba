import type { ContentDigest } from '../../lib/protocol/digest.ts'

/** A manifest of a repository, as collection sees it. */
export interface ManifestNode {
  readonly digest: ContentDigest
  readonly usedAtMs: number
  /** What it names, as far as the repository has it: manifests and blobs. */
  readonly names: readonly ContentDigest[]
  /** What it is about: what it signs, describes, or is the torrent of. */
  readonly subject: ContentDigest | undefined
}

export type ManifestGraph = ReadonlyMap<ContentDigest, ManifestNode>

/**
 * The manifests that stay because of `roots`: those, what they name, and what refers to any of these as its subject, so that
 * signatures stay with what they sign, and go with it.
 */
export function reachable(graph: ManifestGraph, roots: Iterable<ContentDigest>): Set<ContentDigest> {
  const referrers = referrersIn(graph)
  const found = new Set<ContentDigest>()
  const open = [...roots]
  for (let digest = open.pop(); digest !== undefined; digest = open.pop()) {
    const node = graph.get(digest)
    if (!node || found.has(digest)) continue
    found.add(digest)
    for (const next of node.names) open.push(next)
    for (const next of referrers.get(digest) ?? []) open.push(next)
  }
  return found
}

/**
 * Parts a set of manifests into groups that have nothing to do with each other, each in an order in which it can be deleted one by one:
 * at any moment what is left names nothing that is gone.
 */
export function componentsOf(graph: ManifestGraph, members: ReadonlySet<ContentDigest>): ContentDigest[][] {
  const referrers = referrersIn(graph)
  const namedBy = new Map<ContentDigest, ContentDigest[]>()
  for (const digest of members)
    for (const named of graph.get(digest)?.names ?? []) push(namedBy, named, digest)
  const neighbours = (digest: ContentDigest) => {
    const { names = [], subject } = graph.get(digest) ?? {}
    const about = subject === undefined ? [] : [subject]
    return [names, about, referrers.get(digest) ?? [], namedBy.get(digest) ?? []].flat()
  }
  const seen = new Set<ContentDigest>()
  const components: ContentDigest[][] = []
  for (const first of members) {
    const component: ContentDigest[] = []
    const open = [first]
    for (let digest = open.pop(); digest !== undefined; digest = open.pop()) {
      if (seen.has(digest) || !members.has(digest)) continue
      seen.add(digest)
      component.push(digest)
      for (const next of neighbours(digest)) open.push(next)
    }
    if (component.length > 0) components.push(parentsFirst(component, namedBy))
  }
  return components
}

/** What names comes before what is named. */
function parentsFirst(
  component: readonly ContentDigest[],
  namedBy: ReadonlyMap<ContentDigest, readonly ContentDigest[]>,
): ContentDigest[] {
  const ordered = new Set<ContentDigest>()
  // Entered once each: digests make circles impossible, but what is on disk may have been written by another hand.
  const entered = new Set<ContentDigest>()
  const open = [...component]
  for (let digest = open.at(-1); digest !== undefined; digest = open.at(-1)) {
    if (entered.has(digest)) {
      ordered.add(digest)
      open.pop()
      continue
    }
    entered.add(digest)
    for (const parent of namedBy.get(digest) ?? []) if (!entered.has(parent)) open.push(parent)
  }
  return [...ordered]
}

function referrersIn(graph: ManifestGraph): Map<ContentDigest, ContentDigest[]> {
  const referrers = new Map<ContentDigest, ContentDigest[]>()
  for (const { digest, subject } of graph.values())
    if (subject !== undefined) push(referrers, subject, digest)
  return referrers
}

function push<Key, Value>(lists: Map<Key, Value[]>, key: Key, value: Value): void {
  const list = lists.get(key)
  if (list) list.push(value)
  else lists.set(key, [value])
}
