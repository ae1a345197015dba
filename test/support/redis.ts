// Real redis-server processes on ports of their own.
import { spawn } from 'node:child_process'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Redis } from 'ioredis'
import type { RedisSettings } from '../../server/redis/connection.ts'
import { freePort } from './foreign.ts'
import { installTools } from './tools.ts'
import { until, untilListening } from './until.ts'

export interface RedisServer extends AsyncDisposable {
  readonly port: number
  readonly pid: number
  /** Sends it a signal: SIGKILL, SIGSTOP, SIGCONT. */
  kill(signal: NodeJS.Signals): void
  readonly ended: Promise<unknown>
  /** Asks it over a connection of its own. */
  ask(...command: readonly (string | number)[]): Promise<unknown>
}

/** Starts Debian's redis-server on loopback; what `directory` holds of an earlier start is there again, where `options` say that it is kept. */
export async function startRedis(
  directory: string,
  { port, options = [] }: { port?: number; options?: readonly string[] } = {},
): Promise<RedisServer> {
  await mkdir(directory, { recursive: true })
  const own = port ?? (await freePort())
  return run(own, [
    '--port',
    String(own),
    '--bind',
    '127.0.0.1',
    '--dir',
    directory,
    '--save',
    '',
    ...options,
  ])
}

async function run(port: number, args: readonly string[]): Promise<RedisServer> {
  installTools(['redis-server'])
  const child = spawn('redis-server', args, { stdio: 'ignore' })
  const ended = new Promise((settle) => {
    child.once('exit', settle)
    child.once('error', settle)
  })
  await untilListening(port)
  return {
    port,
    pid: child.pid ?? 0,
    kill: (signal) => child.kill(signal),
    ended,
    ask: (...command) => ask(port, command),
    [Symbol.asyncDispose]: async () => {
      child.kill('SIGKILL')
      await ended
    },
  }
}

/** @throws Error with what it answers, or where it does not answer within two seconds */
async function ask(port: number, [command = '', ...args]: readonly (string | number)[]): Promise<unknown> {
  const client = new Redis({
    port,
    host: '127.0.0.1',
    lazyConnect: true,
    connectTimeout: 2000,
    commandTimeout: 2000,
    maxRetriesPerRequest: 0,
    retryStrategy: () => null,
  })
  client.on('error', () => undefined)
  try {
    await client.connect()
    return await client.call(String(command), ...args)
  } finally {
    client.disconnect()
  }
}

export interface RedisSentinels extends AsyncDisposable {
  /** Those that hold the data; the first was the primary at the start. */
  readonly servers: readonly RedisServer[]
  readonly sentinels: readonly RedisServer[]
  readonly settings: RedisSettings
  /** The port of what the Sentinels call the primary now. */
  primaryPort(): Promise<number>
}

const primaryName = 'rackswarm'

/** A primary, its replica, and three Sentinels of which two decide; what does not answer for `downAfterMs` is down. */
export async function startSentinels(
  directory: string,
  { downAfterMs = 1000, options = [] }: { downAfterMs?: number; options?: readonly string[] } = {},
): Promise<RedisSentinels> {
  await using started = new AsyncDisposableStack()
  const keepServer = async (name: string, more: readonly string[] = []) =>
    started.use(
      await startRedis(join(directory, name), {
        options: ['--repl-diskless-sync-delay', '0', ...options, ...more],
      }),
    )
  const primary = await keepServer('primary')
  const replica = await keepServer('replica', ['--replicaof', '127.0.0.1', String(primary.port)])
  await until('the replica follows', async () =>
    /state=online/.test(String(await primary.ask('INFO', 'replication').catch(() => ''))),
  )
  const sentinels = await Promise.all(
    ['a', 'b', 'c'].map(async (name) => {
      const port = await freePort()
      const file = join(directory, `sentinel-${name}.conf`)
      await writeFile(
        file,
        `port ${port}
bind 127.0.0.1
dir ${directory}
sentinel monitor ${primaryName} 127.0.0.1 ${primary.port} 2
sentinel down-after-milliseconds ${primaryName} ${downAfterMs}
sentinel failover-timeout ${primaryName} 3000
`,
      )
      return run(port, [file, '--sentinel'])
    }),
  )
  for (const sentinel of sentinels) started.use(sentinel)
  const knows = async (sentinel: RedisServer) => {
    const answer = (await sentinel.ask('SENTINEL', 'MASTER', primaryName)) as string[]
    const field = (name: string) => answer[answer.indexOf(name) + 1]
    return field('num-other-sentinels') === '2' && field('num-slaves') === '1'
  }
  for (const sentinel of sentinels)
    await until('the Sentinels know each other', async () => knows(sentinel).catch(() => false))
  const owned = started.move()
  return {
    servers: [primary, replica],
    sentinels,
    settings: redisSettings(0, {
      mode: 'sentinel',
      addresses: sentinels.map(({ port }) => ({ host: '127.0.0.1', port })),
      sentinel: { name: primaryName, username: undefined, password: undefined },
    }),
    primaryPort: async () => {
      const [, port] = (await sentinels[0]?.ask(
        'SENTINEL',
        'GET-MASTER-ADDR-BY-NAME',
        primaryName,
      )) as string[]
      return Number(port)
    },
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

export interface RedisCluster extends AsyncDisposable {
  readonly nodes: readonly RedisServer[]
  readonly settings: RedisSettings
  /** Starts a node again that was killed, with what it had on disk. */
  restart(node: number): Promise<void>
  /** Resolves when every node that runs says that all slots are served. */
  whole(): Promise<void>
}

/** Three primaries, each with a third of the slots; which of them holds a key: `CLUSTER KEYSLOT`, in three equal parts. */
export async function startCluster(
  directory: string,
  { nodeTimeoutMs = 1000, options = [] }: { nodeTimeoutMs?: number; options?: readonly string[] } = {},
): Promise<RedisCluster> {
  await using started = new AsyncDisposableStack()
  const places = await Promise.all(
    ['a', 'b', 'c'].map(async (name) => ({
      name,
      port: await freePort(),
      busPort: await freePort(),
    })),
  )
  const startNode = ({ name, port, busPort }: (typeof places)[number]) =>
    startRedis(join(directory, name), {
      port,
      options: [
        '--cluster-enabled',
        'yes',
        '--cluster-port',
        String(busPort),
        '--cluster-node-timeout',
        String(nodeTimeoutMs),
        ...options,
      ],
    })
  const nodes = await Promise.all(places.map(startNode))
  started.defer(async () => {
    await Promise.all(nodes.map((node) => node[Symbol.asyncDispose]()))
  })
  const whole = async () => {
    for (const node of nodes)
      await until('the Cluster is whole', async () => {
        const info = String(await node.ask('CLUSTER', 'INFO').catch(() => ''))
        return /cluster_state:ok/.test(info) && /cluster_known_nodes:3/.test(info)
      })
  }
  const share = Math.ceil(16384 / nodes.length)
  for (const [i, node] of nodes.entries()) {
    await node.ask('CLUSTER', 'ADDSLOTSRANGE', i * share, Math.min((i + 1) * share, 16384) - 1)
    for (const { port, busPort } of places)
      if (port !== node.port) await node.ask('CLUSTER', 'MEET', '127.0.0.1', port, busPort)
  }
  await whole()
  const owned = started.move()
  return {
    nodes,
    settings: redisSettings(0, {
      mode: 'cluster',
      addresses: nodes.map(({ port }) => ({ host: '127.0.0.1', port })),
    }),
    restart: async (node) => {
      const place = places[node]
      if (!place) throw new Error(`There is no node ${node}`)
      await nodes[node]?.ended
      nodes[node] = await startNode(place)
    },
    whole,
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

/** How a server would be configured to use it. */
export function redisSettings(port: number, changes: Partial<RedisSettings> = {}): RedisSettings {
  return {
    mode: 'single',
    addresses: [{ host: '127.0.0.1', port }],
    database: 0,
    username: undefined,
    password: undefined,
    sentinel: undefined,
    tls: undefined,
    keyPrefix: 'rackswarm:',
    connectTimeoutMs: 2000,
    commandTimeoutMs: 500,
    callsMax: 10_000,
    ...changes,
  }
}
