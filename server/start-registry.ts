import type { FastifyRequest } from 'fastify'
import type { ServerInfo, TopologyExplanation } from '../lib/client/api.ts'
import { formatIp } from '../lib/protocol/address.ts'
import type { InfoHash } from '../lib/protocol/infohash.ts'
import type { SwarmCounts } from '../lib/protocol/scrape.ts'
import { monotonicMs } from '../lib/runtime/clock.ts'
import { createTurns } from '../lib/runtime/turn.ts'
import { version } from '../lib/runtime/version.ts'
import type { TokenVerifier } from '../lib/token/claims.ts'
import { openIdTokenVerifier } from '../lib/token/id-token.ts'
import type { ServerConfig } from './config.ts'
import { explainAddresses } from './explain-topology.ts'
import { readChecks } from './health.ts'
import type { MainPort } from './http.ts'
import { issuerKeySets } from './key-set-sources.ts'
import type { OpenRegistryDeps, OpenedRegistry } from './open-registry.ts'
import { openRegistry } from './open-registry.ts'
import type { OpenedTopology } from './open-topology.ts'
import { createAccessControl, requireAdmin, requireCredential } from './registry/access-control.ts'
import type { AccessControl, Caller } from './registry/access.ts'
import { createAudit, registerAuditRoutes } from './registry/audit.ts'
import { followEnrolledHosts } from './registry/enrolled-hosts.ts'
import { registerEnrolmentRoutes, sweepBootstrapTokens } from './registry/enrolment.ts'
import { createFleet, createTagCache, registerFleetRoutes } from './registry/fleet.ts'
import type { GarbageCollectorOptions } from './registry/garbage-collector.ts'
import { startGarbageCollector } from './registry/garbage-collector.ts'
import { registerGcRoutes } from './registry/gc-routes.ts'
import { registerGrantRoutes } from './registry/grants.ts'
import { createHostRecall } from './registry/host-recall.ts'
import { registerKeyRoutes } from './registry/keys.ts'
import { registerOciRoutes } from './registry/oci-routes.ts'
import { createPins } from './registry/pins.ts'
import { registerReleaseRoutes } from './registry/releases.ts'
import type { RevokedTorrents } from './registry/revoked-torrents.ts'
import { registerRevokedTorrentRoutes } from './registry/revoked-torrents.ts'
import { startFleetView } from './registry/shared/fleet-view.ts'
import { createLonelyGathering, startGathering } from './registry/shared/gathering.ts'
import { createSharedWebseedPolicy } from './registry/shared/webseed-leases.ts'
import { createSignatureSearch } from './registry/signature-search.ts'
import { registerTokenRoutes, sweepTokens } from './registry/tokens.ts'
import { createTorrentReferrers } from './registry/torrent-referrers.ts'
import { registerTorrentRoutes, sendTorrent } from './registry/torrents.ts'
import { registerTokenExchange } from './registry/trust.ts'
import { startUpstreams } from './registry/upstream/start-upstreams.ts'
import { createWebseedPolicy } from './registry/webseed-policy.ts'
import { registerWebseedRoutes } from './registry/webseed.ts'
import { withLease } from './state/lease.ts'
import { onOneServerOf, onThisServer } from './state/on-one-server.ts'
import type { StateStore } from './state/state-store.ts'

export interface RegistryDeps extends OpenRegistryDeps {
  readonly random: () => number
  /** Its routes are registered there. */
  readonly main: Pick<MainPort, 'app' | 'sourceOf'>
  readonly publicUrl: string
  /** Of the swarms: another once they were lost. */
  readonly epoch: () => string
  readonly swarmCounts: (infoHash: InfoHash) => SwarmCounts | Promise<SwarmCounts>
  readonly topology: OpenedTopology
}

/** The registry of a server. */
export interface RegistryService extends AsyncDisposable {
  readonly verifier: TokenVerifier
  readonly revokedTorrents: RevokedTorrents
  hostsPresent(): number
  replaceTopology(next: OpenedTopology): void
}

/** After so many report intervals a restarted server knows what hosts hold. */
const reportsAwaited = 6
/** While a collection is under way; another server that wants to collect waits for as long, in case its holder is gone. */
const gcLeaseMs = 15_000

/** Starts what the role `registry` asks for, with its routes on the main port. */
export async function startRegistry(config: ServerConfig, deps: RegistryDeps): Promise<RegistryService> {
  await using started = new AsyncDisposableStack()
  const { main, publicUrl, metrics, epoch, redis, log, now, random } = deps
  const { app, sourceOf } = main
  const { tokens, enrolment, registry } = config
  let { topology } = deps
  const opened = started.use(await openRegistry(config, deps))
  const { state, store, storeNow, auditLog, authority, revocations, revokedTorrents } = opened
  const { serverName, isShared } = opened
  const { minter, verifier } = authority
  metrics.watchRegistry({ blobs: store, authority, auditLog })

  // Who is there, and what they hold.
  const fleet = createFleet({ hostsMax: enrolment.hosts_max, now })
  const tags = createTagCache({ store, now })
  const gathering = started.use(
    isShared && redis ? startGathering({ redis, name: serverName, log }) : createLonelyGathering(),
  )
  // Every host that is out there has reported by then.
  const heardAtMs = monotonicMs() + enrolment.report_interval * reportsAwaited
  const hostsReadyInMs = () => Math.max(0, heardAtMs - monotonicMs())
  const view = started.use(startFleetView({ fleet, tags, gathering, readyInMs: hostsReadyInMs, now }))
  metrics.watchFleet(fleet)

  // Who may ask, and from where.
  const access = createAccessControl({ verifier, anonymousPull: registry.anonymous_pull, publicUrl })
  /** Agents announce from where they ask; a .torrent is made to be used elsewhere. */
  const cidrOf = (request: FastifyRequest) => {
    if (!tokens.bind_address) return undefined
    const source = sourceOf(request)
    return `${formatIp(source)}/${source.family === 4 ? 32 : 128}`
  }
  const hostCidrOf = (caller: Caller, request: FastifyRequest) =>
    caller.kind === 'host' ? cidrOf(request) : undefined
  const idTokens = started.use(
    await openIdTokenVerifier({
      ...deps.trust,
      issuers: await issuerKeySets(config, deps.directory),
      now,
      random,
      log,
    }),
  )

  // What comes from other registries.
  const inTurn = createTurns()
  const onTag = (repository: string, tag: string) => {
    tags.moved(repository, tag)
  }
  const upstreams = started.use(
    await startUpstreams(registry, {
      store,
      state,
      inTurn,
      onTag,
      now,
      random,
      serverName,
      onOneServer: isShared ? onOneServerOf(state, { holder: serverName, random }) : onThisServer,
      log,
      auditLog,
      observer: metrics.upstreams,
    }),
  )
  await upstreams.registerRoutes(app, {
    access,
    membersOf: async (repository, digest) => (await view.members(repository, digest)).members,
  })

  const shared = {
    access,
    minter,
    audit: createAudit(auditLog, sourceOf),
    revokedTorrents,
    store,
    pullThrough: upstreams.pullThrough,
    publicUrl,
    sourceOf,
    now,
    log,
  }
  const torrents = {
    ...shared,
    torrentTtlMs: tokens.torrent_ttl,
    agentTtlMs: tokens.agent_ttl,
    cidrOf: hostCidrOf,
  }
  const torrentReferrers = createTorrentReferrers({ store, state, publicUrl })
  registerOciRoutes(app, {
    ...shared,
    manifestMaxBytes: registry.manifest_max,
    inTurn,
    onTag,
    signatures: createSignatureSearch({ store, monotonicMs }),
    torrents: torrentReferrers,
    torrentReply: (request, reply, blob) => sendTorrent(request, reply, blob, torrents),
  })
  registerTorrentRoutes(app, torrents)
  registerReleaseRoutes(app, shared)
  registerTokenRoutes(app, { ...torrents, authority, state, revocations, apiTtlMs: tokens.api_ttl })
  registerTokenExchange(app, { ...shared, trust: trustOf(config, publicUrl), idTokens })
  registerKeyRoutes(app, { ...shared, keys: authority.keys })
  registerRevokedTorrentRoutes(app, shared)
  registerAuditRoutes(app, { ...shared, auditLog, auditLogs: opened.auditLogs })
  const { hosts_max: hostsMax } = enrolment
  registerEnrolmentRoutes(app, {
    ...shared,
    state,
    revocations,
    fleet: view,
    enrolled: started.use(await followEnrolledHosts({ state, hostsMax, log })),
    hostTtlMs: tokens.host_ttl,
    hostsMax,
  })
  registerFleetRoutes(app, {
    ...shared,
    fleet,
    view,
    recall: started.use(createHostRecall({ state, now, log })),
    tags,
    epoch,
    reportIntervalMs: enrolment.report_interval,
    placeOf: (place, source) => place ?? topology.topology.nameOfAddress(source),
  })
  const { webseed } = registry
  const seeding = { leaseMs: webseed.lease, hostsMax: webseed.replies_max, now }
  registerGrantRoutes(app, {
    ...shared,
    webseed: isShared && redis ? createSharedWebseedPolicy(redis, seeding) : createWebseedPolicy(seeding),
    agentTtlMs: tokens.agent_ttl,
    peerTtlMs: tokens.peer_ttl,
    cidrOf,
    swarmCounts: deps.swarmCounts,
  })
  registerWebseedRoutes(app, {
    ...shared,
    verifier,
    repliesMax: webseed.replies_max,
    bytesPerSecond: webseed.rate,
    observer: metrics.webseed,
  })
  const pins = createPins({ state, store, inTurn, now })
  const collector = started.use(
    await startGarbageCollector({
      ...shared,
      ...collectionOf(config),
      auditLog,
      state,
      inTurn,
      onTag,
      pins,
      deployed: async (sinceMs) =>
        (await noHosts(state)) ? new Map() : view.deployed(sinceMs - storeNow() + now()),
      readyInMs: async () => (hostsReadyInMs() === 0 || (await noHosts(state)) ? 0 : hostsReadyInMs()),
      exclusively: exclusivelyOf(opened, random),
      now: storeNow,
      sweepState: async (signal) => {
        const expiredBeforeMs = now() - registry.gc.grace
        return (
          (await sweepTokens(state, expiredBeforeMs, signal)) +
          (await sweepBootstrapTokens(state, expiredBeforeMs, signal)) +
          (await torrentReferrers.sweep(signal))
        )
      },
    }),
  )
  metrics.watchCollector(collector)
  registerGcRoutes(app, { ...shared, collector, pins })
  app.get<{ Querystring: { address?: string | string[] } }>(
    '/api/v1/topology',
    async (request): Promise<TopologyExplanation> => {
      await requireAdmin(access, request)
      return explainAddresses(topology, [request.query.address ?? []].flat())
    },
  )
  app.get('/api/v1/server', async (request) => serverInfo(request, config, deps, access))
  const owned = started.move()
  return {
    verifier,
    revokedTorrents,
    hostsPresent: () => fleet.present().length,
    replaceTopology: (next) => {
      topology = next
    },
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

/** `registry.trust`, with what it leaves out. */
function trustOf({ registry }: ServerConfig, publicUrl: string) {
  return registry.trust.map(({ audience = publicUrl, ttl, ...entry }) => ({
    ...entry,
    audience,
    ttlMs: ttl,
  }))
}

/** `registry.gc` and `registry.retention`. */
function collectionOf({
  registry: { gc, retention },
}: ServerConfig): Pick<GarbageCollectorOptions, 'retention' | 'graceMs' | 'intervalMs'> {
  return {
    retention: retention.map((rule) => ({
      repositories: rule.repositories,
      tags: rule.tags,
      keepLast: rule.keep_last,
      keepNewerThanMs: rule.keep_newer_than,
      keepDeployed: rule.keep_deployed,
    })),
    graceMs: gc.grace,
    intervalMs: gc.enabled ? gc.interval : undefined,
  }
}

function exclusivelyOf(
  { isShared, state, serverName }: OpenedRegistry,
  random: () => number,
): GarbageCollectorOptions['exclusively'] {
  if (!isShared) return (work) => work(new AbortController().signal)
  const lease = { ttlMs: gcLeaseMs, waitMs: gcLeaseMs, holder: serverName, random }
  return (work) => withLease(state, 'gc', lease, ({ signal }) => work(signal))
}

async function noHosts(state: StateStore): Promise<boolean> {
  return (await state.list('hosts/', { limit: 1 })).length === 0
}

async function serverInfo(
  request: FastifyRequest,
  { roles }: ServerConfig,
  { publicUrl, epoch, now, checks }: RegistryDeps,
  access: AccessControl,
): Promise<ServerInfo> {
  const { kind, name, scopes, credential } = await requireCredential(access, request)
  return {
    version,
    roles,
    publicUrl,
    epoch: epoch(),
    serverTime: new Date(now()).toISOString(),
    checks: (await readChecks(checks)).results,
    caller: {
      kind,
      name,
      scopes: [...scopes],
      ...(credential ? { expiresAt: credential.expiresAt.toISOString() } : {}),
    },
  }
}
