import type { FetchedFile, HeldReference, RefusedRelease } from '../lib/client/api.ts'
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
import type { ReleaseVerifier } from './release-verifier.ts'
import { UnverifiedError } from './release-verifier.ts'
import type { ExposedRelease, ReleaseStore } from './releases.ts'
import { keyOf } from './releases.ts'

export interface ReleaseFetcherDeps {
  registry: Pick<RegistryClient, 'pullManifest'>
  /** Asked before anything of a release is fetched. */
  verifier: Pick<ReleaseVerifier, 'verify'>
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
  /** Releases that are not taken, since nobody who may has signed them. */
  refused(): RefusedRelease[]
  /** Looks at them again, now. */
  retryRefused(): void
}

/** Manifests below one index; the blobs of all are fetched. */
const manifestsMax = 50
/** Failures remembered, for status. */
const failuresMax = 1000
/** What was refused may be signed later: it is looked at again this often, at first sooner. */
const refusedRetryMs = { firstMs: 2000, maxMs: 60_000 }

interface Job {
  readonly reference: string
  digest: Digest | undefined
  readonly startedAt: number
  blobs: readonly ManifestBlob[]
  done: Map<Digest, HeldReference['bytes']>
  reason: string | undefined
  /** Why it is not taken, and what to do. */
  refusal: string | undefined
  /** Rejects at the next refusal: who does not want to wait until it is signed hears of it. */
  refused: PromiseWithResolvers<never>
  /** What is to be said of it even if all goes well. */
  warning: string | undefined
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
  let woken = new AbortController()

  const start = (reference: Reference, digest: Digest | undefined, stubborn: boolean): Job => {
    const outcome = Promise.withResolvers<ExposedRelease>()
    const job: Job = {
      reference: keyOf(reference),
      digest,
      startedAt: monotonic(),
      blobs: [],
      done: new Map(),
      reason: undefined,
      refusal: undefined,
      refused: nextRefusal(),
      warning: undefined,
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
          if (job.refusal === undefined) job.reason = (error as Error).message
          failures.delete(job.reference)
          if (job.digest !== undefined) failures.set(job.reference, heldOf(job, 'failed'))
          if (failures.size > failuresMax) failures.delete(failures.keys().next().value ?? '')
          if (job.refusal === undefined)
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
    let refusedWaits = backoff({ ...refusedRetryMs, random })
    for (;;) {
      try {
        return await attempt(job, reference)
      } catch (error) {
        job.abort.signal.throwIfAborted()
        if (error instanceof UnverifiedError) {
          refuse(job, error)
          if (!stubborn) throw error
          if (await wokenWithin(refusedWaits.next().value, job.abort.signal))
            refusedWaits = backoff({ ...refusedRetryMs, random })
          continue
        }
        if (!stubborn && (isRefusal(error) || error instanceof WrongDigestError || isClientFault(error)))
          throw error
        job.reason = (error as Error).message
        log.warn({ reference: job.reference, reason: job.reason }, 'release does not go on: trying again')
        await delay(waits.next().value, job.abort.signal)
      }
    }
  }

  const refuse = (job: Job, error: UnverifiedError) => {
    const { message, hint } = error
    const refusal = `${message}. ${hint}`.slice(0, reasonMax)
    // It is looked at again and again; a person is told once.
    if (job.refusal !== refusal)
      log.error({ reference: job.reference, digest: job.digest, reason: message, hint }, 'release refused')
    job.refusal = refusal
    job.reason = refusal
    const { reject } = job.refused
    job.refused = nextRefusal()
    reject(error)
  }

  const retryRefused = () => {
    const waiting = woken
    woken = new AbortController()
    waiting.abort()
  }

  const wokenWithin = async (ms: number, signal: AbortSignal): Promise<boolean> => {
    const wake = woken.signal
    await delay(ms, AbortSignal.any([signal, wake])).catch(() => {
      signal.throwIfAborted()
    })
    return wake.aborted
  }

  const attempt = async (job: Job, reference: Reference): Promise<ExposedRelease> => {
    const { signal } = job.abort
    const wanted = job.digest ?? reference.digest ?? reference.tag ?? 'latest'
    const manifest = await registry.pullManifest(reference.repository, wanted, signal)
    job.digest = manifest.digest
    const { repository, tag } = reference
    job.warning = await deps.verifier.verify({ repository, tag, digest: manifest.digest }, signal)
    job.refusal = undefined
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
    // One that is refused is looked at again, but until somebody does something it has failed.
    if (job.refusal !== undefined) state = 'failed'
    const told = state === 'held' ? job.warning : reason
    return {
      reference: job.reference,
      digest: job.digest ?? unknownDigest,
      state: state === 'fetching' && waiting !== undefined ? 'waiting' : state,
      bytesDone,
      bytesTotal: list.reduce((total, { sizeBytes }) => total + sizeBytes, 0),
      bytes,
      tookMs: Math.round(monotonic() - job.startedAt),
      ...(told === undefined ? {} : { reason: told.slice(0, reasonMax) }),
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
        if (stubborn) return await Promise.race([job.outcome, aborted.promise])
        // It may have been signed a moment ago.
        const { promise } = job.refused
        if (job.refusal !== undefined) retryRefused()
        return await Promise.race([job.outcome, aborted.promise, promise])
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
    refused: () =>
      [...jobs.values()].flatMap(({ reference, digest, refusal }) =>
        refusal === undefined || digest === undefined ? [] : [{ reference, digest, reason: refusal }],
      ),
    retryRefused,
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
/** What HeldReference takes. */
const reasonMax = 500
const unknownDigest = parseDigest(`sha256:${'0'.repeat(64)}`)

function nextRefusal(): PromiseWithResolvers<never> {
  const next = Promise.withResolvers<never>()
  next.promise.catch(() => undefined)
  return next
}

function unique(blobs: readonly ManifestBlob[]): ManifestBlob[] {
  return [...new Map(blobs.map((blob) => [blob.digest, blob])).values()]
}

function isClientFault(error: unknown): boolean {
  return error instanceof Error && error.name === 'ClientError'
}
