import type { Logger } from '../../lib/runtime/log.ts'
import { loadModule } from './load-module.ts'
import type { PeerStore } from './peer-store.ts'
import { samplePeersMax } from './peer-store.ts'
import type { TrackerSettings } from './tracker-thread.ts'

/** What a module that makes a store is told besides its own settings. */
export interface StoreDeps {
  /** Levels of the topology: the root's distance. */
  readonly levels: number
  /** Peers in a reply at most. */
  readonly sampleMax: number
  /** 0 ≤ random() < 1. */
  readonly random: () => number
  /** Milliseconds of a clock that never goes back. */
  readonly now: () => number
  readonly log: Logger
}

/** What a module of somebody else's exports by default. */
export type CreatePeerStore = (
  config: Readonly<Record<string, unknown>>,
  deps: StoreDeps,
) => PeerStore | Promise<PeerStore>

/** Opens the store of a module. @throws Error naming the module */
export async function createStore(
  storage: { readonly name: string; readonly config: Readonly<Record<string, unknown>> },
  { modulesDirectory, topology }: Pick<TrackerSettings, 'modulesDirectory' | 'topology'>,
  deps: { random: () => number; monotonic: () => number; log: Logger },
): Promise<PeerStore> {
  const create = await loadModule(storage.name, modulesDirectory)
  return (await create(storage.config, {
    levels: Math.max(1, topology.levels.length),
    sampleMax: samplePeersMax,
    random: deps.random,
    now: deps.monotonic,
    log: deps.log,
  } satisfies StoreDeps)) as PeerStore
}
