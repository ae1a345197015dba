import { readFile, writeFile } from 'node:fs/promises'
import type { Command } from 'commander'
import { Option } from 'commander'
import { parse } from 'yaml'
import { ConfigError, parseConfig } from '../../lib/runtime/config.ts'
import type { Context, WithContext } from '../context.ts'
import { exitCodes, Failure } from '../failure.ts'

export interface SimulateOptions {
  /** YAML. */
  readonly scenario: string | undefined
  readonly svg: string | undefined
  /** What wins over the file, by its names there. */
  readonly settings: Readonly<Record<string, string | number>>
}

const flags = [
  ['--hosts <count>', 'hosts that fetch', 'hosts'],
  ['--racks <count>', 'racks that they are spread over', 'racks'],
  ['--size <size>', 'of the build, 1.5GB for example', 'size'],
  [
    '--host-uplink <rate>',
    'of each host, in each direction: 10Gb, or 100MiB (bits or bytes, a second)',
    'host_uplink',
  ],
  ['--rack-uplink <rate>', 'of each rack, in each direction', 'rack_uplink'],
  ['--server-uplink <rate>', 'of the server', 'server_uplink'],
  ['--seed <number>', 'of all that is random', 'seed'],
] as const

export function registerSimulate(program: Command, contextOf: WithContext): void {
  const command = program
    .command('simulate')
    .description(
      'how long a deploy would take, and what it would cost the network: the real selection and picker, in virtual time',
    )
    .option('--scenario <file>', 'YAML: what a flag cannot say, faults for example (docs/selection.md)')
    .option('--svg <file>', 'draws when the hosts of each rack were done')
    .option('--json', 'print JSON, each host included')
  for (const [flag, description] of flags) command.option(flag, description)
  command.action(async (options: Record<string, string | undefined>, self: Command) => {
    const settings = Object.fromEntries(
      flags.flatMap(([flag, , name]) => {
        const value = options[new Option(flag).attributeName()]
        if (value === undefined) return []
        return [[name, /^\d+$/.test(value) && isCount(name) ? Number(value) : value]]
      }),
    )
    await runSimulate({ scenario: options['scenario'], svg: options['svg'], settings }, contextOf(self))
  })
}

export async function runSimulate(
  { scenario: file, svg, settings }: SimulateOptions,
  context: Context,
): Promise<void> {
  const { out } = context
  // Whoever does not simulate need not wait for what it is made of.
  const { Scenario } = await import('../../simulator/scenario.ts')
  const { simulateInThread, SimulationTooLarge } = await import('../../simulator/thread.ts')
  const { describe, draw, summarize } = await import('../../simulator/report.ts')
  const text = file === undefined ? '' : await readScenario(file)
  const scenario = readSettings(() => {
    const base: unknown = parse(text)
    const merged = { ...(typeof base === 'object' ? base : {}), ...settings }
    // The file itself is read first: its faults are named with their lines.
    parseConfig(Scenario, text, file ?? 'scenario')
    return parseConfig(Scenario, JSON.stringify(merged), 'scenario')
  })
  out.note(`Simulating ${scenario.hosts} hosts in virtual time …`)
  const result = await simulateInThread(scenario, (seconds, hosts) => {
    out.note(`${seconds.toPrecision(3)} s: ${hosts} of ${scenario.hosts} hosts`)
  }).catch((error: unknown) => {
    throw error instanceof SimulationTooLarge
      ? new Failure(exitCodes.failure, error.message, { cause: error })
      : error
  })
  if (svg !== undefined) await writeFile(svg, draw(result))
  out.result({ ...summarize(result), hosts: result.hosts }, () => describe(result))
}

async function readScenario(file: string): Promise<string> {
  return readFile(file, 'utf8').catch((cause: unknown) => {
    throw new Failure(exitCodes.usage, `Cannot read ${file}: ${(cause as Error).message}`, { cause })
  })
}

function readSettings<Value>(read: () => Value): Value {
  try {
    return read()
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error
    throw new Failure(
      exitCodes.usage,
      `Cannot use the scenario:\n${error.faults.map((fault) => `  ${fault}`).join('\n')}`,
      {
        cause: error,
      },
    )
  }
}

function isCount(name: string): boolean {
  return ['hosts', 'racks', 'seed'].includes(name)
}
