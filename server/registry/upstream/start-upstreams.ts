import { readFile } from 'node:fs/promises'
import type { FastifyInstance } from 'fastify'
import { ConfigError } from '../../../lib/runtime/config.ts'
import type { Logger } from '../../../lib/runtime/log.ts'
import { readSecret } from '../../../lib/runtime/secret-file.ts'
import type { OnOneServer } from '../../state/on-one-server.ts'
import type { StateStore } from '../../state/state-store.ts'
import type { AccessControl } from '../access.ts'
import type { AuditLog } from '../audit-log.ts'
import type { BlobStore } from '../blob-store.ts'
import type { EventObserver, EventQueue } from './event-queue.ts'
import { startEventQueue } from './event-queue.ts'
import { registerNotificationRoutes } from './notification-routes.ts'
import type { PreheatDeps } from './preheat-routes.ts'
import { registerPreheatRoutes } from './preheat-routes.ts'
import type { PullThrough, PullThroughObserver } from './pull-through.ts'
import { createPullThrough } from './pull-through.ts'
import { startReconcile } from './reconcile.ts'
import type { Credential } from './token-flow.ts'
import { parseCredential } from './token-flow.ts'
import type { UpstreamClient } from './upstream-client.ts'
import { createUpstreamClient } from './upstream-client.ts'

/** `registry.upstreams` and what goes with it, as the configuration says it. */
export interface UpstreamSettings {
  readonly upstreams: readonly {
    readonly name: string
    readonly url: string
    readonly repositories: readonly string[]
    readonly credential_file?: string | undefined
    readonly ca?: string | undefined
  }[]
  readonly tag_ttl: number
  readonly reconcile_interval: number | 'off'
  readonly anonymous_notifications: boolean
  readonly manifest_max: number
  readonly blob_max: number
}

export interface UpstreamsDeps {
  readonly store: BlobStore
  readonly state: StateStore
  readonly inTurn: <Result>(repository: string, work: () => Promise<Result>) => Promise<Result>
  readonly onTag: (repository: string, tag: string) => void
  readonly auditLog: Pick<AuditLog, 'around'>
  readonly now: () => number
  readonly random: () => number
  /** What this server is called among those that share the state. */
  readonly serverName: string
  readonly onOneServer: OnOneServer
  readonly log: Logger
  readonly observer: PullThroughObserver & EventObserver & { watchQueue(queue: EventQueue): void }
}

/** Other registries: pulls from them when asked, when told, and at intervals. */
export interface Upstreams extends AsyncDisposable {
  readonly pullThrough: PullThrough
  /** Notifications and jobs. */
  registerRoutes(
    app: FastifyInstance,
    deps: { access: AccessControl; membersOf: PreheatDeps['membersOf'] },
  ): Promise<void>
}

/** @throws ConfigError naming the credential or certificate that cannot be read */
export async function startUpstreams(settings: UpstreamSettings, deps: UpstreamsDeps): Promise<Upstreams> {
  await using started = new AsyncDisposableStack()
  const { store, state, now, random, onOneServer, serverName, log, observer } = deps
  const upstreams: UpstreamClient[] = []
  for (const [i, { name, url, repositories, ca, credential_file: file }] of settings.upstreams.entries()) {
    const at = `registry.upstreams.${i}`
    const credential = credentialOf(file)
    // A file that cannot be used is told at the start, not at the first pull.
    await faultAt(`${at}.credential_file`, credential())
    const authority = ca === undefined ? undefined : await faultAt(`${at}.ca`, readFile(ca, 'utf8'))
    upstreams.push(
      createUpstreamClient({
        name,
        url: new URL(url),
        repositories,
        credential,
        ca: authority,
        manifestMaxBytes: settings.manifest_max,
        now,
        observer,
      }),
    )
  }
  const pullThrough = started.use(
    createPullThrough({
      ...deps,
      upstreams,
      tagTtlMs: settings.tag_ttl,
      blobMaxBytes: settings.blob_max,
    }),
  )
  const queue = started.use(
    await startEventQueue({ state, pullThrough, now, random, onOneServer, log, observer }),
  )
  observer.watchQueue(queue)
  if (settings.reconcile_interval !== 'off')
    started.use(
      startReconcile({
        upstreams,
        pullThrough,
        store,
        intervalMs: settings.reconcile_interval,
        random,
        onOneServer,
        log,
      }),
    )
  const owned = started.move()
  return {
    pullThrough,
    registerRoutes: async (app, { access, membersOf }) => {
      const shared = { access, anonymous: settings.anonymous_notifications, pullThrough, log }
      registerNotificationRoutes(app, { ...shared, queue, observer })
      owned.use(await registerPreheatRoutes(app, { ...shared, state, serverName, membersOf, now, random }))
    },
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

function credentialOf(file: string | undefined): () => Promise<Credential | undefined> {
  return async () => (file === undefined ? undefined : parseCredential(await readSecret(file)))
}

async function faultAt<Result>(path: string, work: Promise<Result>): Promise<Result> {
  try {
    return await work
  } catch (cause) {
    throw new ConfigError([`${path}: ${cause instanceof Error ? cause.message : String(cause)}`], { cause })
  }
}
