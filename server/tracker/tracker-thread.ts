import type { Cidr } from '../../lib/protocol/cidr.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { TokenVerifier } from '../../lib/token/claims.ts'
import type { KeySetSource } from '../../lib/token/key-set.ts'
import { createTickets } from '../../lib/token/ticket.ts'
import type { KeySetVerifier } from '../../lib/token/token-authority.ts'
import { openKeySetVerifier } from '../../lib/token/token-authority.ts'
import { createConnectionIds } from './connection-id.ts'
import type { TrackerCounters } from './counters.ts'
import type { HookChain, HookEntry } from './hook-chain.ts'
import { createHookChain, createPostHooks } from './hook-chain.ts'
import { tokenApproval } from './hooks/token.ts'
import type { HttpListener, HttpListenerSettings } from './http-listener.ts'
import { startHttpListener } from './http-listener.ts'
import type { TlsMaterial } from './http-tls.ts'
import type { PeerStore } from './peer-store.ts'
import type { PostHookQueue } from './post-hooks.ts'
import { createPostHookQueue } from './post-hooks.ts'
import type { TopologyConfig } from './topology.ts'
import { createTopology } from './topology.ts'
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

export interface TrackerThreadDeps {
  readonly store: PeerStore
  readonly counters: TrackerCounters
  /** Several threads listen on the same ports. */
  readonly reusePort: boolean
  /** Checks tokens where the settings name no key set. */
  readonly verifier?: TokenVerifier | undefined
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
  connections(): { open: number; refused: number }
  /**
   * Puts other settings in force, between two requests: hooks and their lists, topology, limits, routes, certificates, keys. Addresses,
   * the store and what belongs to a start stay. Rejects, with nothing changed, where they cannot be used.
   */
  reload(settings: TrackerSettings): Promise<void>
}

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
  const postHooks =
    settings.posthooks.length > 0
      ? started.use(
          createPostHookQueue(
            await createPostHooks(settings.posthooks, settings.modulesDirectory, { log, now, random }),
            log,
          ),
        )
      : undefined
  const tracker = createTracker({
    store,
    rules: rulesOf(settings, chain, verifier, deps),
    after: postHooks,
    epoch: settings.epoch,
    random,
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
  const owned = started.move()
  return {
    tracker,
    addresses: { http: listeners.map(({ address }) => address), udp: udp.map(({ address }) => address) },
    keySet,
    postHooks,
    connections: () => ({
      open: listeners.reduce((sum, { connections }) => sum + connections, 0),
      refused: listeners.reduce((sum, { refused }) => sum + refused, 0),
    }),
    reload: async (next) => {
      const nextChain = await createHookChain(next.prehooks, next.modulesDirectory, { log, now, random })
      try {
        const rules = rulesOf(next, nextChain, verifier, deps)
        if (rules.topology.levels !== createTopology(settings.topology).levels)
          throw new Error('topology.levels: another number of levels needs a restart')
        for (const [i, listener] of listeners.entries()) {
          listener.update(next.http.settings)
          if (next.http.tls && settings.http.listeners[i]?.tls === true) listener.setTls(next.http.tls)
        }
        await keySet?.reload()
        tracker.replaceRules(rules)
      } catch (error) {
        await nextChain[Symbol.asyncDispose]()
        throw error
      }
      const before = chain
      chain = nextChain
      await before[Symbol.asyncDispose]()
    },
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

function rulesOf(
  { topology, config, approval }: TrackerSettings,
  chain: HookChain,
  verifier: TokenVerifier | undefined,
  { counters, log }: TrackerThreadDeps,
): TrackerRules {
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
  return { topology: createTopology(topology), config, hooks: [...token, ...chain.hooks] }
}

async function openKeySet(
  { ticketSecret, ...trust }: TokenApprovalSettings,
  keySet: KeySetSource,
  { log, now, random }: TrackerThreadDeps,
): Promise<KeySetVerifier> {
  return openKeySetVerifier({ ...trust, keySet, tickets: createTickets(ticketSecret), log, now, random })
}
