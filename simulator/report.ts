import type { Result } from './simulate.ts'

/** What a run comes to: seconds, bytes, and each against the least that is possible. */
export function summarize(result: Result) {
  const { bounds, hosts, scenario } = result
  const reachable = hosts.filter(({ isGone }) => !isGone)
  const spared = reachable.filter(({ isHit }) => !isHit)
  const bytes = scenario.size * scenario.releases
  return {
    hosts: hosts.length,
    racks: result.rackSizes.length,
    pieces: result.pieces,
    bound: bounds,
    finished: reachable.filter(({ seconds }) => seconds !== undefined).length,
    unfinished: reachable.filter(({ seconds }) => seconds === undefined).length,
    gone: hosts.length - reachable.length,
    seconds: percentiles(reachable.map(({ seconds }) => seconds)),
    /** Of hosts to which nothing was done. */
    spared: percentiles(spared.map(({ seconds }) => seconds)),
    crossRackBytes: result.crossRackBytes,
    crossRackOfMin: result.crossRackMin === 0 ? undefined : result.crossRackBytes / result.crossRackMin,
    originBytes: result.originBytes,
    originOfBuild: result.originBytes / bytes,
    announces: result.announces,
    announcesPerSecondMax: result.announcesPerSecondMax,
    simulatedSeconds: result.simulatedSeconds,
    steps: result.steps,
    wallSeconds: result.wallSeconds,
  }
}

interface Percentiles {
  readonly p50: number | undefined
  readonly p99: number | undefined
  readonly max: number | undefined
}

/** Hosts that never finished count as later than all others. */
function percentiles(seconds: readonly (number | undefined)[]): Percentiles {
  const sorted = seconds.map((each) => each ?? Infinity).toSorted((a, b) => a - b)
  const at = (share: number) => {
    const value = sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)]
    return value === Infinity ? undefined : value
  }
  return { p50: at(0.5), p99: at(0.99), max: at(1) }
}

/** A table for a person. */
export function describe(result: Result): string {
  const summary = summarize(result)
  const { bound, seconds, spared } = summary
  const against = (value: number | undefined) =>
    value === undefined ? 'never' : `${value.toFixed(3)} s  ${(value / bound.seconds).toFixed(2)} × bound`
  const lines: [string, string][] = [
    ['hosts', `${summary.hosts} in ${summary.racks} racks, ${summary.pieces} pieces`],
    [
      'bound',
      `${bound.seconds.toFixed(3)} s  (fluid ${bound.fluid.toFixed(3)}, rack uplink ${bound.rackUplink.toFixed(3)}, store and forward ${bound.storeAndForward.toFixed(3)})`,
    ],
    ['p50', against(seconds.p50)],
    ['p99', against(seconds.p99)],
    ['max', against(seconds.max)],
    ...(result.hosts.some(({ isHit }) => isHit)
      ? ([
          ['p50 of hosts not hit', against(spared.p50)],
          ['p99 of hosts not hit', against(spared.p99)],
          ['max of hosts not hit', against(spared.max)],
        ] satisfies [string, string][])
      : []),
    ['unfinished', `${summary.unfinished}${summary.gone > 0 ? `, and ${summary.gone} gone for good` : ''}`],
    [
      'cross-rack',
      `${gigabytes(summary.crossRackBytes)}  ${summary.crossRackOfMin === undefined ? '' : `${summary.crossRackOfMin.toFixed(3)} × one copy a rack`}`,
    ],
    ['origin', `${gigabytes(summary.originBytes)}  ${summary.originOfBuild.toFixed(3)} × the build`],
    ['announces', `${summary.announces}, at most ${summary.announcesPerSecondMax} in a second`],
    [
      'simulated',
      `${summary.simulatedSeconds.toFixed(2)} s in ${summary.steps} steps, ${summary.wallSeconds.toFixed(1)} s of real time`,
    ],
  ]
  return lines.map(([name, value]) => `${name.padEnd(22)}${value}\n`).join('')
}

function gigabytes(bytes: number): string {
  return `${(bytes / 1e9).toFixed(2)} GB`
}

const width = 900
const height = 460
const margin = { left: 60, right: 20, top: 30, bottom: 50 }

/** The share of each rack's hosts that were done by when, as SVG; the fleet as a whole is the thick line. */
export function draw(result: Result): string {
  const { bounds, hosts, rackSizes } = result
  const done = hosts.flatMap(({ seconds }) => seconds ?? [])
  const end = Math.max(bounds.seconds, ...done) * 1.02
  const x = (seconds: number) => margin.left + (seconds / end) * (width - margin.left - margin.right)
  const y = (share: number) => height - margin.bottom - share * (height - margin.top - margin.bottom)
  const stairs = (times: readonly number[], count: number) => {
    const sorted = times.toSorted((a, b) => a - b)
    const points = sorted.map((seconds, i) => `H${x(seconds).toFixed(1)}V${y((i + 1) / count).toFixed(1)}`)
    return `M${x(0).toFixed(1)} ${y(0).toFixed(1)}${points.join('')}`
  }
  const byRack = Map.groupBy(hosts, ({ rack }) => rack)
  const racks = [...byRack.values()].map(
    (rack) =>
      `<path d="${stairs(
        rack.flatMap(({ seconds }) => seconds ?? []),
        rack.length,
      )}" fill="none" stroke="#4477aa" stroke-opacity="${Math.max(0.06, Math.min(0.6, 8 / rackSizes.length)).toFixed(2)}"/>`,
  )
  const ticks = Array.from({ length: 6 }, (_, i) => (end / 5) * i)
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" font-family="sans-serif" font-size="12">
<rect width="${width}" height="${height}" fill="white"/>
<text x="${margin.left}" y="18">${hosts.length} hosts, ${rackSizes.length} racks: share of the hosts of each rack that have the build</text>
${ticks.map((tick) => `<text x="${x(tick).toFixed(1)}" y="${height - 28}" text-anchor="middle">${tick.toFixed(2)} s</text>`).join('\n')}
${[0, 0.5, 1].map((share) => `<text x="${margin.left - 8}" y="${y(share) + 4}" text-anchor="end">${100 * share} %</text>`).join('\n')}
<path d="M${x(bounds.seconds).toFixed(1)} ${y(0)}V${y(1)}" stroke="#cc3311" stroke-dasharray="4 3"/>
<text x="${x(bounds.seconds).toFixed(1)}" y="${height - 10}" text-anchor="middle" fill="#cc3311">bound ${bounds.seconds.toFixed(3)} s</text>
${racks.join('\n')}
<path d="${stairs(done, hosts.length)}" fill="none" stroke="black" stroke-width="2"/>
</svg>
`
}
