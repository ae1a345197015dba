import type { FetchedFile, HeldReference } from '../lib/client/api.ts'
import type { RegistryClient } from '../lib/client/registry-client.ts'
import { ClientError } from '../lib/protocol/errors.ts'
import type { Digest } from '../lib/protocol/digest.ts'
import { parseDigest } from '../lib/protocol/digest.ts'
import type { Reference } from '../lib/protocol/reference.ts'
import { backoff, delay } from '../lib/runtime/backoff.ts'
import type { Logger } from '../lib/runtime/log.ts'
import { join } from 'node:path'
import type { BlobCache } from './blob-cache.ts'
import type { BlobFetcher } from './blob-fetcher.ts'
import { WrongDigestError, addBytes, isRefusal } from './blob-fetcher.ts'
import type { ManifestBlob } from './manifest.ts'
import { parseManifest } from './manifest.ts'
import type { ExposedRelease, ReleaseStore } from './releases.ts'
import { keyOf } from './releases.ts'

export interface ReleaseFetcherDeps {
  registry: Pick<RegistryClient, 'pullManifest'>
  blobs: BlobFetcher
  cache: BlobCache
  releases: ReleaseStore
  /** How many releases of a reference stay exposed. */
  keep: (reference: string) => number
  /** Milliseconds since some start: a wall clock may be set back in the middle of a fetch. */
  monotonic: () => number
  random: () => number
  log: Logger
}

/** Brings whole releases: manifest, blobs, exposure. */
export interface ReleaseFetcher extends AsyncDisposable {
  /**
   * Fetches a release and exposes it; calls for the same reference and digest share one fetch. `stubborn` fetches try again
   * for ever, even after a refusal.
   */
  fetch(
    reference: Reference,
    digest: Digest | undefined,
    options: { stubborn: boolean; signal: AbortSignal },
  ): Promise<ExposedRelease>
  /** How a reference stands: a fetch under way, else what is exposed, else the last failure. */
  held(reference: string): HeldReference | undefined
  references(): string[]
}

/** Manifests below one index; the blobs of all are fetched. */
const manifestsMax = 50
/** Failures remembered, for status. */
const failuresMax = 1000

interface Job {
  readonly reference: string
  digest: Digest | undefined
  readonly startedAt: number
  blobs: readonly ManifestBlob[]
  done: Map<Digest, HeldReference['bytes']>
  reason: string | undefined
  readonly outcome: Promise<ExposedRelease>
  readonly abort: AbortController
  waiters: number
}

export function createReleaseFetcher(deps: ReleaseFetcherDeps): ReleaseFetcher {
  const { registry, blobs, cache, releases, monotonic, random, log } = deps
  const jobs = new Map<string, Job>()
  /** How the fetch of what is exposed went, and how the last failed one did. */
  const finished = new Map<string, HeldReference>()
  const failures = new Map<string, HeldReference>()

  const start = (reference: Reference, digest: Digest | undefined, stubborn: boolean): Job => {
    const outcome = Promise.withResolvers<ExposedRelease>()
    const job: Job = {
      reference: keyOf(reference),
      digest,
      startedAt: monotonic(),
      blobs: [],
      done: new Map(),
      reason: undefined,
      outcome: outcome.promise,
      abort: new AbortController(),
      waiters: 0,
    }
    outcome.promise.catch(() => undefined)
    jobs.set(job.reference, job)
    run(job, reference, stubborn).then(
      (release) => {
        failures.delete(job.reference)
        finished.set(job.reference, heldOf(job, 'held'))
        forget(job)
        log.info(
          {
            reference: job.reference,
            digest: release.digest,
            path: release.path,
            tookMs: Math.round(monotonic() - job.startedAt),
          },
          'release ready',
        )
        outcome.resolve(release)
      },
      (error: unknown) => {
        if (!job.abort.signal.aborted) {
          job.reason = (error as Error).message
          failures.delete(job.reference)
          if (job.digest !== undefined) failures.set(job.reference, heldOf(job, 'failed'))
          if (failures.size > failuresMax) failures.delete(failures.keys().next().value ?? '')
          log.error({ reference: job.reference, reason: job.reason }, 'release failed')
        }
        forget(job)
        outcome.reject(error)
      },
    )
    return job
  }

  const forget = (job: Job) => {
    if (jobs.get(job.reference) === job) jobs.delete(job.reference)
  }

  const run = async (job: Job, reference: Reference, stubborn: boolean): Promise<ExposedRelease> => {
    const waits = backoff({ firstMs: 1000, maxMs: 4_000, random })
    for (;;) {
      try {
        return await attempt(job, reference)
      } catch (error) {
        job.abort.signal.throwIfAborted()
        if (!stubborn && (isRefusal(error) || error instanceof WrongDigestError || isClientFault(error)))
          throw error
        job.reason = (error as Error).message
        log.warn({ reference: job.reference, reason: job.reason }, 'release does not go on: trying again')
        await delay(waits.next().value, job.abort.signal)
      }
    }
  }

  const attempt = async (job: Job, reference: Reference): Promise<ExposedRelease> => {
    const { signal } = job.abort
    const wanted = job.digest ?? reference.digest ?? reference.tag ?? 'latest'
    const manifest = await registry.pullManifest(reference.repository, wanted, signal)
    job.digest = manifest.digest
    const found = await collect(reference.repository, manifest.bytes, signal)
    job.blobs = found
    job.reason = undefined
    const holds = new DisposableStack()
    try {
      await Promise.all(
        unique(found).map(async ({ digest, sizeBytes }) => {
          holds.use(cache.hold(digest))
          const there = (await cache.find(digest, sizeBytes)) !== undefined
          await blobs.fetch({ repository: reference.repository, digest, sizeBytes }, signal)
          job.done.set(digest, (there ? undefined : blobs.lastBytes(digest)) ?? noBytes)
        }),
      )
      return await releases.expose(reference, manifest.digest, found, deps.keep(job.reference))
    } finally {
      holds.dispose()
    }
  }

  /** The blobs of a manifest, and of the manifests of an index. */
  const collect = async (
    repository: string,
    bytes: Uint8Array,
    signal: AbortSignal,
  ): Promise<ManifestBlob[]> => {
    const top = parseManifest(bytes)
    const all = [...top.blobs]
    if (top.manifests.length > manifestsMax)
      throw new ClientError(
        'MANIFEST_INVALID',
        `Cannot fetch an index of ${top.manifests.length} manifests: at most ${manifestsMax}`,
      )
    for (const child of top.manifests) {
      const manifest = await registry.pullManifest(repository, child, signal)
      all.push(...parseManifest(manifest.bytes).blobs)
    }
    const names = new Set<string>()
    return all.map((blob) => {
      const name = names.has(blob.name) ? blob.digest.slice('sha256:'.length) : blob.name
      names.add(name)
      return { ...blob, name }
    })
  }

  const heldOf = (job: Job, state: HeldReference['state']): HeldReference => {
    const list = unique(job.blobs)
    let bytesDone = 0
    let bytes = noBytes
    let waiting: string | undefined
    let reason = job.reason
    for (const { digest, sizeBytes } of list) {
      const done = job.done.get(digest)
      const progress = done ? undefined : blobs.progress(digest)
      bytesDone += done ? sizeBytes : (progress?.bytesDone ?? 0)
      bytes = addBytes(bytes, done ?? progress?.bytes ?? noBytes)
      reason ??= progress?.reason
      if (progress?.state === 'waiting') waiting ??= progress.reason
    }
    return {
      reference: job.reference,
      digest: job.digest ?? unknownDigest,
      state: state === 'fetching' && waiting !== undefined ? 'waiting' : state,
      bytesDone,
      bytesTotal: list.reduce((total, { sizeBytes }) => total + sizeBytes, 0),
      bytes,
      tookMs: Math.round(monotonic() - job.startedAt),
      ...(state === 'held' || reason === undefined ? {} : { reason: reason.slice(0, 500) }),
    }
  }

  return {
    fetch: async (reference, digest, { stubborn, signal }) => {
      signal.throwIfAborted()
      const key = keyOf(reference)
      let job = jobs.get(key)
      if (job && digest !== undefined && job.digest !== undefined && job.digest !== digest) {
        // The tag moved on: what it left is not worth finishing.
        job.abort.abort(new Error(`${key} has moved to ${digest}`))
        jobs.delete(key)
        job = undefined
      }
      job ??= start(reference, digest, stubborn)
      job.waiters++
      const aborted = Promise.withResolvers<never>()
      const leave = () => {
        aborted.reject(signal.reason as Error)
      }
      signal.addEventListener('abort', leave, { once: true })
      try {
        return await Promise.race([job.outcome, aborted.promise])
      } finally {
        signal.removeEventListener('abort', leave)
        if (--job.waiters === 0 && jobs.get(key) === job) job.abort.abort(signal.reason)
      }
    },
    held: (reference) => {
      const job = jobs.get(reference)
      if (job?.digest !== undefined) return heldOf(job, 'fetching')
      const failure = failures.get(reference)
      if (failure) return failure
      const current = releases.current(reference)
      if (!current) return undefined
      const how = finished.get(reference)
      if (how?.digest === current.digest) return how
      const total = current.blobs.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0)
      return {
        reference,
        digest: current.digest,
        state: 'held',
        bytesDone: total,
        bytesTotal: total,
        bytes: noBytes,
        tookMs: 0,
      }
    },
    references: () => [
      ...new Set([...jobs.keys(), ...failures.keys(), ...releases.list().map(({ reference }) => reference)]),
    ],
    [Symbol.asyncDispose]: async () => {
      const ending = [...jobs.values()]
      for (const job of ending) job.abort.abort(new Error('the agent is ending'))
      await Promise.allSettled(ending.map(({ outcome }) => outcome))
    },
  }
}

/** The files of a release as the control API tells them. */
export function filesOf(release: ExposedRelease): FetchedFile[] {
  return release.blobs.map(({ name, digest, sizeBytes }) => ({
    name,
    path: join(release.path, name),
    digest,
    sizeBytes,
  }))
}

const noBytes: HeldReference['bytes'] = { ownRack: 0, otherRacks: 0, webseed: 0 }
const unknownDigest = parseDigest(`sha256:${'0'.repeat(64)}`)

function unique(blobs: readonly ManifestBlob[]): ManifestBlob[] {
  return [...new Map(blobs.map((blob) => [blob.digest, blob])).values()]
}

function isClientFault(error: unknown): boolean {
  return error instanceof Error && error.name === 'ClientError'
}
