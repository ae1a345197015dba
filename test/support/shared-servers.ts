// Several servers that share a directory and a Redis, behind one address.
import { mkdir, mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { FleetServer } from './fleet.ts'
import { startFleetServer } from './fleet.ts'
import { freePort } from './foreign.ts'
import type { OciClient } from './oci.ts'
import { ociClient } from './oci.ts'
import type { RedisServer } from './redis.ts'
import { startRedis } from './redis.ts'
import type { TcpProxy } from './tcp-proxy.ts'
import { startTcpProxy } from './tcp-proxy.ts'

export interface SharedServers extends AsyncDisposable {
  readonly directory: string
  /** What all of them share. */
  readonly shared: string
  readonly redis: RedisServer
  readonly proxy: TcpProxy
  readonly servers: readonly FleetServer[]
  /** Any of them, by the proxy: for agents and deployctl. */
  readonly front: FleetServer
  /** By itself, without the proxy. */
  readonly clients: readonly OciClient[]
  readonly adminToken: string
}

/** Starts them at the same moment, with nothing in their directory. `registry` is YAML for that section. */
export async function startSharedServers(count: number, { registry = '' } = {}): Promise<SharedServers> {
  await using started = new AsyncDisposableStack()
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-shared-'))
  started.defer(() => rm(directory, { recursive: true, force: true }))
  const redis = started.use(await startRedis(join(directory, 'redis')))
  const ports = await Promise.all(Array.from({ length: count }, freePort))
  const proxy = started.use(await startTcpProxy(ports.map((port) => ({ port }))))
  const publicUrl = `http://127.0.0.1:${proxy.port}`
  const shared = join(directory, 'shared')
  await mkdir(shared, { mode: 0o700 })
  const servers = await Promise.all(
    ports.map(async (port, i) =>
      startFleetServer(join(directory, `server-${i}`), {
        http: `addr: 127.0.0.1:${port}`,
        settings: `public_url: ${publicUrl}
server_name: server-${i}
redis: { url: 'redis://127.0.0.1:${redis.port}' }
storage: { name: redis }
state: { name: redis }
registry: { shared_dir: ${shared}, shared_settle: 300ms, ${registry} }
`,
      }),
    ),
  )
  for (const server of servers)
    started.defer(async () => {
      server.process.kill('SIGKILL')
      await server.exited
    })
  const adminTokenFile = join(shared, 'admin-token')
  const adminToken = (await readFile(adminTokenFile, 'utf8')).trim()
  const own = servers.map((server, i) => ({
    ...server,
    publicUrl: `http://127.0.0.1:${ports[i] ?? 0}`,
    dataDirectory: shared,
    adminTokenFile,
  }))
  const [first] = own
  if (!first) throw new RangeError('Cannot start: need 1 server or more')
  const owned = started.move()
  return {
    directory,
    shared,
    redis,
    proxy,
    servers: own,
    front: { ...first, publicUrl },
    clients: own.map((server) => ociClient(server.publicUrl, adminToken)),
    adminToken,
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}
