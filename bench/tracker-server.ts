// The one place that knows how a rackswarm-server is configured for the tracker benchmarks.
import { spawnSync } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { mkdir, writeFile } from 'node:fs/promises'
import type { AddressInfo } from 'node:net'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { startChild } from '../lib/runtime/child.ts'
import { bin } from '../test/support/fleet.ts'
import { readDescendants } from './proc.ts'
import { serverCore } from './tracker-load.ts'

export interface TrackerServerSettings {
  /** For messages and the table. */
  readonly name: string
  /** Its own; a server that is started there again is the same server. */
  readonly directory: string
  /** Opens the UDP port too; `::1` or `127.0.0.1`. */
  readonly udpHost?: string
  readonly workers?: number
  readonly peersMax?: number
  readonly swarmsMax?: number
  /** Token approval with the keys of this JWKS file. Undefined: anyone may announce. */
  readonly keysFile?: string
  readonly tls?: { readonly cert: string; readonly key: string }
  /** On the server's core alone, as by `taskset`; else wherever the system puts it. */
  readonly pinned?: boolean
}

export interface TrackerServer extends AsyncDisposable {
  readonly name: string
  readonly pids: readonly number[]
  /** The UDP side, for the generator. */
  readonly udp: { name: string; host: string; port: number; pids: readonly number[] }
  readonly http: { name: string; host: string; port: number; pids: readonly number[] }
}

/** The `iss` and `aud` of the tokens that are minted for a benchmark. */
export const issuer = 'https://bench.invalid'

/** As long as the peers of a long fill must stay: a peer is kept for 2.5 intervals. */
const announceInterval = '60m'

export async function startTrackerServer(settings: TrackerServerSettings): Promise<TrackerServer> {
  const { name, directory, udpHost = '127.0.0.1', pinned = true } = settings
  await mkdir(directory, { recursive: true })
  const ports = {
    http: await freePort('tcp', '127.0.0.1'),
    udp: settings.udpHost === undefined ? 0 : await freePort('udp', udpHost),
  }
  const config = join(directory, 'server.yaml')
  await writeFile(config, writeConfig(settings, ports))
  const start = () =>
    startChild({
      file: bin('rackswarm-server'),
      args: ['--config', config],
      readyMessage: 'server is listening',
      logFile: join(directory, 'server.log'),
    })
  const child = await (pinned ? onServerCore(start) : start())
  const pids = await readDescendants(child.pid)
  return {
    name,
    pids,
    udp: { name, host: udpHost, port: ports.udp, pids },
    http: { name, host: '127.0.0.1', port: ports.http, pids },
    [Symbol.asyncDispose]: () => child[Symbol.asyncDispose](),
  }
}

function writeConfig(settings: TrackerServerSettings, ports: { http: number; udp: number }): string {
  const { udpHost, workers, peersMax, swarmsMax, keysFile, tls } = settings
  const host = udpHost?.includes(':') === true ? `'[${udpHost}]:${ports.udp}'` : `${udpHost}:${ports.udp}`
  return [
    'roles: [tracker]',
    `data_dir: ${join(settings.directory, 'data')}`,
    'metrics_addr: 127.0.0.1:0',
    `announce_interval: ${announceInterval}`,
    `min_announce_interval: ${announceInterval}`,
    `http: { addr: 127.0.0.1:${ports.http}${tls ? `, tls: { cert: ${tls.cert}, key: ${tls.key} }` : ''} }`,
    `udp: { addr: ${udpHost === undefined ? '[]' : host} }`,
    workers === undefined ? '' : `workers: ${workers}`,
    `tracker: { approval: ${keysFile === undefined ? 'none' : 'token'} }`,
    keysFile === undefined
      ? ''
      : `tokens: { issuer: ${issuer}, audience: ${issuer}, keys_file: ${keysFile} }`,
    peersMax === undefined
      ? ''
      : `storage: { config: { peers_max: ${peersMax}, swarms_max: ${swarmsMax ?? 100_000} } }`,
    '',
  ].join('\n')
}

/**
 * Has what `start` starts run on the server's core alone. A child has the affinity of its parent from its first
 * instruction on, so it also counts one core when it chooses how many threads it needs.
 */
export async function onServerCore<Result>(start: () => Promise<Result>): Promise<Result> {
  const own = ['-p', '-c']
  const before = /: ([\d,-]+)\s*$/.exec(taskset([...own, String(process.pid)]))?.[1]
  if (before === undefined) throw new Error('Cannot read the cores that this process may use from taskset')
  taskset([...own, String(serverCore), String(process.pid)])
  try {
    return await start()
  } finally {
    taskset([...own, before, String(process.pid)])
  }
}

function taskset(args: readonly string[]): string {
  const { status, stdout, stderr } = spawnSync('taskset', args, { encoding: 'utf8' })
  if (status !== 0) throw new Error(`taskset ${args.join(' ')} failed: ${stderr}`)
  return stdout
}

/** A port that was free a moment ago: the generator must know it, whatever a server reports. */
export async function freePort(kind: 'tcp' | 'udp', host: string): Promise<number> {
  if (kind === 'udp') {
    const socket = createSocket(host.includes(':') ? 'udp6' : 'udp4')
    await new Promise<void>((settle, reject) => {
      socket.once('error', reject)
      socket.bind(0, host, settle)
    })
    const { port } = socket.address()
    await new Promise<void>((settle) => socket.close(settle))
    return port
  }
  const server = createServer()
  await new Promise<void>((settle, reject) => {
    server.once('error', reject)
    server.listen(0, host, settle)
  })
  const { port } = server.address() as AddressInfo
  await new Promise((settle) => server.close(settle))
  return port
}
