import { monotonicMs } from '../lib/runtime/clock.ts'
import { makeDirectory } from '../lib/runtime/files.ts'
import type { Logger } from '../lib/runtime/log.ts'
import { defaultPaths } from '../lib/runtime/paths.ts'
import type { Daemon } from '../lib/runtime/program.ts'
import { openCertificates } from './certificates.ts'
import type { ServerConfig } from './config.ts'
import type { Readiness, ReadinessCheck } from './health.ts'
import { startHealthPort } from './health.ts'
import { startMainPort } from './http.ts'
import { trackerKeySet } from './key-set-sources.ts'
import { createServerMetrics } from './metrics.ts'
import { openTopology } from './open-topology.ts'
import { readRedisSettings } from './redis-settings.ts'
import { openRedis } from './redis/connection.ts'
import { newEpoch, startSharedEpoch } from './redis/shared-epoch.ts'
import type { RevokedTorrents } from './registry/revoked-torrents.ts'
import type { InForce } from './reloads.ts'
import { startReloads } from './reloads.ts'
import { serverStats } from './server-stats.ts'
import type { RegistryService } from './start-registry.ts'
import { startRegistry } from './start-registry.ts'
import { openTrackerSecrets, storageSettings, trackerSettings } from './tracker-settings.ts'
import { readCounters } from './tracker/counters.ts'
import type { OpenStore } from './tracker/create-store.ts'
import { refuseRevokedTorrents } from './tracker/hooks/revoked-torrents.ts'
import { registerTrackerRoutes } from './tracker/http-frontend.ts'
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
  /** Ends a start that waits. */
  readonly signal?: AbortSignal | undefined
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
          reusePort: config.reuse_port,
        }),
      )
    : undefined
  const publicUrl = config.public_url ?? main?.origin ?? originOf(config)
  const metrics = createServerMetrics({ ofProcess: embedded === undefined })
  const ownEpoch = newEpoch()
  const checks: Record<string, ReadinessCheck> = {}
  const trust = {
    issuer: config.tokens.issuer ?? publicUrl,
    audience: config.tokens.audience ?? publicUrl,
    clockToleranceMs: config.tokens.clock_tolerance,
  }
  const sharedDirectory = config.registry.shared_dir
  if (sharedDirectory !== undefined) await makeDirectory(sharedDirectory, 0o700)
  const secrets = await openTrackerSecrets(config, sharedDirectory ?? directory, embedded ? {} : process.env)
  const redisSettings = await readRedisSettings(config, embedded ? {} : process.env)
  const redis =
    redisSettings && started.use(openRedis(redisSettings, { ...deps, observe: metrics.redisCommand }))
  if (redis) metrics.watchRedis(redis)
  const sharedEpoch = redis && started.use(await startSharedEpoch(redis))
  const epoch = () => sharedEpoch?.current ?? ownEpoch

  // The registry has the keys, the tracker checks with them; the registry asks the tracker what its swarms hold.
  const parts: Parts = { registry: undefined, tracker: undefined }
  // Before what may have to wait for others, so that /readyz says what for.
  checks['start'] = () => 'the server is starting'
  const health =
    config.metrics_addr === 'none'
      ? undefined
      : started.use(
          await startHealthPort({
            address: config.metrics_addr,
            registry: metrics.registry,
            checks,
            stats: () => serverStats({ ...parts, config, epoch: epoch() }),
            reusePort: config.reuse_port,
          }),
        )
  const registry =
    main && directory !== undefined
      ? started.use(
          await startRegistry(config, {
            ...deps,
            directory,
            main,
            publicUrl,
            metrics,
            checks,
            trust,
            ticketSecret: secrets.ticketSecret,
            redis,
            epoch,
            topology,
            swarmCounts: (infoHash) =>
              parts.tracker?.store.scrape(infoHash) ?? { complete: 0, incomplete: 0, downloaded: 0 },
          }),
        )
      : undefined
  parts.registry = registry
  const keySet = registry === undefined ? await trackerKeySet(config, directory) : undefined
  const inForce = { config, tls, topology }
  const settingsOf = (next: InForce) =>
    trackerSettings(next.config, {
      mainPort: main === undefined,
      topology: next.topology.config,
      trust: { ...trust, keySet },
      tls: next.tls,
      secrets,
      epoch: ownEpoch,
      modulesDirectory: fileDirectory,
    })
  if (config.roles.includes('tracker')) {
    const tracker = started.use(
      await startTrackerService(settingsOf(inForce), {
        ...deps,
        monotonic: monotonicMs,
        threads: config.workers,
        reusePort: config.reuse_port,
        storage: embedded?.openStore
          ? { name: 'given', open: embedded.openStore }
          : storageSettings(config, directory, redisSettings),
        given: registry ? withRevoked(embedded?.hooks, registry.revokedTorrents) : embedded?.hooks,
        verifier: registry?.verifier,
      }),
    )
    parts.tracker = tracker
    metrics.watchTracker(tracker)
    if (main)
      registerTrackerRoutes(main.app, {
        tracker: tracker.first.tracker,
        sourceOf: main.sourceOf,
        routes: { announce: config.http.announce_routes, scrape: config.http.scrape_routes },
      })
    if (tracker.store.status) checks['swarms'] = () => readinessOfSwarms(tracker)
    const { keySet: keys } = tracker.first
    if (keys)
      checks['keys'] = () =>
        keys.keySetStatus().keys > 0 ? undefined : (keys.keySetStatus().lastError ?? 'no keys')
  }

  await main?.open()
  delete checks['start']
  // First at the end: what is under way still needs the parts that were started after the port.
  if (main) started.use(main)
  const { addresses } = parts.tracker?.first ?? {}
  const reloads = started.use(
    startReloads(inForce, {
      ...deps,
      main,
      registry,
      tracker: parts.tracker,
      trackerSettings: settingsOf,
      directory: fileDirectory,
    }),
  )
  const owned = started.move()
  const leave = async () => {
    checks['shutdown'] = () => 'this server ends'
    main?.leave()
    await parts.tracker?.leave()
    await new Promise((resolve) => setTimeout(resolve, config.shutdown_delay))
  }
  return {
    addresses: {
      publicUrl,
      http: main?.address ?? addresses?.http[0] ?? config.http.addr,
      tracker: addresses?.http ?? [],
      udp: addresses?.udp ?? [],
      metricsUrl: health?.origin,
    },
    tracker: parts.tracker,
    metrics: () => metrics.registry.metrics(),
    reload: (next) => reloads.reload(next),
    [Symbol.asyncDispose]: async () => {
      if (config.shutdown_delay > 0) await leave()
      await owned.disposeAsync()
    },
  }
}

/** Those that the roles ask for, once they have started. */
interface Parts {
  registry: RegistryService | undefined
  tracker: TrackerService | undefined
}

/** What the address of a tracker alone says; with port 0, which it is not bound to yet, only for tests and trials. */
function originOf({ http }: ServerConfig): string {
  const { host, port } = http.addr
  return `${http.tls?.main_port === true ? 'https' : 'http'}://${host.includes(':') ? `[${host}]` : host}:${port}`
}

function withRevoked(given: GivenHooks | undefined, revoked: RevokedTorrents): GivenHooks {
  return {
    prehooks: [refuseRevokedTorrents((infoHash) => revoked.has(infoHash)), ...(given?.prehooks ?? [])],
    posthooks: given?.posthooks ?? [],
  }
}

/** Whether the swarms are those of all servers, or what this one knows. */
function readinessOfSwarms({ store, counters }: TrackerService): Readiness {
  const { degraded } = store.status?.() ?? {}
  // Another thread may have lost its way to the store alone.
  const sinceMs = degraded?.sinceMs ?? readCounters(counters).store.degradedMs
  if (sinceMs === 0) return undefined
  const seconds = Math.max(1, Math.round(sinceMs / 1000))
  const reason = degraded?.reason ?? 'a thread cannot ask the shared store'
  if (degraded?.isRefusing === true)
    return `announces are refused: without the shared store for ${seconds} s: ${reason}`
  return { degraded: `answered from what this server knows, for ${seconds} s: ${reason}` }
}
