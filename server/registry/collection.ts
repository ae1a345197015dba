import type { GcItem, GcReport } from '../../lib/client/api.ts'
import type { ContentDigest } from '../../lib/protocol/digest.ts'
import { parseReference } from '../../lib/protocol/reference.ts'
import { delay } from '../../lib/runtime/backoff.ts'
import type { BlobStore, Tag } from './blob-store.ts'
import type { Deployed } from './fleet.ts'
import { referencesOf } from './oci-manifest.ts'
import type { Pins } from './pins.ts'
import type { ManifestNode } from './reachability.ts'
import { componentsOf, reachable } from './reachability.ts'
import type { RemovalDeps } from './removal.ts'
import type { AuditLog } from './audit-log.ts'
import { isShared, removeTag } from './removal.ts'
import type { RetentionRule } from './retention.ts'
import { tagsToGo } from './retention.ts'

export interface CollectionDeps extends RemovalDeps {
  readonly auditLog: Pick<AuditLog, 'around'>
  readonly pins: Pick<Pins, 'list'>
  /** What hosts said at `sinceMs` or later that they follow, hold or fetch, by repository. */
  readonly deployed: (
    sinceMs: number,
  ) => ReadonlyMap<string, Deployed> | Promise<ReadonlyMap<string, Deployed>>
  readonly retention: readonly RetentionRule[]
  readonly graceMs: number
  readonly now: () => number
}

/** What a report lists; it counts all. */
const itemsMax = 1000
const faultsMax = 100

/**
 * One collection. Tags go by the rules of retention; manifests that no tag, pin, host or kept manifest leads to; from each repository
 * the blobs that no manifest of it names; then the bytes that no repository has. A blob or manifest goes only if nobody has used it
 * for the grace period: pushed, mounted or claimed it. In between it only counts.
 *
 * It runs beside pushes, and no order of events makes it take what a push relies on:
 *
 * - Who is about to name something claims it first: a commit, a mount, a HEAD by someone who may push, a manifest for all it names,
 *   a pin. Claims and removals of one thing have their turns (blobs in the store, manifests with their repository), and a removal looks
 *   in its turn whether there was a claim since. So either the claim comes first, and the thing stays; or the removal does,
 *   and the client is told that it is not there.
 * - A manifest claims what it names and is stored in one turn of its repository. The mark of a repository begins with a turn of its
 *   own: a manifest that it does not see makes its claims after that, too late for any removal of this collection.
 * - Manifests that belong together go in one turn, all or none: no index loses a part, and nothing its signature, because of a claim
 *   in the middle.
 * - Links are made in the blob's turn and renew its bytes' claim, so bytes that no repository had when it was looked through, and one
 *   has now, are too young to go.
 *
 * Where several servers share the store, there are no turns between them, and this holds instead:
 *
 * - It waits for `settleMs` before it reads anything. Whoever claimed before its beginning has named by then what it claimed, where all can
 *   see it, or claims it once more after that (`claimHoldsMs`); any later claim is too young.
 * - A removal takes the thing out of place first, and looks for claims again when every server must have seen that; a claim
 *   that finds nothing in its place puts it back. One step decides between the two. Two collections at once, where one has lost its lease and does not know it, leave
 *   each other's things alone in the same way.
 *
 * Ended at any moment, by `kill -9` or power loss, it leaves too much and never too little: each step is durable before what it made
 * possible begins.
 */
export async function collectGarbage(
  deps: CollectionDeps,
  { dryRun, signal }: { dryRun: boolean; signal: AbortSignal },
): Promise<GcReport> {
  const { store, now } = deps
  const startedAtMs = now()
  // Of several servers one may be a little behind.
  const unusedSinceMs = startedAtMs - Math.max(deps.graceMs, store.settleMs ?? 0)
  if (store.settleMs !== undefined && !dryRun) {
    await store.recover()
    await delay(store.settleMs, signal)
  }
  const ledger = createLedger()
  const pinned = Map.groupBy(await deps.pins.list(), ({ reference }) => parseReference(reference).repository)
  const deployed = await deps.deployed(unusedSinceMs)
  const linked: Linked = { now: new Set(), later: new Set() }
  for await (const repository of store.scanRepositories()) {
    signal.throwIfAborted()
    const pins = pinned.get(repository) ?? []
    await collectRepository(repository, {
      ...deps,
      dryRun,
      signal,
      startedAtMs,
      unusedSinceMs,
      ledger,
      linked,
      deployed: deployed.get(repository) ?? nothingDeployed,
      pinnedTags: new Set(pins.flatMap(({ reference }) => parseReference(reference).tag ?? [])),
      pinnedDigests: pins.map(({ digest }) => digest as ContentDigest),
    })
  }
  await collectBlobs({ store, dryRun, signal, unusedSinceMs, ledger, linked })
  return {
    dryRun,
    startedAt: new Date(startedAtMs).toISOString(),
    tookMs: Math.max(0, now() - startedAtMs),
    graceSeconds: deps.graceMs / 1000,
    ...ledger.report(),
  }
}

/** Blobs that a repository has: now, and what will be left of that when the grace periods are over. */
interface Linked {
  readonly now: Set<ContentDigest>
  readonly later: Set<ContentDigest>
}

interface Run {
  readonly dryRun: boolean
  readonly signal: AbortSignal
  readonly unusedSinceMs: number
  readonly ledger: Ledger
  readonly linked: Linked
}

/** Who it is in the audit log. */
export const collectorName = { kind: 'server', name: 'garbage collection' }

/** @returns whether it did: not where the tag has moved meanwhile */
function retire(repository: string, tag: Tag, reason: string, run: RepositoryRun): Promise<boolean> {
  const target = `${repository}:${tag.tag}`
  const details = { was: tag.digest, reason }
  return run.auditLog.around({ who: collectorName, action: 'tag.delete', target, details }, () =>
    removeTag(run, repository, tag.tag, tag),
  )
}

interface RepositoryRun extends Run, Omit<CollectionDeps, 'deployed' | 'pins'> {
  readonly startedAtMs: number
  readonly deployed: Deployed
  readonly pinnedTags: ReadonlySet<string>
  readonly pinnedDigests: readonly ContentDigest[]
}

const nothingDeployed: Deployed = { tags: new Set(), digests: new Set() }

async function collectRepository(repository: string, run: RepositoryRun): Promise<void> {
  const { store, inTurn, unusedSinceMs, ledger, linked } = run
  // Pushes that have claimed already end before anything is read.
  await inTurn(repository, () => Promise.resolve())
  const tags = await store.listTags(repository)
  const links = new Map<ContentDigest, number>()
  for await (const { digest, usedAtMs } of store.scanLinks(repository)) links.set(digest, usedAtMs)
  const graph = await readGraph(repository, links, run)
  if ('unreadable' in graph) {
    ledger.fault(repository, `manifest ${graph.unreadable} cannot be read, so nobody knows what it needs`)
    for (const digest of links.keys()) {
      linked.now.add(digest)
      linked.later.add(digest)
    }
    return
  }
  const { manifests } = graph
  await claimDeployed(repository, manifests, run)

  const going = tagsToGo(run.retention, {
    repository,
    tags,
    use: {
      pinnedTags: run.pinnedTags,
      deployedTags: run.deployed.tags,
      deployedDigests: run.deployed.digests,
      has: (digest) => manifests.has(digest),
    },
    nowMs: run.startedAtMs,
  })
  const gone = new Set<string>()
  for (const { tag, reason } of going) {
    run.signal.throwIfAborted()
    if (!run.dryRun && !(await retire(repository, tag, reason, run))) continue
    gone.add(tag.tag)
    ledger.gone({ kind: 'tag', repository, tag: tag.tag, digest: tag.digest, reason })
  }

  const roots = [
    ...tags.filter(({ tag }) => !gone.has(tag)).map(({ digest }) => digest),
    ...run.pinnedDigests,
    ...run.deployed.digests,
  ]
  const young = [...manifests.values()]
    .filter(({ usedAtMs }) => usedAtMs >= unusedSinceMs)
    .map(({ digest }) => digest)
  // What a tag named that goes now counts as used until now.
  const kept = reachable(manifests, [...roots, ...young, ...going.map(({ tag }) => tag.digest)])
  const keptLater = reachable(manifests, roots)
  await sweepManifests(repository, manifests, kept, run)
  await sweepLinks(
    repository,
    links,
    { named: namedBy(manifests, kept), later: namedBy(manifests, keptLater) },
    run,
  )
}

/** Reads all manifests of a repository. Of what they name only that is remembered which is there. */
async function readGraph(
  repository: string,
  links: ReadonlyMap<ContentDigest, number>,
  { store, signal }: RepositoryRun,
): Promise<{ manifests: Map<ContentDigest, ManifestNode> } | { unreadable: ContentDigest }> {
  const usedAt = new Map<ContentDigest, number>()
  for await (const { digest, usedAtMs } of store.scanManifests(repository)) usedAt.set(digest, usedAtMs)
  // A digest that is named a thousand times is one text.
  const here = new Map([...links.keys(), ...usedAt.keys()].map((digest) => [digest, digest]))
  const manifests = new Map<ContentDigest, ManifestNode>()
  for (const [digest, usedAtMs] of usedAt) {
    signal.throwIfAborted()
    const manifest = await store.getManifest(repository, digest)
    // Deleted meanwhile.
    if (!manifest) continue
    const references = referencesOf(manifest.bytes)
    if (!references) return { unreadable: digest }
    const names = references.names.flatMap((name) => here.get(name) ?? [])
    manifests.set(digest, { digest, usedAtMs, names, subject: references.subject })
  }
  return { manifests }
}

/** So that what a host holds which nobody hears of any more, or which a restarted server has not heard of yet, still has its time. */
async function claimDeployed(
  repository: string,
  manifests: ReadonlyMap<ContentDigest, ManifestNode>,
  { store, inTurn, deployed, dryRun }: RepositoryRun,
): Promise<void> {
  if (dryRun) return
  for (const digest of deployed.digests)
    if (manifests.has(digest)) await inTurn(repository, () => store.claimManifest(repository, digest))
}

/** Removes what is not in `kept`, and adds to it what has been claimed meanwhile. */
async function sweepManifests(
  repository: string,
  manifests: ReadonlyMap<ContentDigest, ManifestNode>,
  kept: Set<ContentDigest>,
  { store, inTurn, unusedSinceMs, dryRun, signal, ledger }: RepositoryRun,
): Promise<void> {
  const doomed = new Set([...manifests.keys()].filter((digest) => !kept.has(digest)))
  await eachOf(componentsOf(manifests, doomed), store, async (component) => {
    signal.throwIfAborted()
    const remove = () => store.deleteManifests(repository, component, { unusedSinceMs })
    const removed = dryRun || (await (isShared(store) ? remove() : inTurn(repository, remove)))
    for (const digest of component) {
      if (removed)
        ledger.gone({
          kind: 'manifest',
          repository,
          digest,
          reason: 'no tag, pin, host or manifest leads to it',
        })
      else kept.add(digest)
    }
  })
}

async function sweepLinks(
  repository: string,
  links: ReadonlyMap<ContentDigest, number>,
  { named, later }: { named: ReadonlySet<ContentDigest>; later: ReadonlySet<ContentDigest> },
  { store, unusedSinceMs, dryRun, signal, ledger, linked }: RepositoryRun,
): Promise<void> {
  await eachOf(links, store, async ([digest, usedAtMs]) => {
    signal.throwIfAborted()
    if (later.has(digest)) linked.later.add(digest)
    const goes =
      !named.has(digest) &&
      usedAtMs < unusedSinceMs &&
      (dryRun || (await store.unlinkBlob(repository, digest, unusedSinceMs)))
    if (goes)
      ledger.gone({ kind: 'link', repository, digest, reason: 'no manifest of the repository names it' })
    else linked.now.add(digest)
  })
}

async function collectBlobs({
  store,
  dryRun,
  signal,
  unusedSinceMs,
  ledger,
  linked,
}: Run & { store: BlobStore }): Promise<void> {
  await eachOf(store.scanBlobs(), store, async ({ digest, sizeBytes, usedAtMs }) => {
    signal.throwIfAborted()
    const goes =
      !linked.now.has(digest) &&
      usedAtMs < unusedSinceMs &&
      (dryRun || (await store.deleteBlob(digest, unusedSinceMs)))
    if (goes) ledger.gone({ kind: 'blob', digest, sizeBytes, reason: 'no repository has it' })
    else ledger.kept(sizeBytes, linked.later.has(digest))
  })
}

/** Removals of a store of several servers wait for them: so many wait at once. */
const removalsMax = 256

/** One after the other, or many at once where each may have to wait. Ends with the first failure, once those under way have ended. */
async function eachOf<Item>(
  items: Iterable<Item> | AsyncIterable<Item>,
  store: BlobStore,
  work: (item: Item) => Promise<void>,
): Promise<void> {
  const most = isShared(store) ? removalsMax : 1
  const underWay = new Set<Promise<void>>()
  let failure: { error: unknown } | undefined
  for await (const item of items) {
    if (underWay.size >= most) await Promise.race(underWay)
    if (failure) break
    const mine = work(item)
      .catch((error: unknown) => {
        failure ??= { error }
      })
      .finally(() => underWay.delete(mine))
    underWay.add(mine)
  }
  await Promise.all(underWay)
  if (failure) throw failure.error
}

function namedBy(
  manifests: ReadonlyMap<ContentDigest, ManifestNode>,
  kept: ReadonlySet<ContentDigest>,
): Set<ContentDigest> {
  const named = new Set<ContentDigest>()
  for (const digest of kept) for (const name of manifests.get(digest)?.names ?? []) named.add(name)
  return named
}

type Ledger = ReturnType<typeof createLedger>

const pluralOf = { tag: 'tags', manifest: 'manifests', link: 'links', blob: 'blobs' } as const

function createLedger() {
  const gone = { tags: 0, manifests: 0, links: 0, blobs: 0, bytes: 0 }
  const kept = { blobs: 0, bytes: 0 }
  const waiting = { blobs: 0, bytes: 0 }
  const items: GcItem[] = []
  const faults: GcReport['faults'] = []
  return {
    gone: (item: GcItem) => {
      gone[pluralOf[item.kind]]++
      gone.bytes += item.sizeBytes ?? 0
      if (items.length < itemsMax) items.push(item)
    },
    kept: (sizeBytes: number, forGood: boolean) => {
      for (const tally of forGood ? [kept] : [kept, waiting]) {
        tally.blobs++
        tally.bytes += sizeBytes
      }
    },
    fault: (repository: string, message: string) => {
      if (faults.length < faultsMax) faults.push({ repository, message })
    },
    report: () => ({ gone, kept, waiting, items, faults }),
  }
}
