// The face of the package: a tracker that is part of another program, and what hooks and stores are written against. What is exported
// here is promised (docs/embedding.md); nothing else of this repository is.
import type { Ip } from '../lib/protocol/address.ts'
import { parseIp } from '../lib/protocol/address.ts'
import { ClientError } from '../lib/protocol/errors.ts'
import { infoHashFromHex } from '../lib/protocol/infohash.ts'
import type { SwarmCounts } from '../lib/protocol/scrape.ts'
import { silentLog } from '../lib/runtime/log.ts'
import { createRandom } from '../lib/runtime/random.ts'
import type { EmbedDeps, EmbeddedSettings, Given } from './embedded-settings.ts'
import { readEmbeddedSettings } from './embedded-settings.ts'
import { startServer } from './server.ts'
import type { OpenStore } from './tracker/create-store.ts'
import type { HookDeps, PostHook, PreHook } from './tracker/hooks.ts'
import type { StoreTotals } from './tracker/peer-store.ts'

export type { Endpoint, Family, Ip } from '../lib/protocol/address.ts'
export {
  endpoint,
  endpointIp,
  endpointPort,
  formatEndpoint,
  formatIp,
  parseIp,
} from '../lib/protocol/address.ts'
export type { Announce, AnnounceEvent, ReplyPeer } from '../lib/protocol/announce.ts'
export { ClientError } from '../lib/protocol/errors.ts'
export type { InfoHash } from '../lib/protocol/infohash.ts'
export {
  infoHashFromBytes,
  infoHashFromHex,
  infoHashToBytes,
  infoHashToHex,
} from '../lib/protocol/infohash.ts'
export type { Place } from '../lib/protocol/place.ts'
export { parsePlace } from '../lib/protocol/place.ts'
export type { Scrape, SwarmCounts } from '../lib/protocol/scrape.ts'
export { ConfigError } from '../lib/runtime/config.ts'
export type { LogLine, Logger } from '../lib/runtime/log.ts'
export type { EmbedDeps, EmbeddedSettings, Given } from './embedded-settings.ts'
export type { CreatePeerStore, StoreDeps } from './tracker/create-store.ts'
export type { CreatePostHook, CreatePreHook } from './tracker/hook-chain.ts'
export type {
  AnnounceRecord,
  AnnounceRequest,
  Frontend,
  HookDeps,
  PostHook,
  PreHook,
  ScrapeRequest,
} from './tracker/hooks.ts'
export type {
  LevelCounts,
  PeerStore,
  StoreAnnounce,
  StoreReply,
  StoreStatus,
  StoreTotals,
  SwarmView,
} from './tracker/peer-store.ts'
export { PeerSample } from './tracker/peer-store.ts'
export type { Plan } from './tracker/selection.ts'
export type { Ancestor, PlaceId } from './tracker/topology.ts'

export interface EmbeddedTracker extends AsyncDisposable {
  /** Where it listens: `http.addr` first, then those of `tracker_addr` and `tls_addr`. */
  readonly addresses: {
    readonly http: readonly { readonly host: string; readonly port: number }[]
    readonly udp: readonly { readonly host: string; readonly port: number }[]
    /** The origin of /metrics, /livez, /readyz and /stats.json, where `metrics_addr` is set. */
    readonly metricsUrl: string | undefined
  }
  /**
   * Answers an announce that came through a port of the program's own: the query of its URL, and the address of the peer. Peers'
   * faults are replies too. Rejects where the address is none.
   */
  announce(query: string, source: string | Ip): Promise<Uint8Array>
  /** Answers a scrape likewise. */
  scrape(query: string, source: string | Ip): Promise<Uint8Array>
  /** All swarms together; may be up to a second old. */
  totals(): StoreTotals
  /** Counts of a swarm, zeros where it is unknown; rejects unless it is given 40 hex digits. */
  counts(infoHash: string): Promise<SwarmCounts>
  /** The tracker's metrics, in Prometheus' text format. */
  metrics(): Promise<string>
  /**
   * Puts other settings in force without closing a socket or losing a swarm, as rackswarm-server does at SIGHUP. Hooks and store that
   * were given as objects stay. Rejects where they cannot be used; then what was in force stays.
   *
   * @returns the settings that only count after a restart, and are others now
   */
  reload(settings: EmbeddedSettings): Promise<string[]>
  /** Ends requests under way, then tells post-hooks what they have not heard yet. Once more does nothing but wait. */
  close(): Promise<void>
}

/**
 * Starts a tracker inside this process; what it returns is listening. It handles no signals, reads no environment, ends no process and
 * shares nothing with another one. Without `data_dir` it writes nothing to disk: swarms and the secret of connection ids last as
 * long as it does. `metrics_addr` is `none` unless it is set.
 *
 * @throws ConfigError that names all faults of the settings at once, or Error naming the part that cannot start
 */
export async function startTracker(
  settings: EmbeddedSettings,
  deps: EmbedDeps = {},
): Promise<EmbeddedTracker> {
  const { log = silentLog(), store, directory } = deps
  const config = readEmbeddedSettings(settings, deps)
  const common = { log, now: Date.now, random: createRandom(Math.random) }
  await using started = new AsyncDisposableStack()
  const server = await startServer(config, {
    ...common,
    directory,
    embedded: {
      hooks: {
        prehooks: await makeHooks(deps.hooks ?? [], common, started),
        posthooks: (await makeHooks(deps.postHooks ?? [], common, started)).map(notOwned),
      },
      openStore: store && openStoreOf(store),
    },
  })
  started.use(server)
  const { addresses, tracker: service } = server
  if (!service) throw new Error('Cannot start a tracker: the server has none')
  const { tracker } = service.first
  const owned = started.move()
  let ended: Promise<void> | undefined
  const close = () => (ended ??= owned.disposeAsync())
  return {
    addresses: { http: addresses.tracker, udp: addresses.udp, metricsUrl: addresses.metricsUrl },
    announce: async (query, source) => Uint8Array.from(await tracker.announce(query, addressOf(source))),
    scrape: async (query, source) => Uint8Array.from(await tracker.scrape(query, addressOf(source))),
    totals: () => service.store.totals(),
    counts: async (infoHash) => service.store.scrape(infoHashFromHex(infoHash)),
    metrics: () => server.metrics(),
    reload: async (next) => server.reload(readEmbeddedSettings(next, deps)),
    close,
    [Symbol.asyncDispose]: close,
  }
}

function addressOf(source: string | Ip): Ip {
  const ip = typeof source === 'string' ? parseIp(source) : source
  if (!ip) throw new ClientError('bad_address', `Cannot read address ${JSON.stringify(source)}`)
  return ip
}

function openStoreOf(store: NonNullable<EmbedDeps['store']>): OpenStore {
  if (typeof store === 'function') return store
  return () => ({
    announce: (announce) => store.announce(announce),
    scrape: (infoHash) => store.scrape(infoHash),
    swarms: () => store.swarms(),
    totals: () => store.totals(),
    [Symbol.asyncDispose]: async () => {
      await Promise.resolve()
    },
  })
}

async function makeHooks<Hook extends PreHook | PostHook>(
  hooks: readonly Given<Hook, HookDeps>[],
  deps: HookDeps,
  made: AsyncDisposableStack,
): Promise<Hook[]> {
  const all: Hook[] = []
  for (const given of hooks) {
    if (typeof given !== 'function') {
      all.push(given)
      continue
    }
    const hook = await given(deps)
    made.defer(async () => hook[Symbol.asyncDispose]?.())
    all.push(hook)
  }
  return all
}

/** The same hook, but for its end. */
function notOwned(hook: PostHook): PostHook {
  return { name: hook.name, announced: (record) => hook.announced?.(record) }
}
