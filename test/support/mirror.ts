// A fleet whose hosts have mirrors, and clients that are set up by `rackswarm-agent mirror install`.
import { execFile } from 'node:child_process'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { createAgentClient } from '../../lib/client/agent-client.ts'
import { writeAuthFile, skopeoCopy } from '../system/oci-image.ts'
import type { FleetAgent, FleetServer } from './fleet.ts'
import { bin, startFleetAgent } from './fleet.ts'
import { freePort } from './foreign.ts'
import { until } from './until.ts'

const run = promisify(execFile)

export interface MirrorHost extends FleetAgent {
  readonly mirrorUrl: string
  /** What `mirror install` wrote for containerd. */
  readonly hostsDirectory: string
  /** …and for podman and skopeo. */
  readonly registriesConf: string
  /** A counter or gauge of the agent; 0 where it is not there. */
  metric(name: string): Promise<number>
}

/**
 * Starts an agent with a mirror that also answers for tags, in rack-1, and writes what its clients need below `directory`/root. With `signatures`, YAML for that
 * section, the mirror requires them.
 */
export async function startMirrorHost(
  directory: string,
  server: FleetServer,
  {
    host,
    extra = '',
    port,
    signatures,
  }: { host: string; extra?: string; port?: number; signatures?: string },
): Promise<MirrorHost> {
  const mirrorPort = port ?? (await freePort())
  const agent = await startFleetAgent(directory, server, {
    host,
    place: 'rack-1',
    ...(signatures !== undefined && { signatures }),
    extra: `mirror: { enabled: true, addr: "127.0.0.1:${mirrorPort}"${signatures === undefined ? '' : ', signatures: require'} }\n${extra}`,
  })
  try {
    await using client = createAgentClient({ socketPath: agent.socketPath })
    await until('a report', async () => (await client.status()).lastReportAt !== undefined)
    const root = join(directory, 'root')
    const config = join(directory, 'agent.yaml')
    await run(process.execPath, [
      bin('rackswarm-agent'),
      ...['mirror', 'install', '--for', 'all', '--resolve', '--root', root, '--config', config],
    ])
    const metricsUrl = String(agent.ready['metricsUrl'])
    return {
      ...agent,
      mirrorUrl: String(agent.ready['mirrorUrl']),
      hostsDirectory: join(root, 'etc/containerd/certs.d'),
      registriesConf: join(root, 'etc/containers/registries.conf.d/50-rackswarm.conf'),
      metric: async (name) => {
        const text = await (await fetch(`${metricsUrl}/metrics`)).text()
        const line = text.split('\n').find((found) => found.startsWith(`${name} `))
        return Number(line?.slice(name.length + 1) ?? 0)
      },
    }
  } catch (error) {
    await agent[Symbol.asyncDispose]()
    throw error
  }
}

/** Pushes a layout's tag `1` with every platform, as tag `1` or that of the name. @returns its reference */
export async function pushImage(server: FleetServer, layout: string, name: string): Promise<string> {
  const authFile = join(server.dataDirectory, '..', 'auth.json')
  await writeAuthFile(authFile, server.publicUrl, (await readFile(server.adminTokenFile, 'utf8')).trim())
  const reference = `${new URL(server.publicUrl).host}/${name}${name.includes(':') ? '' : ':1'}`
  await skopeoCopy(authFile, '--all', '--dest-tls-verify=false', `oci:${layout}:1`, `docker://${reference}`)
  return reference
}

/** Waits until the tracker knows of so many seeders, over all swarms. */
export async function untilSeeders(server: FleetServer, count: number): Promise<void> {
  await until(`${count} seeders`, async () => {
    const stats = (await (await fetch(`${server.metricsUrl}/stats.json`)).json()) as { seeders: number }
    return stats.seeders >= count
  })
}
