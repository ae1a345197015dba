import { mkdir, writeFile } from 'node:fs/promises'
import { text } from 'node:stream/consumers'
import { spawn } from 'node:child_process'
import { join } from 'node:path'
import { bin } from '../../test/support/fleet.ts'
import type { HostStation, Station } from './network.ts'
import type { LogEntry, Program } from './programs.ts'
import { parseLogLine, startProgram } from './programs.ts'

/** How often agents report, and so hear of tags. Short, since the bound knows nothing of it. */
export const reportInterval = '1s'
/** A start takes longer where forty start at once. */
const upTimeoutMs = 60_000
const publishTimeoutMs = 300_000

/** The server of a swarm, and what is done to it. */
export interface SwarmServer extends AsyncDisposable {
  /** Starts it again, with what it had. Resolves once it listens. */
  start(): Promise<void>
  kill(): Promise<void>
  /** Runs deployctl beside it, over its own address. @returns what it printed as JSON */
  deployctl(args: readonly string[], signal?: AbortSignal): Promise<Record<string, unknown>>
  /** When a tag began to point to a digest, as its log has it. */
  taggedAtMs(repository: string, digest: string): number | undefined
  readonly bootstrapTokenFile: string
  readonly url: string
}

/** Starts a server with nothing in it. `settings` is YAML for the top level of its configuration. */
export async function startSwarmServer(
  station: Station,
  directory: string,
  settings: string,
): Promise<SwarmServer> {
  const data = join(directory, 'server')
  const config = join(directory, 'server.yaml')
  const url = `http://${station.address}:6969`
  await writeFile(
    config,
    `data_dir: ${data}
http: { addr: "${station.address}:6969", insecure_plaintext: true }
enrolment: { report_interval: ${reportInterval} }
registry: { webseed: { rate: 100GiB } }
${settings}`,
  )
  const tagged = new Map<string, number>()
  let program: Program | undefined
  const start = async () => {
    program = await startDaemon(station, 'rackswarm-server', config, directory, ({ msg, atMs, fields }) => {
      if (msg !== 'tag moved' || fields['tag'] !== 'latest') return
      const key = `${String(fields['repository'])} ${String(fields['digest'])}`
      tagged.set(key, Math.min(atMs, tagged.get(key) ?? atMs))
    })
  }
  const kill = async () => program?.kill()
  await start()
  return {
    start,
    kill,
    url,
    bootstrapTokenFile: join(data, 'bootstrap-token'),
    taggedAtMs: (repository, digest) => tagged.get(`${repository} ${digest}`),
    deployctl: async (args, signal) => {
      const child = spawn(
        'ip',
        ['netns', 'exec', station.namespace, process.execPath, bin('deployctl'), ...args, '--json'],
        {
          stdio: ['ignore', 'pipe', 'pipe'],
          detached: true,
          killSignal: 'SIGKILL',
          timeout: publishTimeoutMs,
          ...(signal === undefined ? {} : { signal }),
          env: {
            ...process.env,
            DEPLOYCTL_SERVER: url,
            DEPLOYCTL_TOKEN_FILE: join(data, 'admin-token'),
            XDG_CONFIG_HOME: join(directory, 'no-config'),
          },
        },
      )
      const ended = new Promise<number | null>((resolve, reject) => {
        child.once('error', reject)
        child.once('close', resolve)
      })
      const [stdout, stderr, code] = await Promise.all([text(child.stdout), text(child.stderr), ended])
      if (code !== 0)
        throw new Error(`deployctl ${args.join(' ')} ended with code ${String(code)}: ${stderr}`)
      return JSON.parse(stdout) as Record<string, unknown>
    },
    [Symbol.asyncDispose]: async () => kill(),
  }
}

/** Starts the agent of a host, with what it had if it ran before. Resolves once it runs. */
export async function startSwarmAgent(
  host: HostStation,
  directory: string,
  server: Pick<SwarmServer, 'url' | 'bootstrapTokenFile'>,
  {
    follow,
    settings,
    logged,
  }: { follow: readonly string[]; settings: string; logged: (entry: LogEntry) => void },
): Promise<Program> {
  await mkdir(directory, { recursive: true })
  const config = join(directory, 'agent.yaml')
  await writeFile(
    config,
    `server: ${server.url}
insecure_plaintext: true
host: host-${host.index}
bootstrap_token_file: ${server.bootstrapTokenFile}
data_dir: ${join(directory, 'data')}
control_socket: ${socketOf(directory)}
signatures: { policy: accept_unsigned }
follow: [${follow.map((reference) => JSON.stringify(reference)).join(', ')}]
${settings}`,
  )
  return startDaemon(host, 'rackswarm-agent', config, directory, logged)
}

export function socketOf(directory: string): string {
  return join(directory, 'agent.sock')
}

const upMessages = { 'rackswarm-server': 'server is listening', 'rackswarm-agent': 'agent is running' }

async function startDaemon(
  station: Station,
  name: keyof typeof upMessages,
  config: string,
  directory: string,
  logged: (entry: LogEntry) => void,
): Promise<Program> {
  const up = Promise.withResolvers<boolean>()
  const logFile = join(directory, `${name}.log`)
  const program = startProgram(station, {
    command: process.execPath,
    args: [bin(name), '--config', config],
    logFile,
    heard: (line) => {
      const entry = parseLogLine(line)
      if (entry === undefined) return
      if (entry.msg === upMessages[name]) up.resolve(true)
      logged(entry)
    },
  })
  const timer = setTimeout(up.resolve, upTimeoutMs, false)
  const isUp = await Promise.race([up.promise, program.exited.then(() => false)])
  clearTimeout(timer)
  if (isUp) return program
  await program.kill()
  throw new Error(`${name} at ${station.namespace} did not start: its log is ${logFile}`)
}
