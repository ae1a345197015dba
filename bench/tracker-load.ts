import { spawn, spawnSync } from 'node:child_process'
import { existsSync, globSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'

/** Where a benchmark puts the server, and where the generator: neither runs on the other's core. */
export const serverCore = 0
const generatorCore = 1

/** What must be there, and the Debian package that brings it. */
const tools = [
  { file: '/usr/bin/gcc', packageName: 'gcc' },
  { file: '/usr/include/stdio.h', packageName: 'libc6-dev' },
  { file: '/usr/include/openssl/ssl.h', packageName: 'libssl-dev' },
  { file: '/usr/bin/openssl', packageName: 'openssl' },
  { file: '/usr/bin/taskset', packageName: 'util-linux' },
  { file: '/usr/bin/opentracker', packageName: 'opentracker' },
]

/** What bench/load/ takes; what stands here in camel case are its flags. bench/load/main.c has the defaults. */
export interface LoadOptions {
  readonly protocol: 'udp' | 'http'
  readonly host?: string
  readonly port: number
  /** Announces are to these, one after the other… */
  readonly swarms?: number
  /** …and each has so many peers, which differ in their ports. */
  readonly peers?: number
  /** UDP: peers have as many source addresses, 127.0.x.y… */
  readonly addresses?: number
  /** …in so many /24 networks, and as many sockets for each address. */
  readonly racks?: number
  readonly sockets?: number
  readonly numwant?: number
  /** UDP announces under way at once. */
  readonly window?: number
  /** Announces a second. Undefined: as fast as they are answered. */
  readonly rate?: number
  readonly warm?: number
  readonly seconds?: number
  /** Announces every peer once before the rest. */
  readonly fill?: boolean
  readonly timeoutMs?: number
  /** A file with `infohash TAB jwt [TAB ticket]` a line; each is a swarm. */
  readonly tokens?: string
  readonly saveTickets?: string
  /** Replies of a server that does not look at what it gets. */
  readonly blind?: boolean
  readonly connectEach?: boolean
  /** Never sleeps in a closed loop; only on a core of its own. */
  readonly spin?: boolean
  readonly connections?: number
  readonly newConnections?: boolean
  readonly tls?: boolean
  /** A plain GET in the place of an announce. */
  readonly path?: string
}

/** One stretch of load: announces that were answered, and rightly. */
export interface Stretch {
  readonly announces: number
  readonly seconds: number
  readonly rate: number
  /** User and system time of the server, all its threads. */
  readonly cpuSeconds: number
  readonly lost: number
  readonly wrong: number
  readonly refused: number
  readonly failed: number
  readonly bytesPerReply: number
  readonly peersPerReply: number
  /** Peers that the largest swarm has, as UDP replies say. */
  readonly known: number
  /** From when it was to be sent; so a server that stalls is not spared what was held back meanwhile. */
  readonly latencyUs: Readonly<Record<'p50' | 'p90' | 'p99' | 'p999' | 'max', number>>
}

export interface LoadResult {
  readonly fill: Stretch | null
  readonly window: Stretch | null
}

/** A server that load can be put on. */
export interface LoadTarget {
  readonly name: string
  readonly host?: string
  readonly port: number
  /** Undefined: not counted. */
  readonly pids: readonly number[]
}

/** More wrong replies than this share make a measurement void. */
const faultsShareMax = 0.0001

export interface Generator {
  /** @throws Error when the generator ends badly, or where replies were not what they should be */
  load(target: LoadTarget, options: Omit<LoadOptions, 'host' | 'port'>, pinned?: boolean): Promise<LoadResult>
  /** The infohashes that it announces, hex. */
  hashes(swarms: number): string[]
}

/** Gets the tools and compiles bench/load/ into `directory`. @throws Error saying what to install */
export function buildGenerator(directory: string): Generator {
  if (availableParallelism() < 2)
    throw new Error('Cannot measure a tracker: need two cores, one for the server and one for the load')
  installTools()
  const sources = join(import.meta.dirname, 'load')
  const binary = join(directory, 'load')
  const files = ['main.c', 'udp.c', 'http.c'].map((file) => join(sources, file))
  const compiled = spawnSync(
    'gcc',
    ['-O2', '-Wall', '-Wextra', '-o', binary, ...files, '-lm', '-lssl', '-lcrypto'],
    {
      stdio: ['ignore', 2, 2],
    },
  )
  if (compiled.status !== 0) throw new Error(`Cannot compile ${sources}, see above`)
  return {
    load: async (target, options, pinned = true) => {
      const { protocol, ...flags } = options
      const args = [
        protocol,
        ...toFlags({ host: target.host, port: target.port, pids: target.pids.join(','), ...flags }),
      ]
      const output = await (pinned
        ? run('taskset', ['-c', String(generatorCore), binary, ...args])
        : run(binary, args))
      const result = JSON.parse(output) as LoadResult & { firstFault: string }
      for (const stretch of [result.fill, result.window]) {
        if (stretch === null) continue
        const { wrong, refused, failed, announces } = stretch
        const faults = wrong + refused + failed
        if (announces === 0 || faults / (announces + faults) > faultsShareMax)
          throw new Error(
            `Cannot measure ${target.name}: of ${announces + faults} replies ${wrong} were wrong, ${refused} refusals, ${failed} failed; the first: ${result.firstFault}`,
          )
      }
      return result
    },
    hashes: (swarms) =>
      spawnSync(binary, ['hashes', '--swarms', String(swarms)], {
        encoding: 'utf8',
        maxBuffer: 64 * 1024 * 1024,
      })
        .stdout.trim()
        .split('\n'),
  }
}

/** @throws Error where a run has no measured window */
export function windowOf(result: LoadResult): Stretch {
  if (result.window === null) throw new Error('the load had no measured window')
  return result.window
}

export function fillOf(result: LoadResult): Stretch {
  if (result.fill === null) throw new Error('the load did not fill')
  return result.fill
}

/** What most tracker benchmarks say of a window. */
export const rateFigures = [
  { name: 'rate', unit: 'announces/s' },
  { name: 'CPU', unit: 'µs/announce' },
  { name: 'server busy', unit: '' },
  { name: 'reply', unit: 'bytes' },
  { name: 'lost', unit: '' },
] as const

/** `server busy`: CPU of the server, in cores. Far below the cores it may use, the rate is not its own but the generator's. */
export function toRateFigures(stretch: Stretch): Record<string, number> {
  return {
    rate: stretch.rate,
    CPU: (stretch.cpuSeconds / stretch.announces) * 1e6,
    'server busy': stretch.cpuSeconds / stretch.seconds,
    reply: stretch.bytesPerReply,
    lost: stretch.lost,
  }
}

function toFlags(options: Readonly<Record<string, string | number | boolean | undefined>>): string[] {
  return Object.entries(options).flatMap(([key, value]) => {
    if (value === undefined || value === false || value === '') return []
    const flag = `--${key.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`
    return value === true ? [flag] : [flag, String(value)]
  })
}

/** @returns what it wrote to stdout. @throws Error with what it wrote to stderr */
async function run(program: string, args: readonly string[]): Promise<string> {
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'] })
  const output = { stdout: '', stderr: '' }
  child.stdout.on('data', (data: Buffer) => (output.stdout += data.toString()))
  child.stderr.on('data', (data: Buffer) => (output.stderr += data.toString()))
  const code = await new Promise((settle, reject) => {
    child.once('error', reject)
    child.once('close', settle)
  })
  if (code !== 0)
    throw new Error(`${[program, ...args].join(' ')} ended with code ${String(code)}: ${output.stderr}`)
  return output.stdout
}

/** Installs with apt what is missing, as root. */
function installTools(): void {
  const missing = () =>
    tools.filter(({ file }) => globSync(file).length === 0).map(({ packageName }) => packageName)
  const wanted = missing()
  if (wanted.length === 0) return
  const byHand = `install these Debian packages and run it again: apt-get install ${wanted.join(' ')}`
  if (process.getuid?.() !== 0 || !existsSync('/usr/bin/apt-get'))
    throw new Error(`Cannot measure a tracker: ${byHand}`)
  process.stderr.write(`Installing ${wanted.join(', ')} with apt-get\n`)
  const apt = (...args: string[]) =>
    spawnSync('apt-get', ['-qq', '-y', '-o', 'Dpkg::Use-Pty=0', ...args], {
      env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive' },
      stdio: ['ignore', 'ignore', 2],
    })
  const install = () => apt('install', '--no-install-recommends', ...wanted).status === 0
  if (!install()) {
    apt('update')
    if (!install()) throw new Error(`Cannot measure a tracker: apt-get failed, see above; ${byHand}`)
  }
  if (missing().length > 0)
    throw new Error(`Cannot measure a tracker: ${missing().join(', ')} did not bring what is needed`)
}
