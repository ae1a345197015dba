import type { Logger } from '../../lib/runtime/log.ts'
import { makeOfModule } from './load-module.ts'
import type { PeerStore } from './peer-store.ts'
import { samplePeersMax } from './peer-store.ts'
import { levelCount } from './topology.ts'
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

/** Opens a store of somebody else's: a module's, or one that a program brings. */
export type OpenStore = (deps: StoreDeps) => PeerStore | Promise<PeerStore>

/** Opens the store of a module. @throws Error naming the module */
export async function createStore(
  storage: { readonly name: string; readonly config: Readonly<Record<string, unknown>> },
  settings: Pick<TrackerSettings, 'modulesDirectory' | 'topology'>,
  deps: { random: () => number; monotonic: () => number; log: Logger },
): Promise<PeerStore> {
  const { name, config } = storage
  return (await makeOfModule(name, settings.modulesDirectory, config, storeDeps(settings, deps))) as PeerStore
}

export function storeDeps(
  { topology }: Pick<TrackerSettings, 'topology'>,
  { random, monotonic, log }: { random: () => number; monotonic: () => number; log: Logger },
): StoreDeps {
  return {
    levels: levelCount(topology),
    sampleMax: samplePeersMax,
    random,
    now: monotonic,
    log,
  }
}
