import { restartNeeded } from '../lib/runtime/changed-settings.ts'
import type { Logger } from '../lib/runtime/log.ts'
import { createTurn } from '../lib/runtime/turn.ts'
import { openCertificates, watchCertificates } from './certificates.ts'
import type { ServerConfig } from './config.ts'
import type { MainPort } from './http.ts'
import { liveSettings } from './live-settings.ts'
import type { OpenedTopology } from './open-topology.ts'
import { openTopology, watchTopologyTable } from './open-topology.ts'
import type { RegistryService } from './start-registry.ts'
import type { TlsMaterial } from './tracker/http-tls.ts'
import type { TrackerService } from './tracker/tracker-service.ts'
import type { TrackerSettings } from './tracker/tracker-thread.ts'

/** What a server works with: a configuration, and what the files that it names said. */
export interface InForce {
  readonly config: ServerConfig
  readonly tls: TlsMaterial | undefined
  readonly topology: OpenedTopology
}

export interface ReloadDeps {
  readonly main: MainPort | undefined
  readonly registry: RegistryService | undefined
  readonly tracker: TrackerService | undefined
  readonly trackerSettings: (next: InForce) => TrackerSettings
  /** Where relative paths begin. */
  readonly directory: string
  /** Between two looks at the files of the certificate. Default: 10 s. */
  readonly certificatePollMs?: number | undefined
  readonly log: Logger
}

/** Puts in force what is new in the files of the certificate and of the topology, and on request another configuration. */
export interface Reloads extends AsyncDisposable {
  /** Rejects where it cannot be used; what was in force stays. @returns the settings that only count after a restart, and are others now */
  reload(config: ServerConfig): Promise<string[]>
}

const certificatePollMsDefault = 10_000

export function startReloads(started: InForce, deps: ReloadDeps): Reloads {
  const { main, registry, tracker, directory, certificatePollMs = certificatePollMsDefault, log } = deps
  // Reloads, new certificates and new tables, one after the other.
  const turn = createTurn()
  let inForce = started
  const setTls = (http: ServerConfig['http'], material: TlsMaterial | undefined) => {
    main?.reload(http, http.tls?.main_port === true ? material : undefined)
  }
  const watching = new AsyncDisposableStack()
  watching.use(
    watchCertificates({
      pollMs: certificatePollMs,
      look: async () => ({ inForce: inForce.tls, found: await openCertificates(inForce.config.http) }),
      use: (found) =>
        turn(async () => {
          await tracker?.setTls(found)
          setTls(inForce.config.http, found)
          inForce = { ...inForce, tls: found }
        }),
      log,
    }),
  )
  watching.use(
    watchTopologyTable({
      inForce: () => inForce.topology,
      reopen: () =>
        turn(async () => {
          const topology = await openTopology(inForce.config, directory)
          await tracker?.setTopology(topology.config)
          registry?.replaceTopology(topology)
          inForce = { ...inForce, topology }
        }),
      log,
    }),
  )
  return {
    reload: (config) =>
      turn(async () => {
        const topology = await openTopology(config, directory)
        const tls = await openCertificates(config.http)
        const next = { config, tls, topology }
        await using prepared = await tracker?.prepare(deps.trackerSettings(next))
        setTls(config.http, tls)
        await prepared?.commit()
        registry?.replaceTopology(topology)
        inForce = next
        return restartNeeded(started.config, config, liveSettings(started.config))
      }),
    [Symbol.asyncDispose]: () => watching.disposeAsync(),
  }
}
