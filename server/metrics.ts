import { Counter, Gauge, Histogram, Registry, collectDefaultMetrics } from 'prom-client'
import type { TokenFault } from '../lib/token/claims.ts'
import type { TokenAuthority } from '../lib/token/token-authority.ts'
import type { BlobStore } from './registry/blob-store.ts'
import type { Fleet } from './registry/fleet.ts'
import type { WebseedObserver } from './registry/webseed.ts'
import type { PeerStore } from './tracker/peer-store.ts'
import type { TrackerObserver } from './tracker/tracker.ts'

/** Every metric of the server. Labels come from closed sets: never an infohash, a host or an address. */
export interface ServerMetrics {
  readonly registry: Registry
  readonly tracker: TrackerObserver
  readonly webseed: WebseedObserver
  readonly tokenRefused: (fault: TokenFault | 'missing') => void
  watchStore(store: PeerStore): void
  watchRegistry(registry: { blobs: BlobStore; authority: TokenAuthority }): void
  watchFleet(fleet: Fleet): void
}

export function createServerMetrics(): ServerMetrics {
  const registry = new Registry()
  collectDefaultMetrics({ register: registry })
  const registers = [registry]
  const requests = new Histogram({
    name: 'rackswarm_tracker_request_duration_seconds',
    help: 'How long the tracker took to answer, by action, address family and outcome.',
    labelNames: ['action', 'family', 'outcome'] as const,
    buckets: [0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1],
    registers,
  })
  const refused = new Counter({
    name: 'rackswarm_tracker_refused_total',
    help: 'Announces and scrapes refused by token approval, by reason.',
    labelNames: ['reason'] as const,
    registers,
  })
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
  const gauge = (name: string, help: string, read: () => number) =>
    new Gauge({
      name,
      help,
      registers,
      collect() {
        this.set(read())
      },
    })
  return {
    registry,
    tracker: {
      handled: (action, family, outcome, seconds) => {
        requests.observe({ action, family: family === 4 ? 'ipv4' : 'ipv6', outcome }, seconds)
      },
    },
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
    tokenRefused: (reason) => {
      refused.inc({ reason })
    },
    watchStore: (store) => {
      gauge('rackswarm_tracker_swarms', 'Swarms known.', () => store.totals().swarms)
      gauge('rackswarm_tracker_seeders', 'Peers that have everything.', () => store.totals().seeders)
      gauge('rackswarm_tracker_leechers', 'Peers that fetch.', () => store.totals().leechers)
      gauge(
        'rackswarm_tracker_peers_refused',
        'Announces not stored since the start because the store was full.',
        () => store.totals().refused,
      )
    },
    watchRegistry: ({ blobs, authority }) => {
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
    watchFleet: (fleet) => {
      gauge('rackswarm_fleet_hosts', 'Hosts heard in the last minute.', () => fleet.present().length)
    },
  }
}
