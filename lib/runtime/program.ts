import { existsSync } from 'node:fs'
import { parseArgs } from 'node:util'
import type { z } from 'zod'
import { ConfigError, loadConfig, parseConfig } from './config.ts'
import type { Logger } from './log.ts'
import { printConfig } from './print-config.ts'

/** A daemon as `main` runs it: what its start returns, and how to say where it listens. */
export interface Daemon extends AsyncDisposable {
  readonly addresses: Readonly<Record<string, unknown>>
}

export interface DaemonProgram<Schema extends z.ZodType> {
  readonly name: string
  readonly version: string
  readonly schema: Schema
  /** Read when `--config` is not given and the file is there. */
  readonly defaultConfig: string
  /** `file` is where the configuration was read from. */
  start(config: z.output<Schema>, signal: AbortSignal, file: string | undefined): Promise<Daemon>
  /** Called with where it listens. */
  started(addresses: Daemon['addresses']): void
  /**
   * Called at SIGHUP or SIGUSR1, if the daemon can reload, with the configuration as it is now, or with why it cannot be used. One call ends
   * before the next begins. Must not reject.
   */
  reload?(config: z.output<Schema> | Error): Promise<void>
  /** Further first words: `rackswarm-server selftest`. They get the other arguments, and say how it ended. */
  readonly commands?: Readonly<
    Record<string, { readonly summary: string; run(argv: readonly string[]): Promise<number> }>
  >
}

/**
 * Runs a daemon until SIGTERM or SIGINT: the first signal ends it in order, a second at once.
 * Exit codes: 0 ended in order, 1 could not start or broke, 2 wrong arguments, 78 unusable configuration.
 */
export async function runDaemon<Schema extends z.ZodType>(
  program: DaemonProgram<Schema>,
  argv: readonly string[],
): Promise<void> {
  const command = program.commands?.[argv[0] ?? '']
  if (command) {
    process.exitCode = await command.run(argv.slice(1))
    return
  }
  let options: ReturnType<typeof parseArguments>
  try {
    options = parseArguments(argv)
  } catch (error) {
    fail(2, `${program.name}: ${(error as Error).message}\n${usage(program)}`)
    return
  }
  if (options.help) return void process.stdout.write(usage(program))
  if (options.version) return void process.stdout.write(`${program.name} ${program.version}\n`)
  const file = options.config ?? (existsSync(program.defaultConfig) ? program.defaultConfig : undefined)
  try {
    const read = async () =>
      file === undefined
        ? parseConfig(program.schema, '', '(no file)')
        : await loadConfig(program.schema, file)
    const config = await read()
    if (options['print-config']) return void process.stdout.write(await printConfig(program.schema, file))
    if (options.check) return void process.stdout.write(`${file ?? 'The default configuration'} is good\n`)
    await runUntilSignal(program, { config, file, read })
  } catch (error) {
    if (error instanceof ConfigError) fail(78, `${program.name}: ${error.message}\n`)
    else fail(1, `${program.name}: ${error instanceof Error ? describe(error) : String(error)}\n`)
  }
}

/**
 * A `reload` that says how it went. `apply` puts the configuration in force and returns the settings that need a restart; what cannot be used
 * changes nothing.
 */
export function loggedReload<Config extends { readonly log_level: string }>(
  log: Logger & { level: string },
  apply: (config: Config) => string[] | Promise<string[]>,
): (config: Config | Error) => Promise<void> {
  return async (next) => {
    const level = log.level
    try {
      if (next instanceof Error) throw next
      // Other threads are told of it by the reload.
      log.level = next.log_level
      const needRestart = await apply(next)
      log.info(needRestart.length > 0 ? { needRestart } : {}, 'reloaded')
    } catch (error) {
      log.level = level
      log.error({ err: error }, 'reload failed; what was in force stays')
    }
  }
}

async function runUntilSignal<Schema extends z.ZodType>(
  program: DaemonProgram<Schema>,
  {
    config,
    file,
    read,
  }: { config: z.output<Schema>; file: string | undefined; read: () => Promise<z.output<Schema>> },
): Promise<void> {
  const stop = new AbortController()
  const stopped = new Promise<void>((resolve) => {
    stop.signal.addEventListener('abort', () => {
      resolve()
    })
  })
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    process.on(signal, () => {
      if (stop.signal.aborted) process.exit(signal === 'SIGINT' ? 130 : 143)
      stop.abort(new Error(`stopped by ${signal}`))
    })
  }
  // Who asks while it starts gets what is in the file once it has started; while it ends, nobody.
  const started = Promise.withResolvers<undefined>()
  let reloads: Promise<void> = started.promise
  let waiting = false
  const reload = () => {
    // Whoever waits has not read the file yet.
    if (waiting) return
    waiting = true
    reloads = reloads.then(async () => {
      waiting = false
      const next = await read().catch((error: unknown) =>
        error instanceof Error ? error : new Error(String(error)),
      )
      if (!stop.signal.aborted) await program.reload?.(next)
    })
  }
  // chihaya reloads at SIGUSR1; left to Node, it would open a debugger's port to every user of the machine.
  for (const signal of ['SIGHUP', 'SIGUSR1'] as const) process.on(signal, reload)
  let daemon: Daemon
  try {
    daemon = await program.start(config, stop.signal, file)
  } catch (error) {
    if (stop.signal.aborted) return
    throw error
  }
  program.started(daemon.addresses)
  started.resolve(undefined)
  await stopped
  await daemon[Symbol.asyncDispose]()
}

function parseArguments(argv: readonly string[]) {
  const flag = { type: 'boolean', default: false } as const
  return parseArgs({
    args: [...argv],
    options: {
      config: { type: 'string' },
      check: flag,
      'print-config': flag,
      version: flag,
      help: { ...flag, short: 'h' },
    },
  }).values
}

function usage({
  name,
  defaultConfig,
  commands = {},
}: Pick<DaemonProgram<z.ZodType>, 'name' | 'defaultConfig' | 'commands'>): string {
  const others = Object.entries(commands)
  return `Usage: ${name} [--config FILE] [--check | --print-config | --version | --help]
${others.map(([command]) => `       ${name} ${command} --help\n`).join('')}
  --config FILE   the configuration (default: ${defaultConfig}, if it is there)
  --check         say whether the configuration is good, and end
  --print-config  print the configuration in force, defaults included, and end
  --version       print the version, and end
${others.map(([command, { summary }]) => `  ${command.padEnd(14)}  ${summary}\n`).join('')}
Exit codes: 0 ended in order, 1 failed, 2 wrong arguments, 78 unusable configuration.
`
}

/** The message and those of its causes: a person reads this at 3 a.m. */
function describe(error: Error): string {
  const parts = [error.message]
  for (let cause = error.cause; cause instanceof Error && parts.length < 5; cause = cause.cause)
    parts.push(cause.message)
  return parts.join(': ')
}

function fail(code: number, text: string): void {
  process.stderr.write(text)
  process.exitCode = code
}
