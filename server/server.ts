import { randomBytes } from 'node:crypto'
import { access, constants } from 'node:fs/promises'
import { join } from 'node:path'
import type { FastifyRequest } from 'fastify'
import type { ServerInfo } from '../lib/client/api.ts'
import { ConfigError } from '../lib/runtime/config.ts'
import { makeDirectory } from '../lib/runtime/files.ts'
import type { Logger } from '../lib/runtime/log.ts'
import { defaultPaths } from '../lib/runtime/paths.ts'
import type { Daemon } from '../lib/runtime/program.ts'
import { version } from '../lib/runtime/version.ts'
import { formatIp } from '../lib/protocol/address.ts'
import type { TokenVerifier } from '../lib/token/claims.ts'
import { openKeySetVerifier, openTokenAuthority } from '../lib/token/token-authority.ts'
import type { ServerConfig } from './config.ts'
import type { ReadinessCheck } from './health.ts'
import { startHealthPort } from './health.ts'
import type { MainPort } from './http.ts'
import { startMainPort } from './http.ts'
import type { ServerMetrics } from './metrics.ts'
import { createServerMetrics } from './metrics.ts'
import { createAccessControl, requireCredential } from './registry/access-control.ts'
import type { Caller } from './registry/access.ts'
import { startDiskBlobStore } from './registry/disk-blob-store.ts'
import { registerEnrolmentRoutes } from './registry/enrolment.ts'
import { createFleet, createTagCache, registerFleetRoutes } from './registry/fleet.ts'
import { registerGrantRoutes } from './registry/grants.ts'
import { registerOciRoutes } from './registry/oci-routes.ts'
import { registerReleaseRoutes } from './registry/releases.ts'
import { loadRevocations } from './registry/revocations.ts'
import { ensureFirstTokens, registerTokenRoutes } from './registry/tokens.ts'
import { registerTorrentRoutes, sendTorrent } from './registry/torrents.ts'
import { createWebseedPolicy } from './registry/webseed-policy.ts'
import { registerWebseedRoutes } from './registry/webseed.ts'
import { openSqliteStateStore } from './state/sqlite-state-store.ts'
import { tokenApproval } from './tracker/hooks/token.ts'
import { registerTrackerRoutes } from './tracker/http-frontend.ts'
import { createMemoryPeerStore } from './tracker/memory-peer-store.ts'
import type { Topology } from './tracker/topology.ts'
import { createTopology } from './tracker/topology.ts'
import type { Tracker } from './tracker/tracker.ts'
import { createTracker } from './tracker/tracker.ts'

export interface ServerDeps {
  readonly log: Logger
  /** Milliseconds since 1970. */
  readonly now: () => number
  /** 0 ≤ random() < 1. */
  readonly random: () => number
}

export interface Server extends Daemon {
  readonly addresses: {
    readonly publicUrl: string
    readonly http: { readonly host: string; readonly port: number }
    readonly metricsUrl: string
  }
  /** Reads again what may change without a restart: the key set of a tracker without a registry. */
  reload(): Promise<void>
}

/**
 * Starts all that the roles ask for; what it returns is listening.
 *
 * @throws ConfigError, or Error naming the part that cannot start
 */
export async function startServer(config: ServerConfig, deps: ServerDeps): Promise<Server> {
  await using started = new AsyncDisposableStack()
  const directory = config.data_dir ?? defaultPaths('server').data
  await makeDirectory(directory, 0o700)
  const main = started.use(await startMainPort(config.http, deps))
  const publicUrl = config.public_url ?? main.origin
  const metrics = createServerMetrics()
  const epoch = randomBytes(8).toString('hex')
  const topology = openTopology(config)
  const checks: Record<string, ReadinessCheck> = {}
  const trust = {
    issuer: config.tokens.issuer ?? publicUrl,
    audience: config.tokens.audience ?? publicUrl,
    clockToleranceMs: config.tokens.clock_tolerance,
    now: deps.now,
  }
  const common = {
    config,
    deps,
    started,
    main,
    publicUrl,
    metrics,
    epoch,
    topology,
    trust,
    directory,
    checks,
  }

  // The registry has the keys, the tracker checks with them; the registry asks the tracker what its swarms hold.
  const swarms: { tracker: Tracker | undefined } = { tracker: undefined }
  const registry = config.roles.includes('registry') ? await startRegistry({ ...common, swarms }) : undefined
  const keySet =
    registry === undefined && config.tracker.approval === 'token'
      ? started.use(await openKeySet(common))
      : undefined
  if (config.roles.includes('tracker'))
    swarms.tracker = startTracker({ ...common, verifier: registry?.verifier ?? keySet })

  await main.open()
  const health = started.use(
    await startHealthPort({
      address: config.metrics_addr,
      registry: metrics.registry,
      checks,
      stats: () => ({
        version,
        epoch,
        roles: config.roles,
        ...swarms.tracker?.totals(),
        hosts: registry?.hostsPresent(),
      }),
    }),
  )
  // First at the end: what is under way still needs the parts that were started after the port.
  started.use(main)
  const owned = started.move()
  return {
    addresses: { publicUrl, http: main.address, metricsUrl: health.origin },
    reload: async () => keySet?.reload(),
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

interface Common {
  readonly config: ServerConfig
  readonly deps: ServerDeps
  readonly started: AsyncDisposableStack
  readonly main: MainPort
  readonly publicUrl: string
  readonly metrics: ServerMetrics
  readonly epoch: string
  readonly topology: Topology
  readonly trust: { issuer: string; audience: string; clockToleranceMs: number; now: () => number }
  readonly directory: string
  readonly checks: Record<string, ReadinessCheck>
}

function startTracker({
  config,
  deps,
  started,
  main,
  metrics,
  epoch,
  topology,
  verifier,
}: Common & { verifier: TokenVerifier | undefined }): Tracker {
  const { peers_max: peersMax, swarms_max: swarmsMax } = config.storage.config
  const store = started.use(createMemoryPeerStore({ peersMax, swarmsMax, ...deps }))
  metrics.watchStore(store)
  const hooks =
    config.tracker.approval === 'token' && verifier
      ? [tokenApproval({ verifier, refused: metrics.tokenRefused, log: deps.log })]
      : []
  const tracker = createTracker({
    store,
    topology,
    hooks,
    config: {
      announceIntervalMs: config.announce_interval,
      minAnnounceIntervalMs: config.min_announce_interval,
      numwantDefault: config.tracker.numwant_default,
      numwantMax: config.tracker.numwant_max,
      scrapeMax: config.tracker.scrape_max,
      gatewaysPerRack: config.tracker.gateways_per_rack,
      reservePeers: config.tracker.reserve_peers,
      trustedAnnouncers: [],
    },
    epoch,
    observer: metrics.tracker,
    ...deps,
  })
  registerTrackerRoutes(main.app, { tracker, sourceOf: main.sourceOf })
  return tracker
}

async function startRegistry(common: Common & { swarms: { tracker: Tracker | undefined } }) {
  const {
    config,
    deps,
    started,
    main,
    publicUrl,
    metrics,
    epoch,
    topology,
    trust,
    directory,
    checks,
    swarms,
  } = common
  const { app, sourceOf } = main
  const { now, log } = deps
  const state = started.use(await openSqliteStateStore({ file: join(directory, 'state.sqlite') }))
  const revocations = started.use(
    await loadRevocations({ state, clockToleranceMs: trust.clockToleranceMs, now, log }),
  )
  const authority = started.use(
    await openTokenAuthority({
      ...trust,
      keysDirectory: join(directory, 'keys'),
      algorithm: config.tokens.algorithm,
      isRevoked: (id) => revocations.isRevoked(id),
    }),
  )
  const { minter, verifier } = authority
  const store = started.use(
    await startDiskBlobStore({
      directory,
      blobMaxBytes: config.registry.blob_max,
      uploadsMax: config.registry.uploads_max,
      uploadTtlMs: config.registry.upload_ttl,
      diskReserveBytes: config.registry.disk_reserve,
      now,
      log,
    }),
  )
  await ensureFirstTokens({ directory, minter, state, places: config.enrolment.first_token_places, now, log })

  const controlled = createAccessControl({
    verifier,
    anonymousPull: config.registry.anonymous_pull,
    publicUrl,
  })
  const fleet = createFleet({ hostsMax: config.enrolment.hosts_max, now })
  const tags = createTagCache({ store, now })
  metrics.watchFleet(fleet)
  metrics.watchRegistry({ blobs: store, authority })
  /** Agents announce from where they ask; a .torrent is made to be used elsewhere. */
  const cidrOf = (request: FastifyRequest) => {
    if (!config.tokens.bind_address) return undefined
    const source = sourceOf(request)
    return `${formatIp(source)}/${source.family === 4 ? 32 : 128}`
  }
  const hostCidrOf = (caller: Caller, request: FastifyRequest) =>
    caller.kind === 'host' ? cidrOf(request) : undefined
  const torrents = {
    store,
    minter,
    publicUrl,
    torrentTtlMs: config.tokens.torrent_ttl,
    agentTtlMs: config.tokens.agent_ttl,
    cidrOf: hostCidrOf,
    now,
  }
  const shared = { store, access: controlled, minter, publicUrl, sourceOf, now, log }
  registerOciRoutes(app, {
    ...shared,
    manifestMaxBytes: config.registry.manifest_max,
    onTag: (repository, tag) => {
      tags.moved(repository, tag)
    },
    torrentReply: (request, reply, blob) => sendTorrent(request, reply, blob, torrents),
  })
  registerTorrentRoutes(app, { ...torrents, access: controlled })
  registerReleaseRoutes(app, shared)
  registerTokenRoutes(app, {
    ...shared,
    authority,
    state,
    revocations,
    apiTtlMs: config.tokens.api_ttl,
    torrentTtlMs: config.tokens.torrent_ttl,
    agentTtlMs: config.tokens.agent_ttl,
    cidrOf: hostCidrOf,
  })
  registerEnrolmentRoutes(app, {
    ...shared,
    state,
    revocations,
    fleet,
    hostTtlMs: config.tokens.host_ttl,
    hostsMax: config.enrolment.hosts_max,
  })
  registerFleetRoutes(app, {
    ...shared,
    fleet,
    tags,
    epoch,
    reportIntervalMs: config.enrolment.report_interval,
    placeOf: (place, source) =>
      topology.nameOf(place === undefined ? topology.placeOfAddress(source) : topology.idOf(place)),
  })
  const { webseed } = config.registry
  registerGrantRoutes(app, {
    ...shared,
    webseed: createWebseedPolicy({ leaseMs: webseed.lease, leasesMax: webseed.replies_max, now }),
    agentTtlMs: config.tokens.agent_ttl,
    cidrOf,
    swarmCounts: (infoHash) =>
      swarms.tracker?.counts(infoHash) ?? { complete: 0, incomplete: 0, downloaded: 0 },
  })
  registerWebseedRoutes(app, {
    ...shared,
    verifier,
    repliesMax: webseed.replies_max,
    bytesPerSecond: webseed.rate,
    observer: metrics.webseed,
  })
  app.get('/api/v1/server', async (request): Promise<ServerInfo> => serverInfo(request, common, controlled))
  checks['state'] = async () => describeFailure(state.get('hosts/'))
  checks['blobs'] = async () => describeFailure(access(directory, constants.W_OK))
  return { verifier, hostsPresent: () => fleet.present().length }
}

async function serverInfo(
  request: FastifyRequest,
  { config, publicUrl, epoch, deps }: Common,
  controlled: ReturnType<typeof createAccessControl>,
): Promise<ServerInfo> {
  const { kind, name, scopes, credential } = await requireCredential(controlled, request)
  return {
    version,
    roles: config.roles,
    publicUrl,
    epoch,
    serverTime: new Date(deps.now()).toISOString(),
    caller: {
      kind,
      name,
      scopes: [...scopes],
      ...(credential ? { expiresAt: credential.expiresAt.toISOString() } : {}),
    },
  }
}

async function openKeySet({ config, trust }: Common) {
  const jwksFile = config.tokens.keys_file
  if (jwksFile === undefined) {
    throw new ConfigError([
      'tokens.keys_file: a tracker without a registry needs the public keys of one, or tracker.approval: none',
    ])
  }
  return openKeySetVerifier({ ...trust, jwksFile })
}

function openTopology({ topology }: ServerConfig): Topology {
  try {
    return createTopology({
      levels: topology.levels,
      places: topology.places,
      prefixes: topology.prefixes,
      ipv4PrefixLength: topology.ipv4_prefix_length,
      ipv6PrefixLength: topology.ipv6_prefix_length,
    })
  } catch (cause) {
    throw new ConfigError((cause as Error).message.split('\n'), { cause })
  }
}

async function describeFailure(work: Promise<unknown>): Promise<string | undefined> {
  return work.then(
    () => undefined,
    (error: unknown) => (error instanceof Error ? error.message : String(error)),
  )
}
