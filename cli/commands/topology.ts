import { spawn } from 'node:child_process'
import { realpathSync } from 'node:fs'
import { dirname, join } from 'node:path'
import type { Command } from 'commander'
import type { AddressPlace } from '../../lib/client/api.ts'
import { TopologyCheck, TopologyExplanation } from '../../lib/client/api.ts'
import type { Context, WithContext } from '../context.ts'
import { exitCodes, Failure } from '../failure.ts'
import { formatBytes } from '../output.ts'

export interface CheckOptions {
  readonly table: string | undefined
  readonly config: string | undefined
}

export interface ExplainOptions {
  readonly addresses: readonly string[]
  /** Undefined: ask the server. */
  readonly config: string | undefined
}

/** `topology check` and `topology explain`. */
export function registerTopology(program: Command, contextOf: WithContext): void {
  const topology = program.command('topology').description('where hosts are, and why')
  topology
    .command('check')
    .description(
      'read a configuration and its table of networks, without a server: every fault with its line',
    )
    .argument('[table]', 'a CSV file, in the place of the one that the configuration names, or on its own')
    .option('--config <file>', 'server.yaml; default: where rackswarm-server looks for it')
    .option('--json', 'print JSON')
    .action(async (table: string | undefined, { config }: { config?: string }, command: Command) => {
      await runCheck({ table, config }, contextOf(command))
    })
  topology
    .command('explain')
    .description('in which place the running server takes an address to be, and which network decided it')
    .argument('<address...>', 'one or more; of several, how far they are from the first one')
    .option('--config <file>', 'ask this server.yaml, not the server')
    .option('--json', 'print JSON')
    .action(async (addresses: string[], { config }: { config?: string }, command: Command) => {
      await runExplain({ addresses, config }, contextOf(command))
    })
}

/** Exit code 2 where something is wrong. */
export async function runCheck({ table, config }: CheckOptions, { out, signal }: Context): Promise<void> {
  const check = TopologyCheck.parse(
    await askProgram(
      [
        'check',
        ...(config === undefined ? [] : ['--config', config]),
        ...(table === undefined ? [] : ['--', table]),
      ],
      signal,
    ),
  )
  if (!check.ok) {
    if (!out.json) throw faultsFailure(check.faults)
    out.result(check, () => '')
    process.exitCode = exitCodes.usage
    return
  }
  for (const warning of check.warnings) out.note(`${out.paint('yellow', 'warning')}: ${warning}`)
  out.result(check, () => describeCheck(check))
}

export async function runExplain({ addresses, config }: ExplainOptions, context: Context): Promise<void> {
  const { out } = context
  const explained =
    config === undefined ? await askServer(addresses, context) : await askConfig(addresses, config, context)
  out.result(explained, () => describeExplanation(explained))
}

async function askServer(addresses: readonly string[], context: Context): Promise<TopologyExplanation> {
  await using connection = await context.connect()
  context.out.note(
    `By ${connection.connection.server}; a host whose credential names its place is there instead`,
  )
  return await connection.api.explainAddresses(addresses)
}

async function askConfig(
  addresses: readonly string[],
  config: string,
  { signal }: Context,
): Promise<TopologyExplanation> {
  const answer = await askProgram(['explain', '--config', config, '--', ...addresses], signal)
  const failed = TopologyCheck.safeParse(answer)
  if (failed.success && !failed.data.ok) throw faultsFailure(failed.data.faults)
  return TopologyExplanation.parse(answer)
}

function faultsFailure(faults: readonly string[]): Failure {
  return new Failure(
    exitCodes.usage,
    `Cannot use the topology:\n${faults.map((fault) => `  ${fault}`).join('\n')}`,
    { hint: 'A running server keeps the one it has until this is good.' },
  )
}

/** What the server's program says of a file. It lies beside this one, and knows what the file means. @throws Failure */
async function askProgram(args: readonly string[], signal: AbortSignal): Promise<unknown> {
  const program = join(dirname(realpathSync(process.argv[1] ?? '')), 'rackswarm-server.js')
  const child = spawn(process.execPath, [program, 'topology', ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
    signal,
  })
  const written = { stdout: '', stderr: '' }
  child.stdout.setEncoding('utf8').on('data', (text: string) => (written.stdout += text))
  child.stderr.setEncoding('utf8').on('data', (text: string) => (written.stderr += text))
  const code = await new Promise<number | null>((settle, reject) => {
    child.once('error', reject).once('close', settle)
  })
  if (code === 0 || code === 78) return JSON.parse(written.stdout)
  throw new Failure(
    code === 2 ? exitCodes.usage : exitCodes.failure,
    written.stderr.split('\n')[0]?.replace(/^rackswarm-server topology: /, '') ?? '',
  )
}

function describeCheck(check: TopologyCheck & { ok: true }): string {
  const { levels, farShares, places, table } = check
  const names = levels.map(({ name, cost, capacity }) =>
    [
      name,
      ...(cost === undefined ? [] : [`cost ${cost}`]),
      ...(capacity === undefined ? [] : [`${formatBytes(capacity)}/s`]),
    ].join(' '),
  )
  const networks = ({ networks, nested, otherwise }: typeof check.ipv4) =>
    `${networks} network${networks === 1 ? '' : 's'}, ${nested} of them within another; any other address is in its ${otherwise}`
  const lines = [
    ['levels', names.join(', ') || 'none'],
    ...(levels.length > 1
      ? [
          [
            'far peers',
            farShares
              .map((share, i) => `${(100 * share).toFixed(0)} % ${meetingAt(levels, i + 1)}`)
              .join(', '),
          ],
        ]
      : []),
    ...(table === undefined ? [] : [['table', table]]),
    ['places', `${places.withNetworks} with networks, ${places.listed} with parents`],
    ['IPv4', networks(check.ipv4)],
    ['IPv6', networks(check.ipv6)],
  ]
  return lines.map(([what = '', text = '']) => `${what.padEnd(10)} ${text}\n`).join('')
}

function meetingAt(levels: readonly { readonly name: string }[], distance: number): string {
  const name = levels[distance]?.name
  return name === undefined ? 'from anywhere else' : `of the same ${name}`
}

function describeExplanation({ addresses, distances }: TopologyExplanation): string {
  const far = distances.map(
    ({ from, to, distance, level }) =>
      `${from} – ${to}: distance ${distance}, ${level === undefined ? 'nothing in common' : `the same ${level}`}\n`,
  )
  return [...addresses.map(describeAddress), ...(far.length > 0 ? [far.join('')] : [])].join('\n')
}

function describeAddress({ address, place, network, from, listed, parents, lost }: AddressPlace): string {
  const above = parents.map(({ level, name }) => `${level} ${name}`).join(', ')
  return [
    `${address} is in ${place}`,
    `  decided by  ${network}  (${from})`,
    `  above it    ${above || (listed ? 'nothing' : 'nothing: topology.places does not list it')}`,
    ...lost.map((rule) => `  lost        ${rule.network}  ${rule.place}  (${rule.from})`),
    '',
  ].join('\n')
}
