import { version } from '../lib/runtime/version.ts'
import type { ServerConfig } from './config.ts'
import type { RegistryService } from './start-registry.ts'
import { readCounters } from './tracker/counters.ts'
import type { TrackerService } from './tracker/tracker-service.ts'

/** What /stats.json shows. */
export function serverStats({
  config,
  epoch,
  tracker,
  registry,
}: {
  config: ServerConfig
  epoch: string
  tracker: TrackerService | undefined
  registry: Pick<RegistryService, 'hostsPresent'> | undefined
}) {
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
          store: tracker.store.status && counters.store,
        }
      : {}),
    hosts: registry?.hostsPresent(),
  }
}
