import { Command, CommanderError } from 'commander'
import { inspect } from 'node:util'
import { version } from '../lib/runtime/version.ts'
import { registerAudit } from './commands/audit.ts'
import { registerDoctor } from './commands/doctor.ts'
import { registerFetch } from './commands/fetch.ts'
import { registerHosts } from './commands/hosts.ts'
import { registerKeys } from './commands/keys.ts'
import { registerLogin } from './commands/login.ts'
import { registerPublish } from './commands/publish.ts'
import { registerRegistry } from './commands/registry.ts'
import { registerReleases } from './commands/releases.ts'
import { registerSigning } from './commands/signing.ts'
import { registerSimulate } from './commands/simulate.ts'
import { registerStatus } from './commands/status.ts'
import { registerToken } from './commands/token.ts'
import { registerTopology } from './commands/topology.ts'
import { registerTorrent } from './commands/torrent.ts'
import { registerTransfers } from './commands/transfers.ts'
import type { GlobalOptions, WithContext } from './context.ts'
import { createContext } from './context.ts'
import { exitCodes, failureOf } from './failure.ts'
import { createOutput } from './output.ts'

/** `deployctl`. Sets the exit code; does not throw. */
export async function main(argv: string[]): Promise<void> {
  const interrupted = new AbortController()
  process.on('SIGINT', () => {
    if (interrupted.signal.aborted) process.exit(exitCodes.interrupted)
    interrupted.abort(new Error('interrupted'))
  })
  // `deployctl list | head` is no failure.
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') process.exit(0)
    throw error
  })
  const program = createProgram(interrupted.signal)
  try {
    await program.parseAsync(argv, { from: 'user' })
  } catch (error) {
    if (error instanceof CommanderError) {
      process.exitCode = error.exitCode === 0 ? 0 : exitCodes.usage
      return
    }
    if (interrupted.signal.aborted) {
      process.exitCode = exitCodes.interrupted
      return
    }
    const failure = failureOf(error)
    process.stderr.write(
      `deployctl: ${failure.message}\n${failure.hint === undefined ? '' : `${failure.hint}\n`}`,
    )
    if (program.opts<{ debug?: boolean }>().debug === true || process.env['DEPLOYCTL_DEBUG'] === '1')
      process.stderr.write(`${inspect(error)}\n`)
    process.exitCode = failure.exitCode
  }
}

/** The command tree; tests parse with it. */
export function createProgram(signal: AbortSignal): Command {
  const program = new Command('deployctl')
    .description('Gets one build onto every host: publish, watch it arrive, find out why it did not.')
    .version(version, '-V, --version')
    .option('--server <url>', 'the server (DEPLOYCTL_SERVER)')
    .option('--token-file <file>', 'file with the token (DEPLOYCTL_TOKEN_FILE, or DEPLOYCTL_TOKEN)')
    .option(
      '--id-token-file <file>',
      'file with a token of an issuer that the server trusts, to be exchanged (DEPLOYCTL_ID_TOKEN_FILE)',
    )
    .option('--ca <file>', 'authority that signed the certificate of the server (DEPLOYCTL_CA)')
    .option('--socket <path>', 'socket of the agent on this host (DEPLOYCTL_SOCKET)')
    .option('-q, --quiet', 'only results and errors')
    .option('--no-color', 'no colour, as NO_COLOR=1')
    .option('--debug', 'with an error, what led to it (DEPLOYCTL_DEBUG=1)')
    .exitOverride()
    .configureHelp({ showGlobalOptions: true })
    .showSuggestionAfterError()
    .addHelpText(
      'after',
      `
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some hosts failed, 4 not allowed, 5 not found, 6 conflict,
            7 wrong bytes or no good signature, 8 timed out, 78 unfit Node, 130 interrupted.
Environment: DEPLOYCTL_SERVER, DEPLOYCTL_TOKEN_FILE or DEPLOYCTL_TOKEN, DEPLOYCTL_CA, DEPLOYCTL_SOCKET, DEPLOYCTL_SIGN_KEY_FILE; NO_COLOR,
             FORCE_COLOR. A flag wins over a variable, that over what \`deployctl login\` stored. Without any of them a CI job uses the identity that its
             platform gives it: DEPLOYCTL_ID_TOKEN_FILE, DEPLOYCTL_ID_TOKEN (GitLab), or ACTIONS_ID_TOKEN_REQUEST_URL (GitHub).`,
    )
  const contextOf: WithContext = (command) => {
    const options = command.optsWithGlobals<
      GlobalOptions & { json?: boolean; quiet?: boolean; color: boolean }
    >()
    const out = createOutput({
      stdout: process.stdout,
      stderr: process.stderr,
      env: process.env,
      json: options.json ?? false,
      quiet: options.quiet ?? false,
      colour: options.color,
    })
    return createContext({ out, env: process.env, now: Date.now, signal, stdin: process.stdin }, options)
  }
  for (const register of [
    registerPublish,
    registerFetch,
    registerReleases,
    registerStatus,
    registerTransfers,
    registerTorrent,
    registerToken,
    registerHosts,
    registerKeys,
    registerAudit,
    registerRegistry,
    registerLogin,
    registerDoctor,
    registerTopology,
    registerSimulate,
    registerSigning,
  ]) {
    register(program, contextOf)
  }
  return program
}
