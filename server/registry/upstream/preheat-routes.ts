import type { FastifyInstance } from 'fastify'
import { z } from 'zod'
import type { Digest } from '../../../lib/protocol/digest.ts'
import { isRepository, isTag } from '../../../lib/protocol/reference.ts'
import type { Logger } from '../../../lib/runtime/log.ts'
import type { StateStore } from '../../state/state-store.ts'
import { VersionConflict } from '../../state/state-store.ts'
import { ApiError } from '../api-error.ts'
import type { FleetMember } from '../fleet.ts'
import { validate } from '../validate.ts'
import { keepTrying } from './keep-trying.ts'
import type { NotificationDeps } from './notification-routes.ts'
import { senderOf } from './notification-routes.ts'
import type { PullThrough } from './pull-through.ts'

export interface PreheatDeps extends Pick<NotificationDeps, 'access' | 'anonymous'> {
  readonly state: StateStore
  /** What this server is called among those that share the state: each goes on with its own jobs. */
  readonly serverName: string
  readonly pullThrough: Pick<PullThrough, 'pull' | 'upstreamOf'>
  /** Hosts that hold or fetch a digest, or follow a tag that points at it. */
  readonly membersOf: (repository: string, digest: Digest) => Promise<readonly FleetMember[]>
  readonly now: () => number
  readonly random: () => number
  readonly log: Logger
}

/** What Harbor's Dragonfly driver posts; what it says beyond this is of no use here. */
const PreheatRequest = z.looseObject({
  type: z.literal('preheat'),
  args: z.looseObject({
    type: z.literal('image').optional(),
    url: z.string().max(2000),
    headers: z.record(z.string(), z.string().max(8192)).nullish(),
    scope: z.string().max(64).nullish(),
  }),
})

interface Job {
  readonly id: number
  readonly server?: string | undefined
  readonly url: string
  readonly repository: string
  readonly reference: string
  readonly scope: string
  readonly createdAtMs: number
  readonly updatedAtMs: number
  readonly state: 'pulling' | 'pulled' | 'failed'
  readonly digest?: Digest | undefined
  readonly error?: string | undefined
}

interface Task {
  readonly url: string
  readonly hostname: string
  readonly ip: string
  readonly description?: string
}

/** Jobs kept; the oldest that has ended gives way. */
const jobsMax = 1000
/** A host that does not have it after this counts as failed. */
const hostsWaitMs = 60 * 60 * 1000
const prefix = 'preheat-jobs/'

/**
 * Dragonfly's API for jobs, as far as Harbor's driver calls it: `GET /healthy`, `POST /oapi/v1/jobs`, `GET /oapi/v1/jobs/:id`. A job pulls
 * an image from the upstream whose host is in its URL, and has succeeded when the hosts that follow it have it; with the scope
 * `single_seed_peer` when this server has it.
 *
 * The credential of a job goes to that upstream alone, and is kept in memory only: a job that a restart interrupted goes on with
 * the credential of the configuration.
 */
export async function registerPreheatRoutes(
  app: FastifyInstance,
  deps: PreheatDeps,
): Promise<AsyncDisposable> {
  const { state, pullThrough, serverName, now, log } = deps
  const ended = new AbortController()
  const running = new Set<Promise<void>>()
  const stored = await state.list(prefix, { limit: jobsMax })
  const jobs = new Map(stored.map(({ value }) => [(value as Job).id, value as Job]))
  let lastId = Math.max(0, ...jobs.keys())

  const save = async (job: Job): Promise<void> => {
    jobs.set(job.id, job)
    await state.put(keyOf(job.id), job)
  }
  /** Under the next number that no server has given. */
  const saveNew = async (fresh: Omit<Job, 'id'>): Promise<Job> => {
    for (;;) {
      const job: Job = { ...fresh, id: ++lastId }
      try {
        await state.put(keyOf(job.id), job, { ifVersion: 0 })
        jobs.set(job.id, job)
        return job
      } catch (error) {
        if (!(error instanceof VersionConflict)) throw error
      }
    }
  }
  const run = async (job: Job, authorization: string | undefined): Promise<void> => {
    const { id, repository, reference } = job
    try {
      const digest = await keepTrying(
        () => pullThrough.pull({ repository, reference, authorization, signal: ended.signal }),
        // Who posts a job waits for how it ends, and its credential does not live long.
        { sinceMs: job.createdAtMs, patient: false, signal: ended.signal },
        deps,
      )
      log.info({ job: id, repository, reference, digest }, 'preheat job pulled')
      await save({ ...job, state: 'pulled', digest, updatedAtMs: now() })
    } catch (error) {
      if (ended.signal.aborted) return
      log.error({ job: id, repository, reference, err: error }, 'preheat job failed')
      const message = error instanceof Error ? error.message : String(error)
      await save({ ...job, state: 'failed', error: message, updatedAtMs: now() })
    }
  }
  const begin = (job: Job, authorization?: string) => {
    const mine = run(job, authorization)
      .catch((error: unknown) => {
        if (!ended.signal.aborted) log.error({ err: error }, 'the end of a preheat job was not stored')
      })
      .finally(() => running.delete(mine))
    running.add(mine)
  }
  for (const job of jobs.values())
    if (job.state === 'pulling' && (job.server ?? serverName) === serverName) begin(job)

  const makeRoom = async () => {
    if (jobs.size < jobsMax) return
    const oldest = [...jobs.values()].find((job) => job.state !== 'pulling')
    if (!oldest)
      throw new ApiError(503, 'TOOMANYREQUESTS', `Cannot take the job: ${jobsMax} are under way`, {
        headers: { 'retry-after': '10' },
      })
    jobs.delete(oldest.id)
    await state.delete(keyOf(oldest.id))
  }

  app.get('/healthy', () => ({ status: 'ok' }))
  app.post('/oapi/v1/jobs', async (request) => {
    const sender = await senderOf(request, deps)
    const { args } = validate(PreheatRequest, request.body)
    const { host, repository, reference } = readImageUrl(args.url)
    sender.requirePublish(repository)
    const upstream = pullThrough.upstreamOf(repository)
    if (upstream?.host !== host)
      throw new ApiError(400, 'BAD_REQUEST', `Cannot pull ${repository} from ${host}: no upstream says so`, {
        hint: upstream
          ? `registry.upstreams has it at ${upstream.host}: the URL must have that host.`
          : 'Name the registry and the repository in registry.upstreams.',
      })
    const authorization = authorizationOf(args.headers ?? {})
    await makeRoom()
    const at = now()
    const job = await saveNew({
      server: serverName,
      url: args.url,
      repository,
      reference,
      scope: args.scope ?? '',
      createdAtMs: at,
      updatedAtMs: at,
      state: 'pulling',
    })
    begin(job, authorization)
    return describe(job, [], at)
  })
  app.get<{ Params: { id: string } }>('/oapi/v1/jobs/:id', async (request) => {
    const sender = await senderOf(request, deps)
    const id = /^\d{1,15}$/.test(request.params.id) ? Number(request.params.id) : 0
    // Another server may have taken it, and says in the state how it goes on.
    const job = (await state.get(keyOf(id)))?.value as Job | undefined
    if (!job) throw new ApiError(404, 'NOT_FOUND', `There is no job ${request.params.id.slice(0, 40)}`)
    sender.requirePublish(job.repository)
    const members = job.digest === undefined ? [] : await deps.membersOf(job.repository, job.digest)
    return describe(job, members, now())
  })
  return {
    [Symbol.asyncDispose]: async () => {
      ended.abort(new Error('the server is ending'))
      await Promise.all(running)
    },
  }
}

/** A job in Dragonfly's words, as Harbor reads them. */
function describe(job: Job, members: readonly FleetMember[], nowMs: number) {
  const overdue = job.state === 'pulled' && nowMs - job.updatedAtMs >= hostsWaitMs
  const tasks = (wanted: (state: FleetMember['held']['state']) => boolean): Task[] =>
    members
      .filter(({ held }) => wanted(held.state))
      .map(({ heard, held }) => ({
        url: job.url,
        hostname: heard.host,
        ip: heard.address,
        ...(held.reason === undefined ? {} : { description: held.reason }),
      }))
  const success = tasks((state) => state === 'held')
  const failure = tasks((state) => state === 'failed' || (overdue && state !== 'held'))
  const open = members.length - success.length - failure.length
  const state = stateOf(job, failure.length, open, nowMs)
  const timestamps = {
    created_at: new Date(job.createdAtMs).toISOString(),
    updated_at: new Date(job.updatedAtMs).toISOString(),
  }
  return {
    id: job.id,
    type: 'preheat',
    ...timestamps,
    state,
    args: { type: 'image', url: job.url, scope: job.scope },
    result: {
      job_states: [
        {
          ...timestamps,
          state,
          error: job.error ?? '',
          results: [{ success_tasks: success, failure_tasks: failure, scheduler_cluster_id: 1 }],
        },
      ],
    },
  }
}

function stateOf(job: Job, failed: number, open: number, nowMs: number): 'PENDING' | 'SUCCESS' | 'FAILURE' {
  if (job.state === 'failed') return 'FAILURE'
  // Its server has ended and did not come back.
  if (job.state === 'pulling' && nowMs - job.createdAtMs >= hostsWaitMs) return 'FAILURE'
  if (job.state === 'pulling') return 'PENDING'
  if (job.scope === 'single_seed_peer') return 'SUCCESS'
  if (open > 0) return 'PENDING'
  return failed > 0 ? 'FAILURE' : 'SUCCESS'
}

/** `https://HOST/v2/NAME/manifests/REFERENCE`. Nothing is fetched from it: it only says what to pull. @throws ApiError 400 */
function readImageUrl(text: string): { host: string; repository: string; reference: string } {
  const url = URL.parse(text)
  const [, repository = '', reference = ''] =
    /^\/v2\/(.+)\/manifests\/([^/]+)$/.exec(url?.pathname ?? '') ?? []
  const isReference = isTag(reference) || /^sha256:[0-9a-f]{64}$/.test(reference)
  if (!url || !/^https?:$/.test(url.protocol) || !isRepository(repository) || !isReference)
    throw new ApiError(
      400,
      'BAD_REQUEST',
      'Cannot read args.url: need https://HOST/v2/NAME/manifests/TAG or the same with a sha256 digest',
    )
  return { host: url.host, repository, reference }
}

function authorizationOf(headers: Readonly<Record<string, string>>): string | undefined {
  const [, value] = Object.entries(headers).find(([name]) => name.toLowerCase() === 'authorization') ?? []
  if (value === undefined || value === '') return undefined
  if (!/^[\x20-\x7e]+$/.test(value))
    throw new ApiError(
      400,
      'BAD_REQUEST',
      'Cannot use args.headers.Authorization: it is not one line of ASCII',
    )
  return value
}

/** Sorted as numbers are. */
function keyOf(id: number): string {
  return `${prefix}${String(id).padStart(12, '0')}`
}
