import { readFile } from 'node:fs/promises'
import { hostname } from 'node:os'
import { join } from 'node:path'
import { Agent as HttpAgent } from 'undici'
import type { AgentStatus, HeldReference, HostReport } from '../lib/client/api.ts'
import { createHttpClient } from '../lib/client/http.ts'
import { createRegistryClient } from '../lib/client/registry-client.ts'
import { createServerClient } from '../lib/client/server-client.ts'
import { isLoopback, parseIp } from '../lib/protocol/address.ts'
import type { Digest } from '../lib/protocol/digest.ts'
import { parseDigest } from '../lib/protocol/digest.ts'
import type { InfoHash } from '../lib/protocol/infohash.ts'
import { restartNeeded } from '../lib/runtime/changed-settings.ts'
import { ConfigError } from '../lib/runtime/config.ts'
import { makeDirectory } from '../lib/runtime/files.ts'
import type { Logger } from '../lib/runtime/log.ts'
import { defaultPaths } from '../lib/runtime/paths.ts'
import { version } from '../lib/runtime/version.ts'
import { createAnnouncer } from './announcer.ts'
import type { BlobCache } from './blob-cache.ts'
import { openBlobCache } from './blob-cache.ts'
import { createBlobFetcher } from './blob-fetcher.ts'
import type { AgentConfig } from './config.ts'
import { mirroredRegistries } from './config.ts'
import { startControlApi } from './control-api.ts'
import { openCredential } from './credential.ts'
import type { Engine, EngineConfig, Limits } from './engine/engine.ts'
import { createFollower } from './follower.ts'
import { openHostIdentity } from './host-identity.ts'
import { createAgentMetrics, startMetricsServer } from './metrics.ts'
import type { BlobReaders } from './mirror/blob-reader.ts'
import { createBlobReaders } from './mirror/blob-reader.ts'
import type { Catalogue } from './mirror/catalogue.ts'
import { createCatalogue } from './mirror/catalogue.ts'
import { startMirror } from './mirror/mirror.ts'
import { createPeerTokens } from './peer-admission.ts'
import { openPins } from './pins.ts'
import { createPrefixHasher } from './prefix-hasher.ts'
import { createReleaseFetcher } from './release-fetcher.ts'
import { createReleaseVerifier } from './release-verifier.ts'
import { openReleaseStore } from './releases.ts'
import { openRevokedTorrents } from './revoked-torrents.ts'

export interface AgentDeps {
  log: Logger
  /** Milliseconds since 1970; it may be set back. */
  now: () => number
  /** Milliseconds since some start; it never goes back. */
  monotonic: () => number
  random: () => number
  /** What RACKSWARM_BOOTSTRAP_TOKEN says. */
  bootstrapToken: string | undefined
}

export interface Agent extends AsyncDisposable {
  readonly addresses: {
    readonly host: string
    readonly peerPort: number
    readonly controlSocket: string
    readonly metricsUrl: string
    readonly dataDir: string
    /** Undefined where there is none. */
    readonly mirrorUrl: string | undefined
  }
  /** Puts the limits and the rules for signatures of other settings in force, at once and for what is under way too. @returns the settings that need a restart */
  reload(config: AgentConfig): string[]
}

/** What a reload puts in force. */
const live = ['log_level', 'limits.download', 'limits.upload', 'limits.from_distance', 'signatures']

/** First announces of what is held are spread over this long, and no longer than this for each blob. */
const seedSpreadMaxMs = 10_000
const seedSpreadEachMs = 20
/** A held blob is looked at this seldom, so that those of a large release together cost little. */
const lookEachMs = 250
/** What a report may hold. */
const reportedMax = 1000

/** Builds the agent. What it returns seeds what it has, follows, and listens; the server need not be there. */
export async function startAgent(config: AgentConfig, deps: AgentDeps): Promise<Agent> {
  const { log, now, monotonic, random } = deps
  checkPlaintext(config)
  checkEngine(config)
  await using started = new AsyncDisposableStack()
  const paths = defaultPaths('agent')
  const dataDir = config.data_dir ?? paths.data
  const host = config.host ?? defaultHost()
  const socketPath = config.control_socket ?? join(paths.runtime, 'agent.sock')
  await makeDirectory(dataDir, 0o755)

  const ca = config.ca === undefined ? undefined : await readCa(config.ca)
  const http = started.use(
    createHttpClient({
      baseUrl: config.server,
      ca,
      userAgent: `rackswarm-agent/${version}`,
      credential: () => credential.current?.credential,
    }),
  )
  const server = createServerClient(http)
  const registry = createRegistryClient(http)
  const connect = { timeout: 5000, ...(ca === undefined ? {} : { ca }) }
  // The tracker hands out the address that an announce comes from.
  const announceFrom = config.peer_addr === undefined ? {} : { localAddress: config.peer_addr }
  const dispatcher = new HttpAgent({ connections: 8, connect, ...announceFrom })
  started.defer(() => dispatcher.destroy())
  // Of its own: bodies that come slowly would hold all connections, and announces wait behind them.
  const webseedDispatcher = new HttpAgent({ connections: 8, connect })
  started.defer(() => webseedDispatcher.destroy())
  const credential = await openCredential(
    {
      file: join(dataDir, 'credential.json'),
      server: config.server,
      host,
      place: config.place,
      bootstrapToken: () => bootstrapToken(config, deps.bootstrapToken),
    },
    { server, now, random, log },
  )

  let reportedPlace: string | undefined
  const place = () => reportedPlace ?? credential.current?.place ?? config.place
  const pins = await openPins(join(dataDir, 'pins.json'))
  const follow = [...new Set(config.follow)]
  const isKept = (reference: string) => follow.includes(reference) || pins.has(reference)

  const cache: BlobCache = await openBlobCache(
    { directory: dataDir, quotaBytes: config.disk.quota, reserveBytes: config.disk.reserve },
    {
      now,
      log,
      keptFor: (digest) => {
        const holding = releases
          .list()
          .filter(({ reference, blobs }) => isKept(reference) && blobs.some((blob) => blob.digest === digest))
        if (holding.some((release) => releases.current(release.reference)?.digest === release.digest))
          return 'current'
        return holding.length > 0 ? 'previous' : undefined
      },
      onEvict: async (digest) => {
        await blobs.stopSeeding(digest)
        await releases.withdraw(digest)
      },
    },
  )
  const releases = await openReleaseStore(join(dataDir, 'releases'), cache)
  let mirror:
    { readonly url: string; readonly readers: BlobReaders; readonly catalogue: Catalogue } | undefined
  const metrics = createAgentMetrics(version, () => {
    const seeding = cache.list().map(({ digest }) => blobs.seedOf(digest))
    return {
      diskUsedBytes: cache.usedBytes,
      diskQuotaBytes: cache.quotaBytes,
      blobs: cache.list().length,
      seeding: seeding.filter((seed) => seed !== undefined).length,
      peers: seeding.reduce((total, seed) => total + (seed?.peers ?? 0), 0),
      mirrorReaders: mirror?.readers.waiting ?? 0,
      mirrorManifestBytes: mirror?.catalogue.manifestBytes ?? 0,
      releasesRefused: fetcher.refused().length,
    }
  })

  const identity =
    config.peer_tls === 'off' ? undefined : await openHostIdentity(join(dataDir, 'peer-identity.pem'), host)
  const hasher = started.use(createPrefixHasher())
  const revoked = await openRevokedTorrents(join(dataDir, 'revoked-torrents.json'), {
    server,
    changed: (infoHashes, someBack) => {
      void changeSwarms(infoHashes, someBack).catch((error: unknown) => {
        log.warn({ err: error }, 'revoked torrents: a swarm was not left or joined in order')
      })
    },
    log,
  })
  const changeSwarms = async (infoHashes: readonly InfoHash[], someBack: boolean) => {
    await Promise.all(infoHashes.map((infoHash) => blobs.leaveSwarm(infoHash)))
    if (someBack) for (const { digest } of cache.list()) await blobs.seed(digest, seedSpreadMaxMs)
  }
  const peerTokens = started.use(
    createPeerTokens(
      { server: config.server, ca, cacheFile: join(dataDir, 'server-keys.json') },
      { now, random, log, refused: metrics.peerRefused, isRevoked: (infoHash) => revoked.has(infoHash) },
    ),
  )
  const engine = started.use(
    await engines[config.engine](
      {
        port: config.peer_port,
        address: config.peer_addr,
        connectionsMax: config.limits.connections_max,
        // Read at each handshake: where the address table decides, the place is known only after the first report.
        identity: {
          host,
          get place() {
            return place()
          },
        },
        limits: limitsOf(config),
        peerTokens,
        admission: config.peers === 'approved' ? peerTokens : undefined,
        peerBanned: (peer, infoHash) => {
          metrics.peerBanned()
          log.warn({ peer, infoHash }, 'a peer sent wrong bytes: it is not talked to for ten minutes')
        },
        tls: identity && { ...identity, required: config.peer_tls === 'require' },
      },
      { monotonic, random, dispatcher: webseedDispatcher },
    ),
  )
  const announcer = started.use(
    createAnnouncer({
      peerId: engine.peerId,
      port: engine.port,
      dispatcher,
      now,
      monotonic,
      random,
      log,
      observe: metrics,
    }),
  )
  const blobs = started.use(
    createBlobFetcher({
      engine,
      announcer,
      cache,
      hasher,
      server,
      peerTokens,
      certificate: identity?.thumbprint,
      revoked,
      registry,
      fetchesMax: config.limits.fetches_max,
      stallMs: config.stall_timeout,
      place,
      now,
      monotonic,
      random,
      log,
      observe: metrics.fetching,
    }),
  )
  const verifier = createReleaseVerifier(config.signatures, { registry, log, observe: metrics })
  const fetcher = started.use(
    createReleaseFetcher({
      registry,
      verifier,
      blobs,
      cache,
      releases,
      keep: (reference) => (follow.includes(reference) ? config.disk.releases_kept : 1),
      monotonic,
      random,
      log,
    }),
  )

  const heldReferences = (): HeldReference[] =>
    [...new Set([...follow, ...fetcher.references()])].flatMap((reference) => fetcher.held(reference) ?? [])
  const describe = (): HostReport => {
    const at = place()
    return {
      agentVersion: version,
      ...(at === undefined ? {} : { place: at }),
      follow,
      held: heldReferences().slice(0, reportedMax),
      diskUsedBytes: cache.usedBytes,
      diskQuotaBytes: cache.quotaBytes,
    }
  }
  /** Followed releases all of whose files were there, and when that is looked at again. */
  const lookedAt = new Map<string, { readonly digest: Digest; readonly againMs: number }>()
  const follower = createFollower(
    { follow, jitterMs: config.follow_jitter },
    {
      server,
      credential,
      fetcher,
      isHeld: async (reference, digest) => {
        const current = releases.current(reference)
        if (current?.digest !== digest) return false
        // Looking at the files of 500 blobs for each report would be most of what an idle agent does.
        const looked = lookedAt.get(reference)
        if (looked?.digest === digest && monotonic() < looked.againMs) return true
        lookedAt.delete(reference)
        for (const blob of current.blobs) if (!(await cache.find(blob.digest, blob.sizeBytes))) return false
        lookedAt.set(reference, { digest, againMs: monotonic() + current.blobs.length * lookEachMs })
        return true
      },
      describe,
      replied: (reply) => {
        reportedPlace = reply.place
        announcer.noteEpoch(reply.epoch)
        revoked.heard(reply.revokedTorrents)
      },
      now,
      random,
      log,
      observe: metrics,
    },
  )
  const status = (): AgentStatus => {
    const known = new Map(heldReferences().map((held) => [held.reference, held]))
    for (const reference of follower.absent) {
      if (!known.has(reference)) known.set(reference, absentReference(reference))
    }
    const pinned = new Set(
      releases
        .list()
        .flatMap(({ reference, blobs: list }) =>
          pins.has(reference) ? list.map(({ digest }) => digest) : [],
        ),
    )
    const at = place()
    return {
      host,
      ...(at === undefined ? {} : { place: at }),
      version,
      server: config.server,
      ...(follower.lastReportAt === undefined
        ? {}
        : { lastReportAt: new Date(follower.lastReportAt).toISOString() }),
      ...(follower.lastReportError === undefined ? {} : { lastReportError: follower.lastReportError }),
      engine: engine.name,
      peerPort: engine.port,
      diskUsedBytes: cache.usedBytes,
      diskQuotaBytes: cache.quotaBytes,
      references: [...known.values()].map((held) => {
        const path = releases.current(held.reference)?.path
        return { ...held, followed: follow.includes(held.reference), ...(path === undefined ? {} : { path }) }
      }),
      blobs: [
        ...cache.list().map((blob) => ({ ...blob, state: 'verified' as const })),
        ...cache.listParts().map((blob) => ({ ...blob, state: 'partial' as const })),
      ].map(({ digest, sizeBytes, lastUsedAt, state }) => {
        const seed = state === 'verified' ? blobs.seedOf(digest) : undefined
        return {
          digest,
          ...(seed === undefined ? {} : { infohash: seed.infohash }),
          sizeBytes,
          state,
          seeding: seed !== undefined,
          peers: seed?.peers ?? 0,
          uploadedBytes: seed?.uploadedBytes ?? 0,
          lastUsedAt: new Date(lastUsedAt).toISOString(),
          pinned: pinned.has(digest),
        }
      }),
    }
  }

  const metricsServer = started.use(
    await startMetricsServer(metricsAddress(config.metrics_addr), {
      registry: metrics.registry,
      notReady: () =>
        credential.current ? undefined : `not enrolled: ${credential.reason ?? 'asking the server'}`,
    }),
  )
  started.use(
    await startControlApi(
      { path: socketPath, group: config.control_group },
      {
        status,
        transfers: () => blobs.transfers(),
        fetcher,
        ready: (signal) => credential.ready(signal),
        pins,
        log,
      },
    ),
  )

  if (config.mirror.enabled) {
    const readers = started.use(createBlobReaders({ cache, blobs }))
    const catalogue = createCatalogue({
      registry,
      cache,
      blobs,
      verify: config.mirror.signatures === 'require' ? verifier.verify : undefined,
      monotonic,
      log,
    })
    const listening = started.use(
      await startMirror(
        { addr: config.mirror.addr, registries: mirroredRegistries(config) },
        { catalogue, readers, log, observe: metrics.mirror },
      ),
    )
    mirror = { url: listening.url, readers, catalogue }
  }

  const spread = Math.min(seedSpreadMaxMs, cache.list().length * seedSpreadEachMs)
  for (const { digest } of cache.list()) await blobs.seed(digest, spread)
  const ending = new AbortController()
  const loops = Promise.all([credential.run(ending.signal), follower.run(ending.signal)])
  loops.catch((error: unknown) => {
    log.fatal({ err: error }, 'the agent cannot go on')
    process.exitCode = 1
    process.kill(process.pid, 'SIGTERM')
  })
  started.defer(async () => {
    ending.abort(new Error('the agent is ending'))
    await loops.catch(() => undefined)
  })
  const owned = started.move()
  return {
    addresses: {
      host,
      peerPort: engine.port,
      controlSocket: socketPath,
      metricsUrl: `http://${config.metrics_addr.replace(/:\d+$/, '')}:${metricsServer.port}`,
      dataDir,
      mirrorUrl: mirror?.url,
    },
    reload: (next) => {
      checkEngine(next)
      verifier.reload(next.signatures)
      mirror?.catalogue.forgetApprovals()
      fetcher.retryRefused()
      engine.setLimits(limitsOf(next))
      return restartNeeded(config, next, live)
    },
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

function limitsOf({ limits }: AgentConfig): Limits {
  return {
    downloadBytesPerSecond: limits.download,
    uploadBytesPerSecond: limits.upload,
    fromDistance: new Map(
      limits.from_distance.map(({ distance, download, upload }) => [
        distance,
        { downloadBytesPerSecond: download, uploadBytesPerSecond: upload },
      ]),
    ),
  }
}

/** Each is loaded only when selected. */
const engines: Record<
  AgentConfig['engine'],
  (
    config: EngineConfig,
    deps: { monotonic: () => number; random: () => number; dispatcher: HttpAgent },
  ) => Promise<Engine>
> = {
  webtorrent: async (config, deps) => {
    const { createWebtorrentEngine } = await import('./engine/webtorrent/webtorrent.ts')
    return createWebtorrentEngine(config, deps)
  },
  rackswarm: async (config, deps) => {
    const { createRackswarmEngine } = await import('./engine/rackswarm.ts')
    return createRackswarmEngine(config, deps)
  },
}

/** @throws ConfigError when credentials would travel in the clear and nobody said that this is meant */
function checkPlaintext(config: AgentConfig): void {
  const url = new URL(config.server)
  if (url.protocol !== 'http:' || config.insecure_plaintext) return
  const ip = parseIp(url.hostname.replace(/^\[|\]$/g, ''))
  if (url.hostname === 'localhost' || (ip && isLoopback(ip))) return
  throw new ConfigError([
    `server: ${config.server} is another machine, where plaintext shows every credential: use https:, or set insecure_plaintext: true`,
  ])
}

/** @throws ConfigError naming the settings that webtorrent knows nothing of */
function checkEngine({ engine, peer_addr, peer_tls, peers, limits }: AgentConfig): void {
  const faults: string[] = []
  if (engine !== 'rackswarm') {
    const own = {
      peer_addr: peer_addr !== undefined,
      peer_tls: peer_tls !== 'off',
      'limits.from_distance': limits.from_distance.length > 0,
    }
    for (const [setting, isSet] of Object.entries(own))
      if (isSet) faults.push(`${setting}: needs engine: rackswarm`)
  }
  if (peer_tls !== 'off' && peers !== 'approved')
    faults.push(
      `peer_tls: ${peer_tls} needs peers: approved, since a certificate counts by the token that names it`,
    )
  if (faults.length > 0) throw new ConfigError(faults)
}

async function readCa(file: string): Promise<string> {
  return readFile(file, 'utf8').catch((cause: unknown) => {
    throw new ConfigError([`ca: cannot read ${file}: ${(cause as Error).message}`], { cause })
  })
}

async function bootstrapToken(
  config: AgentConfig,
  fromEnvironment: string | undefined,
): Promise<string | undefined> {
  if (config.bootstrap_token_file === undefined) return fromEnvironment
  const text = await readFile(config.bootstrap_token_file, 'utf8')
  return text.trim()
}

/** The system's host name, where it is one that the server takes. */
function defaultHost(): string {
  const name = hostname()
  if (/^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/.test(name)) return name
  throw new ConfigError([
    `host: the host name of the system, ${JSON.stringify(name)}, cannot be used: set host`,
  ])
}

function metricsAddress(text: string): { host: string; port: number } {
  const at = text.lastIndexOf(':')
  return { host: text.slice(0, at).replace(/^\[|\]$/g, ''), port: Number(text.slice(at + 1)) }
}

/** A followed tag that the server does not have for this host. */
function absentReference(reference: string): HeldReference {
  const digest: Digest = parseDigest(`sha256:${'0'.repeat(64)}`)
  return {
    reference,
    digest,
    state: 'waiting',
    bytesDone: 0,
    bytesTotal: 0,
    bytes: { ownRack: 0, otherRacks: 0, webseed: 0 },
    tookMs: 0,
    reason: 'there is no such tag, or this host may not have it',
  }
}
