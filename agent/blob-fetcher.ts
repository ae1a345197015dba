import { createHash } from 'node:crypto'
import type { FileHandle } from 'node:fs/promises'
import { open } from 'node:fs/promises'
import type { BytesBySource, SwarmGrant, Transfer } from '../lib/client/api.ts'
import { RequestError } from '../lib/client/http.ts'
import type { RegistryClient } from '../lib/client/registry-client.ts'
import type { ServerClient } from '../lib/client/server-client.ts'
import type { Digest } from '../lib/protocol/digest.ts'
import { digestHex } from '../lib/protocol/digest.ts'
import type { InfoHash } from '../lib/protocol/infohash.ts'
import { infoHashFromHex, infoHashToHex } from '../lib/protocol/infohash.ts'
import type { Metainfo } from '../lib/protocol/metainfo.ts'
import { parseTorrent, pieceCount, pieceSize, swarmLengthMin } from '../lib/protocol/metainfo.ts'
import { backoff, delay } from '../lib/runtime/backoff.ts'
import { errorCode } from '../lib/runtime/files.ts'
import type { Logger } from '../lib/runtime/log.ts'
import { createSemaphore } from '../lib/runtime/semaphore.ts'
import type { AnnounceGrant, Announcement, Announcer } from './announcer.ts'
import type { BlobCache } from './blob-cache.ts'
import { NoSpaceError } from './blob-cache.ts'
import type { Engine, EngineHandle, PeerTraffic, Webseed } from './engine/engine.ts'
import { RateMeter } from './engine/rate-meter.ts'
import type { PeerTokens } from './peer-admission.ts'
import type { RevokedTorrents } from './revoked-torrents.ts'
import type { PrefixHash, PrefixHasher } from './prefix-hasher.ts'
import type { WatchdogStep } from './watchdog.ts'
import { createWatchdog } from './watchdog.ts'

export interface BlobWant {
  readonly repository: string
  readonly digest: Digest
  readonly sizeBytes: number
}

export interface BlobProgress {
  readonly state: 'waiting' | 'fetching'
  /** Bytes verified. */
  readonly bytesDone: number
  readonly bytes: BytesBySource
  readonly reason: string | undefined
}

/** A blob on its way into the cache, for who reads it meanwhile. */
export interface Arrival {
  /** Bytes verified. */
  readonly bytesDone: number
  /** The SHA-256 of the whole is right. */
  readonly isRight: boolean
  /** How often the whole had another SHA-256: what was read before the last time is not the blob's. */
  readonly wrongTries: number
  /** It waits for room on the disk, or within the quota. */
  readonly lacksRoom: boolean
  /** Where the verified bytes that begin at `position` end; `position` where the byte there is not verified. */
  verifiedEnd(position: number): number
  /** Calls when bytes have come, or another of these has changed, until disposed. */
  onChange(listener: () => void): Disposable
}

export interface SeedState {
  readonly infohash: string
  readonly peers: number
  readonly uploadedBytes: number
}

/** Where bytes came from and how fetches ended: for metrics. */
export interface FetchObserver {
  bytes(source: 'own_rack' | 'other_racks' | 'webseed' | 'registry', bytes: number): void
  uploaded(bytes: number): void
  fetched(outcome: 'ok' | 'wrong_digest' | 'refused' | 'aborted', seconds: number): void
  watchdog(step: WatchdogStep): void
}

export interface BlobFetcherDeps {
  engine: Engine
  announcer: Announcer
  cache: BlobCache
  hasher: PrefixHasher
  server: Pick<ServerClient, 'swarmGrant'>
  /** Where this host's tokens for other agents go. */
  peerTokens: Pick<PeerTokens, 'tokenFor' | 'keep' | 'forget'>
  /** The thumbprint of this host's certificate, which they are to name. */
  certificate: string | undefined
  /** Torrents that are not shared any more; `look` is called where the server says so of one. */
  revoked: Pick<RevokedTorrents, 'has' | 'look'>
  registry: Pick<RegistryClient, 'pullBlob'>
  fetchesMax: number
  stallMs: number
  /** Where this host is, once it is known. */
  place: () => string | undefined
  /** Milliseconds since 1970, for tokens. */
  now: () => number
  /** Milliseconds since some start, for durations. */
  monotonic: () => number
  random: () => number
  log: Logger
  observe: FetchObserver
}

/** Brings blobs into the cache and seeds them from then on. */
export interface BlobFetcher extends AsyncDisposable {
  /**
   * Resolves when the blob is in the cache. Callers of one digest share one fetch, which ends when the last of them aborts.
   * It goes on through every fault that may pass; it rejects when the server refuses or the bytes are not the blob's.
   * `arriving` is called at the start, unless the blob is in the cache already.
   */
  fetch(want: BlobWant, signal: AbortSignal, arriving?: (arrival: Arrival) => void): Promise<void>
  /** Of a fetch under way. */
  progress(digest: Digest): BlobProgress | undefined
  /** How the fetch that brought a blob got its bytes; undefined for blobs that were there already. */
  lastBytes(digest: Digest): BytesBySource | undefined
  seedOf(digest: Digest): SeedState | undefined
  /** Fetches under way, and seeds that have connections. */
  transfers(): Transfer[]
  /** Offers a cached blob to the swarm, from what is stored beside it. */
  seed(digest: Digest, spreadMs: number): Promise<void>
  stopSeeding(digest: Digest): Promise<void>
  /** Leaves the swarm, whether it was fetched or seeded; what is on disk stays. */
  leaveSwarm(infoHash: InfoHash): Promise<void>
}

/** The bytes of a blob have another SHA-256 than its name. */
export class WrongDigestError extends Error {
  override readonly name = 'WrongDigestError'
}

const tickMs = 1000
/** Who was told to use the webseed asks this often whether it still may, or may again. */
const webseedReviewMs = 1_000
const spaceRetryMs = 5000
/** After an outage a fetch goes on within this. */
const retryMaxMs = 4000
/** Fetches of a blob whose bytes turn out wrong before it is given up. */
const wrongDigestMax = 3
/** Bytes taken over plain HTTP before peers are tried again. */
const fallbackBytesMax = 64 * 1024 * 1024
/** Blobs whose sources are remembered. */
const lastBytesMax = 1000
const grantTimeoutMs = 15_000
/** Small blobs fetched at once, beside large ones: the configuration of an image does not wait for layers of another. */
const smallFetchesMax = 8

interface Job {
  readonly want: BlobWant
  readonly abort: AbortController
  readonly outcome: Promise<void>
  readonly startedAt: number
  waiters: number
  state: 'waiting' | 'fetching'
  reason: string | undefined
  handle: EngineHandle | undefined
  announcement: Announcement | undefined
  /** Of handles that were closed, and of plain HTTP. */
  past: BytesBySource
  bytesDone: number
  /** Once it is known; what is verified can be read by it. */
  metainfo: Metainfo | undefined
  isRight: boolean
  wrongTries: number
  lacksRoom: boolean
  readonly listeners: Set<() => void>
  /** From all sources. */
  readonly received: RateMeter
}

interface Seed {
  readonly want: BlobWant
  readonly handle: EngineHandle
  readonly announcement: Announcement
  readonly infohash: string
}

export function createBlobFetcher(deps: BlobFetcherDeps): BlobFetcher {
  const { cache, engine, announcer, now, monotonic, random, log } = deps
  const jobs = new Map<Digest, Job>()
  const seeds = new Map<Digest, Seed>()
  const slots = createSemaphore(deps.fetchesMax)
  const smallSlots = createSemaphore(smallFetchesMax)
  const lastBytes = new Map<Digest, BytesBySource>()
  let closed = false

  const start = (want: BlobWant): Job => {
    const abort = new AbortController()
    const outcome = Promise.withResolvers<undefined>()
    const job: Job = {
      want,
      abort,
      outcome: outcome.promise.then(() => undefined),
      startedAt: monotonic(),
      waiters: 0,
      state: 'waiting',
      reason: 'other fetches are under way',
      handle: undefined,
      announcement: undefined,
      past: { ownRack: 0, otherRacks: 0, webseed: 0 },
      bytesDone: 0,
      metainfo: undefined,
      isRight: false,
      wrongTries: 0,
      lacksRoom: false,
      listeners: new Set(),
      received: new RateMeter(monotonic()),
    }
    job.outcome.catch(() => undefined)
    jobs.set(want.digest, job)
    run(job).then(
      () => {
        jobs.delete(want.digest)
        lastBytes.delete(want.digest)
        lastBytes.set(want.digest, job.past)
        if (lastBytes.size > lastBytesMax) lastBytes.delete(lastBytes.keys().next().value ?? want.digest)
        deps.observe.fetched('ok', (monotonic() - job.startedAt) / 1000)
        outcome.resolve(undefined)
      },
      (error: unknown) => {
        jobs.delete(want.digest)
        const kind = abort.signal.aborted
          ? 'aborted'
          : error instanceof WrongDigestError
            ? 'wrong_digest'
            : 'refused'
        deps.observe.fetched(kind, (monotonic() - job.startedAt) / 1000)
        outcome.reject(error)
      },
    )
    return job
  }

  const run = async (job: Job): Promise<void> => {
    const { signal } = job.abort
    const waits = backoff({ firstMs: 500, maxMs: retryMaxMs, random })
    for (let wrong = 0; ;) {
      let waitMs: number
      try {
        await fetchInTurn(job)
        return
      } catch (error) {
        signal.throwIfAborted()
        if (error instanceof WrongDigestError && ++wrong >= wrongDigestMax) throw error
        if (isRefusal(error)) throw error
        if (error instanceof NoSpaceError || isDiskFull(error)) {
          job.state = 'waiting'
          job.reason = `no room: ${(error as Error).message}`
          job.lacksRoom = true
          tell(job)
          waitMs = spaceRetryMs
        } else {
          job.reason = (error as Error).message
          waitMs = waits.next().value
        }
        log.warn({ digest: job.want.digest, reason: job.reason }, 'fetch does not go on: trying again')
      }
      // Without a slot: what waits for room or for the server must not keep others from fetching.
      await delay(waitMs, signal)
    }
  }

  const fetchInTurn = async (job: Job): Promise<void> => {
    const queue = job.want.sizeBytes <= swarmLengthMin ? smallSlots : slots
    const release = await queue.take(job.abort.signal)
    try {
      job.abort.signal.throwIfAborted()
      await fetchWithin(job)
    } finally {
      release()
    }
  }

  /** One try, in space that is set aside for it. */
  const fetchWithin = async (job: Job): Promise<void> => {
    const space = await cache.reserve(job.want.digest, job.want.sizeBytes)
    try {
      job.state = 'fetching'
      job.reason = undefined
      job.lacksRoom = false
      job.isRight = false
      await fetchOnce(job)
    } finally {
      await space[Symbol.asyncDispose]()
    }
  }

  const fetchOnce = async (job: Job): Promise<void> => {
    const { want } = job
    if (want.sizeBytes <= swarmLengthMin) return fetchWhole(job)
    let grant: SwarmGrant
    try {
      grant = await askGrant(want, {}, job.abort.signal)
    } catch (error) {
      if (error instanceof RequestError && error.status === 404 && error.code !== 'BLOB_UNKNOWN')
        return fetchWhole(job)
      throw error
    }
    const torrent = Buffer.from(grant.metainfo, 'base64')
    const metainfo = parseTorrent(torrent)
    if (
      metainfo.name !== digestHex(want.digest) ||
      metainfo.length !== want.sizeBytes ||
      infoHashToHex(metainfo.infoHash) !== grant.infohash
    ) {
      throw new WrongDigestError(`Cannot fetch ${want.digest}: the server gave the torrent of something else`)
    }
    await cache.putTorrent(want.digest, torrent)
    await keepGrant(want, grant)
    await fetchFromSwarm(job, metainfo, grant)
  }

  /** Small blobs, and those that have no torrent: plain HTTP. */
  const fetchWhole = async (job: Job): Promise<void> => {
    const { digest, repository, sizeBytes } = job.want
    const { signal } = job.abort
    const answer = await deps.registry.pullBlob(repository, digest, { start: 0 }, signal)
    const hash = createHash('sha256')
    let position = 0
    {
      await using file: FileHandle = await open(cache.partialFile(digest), 'w', 0o640)
      for await (const part of answer.stream) {
        if (position + part.length > sizeBytes)
          throw new WrongDigestError(`Cannot use ${digest}: it has more than ${sizeBytes} bytes`)
        hash.update(part)
        await file.writeFile(part)
        position += part.length
        deps.observe.bytes('registry', part.length)
        job.past = { ...job.past, webseed: job.past.webseed + part.length }
        job.bytesDone = position
        tell(job)
      }
    }
    if (position !== sizeBytes) throw new Error(`the server sent ${position} of ${sizeBytes} bytes`)
    await finish(job, hash.digest('hex'))
  }

  /** Only here does a blob get into the cache. */
  const finish = async (job: Job, hex: string): Promise<void> => {
    const { digest } = job.want
    if (hex !== digestHex(digest)) {
      // Nobody may begin to read the file that goes, nor go on with it in the place of the next.
      job.metainfo = undefined
      await cache.dropPartial(digest)
      job.wrongTries++
      job.bytesDone = 0
      tell(job)
      log.error({ digest, got: `sha256:${hex}` }, 'fetched bytes have the wrong SHA-256: dropped')
      throw new WrongDigestError(`Cannot use ${digest}: the bytes fetched have sha256:${hex}`)
    }
    job.isRight = true
    tell(job)
    await cache.commit(digest)
    job.bytesDone = job.want.sizeBytes
  }

  const fetchFromSwarm = async (job: Job, metainfo: Metainfo, first: SwarmGrant): Promise<void> => {
    const { want } = job
    job.metainfo = metainfo
    const announcement = announcer.add({
      infoHash: metainfo.infoHash,
      grant: announceGrantOf(first),
      renew: async (signal) => announceGrantOf(await renewGrant(want, {}, signal)),
      progress: () => ({
        left: metainfo.length - job.bytesDone,
        downloaded: downloadedOf(job),
        uploaded: uploadedOf(job.handle),
      }),
    })
    job.announcement = announcement
    let handle: EngineHandle | undefined
    try {
      using hash = deps.hasher.open(cache.partialFile(want.digest), metainfo.length)
      handle = await follow(job, metainfo, first, announcement, hash)
      await finish(job, await hash.digest)
    } catch (error) {
      await job.handle?.close()
      foldTraffic(job)
      await announcement.close()
      throw error
    } finally {
      job.announcement = undefined
    }
    announcement.completed()
    // The handle goes on as a seed: its file was renamed, its connections stay.
    seeds.set(want.digest, { want, handle, announcement, infohash: infoHashToHex(metainfo.infoHash) })
    count(handle)
    foldTraffic(job)
  }

  /** Drives one engine handle after another until every piece is there. */
  const follow = async (
    job: Job,
    metainfo: Metainfo,
    grant: SwarmGrant,
    announcement: Announcement,
    hash: PrefixHash,
  ): Promise<EngineHandle> => {
    const { want } = job
    const { signal } = job.abort
    const watchdog = createWatchdog(deps.stallMs, monotonic())
    const webseedOf = ({ webseed: may, webseedUrl: url, webseedRange: range }: SwarmGrant) =>
      may
        ? {
            url,
            range,
            rangeDone: () => {
              askForMore(range?.firstPiece)
            },
          }
        : undefined
    /** Asks for more of the build than a range; where there is no more, what is under way goes on. */
    const askForMore = (rangeDone = 0) => {
      renewGrant(want, { rangeDone }, signal).then(
        (next) => {
          if (next.webseed) use(next)
        },
        (error: unknown) => {
          log.debug({ digest: want.digest, error: (error as Error).message }, 'no further range was given')
        },
      )
    }
    let webseed: Webseed | undefined = webseedOf(grant)
    /** Of the first hosts, which take over what one of them has left undone. */
    let isFirst = grant.webseed
    let reviewedAt = monotonic()
    const use = (next: SwarmGrant) => {
      announcement.setGrant(announceGrantOf(next))
      webseed = webseedOf(next)
      isFirst ||= next.webseed
      job.handle?.setWebseed(webseed)
      reviewedAt = monotonic()
    }
    const review = (stalledMs: number | undefined) =>
      renewGrant(want, { stalledMs }, signal).then(use, (error: unknown) => {
        reviewedAt = monotonic()
        log.debug({ digest: want.digest, error: (error as Error).message }, 'the grant was not renewed')
      })
    for (;;) {
      const handle = engine.fetch({
        metainfo,
        file: cache.partialFile(want.digest),
        peers: announcement.peers,
        seeds: () => announcement.seeds,
        webseed,
        signal,
      })
      job.handle = handle
      followPrefix(handle, metainfo, hash, () => {
        tell(job)
      })
      const step = await watch(
        job,
        handle,
        watchdog,
        async (asked) => {
          announcement.announceNow()
          await review(asked)
        },
        () => (isFirst && monotonic() - reviewedAt > webseedReviewMs ? review(undefined) : undefined),
      )
      if (step === 'done') return handle
      const missing = missingPieces(handle, metainfo)
      await handle.close()
      foldTraffic(job)
      if (step === 'fallback') {
        await fetchMissing(job, metainfo, missing).catch((error: unknown) => {
          signal.throwIfAborted()
          if (isDiskFull(error) || isRefusal(error)) throw error
          job.reason = `neither peers nor the registry give anything: ${(error as Error).message}`
        })
      }
    }
  }

  /** Watches one handle until it is done or must be replaced. */
  const watch = async (
    job: Job,
    handle: EngineHandle,
    watchdog: ReturnType<typeof createWatchdog>,
    ask: (stalledMs: number) => Promise<void>,
    review: () => Promise<void> | undefined,
  ): Promise<'done' | 'remake' | 'fallback'> => {
    const replaced = Promise.withResolvers<'remake' | 'fallback'>()
    let asking: Promise<void> | undefined
    const timer = setInterval(() => {
      job.bytesDone = handle.bytesVerified
      watchdog.progress(downloadedOf(job), monotonic())
      watchdog.checked(handle.bytesVerified, monotonic())
      job.reason =
        handle.waitingReason === undefined
          ? undefined
          : [handle.waitingReason, job.announcement?.lastError].filter(Boolean).join('; ')
      const step = watchdog.check(monotonic())
      if (step === undefined) {
        asking ??= review()?.finally(() => (asking = undefined))
        return
      }
      deps.observe.watchdog(step)
      log.warn({ digest: job.want.digest, step, reason: job.reason }, 'fetch stands still')
      asking ??= ask(watchdog.stalledMs(monotonic())).finally(() => (asking = undefined))
      if (step !== 'ask') replaced.resolve(step)
    }, tickMs)
    try {
      return await Promise.race([handle.done.then(() => 'done' as const), replaced.promise])
    } finally {
      clearInterval(timer)
      job.bytesDone = handle.bytesVerified
    }
  }

  /** The last way: missing pieces from the registry, checked one by one and written where the engine finds them. */
  const fetchMissing = async (job: Job, metainfo: Metainfo, missing: readonly number[]): Promise<void> => {
    const { digest, repository } = job.want
    const { signal } = job.abort
    const hashes = Buffer.from(metainfo.pieces)
    await using file: FileHandle = await openPart(cache.partialFile(digest))
    let taken = 0
    for (const [first, count] of runs(missing)) {
      const start = first * metainfo.pieceLength
      const end = Math.min(metainfo.length, (first + count) * metainfo.pieceLength)
      const answer = await deps.registry.pullBlob(repository, digest, { start, end }, signal)
      let piece = first
      let parts: Uint8Array[] = []
      let held = 0
      // A registry that ignores Range sends the blob from its start.
      let skip = answer.status === 206 ? 0 : start
      for await (let part of answer.stream) {
        if (skip > 0) {
          const cut = Math.min(skip, part.length)
          skip -= cut
          part = part.subarray(cut)
        }
        parts.push(part)
        held += part.length
        deps.observe.bytes('registry', part.length)
        job.past = { ...job.past, webseed: job.past.webseed + part.length }
        while (piece < first + count && held >= pieceSize(metainfo, piece)) {
          const all = Buffer.concat(parts)
          const size = pieceSize(metainfo, piece)
          const bytes = all.subarray(0, size)
          if (
            !createHash('sha1')
              .update(bytes)
              .digest()
              .equals(hashes.subarray(20 * piece, 20 * piece + 20))
          )
            throw new Error(`piece ${piece} from the registry is wrong`)
          await file.write(bytes, 0, size, piece * metainfo.pieceLength)
          parts = [all.subarray(size)]
          held -= size
          piece++
          taken += size
          job.bytesDone += size
          tell(job)
        }
        if (piece === first + count) break
      }
      if (taken >= fallbackBytesMax) return
    }
  }

  const foldTraffic = (job: Job) => {
    if (!job.handle) return
    job.past = addBytes(job.past, bySource(job.handle.traffic(), deps.place()))
    job.handle = undefined
  }

  const askGrant = (
    { repository, digest }: BlobWant,
    { stalledMs, rangeDone }: { stalledMs?: number | undefined; rangeDone?: number },
    signal: AbortSignal,
  ): Promise<SwarmGrant> =>
    deps.server.swarmGrant(
      {
        repository,
        digest,
        ...(stalledMs === undefined ? {} : { stalledSeconds: Math.floor(stalledMs / 1000) }),
        ...(rangeDone === undefined ? {} : { rangeDone }),
        ...(deps.certificate === undefined ? {} : { certificate: deps.certificate }),
      },
      AbortSignal.any([signal, AbortSignal.timeout(grantTimeoutMs)]),
    )

  /** Beside the blob, so that it can be seeded after a restart while the server is away. */
  const keepGrant = async ({ repository, digest }: BlobWant, { infohash, peerToken }: SwarmGrant) => {
    await cache.putGrant(digest, { repository, peerToken })
    if (peerToken !== undefined) deps.peerTokens.keep(infoHashFromHex(infohash), peerToken)
  }

  const renewGrant = async (...asked: Parameters<typeof askGrant>): Promise<SwarmGrant> => {
    const grant = await askGrant(...asked).catch((error: unknown) => {
      if (error instanceof RequestError && error.code === 'TORRENT_REVOKED') deps.revoked.look()
      throw error
    })
    if (deps.peerTokens.tokenFor(infoHashFromHex(grant.infohash)) !== grant.peerToken)
      await keepGrant(asked[0], grant)
    return grant
  }

  const announceGrantOf = (grant: SwarmGrant): AnnounceGrant => ({
    announceUrl: grant.announceUrl,
    token: grant.token,
    obtainedAt: now(),
    expiresAt: Date.parse(grant.expiresAt),
  })

  /** Traffic goes to the metrics as it happens, for fetches and seeds alike. */
  const counted = new WeakMap<EngineHandle, { received: BytesBySource; uploaded: number }>()
  const count = (handle: EngineHandle) => {
    const traffic = handle.traffic()
    const received = bySource(traffic, deps.place())
    const uploaded = uploadedOf(handle)
    const before = counted.get(handle) ?? { received: { ownRack: 0, otherRacks: 0, webseed: 0 }, uploaded: 0 }
    deps.observe.bytes('own_rack', Math.max(0, received.ownRack - before.received.ownRack))
    deps.observe.bytes('other_racks', Math.max(0, received.otherRacks - before.received.otherRacks))
    deps.observe.bytes('webseed', Math.max(0, received.webseed - before.received.webseed))
    deps.observe.uploaded(Math.max(0, uploaded - before.uploaded))
    counted.set(handle, { received, uploaded })
  }
  const meter = setInterval(() => {
    for (const { handle } of jobs.values()) if (handle) count(handle)
    for (const { handle } of seeds.values()) count(handle)
  }, 5 * tickMs)
  meter.unref()
  const rates = setInterval(() => {
    for (const job of jobs.values()) {
      job.received.add(Math.max(0, downloadedOf(job) - job.received.total))
      job.received.tick(monotonic())
    }
  }, tickMs)
  rates.unref()

  const progressOf = (job: Job): BlobProgress => {
    const current = job.handle ? bySource(job.handle.traffic(), deps.place()) : undefined
    return {
      state: job.state,
      bytesDone: job.handle?.bytesVerified ?? job.bytesDone,
      bytes: current ? addBytes(job.past, current) : job.past,
      reason: job.reason,
    }
  }

  const stopSeeding = async (digest: Digest) => {
    const seed = seeds.get(digest)
    if (!seed) return
    seeds.delete(digest)
    count(seed.handle)
    await Promise.all([seed.handle.close(), seed.announcement.close()])
    deps.peerTokens.forget(infoHashFromHex(seed.infohash))
  }

  return {
    fetch: async (want, signal, arriving) => {
      for (;;) {
        signal.throwIfAborted()
        if (closed) throw new Error('the agent is ending')
        if (await cache.find(want.digest, want.sizeBytes)) {
          await cache.touch(want.digest)
          return
        }
        // One that everybody has left cannot be joined any more.
        const left = jobs.get(want.digest)
        if (left?.abort.signal.aborted !== true) break
        await left.outcome.catch(() => undefined)
      }
      const job = jobs.get(want.digest) ?? start(want)
      job.waiters++
      const aborted = Promise.withResolvers<never>()
      const leave = () => {
        aborted.reject(signal.reason as Error)
      }
      signal.addEventListener('abort', leave, { once: true })
      arriving?.(arrivalOf(job))
      try {
        await Promise.race([job.outcome, aborted.promise])
      } finally {
        signal.removeEventListener('abort', leave)
        // A fetch that has ended goes on as a seed, which nobody's leaving ends.
        if (--job.waiters === 0 && jobs.get(want.digest) === job) job.abort.abort(signal.reason)
      }
    },
    progress: (digest) => {
      const job = jobs.get(digest)
      return job && progressOf(job)
    },
    lastBytes: (digest) => lastBytes.get(digest),
    seedOf: (digest) => {
      const seed = seeds.get(digest)
      return (
        seed && {
          infohash: seed.infohash,
          peers: seed.handle.peerCount,
          uploadedBytes: uploadedOf(seed.handle),
        }
      )
    },
    transfers: () => [
      ...[...jobs.values()].map((job) => ({
        ...job.want,
        ...progressOf(job),
        downloadRate: Math.round(job.received.rate),
        ...connectionsOf(job.handle),
      })),
      ...[...seeds.values()]
        .filter(({ handle }) => handle.peerCount > 0)
        .map(({ want, handle }) => ({
          ...want,
          state: 'seeding' as const,
          bytesDone: want.sizeBytes,
          bytes: bySource(handle.traffic(), deps.place()),
          reason: undefined,
          downloadRate: 0,
          ...connectionsOf(handle),
        })),
    ],
    seed: async (digest, spreadMs) => {
      if (seeds.has(digest) || jobs.has(digest) || closed) return
      const stored = await cache.getTorrent(digest)
      const blob = await cache.find(digest, stored?.metainfo.length)
      if (!stored || !blob || deps.revoked.has(stored.metainfo.infoHash)) return
      const want: BlobWant = { repository: stored.repository, digest, sizeBytes: blob.sizeBytes }
      if (stored.peerToken !== undefined) deps.peerTokens.keep(stored.metainfo.infoHash, stored.peerToken)
      const announcement = announcer.add({
        infoHash: stored.metainfo.infoHash,
        grant: undefined,
        renew: async (signal) => announceGrantOf(await renewGrant(want, {}, signal)),
        progress: () => ({ left: 0, downloaded: 0, uploaded: uploadedOf(seeds.get(digest)?.handle) }),
        spreadMs,
      })
      const handle = engine.seed({
        metainfo: stored.metainfo,
        file: cache.file(digest),
        peers: announcement.peers,
        seeds: () => announcement.seeds,
        signal: new AbortController().signal,
      })
      seeds.set(digest, { want, handle, announcement, infohash: infoHashToHex(stored.metainfo.infoHash) })
    },
    stopSeeding,
    leaveSwarm: async (infoHash) => {
      const infohash = infoHashToHex(infoHash)
      for (const job of jobs.values())
        if (job.metainfo && infoHashToHex(job.metainfo.infoHash) === infohash)
          job.abort.abort(
            new RequestError(403, 'TORRENT_REVOKED', `the server has revoked the torrent ${infohash}`),
          )
      const seeded = [...seeds.values()].filter((seed) => seed.infohash === infohash)
      await Promise.all(seeded.map(({ want }) => stopSeeding(want.digest)))
    },
    [Symbol.asyncDispose]: async () => {
      closed = true
      clearInterval(meter)
      clearInterval(rates)
      const ending = [...jobs.values()]
      for (const job of ending) job.abort.abort(new Error('the agent is ending'))
      await Promise.allSettled(ending.map(({ outcome }) => outcome))
      await Promise.all([...seeds.keys()].map(stopSeeding))
    },
  }
}

function tell({ listeners }: Job): void {
  for (const listener of listeners) listener()
}

function arrivalOf(job: Job): Arrival {
  return {
    get bytesDone() {
      return job.handle?.bytesVerified ?? job.bytesDone
    },
    get isRight() {
      return job.isRight
    },
    get wrongTries() {
      return job.wrongTries
    },
    get lacksRoom() {
      return job.lacksRoom
    },
    verifiedEnd: (position) => {
      const { handle, metainfo } = job
      if (job.isRight) return job.want.sizeBytes
      if (!handle || !metainfo) return position
      const count = pieceCount(metainfo)
      let piece = Math.floor(position / metainfo.pieceLength)
      while (piece < count && handle.has(piece)) piece++
      return Math.max(position, Math.min(piece * metainfo.pieceLength, metainfo.length))
    },
    onChange: (listener) => {
      job.listeners.add(listener)
      return {
        [Symbol.dispose]: () => {
          job.listeners.delete(listener)
        },
      }
    },
  }
}

/** Feeds the hash with the verified prefix as it grows, and says when there is more. */
function followPrefix(handle: EngineHandle, metainfo: Metainfo, hash: PrefixHash, moved: () => void): void {
  const count = pieceCount(metainfo)
  let next = 0
  const advance = () => {
    const before = next
    while (next < count && handle.has(next)) next++
    if (next > before) hash.advance(Math.min(next * metainfo.pieceLength, metainfo.length))
    moved()
  }
  handle.onPiece(advance)
  advance()
}

function missingPieces(handle: EngineHandle, metainfo: Metainfo): number[] {
  return Array.from({ length: pieceCount(metainfo) }, (_, i) => i).filter((piece) => !handle.has(piece))
}

/** Runs of neighbours, bounded so that a request does not ask for more than a few pieces that others may bring meanwhile. */
function runs(pieces: readonly number[]): [first: number, count: number][] {
  const found: [number, number][] = []
  for (const piece of pieces) {
    const last = found.at(-1)
    if (last && last[0] + last[1] === piece) last[1]++
    else found.push([piece, 1])
  }
  return found
}

/** Bytes by where they came from, as seen from a place. */
export function bySource(traffic: readonly PeerTraffic[], place: string | undefined): BytesBySource {
  const sums = { ownRack: 0, otherRacks: 0, webseed: 0 }
  for (const source of traffic) {
    if (source.kind === 'webseed') sums.webseed += source.downloadedBytes
    else if (place !== undefined && source.place === place) sums.ownRack += source.downloadedBytes
    else sums.otherRacks += source.downloadedBytes
  }
  return sums
}

export function addBytes(a: BytesBySource, b: BytesBySource): BytesBySource {
  return {
    ownRack: a.ownRack + b.ownRack,
    otherRacks: a.otherRacks + b.otherRacks,
    webseed: a.webseed + b.webseed,
  }
}

function downloadedOf(job: Job): number {
  const past = job.past.ownRack + job.past.otherRacks + job.past.webseed
  return (
    past + (job.handle?.traffic().reduce((total, { downloadedBytes }) => total + downloadedBytes, 0) ?? 0)
  )
}

function uploadedOf(handle: EngineHandle | undefined): number {
  return handle?.traffic().reduce((total, { uploadedBytes }) => total + uploadedBytes, 0) ?? 0
}

function connectionsOf(
  handle: EngineHandle | undefined,
): Pick<Transfer, 'uploadRate' | 'peerCount' | 'peers'> {
  const peers = (handle?.peers() ?? []).map((peer) => ({
    ...peer,
    downloadRate: Math.round(peer.downloadRate),
    uploadRate: Math.round(peer.uploadRate),
  }))
  return {
    uploadRate: peers.reduce((total, { uploadRate }) => total + uploadRate, 0),
    peerCount: peers.length,
    peers,
  }
}

/** The server understood and said no; asking again at once changes nothing. */
export function isRefusal(error: unknown): boolean {
  return error instanceof RequestError && [400, 401, 403, 404, 410].includes(error.status)
}

function isDiskFull(error: unknown): boolean {
  return ['ENOSPC', 'EDQUOT'].includes(errorCode(error) ?? '')
}

async function openPart(file: string): Promise<FileHandle> {
  return open(file, 'r+').catch((error: unknown) => {
    if (errorCode(error) === 'ENOENT') return open(file, 'wx+', 0o640)
    throw error
  })
}
