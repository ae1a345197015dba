import { LRUCache } from 'lru-cache'
import type { Digest } from '../../../lib/protocol/digest.ts'
import { parseDigest } from '../../../lib/protocol/digest.ts'
import type { Logger } from '../../../lib/runtime/log.ts'
import type { StateStore } from '../../state/state-store.ts'
import type { AuditLog } from '../audit-log.ts'
import type { BlobStat, BlobStore, Manifest } from '../blob-store.ts'
import { blobsOf, parseManifest } from '../oci-manifest.ts'
import type { IncomingBlob } from './incoming-blob.ts'
import { receiveBlob } from './incoming-blob.ts'
import { createSlots } from './slots.ts'
import { untilAborted } from './until-aborted.ts'
import type { CallOptions, UpstreamClient, UpstreamObserver } from './upstream-client.ts'
import { UpstreamError, asApiError } from './upstream-error.ts'

export interface PullThroughDeps {
  /** The first that covers a repository is asked. */
  readonly upstreams: readonly UpstreamClient[]
  readonly store: BlobStore
  readonly state: StateStore
  /** Runs work on a repository's manifests and tags alone. */
  readonly inTurn: <Result>(repository: string, work: () => Promise<Result>) => Promise<Result>
  /** Called after a tag moved, durably. */
  readonly onTag: (repository: string, tag: string) => void
  readonly auditLog: Pick<AuditLog, 'around'>
  readonly tagTtlMs: number
  readonly blobMaxBytes: number
  readonly now: () => number
  readonly random: () => number
  readonly log: Logger
  readonly observer: PullThroughObserver
}

export interface PullThroughObserver extends UpstreamObserver {
  received(upstream: string, bytes: number): void
  /** A tag was answered with what it was, because the upstream is down. */
  stale(upstream: string): void
}

/** A blob that may be read: held, or on its way. */
export interface ReadableBlob extends BlobStat {
  /** Absent where the store has it. */
  readonly incoming?: IncomingBlob
}

/** What to pull: a tag, as it is now, or a digest. */
export interface PullRequest {
  readonly repository: string
  readonly reference: string
  /** What the tag is said to be. Another answer is an UpstreamError `missing`: what was said may not be visible yet. */
  readonly expected?: Digest | undefined
  /** A tag that was pushed here stays what it is. */
  readonly keepOwn?: boolean
  readonly authorization?: string | undefined
  readonly signal: AbortSignal
}

/**
 * Manifests and blobs of other registries, brought here when they are asked for. They are stored as if they had been pushed, so each
 * blob has a torrent. Errors are ApiErrors, for the client; `pull` has those of the upstream.
 */
export interface PullThrough extends AsyncDisposable {
  /** Where a repository comes from; undefined where it is of this server alone. */
  upstreamOf(repository: string): Pick<UpstreamClient, 'name' | 'host'> | undefined
  /** A manifest by tag or digest. Undefined where neither this server nor the upstream has it. */
  manifest(
    repository: string,
    reference: string,
  ): Promise<{ readonly manifest: Manifest<Digest>; readonly stale: boolean } | undefined>
  /** How large a blob of the upstream is; undefined where there is none. */
  statBlob(repository: string, digest: Digest): Promise<BlobStat | undefined>
  /** A blob of the upstream, from its first bytes on. */
  openBlob(repository: string, digest: Digest): Promise<ReadableBlob | undefined>
  /** A blob of the upstream, once it is stored. */
  fetchBlob(repository: string, digest: Digest): Promise<BlobStat | undefined>
  /** Brings the manifests that refer to one, such as its signatures. What is here already is, whether the upstream answers or not. */
  fetchReferrers(repository: string, subject: Digest): Promise<void>
  /** A release with all that it names and that refers to it, then its tag. @returns its digest. @throws UpstreamError */
  pull(request: PullRequest): Promise<Digest>
}

/** Blobs that come from upstreams at once, and those that wait. */
const blobsMax = 16
const blobsWaitingMax = 1000
/** Blobs of one release that are asked for at once. */
const blobsOfReleaseMax = 4
/** Manifests that an index may name: what agents take, many times over. */
const manifestsMax = 1000
const tagsRemembered = 100_000
/** While its upstream is down, a tag is asked about this often. */
const staleMs = 5_000

/** Which digests a tag had by what the upstream said: it may be moved as long as it has one of them. */
interface PulledTag {
  readonly digests: readonly string[]
}

export function createPullThrough(deps: PullThroughDeps): PullThrough {
  const { upstreams, store, state, now, log, observer } = deps
  const ended = new AbortController()
  const slots = createSlots('upstream blobs', { max: blobsMax, waitingMax: blobsWaitingMax })
  /** Until when a tag, or who refers to a digest, need not be asked about, and whether it is stale meanwhile. */
  const known = new LRUCache<string, { untilMs: number; stale: boolean }>({ max: tagsRemembered })
  const remember = (key: string, askedAtMs: number, stale = false) => {
    known.set(key, { untilMs: askedAtMs + (stale ? staleMs : deps.tagTtlMs), stale })
  }
  const asking = new Map<string, Promise<{ manifest: Manifest<Digest>; stale: boolean } | undefined>>()
  const incoming = new Map<string, Promise<IncomingBlob | undefined>>()
  const upstreamOf = (repository: string) => upstreams.find((upstream) => upstream.covers(repository))
  const required = (repository: string) => {
    const upstream = upstreamOf(repository)
    if (!upstream)
      throw new UpstreamError('missing', `There is no upstream of ${repository} in registry.upstreams`)
    return upstream
  }

  /** Whether a tag is as an upstream gave it; one that was pushed here is not, and is left alone. */
  const isPulled = async (repository: string, tag: string, digest: Digest): Promise<boolean> => {
    const entry = await state.get(tagKey(repository, tag))
    return (entry?.value as PulledTag | undefined)?.digests.includes(digest) === true
  }
  const moveTag = async (repository: string, tag: string, digest: Digest, askedAtMs: number) => {
    const before = await store.getTag(repository, tag)
    remember(`${repository}:${tag}`, askedAtMs)
    if (before?.digest === digest && (await isPulled(repository, tag, digest))) return
    // Before the tag: after a crash in between it still has the old digest, and is known as pulled.
    const digests = [digest, ...(before && before.digest !== digest ? [before.digest] : [])]
    await state.put(tagKey(repository, tag), { digests } satisfies PulledTag)
    // The release before stays for a while yet.
    if (before) await store.claimManifest(repository, before.digest)
    const act = {
      who: { kind: 'upstream', name: required(repository).name },
      action: 'tag.move',
      target: `${repository}:${tag}`,
      details: { digest, was: before?.digest },
    } as const
    const put = () => store.putTag(repository, tag, digest)
    // A tag that was pushed here with the same digest is only known as pulled from now on.
    await (before?.digest === digest ? put() : deps.auditLog.around(act, put))
    deps.onTag(repository, tag)
    log.info({ repository, tag, digest, by: 'upstream' }, 'tag moved')
  }

  const heldByTag = async (repository: string, tag: string): Promise<Manifest<Digest> | undefined> => {
    const found = await store.getTag(repository, tag)
    return found && store.getManifest(repository, found.digest)
  }

  /** A tag as it is upstream now; as it was, while the upstream is down. */
  const askForTag = async (repository: string, tag: string) => {
    const upstream = required(repository)
    const options = { signal: ended.signal }
    const askedAtMs = now()
    const held = await heldByTag(repository, tag)
    try {
      const head = held && (await upstream.headManifest(repository, tag, options))
      if (held && !head) return undefined
      if (held && head?.digest === held.digest) {
        remember(`${repository}:${tag}`, askedAtMs)
        return { manifest: held, stale: false }
      }
      const manifest = await upstream.getManifest(repository, tag, options)
      if (!manifest) return undefined
      await deps.inTurn(repository, async () => {
        await store.putManifest(repository, manifest)
        await moveTag(repository, tag, manifest.digest, askedAtMs)
      })
      return { manifest, stale: false }
    } catch (error) {
      if (!held || !(error instanceof UpstreamError) || error.fault !== 'down') throw error
      log.warn({ repository, tag, upstream: upstream.name, reason: error.message }, 'tag served stale')
      remember(`${repository}:${tag}`, now(), true)
      return { manifest: held, stale: true }
    }
  }

  /** One question for all who ask for a tag. */
  const askOnce = (repository: string, tag: string) => {
    const key = `${repository}:${tag}`
    const underWay = asking.get(key)
    if (underWay) return underWay
    const asked = askForTag(repository, tag).finally(() => asking.delete(key))
    asking.set(key, asked)
    return asked
  }

  const fetchManifest = async (
    repository: string,
    digest: Digest,
    options: CallOptions,
  ): Promise<Manifest<Digest> | undefined> => {
    const held = await store.getManifest(repository, digest)
    return held ?? required(repository).getManifest(repository, digest, options)
  }

  /** One fetch for all who want the blob. */
  const receive = async (
    repository: string,
    digest: Digest,
    authorization?: string,
  ): Promise<IncomingBlob | undefined> => {
    const key = `${repository}@${digest}`
    const underWay = incoming.get(key)
    if (underWay) return underWay
    const upstream = required(repository)
    const opened = Promise.withResolvers<IncomingBlob | undefined>()
    incoming.set(key, opened.promise)
    const options = { signal: ended.signal, authorization }
    const work = slots.run(async () => {
      // Another fetch may have ended since somebody looked.
      const held = await store.claimBlob(repository, digest)
      if (held) {
        opened.resolve(heldBlob(store, held))
        return
      }
      const first = await upstream.openBlob(repository, digest, 0, options)
      const blob =
        first &&
        (await receiveBlob({
          repository,
          digest,
          first,
          reopen: (start) => upstream.openBlob(repository, digest, start, options),
          store,
          blobMaxBytes: deps.blobMaxBytes,
          signal: ended.signal,
          random: deps.random,
          received: (bytes) => {
            observer.received(upstream.name, bytes)
          },
        }))
      opened.resolve(blob)
      await blob?.stored
    })
    void work
      .catch((error: unknown) => {
        opened.reject(error)
        if (!ended.signal.aborted)
          log.warn({ repository, digest, upstream: upstream.name, err: error }, 'blob was not pulled')
      })
      .finally(() => incoming.delete(key))
    opened.promise.catch(() => undefined)
    return opened.promise
  }

  const fetchBlob = async (
    repository: string,
    digest: Digest,
    authorization?: string,
  ): Promise<BlobStat | undefined> => {
    const held = await store.claimBlob(repository, digest)
    return held ?? (await receive(repository, digest, authorization))?.stored
  }

  /** The manifests below one, themselves included, those that others name first. */
  const collect = async (
    repository: string,
    manifest: Manifest<Digest>,
    options: CallOptions,
    found = new Map<Digest, Manifest<Digest>>(),
  ): Promise<Map<Digest, Manifest<Digest>>> => {
    for (const { digest: text } of parseManifest(manifest.bytes).manifests ?? []) {
      const digest = parseDigest(text)
      if (found.has(digest)) continue
      if (found.size >= manifestsMax)
        throw new UpstreamError('broken', `${manifest.digest} names more than ${manifestsMax} manifests`)
      const child = await fetchManifest(repository, digest, options)
      // An index may have been copied without all of its platforms.
      if (child) await collect(repository, child, options, found)
      else
        log.warn({ repository, index: manifest.digest, digest }, 'index names a manifest that is not there')
    }
    found.set(manifest.digest, manifest)
    return found
  }

  /** Those that refer to a manifest. A registry that cannot say, or is down, keeps nobody from the manifest itself: undefined. */
  const referrers = async (
    repository: string,
    subject: Digest,
    options: CallOptions,
  ): Promise<Manifest<Digest>[] | undefined> => {
    try {
      const digests = await required(repository).listReferrers(repository, subject, options)
      const found = await Promise.all(digests.map((digest) => fetchManifest(repository, digest, options)))
      return found.filter((manifest) => manifest !== undefined)
    } catch (error) {
      if (!(error instanceof UpstreamError)) throw error
      log.warn({ repository, digest: subject, reason: error.message }, 'referrers were not pulled')
      return undefined
    }
  }
  /** One question for all who list them. */
  const listing = new Map<string, Promise<void>>()
  const storeReferrers = async (repository: string, subject: Digest): Promise<void> => {
    const askedAtMs = now()
    const found = await referrers(repository, subject, { signal: ended.signal })
    for (const manifest of found ?? []) await store.putManifest(repository, manifest)
    remember(`${repository}@${subject}`, askedAtMs, found === undefined)
  }

  const pull = async ({ repository, reference, ...request }: PullRequest): Promise<Digest> => {
    const upstream = required(repository)
    const { signal, authorization } = request
    const options = { signal: AbortSignal.any([signal, ended.signal]), authorization }
    const isTag = !reference.includes(':')
    const missing = (what: string) =>
      new UpstreamError('missing', `Cannot pull ${repository}:${reference} from ${upstream.name}: ${what}`)
    const askedAtMs = now()
    const held = isTag ? await store.getTag(repository, reference) : undefined
    if (held && request.keepOwn === true && !(await isPulled(repository, reference, held.digest)))
      return held.digest
    const head = held && (await upstream.headManifest(repository, reference, options))
    const manifest =
      (held && head?.digest === held.digest && (await store.getManifest(repository, held.digest))) ||
      (isTag
        ? await upstream.getManifest(repository, reference, options)
        : await fetchManifest(repository, parseDigest(reference), options))
    if (!manifest) throw missing('it is not there')
    if (request.expected !== undefined && manifest.digest !== request.expected)
      throw missing(`it is ${manifest.digest}, and not yet, or no longer, ${request.expected}`)

    const manifests = await collect(repository, manifest, options)
    for (const referrer of (await referrers(repository, manifest.digest, options)) ?? [])
      await collect(repository, referrer, options, manifests)
    const blobs = new Set(
      [...manifests.values()].flatMap(({ bytes }) =>
        blobsOf(parseManifest(bytes)).map(({ digest }) => parseDigest(digest)),
      ),
    )
    await eachOf(blobs, blobsOfReleaseMax, async (digest) => {
      const blob = await untilAborted(fetchBlob(repository, digest, authorization), options.signal)
      if (!blob) throw missing(`blob ${digest} is not there`)
    })
    await deps.inTurn(repository, async () => {
      for (const each of manifests.values())
        if (!(await store.claimManifest(repository, each.digest))) await store.putManifest(repository, each)
      // Whoever moved the tag meanwhile knew more.
      if (isTag && (await store.getTag(repository, reference))?.digest === held?.digest)
        await moveTag(repository, reference, manifest.digest, askedAtMs)
    })
    return manifest.digest
  }
  /** Pulls of one tag go one after the other: an older answer must not come after a newer one. */
  const pulling = new Map<string, Promise<unknown>>()

  return {
    upstreamOf,
    manifest: (repository, reference) =>
      toClient(async () => {
        if (reference.includes(':')) {
          const digest = parseDigest(reference)
          const held = await store.getManifest(repository, digest)
          const manifest = held ?? (await fetchManifest(repository, digest, { signal: ended.signal }))
          if (manifest && !held) await store.putManifest(repository, manifest)
          return manifest && { manifest, stale: false }
        }
        const key = `${repository}:${reference}`
        const tag = await store.getTag(repository, reference)
        const manifest = tag && (await store.getManifest(repository, tag.digest))
        const answered = known.get(key)
        const answer =
          manifest && answered && answered.untilMs > now()
            ? { manifest, stale: answered.stale }
            : manifest && !(await isPulled(repository, reference, manifest.digest))
              ? { manifest, stale: false }
              : await askOnce(repository, reference)
        if (answer?.stale === true) observer.stale(required(repository).name)
        return answer
      }),
    statBlob: (repository, digest) =>
      toClient(async () => {
        const head = await required(repository).headBlob(repository, digest, { signal: ended.signal })
        if (!head) return undefined
        if (head.sizeBytes !== undefined) return { digest, sizeBytes: head.sizeBytes }
        return fetchBlob(repository, digest)
      }),
    openBlob: (repository, digest) =>
      toClient(async () => {
        const blob = await receive(repository, digest)
        if (!blob) return undefined
        if (blob.sizeBytes === undefined) return blob.stored
        await blob.begun
        return { digest, sizeBytes: blob.sizeBytes, incoming: blob }
      }),
    fetchBlob: (repository, digest) => toClient(() => fetchBlob(repository, digest)),
    fetchReferrers: (repository, subject) =>
      toClient(async () => {
        const key = `${repository}@${subject}`
        if ((known.get(key)?.untilMs ?? 0) > now()) return
        let asked = listing.get(key)
        if (!asked) {
          asked = storeReferrers(repository, subject).finally(() => listing.delete(key))
          listing.set(key, asked)
        }
        await asked
      }),
    pull: async (request) => {
      const key = `${request.repository}:${request.reference}`
      const mine = (pulling.get(key) ?? Promise.resolve()).then(() => pull(request))
      const settled = mine.catch(() => undefined)
      pulling.set(key, settled)
      try {
        return await mine
      } finally {
        if (pulling.get(key) === settled) pulling.delete(key)
      }
    },
    [Symbol.asyncDispose]: async () => {
      ended.abort(new Error('the server is ending'))
      await Promise.allSettled([...incoming.values()].map(async (blob) => (await blob)?.stored))
      await Promise.allSettled(pulling.values())
      await Promise.all(upstreams.map((upstream) => upstream[Symbol.asyncDispose]()))
    },
  }
}

function tagKey(repository: string, tag: string): string {
  return `upstream-tags/${repository}:${tag}`
}

async function toClient<Result>(work: () => Promise<Result>): Promise<Result> {
  try {
    return await work()
  } catch (error) {
    throw asApiError(error)
  }
}

function heldBlob(store: BlobStore, blob: BlobStat): IncomingBlob {
  return {
    ...blob,
    stored: Promise.resolve(blob),
    begun: Promise.resolve(),
    read: (range, signal) => store.readBlob(blob.digest, range, signal),
  }
}

/** So many at once; the first failure ends it, once those under way have ended. */
async function eachOf<Item>(
  items: Iterable<Item>,
  max: number,
  work: (item: Item) => Promise<void>,
): Promise<void> {
  const rest = items[Symbol.iterator]()
  let failure: { error: unknown } | undefined
  const lane = async () => {
    for (let next = rest.next(); next.done !== true && !failure; next = rest.next())
      await work(next.value).catch((error: unknown) => {
        failure ??= { error }
      })
  }
  await Promise.all(Array.from({ length: max }, lane))
  if (failure) throw failure.error
}
