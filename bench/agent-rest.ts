import { randomBytes } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { createHttpClient } from '../lib/client/http.ts'
import { createRegistryClient } from '../lib/client/registry-client.ts'
import { digestOf } from '../lib/protocol/digest.ts'
import type { FleetServer } from '../test/support/fleet.ts'
import { fetchOn, startFleetAgent, startFleetServer } from '../test/support/fleet.ts'
import type { BenchOptions, Benchmark, Side } from './harness.ts'
import { cpuSecondsOf } from './harness.ts'
import { readMemoryMiB, readPeakMemoryMiB } from './proc.ts'

const blobs = 500
/** Just enough to have a torrent. */
const blobBytes = 300 * 1024
const settleMs = 30_000
const measureMs = 60_000

/** What an agent costs a host that does nothing but have builds. */
export const agentRest: Benchmark = {
  name: 'agent-rest',
  summary: `an agent that seeds ${blobs} blobs that nobody wants: memory, and share of a core`,
  figures: [
    { name: 'memory', unit: 'MiB' },
    { name: 'peak memory', unit: 'MiB' },
    { name: 'share of a core', unit: '%' },
  ],
  ignoresSize: true,
  unwarmed: true,
  prepare,
}

async function prepare(stack: AsyncDisposableStack, { directory }: BenchOptions): Promise<Side[]> {
  const server = stack.use(await startFleetServer(join(directory, 'server')))
  await publishMany(server, 'bench', '1')
  const settings = { host: 'host', place: 'rack', extra: 'follow: [bench:1]\n' }
  const start = () => startFleetAgent(join(directory, 'agent'), server, settings)
  {
    await using first = await start()
    await fetchOn(first, 'bench:1')
  }
  return [
    {
      name: 'agent',
      settings: `${blobs} blobs of ${blobBytes} bytes in one release that it follows; started again, ${settleMs / 1000} s to settle, then ${measureMs / 1000} s of reports and announces; resident memory with pages that it shares`,
      run: async () => {
        await using agent = await start()
        await sleep(settleMs)
        const { cpu } = await cpuSecondsOf({ agent: agent.pid }, () => sleep(measureMs))
        return {
          memory: await readMemoryMiB([agent.pid]),
          'peak memory': await readPeakMemoryMiB(agent.pid),
          'share of a core': (100 * (cpu['agent'] ?? 0)) / (measureMs / 1000),
        }
      },
    },
  ]
}

async function publishMany(server: FleetServer, repository: string, tag: string): Promise<void> {
  const token = (await readFile(server.adminTokenFile, 'utf8')).trim()
  await using http = createHttpClient({
    baseUrl: server.publicUrl,
    userAgent: 'bench',
    credential: () => token,
  })
  const registry = createRegistryClient(http)
  const push = (bytes: Buffer) =>
    registry.pushBlob(repository, {
      sizeBytes: bytes.length,
      open: async function* (offset: number) {
        yield bytes.subarray(offset)
      },
      digest: () => Promise.resolve(digestOf(bytes)),
    })
  const layers = []
  for (let number = 0; number < blobs; number++) {
    const digest = await push(randomBytes(blobBytes))
    layers.push({ mediaType: 'application/octet-stream', digest, size: blobBytes })
  }
  const config = Buffer.from('{}')
  const manifest = {
    schemaVersion: 2,
    mediaType: 'application/vnd.oci.image.manifest.v1+json',
    config: {
      mediaType: 'application/vnd.oci.empty.v1+json',
      digest: await push(config),
      size: config.length,
    },
    layers,
  }
  await registry.pushManifest(repository, tag, manifest.mediaType, Buffer.from(JSON.stringify(manifest)))
}
