import { existsSync } from 'node:fs'
import { dirname, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import type { TopologyCheck } from '../lib/client/api.ts'
import { ClientError } from '../lib/protocol/errors.ts'
import { ConfigError, loadConfig, parseConfig } from '../lib/runtime/config.ts'
import { defaultPaths } from '../lib/runtime/paths.ts'
import { ServerConfig } from './config.ts'
import { explainAddresses, summarizeTopology } from './explain-topology.ts'
import type { OpenedTopology } from './open-topology.ts'
import { openTopology } from './open-topology.ts'

const usage = `Usage: rackswarm-server topology check [--config FILE] [TABLE.csv]
       rackswarm-server topology explain [--config FILE] ADDRESS...
Says what a topology consists of, or where addresses are by it, without a server. Prints JSON: \`deployctl topology\` does the same for people.

  --config FILE   the configuration (default: ${defaultPaths('server').config}, if it is there)
  TABLE.csv       in the place of its topology.table; alone, without any configuration

Exit codes: 0 it is good, 2 wrong arguments, 78 unusable configuration or table.
`

/** `rackswarm-server topology`. @returns the exit code */
export async function topologyCommand(argv: readonly string[]): Promise<number> {
  let options: Options
  try {
    options = readOptions(argv)
  } catch (error) {
    process.stderr.write(`rackswarm-server topology: ${(error as Error).message}\n${usage}`)
    return 2
  }
  if (options.help) {
    process.stdout.write(usage)
    return 0
  }
  try {
    const opened = await openFrom(options)
    print(
      options.action === 'check' ? summarizeTopology(opened) : explainAddresses(opened, options.addresses),
    )
    return 0
  } catch (error) {
    if (error instanceof ConfigError) {
      print({ ok: false, faults: [...error.faults] } satisfies TopologyCheck)
      return 78
    }
    process.stderr.write(`rackswarm-server topology: ${(error as Error).message}\n`)
    return error instanceof ClientError ? 2 : 1
  }
}

interface Options {
  readonly action: 'check' | 'explain'
  readonly config: string | undefined
  readonly table: string | undefined
  readonly addresses: readonly string[]
  readonly help: boolean
}

/** @throws Error naming what is wrong */
function readOptions(argv: readonly string[]): Options {
  const { values, positionals } = parseArgs({
    args: [...argv],
    options: { config: { type: 'string' }, help: { type: 'boolean', short: 'h', default: false } },
    allowPositionals: true,
  })
  const [action, ...rest] = positionals
  const common = { config: values.config, help: values.help }
  if (action === 'explain' && (rest.length > 0 || values.help))
    return { ...common, action, table: undefined, addresses: rest }
  if (values.help || (action === 'check' && rest.length <= 1))
    return { ...common, action: 'check', table: rest[0], addresses: [] }
  throw new Error(action === 'explain' ? 'explain needs an address' : 'need check or explain')
}

/** @throws ConfigError with all faults */
async function openFrom({ config, table }: Options): Promise<OpenedTopology> {
  const standard = defaultPaths('server').config
  const file = config ?? (table === undefined && existsSync(standard) ? standard : undefined)
  if (file === undefined && table === undefined)
    throw new ConfigError([`${standard}: there is no such file: name another one with --config`])
  const { topology } =
    file === undefined ? parseConfig(ServerConfig, '', '(no file)') : await loadConfig(ServerConfig, file)
  return openTopology(
    { topology: table === undefined ? topology : { ...topology, table: resolve(table) } },
    file === undefined ? process.cwd() : dirname(resolve(file)),
  )
}

function print(value: unknown): void {
  process.stdout.write(`${JSON.stringify(value)}\n`)
}
