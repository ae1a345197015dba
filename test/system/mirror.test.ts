import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { after, before, test } from 'node:test'
import { promisify } from 'node:util'
import { eventually } from '../agent/engine/fixtures.ts'
import type { Containerd } from '../support/containerd.ts'
import { startContainerd } from '../support/containerd.ts'
import type { FleetServer } from '../support/fleet.ts'
import { deployctlOk, startFleetServer } from '../support/fleet.ts'
import type { WrittenImage } from '../support/image.ts'
import { writeIndexImage } from '../support/image.ts'
import { pushImage, startMirrorHost, untilSeeders } from '../support/mirror.ts'

const run = promisify(execFile)
const mebibyte = 1024 * 1024

let directory = ''
let server: FleetServer
let image: WrittenImage
let reference = ''
let admin = ''

before(async () => {
  directory = await mkdtemp(join(tmpdir(), 'rackswarm-mirror-'))
  server = await startFleetServer(directory, { settings: 'min_announce_interval: 1s\n' })
  admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
  image = await writeIndexImage(join(directory, 'image'), [
    { architecture: 'amd64', layerBytes: 64 * mebibyte },
    { architecture: 'arm64', layerBytes: 3 * mebibyte + 17 },
  ])
  reference = await pushImage(server, join(directory, 'image'), 'team/app')
})

after(async () => {
  await server[Symbol.asyncDispose]()
  await rm(directory, { recursive: true, force: true })
})

test('containerd pulls all platforms through the mirrors of two hosts without a login, the second from the first', async (t) => {
  const [one, two] = [await started(t, 'a1'), await started(t, 'a2')]
  const [first, second] = [await containerd(t, 'c1'), await containerd(t, 'c2')]
  await first.fetch(reference, one)
  await assertWhole(first, image)
  assert.ok((await one.metric('rackswarm_agent_mirror_sent_bytes_total{from="swarm"}')) > 67 * mebibyte)
  await untilSeeders(server, 2)
  await second.fetch(reference, two)
  await assertWhole(second, image)
  const layerBytes = image.layers.reduce((total, { sizeBytes }) => total + sizeBytes, 0)
  await eventually(
    async () => (await two.metric('rackswarm_agent_received_bytes_total{source="own_rack"}')) >= layerBytes,
    'the layers came from the rack',
  )
  assert.equal(await two.metric('rackswarm_agent_received_bytes_total{source="webseed"}'), 0)
  // Configurations are too small for a swarm.
  assert.ok((await two.metric('rackswarm_agent_received_bytes_total{source="registry"}')) < 10_000)
})

test('skopeo and podman pull through a registries.conf, without a login', async (t) => {
  const host = await started(t, 'b1')
  const copied = join(directory, 'copied')
  await run('skopeo', [
    ...['--insecure-policy', '--registries-conf', host.registriesConf],
    ...['copy', '--all', '--preserve-digests', `docker://${reference}`, `oci:${copied}:1`],
  ])
  for (const sha256 of image.blobs)
    assert.equal(await sha256Of(join(copied, 'blobs', 'sha256', sha256)), sha256)
  const storage = join(directory, 'podman')
  const podman = (...args: string[]) =>
    run(
      'podman',
      [
        '--root',
        join(storage, 'root'),
        '--runroot',
        join(storage, 'run'),
        '--storage-driver',
        'vfs',
        ...args,
      ],
      { env: { ...process.env, CONTAINERS_REGISTRIES_CONF: host.registriesConf } },
    )
  const { stdout } = await podman('pull', '--quiet', '--arch', 'arm64', reference)
  const { stdout: inspected } = await podman(
    'image',
    'inspect',
    '--format',
    '{{.RootFS.Layers}}',
    stdout.trim(),
  )
  assert.match(inspected, new RegExp(image.layers[1]?.sha256 ?? 'none'))
  assert.ok((await host.metric('rackswarm_agent_mirror_sent_bytes_total{from="cache"}')) >= 3 * mebibyte)
})

test('a host that was revoked helps nobody: containerd goes on to the registry, and pulls with its own login', async (t) => {
  const host = await started(t, 'r1')
  const client = await containerd(t, 'c3')
  await deployctlOk(server, ['hosts', 'revoke', 'r1'])
  await eventually(
    async () => (await fetch(`${host.mirrorUrl}/v2/team/app/manifests/1`)).status === 404,
    'the end of its rights',
  )
  await assert.rejects(client.fetch(reference, host), /401|unauthorized|authorization failed/i)
  await client.fetch(reference, { ...host, user: `token:${admin}` })
  await assertWhole(client, image)
  assert.equal(await host.metric('rackswarm_agent_mirror_sent_bytes_total{from="swarm"}'), 0)
})

test('kill -9 of the agent in the middle of a pull: the client pulls on from the registry, and again from the agent', async (t) => {
  const settings = { extra: 'limits: { download: 16MiB }\n' }
  const host = await started(t, 'k1', settings)
  const client = await containerd(t, 'c4')
  const pulling = client.fetch(reference, { ...host, user: `token:${admin}` }).catch(() => undefined)
  await eventually(
    async () => (await host.metric('rackswarm_agent_mirror_sent_bytes_total{from="swarm"}')) > 8 * mebibyte,
    'some of the layer',
  )
  host.process.kill('SIGKILL')
  await pulling
  await client.fetch(reference, { ...host, user: `token:${admin}` })
  await assertWhole(client, image)
  const again = await started(t, 'k1', { port: Number(new URL(host.mirrorUrl).port) })
  const other = await containerd(t, 'c5')
  await other.fetch(reference, again)
  await assertWhole(other, image)
})

test('while the server is away a host pulls what its agent has, and hears at once of what it has not', async (t) => {
  const own = join(directory, 'own')
  const away = await startFleetServer(own)
  t.after(() => away[Symbol.asyncDispose]())
  const layout = join(directory, 'small')
  const small = await writeIndexImage(layout, [{ architecture: 'amd64', layerBytes: 2 * mebibyte }])
  const pushed = await pushImage(away, layout, 'team/small')
  const host = await startMirrorHost(join(own, 'a1'), away, { host: 'a1' })
  t.after(() => host[Symbol.asyncDispose]())
  await (await containerd(t, 'c6')).fetch(pushed, host)
  await away[Symbol.asyncDispose]()
  const client = await containerd(t, 'c7')
  await client.fetch(pushed, host)
  await assertWhole(client, small)
  const startedAt = performance.now()
  const absent = await fetch(`${host.mirrorUrl}/v2/team/other/manifests/1?ns=${new URL(away.publicUrl).host}`)
  assert.equal(absent.status, 404)
  assert.ok(performance.now() - startedAt < 1000)
})

async function started(t: TestContext, host: string, options: { extra?: string; port?: number } = {}) {
  const agent = await startMirrorHost(join(directory, host), server, { host, ...options })
  t.after(() => agent[Symbol.asyncDispose]())
  return agent
}

async function containerd(t: TestContext, name: string): Promise<Containerd> {
  const client = await startContainerd(join(directory, name))
  t.after(() => client[Symbol.asyncDispose]())
  return client
}

async function assertWhole(client: Containerd, { blobs }: WrittenImage): Promise<void> {
  for (const sha256 of blobs) assert.equal(await client.contentOf(sha256), sha256)
}

async function sha256Of(file: string): Promise<string> {
  return createHash('sha256')
    .update(await readFile(file))
    .digest('hex')
}
