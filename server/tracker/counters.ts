import type { Family } from '../../lib/protocol/address.ts'
import type { Frontend } from './hooks.ts'
import type { StoreStatus } from './peer-store.ts'
import type { TrackerAction, TrackerObserver, TrackerOutcome } from './tracker.ts'
import type { UdpDrop, UdpObserver } from './udp-frontend.ts'

/** Upper bounds of the buckets of a request's duration, seconds. */
export const durationBuckets = [
  0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1,
] as const

const frontends = ['http', 'udp'] as const satisfies readonly Frontend[]
const actions = ['announce', 'scrape'] as const satisfies readonly TrackerAction[]
const families = [4, 6] as const satisfies readonly Family[]
const outcomes = ['ok', 'refused', 'error'] as const satisfies readonly TrackerOutcome[]
const drops = [
  'no_request',
  'bad_connection_id',
  'unknown_action',
  'send_queue_full',
  'send_failed',
] as const satisfies readonly UdpDrop[]
/** Codes of the ClientErrors that refuse a request; anything else counts as `other`. */
const refusals = [
  'bad_query',
  'bad_infohash',
  'bad_parameter',
  'bad_address',
  'bad_scrape',
  'bad_packet',
  'unapproved',
  'unapproved_client',
  'unapproved_torrent',
  'unapproved_network',
  'rate_limited',
  'busy',
  'degraded',
  'other',
] as const
/** Why token approval refused, exactly. */
const tokenFaults = [
  'missing',
  'malformed',
  'wrong_type',
  'wrong_algorithm',
  'unknown_key',
  'bad_signature',
  'expired',
  'not_yet_valid',
  'wrong_issuer',
  'wrong_audience',
  'missing_claim',
  'bad_claim',
  'revoked',
  'wrong_infohash',
  'wrong_address',
  'wrong_scope',
  'busy',
  'other',
] as const

const histogramWords = durationBuckets.length + 2
const series = frontends.length * actions.length * families.length * outcomes.length
const layout = {
  histograms: 0,
  refusals: series * histogramWords,
  tokenFaults: series * histogramWords + refusals.length,
  drops: series * histogramWords + refusals.length + tokenFaults.length,
  connects: series * histogramWords + refusals.length + tokenFaults.length + drops.length,
}
/** What each thread says of its own now and then, instead of counting. */
const gauges = {
  open: layout.connects + 1,
  refused: layout.connects + 2,
  degradedMs: layout.connects + 3,
  answeredLocally: layout.connects + 4,
  untold: layout.connects + 5,
  told: layout.connects + 6,
  dropped: layout.connects + 7,
}
const words = layout.connects + 8

/**
 * What a tracker thread counts, in shared memory, so that a scrape of the metrics adds up all threads without asking them. Counting is
 * a few additions: a metrics library would cost as much as the announce.
 */
export interface TrackerCounters extends TrackerObserver, UdpObserver {
  tokenRefused(fault: string): void
  /** How many connections are open now, and how many were refused since the start. */
  connections(open: number, refused: number): void
  /** How it stands with the thread's way to the store. */
  store(status: StoreStatus): void
}

export interface CounterMemory {
  readonly buffer: SharedArrayBuffer
  readonly threads: number
}

export function createCounterMemory(threads: number): CounterMemory {
  return { buffer: new SharedArrayBuffer(threads * words * 8), threads }
}

/** The counters of one thread. */
export function openCounters({ buffer }: CounterMemory, thread: number): TrackerCounters {
  const counts = new Float64Array(buffer, thread * words * 8, words)
  const add = (at: number) => {
    counts[at] = (counts[at] ?? 0) + 1
  }
  const indexIn = (names: readonly string[], name: string) => {
    const index = names.indexOf(name)
    return index < 0 ? names.length - 1 : index
  }
  return {
    handled: (frontend, action, family, outcome, seconds) => {
      const at = seriesOf(frontend, action, family, outcome) * histogramWords
      let bucket = 0
      while (bucket < durationBuckets.length && seconds > (durationBuckets[bucket] ?? 0)) bucket++
      add(at + bucket)
      counts[at + histogramWords - 1] = (counts[at + histogramWords - 1] ?? 0) + seconds
    },
    refused: (code) => {
      add(layout.refusals + indexIn(refusals, code))
    },
    tokenRefused: (fault) => {
      add(layout.tokenFaults + indexIn(tokenFaults, fault))
    },
    connected: () => {
      add(layout.connects)
    },
    connections: (open, refused) => {
      counts[gauges.open] = open
      counts[gauges.refused] = refused
    },
    store: ({ degraded, answeredLocally, untold, told, dropped }) => {
      // One that has just begun is one, too.
      counts[gauges.degradedMs] = degraded ? Math.max(1, degraded.sinceMs) : 0
      counts[gauges.answeredLocally] = answeredLocally
      counts[gauges.untold] = untold
      counts[gauges.told] = told
      counts[gauges.dropped] = dropped
    },
    dropped: (reason) => {
      add(layout.drops + drops.indexOf(reason))
    },
  }
}

export interface DurationSeries {
  readonly labels: {
    readonly frontend: string
    readonly action: string
    readonly family: string
    readonly outcome: string
  }
  /** Requests up to each bound, and one more for all above. */
  readonly buckets: readonly number[]
  readonly sumSeconds: number
}

export interface CounterTotals {
  readonly durations: readonly DurationSeries[]
  readonly refusals: ReadonlyMap<string, number>
  readonly tokenFaults: ReadonlyMap<string, number>
  readonly drops: ReadonlyMap<string, number>
  readonly connects: number
  /** As of the last second. */
  readonly connections: { readonly open: number; readonly refused: number }
  /** As of the last second; the longest time that any thread has been without the store. */
  readonly store: Omit<StoreStatus, 'degraded'> & { readonly degradedMs: number }
}

/** All threads together. */
export function readCounters({ buffer, threads }: CounterMemory): CounterTotals {
  const all = new Float64Array(buffer)
  const sum = (at: number) => {
    let total = 0
    for (let thread = 0; thread < threads; thread++) total += all[thread * words + at] ?? 0
    return total
  }
  const max = (at: number) => {
    let most = 0
    for (let thread = 0; thread < threads; thread++) most = Math.max(most, all[thread * words + at] ?? 0)
    return most
  }
  const named = (names: readonly string[], at: number) =>
    new Map(names.map((name, i) => [name, sum(at + i)] as const))
  const durations: DurationSeries[] = []
  for (const frontend of frontends)
    for (const action of actions)
      for (const family of families)
        for (const outcome of outcomes) {
          const at = seriesOf(frontend, action, family, outcome) * histogramWords
          durations.push({
            labels: { frontend, action, family: `ipv${family}`, outcome },
            buckets: Array.from({ length: durationBuckets.length + 1 }, (_, i) => sum(at + i)),
            sumSeconds: sum(at + histogramWords - 1),
          })
        }
  return {
    durations,
    refusals: named(refusals, layout.refusals),
    tokenFaults: named(tokenFaults, layout.tokenFaults),
    drops: named(drops, layout.drops),
    connects: sum(layout.connects),
    connections: { open: sum(gauges.open), refused: sum(gauges.refused) },
    store: {
      degradedMs: max(gauges.degradedMs),
      answeredLocally: sum(gauges.answeredLocally),
      untold: sum(gauges.untold),
      told: sum(gauges.told),
      dropped: sum(gauges.dropped),
    },
  }
}

function seriesOf(
  frontend: Frontend,
  action: TrackerAction,
  family: Family,
  outcome: TrackerOutcome,
): number {
  const index = (frontend === 'http' ? 0 : 1) * 2 + (action === 'announce' ? 0 : 1)
  return (index * 2 + (family === 4 ? 0 : 1)) * 3 + (outcome === 'ok' ? 0 : outcome === 'refused' ? 1 : 2)
}
