import { createHash, randomBytes, timingSafeEqual } from 'node:crypto'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import { LRUCache } from 'lru-cache'
import type {
  BootstrapTokenList,
  CreatedBootstrapToken,
  HostCredential,
  HostList,
} from '../../lib/client/api.ts'
import { CreateBootstrapTokenRequest, EnrollRequest } from '../../lib/client/api.ts'
import type { Ip } from '../../lib/protocol/address.ts'
import { formatIp } from '../../lib/protocol/address.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { TokenMinter } from '../../lib/token/token-authority.ts'
import { sweepEntries } from '../state/entries.ts'
import type { StateEntry, StateStore } from '../state/state-store.ts'
import { VersionConflict } from '../state/state-store.ts'
import { requireAdmin } from './access-control.ts'
import type { AccessControl } from './access.ts'
import type { Actor, Audit } from './audit.ts'
import { covers } from '../../lib/protocol/reference.ts'
import { ApiError } from './api-error.ts'
import type { EnrolledHosts } from './enrolled-hosts.ts'
import type { HostRecord } from './host-recall.ts'
import type { FleetView } from './shared/fleet-view.ts'
import type { Revocations } from './revocations.ts'
import { validate } from './validate.ts'

export interface EnrolmentDeps {
  readonly state: StateStore
  readonly access: AccessControl
  readonly minter: TokenMinter
  readonly revocations: Revocations
  readonly fleet: Pick<FleetView, 'seen' | 'forget'>
  readonly audit: Audit
  readonly enrolled: EnrolledHosts
  readonly hostTtlMs: number
  readonly hostsMax: number
  readonly sourceOf: (request: FastifyRequest) => Ip
  readonly now: () => number
  readonly log: Logger
}

interface BootstrapRecord {
  readonly secretSha256: string
  readonly places: 'any' | readonly string[]
  readonly repositories: readonly string[]
  readonly usesLeft: number | undefined
  readonly expiresAt: string
}

const bootstrapTtlMsDefault = 30 * 86_400_000
/** Wrong bootstrap tokens an address may try in a minute; a secret of 192 bits needs no less, the log does. */
const failuresPerMinuteMax = 20
const casTriesMax = 20
/** Credentials of one host that count at once: it renews at two thirds of a life, and may have been set up anew a few times. */
const credentialsMax = 10
const bootstrapListed = 10_000
/** The names stand in the host's credential, and that has a length. */
const repositoriesBytesMax = 2000

/** In a line of the audit log. */
const repositoriesTold = 20

/** How hosts join, renew, and are turned away. */
export function registerEnrolmentRoutes(app: FastifyInstance, deps: EnrolmentDeps): void {
  const { state, access, revocations, audit, now, log } = deps
  const failures = new LRUCache<string, { count: number; sinceMs: number }>({ max: 10_000 })

  app.post('/api/v1/enroll', async (request): Promise<HostCredential> => {
    const { bootstrapToken, host, place } = validate(EnrollRequest, request.body)
    const address = formatIp(deps.sourceOf(request))
    refuseAfterFailures(failures, address, now())
    const bootstrap = await findBootstrap(state, bootstrapToken, now())
    if (!bootstrap) {
      countFailure(failures, address, now())
      throw new ApiError(
        401,
        'UNAUTHORIZED',
        'Cannot enrol: the bootstrap token is wrong, used up or expired',
        {
          hint: 'Make one with `deployctl token bootstrap` and put it into bootstrap_token_file.',
        },
      )
    }
    const record = bootstrap.value as BootstrapRecord
    if (place !== undefined && record.places !== 'any' && !record.places.includes(place)) {
      throw new ApiError(
        403,
        'PLACE_NOT_ALLOWED',
        `Cannot enrol ${host}: its bootstrap token does not let it claim the place ${place}`,
        {
          hint: `Remove \`place\` from agent.yaml, so that the address decides, or use a token made with --places ${place}.`,
        },
      )
    }
    const known = (await state.get(`hosts/${host}`))?.value as HostRecord | undefined
    if (known) checkReturn(host, known, record)
    else deps.enrolled.checkRoom(host)
    if (known) log.warn({ host, address }, 'a host that was enrolled enrols again')
    const id = bootstrap.key.slice('bootstrap/'.length)
    const bearer = { kind: 'bootstrap', name: id, credential: { id } }
    return issue(deps, host, request, bearer, {
      first: () => spend(state, bootstrap, now()),
      place,
      repositories: record.repositories,
      address,
      enrolledAt: new Date(now()).toISOString(),
    })
  })

  app.post('/api/v1/hosts/self/renew', async (request): Promise<HostCredential> => {
    const caller = await access.callerOf(request.headers)
    if (caller.kind !== 'host') throw new ApiError(403, 'DENIED', 'Only a host renews its credential')
    // The credential alone proves the enrolment and says what it covers: a database that was lost loses no host, and
    // who enrols under another's name gets nothing of what that one has.
    return issue(deps, caller.name, request, caller, {
      place: caller.place,
      repositories: caller.scopes.map((scope) => scope.slice('pull:'.length)),
      address: formatIp(deps.sourceOf(request)),
      enrolledAt: undefined,
    })
  })

  app.post('/api/v1/bootstrap-tokens', async (request, reply): Promise<CreatedBootstrapToken> => {
    const caller = await requireAdmin(access, request)
    const asked = validate(CreateBootstrapTokenRequest, request.body)
    const repositoriesBytes = JSON.stringify(asked.repositories ?? []).length
    if (repositoriesBytes > repositoriesBytesMax)
      throw new ApiError(
        400,
        'BAD_REQUEST',
        `Cannot use repositories: ${repositoriesBytes} bytes of names do not fit into a credential, at most ${repositoriesBytesMax}`,
        { hint: 'Name a prefix, such as team/*, instead of each repository.' },
      )
    void reply.code(201)
    const id = bootstrapId()
    const { places = [], repositories, usesMax } = asked
    const act = {
      action: 'bootstrap.create',
      target: id,
      details: { places, repositories, usesMax },
    } as const
    return audit(request, caller, act, () =>
      createBootstrapToken(deps, {
        id,
        places,
        repositories,
        usesMax,
        ttlMs: asked.ttlSeconds === undefined ? bootstrapTtlMsDefault : asked.ttlSeconds * 1000,
      }),
    )
  })

  app.get('/api/v1/hosts', async (request): Promise<HostList> => {
    await requireAdmin(access, request)
    const entries = await state.list('hosts/', { limit: deps.hostsMax })
    const lastSeen = await deps.fleet.seen()
    return {
      hosts: entries.map(({ key, value }) => {
        const host = key.slice('hosts/'.length)
        const { place, address, enrolledAt, revoked } = value as HostRecord
        const seen = lastSeen.get(host)
        return {
          host,
          place: seen?.place ?? place ?? 'unknown',
          address,
          enrolledAt,
          revoked,
          ...(seen ? { seenAt: new Date(seen.atMs).toISOString(), agentVersion: seen.agentVersion } : {}),
        }
      }),
    }
  })

  app.get('/api/v1/bootstrap-tokens', async (request): Promise<BootstrapTokenList> => {
    await requireAdmin(access, request)
    const entries = await state.list('bootstrap/', { limit: bootstrapListed })
    return {
      bootstrapTokens: entries.map(({ key, value }) => {
        const { places, repositories, usesLeft, expiresAt } = value as BootstrapRecord
        const id = key.slice('bootstrap/'.length)
        return {
          id,
          places: places === 'any' ? places : [...places],
          repositories: [...repositories],
          expiresAt,
          ...(usesLeft === undefined ? {} : { usesLeft }),
        }
      }),
    }
  })
  app.delete<{ Params: { id: string } }>('/api/v1/bootstrap-tokens/:id', async (request, reply) => {
    const caller = await requireAdmin(access, request)
    const { id } = request.params
    if (!(await state.get(`bootstrap/${id}`)))
      throw new ApiError(404, 'NOT_FOUND', `There is no bootstrap token ${id}`, {
        hint: '`deployctl token list` shows them.',
      })
    await audit(request, caller, { action: 'bootstrap.revoke', target: id }, () =>
      state.delete(`bootstrap/${id}`),
    )
    log.info({ bootstrap: id }, 'bootstrap token revoked')
    return reply.code(204).send()
  })

  /** `?forget=1` after a revocation: the name may be enrolled again. */
  app.delete<{ Params: { host: string }; Querystring: { forget?: string } }>(
    '/api/v1/hosts/:host',
    async (request, reply) => {
      const caller = await requireAdmin(access, request)
      const { host } = request.params
      const forget = request.query.forget === '1'
      const change = async (record: HostRecord, entry: StateEntry) => {
        if (forget) {
          if (!record.revoked)
            throw new ApiError(409, 'NOT_REVOKED', `Cannot forget ${host}: its credential still counts`, {
              hint: `Revoke it first: deployctl hosts revoke ${host}`,
            })
          await state.delete(entry.key, { ifVersion: entry.version })
          return
        }
        await state.put(entry.key, { ...record, revoked: true } satisfies HostRecord, {
          ifVersion: entry.version,
        })
        for (const { id, expiresAt } of record.credentials) await revocations.revoke(id, new Date(expiresAt))
      }
      const act = { action: forget ? 'host.forget' : 'host.revoke', target: host } as const
      await audit(request, caller, act, () => changeHost(state, host, change))
      deps.fleet.forget([host])
      log.info({ host }, forget ? 'host forgotten' : 'host revoked')
      return reply.code(204).send()
    },
  )
}

/** A name that is taken is given again only to who may have as much, and not at all once it was revoked. @throws ApiError */
function checkReturn(host: string, known: HostRecord, bootstrap: BootstrapRecord): void {
  if (known.revoked)
    throw new ApiError(403, 'REVOKED', `Cannot enrol ${host}: it was revoked`, {
      hint: `If it may come back: deployctl hosts forget ${host}`,
    })
  const isCovered = (wanted: string) => bootstrap.repositories.some((pattern) => covers(pattern, wanted))
  if (known.repositories.every(isCovered)) return
  throw new ApiError(
    409,
    'HOST_EXISTS',
    `Cannot enrol ${host}: a host of that name is enrolled for more repositories than this bootstrap token is`,
    {
      hint: `Use another name, or, if it is the same host: deployctl hosts revoke ${host}, then deployctl hosts forget ${host}.`,
    },
  )
}

/** Reads a host's record and writes it, again where somebody else wrote in between. @throws ApiError 404 */
async function changeHost(
  state: StateStore,
  host: string,
  change: (record: HostRecord, entry: StateEntry) => Promise<void>,
): Promise<void> {
  for (let tries = 0; tries < casTriesMax; tries++) {
    const entry = await state.get(`hosts/${host}`)
    if (!entry)
      throw new ApiError(404, 'NOT_FOUND', `There is no host ${host}`, {
        hint: '`deployctl hosts` shows them.',
      })
    try {
      await change(entry.value as HostRecord, entry)
      return
    } catch (error) {
      if (!(error instanceof VersionConflict)) throw error
    }
  }
  throw new ApiError(409, 'CONFLICT', `Cannot change ${host}: others are changing it`)
}

/** Makes a bootstrap token; only the hash of its secret is kept. */
export async function createBootstrapToken(
  { state, now }: Pick<EnrolmentDeps, 'state' | 'now'>,
  options: {
    id?: string
    places: 'any' | readonly string[]
    repositories?: readonly string[] | undefined
    usesMax?: number | undefined
    ttlMs: number
  },
): Promise<CreatedBootstrapToken> {
  const { id = bootstrapId() } = options
  const secret = randomBytes(24).toString('base64url')
  const expiresAt = new Date(now() + options.ttlMs).toISOString()
  const record: BootstrapRecord = {
    secretSha256: sha256(secret),
    places: options.places,
    repositories: options.repositories ?? ['*'],
    usesLeft: options.usesMax,
    expiresAt,
  }
  await state.put(`bootstrap/${id}`, record, { ifVersion: 0 })
  return { id, bootstrapToken: `rsb_${id}_${secret}`, expiresAt }
}

/** Forgets bootstrap tokens that are used up, or expired before `expiredBeforeMs`. @returns how many */
export async function sweepBootstrapTokens(
  state: StateStore,
  expiredBeforeMs: number,
  signal: AbortSignal,
): Promise<number> {
  const isOver = (value: unknown) => {
    const { usesLeft, expiresAt } = value as BootstrapRecord
    return usesLeft === 0 || Date.parse(expiresAt) < expiredBeforeMs
  }
  return sweepEntries(state, 'bootstrap/', isOver, signal)
}

/** Stands in the token, and is no secret. */
function bootstrapId(): string {
  return randomBytes(6).toString('hex')
}

/**
 * Mints a host's credential and records it, beside those that may still live: all that is recorded a revocation ends, so what no
 * longer fits is ended now.
 *
 * @throws ApiError `REVOKED` where the host was revoked, be it at this moment
 */
async function issue(
  { state, minter, revocations, enrolled, audit, hostTtlMs, now }: EnrolmentDeps,
  host: string,
  request: FastifyRequest,
  actor: Actor,
  {
    first,
    ...known
  }: Pick<HostRecord, 'place' | 'repositories' | 'address'> & {
    enrolledAt: string | undefined
    /** What must have been done before. */
    first?: () => Promise<void>
  },
): Promise<HostCredential> {
  const { place, repositories } = known
  const { token, id, expiresAt } = await minter.mintHost({ host, place, repositories, ttlMs: hostTtlMs })
  const record = async (): Promise<HostCredential> => {
    await first?.()
    for (let tries = 0; tries < casTriesMax; tries++) {
      const entry = await state.get(`hosts/${host}`)
      const before = entry?.value as HostRecord | undefined
      if (before?.revoked === true) throw new ApiError(403, 'REVOKED', `${host} was revoked`)
      const alive = (before?.credentials ?? []).filter((one) => Date.parse(one.expiresAt) > now())
      const next: HostRecord = {
        ...known,
        enrolledAt: known.enrolledAt ?? before?.enrolledAt ?? new Date(now()).toISOString(),
        credentials: [...alive, { id, expiresAt: expiresAt.toISOString() }].slice(-credentialsMax),
        revoked: false,
      }
      try {
        // A host whose record was lost renews as before.
        if (known.enrolledAt === undefined)
          await state.put(`hosts/${host}`, next, { ifVersion: entry?.version ?? 0 })
        else await enrolled.write(host, next, entry?.version ?? 0)
        for (const old of alive.slice(0, Math.max(0, alive.length + 1 - credentialsMax)))
          await revocations.revoke(old.id, new Date(old.expiresAt))
        return {
          host,
          credential: token,
          expiresAt: expiresAt.toISOString(),
          ...(place === undefined ? {} : { place }),
        }
      } catch (error) {
        if (!(error instanceof VersionConflict)) throw error
      }
    }
    throw new ApiError(409, 'CONFLICT', `Cannot enrol ${host}: others are enrolling under this name`)
  }
  const details = { credential: id, place, repositories: repositories.slice(0, repositoriesTold) }
  const action = known.enrolledAt === undefined ? 'host.renew' : 'host.enrol'
  return audit(request, actor, { action, target: host, details }, record)
}

async function findBootstrap(
  state: StateStore,
  token: string,
  nowMs: number,
): Promise<StateEntry | undefined> {
  const [, id, secret] = /^rsb_([0-9a-f]{12})_([A-Za-z0-9_-]{20,64})$/.exec(token) ?? []
  if (id === undefined || secret === undefined) return undefined
  const entry = await state.get(`bootstrap/${id}`)
  if (!entry) return undefined
  const record = entry.value as BootstrapRecord
  if (!timingSafeEqual(Buffer.from(record.secretSha256), Buffer.from(sha256(secret)))) return undefined
  return Date.parse(record.expiresAt) > nowMs && record.usesLeft !== 0 ? entry : undefined
}

/** Takes one use of a token that has a number of them; hosts that enrol at once each take their own. */
async function spend(state: StateStore, found: StateEntry, nowMs: number): Promise<void> {
  let entry: StateEntry | undefined = found
  for (let tries = 0; tries < casTriesMax && entry; tries++) {
    const record = entry.value as BootstrapRecord
    if (record.usesLeft === undefined) return
    if (record.usesLeft < 1 || Date.parse(record.expiresAt) <= nowMs) break
    try {
      await state.put(entry.key, { ...record, usesLeft: record.usesLeft - 1 } satisfies BootstrapRecord, {
        ifVersion: entry.version,
      })
      return
    } catch (error) {
      if (!(error instanceof VersionConflict)) throw error
      entry = await state.get(entry.key)
    }
  }
  throw new ApiError(401, 'UNAUTHORIZED', 'Cannot enrol: the bootstrap token is used up')
}

type Failures = LRUCache<string, { count: number; sinceMs: number }>

function refuseAfterFailures(failures: Failures, address: string, nowMs: number): void {
  const failed = failures.get(address)
  if (failed && nowMs - failed.sinceMs < 60_000 && failed.count >= failuresPerMinuteMax) {
    throw new ApiError(
      429,
      'TOO_MANY_FAILURES',
      'Cannot enrol: too many wrong bootstrap tokens from this address',
      { headers: { 'retry-after': '60' } },
    )
  }
}

function countFailure(failures: Failures, address: string, nowMs: number): void {
  const failed = failures.get(address)
  if (!failed || nowMs - failed.sinceMs >= 60_000) failures.set(address, { count: 1, sinceMs: nowMs })
  else failed.count++
}

function sha256(text: string): string {
  return createHash('sha256').update(text).digest('hex')
}
