// Several servers with one URL, one Redis and one directory, each a process that can be killed and started again.
import { mkdir, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { Child } from '../../lib/runtime/child.ts'
import { startChild } from '../../lib/runtime/child.ts'
import type { RedisSettings } from '../../server/redis/connection.ts'
import { withClockOff } from './clock.ts'
import type { ServerDoor } from './fleet.ts'
import { bin } from './fleet.ts'
import { freePort } from './foreign.ts'
import type { RedisCluster, RedisSentinels, RedisServer } from './redis.ts'
import { redisSettings, startCluster, startRedis, startSentinels } from './redis.ts'
import type { ProxyLink, TcpProxy } from './tcp-proxy.ts'
import { startTcpProxy } from './tcp-proxy.ts'

export interface FleetMember {
  /** Its own, past the proxy. */
  readonly url: string
  readonly metricsUrl: string
  /** From the proxy to it. */
  readonly link: ProxyLink
  /** From it to Redis; it alone goes this way. Only where Redis is one server. */
  readonly redisLink: ProxyLink | undefined
  readonly logFile: string
  start(options?: { clockOffSeconds?: number }): Promise<void>
  /** SIGTERM, and the time that it takes. */
  stop(): Promise<void>
  /** SIGKILL. */
  kill(): Promise<void>
}

/** The Redis behind the servers, and what a test does to it. */
export type FleetRedis =
  | { readonly kind: 'single'; server: RedisServer; restartEmpty(): Promise<void> }
  | ({ readonly kind: 'sentinel' } & RedisSentinels)
  | ({ readonly kind: 'cluster' } & RedisCluster)

export interface ServerFleet extends AsyncDisposable {
  /** As clients and agents see it: the URL of the proxy. */
  readonly door: ServerDoor
  readonly members: readonly FleetMember[]
  readonly redis: FleetRedis
}

/** `always` would have each announce wait for the disk. */
const durable = ['--appendonly', 'yes', '--appendfsync', 'everysec'] as const

/** `settings` is YAML for the top level of the configuration of each server, `registry` for that section. */
export async function startServerFleet(
  directory: string,
  options: {
    redis: FleetRedis['kind']
    servers?: number
    settings?: string
    registry?: string
    clocksOffSeconds?: readonly number[]
  },
): Promise<ServerFleet> {
  const { servers = 3, settings = '', registry = '', clocksOffSeconds = [] } = options
  await using started = new AsyncDisposableStack()
  const shared = join(directory, 'shared')
  await mkdir(shared, { recursive: true, mode: 0o700 })
  const redis = await startFleetRedis(options.redis, join(directory, 'redis'))
  started.use(redis)
  const places = await Promise.all(
    Array.from({ length: servers }, async () => ({ port: await freePort(), metricsPort: await freePort() })),
  )
  const proxy = started.use(
    await startTcpProxy(
      places.map(({ port, metricsPort }) => ({ port, readyUrl: `http://127.0.0.1:${metricsPort}/readyz` })),
    ),
  )
  const publicUrl = `http://127.0.0.1:${proxy.port}`
  const members: FleetMember[] = []
  for (const [i, { port, metricsPort }] of places.entries()) {
    const own =
      redis.kind === 'single' ? started.use(await startTcpProxy([{ port: redis.server.port }])) : undefined
    const way = own
      ? redisSettings(own.port)
      : redis.kind === 'single'
        ? redisSettings(redis.server.port)
        : redis.settings
    const home = join(directory, `server-${i}`)
    await mkdir(home, { recursive: true })
    const config = join(home, 'server.yaml')
    await writeFile(
      config,
      `data_dir: ${join(home, 'data')}
server_name: s${i}
public_url: ${publicUrl}
http: { addr: 127.0.0.1:${port} }
metrics_addr: 127.0.0.1:${metricsPort}
storage: { name: redis }
state: { name: redis }
${redisYaml(way)}${sharedYaml(shared, registry)}${settings}`,
    )
    const member = createMember({
      config,
      logFile: join(home, 'server.log'),
      url: `http://127.0.0.1:${port}`,
      metricsUrl: `http://127.0.0.1:${metricsPort}`,
      link: linkOf(proxy, i),
      redisLink: own && linkOf(own, 0),
    })
    started.defer(() => member.stop())
    members.push(member)
  }
  // All at once, as after a power cut: whoever is first makes the keys.
  await Promise.all(members.map((member, i) => member.start({ clockOffSeconds: clocksOffSeconds[i] ?? 0 })))
  const owned = started.move()
  return {
    door: { publicUrl, dataDirectory: shared, adminTokenFile: join(shared, 'admin-token') },
    members,
    redis,
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

function createMember(
  fixed: { config: string } & Pick<FleetMember, 'url' | 'metricsUrl' | 'link' | 'redisLink' | 'logFile'>,
): FleetMember {
  let child: Child | undefined
  const { config, ...member } = fixed
  return {
    ...member,
    start: async ({ clockOffSeconds = 0 } = {}) => {
      child = await startChild({
        file: bin('rackswarm-server'),
        args: ['--config', config],
        readyMessage: 'server is listening',
        logFile: member.logFile,
        ...(clockOffSeconds !== 0 && { env: withClockOff(clockOffSeconds) }),
      })
    },
    stop: async () => {
      await child?.[Symbol.asyncDispose]()
    },
    kill: async () => {
      child?.process.kill('SIGKILL')
      await child?.exited
    },
  }
}

async function startFleetRedis(
  kind: FleetRedis['kind'],
  directory: string,
): Promise<FleetRedis & AsyncDisposable> {
  switch (kind) {
    case 'sentinel':
      return { kind, ...(await startSentinels(directory, { options: durable })) }
    case 'cluster':
      return { kind, ...(await startCluster(directory, { options: durable })) }
    case 'single': {
      let server = await startRedis(directory, { options: durable })
      return {
        kind,
        get server() {
          return server
        },
        restartEmpty: async () => {
          server.kill('SIGKILL')
          await server.ended
          await rm(directory, { recursive: true })
          server = await startRedis(directory, { port: server.port, options: durable })
        },
        [Symbol.asyncDispose]: async () => server[Symbol.asyncDispose](),
      }
    }
  }
}

function linkOf({ links }: TcpProxy, index: number): ProxyLink {
  const link = links[index]
  if (!link) throw new Error(`The proxy has no server ${index}`)
  return link
}

function redisYaml({ mode, addresses, sentinel }: RedisSettings): string {
  const urls = addresses.map((address) =>
    'path' in address ? `unix://${address.path}` : `redis://${address.host}:${address.port}`,
  )
  return `redis: { url: [${urls.map((url) => `"${url}"`).join(', ')}], mode: ${mode}${
    sentinel ? `, sentinel: { name: ${sentinel.name} }` : ''
  } }\n`
}

/** What all servers share besides Redis; on one machine nobody sees the directory as it was. */
function sharedYaml(directory: string, registry: string): string {
  return `registry: { shared_dir: ${directory}, shared_settle: 500ms, ${registry} }\n`
}
