import type { z } from 'zod'
import { ConfigError, checkConfig } from '../lib/runtime/config.ts'
import type { Logger } from '../lib/runtime/log.ts'
import { ServerConfig } from './config.ts'
import type { StoreDeps } from './tracker/create-store.ts'
import type { HookDeps, PostHook, PreHook } from './tracker/hooks.ts'
import type { PeerStore } from './tracker/peer-store.ts'

/** Sections of server.yaml that an embedded tracker has no use for; giving one is a fault. */
export const serverOnlySettings = ['roles', 'registry', 'enrolment', 'log_level'] as const

/** What is said of settings whose defaults are others than those of server.yaml. */
export const embeddedDefaults = {
  data_dir:
    'Where swarms are kept over a restart, and secrets. Default: nowhere; then nothing is written to disk.',
  metrics_addr:
    '/metrics, /livez, /readyz and /stats.json; no authentication, so keep it private. Default: none.',
} as const

/** What server.yaml says, as an object: docs/configuration.md. */
export type EmbeddedSettings = Omit<z.input<typeof ServerConfig>, (typeof serverOnlySettings)[number]>

/**
 * What the program around a tracker brings. Objects stay the caller's, to dispose once the tracker has ended; what a function makes the
 * tracker disposes. Either needs `workers: 1`.
 */
export interface EmbedDeps {
  /** Where log lines go, such as a pino logger. Default: nowhere. */
  readonly log?: Logger | undefined
  /** Run after those of `prehooks`. */
  readonly hooks?: readonly Given<PreHook, HookDeps>[] | undefined
  /** Run after those of `posthooks`. */
  readonly postHooks?: readonly Given<PostHook, HookDeps>[] | undefined
  /** Instead of `storage`. */
  readonly store?: Given<PeerStore, StoreDeps> | undefined
  /** Where relative paths of modules and of `topology.table` begin. Default: the working directory. */
  readonly directory?: string | undefined
}

/** A part, or what makes one. */
export type Given<Part, Deps> = Part | ((deps: Deps) => Part | Promise<Part>)

/**
 * What the settings mean for a server that is a tracker alone, in somebody else's program.
 *
 * @throws ConfigError with all faults at once
 */
export function readEmbeddedSettings(
  settings: unknown,
  { hooks = [], postHooks = [], store }: EmbedDeps,
): ServerConfig {
  const given = isRecord(settings) ? settings : {}
  const faults: string[] = []
  const isGiven = (key: string) => given[key] !== undefined
  for (const key of serverOnlySettings)
    if (isGiven(key) && !(key === 'roles' && isTrackerAlone(given[key])))
      faults.push(`${key}: an embedded tracker has no such setting: leave it out`)
  if (store && isGiven('storage'))
    faults.push('storage: a store was given as an object already: leave one of them out')
  if (store && typeof store !== 'function' && typeof store.announce !== 'function')
    faults.push('deps.store: need a store, or a function that opens one')
  for (const [name, objects] of Object.entries({ hooks, postHooks }))
    for (const [i, hook] of objects.entries())
      if (typeof hook !== 'function' && (!isRecord(hook) || typeof hook['name'] !== 'string'))
        faults.push(`deps.${name}.${i}: need a hook, which has a name, or a function that makes one`)
  if (Number(given['workers']) > 1 && (store || hooks.length > 0 || postHooks.length > 0))
    faults.push('workers: hooks and stores that are objects live in one thread: need 1')
  const onDisk = isGiven('data_dir') || store !== undefined
  const { storage, wantsDisk } = onDisk
    ? { storage: given['storage'], wantsDisk: false }
    : withoutDisk(given['storage'])
  if (wantsDisk) faults.push('storage.config.snapshot: needs data_dir, where the swarms are kept')
  const checked = checkConfig(
    ServerConfig,
    isRecord(settings)
      ? {
          ...Object.fromEntries(
            Object.entries(given).filter(([key]) => !serverOnlySettings.some((only) => only === key)),
          ),
          roles: ['tracker'],
          metrics_addr: given['metrics_addr'] ?? 'none',
          storage,
        }
      : settings,
  )
  if ('faults' in checked) throw new ConfigError([...faults, ...checked.faults])
  if (faults.length > 0) throw new ConfigError(faults)
  return checked.config
}

/** The store in memory keeps no snapshots where there is no place for them. */
function withoutDisk(storage: unknown): { storage: unknown; wantsDisk: boolean } {
  const given = storage ?? {}
  if (!isRecord(given)) return { storage, wantsDisk: false }
  const { name = 'memory', config = {} } = given
  if (name !== 'memory' || !isRecord(config)) return { storage, wantsDisk: false }
  return {
    storage: { ...given, config: { ...config, snapshot: false } },
    wantsDisk: config['snapshot'] === true,
  }
}

function isTrackerAlone(roles: unknown): boolean {
  return Array.isArray(roles) && roles.length === 1 && roles[0] === 'tracker'
}

function isRecord(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
