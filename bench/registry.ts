import { createHash, randomBytes } from 'node:crypto'
import { open, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Pool } from 'undici'
import { startDockerRegistry } from '../test/support/docker-registry.ts'
import { refreshFile, startFleetServer, writeRandomFile } from '../test/support/fleet.ts'
import { freePort } from '../test/support/foreign.ts'
import { installTools } from '../test/support/tools.ts'
import type { BenchOptions, Benchmark, Side } from './harness.ts'
import { cpuSecondsOf } from './harness.ts'

/** The registry beside the one that most people run: one blob in, the same one out, and many small manifests. */
export const registry: Benchmark = {
  name: 'registry',
  summary: 'a blob pushed and pulled, and small manifests pulled, beside docker-registry',
  figures: [
    { name: 'push', unit: 'MiB/s' },
    { name: 'push CPU', unit: 's/GiB' },
    { name: 'pull', unit: 'MiB/s' },
    { name: 'pull CPU', unit: 's/GiB' },
    { name: 'manifests', unit: '/s' },
    { name: 'manifest CPU', unit: 'µs' },
  ],
  prepare,
}

const manifestCount = 2000
/** Each manifest is pulled so often in a run. */
const rounds = 5
const connections = 16
const repository = 'bench/app'
const manifestType = 'application/vnd.oci.image.manifest.v1+json'
const chunkBytes = 1024 * 1024

interface Registry {
  readonly origin: string
  readonly pid: number
  readonly headers: Readonly<Record<string, string>>
}

async function prepare(stack: AsyncDisposableStack, { sizeBytes, directory }: BenchOptions): Promise<Side[]> {
  installTools(['docker-registry'])
  const build = join(directory, 'layer.bin')
  await writeRandomFile(build, sizeBytes)
  const ours = stack.use(await startFleetServer(join(directory, 'ours')))
  const theirs = stack.use(await startDockerRegistry(join(directory, 'theirs'), { port: await freePort() }))
  const token = (await readFile(ours.adminTokenFile, 'utf8')).trim()
  const client =
    'one client over loopback, plaintext: POST, PATCH in one stream of 1 MiB reads, PUT; GET of the blob; 2,000 manifests by digest, five times each, over 16 connections; new content each run; CPU of the server alone'
  return [
    side('rackswarm', `rackswarm-server as npm pack ships it, each request with a token; ${client}`, {
      registry: { origin: ours.publicUrl, pid: ours.pid, headers: { authorization: `Bearer ${token}` } },
      build,
      sizeBytes,
    }),
    side(
      'docker-registry',
      `docker-registry of Debian, filesystem driver, descriptors cached in memory, no authentication, no access log; it neither syncs nor hashes pieces; ${client}`,
      { registry: { origin: theirs.url, pid: theirs.pid, headers: {} }, build, sizeBytes },
    ),
  ]
}

interface Work {
  readonly registry: Registry
  readonly build: string
  readonly sizeBytes: number
}

function side(name: string, settings: string, work: Work): Side {
  return { name, settings, run: () => run(work) }
}

async function run({ registry: { origin, pid, headers }, build, sizeBytes }: Work) {
  await refreshFile(build)
  await using stack = new AsyncDisposableStack()
  const pool = new Pool(origin, { connections })
  stack.defer(() => pool.close())
  const request = async (
    method: 'GET' | 'POST' | 'PATCH' | 'PUT',
    path: string,
    extra = {},
    body?: unknown,
  ) => {
    const reply = await pool.request({
      method,
      path,
      headers: { ...headers, ...extra },
      body: (body ?? null) as Buffer | null,
    })
    if (reply.statusCode >= 300)
      throw new Error(`${method} ${path}: ${reply.statusCode} ${await reply.body.text()}`)
    return reply
  }
  const pathOf = (location: unknown) => {
    const url = new URL(String(location), origin)
    return `${url.pathname}${url.search}`
  }
  const upload = async (bytes: () => unknown, length: number, digest: string) => {
    const started = await request('POST', `/v2/${repository}/blobs/uploads/`)
    await started.body.dump()
    const sent = await request(
      'PATCH',
      pathOf(started.headers['location']),
      { 'content-type': 'application/octet-stream', 'content-length': String(length) },
      bytes(),
    )
    await sent.body.dump()
    const path = pathOf(sent.headers['location'])
    const ended = await request('PUT', `${path}${path.includes('?') ? '&' : '?'}digest=${digest}`, {
      'content-length': '0',
    })
    await ended.body.dump()
  }
  const timed = async (work: () => Promise<void>) => {
    const start = performance.now()
    const { cpu } = await cpuSecondsOf({ server: pid }, work)
    return { seconds: (performance.now() - start) / 1000, cpuSeconds: cpu['server'] ?? Number.NaN }
  }

  const digest = `sha256:${await sha256Of(build)}`
  const push = await timed(() => upload(() => readChunks(build), sizeBytes, digest))
  const pull = await timed(async () => {
    const { body } = await request('GET', `/v2/${repository}/blobs/${digest}`)
    let bytes = 0
    for await (const chunk of body) bytes += (chunk as Buffer).length
    if (bytes !== sizeBytes) throw new Error(`Cannot use the pull: ${bytes} bytes of ${sizeBytes}`)
  })

  const config = Buffer.from(`{"run":"${randomBytes(8).toString('hex')}"}`)
  const configDigest = `sha256:${createHash('sha256').update(config).digest('hex')}`
  await upload(() => config, config.length, configDigest)
  const digests: string[] = []
  for (let i = 0; i < manifestCount; i++) {
    const manifest = Buffer.from(
      JSON.stringify({
        schemaVersion: 2,
        mediaType: manifestType,
        config: {
          mediaType: 'application/vnd.oci.image.config.v1+json',
          digest: configDigest,
          size: config.length,
        },
        layers: [],
        annotations: { number: String(i) },
      }),
    )
    const of = `sha256:${createHash('sha256').update(manifest).digest('hex')}`
    const put = await request(
      'PUT',
      `/v2/${repository}/manifests/${of}`,
      { 'content-type': manifestType },
      manifest,
    )
    await put.body.dump()
    digests.push(of)
  }
  const asked = Array.from({ length: rounds }, () => digests).flat()
  let next = 0
  const manifests = await timed(async () => {
    const one = async () => {
      for (let at = next++; at < asked.length; at = next++) {
        const reply = await request('GET', `/v2/${repository}/manifests/${asked[at] ?? ''}`, {
          accept: manifestType,
        })
        await reply.body.arrayBuffer()
      }
    }
    await Promise.all(Array.from({ length: connections }, one))
  })
  return {
    push: sizeBytes / 2 ** 20 / push.seconds,
    'push CPU': push.cpuSeconds / (sizeBytes / 2 ** 30),
    pull: sizeBytes / 2 ** 20 / pull.seconds,
    'pull CPU': pull.cpuSeconds / (sizeBytes / 2 ** 30),
    manifests: asked.length / manifests.seconds,
    'manifest CPU': (manifests.cpuSeconds * 1e6) / asked.length,
  }
}

async function* readChunks(file: string): AsyncGenerator<Buffer> {
  await using handle = await open(file)
  for (;;) {
    const { bytesRead, buffer } = await handle.read(Buffer.allocUnsafe(chunkBytes), 0, chunkBytes)
    if (bytesRead === 0) return
    yield buffer.subarray(0, bytesRead)
  }
}

async function sha256Of(file: string): Promise<string> {
  const hash = createHash('sha256')
  for await (const chunk of readChunks(file)) hash.update(chunk)
  return hash.digest('hex')
}
