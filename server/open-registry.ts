import { randomBytes } from 'node:crypto'
import { access, constants, readFile } from 'node:fs/promises'
import { hostname } from 'node:os'
import { join } from 'node:path'
import { startFileClock } from '../lib/runtime/file-clock.ts'
import { createFileAtomic, makeDirectory } from '../lib/runtime/files.ts'
import type { Logger } from '../lib/runtime/log.ts'
import type { TokenAuthority, Trust } from '../lib/token/token-authority.ts'
import { openTokenAuthority } from '../lib/token/token-authority.ts'
import { createTickets } from '../lib/token/ticket.ts'
import type { ServerConfig } from './config.ts'
import type { ReadinessCheck } from './health.ts'
import { succeeds, succeedsInTime } from './health.ts'
import type { ServerMetrics } from './metrics.ts'
import type { RedisConnection } from './redis/connection.ts'
import type { AuditLog, SharedAuditLogs } from './registry/audit-log.ts'
import { openAuditLog, openSharedAuditLogs } from './registry/audit-log.ts'
import type { BlobStore } from './registry/blob-store.ts'
import { startDiskBlobStore } from './registry/disk-blob-store.ts'
import type { Revocations } from './registry/revocations.ts'
import { loadRevocations } from './registry/revocations.ts'
import type { RevokedTorrents } from './registry/revoked-torrents.ts'
import { loadRevokedTorrents } from './registry/revoked-torrents.ts'
import { ensureFirstTokens } from './registry/tokens.ts'
import { openRedisStateStore } from './state/redis-state-store.ts'
import { openSqliteStateStore } from './state/sqlite-state-store.ts'
import { takeOver } from './state/state-copy.ts'
import type { StateStore } from './state/state-store.ts'

/** What a registry keeps: its state, keys, blobs and audit log. */
export interface OpenedRegistry extends AsyncDisposable {
  readonly state: StateStore
  readonly revocations: Revocations
  readonly revokedTorrents: RevokedTorrents
  readonly auditLog: AuditLog
  /** Those of all servers, where they lie in one directory. */
  readonly auditLogs: SharedAuditLogs | undefined
  readonly authority: TokenAuthority
  readonly store: BlobStore
  /** What the times of files are to be compared with. */
  readonly storeNow: () => number
  /** What this server is called among those that share the directory. */
  readonly serverName: string
  /** Whether several servers share the directory. */
  readonly isShared: boolean
}

export interface OpenRegistryDeps {
  readonly log: Logger
  readonly now: () => number
  readonly directory: string
  readonly trust: Pick<Trust, 'issuer' | 'audience' | 'clockToleranceMs'>
  readonly ticketSecret: string
  readonly redis: RedisConnection | undefined
  readonly metrics: ServerMetrics
  /** Where `/readyz` finds what is to be asked of the state and the blobs. */
  readonly checks: Record<string, ReadinessCheck>
  readonly signal?: AbortSignal | undefined
}

/** Opens what a registry keeps, or makes it at the first start, with the first tokens. */
export async function openRegistry(config: ServerConfig, deps: OpenRegistryDeps): Promise<OpenedRegistry> {
  await using started = new AsyncDisposableStack()
  const { log, now, trust } = deps
  const state = started.use(await openState(config, deps))
  const places = await openPlaces(config, deps.directory)
  const { name: serverName, settleMs } = places
  const isShared = settleMs !== undefined
  // What is in a directory that several servers share has the time of the file server, whatever their clocks say.
  const clock = isShared
    ? started.use(await startFileClock(places.store, { name: serverName, now, log }))
    : undefined
  const storeNow = clock ? () => clock.now() : now
  const revocations = started.use(
    await loadRevocations({ state, clockToleranceMs: trust.clockToleranceMs, now, log }),
  )
  const revokedTorrents = started.use(await loadRevokedTorrents({ state, now, log }))
  const auditLog = started.use(
    await openAuditLog({
      directory: places.audit,
      fileMaxBytes: config.registry.audit.file_max,
      filesMax: config.registry.audit.files_max,
      now,
      log,
    }),
  )
  const authority = started.use(
    await openTokenAuthority({
      ...trust,
      keysDirectory: join(places.store, 'keys'),
      settleMs,
      algorithm: config.tokens.algorithm,
      tickets: createTickets(deps.ticketSecret),
      acceptChihaya: config.tokens.compat === 'chihaya',
      isRevoked: (id) => revocations.isRevoked(id),
      isTorrentRevoked: (infoHash) => revokedTorrents.has(infoHash),
      leadMs: config.tokens.key_lead,
      rotationMs: config.tokens.key_rotation,
      now,
      log,
      aroundChange: ({ kind, kid }, work) =>
        auditLog.around(
          { who: { kind: 'server', name: 'key rotation' }, action: `key.${kind}`, target: kid },
          work,
        ),
    }),
  )
  const store = started.use(
    await startDiskBlobStore({
      directory: places.store,
      settleMs,
      blobMaxBytes: config.registry.blob_max,
      uploadsMax: config.registry.uploads_max,
      uploadTtlMs: config.registry.upload_ttl,
      diskReserveBytes: config.registry.disk_reserve,
      now: storeNow,
      log,
    }),
  )
  await ensureFirstTokens({
    directory: places.store,
    shared: isShared,
    minter: authority.minter,
    state,
    places: config.enrolment.first_token_places,
    auditLog,
    now,
    log,
  })
  deps.checks['blobs'] = succeedsInTime(() => access(places.store, constants.W_OK))
  const owned = started.move()
  return {
    state,
    revocations,
    revokedTorrents,
    auditLog,
    auditLogs:
      places.audits === undefined
        ? undefined
        : openSharedAuditLogs(places.audits, { name: serverName, log: auditLog }),
    authority,
    store,
    storeNow,
    serverName,
    isShared,
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

/** The state, and what readiness says of it. */
async function openState(
  config: ServerConfig,
  { redis, directory, checks, metrics, signal, log }: OpenRegistryDeps,
): Promise<StateStore> {
  const own = join(directory, 'state.sqlite')
  if (config.state.name === 'redis' && redis) {
    checks['state'] = () => 'waiting for Redis'
    const file = join(directory, 'state-copy.sqlite')
    if (await takeOver(own, file, { from: config.server_name ?? hostname() }))
      log.warn(
        { file: own },
        'the state in this file is not used: this server shares the one in Redis already',
      )
    const shared = await openRedisStateStore({ redis, file, signal }, { log })
    checks['state'] = () => {
      const fault = shared.fault()
      return fault === undefined ? undefined : { degraded: fault }
    }
    metrics.watchSharedState(shared)
    return shared
  }
  const state = await openSqliteStateStore({ file: own })
  checks['state'] = succeeds(() => state.get('hosts/'))
  return state
}

interface Places {
  readonly name: string
  readonly store: string
  readonly audit: string
  /** With a directory for the log of each server. */
  readonly audits?: string
  /** How soon the others see what one server writes; undefined where there are no others. */
  readonly settleMs?: number
}

/** Where things are: of this server alone in `data_dir`, or in a directory that several servers share. */
async function openPlaces(config: ServerConfig, directory: string): Promise<Places> {
  const { shared_dir: sharedDirectory, shared_settle: settleMs } = config.registry
  const name = config.server_name ?? (await ownName(directory))
  if (sharedDirectory === undefined) return { name, store: directory, audit: directory }
  const audits = join(sharedDirectory, 'audit')
  const audit = join(audits, name)
  await makeDirectory(audit, 0o700)
  return { name, store: sharedDirectory, audit, audits, settleMs }
}

/** The name of the machine, and something random: a directory belongs to one server. */
async function ownName(directory: string): Promise<string> {
  const file = join(directory, 'server-name')
  const machine = hostname()
    .replace(/[^A-Za-z0-9.-]/g, '-')
    .replace(/^[^A-Za-z0-9]+/, '')
    .slice(0, 50)
  await createFileAtomic(file, `${machine || 'server'}-${randomBytes(3).toString('hex')}\n`)
  return (await readFile(file, 'utf8')).trim()
}
