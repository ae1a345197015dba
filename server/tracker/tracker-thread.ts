import type { Cidr } from '../../lib/protocol/cidr.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { TokenVerifier } from '../../lib/token/claims.ts'
import type { KeySetSource } from '../../lib/token/key-set.ts'
import { createTickets } from '../../lib/token/ticket.ts'
import type { KeySetVerifier } from '../../lib/token/key-set-verifier.ts'
import { openKeySetVerifier } from '../../lib/token/key-set-verifier.ts'
import { createConnectionIds } from './connection-id.ts'
import type { TrackerCounters } from './counters.ts'
import type { HookChain, HookEntry } from './hook-chain.ts'
import { createHookChain, createPostHooks } from './hook-chain.ts'
import type { PostHook, PreHook } from './hooks.ts'
import { tokenApproval } from './hooks/token.ts'
import type { HttpListener, HttpListenerSettings } from './http-listener.ts'
import { startHttpListener } from './http-listener.ts'
import { compileRoutes } from './http-routes.ts'
import type { TlsMaterial } from './http-tls.ts'
import { createTlsHandshaker } from './http-tls.ts'
import type { PeerStore } from './peer-store.ts'
import type { PostHookQueue } from './post-hooks.ts'
import { createPostHookQueue } from './post-hooks.ts'
import type { TopologyConfig } from './topology.ts'
import { createTopology, levelCount } from './topology.ts'
import type { Tracker, TrackerConfig, TrackerRules } from './tracker.ts'
import { createTracker } from './tracker.ts'
import type { UdpFrontend } from './udp-frontend.ts'
import { startUdpFrontend } from './udp-frontend.ts'

export interface ListenAddress {
  readonly host: string
  readonly port: number
}

/** All that a tracker is made of, as plain data: threads get it as a message. */
export interface TrackerSettings {
  /** Random for each start. */
  readonly epoch: string
  readonly topology: TopologyConfig
  readonly config: TrackerConfig
  readonly prehooks: readonly HookEntry[]
  readonly posthooks: readonly HookEntry[]
  /** Where relative paths of modules begin. */
  readonly modulesDirectory: string
  readonly approval: TokenApprovalSettings | undefined
  readonly http: {
    readonly listeners: readonly (ListenAddress & { readonly tls: boolean })[]
    readonly settings: HttpListenerSettings
    readonly tls: TlsMaterial | undefined
    readonly proxyProtocol: boolean
  }
  readonly udp: {
    readonly addresses: readonly ListenAddress[]
    readonly privateKey: string
    readonly connectionIdLifetimeMs: number
    readonly maxClockSkewMs: number
  }
}

export interface TokenApprovalSettings {
  /** May scrape without a token. */
  readonly scrapeNetworks: readonly Cidr[]
  readonly issuer: string
  readonly audience: string
  readonly clockToleranceMs: number
  readonly acceptChihaya: boolean
  readonly ticketSecret: string
  /** Where the keys come from; undefined where the program has a verifier of its own. */
  readonly keySet: KeySetSource | undefined
}

/** Hooks that the program has made itself and disposes itself; they come after those of the settings. */
export interface GivenHooks {
  readonly prehooks: readonly PreHook[]
  readonly posthooks: readonly PostHook[]
}

export interface TrackerThreadDeps {
  readonly store: PeerStore
  readonly counters: TrackerCounters
  /** Several threads listen on the same ports. */
  readonly reusePort: boolean
  /** Checks tokens where the settings name no key set. */
  readonly verifier?: TokenVerifier | undefined
  readonly given?: GivenHooks | undefined
  readonly log: Logger
  /** Milliseconds since 1970. */
  readonly now: () => number
  /** Milliseconds of a clock that never goes back, with a fraction. */
  readonly monotonic: () => number
  readonly random: () => number
}

/** One thread's tracker with its frontends. */
export interface TrackerThread extends AsyncDisposable {
  readonly tracker: Tracker
  readonly addresses: { readonly http: readonly ListenAddress[]; readonly udp: readonly ListenAddress[] }
  readonly keySet: KeySetVerifier | undefined
  readonly postHooks: PostHookQueue | undefined
  /**
   * Makes all that other settings need: hooks and their lists, topology, limits, routes, certificates, keys. Addresses, the store and
   * what else belongs to a start stay. Rejects, with nothing changed, where they cannot be used.
   */
  prepare(settings: TrackerSettings): Promise<PreparedSettings>
  /** Shows another certificate to new connections. @throws Error when it cannot be used; then nothing has changed */
  setTls(material: TlsMaterial): void
  /** From now on each reply over HTTP is the last on its connection. */
  leave(): void
  /** Places hosts otherwise from their next announce on. With as many levels as before; @throws Error as `createTopology` does */
  setTopology(topology: TopologyConfig): void
}

/** Settings that can be put in force. Disposed before, they never are. */
export interface PreparedSettings extends AsyncDisposable {
  /** Puts them in force between two requests, without closing a socket or losing a swarm. */
  commit(): Promise<void>
}

/** How fresh the number of connections is in the metrics. */
const tellEveryMs = 1000

/** @throws Error naming the hook, address or key set that cannot be used */
export async function startTrackerThread(
  settings: TrackerSettings,
  deps: TrackerThreadDeps,
): Promise<TrackerThread> {
  await using started = new AsyncDisposableStack()
  const { store, counters, log, random, now } = deps
  const keySet = settings.approval?.keySet
    ? started.use(await openKeySet(settings.approval, settings.approval.keySet, deps))
    : undefined
  const verifier = deps.verifier ?? keySet
  let chain = await createHookChain(settings.prehooks, settings.modulesDirectory, { log, now, random })
  started.defer(() => chain[Symbol.asyncDispose]())
  const posthooks = [
    ...(await createPostHooks(settings.posthooks, settings.modulesDirectory, { log, now, random })),
    ...(deps.given?.posthooks ?? []),
  ]
  const postHooks = posthooks.length > 0 ? started.use(createPostHookQueue(posthooks, log)) : undefined
  let rules = rulesOf(settings, chain, verifier, deps)
  const tracker = createTracker({
    store,
    rules,
    after: postHooks,
    epoch: settings.epoch,
    now: deps.monotonic,
    observer: counters,
    log,
  })
  const listeners: HttpListener[] = []
  for (const { host, port, tls } of settings.http.listeners) {
    const { settings: own, proxyProtocol, tls: material } = settings.http
    listeners.push(
      started.use(
        await startHttpListener({
          ...own,
          host,
          port,
          reusePort: deps.reusePort,
          tls: tls ? material : undefined,
          proxyProtocol,
          tracker,
          log,
        }),
      ),
    )
  }
  const udp: UdpFrontend[] = []
  const { addresses, privateKey, connectionIdLifetimeMs, maxClockSkewMs } = settings.udp
  for (const address of addresses) {
    udp.push(
      started.use(
        await startUdpFrontend({
          address,
          ipv6Only: addresses.some(({ host }) => !host.includes(':')),
          reusePort: deps.reusePort,
          tracker,
          connectionIds: createConnectionIds({
            privateKey,
            lifetimeMs: connectionIdLifetimeMs,
            maxClockSkewMs,
          }),
          now,
          observer: counters,
          log,
        }),
      ),
    )
  }
  const telling = setInterval(() => {
    counters.connections(
      listeners.reduce((sum, { connections }) => sum + connections, 0),
      listeners.reduce((sum, { refused }) => sum + refused, 0),
    )
    const status = store.status?.()
    if (status) counters.store(status)
  }, tellEveryMs)
  telling.unref()
  started.defer(() => {
    clearInterval(telling)
  })
  const owned = started.move()
  return {
    tracker,
    addresses: { http: listeners.map(({ address }) => address), udp: udp.map(({ address }) => address) },
    keySet,
    postHooks,
    prepare: async (next) => {
      checkChange(settings, next)
      const nextChain = await createHookChain(next.prehooks, next.modulesDirectory, { log, now, random })
      await using made = new AsyncDisposableStack()
      made.use(nextChain)
      const nextRules = rulesOf(next, nextChain, verifier, deps)
      await reloadKeys(keySet, settings, log)
      const unused = made.move()
      return {
        commit: async () => {
          unused.move()
          for (const [i, listener] of listeners.entries()) {
            listener.update(next.http.settings)
            if (next.http.tls && settings.http.listeners[i]?.tls === true) listener.setTls(next.http.tls)
          }
          rules = nextRules
          tracker.replaceRules(rules)
          const before = chain
          chain = nextChain
          try {
            await before[Symbol.asyncDispose]()
          } catch (error) {
            log.warn({ err: error }, 'hook that is not needed any more did not end in order')
          }
        },
        [Symbol.asyncDispose]: () => unused.disposeAsync(),
      }
    },
    leave: () => {
      for (const listener of listeners) listener.leave()
    },
    setTls: (material) => {
      checkTls(material)
      for (const [i, listener] of listeners.entries())
        if (settings.http.listeners[i]?.tls === true) listener.setTls(material)
    },
    setTopology: (topology) => {
      rules = { ...rules, topology: createTopology(topology) }
      tracker.replaceRules(rules)
    },
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

/** @throws Error naming what cannot be used, or not without a restart */
function checkChange(before: TrackerSettings, next: TrackerSettings): void {
  if (levelCount(next.topology) !== levelCount(before.topology))
    throw new Error('topology.levels: another number of levels needs a restart')
  compileRoutes(next.http.settings.routes)
  if (next.http.tls) checkTls(next.http.tls)
}

/** @throws Error when certificate and key cannot be read or do not belong together */
function checkTls(material: TlsMaterial): void {
  createTlsHandshaker(material, () => undefined)
}

/** A file that cannot be used is a fault of whoever reloads; a URL that does not answer is none, and the last good keys stay. */
async function reloadKeys(
  keySet: KeySetVerifier | undefined,
  { approval }: TrackerSettings,
  log: Logger,
): Promise<void> {
  try {
    await keySet?.reload()
  } catch (error) {
    if (approval?.keySet === undefined || 'file' in approval.keySet) throw error
    log.warn({ err: error }, 'keys were not fetched; the last good ones stay in force')
  }
}

/** @throws Error where tokens are asked for and nothing can check them */
function rulesOf(
  { topology, config, approval }: TrackerSettings,
  chain: HookChain,
  verifier: TokenVerifier | undefined,
  { counters, given, log }: TrackerThreadDeps,
): TrackerRules {
  if (approval && !verifier)
    throw new Error(
      'tracker.approval: token needs a restart of a tracker that was started with none: it has no keys',
    )
  const token =
    approval && verifier
      ? [
          tokenApproval({
            verifier,
            scrapeNetworks: approval.scrapeNetworks,
            refused: (fault) => {
              counters.tokenRefused(fault)
            },
            log,
          }),
        ]
      : []
  return {
    topology: createTopology(topology),
    config,
    hooks: [...token, ...chain.hooks, ...(given?.prehooks ?? [])],
  }
}

async function openKeySet(
  { ticketSecret, ...trust }: TokenApprovalSettings,
  keySet: KeySetSource,
  { log, now, random }: TrackerThreadDeps,
): Promise<KeySetVerifier> {
  return openKeySetVerifier({ ...trust, keySet, tickets: createTickets(ticketSecret), log, now, random })
}
