import { spawn } from 'node:child_process'
import { createHash, randomFillSync } from 'node:crypto'
import { mkdir, open, rm, writeFile } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { createAgentClient } from '../../lib/client/agent-client.ts'
import type { FetchEvent } from '../../lib/client/api.ts'
import type { Child } from '../../lib/runtime/child.ts'
import { startChild } from '../../lib/runtime/child.ts'

/** Whose programs run: those of this checkout, or those that a test has installed elsewhere. */
export const bin = (name: string) =>
  join(process.env['RACKSWARM_TEST_BIN'] ?? resolve(import.meta.dirname, '..', '..', 'bin'), `${name}.js`)

export interface FleetServer extends Child {
  readonly publicUrl: string
  readonly dataDirectory: string
  readonly adminTokenFile: string
  readonly metricsUrl: string
}

/** What who comes to a server must know of it, or of several behind one URL. */
export type ServerDoor = Pick<FleetServer, 'publicUrl' | 'dataDirectory' | 'adminTokenFile'>

/**
 * Starts a server with nothing in it, its own process. `settings` is YAML for the top level of its configuration, `http`
 * and `enrolment`
 * what stands in those sections: a free port of loopback, if nothing else.
 */
export async function startFleetServer(
  directory: string,
  {
    settings = '',
    http = 'addr: 127.0.0.1:0',
    enrolment = '',
  }: { settings?: string; http?: string; enrolment?: string } = {},
): Promise<FleetServer> {
  const data = join(directory, 'server')
  await mkdir(directory, { recursive: true })
  const config = join(directory, 'server.yaml')
  await writeFile(
    config,
    `data_dir: ${data}\nhttp: { ${http} }\nmetrics_addr: 127.0.0.1:0\nenrolment: { first_token_places: any, report_interval: 1s, ${enrolment} }\n${settings}`,
  )
  const child = await startChild({
    file: bin('rackswarm-server'),
    args: ['--config', config],
    readyMessage: 'server is listening',
    logFile: join(directory, 'server.log'),
  })
  return {
    ...child,
    publicUrl: String(child.ready['publicUrl']),
    dataDirectory: data,
    adminTokenFile: join(data, 'admin-token'),
    metricsUrl: String(child.ready['metricsUrl']),
  }
}

export interface FleetAgent extends Child {
  readonly socketPath: string
}

/** Starts an agent, its own process. `signatures` is YAML for that section; without it what nobody has signed is taken too. */
export async function startFleetAgent(
  directory: string,
  server: ServerDoor,
  settings: { host: string; place: string; signatures?: string; extra?: string },
): Promise<FleetAgent> {
  await mkdir(directory, { recursive: true })
  const config = join(directory, 'agent.yaml')
  const socketPath = join(directory, 'agent.sock')
  await writeFile(
    config,
    `server: ${server.publicUrl}
host: ${settings.host}
place: ${settings.place}
bootstrap_token_file: ${join(server.dataDirectory, 'bootstrap-token')}
data_dir: ${join(directory, 'data')}
control_socket: ${socketPath}
metrics_addr: 127.0.0.1:0
peer_port: 0
signatures: { ${settings.signatures ?? 'policy: accept_unsigned'} }
${settings.extra ?? ''}`,
  )
  const child = await startChild({
    file: bin('rackswarm-agent'),
    args: ['--config', config],
    readyMessage: 'agent is running',
    logFile: join(directory, 'agent.log'),
  })
  return { ...child, socketPath }
}

/** Writes a file of random bytes. @returns its SHA-256 in hex */
export async function writeRandomFile(file: string, sizeBytes: number): Promise<string> {
  const hash = createHash('sha256')
  await using handle = await open(file, 'w')
  const chunk = Buffer.allocUnsafe(4 * 1024 * 1024)
  for (let written = 0; written < sizeBytes; written += chunk.length) {
    const bytes = randomFillSync(chunk).subarray(0, Math.min(chunk.length, sizeBytes - written))
    await handle.write(bytes)
    hash.update(bytes)
  }
  return hash.digest('hex')
}

/** Makes a file's content new without writing it all again. */
export async function refreshFile(file: string): Promise<void> {
  await using handle = await open(file, 'r+')
  await handle.write(randomFillSync(Buffer.allocUnsafe(64)), 0, 64, 0)
}

export async function removeAll(path: string): Promise<void> {
  await rm(path, { recursive: true, force: true })
}

/** Runs deployctl as a user would; a build is published unsigned unless a key is named. @returns what it wrote and how it ended */
export async function deployctl(
  server: ServerDoor,
  args: readonly string[],
  options: { env?: Record<string, string>; input?: string } = {},
): Promise<{ code: number | null; stdout: string; stderr: string }> {
  const saysSo =
    args.includes('--sign-key') ||
    args.includes('--no-sign') ||
    options.env?.['DEPLOYCTL_SIGN_KEY_FILE'] !== undefined
  const signing = args.includes('publish') && !saysSo ? ['--no-sign'] : []
  const child = spawn(process.execPath, [bin('deployctl'), ...args, ...signing], {
    stdio: ['pipe', 'pipe', 'pipe'],
    env: {
      ...process.env,
      DEPLOYCTL_SERVER: server.publicUrl,
      DEPLOYCTL_TOKEN_FILE: server.adminTokenFile,
      XDG_CONFIG_HOME: join(server.dataDirectory, 'no-config'),
      ...options.env,
    },
  })
  const output = { stdout: '', stderr: '' }
  child.stdout.on('data', (data: Buffer) => (output.stdout += data.toString()))
  child.stderr.on('data', (data: Buffer) => (output.stderr += data.toString()))
  child.stdin.end(options.input ?? '')
  const code = await new Promise<number | null>((settle) => child.once('close', settle))
  return { code, ...output }
}

/** Like `deployctl`, for calls that must succeed. @throws Error with what it wrote */
export async function deployctlOk(
  server: ServerDoor,
  args: readonly string[],
  env: Record<string, string> = {},
): Promise<string> {
  const { code, stdout, stderr } = await deployctl(server, args, { env })
  if (code !== 0) throw new Error(`deployctl ${args.join(' ')} ended with code ${String(code)}: ${stderr}`)
  return stdout
}

/** Has an agent fetch a reference. @returns the last event. @throws Error with the agent's words */
export async function fetchOn(
  agent: FleetAgent,
  reference: string,
): Promise<Extract<FetchEvent, { event: 'done' }> & { seconds: number }> {
  await using client = createAgentClient({ socketPath: agent.socketPath })
  const start = process.hrtime.bigint()
  for await (const event of client.fetch(reference)) {
    if (event.event === 'error') throw new Error(event.error.message)
    if (event.event === 'done') return { ...event, seconds: Number(process.hrtime.bigint() - start) / 1e9 }
  }
  throw new Error('the agent ended the fetch without saying how')
}
