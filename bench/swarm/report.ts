import type { Figure, Sample } from '../harness.ts'
import { median } from '../harness.ts'
import type { HostOutcome, RunOutcome } from './run.ts'

/** What the simulator says of the same scenario. */
export interface Prediction {
  readonly p50: number | undefined
  readonly p99: number | undefined
  readonly max: number | undefined
  readonly crossRackOfMin: number | undefined
}

export interface SwarmSample extends Sample {
  /** Of the side: what was done to it, or `undisturbed`. */
  readonly variant: string
  /** As a scenario file says it. */
  readonly scenario: Readonly<Record<string, unknown>>
  readonly outcome: RunOutcome
  readonly prediction: Prediction | undefined
}

export const undisturbed = 'undisturbed'
/** Above it a row says more of the machine than of the programs. */
export const cpuMax = 0.6

export const figures: readonly Figure[] = [
  { name: 'heard p50', unit: 's' },
  { name: 'heard max', unit: 's' },
  { name: 'p50', unit: 's' },
  { name: 'p99', unit: 's' },
  { name: 'max', unit: 's' },
  { name: 'p50 / bound', unit: '' },
  { name: 'p99 / bound', unit: '' },
  { name: 'max / bound', unit: '' },
  { name: 'from first fetch, p50', unit: 's' },
  { name: 'from first fetch, p99', unit: 's' },
  { name: 'from first fetch, max', unit: 's' },
  { name: 'from first fetch, p99 / bound', unit: '' },
  { name: 'cross-rack / minimum', unit: '' },
  { name: 'origin / build', unit: '' },
  { name: 'unfinished', unit: '' },
  { name: 'wrong copies', unit: '' },
  { name: 'simulated p50', unit: 's' },
  { name: 'simulated p99', unit: 's' },
  { name: 'simulated max', unit: 's' },
  { name: 'simulated cross-rack / minimum', unit: '' },
]

/** The figures of one run; what never came to be is NaN. */
export function figuresOf(outcome: RunOutcome, prediction: Prediction | undefined): Record<string, number> {
  const reachable = outcome.hosts.filter(({ isGone }) => !isGone)
  const heard = percentiles(reachable.map((host) => host.heard))
  const times = percentiles(reachable.map((host) => host.seconds))
  const first = firstFetch(outcome)
  const bound = outcome.bounds.seconds
  return {
    'heard p50': heard.p50,
    'heard max': heard.max,
    p50: times.p50,
    p99: times.p99,
    max: times.max,
    'p50 / bound': times.p50 / bound,
    'p99 / bound': times.p99 / bound,
    'max / bound': times.max / bound,
    'from first fetch, p50': times.p50 - first,
    'from first fetch, p99': times.p99 - first,
    'from first fetch, max': times.max - first,
    'from first fetch, p99 / bound': (times.p99 - first) / bound,
    'cross-rack / minimum': sum(outcome.intoRacks) / outcome.crossRackMin,
    'origin / build': outcome.originBytes / outcome.bytes,
    unfinished: reachable.filter(({ seconds }) => seconds === undefined).length,
    'wrong copies': outcome.wrongCopies,
    'simulated p50': prediction?.p50 ?? Number.NaN,
    'simulated p99': prediction?.p99 ?? Number.NaN,
    'simulated max': prediction?.max ?? Number.NaN,
    'simulated cross-rack / minimum': prediction?.crossRackOfMin ?? Number.NaN,
  }
}

/** When the first host began to fetch: the bound knows nothing of the time before. */
export function firstFetch({ hosts }: RunOutcome): number {
  return Math.min(...hosts.flatMap(({ heard }) => heard ?? []))
}

/** From the first host that began to the last one, of those that were there from the start. */
export function spreadOfStarts({ hosts }: RunOutcome): number {
  const heard = hosts.filter(({ isHit }) => !isHit).flatMap((host) => host.heard ?? [])
  return heard.length === 0 ? 0 : Math.max(...heard) - Math.min(...heard)
}

/** One row for each side and what was done to it: the median of the runs. */
export function describe(samples: readonly SwarmSample[]): string {
  const groups = Map.groupBy(samples, ({ side, variant }) => `${side}\n${variant}`)
  const rows = [...groups.values()].map((group) => rowOf(group, samples))
  const header = [
    'side',
    'fault',
    'heard p50/max (s)',
    'p50 (s)',
    'p99 (s)',
    'max (s)',
    'p50, p99, max (× bound)',
    'from first fetch: p99 (× bound)',
    'cross-rack (× minimum)',
    'origin (× build)',
    'CPU (%)',
    'simulated p50, p99, max (s)',
    'real against simulated: p50, p99, max, cross-rack (%)',
    'unfinished',
    'added (s)',
    'hosts not hit (× undisturbed)',
  ]
  return [header, header.map(() => '---'), ...rows].map((cells) => `| ${cells.join(' | ')} |`).join('\n')
}

function rowOf(group: readonly SwarmSample[], all: readonly SwarmSample[]): string[] {
  const [first] = group
  if (first === undefined) return []
  const of = (name: string) => median(group.map((sample) => sample.figures[name] ?? Number.NaN))
  const cpu = Math.max(...group.map(({ machineBusy }) => machineBusy))
  const clean = all.filter(({ side, variant }) => side === first.side && variant === undisturbed)
  const isFault = first.variant !== undisturbed
  const { added, allowed, spared } = faultFigures(group, clean)
  const against = (real: string, simulated: string) => percent(of(real) / of(simulated) - 1)
  const isSimulated = first.prediction !== undefined
  return [
    first.side,
    isFault ? first.variant : '–',
    `${number(of('heard p50'))} / ${number(of('heard max'))}`,
    number(of('p50')),
    number(of('p99')),
    number(of('max')),
    `${number(of('p50 / bound'))}, ${number(of('p99 / bound'))}, ${number(of('max / bound'))}`,
    number(of('from first fetch, p99 / bound')),
    number(of('cross-rack / minimum')),
    number(of('origin / build')),
    `${(100 * cpu).toFixed(0)}${cpu > cpuMax ? ' void' : ''}`,
    isSimulated
      ? `${number(of('simulated p50'))}, ${number(of('simulated p99'))}, ${number(of('simulated max'))}`
      : '–',
    isSimulated
      ? [
          against('from first fetch, p50', 'simulated p50'),
          against('from first fetch, p99', 'simulated p99'),
          against('from first fetch, max', 'simulated max'),
          against('cross-rack / minimum', 'simulated cross-rack / minimum'),
        ].join(', ')
      : '–',
    `${of('unfinished')}${of('wrong copies') > 0 ? `, ${of('wrong copies')} wrong` : ''}`,
    isFault && clean.length > 0 ? `${number(added)} (${number(allowed)} allowed)` : '–',
    isFault && clean.length > 0 ? number(spared) : '–',
  ]
}

/** What a fault costs at most besides what was away. */
const faultSeconds = 5

/**
 * What the faults of a group have added to the last host of the undisturbed runs, and to the last host to which nothing was done. Slow links and
 * more to bring have a later bound, which is no fault of anybody's.
 */
function faultFigures(group: readonly SwarmSample[], clean: readonly SwarmSample[]) {
  const of = (samples: readonly SwarmSample[], figure: (outcome: RunOutcome) => number) =>
    median(samples.map(({ outcome }) => figure(outcome)))
  const last = (which: (host: HostOutcome) => boolean) => (outcome: RunOutcome) =>
    percentiles(outcome.hosts.filter(which).map(({ seconds }) => seconds)).max
  const bound = ({ bounds }: RunOutcome) => bounds.seconds
  const base = of(
    clean,
    last(() => true),
  )
  return {
    added:
      of(
        group,
        last(({ isGone }) => !isGone),
      ) - base,
    allowed:
      of(group, ({ outageSeconds }) => outageSeconds) + faultSeconds + of(group, bound) - of(clean, bound),
    spared:
      of(
        group,
        last(({ isGone, isHit }) => !isGone && !isHit),
      ) / base,
  }
}

/** Hosts that never had it make what they would be part of NaN. */
function percentiles(values: readonly (number | undefined)[]) {
  const sorted = values.map((value) => value ?? Infinity).toSorted((a, b) => a - b)
  const at = (share: number) => {
    const value = sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)] ?? Infinity
    return value === Infinity ? Number.NaN : value
  }
  return { p50: at(0.5), p99: at(0.99), max: at(1) }
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0)
}

function number(value: number): string {
  if (Number.isNaN(value)) return 'never'
  return Math.abs(value) >= 100
    ? value.toFixed(0)
    : Math.abs(value) >= 10
      ? value.toFixed(1)
      : value.toFixed(2)
}

function percent(share: number): string {
  return Number.isNaN(share) ? '–' : `${share > 0 ? '+' : ''}${(100 * share).toFixed(0)}`
}
