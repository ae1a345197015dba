import { Counter, Gauge, Histogram, Registry, collectDefaultMetrics } from 'prom-client'
import type { TokenFault } from '../lib/token/claims.ts'
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
  const webseedBusy = new Counter({
    name: 'rackswarm_webseed_busy_total',
    help: 'Webseed requests turned away because the budget was spent.',
    registers,
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
    },
    tokenRefused: (reason) => {
      refused.inc({ reason })
    },
    watchStore: (store) => {
      const gauge = (name: string, help: string, read: (totals: ReturnType<PeerStore['totals']>) => number) =>
        new Gauge({
          name,
          help,
          registers,
          collect() {
            this.set(read(store.totals()))
          },
        })
      gauge('rackswarm_tracker_swarms', 'Swarms known.', ({ swarms }) => swarms)
      gauge('rackswarm_tracker_seeders', 'Peers that have everything.', ({ seeders }) => seeders)
      gauge('rackswarm_tracker_leechers', 'Peers that fetch.', ({ leechers }) => leechers)
      gauge(
        'rackswarm_tracker_peers_refused',
        'Announces not stored since the start because the store was full.',
        ({ refused: count }) => count,
      )
    },
    watchFleet: (fleet) => {
      new Gauge({
        name: 'rackswarm_fleet_hosts',
        help: 'Hosts heard in the last minute.',
        registers,
        collect() {
          this.set(fleet.present().length)
        },
      })
    },
  }
}
