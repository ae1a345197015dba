// `npm run swarm`: real agents in network namespaces, racks behind uplinks of their own, every link capped; beside them other ways of bringing a
// build to all hosts, and the same swarm with faults. Needs root on Linux.
import { spawn } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { text } from 'node:stream/consumers'
import { parseArgs } from 'node:util'
import { parse } from 'yaml'
import { parseConfig, size } from '../lib/runtime/config.ts'
import { createSeededRandom } from '../lib/runtime/random.ts'
import { Scenario } from '../simulator/scenario.ts'
import type { ToolPackage } from '../test/support/tools.ts'
import { installTools } from '../test/support/tools.ts'
import type { Report } from './harness.ts'
import { describeMachine, installPrograms, saveReport } from './harness.ts'
import type { FaultName } from './swarm/faults.ts'
import { faultNames, faultSettings, faultsOf } from './swarm/faults.ts'
import { reportInterval } from './swarm/fleet.ts'
import { removeLeftNetworks } from './swarm/network.ts'
import type { Prediction, SwarmSample } from './swarm/report.ts'
import { cpuMax, describe, figures, figuresOf, spreadOfStarts, undisturbed } from './swarm/report.ts'
import { runSwarm } from './swarm/run.ts'
import type { SwarmSide } from './swarm/sides.ts'
import { sides } from './swarm/sides.ts'

const usage = `Usage: npm run swarm -- [--hosts 40] [--racks 5] [--size 256MiB] [--host-uplink 8Mb] [--rack-uplink 32Mb]
         [--server-uplink RATE] [--scenario FILE] [--seed 1] [--side NAME]… [--fault NAME]… [--faults] [--runs 1] [--mtu 1500]
         [--queue 256KiB] [--json] [--save]

Sides (default: rackswarm):
${sides.map(({ name, settings }) => `  ${name.padEnd(12)} ${settings}`).join('\n')}

Faults, of agents alone, each beside an undisturbed run: ${faultNames.join(', ')}; --faults for all.
A scenario file is as for \`npm run simulate\`; flags win over it. Builds lie below TMPDIR: two copies a host, or so.
`
/** The keys of a scenario that this cannot do for real. */
const simulatedOnly = ['rows', 'row_uplink', 'jitter', 'setup']
/** npm and the terminal both pass a Ctrl-C on; a second one that a person means comes later. */
const sameSignalMs = 500

/** Forty agents on two cores cost most of them even so; in slower links agents take waiting for standing still. */
const defaults = { hosts: 40, racks: 5, size: '256MiB', host_uplink: '8Mb', rack_uplink: '32Mb' }
/** What is written in a scenario file. */
type Settings = Readonly<Record<string, unknown>>

interface Variant {
  readonly name: string
  readonly settings: Settings
}

const options = readOptions()
if (process.platform !== 'linux' || process.getuid?.() !== 0)
  fail('`npm run swarm` needs root on Linux: it makes network namespaces and limits their links', 1)
const interrupted = abortOnSignals()
try {
  installTools(toolsNeeded())
  await removeLeftNetworks()
  await main()
} catch (error) {
  process.stderr.write(
    `${interrupted.aborted ? 'Stopped' : `Cannot go on: ${(error as Error).message}`}; everything is taken down\n`,
  )
  process.exitCode = interrupted.aborted ? 130 : 1
}

async function main(): Promise<void> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-swarm-'))
  const samples: SwarmSample[] = []
  try {
    await installPrograms(join(directory, 'installed'))
    for (let run = 1; run <= options.runs; run++)
      for (const side of options.sides)
        for (const variant of variantsFor(side, run))
          samples.push(await sampleOf(side, variant, run, directory))
  } finally {
    await rm(directory, { recursive: true, force: true })
    // What was measured before something went wrong, or somebody stopped it, is worth no less.
    if (samples.length > 0) await print(samples)
  }
}

/** The swarm as it is, and with each fault; where a fault hits is drawn anew for each run. */
function variantsFor(side: SwarmSide, run: number): Variant[] {
  const given = { ...options.settings, ...side.scenario }
  const own = faultsOf(readScenario(given))
  const calm = { ...given, ...Object.fromEntries(own.map((name) => [name, undefined])) }
  const variants = [{ name: undisturbed, settings: calm }]
  // Other clients are not killed and started again.
  if (side.needs !== undefined) return variants
  const random = createSeededRandom(options.seed + run)
  if (own.length > 0) variants.push({ name: own.join(', '), settings: given })
  for (const name of options.faults)
    variants.push({ name, settings: { ...calm, ...faultSettings(name, random) } })
  return variants
}

async function sampleOf(side: SwarmSide, variant: Variant, run: number, home: string): Promise<SwarmSample> {
  const label = `${side.name}, ${variant.name}, run ${run}`
  const say = (what: string) => {
    process.stderr.write(`${label}: ${what}\n`)
  }
  const outcome = await runSwarm({
    scenario: readScenario(variant.settings),
    side,
    links: options.links,
    directory: join(home, 'run'),
    random: createSeededRandom(options.seed + 1000 * run),
    signal: interrupted,
    say,
  })
  const settings = {
    delay: `${queueMs(variant.settings)}ms`,
    ...variant.settings,
    jitter: `${Math.ceil(1000 * spreadOfStarts(outcome))}ms`,
  }
  say('simulating the same')
  const prediction = side.isSimulated ? await predict(settings, home) : undefined
  const measured = figuresOf(outcome, prediction)
  say(JSON.stringify(measured))
  if (outcome.cpu > cpuMax) say(`void: ${(100 * outcome.cpu).toFixed(0)} % of the machine was busy`)
  return {
    side: side.name,
    variant: variant.name,
    run,
    scenario: settings,
    figures: measured,
    machineBusy: outcome.cpu,
    outcome,
    prediction,
  }
}

/** What a host says passes two queues, its own and that of whom it tells; under load each is half full. */
function queueMs(settings: Settings): number {
  return Math.round((1000 * options.links.queueBytes) / readScenario(settings).host_uplink)
}

function toolsNeeded(): ToolPackage[] {
  const runsAria2 = Number(options.settings['standard_clients'] ?? 0) > 0
  return [
    'iproute2',
    'ethtool',
    ...(runsAria2 ? ['aria2' as const] : []),
    ...options.sides.flatMap(({ needs }) => needs ?? []),
  ]
}

/** As a process of its own: it can be interrupted. */
async function predict(settings: Settings, directory: string): Promise<Prediction> {
  const file = join(directory, 'scenario.json')
  await writeFile(file, JSON.stringify(settings))
  const child = spawn(
    process.execPath,
    [resolve(import.meta.dirname, '..', 'cli', 'simulate.ts'), '--scenario', file, '--json', '--quiet'],
    { stdio: ['ignore', 'pipe', 'inherit'], signal: interrupted },
  )
  const ended = new Promise<number | null>((settle, reject) => {
    child.once('error', reject)
    child.once('close', settle)
  })
  const [out, code] = await Promise.all([text(child.stdout), ended])
  if (code !== 0) throw new Error(`the simulation ended with code ${String(code)}, see above`)
  const { seconds, crossRackOfMin } = JSON.parse(out) as {
    seconds: Omit<Prediction, 'crossRackOfMin'>
    crossRackOfMin?: number
  }
  return { ...seconds, crossRackOfMin }
}

async function print(samples: readonly SwarmSample[]): Promise<void> {
  const report: Report = {
    benchmark: 'swarm',
    date: new Date().toISOString(),
    command: `npm run swarm -- ${process.argv
      .slice(2)
      .filter((argument) => argument !== '--save' && argument !== '--json')
      .join(' ')}`,
    machine: await describeMachine(),
    sides: options.sides.map(({ name, settings }) => ({ name, settings })),
    figures,
    samples,
  }
  const { machine } = report
  const [first] = samples
  const lines = [
    `${report.date.slice(0, 10)}, \`${report.command}\`, ${machine.cores} × ${machine.cpu}, ${machine.memoryGiB} GiB, Linux ${machine.kernel}, Node ${machine.node}.`,
    `Bound ${first?.outcome.bounds.seconds.toFixed(1) ?? ''} s where nothing is slow. Every link by tbf in both directions, queues of ${options.links.queueBytes / 1024} KiB, an MTU of ${options.links.mtu}, headers counted, offloads off; agents report every ${reportInterval}, then wait up to follow_jitter (1 s); all have fetched a small build before. Times from when the tag is visible; the simulated ones, and those compared with them, from when the first host begins; what simulated hosts say takes as long as one full queue, the half of two.`,
    '',
    describe(samples),
    '',
    ...report.sides.map(({ name, settings }) => `- ${name}: ${settings}`),
  ]
  process.stdout.write(options.json ? `${JSON.stringify(report, null, 2)}\n` : `${lines.join('\n')}\n`)
  if (!options.save) return
  const benchmarks = resolve(import.meta.dirname, '..', 'docs', 'benchmarks')
  await mkdir(benchmarks, { recursive: true })
  process.stderr.write(`Raw samples: ${await saveReport(report, benchmarks)}\n`)
}

function readOptions() {
  const { values } = readFlags()
  const oneOf = <Item extends { readonly name: string }>(
    items: readonly Item[],
    name: string,
    what: string,
  ) => items.find((item) => item.name === name) ?? fail(`There is no ${what} ${name}\n\n${usage}`, 2)
  const count = (flag: 'runs' | 'mtu' | 'seed') =>
    /^\d{1,9}$/.test(values[flag])
      ? Number(values[flag])
      : fail(`Cannot use --${flag} ${values[flag]}\n\n${usage}`, 2)
  const file = values.scenario
  const inFile = file === undefined ? {} : readScenarioFile(file)
  const flags = {
    hosts: values.hosts === undefined ? undefined : Number(values.hosts),
    racks: values.racks === undefined ? undefined : Number(values.racks),
    size: values.size,
    host_uplink: values['host-uplink'],
    rack_uplink: values['rack-uplink'],
    server_uplink: values['server-uplink'],
  }
  const given = Object.entries(flags).filter(([, value]) => value !== undefined)
  const settings: Settings = { ...defaults, ...inFile, ...Object.fromEntries(given), seed: count('seed') }
  const unfit = simulatedOnly.filter((key) => key in settings)
  if (unfit.length > 0) fail(`Only simulated: ${unfit.join(', ')}`, 2)
  const scenario = readScenario(settings)
  if (!scenario.from_server) fail('Only simulated: from_server: false', 2)
  if (
    scenario.standard_clients > 0 &&
    (values.faults || values.fault.length > 0 || faultsOf(scenario).length > 0)
  )
    fail('Only simulated: faults where hosts run other clients', 2)
  return {
    settings,
    sides: values.side.map((name) => oneOf(sides, name, 'side')),
    faults: (values.faults ? faultNames : values.fault).map(
      (name): FaultName =>
        faultNames.find((known) => known === name) ?? fail(`There is no fault ${name}\n\n${usage}`, 2),
    ),
    runs: count('runs'),
    links: { mtu: count('mtu'), queueBytes: readSize(values.queue) },
    seed: count('seed'),
    json: values.json,
    save: values.save,
  }
}

function readSize(value: string): number {
  const parsed = size().safeParse(value)
  return parsed.success ? parsed.data : fail(`Cannot use --queue ${value}\n\n${usage}`, 2)
}

function readFlags() {
  try {
    return parseArgs({
      options: {
        hosts: { type: 'string' },
        racks: { type: 'string' },
        size: { type: 'string' },
        'host-uplink': { type: 'string' },
        'rack-uplink': { type: 'string' },
        'server-uplink': { type: 'string' },
        scenario: { type: 'string' },
        seed: { type: 'string', default: '1' },
        side: { type: 'string', multiple: true, default: ['rackswarm'] },
        fault: { type: 'string', multiple: true, default: [] },
        faults: { type: 'boolean', default: false },
        runs: { type: 'string', default: '1' },
        mtu: { type: 'string', default: '1500' },
        queue: { type: 'string', default: '256KiB' },
        json: { type: 'boolean', default: false },
        save: { type: 'boolean', default: false },
      },
    })
  } catch (error) {
    return fail(`${(error as Error).message}\n\n${usage}`, 2)
  }
}

/** Faults of the file are named with their lines. */
function readScenarioFile(file: string): Settings {
  try {
    const content = readFileSync(file, 'utf8')
    parseConfig(Scenario, content, file)
    return (parse(content) ?? {}) as Settings
  } catch (error) {
    return fail((error as Error).message, 2)
  }
}

function readScenario(settings: Settings): Scenario {
  try {
    return parseConfig(Scenario, JSON.stringify(settings), 'scenario')
  } catch (error) {
    return fail((error as Error).message, 2)
  }
}

/** The first signal takes everything down in order; a second one does not wait, and leaves that to the next run. */
function abortOnSignals(): AbortSignal {
  const controller = new AbortController()
  let firstAt = 0
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const)
    process.on(signal, () => {
      if (!controller.signal.aborted) {
        firstAt = Date.now()
        controller.abort(new Error(`stopped by ${signal}`))
      } else if (Date.now() - firstAt > sameSignalMs) process.exit(130)
    })
  return controller.signal
}

function fail(message: string, code: number): never {
  process.stderr.write(`${message}\n`)
  process.exit(code)
}
