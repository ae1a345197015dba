import type { Server } from 'node:http'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { Counter, Gauge, Histogram, Registry, collectDefaultMetrics } from 'prom-client'
import type { TokenFault } from '../lib/token/claims.ts'
import type { AnnounceOutcome } from './announcer.ts'
import type { FetchObserver } from './blob-fetcher.ts'
import type { MirrorObserver } from './mirror/mirror.ts'
import type { VerificationObserver } from './release-verifier.ts'

/** What is read when metrics are asked for. */
export interface AgentGauges {
  diskUsedBytes: number
  diskQuotaBytes: number
  blobs: number
  seeding: number
  peers: number
  mirrorReaders: number
  mirrorManifestBytes: number
  releasesRefused: number
}

export type AgentMetrics = ReturnType<typeof createAgentMetrics>

export function createAgentMetrics(version: string, gauges: () => AgentGauges) {
  const registry = new Registry()
  // By default its timer wakes a host that rests a hundred times a second.
  collectDefaultMetrics({ register: registry, eventLoopMonitoringPrecision: 100 })
  const registers = [registry]
  new Gauge({
    name: 'rackswarm_agent_info',
    help: 'Always 1; the label says which version runs.',
    labelNames: ['version'],
    registers,
  })
    .labels(version)
    .set(1)
  const bytes = new Counter({
    name: 'rackswarm_agent_received_bytes_total',
    help: 'Bytes of blobs received, by where they came from.',
    labelNames: ['source'],
    registers,
  })
  const uploaded = new Counter({
    name: 'rackswarm_agent_sent_bytes_total',
    help: 'Bytes of blobs sent to peers.',
    registers,
  })
  const fetches = new Counter({
    name: 'rackswarm_agent_fetches_total',
    help: 'Fetches of blobs that ended, by outcome.',
    labelNames: ['outcome'],
    registers,
  })
  const seconds = new Histogram({
    name: 'rackswarm_agent_fetch_seconds',
    help: 'Time from the wish for a blob to its verified copy.',
    buckets: [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000],
    registers,
  })
  const watchdog = new Counter({
    name: 'rackswarm_agent_watchdog_steps_total',
    help: 'What was done about fetches that stood still.',
    labelNames: ['step'],
    registers,
  })
  const announces = new Counter({
    name: 'rackswarm_agent_announces_total',
    help: 'Announces, by outcome.',
    labelNames: ['outcome'],
    registers,
  })
  const refused = new Counter({
    name: 'rackswarm_agent_peers_refused_total',
    help: 'Peers whose token did not let them take part, by what was wrong with it.',
    labelNames: ['fault'],
    registers,
  })
  const banned = new Counter({
    name: 'rackswarm_agent_peers_banned_total',
    help: 'Peers that sent wrong bytes, and are not talked to for ten minutes; the log names them.',
    registers,
  })
  const signatures = new Counter({
    name: 'rackswarm_agent_signature_checks_total',
    help: 'Releases looked at for who has signed them, by outcome and by what was wrong with the signature that came closest.',
    labelNames: ['outcome', 'fault'],
    registers,
  })
  const reports = new Counter({
    name: 'rackswarm_agent_reports_total',
    help: 'Reports to the server, by outcome.',
    labelNames: ['outcome'],
    registers,
  })
  const mirrored = new Counter({
    name: 'rackswarm_agent_mirror_requests_total',
    help: 'Requests to the mirror that ended, by what they asked for and outcome; not_found sends a client on to the registry.',
    labelNames: ['kind', 'outcome'],
    registers,
  })
  const mirrorOpen = new Gauge({
    name: 'rackswarm_agent_mirror_requests',
    help: 'Requests to the mirror under way.',
    registers,
  })
  const mirrorSent = new Counter({
    name: 'rackswarm_agent_mirror_sent_bytes_total',
    help: 'Bytes that the mirror gave to clients: manifests, blobs that were held, and blobs while they came.',
    labelNames: ['from'],
    registers,
  })
  const read = (name: string, help: string, value: (all: AgentGauges) => number) =>
    new Gauge({
      name,
      help,
      registers,
      collect() {
        this.set(value(gauges()))
      },
    })
  read(
    'rackswarm_agent_disk_used_bytes',
    'Bytes of blobs, parts, and space promised to fetches.',
    (all) => all.diskUsedBytes,
  )
  read('rackswarm_agent_disk_quota_bytes', 'The disk quota.', (all) => all.diskQuotaBytes)
  read('rackswarm_agent_blobs', 'Verified blobs kept.', (all) => all.blobs)
  read('rackswarm_agent_seeding', 'Blobs offered to the swarm.', (all) => all.seeding)
  read('rackswarm_agent_peers', 'Connections to peers.', (all) => all.peers)
  read(
    'rackswarm_agent_mirror_readers',
    'Clients of the mirror that read blobs which are on their way; 64 at most.',
    (all) => all.mirrorReaders,
  )
  read(
    'rackswarm_agent_mirror_manifest_bytes',
    'Bytes of manifests that the mirror remembers; 16 MiB at most.',
    (all) => all.mirrorManifestBytes,
  )
  read(
    'rackswarm_agent_releases_refused',
    'Followed releases that are not taken, since nobody has signed them whose key is trusted.',
    (all) => all.releasesRefused,
  )

  const fetching: FetchObserver = {
    bytes: (source, count) => bytes.labels(source).inc(count),
    uploaded: (count) => uploaded.inc(count),
    fetched: (outcome, took) => {
      fetches.labels(outcome).inc()
      if (outcome === 'ok') seconds.observe(took)
    },
    watchdog: (step) => watchdog.labels(step).inc(),
  }
  const mirror: MirrorObserver = {
    begun: () => {
      mirrorOpen.inc()
    },
    ended: (kind, outcome) => {
      mirrorOpen.dec()
      mirrored.labels(kind, outcome).inc()
    },
    sent: (from, count) => mirrorSent.labels(from).inc(count),
  }
  const signatureChecked: VerificationObserver['signatureChecked'] = (outcome, fault) => {
    signatures.labels(outcome, fault).inc()
  }
  return {
    registry,
    fetching,
    mirror,
    signatureChecked,
    peerRefused: (fault: TokenFault) => refused.labels(fault).inc(),
    peerBanned: () => {
      banned.inc()
    },
    announced: (outcome: AnnounceOutcome) => announces.labels(outcome).inc(),
    reported: (outcome: 'ok' | 'refused' | 'unreachable') => reports.labels(outcome).inc(),
  }
}

/** /metrics, /livez and /readyz; `notReady` says in words why the agent is not. */
export async function startMetricsServer(
  address: { host: string; port: number },
  deps: { registry: Registry; notReady: () => string | undefined },
): Promise<AsyncDisposable & { readonly port: number }> {
  const server: Server = createServer((request, response) => {
    void (async () => {
      const path = request.url?.split('?')[0]
      if (request.method !== 'GET' && request.method !== 'HEAD') {
        response.writeHead(405).end()
      } else if (path === '/metrics') {
        const body = await deps.registry.metrics()
        response.writeHead(200, { 'content-type': deps.registry.contentType }).end(body)
      } else if (path === '/livez') {
        response.writeHead(200, { 'content-type': 'text/plain' }).end('ok\n')
      } else if (path === '/readyz') {
        const reason = deps.notReady()
        response
          .writeHead(reason === undefined ? 200 : 503, { 'content-type': 'text/plain' })
          .end(`${reason ?? 'ok'}\n`)
      } else {
        response.writeHead(404).end()
      }
    })().catch(() => {
      response.destroy()
    })
  })
  server.maxConnections = 100
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject)
    server.listen(address.port, address.host, () => {
      server.off('error', reject)
      resolve()
    })
  })
  return {
    port: (server.address() as AddressInfo).port,
    [Symbol.asyncDispose]: async () => {
      const closed = new Promise((resolve) => server.close(resolve))
      server.closeAllConnections()
      await closed
    },
  }
}
