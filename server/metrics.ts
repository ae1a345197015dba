import type { Metric } from 'prom-client'
import { Counter, Gauge, Histogram, Registry, collectDefaultMetrics } from 'prom-client'
import type { TokenAuthority } from '../lib/token/token-authority.ts'
import type { AuditLog } from './registry/audit-log.ts'
import type { BlobStore } from './registry/blob-store.ts'
import type { Fleet } from './registry/fleet.ts'
import type { UpstreamsDeps } from './registry/upstream/start-upstreams.ts'
import type { GarbageCollector } from './registry/garbage-collector.ts'
import type { WebseedObserver } from './registry/webseed.ts'
import type { CommandOutcome, RedisConnection } from './redis/connection.ts'
import type { RedisStateStore } from './state/redis-state-store.ts'
import type { CounterMemory } from './tracker/counters.ts'
import { durationBuckets, openCounters, readCounters } from './tracker/counters.ts'
import type { TrackerService } from './tracker/tracker-service.ts'

/** Every metric of the server. Labels come from closed sets: never an infohash, a host or an address. */
export interface ServerMetrics {
  readonly registry: Registry
  readonly webseed: WebseedObserver
  readonly upstreams: UpstreamsDeps['observer']
  /** Tells of each command to Redis. */
  readonly redisCommand: (outcome: CommandOutcome, seconds: number) => void
  watchRedis(connection: RedisConnection): void
  watchSharedState(state: RedisStateStore): void
  watchTracker(tracker: TrackerService): void
  watchRegistry(registry: { blobs: BlobStore; authority: TokenAuthority; auditLog: AuditLog }): void
  watchFleet(fleet: Fleet): void
  watchCollector(collector: GarbageCollector): void
}

/** `ofProcess`: those of the process too, for which prom-client watches it until it ends. */
export function createServerMetrics({ ofProcess }: { ofProcess: boolean }): ServerMetrics {
  const registry = new Registry()
  if (ofProcess) collectDefaultMetrics({ register: registry, eventLoopMonitoringPrecision: 100 })
  const registers = [registry]
  const webseedBytes = new Counter({
    name: 'rackswarm_webseed_bytes_total',
    help: 'Bytes served as a webseed.',
    registers,
  })
  const webseedReplies = new Gauge({
    name: 'rackswarm_webseed_replies',
    help: 'Webseed replies under way; bounded by registry.webseed.replies_max.',
    registers,
  })
  const webseedBusy = new Counter({
    name: 'rackswarm_webseed_busy_total',
    help: 'Webseed requests turned away because the budget was spent.',
    registers,
  })
  const upstreamRequests = new Counter({
    name: 'rackswarm_upstream_requests_total',
    help: 'Requests to the registries of registry.upstreams, by upstream and outcome.',
    labelNames: ['upstream', 'outcome'] as const,
    registers,
  })
  const upstreamBytes = new Counter({
    name: 'rackswarm_upstream_bytes_total',
    help: 'Bytes of blobs pulled, by upstream.',
    labelNames: ['upstream'] as const,
    registers,
  })
  const upstreamStale = new Counter({
    name: 'rackswarm_upstream_stale_total',
    help: 'Manifests served by a tag that could not be checked, because its upstream was down.',
    labelNames: ['upstream'] as const,
    registers,
  })
  const upstreamEvents = new Counter({
    name: 'rackswarm_upstream_events_total',
    help: 'Events of other registries, by what became of them.',
    labelNames: ['outcome'] as const,
    registers,
  })
  const redisSeconds = new Histogram({
    name: 'rackswarm_redis_command_duration_seconds',
    help: 'How long commands to Redis took, by how they ended: answered, refused (by Redis), unavailable.',
    labelNames: ['outcome'] as const,
    buckets: [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1],
    registers: [],
  })
  const gauge = (name: string, help: string, read: () => number) =>
    new Gauge({
      name,
      help,
      registers,
      collect() {
        this.set(read())
      },
    })
  /** A counter that is kept elsewhere, by reason; the empty reason has no label. */
  const counted = (name: string, help: string, read: () => ReadonlyMap<string, number>) =>
    new Counter({
      name,
      help,
      labelNames: ['reason'] as const,
      registers,
      collect() {
        this.reset()
        for (const [reason, count] of read()) this.inc(reason === '' ? {} : { reason }, count)
      },
    })
  return {
    registry,
    webseed: {
      served: (bytes) => {
        webseedBytes.inc(bytes)
      },
      busy: () => {
        webseedBusy.inc()
      },
      replying: (count) => {
        webseedReplies.set(count)
      },
    },
    upstreams: {
      answered: (upstream, outcome) => {
        upstreamRequests.inc({ upstream, outcome })
      },
      received: (upstream, bytes) => {
        upstreamBytes.inc({ upstream }, bytes)
      },
      stale: (upstream) => {
        upstreamStale.inc({ upstream })
      },
      event: (outcome) => {
        upstreamEvents.inc({ outcome })
      },
      watchQueue: (queue) => {
        gauge(
          'rackswarm_upstream_events_waiting',
          'Events of other registries that are not pulled yet; at most 10,000.',
          () => queue.waiting,
        )
      },
    },
    redisCommand: (outcome, seconds) => {
      redisSeconds.observe({ outcome }, seconds)
    },
    watchRedis: (connection) => {
      registry.registerMetric(redisSeconds)
      gauge('rackswarm_redis_up', 'Whether the last thing heard of Redis was an answer.', () =>
        connection.stats().isUp ? 1 : 0,
      )
      gauge(
        'rackswarm_redis_calls',
        'Commands to Redis under way; when there are redis.calls_max, further ones fail at once.',
        () => connection.stats().calls,
      )
    },
    watchSharedState: ({ losses }) => {
      const total = (name: string, help: string, read: () => number) =>
        counted(name, help, () => new Map([['', read()]]))
      total(
        'rackswarm_state_lost_total',
        'Times that Redis had nothing of the state that this server knew.',
        () => losses.lost,
      )
      total(
        'rackswarm_state_rewound_total',
        'Times that Redis had lost the last changes of the state.',
        () => losses.rewound,
      )
      total(
        'rackswarm_state_restored_total',
        'Entries that this server has put back into Redis.',
        () => losses.restored,
      )
    },
    watchTracker: ({ first, store, snapshots, counters }) => {
      registry.registerMetric(durations(counters))
      counted(
        'rackswarm_tracker_refused_total',
        'Announces and scrapes refused, by reason.',
        () => readCounters(counters).refusals,
      )
      counted(
        'rackswarm_tracker_token_refused_total',
        'Tokens refused, by the exact reason.',
        () => readCounters(counters).tokenFaults,
      )
      counted(
        'rackswarm_tracker_udp_dropped_total',
        'UDP packets that got no reply, or only an error.',
        () => readCounters(counters).drops,
      )
      counted(
        'rackswarm_tracker_udp_connects_total',
        'UDP connection ids given out.',
        () => new Map([['', readCounters(counters).connects]]),
      )
      gauge('rackswarm_tracker_swarms', 'Swarms known.', () => store.totals().swarms)
      gauge('rackswarm_tracker_seeders', 'Peers that have everything.', () => store.totals().seeders)
      gauge('rackswarm_tracker_leechers', 'Peers that fetch.', () => store.totals().leechers)
      gauge(
        'rackswarm_tracker_peers_refused',
        'Announces not stored since the start because the store was full.',
        () => store.totals().refused,
      )
      gauge(
        'rackswarm_tracker_http_connections',
        'Connections open on the addresses of the tracker alone; bounded by http.connections_max.',
        () => readCounters(counters).connections.open,
      )
      counted(
        'rackswarm_tracker_http_connections_refused_total',
        'Connections closed as they came, because too many were open.',
        () => new Map([['', readCounters(counters).connections.refused]]),
      )
      if (store.status) {
        const own = openCounters(counters, 0)
        const of = () => {
          const status = store.status?.()
          if (status) own.store(status)
          return readCounters(counters).store
        }
        gauge(
          'rackswarm_store_degraded',
          '1 while announces of any swarm are answered from what this server knows itself, because the shared store does not answer.',
          () => (of().degradedMs > 0 ? 1 : 0),
        )
        gauge(
          'rackswarm_store_degraded_seconds',
          'For how long that has been so.',
          () => of().degradedMs / 1000,
        )
        gauge(
          'rackswarm_store_untold_peers',
          'Peers that the shared store has to be told of once it answers; bounded by storage.config.untold_max in each thread.',
          () => of().untold,
        )
        const total = (name: string, help: string, read: () => number) =>
          counted(name, help, () => new Map([['', read()]]))
        total(
          'rackswarm_store_answered_locally_total',
          'Announces answered from what this server knows itself.',
          () => of().answeredLocally,
        )
        total(
          'rackswarm_store_told_peers_total',
          'Peers that the shared store was told of late.',
          () => of().told,
        )
        total(
          'rackswarm_store_dropped_peers_total',
          'Peers that it is not told of, because too many waited or it would not have them; it hears of them when they announce next.',
          () => of().dropped,
        )
      }
      if (snapshots)
        gauge('rackswarm_tracker_snapshot_age_seconds', 'Since the swarms were last saved.', () =>
          snapshots.ageSeconds(),
        )
      const { keySet, postHooks } = first
      if (keySet) {
        gauge('rackswarm_jwks_keys', 'Keys that tokens are checked with.', () => keySet.keySetStatus().keys)
        gauge(
          'rackswarm_jwks_age_seconds',
          'Since the key set was last known to be what its source says; -1 before the first time.',
          () => keySet.keySetStatus().ageSeconds ?? -1,
        )
        gauge(
          'rackswarm_token_cache_entries',
          'Tokens that are known to be good; bounded.',
          () => keySet.verifierStats().cachedTokens,
        )
        gauge(
          'rackswarm_token_verifications_waiting',
          'Signatures that wait to be verified; when 20,000 wait, further tokens are refused.',
          () => keySet.verifierStats().waiting,
        )
      }
      if (postHooks) {
        gauge(
          'rackswarm_tracker_post_hooks_waiting',
          'Announces that post-hooks have not been told of yet; at most 10,000.',
          () => postHooks.waiting,
        )
        counted(
          'rackswarm_tracker_post_hooks_dropped_total',
          'Announces that post-hooks are never told of, because too many waited.',
          () => new Map([['', postHooks.dropped]]),
        )
      }
    },
    watchRegistry: ({ blobs, authority, auditLog }) => {
      gauge(
        'rackswarm_audit_waiting',
        'Entries of the audit log that wait for the disk; at most 2,000.',
        () => auditLog.waiting,
      )
      counted(
        'rackswarm_audit_failures_total',
        'Entries of the audit log that could not be written; what they were of was refused.',
        () => new Map([['', auditLog.failures]]),
      )
      gauge(
        'rackswarm_registry_uploads_open',
        'Uploads that hold an open file; bounded by registry.uploads_max.',
        () => blobs.uploadsOpen,
      )
      gauge(
        'rackswarm_token_verifications_waiting',
        'Signatures that wait to be verified; when 20,000 wait, further tokens are refused.',
        () => authority.verificationsWaiting,
      )
    },
    watchCollector: (collector) => {
      const total = (name: string, help: string, read: () => number) =>
        counted(name, help, () => new Map([['', read()]]))
      const totals = () => collector.totals
      total('rackswarm_registry_gc_runs_total', 'Garbage collections that ended well.', () => totals().runs)
      total(
        'rackswarm_registry_gc_failures_total',
        'Garbage collections that failed.',
        () => totals().failures,
      )
      total(
        'rackswarm_registry_gc_tags_deleted_total',
        'Tags that retention rules removed.',
        () => totals().tags,
      )
      total('rackswarm_registry_gc_manifests_deleted_total', 'Manifests removed.', () => totals().manifests)
      total('rackswarm_registry_gc_blobs_deleted_total', 'Blobs removed.', () => totals().blobs)
      total('rackswarm_registry_gc_freed_bytes_total', 'Bytes of removed blobs.', () => totals().bytes)
      gauge(
        'rackswarm_registry_gc_last_run_timestamp_seconds',
        'When the last garbage collection that ended well began; 0: never.',
        () => Date.parse(collector.status().lastRun?.startedAt ?? '1970-01-01T00:00:00Z') / 1000,
      )
      gauge(
        'rackswarm_registry_gc_waiting_bytes',
        'Bytes that only the grace period kept at the last run.',
        () => collector.status().lastRun?.waiting.bytes ?? 0,
      )
    },
    watchFleet: (fleet) => {
      gauge('rackswarm_fleet_hosts', 'Hosts heard in the last minute.', () => fleet.present().length)
    },
  }
}

/** The histogram of what the tracker's threads have counted. */
function durations(counters: CounterMemory): Metric {
  const name = 'rackswarm_tracker_request_duration_seconds'
  const help = 'How long the tracker took to answer, by frontend, action, address family and outcome.'
  const get = async () => ({
    name,
    help,
    type: 'histogram',
    aggregator: 'sum',
    values: readCounters(counters).durations.flatMap(({ labels, buckets, sumSeconds }) => {
      const total = buckets.reduce((sum, count) => sum + count, 0)
      if (total === 0) return []
      let below = 0
      return [
        ...durationBuckets.map((le, i) => ({
          metricName: `${name}_bucket`,
          labels: { ...labels, le },
          value: (below += buckets[i] ?? 0),
        })),
        { metricName: `${name}_bucket`, labels: { ...labels, le: '+Inf' }, value: total },
        { metricName: `${name}_sum`, labels, value: sumSeconds },
        { metricName: `${name}_count`, labels, value: total },
      ]
    }),
  })
  // prom-client renders whatever has a name and get(); its own histogram would have to be told of every request.
  return { name, help, get, reset: () => undefined } as unknown as Metric
}
