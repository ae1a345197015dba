import type { GcReport, GcStatus } from '../../lib/client/api.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import { LeaseBusy } from '../state/lease.ts'
import type { StateStore } from '../state/state-store.ts'
import { ApiError } from './api-error.ts'
import type { CollectionDeps } from './collection.ts'
import { collectGarbage, collectorName } from './collection.ts'

export interface GarbageCollectorOptions extends CollectionDeps {
  /** Between two runs; undefined: only when somebody asks. */
  readonly intervalMs: number | undefined
  readonly state: StateStore
  /** How long until all hosts have had the time to say what they hold; 0: long enough ago. */
  readonly readyInMs: () => Promise<number>
  /** Has one server collect at a time. Rejects with LeaseBusy while another does. */
  readonly exclusively: <Result>(work: (signal: AbortSignal) => Promise<Result>) => Promise<Result>
  /** Removes what no longer counts from the state, such as tokens that have expired. @returns how many entries */
  readonly sweepState: (signal: AbortSignal) => Promise<number>
  readonly log: Logger
}

/** Collects now and then, and when asked; one run at a time. */
export interface GarbageCollector extends AsyncDisposable {
  /** @throws ApiError 409 `GC_RUNNING` while another run is under way, 503 `NOT_READY` too early after a start of the server */
  run(options: { dryRun: boolean }): Promise<GcReport>
  status(): GcStatus
  /** The same, where another server may have collected since. */
  latestStatus(): Promise<GcStatus>
  /** Since the start; dry runs do not count. */
  readonly totals: GcTotals
}

export interface GcTotals {
  readonly runs: number
  readonly failures: number
  readonly tags: number
  readonly manifests: number
  readonly blobs: number
  readonly bytes: number
}

const lastRunKey = 'gc/last-run'
/** How often it is looked whether a run is due, at least. */
const lookMs = 60_000

/** The report of the last run outlives a restart. */
export async function startGarbageCollector(options: GarbageCollectorOptions): Promise<GarbageCollector> {
  const { state, now, log } = options
  const stop = new AbortController()
  const saved = (await state.get(lastRunKey))?.value as GcReport | undefined
  let last: Omit<GcStatus, 'running'> = saved ? { lastRun: saved } : {}
  let running: GcStatus['running']
  let totals: GcTotals = { runs: 0, failures: 0, tags: 0, manifests: 0, blobs: 0, bytes: 0 }
  let underWay: Promise<unknown> = Promise.resolve()
  // Counted from the last run and not from the start: a server that is started again every hour must collect, too.
  let triedAtMs = saved ? Date.parse(saved.startedAt) : Number.NEGATIVE_INFINITY

  const ended = (report: GcReport) => {
    const { dryRun, gone, waiting, faults, tookMs } = report
    if (dryRun) {
      last = { ...last, lastDryRun: report }
      return
    }
    last = { ...last, lastRun: report }
    totals = {
      runs: totals.runs + 1,
      failures: totals.failures,
      tags: totals.tags + gone.tags,
      manifests: totals.manifests + gone.manifests,
      blobs: totals.blobs + gone.blobs,
      bytes: totals.bytes + gone.bytes,
    }
    log.info({ ...gone, bytesWaiting: waiting.bytes, tookMs }, 'garbage collected')
    for (const fault of faults) log.error(fault, 'a repository was left alone by the garbage collection')
  }

  const collect = async (dryRun: boolean, everyMs: number | undefined): Promise<GcReport> => {
    const startedAt = new Date(now()).toISOString()
    running = { startedAt, dryRun }
    try {
      if (everyMs !== undefined) {
        await lookElsewhere()
        if (!isDue(everyMs)) throw elsewhere()
      }
      const waitMs = await options.readyInMs()
      if (waitMs > 0) throw tooEarly(waitMs)
      if (!dryRun) triedAtMs = now()
      const report = dryRun
        ? await collectGarbage(options, { dryRun, signal: stop.signal })
        : await options.exclusively(async (signal) => {
            const until = AbortSignal.any([signal, stop.signal])
            const done = await collectGarbage(options, { dryRun, signal: until })
            await writeDown(options.auditLog, done)
            await state.put(lastRunKey, done)
            const entries = await options.sweepState(until)
            if (entries > 0) log.info({ entries }, 'entries that count no longer were removed from the state')
            return done
          })
      ended(report)
      return report
    } catch (failure) {
      const error = failure instanceof LeaseBusy ? elsewhere(failure) : failure
      if (!(error instanceof ApiError) && !stop.signal.aborted) {
        last = { ...last, lastFailure: { startedAt, message: (error as Error).message } }
        totals = { ...totals, failures: totals.failures + 1 }
        log.error({ err: error }, 'the garbage collection failed')
      }
      throw error
    } finally {
      running = undefined
    }
  }

  const run = async ({ dryRun }: { dryRun: boolean }, everyMs?: number): Promise<GcReport> => {
    if (running)
      throw new ApiError(409, 'GC_RUNNING', `Cannot collect: a run is under way since ${running.startedAt}`, {
        hint: '`GET /api/v1/gc` says when it has ended.',
      })
    const report = collect(dryRun, everyMs)
    underWay = report.catch(() => undefined)
    return report
  }
  const { intervalMs } = options
  const status = (): GcStatus => ({ ...last, ...(running && { running }) })
  /** Another server may have collected. */
  const lookElsewhere = async () => {
    const lastRun = (await state.get(lastRunKey))?.value as GcReport | undefined
    if (!lastRun || lastRun.startedAt === last.lastRun?.startedAt) return
    last = { ...last, lastRun }
    triedAtMs = Math.max(triedAtMs, Date.parse(lastRun.startedAt))
  }
  const isDue = (everyMs: number) => {
    const sinceMs = now() - triedAtMs
    // Less than nothing: the clock was put back.
    return sinceMs < 0 || sinceMs >= everyMs
  }
  const look = (everyMs: number) => {
    if (!isDue(everyMs)) return
    // What went wrong is logged; what comes too early, or meets a run that somebody asked for, is looked at again soon.
    run({ dryRun: false }, everyMs).catch(() => undefined)
  }
  const timer =
    intervalMs === undefined
      ? undefined
      : setInterval(
          () => {
            look(intervalMs)
          },
          Math.min(intervalMs, lookMs),
        )
  timer?.unref()
  return {
    run: (options) => run(options),
    status,
    latestStatus: async () => {
      await lookElsewhere()
      return status()
    },
    get totals() {
      return totals
    },
    [Symbol.asyncDispose]: async () => {
      clearInterval(timer)
      stop.abort(new Error('the server ends'))
      await underWay
    },
  }
}

function elsewhere(cause?: Error): ApiError {
  return new ApiError(409, 'GC_RUNNING', 'Cannot collect: another server does, or just did', {
    hint: '`GET /api/v1/gc` says when it has ended.',
    cause,
  })
}

/** Tags have lines of their own, before they go; of all else there is one line for the run, once it is known how much went. */
async function writeDown(auditLog: CollectionDeps['auditLog'], { gone }: GcReport): Promise<void> {
  if (gone.manifests + gone.links + gone.blobs === 0) return
  const entry = { who: collectorName, action: 'gc.removed', target: 'registry', details: gone } as const
  await auditLog.around(entry, () => Promise.resolve())
}

function tooEarly(waitMs: number): ApiError {
  const seconds = Math.ceil(waitMs / 1000)
  return new ApiError(503, 'NOT_READY', 'Cannot collect yet: hosts are still saying what they hold', {
    hint: `Ask again in ${seconds} seconds.`,
    headers: { 'retry-after': String(seconds) },
  })
}
