// Each fault of the simulator at random points, beside the same fleet undisturbed: `npm run soak -- simulator [--runs N] [--seed N] [--hosts 400]
// [--racks 10] [--size 256MiB]` (default: 5 runs of each). Every host that can be reached must have the build; the table says what a fault added, and what
// it did to hosts that it did not hit. Virtual time: other work on the machine changes nothing.
import { parseArgs } from 'node:util'
import { faultNames, faultSettings } from '../../bench/swarm/faults.ts'
import { createSeededRandom } from '../../lib/runtime/random.ts'
import { summarize } from '../../simulator/report.ts'
import type { Moment } from '../../simulator/scenario.ts'
import { Scenario } from '../../simulator/scenario.ts'
import { simulate } from '../../simulator/simulate.ts'

const graceSeconds = 5

const { values } = parseArgs({
  options: {
    runs: { type: 'string', default: '5' },
    seed: { type: 'string', default: '1' },
    hosts: { type: 'string', default: '400' },
    racks: { type: 'string', default: '10' },
    size: { type: 'string', default: '256MiB' },
    'host-uplink': { type: 'string', default: '100Mb' },
    'rack-uplink': { type: 'string', default: '400Mb' },
  },
})
const fleet = {
  hosts: Number(values.hosts),
  racks: Number(values.racks),
  size: values.size,
  host_uplink: values['host-uplink'],
  rack_uplink: values['rack-uplink'],
}

const extremes: Record<string, Record<string, unknown>> = {
  'one rack': { racks: 1 },
  'a rack for each host': { racks: fleet.hosts },
  'one rack has nine tenths': { rack_sizes: [Math.floor(fleet.hosts * 0.9)] },
  'half are other clients': { standard_clients: 0.5 },
}

interface Row {
  readonly name: string
  readonly settings: Record<string, unknown>
  readonly summary: ReturnType<typeof summarize>
  readonly outageSeconds: number
}

let wrong = 0
const first = Number(values.seed)
process.stdout.write(
  '| fleet | seed | p50, p99, max (× bound) | copies | origin | added (s) | allowed | hosts not hit (× undisturbed) | unfinished |\n|---|---|---|---|---|---|---|---|---|\n',
)
for (let seed = first; seed < first + Number(values.runs); seed++) {
  const calm = runOf('undisturbed', { seed })
  print(calm, calm)
  const random = createSeededRandom(seed)
  for (const name of faultNames) print(runOf(name, { seed, ...faultSettings(name, random) }), calm)
  if (seed > first) continue
  for (const [name, settings] of Object.entries(extremes)) print(runOf(name, { seed, ...settings }), calm)
}
process.exitCode = wrong > 0 ? 1 : 0

function runOf(name: string, settings: Record<string, unknown>): Row {
  const scenario = Scenario.parse({ ...fleet, ...settings })
  const result = simulate(scenario)
  return {
    name,
    settings,
    summary: summarize(result),
    outageSeconds: outageOf(scenario, result.bounds.seconds),
  }
}

/** The longest that something is away, which a deploy may take longer. */
function outageOf(scenario: Scenario, boundSeconds: number): number {
  const { churn, slow_racks: slow, tracker_away: tracker, server_away: server, late } = scenario
  const moments = [churn?.away, slow?.for, tracker?.for, server?.for, late?.at]
  return Math.max(0, ...moments.map((moment) => (moment === undefined ? 0 : secondsOf(moment, boundSeconds))))
}

function secondsOf(moment: Moment, boundSeconds: number): number {
  return typeof moment === 'number' ? moment / 1000 : moment.ofBound * boundSeconds
}

function print({ name, settings, summary, outageSeconds }: Row, calm: Row): void {
  if (summary.unfinished > 0) wrong++
  const { bound, seconds, spared } = summary
  const against = (value: number | undefined) =>
    value === undefined ? 'never' : (value / bound.seconds).toFixed(2)
  const added = (seconds.max ?? Infinity) - (calm.summary.seconds.max ?? 0)
  const notHit = (spared.p99 ?? Infinity) / (calm.summary.seconds.p99 ?? 1)
  // What the fault makes impossible is no delay.
  const slower = bound.seconds - calm.summary.bound.seconds
  const isFault = faultNames.some((fault) => fault === name)
  const cells = [
    name,
    settings['seed'],
    [seconds.p50, seconds.p99, seconds.max].map(against).join(', '),
    summary.crossRackOfMin?.toFixed(2) ?? '–',
    summary.originOfBuild.toFixed(2),
    ...(isFault
      ? [added.toFixed(1), (outageSeconds + slower + graceSeconds).toFixed(1), notHit.toFixed(2)]
      : ['–', '–', '–']),
    summary.unfinished,
  ]
  process.stdout.write(`| ${cells.join(' | ')} |\n`)
}
