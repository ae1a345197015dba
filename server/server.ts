import { createHash, randomBytes } from 'node:crypto'
import { access, constants, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { FastifyRequest } from 'fastify'
import type { ServerInfo, TopologyExplanation } from '../lib/client/api.ts'
import { restartNeeded } from '../lib/runtime/changed-settings.ts'
import { ConfigError } from '../lib/runtime/config.ts'
import { makeDirectory } from '../lib/runtime/files.ts'
import type { Logger } from '../lib/runtime/log.ts'
import { defaultPaths } from '../lib/runtime/paths.ts'
import type { Daemon } from '../lib/runtime/program.ts'
import { version } from '../lib/runtime/version.ts'
import { formatIp } from '../lib/protocol/address.ts'
import { openTokenAuthority } from '../lib/token/token-authority.ts'
import type { KeySetSource } from '../lib/token/key-set.ts'
import { createTickets } from '../lib/token/ticket.ts'
import { monotonicMs } from '../lib/runtime/clock.ts'
import { createTurn, createTurns } from '../lib/runtime/turn.ts'
import { openCertificates, watchCertificates } from './certificates.ts'
import type { ServerConfig } from './config.ts'
import { explainAddresses } from './explain-topology.ts'
import type { ReadinessCheck } from './health.ts'
import { startHealthPort } from './health.ts'
import type { MainPort } from './http.ts'
import { startMainPort } from './http.ts'
import type { OpenedTopology } from './open-topology.ts'
import { openTopology, watchTopologyTable } from './open-topology.ts'
import { liveSettings } from './live-settings.ts'
import type { ServerMetrics } from './metrics.ts'
import { createServerMetrics } from './metrics.ts'
import { openIdTokenVerifier } from '../lib/token/id-token.ts'
import { createAccessControl, requireAdmin, requireCredential } from './registry/access-control.ts'
import type { Caller } from './registry/access.ts'
import { createAudit, registerAuditRoutes } from './registry/audit.ts'
import { openAuditLog } from './registry/audit-log.ts'
import { startDiskBlobStore } from './registry/disk-blob-store.ts'
import { registerEnrolmentRoutes } from './registry/enrolment.ts'
import {
  createFleet,
  createTagCache,
  deployedOn,
  followersOf,
  registerFleetRoutes,
} from './registry/fleet.ts'
import { startGarbageCollector } from './registry/garbage-collector.ts'
import { registerGcRoutes } from './registry/gc-routes.ts'
import { registerGrantRoutes } from './registry/grants.ts'
import { registerKeyRoutes } from './registry/keys.ts'
import { registerOciRoutes } from './registry/oci-routes.ts'
import { createPins } from './registry/pins.ts'
import { registerReleaseRoutes } from './registry/releases.ts'
import { loadRevocations } from './registry/revocations.ts'
import type { RevokedTorrents } from './registry/revoked-torrents.ts'
import { loadRevokedTorrents, registerRevokedTorrentRoutes } from './registry/revoked-torrents.ts'
import { ensureFirstTokens, registerTokenRoutes } from './registry/tokens.ts'
import { createTorrentReferrers } from './registry/torrent-referrers.ts'
import { registerTorrentRoutes, sendTorrent } from './registry/torrents.ts'
import { registerTokenExchange } from './registry/trust.ts'
import { startUpstreams } from './registry/upstream/start-upstreams.ts'
import { createWebseedPolicy } from './registry/webseed-policy.ts'
import { registerWebseedRoutes } from './registry/webseed.ts'
import { openSqliteStateStore } from './state/sqlite-state-store.ts'
import type { TrackerSecrets } from './tracker-settings.ts'
import { openTrackerSecrets, storageSettings, trackerSettings } from './tracker-settings.ts'
import { readCounters } from './tracker/counters.ts'
import type { OpenStore } from './tracker/create-store.ts'
import { registerTrackerRoutes } from './tracker/http-frontend.ts'
import { refuseRevokedTorrents } from './tracker/hooks/revoked-torrents.ts'
import type { TlsMaterial } from './tracker/http-tls.ts'
import type { TrackerService } from './tracker/tracker-service.ts'
import { startTrackerService } from './tracker/tracker-service.ts'
import type { GivenHooks } from './tracker/tracker-thread.ts'

export interface ServerDeps {
  readonly log: Logger
  /** Milliseconds since 1970. */
  readonly now: () => number
  /** 0 ≤ random() < 1. */
  readonly random: () => number
  /** Where relative paths of modules and of `topology.table` begin: where the configuration lies. Default: the working directory. */
  readonly directory?: string | undefined
  /** Between two looks at the files of the certificate. Default: 10 s. */
  readonly certificatePollMs?: number | undefined
  readonly embedded?: EmbeddedParts | undefined
}

/**
 * What a program brings that a tracker is part of. Such a tracker reads no environment, has no data directory unless it is configured,
 * and leaves the metrics of the process to the program.
 */
export interface EmbeddedParts {
  readonly hooks: GivenHooks
  /** Instead of the store of the configuration. */
  readonly openStore: OpenStore | undefined
}

export interface Server extends Daemon {
  readonly tracker: TrackerService | undefined
  /** What /metrics says. */
  metrics(): Promise<string>
  readonly addresses: {
    readonly publicUrl: string
    readonly http: { readonly host: string; readonly port: number }
    /** Where announces and scrapes alone are answered. */
    readonly tracker: readonly { readonly host: string; readonly port: number }[]
    readonly udp: readonly { readonly host: string; readonly port: number }[]
    readonly metricsUrl: string | undefined
  }
  /**
   * Puts another configuration in force without closing a socket or losing a swarm: hooks and their lists, topology, limits, routes,
   * certificates, keys. Rejects where it cannot be used; what was in force stays.
   *
   * @returns the settings that only count after a restart, and are others now
   */
  reload(config: ServerConfig): Promise<string[]>
}

/** Between two looks at the files of the certificate. */
const certificatePollMs = 10_000
/** After so many report intervals a restarted server knows what hosts hold. */
const reportsAwaited = 6

/**
 * Starts all that the roles ask for; what it returns is listening.
 *
 * @throws ConfigError, or Error naming the part that cannot start
 */
export async function startServer(config: ServerConfig, deps: ServerDeps): Promise<Server> {
  await using started = new AsyncDisposableStack()
  const { embedded } = deps
  const directory = config.data_dir ?? (embedded ? undefined : defaultPaths('server').data)
  if (directory !== undefined) await makeDirectory(directory, 0o700)
  const hasRegistry = config.roles.includes('registry')
  const fileDirectory = deps.directory ?? process.cwd()
  const topology = await openTopology(config, fileDirectory)
  const tls = await openCertificates(config.http)
  const main = hasRegistry
    ? started.use(
        await startMainPort(config.http, {
          tls: config.http.tls?.main_port === true ? tls : undefined,
          log: deps.log,
        }),
      )
    : undefined
  const publicUrl = config.public_url ?? main?.origin ?? originOf(config)
  const metrics = createServerMetrics({ ofProcess: embedded === undefined })
  const epoch = randomBytes(8).toString('hex')
  const checks: Record<string, ReadinessCheck> = {}
  const trust = {
    issuer: config.tokens.issuer ?? publicUrl,
    audience: config.tokens.audience ?? publicUrl,
    clockToleranceMs: config.tokens.clock_tolerance,
    now: deps.now,
  }
  const secrets = await openTrackerSecrets(config, directory, embedded ? {} : process.env)
  const common = { config, deps, started, publicUrl, metrics, epoch, trust, checks, tls, secrets, topology }

  // The registry has the keys, the tracker checks with them; the registry asks the tracker what its swarms hold.
  const swarms: { tracker: TrackerService | undefined } = { tracker: undefined }
  const registry =
    main && directory !== undefined ? await startRegistry({ ...common, directory, main, swarms }) : undefined
  const keySet = registry === undefined ? await keySetOf(config, directory) : undefined
  const settingsOf = (next: ServerConfig, opened: OpenedTopology, material: TlsMaterial | undefined) =>
    trackerSettings(next, {
      mainPort: main === undefined,
      topology: opened.config,
      trust: { ...trust, keySet },
      tls: material,
      secrets,
      epoch,
      modulesDirectory: fileDirectory,
    })
  if (config.roles.includes('tracker')) {
    const tracker = started.use(
      await startTrackerService(settingsOf(config, topology, tls), {
        ...deps,
        monotonic: monotonicMs,
        threads: config.workers,
        storage: embedded?.openStore
          ? { name: 'given', open: embedded.openStore }
          : storageSettings(config, directory),
        given: registry ? withRevoked(embedded?.hooks, registry.revokedTorrents) : embedded?.hooks,
        verifier: registry?.verifier,
      }),
    )
    swarms.tracker = tracker
    metrics.watchTracker(tracker)
    if (main)
      registerTrackerRoutes(main.app, {
        tracker: tracker.first.tracker,
        sourceOf: main.sourceOf,
        routes: { announce: config.http.announce_routes, scrape: config.http.scrape_routes },
      })
    const { keySet: keys } = tracker.first
    if (keys)
      checks['keys'] = () =>
        keys.keySetStatus().keys > 0 ? undefined : (keys.keySetStatus().lastError ?? 'no keys')
  }

  await main?.open()
  const stats = () => statsOf(common, swarms.tracker, registry)
  const health =
    config.metrics_addr === 'none'
      ? undefined
      : started.use(
          await startHealthPort({ address: config.metrics_addr, registry: metrics.registry, checks, stats }),
        )
  // First at the end: what is under way still needs the parts that were started after the port.
  if (main) started.use(main)
  const { addresses } = swarms.tracker?.first ?? {}
  // Reloads, new certificates and new tables, one after the other.
  const turn = createTurn()
  let inForce = { config, tls, topology }
  const setTls = (http: ServerConfig['http'], material: TlsMaterial | undefined) => {
    main?.reload(http, http.tls?.main_port === true ? material : undefined)
  }
  started.use(
    watchCertificates({
      pollMs: deps.certificatePollMs ?? certificatePollMs,
      look: async () => ({ inForce: inForce.tls, found: await openCertificates(inForce.config.http) }),
      use: (found) =>
        turn(async () => {
          await swarms.tracker?.setTls(found)
          setTls(inForce.config.http, found)
          inForce = { ...inForce, tls: found }
        }),
      log: deps.log,
    }),
  )
  started.use(
    watchTopologyTable({
      inForce: () => inForce.topology,
      reopen: () =>
        turn(async () => {
          const opened = await openTopology(inForce.config, fileDirectory)
          await swarms.tracker?.setTopology(opened.config)
          registry?.replaceTopology(opened)
          inForce = { ...inForce, topology: opened }
        }),
      log: deps.log,
    }),
  )
  const owned = started.move()
  return {
    addresses: {
      publicUrl,
      http: main?.address ?? addresses?.http[0] ?? config.http.addr,
      tracker: addresses?.http ?? [],
      udp: addresses?.udp ?? [],
      metricsUrl: health?.origin,
    },
    tracker: swarms.tracker,
    metrics: () => metrics.registry.metrics(),
    reload: (next) =>
      turn(async () => {
        const opened = await openTopology(next, fileDirectory)
        const material = await openCertificates(next.http)
        await using prepared = await swarms.tracker?.prepare(settingsOf(next, opened, material))
        setTls(next.http, material)
        await prepared?.commit()
        registry?.replaceTopology(opened)
        inForce = { config: next, tls: material, topology: opened }
        return restartNeeded(config, next, liveSettings(config))
      }),
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

interface Common {
  readonly config: ServerConfig
  readonly deps: ServerDeps
  readonly started: AsyncDisposableStack
  readonly publicUrl: string
  readonly metrics: ServerMetrics
  readonly epoch: string
  readonly trust: { issuer: string; audience: string; clockToleranceMs: number; now: () => number }
  readonly checks: Record<string, ReadinessCheck>
  readonly secrets: TrackerSecrets
  readonly topology: OpenedTopology
}

/** What the address of a tracker alone says; with port 0, which it is not bound to yet, only for tests and trials. */
function originOf({ http }: ServerConfig): string {
  const { host, port } = http.addr
  return `${http.tls?.main_port === true ? 'https' : 'http'}://${host.includes(':') ? `[${host}]` : host}:${port}`
}

async function keySetOf(
  { tokens, tracker }: ServerConfig,
  directory: string | undefined,
): Promise<KeySetSource | undefined> {
  if (tracker.approval === 'none') return undefined
  if (tokens.keys_file !== undefined) return { file: tokens.keys_file }
  if (tokens.keys_url === undefined) return undefined
  return {
    url: tokens.keys_url,
    refreshIntervalMs: tokens.keys_refresh,
    cacheFile: directory && join(directory, 'keys-cache.json'),
    ca: tokens.keys_ca === undefined ? undefined : await readAuthority(tokens.keys_ca),
  }
}

function withRevoked(given: GivenHooks | undefined, revoked: RevokedTorrents): GivenHooks {
  return {
    prehooks: [refuseRevokedTorrents((infoHash) => revoked.has(infoHash)), ...(given?.prehooks ?? [])],
    posthooks: given?.posthooks ?? [],
  }
}

async function readAuthority(file: string, setting = 'tokens.keys_ca'): Promise<string> {
  return readFile(file, 'utf8').catch((cause: unknown) => {
    throw new ConfigError([`${setting}: cannot read ${file}: ${(cause as Error).message}`], { cause })
  })
}

/** Where the keys of each issuer of `registry.trust` are. */
async function issuersOf(
  { registry, tokens }: ServerConfig,
  directory: string,
): Promise<ReadonlyMap<string, KeySetSource>> {
  const issuers = new Map<string, KeySetSource>()
  for (const [i, { issuer, jwks_url, jwks_file, ca }] of registry.trust.entries()) {
    if (issuers.has(issuer)) continue
    const name = createHash('sha256').update(issuer).digest('hex').slice(0, 16)
    const fetched = {
      url: jwks_url ?? `${issuer.replace(/\/$/, '')}/.well-known/openid-configuration`,
      issuer: jwks_url === undefined ? issuer : undefined,
      refreshIntervalMs: tokens.keys_refresh,
      cacheFile: join(directory, `issuer-keys-${name}.json`),
      ca: ca === undefined ? undefined : await readAuthority(ca, `registry.trust.${i}.ca`),
    }
    issuers.set(issuer, jwks_file === undefined ? fetched : { file: jwks_file })
  }
  return issuers
}

/** What /stats.json shows. */
function statsOf(
  { config, epoch }: Common,
  tracker: TrackerService | undefined,
  registry: { hostsPresent(): number } | undefined,
) {
  const counters = tracker && readCounters(tracker.counters)
  return {
    version,
    epoch,
    roles: config.roles,
    ...tracker?.store.totals(),
    ...(tracker && counters
      ? {
          requests: counters.durations
            .map(({ labels, buckets }) => ({
              ...labels,
              count: buckets.reduce((sum, count) => sum + count, 0),
            }))
            .filter(({ count }) => count > 0),
          refused: Object.fromEntries([...counters.refusals].filter(([, count]) => count > 0)),
          tokensRefused: Object.fromEntries([...counters.tokenFaults].filter(([, count]) => count > 0)),
          udp: {
            connects: counters.connects,
            dropped: Object.fromEntries([...counters.drops].filter(([, count]) => count > 0)),
          },
          keys: tracker.first.keySet?.keySetStatus(),
          snapshotAgeSeconds: tracker.snapshots?.ageSeconds(),
        }
      : {}),
    hosts: registry?.hostsPresent(),
  }
}

async function startRegistry(
  common: Common & {
    directory: string
    main: MainPort
    swarms: { tracker: TrackerService | undefined }
  },
) {
  const {
    config,
    deps,
    started,
    main,
    publicUrl,
    metrics,
    epoch,
    trust,
    directory,
    checks,
    swarms,
    secrets,
  } = common
  const { app, sourceOf } = main
  const { now, log } = deps
  let { topology } = common
  const state = started.use(await openSqliteStateStore({ file: join(directory, 'state.sqlite') }))
  const revocations = started.use(
    await loadRevocations({ state, clockToleranceMs: trust.clockToleranceMs, now, log }),
  )
  const revokedTorrents = started.use(await loadRevokedTorrents({ state, epoch, now, log }))
  const auditLog = started.use(
    await openAuditLog({
      directory,
      fileMaxBytes: config.registry.audit.file_max,
      filesMax: config.registry.audit.files_max,
      now,
      log,
    }),
  )
  const authority = started.use(
    await openTokenAuthority({
      ...trust,
      keysDirectory: join(directory, 'keys'),
      algorithm: config.tokens.algorithm,
      tickets: createTickets(secrets.ticketSecret),
      acceptChihaya: config.tokens.compat === 'chihaya',
      isRevoked: (id) => revocations.isRevoked(id),
      isTorrentRevoked: (infoHash) => revokedTorrents.has(infoHash),
      leadMs: config.tokens.key_lead,
      rotationMs: config.tokens.key_rotation,
      log,
      aroundChange: ({ kind, kid }, work) =>
        auditLog.around(
          { who: { kind: 'server', name: 'key rotation' }, action: `key.${kind}`, target: kid },
          work,
        ),
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
  await ensureFirstTokens({
    directory,
    minter,
    state,
    places: config.enrolment.first_token_places,
    auditLog,
    now,
    log,
  })

  const controlled = createAccessControl({
    verifier,
    anonymousPull: config.registry.anonymous_pull,
    publicUrl,
  })
  const fleet = createFleet({ hostsMax: config.enrolment.hosts_max, now })
  const tags = createTagCache({ store, now })
  metrics.watchFleet(fleet)
  metrics.watchRegistry({ blobs: store, authority, auditLog })
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
    revokedTorrents,
    publicUrl,
    torrentTtlMs: config.tokens.torrent_ttl,
    agentTtlMs: config.tokens.agent_ttl,
    cidrOf: hostCidrOf,
    now,
  }
  const audit = createAudit(auditLog, sourceOf)
  const inTurn = createTurns()
  const onTag = (repository: string, tag: string) => {
    tags.moved(repository, tag)
  }
  const upstreams = started.use(
    await startUpstreams(config.registry, {
      store,
      state,
      inTurn,
      onTag,
      now,
      random: deps.random,
      log,
      observer: metrics.upstreams,
    }),
  )
  const { pullThrough } = upstreams
  await upstreams.registerRoutes(app, {
    access: controlled,
    membersOf: (repository, digest) => followersOf(repository, digest, { fleet, tags }),
  })
  const parties = { access: controlled, minter, audit, revokedTorrents }
  const shared = { ...parties, store, pullThrough, publicUrl, sourceOf, now, log }
  registerOciRoutes(app, {
    ...shared,
    manifestMaxBytes: config.registry.manifest_max,
    inTurn,
    onTag,
    torrents: createTorrentReferrers({ store, state, publicUrl }),
    torrentReply: (request, reply, blob) => sendTorrent(request, reply, blob, torrents),
  })
  registerTorrentRoutes(app, { ...torrents, access: controlled, log })
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
  const trusted = config.registry.trust.map(({ audience = publicUrl, ttl, ...entry }) => ({
    ...entry,
    audience,
    ttlMs: ttl,
  }))
  const idTokens = started.use(
    await openIdTokenVerifier({
      ...trust,
      issuers: await issuersOf(config, directory),
      random: deps.random,
      log,
    }),
  )
  registerTokenExchange(app, { ...shared, trust: trusted, idTokens })
  registerKeyRoutes(app, { ...shared, keys: authority.keys })
  registerRevokedTorrentRoutes(app, shared)
  registerAuditRoutes(app, { ...shared, auditLog })
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
    placeOf: (place, source) => place ?? topology.topology.nameOfAddress(source),
  })
  const { webseed } = config.registry
  registerGrantRoutes(app, {
    ...shared,
    webseed: createWebseedPolicy({ leaseMs: webseed.lease, hostsMax: webseed.replies_max, now }),
    agentTtlMs: config.tokens.agent_ttl,
    peerTtlMs: config.tokens.peer_ttl,
    cidrOf,
    swarmCounts: (infoHash) =>
      swarms.tracker?.store.scrape(infoHash) ?? { complete: 0, incomplete: 0, downloaded: 0 },
  })
  registerWebseedRoutes(app, {
    ...shared,
    verifier,
    repliesMax: webseed.replies_max,
    bytesPerSecond: webseed.rate,
    observer: metrics.webseed,
  })
  const pins = createPins({ state, store, inTurn, now })
  const { gc, retention } = config.registry
  // Every host that is out there has reported by then.
  const heardAtMs = now() + config.enrolment.report_interval * reportsAwaited
  const collector = started.use(
    await startGarbageCollector({
      ...shared,
      auditLog,
      state,
      inTurn,
      onTag,
      pins,
      deployed: (sinceMs) => deployedOn(fleet.heardSince(sinceMs)),
      readyInMs: async () =>
        now() >= heardAtMs || (await state.list('hosts/', { limit: 1 })).length === 0 ? 0 : heardAtMs - now(),
      retention: retention.map((rule) => ({
        repositories: rule.repositories,
        tags: rule.tags,
        keepLast: rule.keep_last,
        keepNewerThanMs: rule.keep_newer_than,
        keepDeployed: rule.keep_deployed,
      })),
      graceMs: gc.grace,
      intervalMs: gc.enabled ? gc.interval : undefined,
    }),
  )
  metrics.watchCollector(collector)
  registerGcRoutes(app, { ...shared, collector, pins })
  app.get<{ Querystring: { address?: string | string[] } }>(
    '/api/v1/topology',
    async (request): Promise<TopologyExplanation> => {
      await requireAdmin(controlled, request)
      return explainAddresses(topology, [request.query.address ?? []].flat())
    },
  )
  app.get('/api/v1/server', async (request): Promise<ServerInfo> => serverInfo(request, common, controlled))
  checks['state'] = async () => describeFailure(state.get('hosts/'))
  checks['blobs'] = async () => describeFailure(access(directory, constants.W_OK))
  return {
    verifier,
    revokedTorrents,
    hostsPresent: () => fleet.present().length,
    replaceTopology: (next: OpenedTopology) => {
      topology = next
    },
  }
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

async function describeFailure(work: Promise<unknown>): Promise<string | undefined> {
  return work.then(
    () => undefined,
    (error: unknown) => (error instanceof Error ? error.message : String(error)),
  )
}
