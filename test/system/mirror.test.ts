import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { after, before, test } from 'node:test'
import { promisify } from 'node:util'
import { createHttpClient } from '../../lib/client/http.ts'
import { createRegistryClient } from '../../lib/client/registry-client.ts'
import { digestOf } from '../../lib/protocol/digest.ts'
import type { Containerd } from '../support/containerd.ts'
import { startContainerd } from '../support/containerd.ts'
import type { FleetServer } from '../support/fleet.ts'
import { deployctlOk, startFleetServer } from '../support/fleet.ts'
import type { WrittenImage } from '../support/image.ts'
import { writeIndexImage } from '../support/image.ts'
import { pushImage, startMirrorHost, untilSeeders } from '../support/mirror.ts'
import { until } from '../support/until.ts'

const run = promisify(execFile)
const mebibyte = 1024 * 1024
const manifestType = 'application/vnd.oci.image.manifest.v1+json'
const indexType = 'application/vnd.oci.image.index.v1+json'

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
  await until(
    'the layers came from the rack',
    async () => (await two.metric('rackswarm_agent_received_bytes_total{source="own_rack"}')) >= layerBytes,
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
  await until(
    'the end of its rights',
    async () => (await fetch(`${host.mirrorUrl}/v2/team/app/manifests/1`)).status === 404,
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
  await until(
    'some of the layer',
    async () => (await host.metric('rackswarm_agent_mirror_sent_bytes_total{from="swarm"}')) > 8 * mebibyte,
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

test('with signatures: require a signed index comes with all of its platforms, and a manifest that nobody signed does not come', async (t) => {
  const key = join(directory, 'key.pem')
  await deployctlOk(server, ['keys', 'generate-signing', key])
  const host = await started(t, 's1', { signatures: `keys: ["${key}.pub"]` })
  const ask = async (path: string) => {
    const response = await fetch(`${host.mirrorUrl}/v2/${path}`)
    return { status: response.status, text: await response.text() }
  }
  const isRefused = async (path: string) => {
    const { status, text } = await ask(path)
    assert.deepEqual([status, /"code":"MANIFEST_UNKNOWN"/.test(text)], [404, true], path)
    assert.match(text, /This host does not take .*@sha256:\w{64}: refused: it is not signed/, path)
  }
  const push = async (name: string, layout: WrittenLayout) => pushImage(server, layout.directory, name)
  const [signed, plain, other] = [await layout('signed'), await layout('plain'), await layout('other')]
  const pulled = await push('signed/app', signed)
  const plainName = await push('plain/app', plain)
  await push('signed/app:2', other)
  await deployctlOk(server, ['sign', 'signed/app:1', '--sign-key', key])

  // The index by its tag, then each platform, its configuration and its layers by their digests.
  const first = await containerd(t, 's2')
  await first.fetch(pulled, host)
  await assertWhole(first, signed.image)
  const copied = join(directory, 'signed-copy')
  const skopeo = (reference: string, target: string) =>
    run('skopeo', [
      ...['--insecure-policy', '--registries-conf', host.registriesConf, '--override-arch', 'arm64'],
      ...['copy', '--preserve-digests', `docker://${reference}`, `oci:${target}`],
    ])
  await skopeo(pulled, copied)
  assert.equal(
    await sha256Of(join(copied, 'blobs', 'sha256', signed.image.layers[1]?.sha256 ?? '')),
    signed.image.layers[1]?.sha256,
  )

  await assert.rejects((await containerd(t, 's3')).fetch(plainName, host), /401|unauthorized|authorization/i)
  await assert.rejects(skopeo(plainName, join(directory, 'plain-copy')), /401|unauthorized|authentication/i)
  for (const path of [1, plain.index, ...plain.platforms]) await isRefused(`plain/app/manifests/${path}`)
  // Beside the signed one, in its repository.
  for (const path of [2, other.index, ...other.platforms]) await isRefused(`signed/app/manifests/${path}`)

  await using registry = await openRegistry()
  const { client } = registry
  const put = async (tag: string | undefined, mediaType: string, manifest: object) => {
    const bytes = Buffer.from(JSON.stringify({ schemaVersion: 2, mediaType, ...manifest }))
    return client.pushManifest('signed/app', tag ?? digestOf(bytes), mediaType, bytes)
  }
  const describe = async (digest: string) => {
    const { mediaType, bytes } = await client.pullManifest('signed/app', digest)
    return { mediaType, digest, size: bytes.length }
  }
  // An index that nobody signed names a platform of the signed one: the platform still comes, the index and what else it names do not.
  const [taken = '', refused = ''] = [signed.platforms[0], other.platforms[0]]
  const mixed = await put('mixed', indexType, { manifests: [await describe(taken), await describe(refused)] })
  for (const path of ['mixed', mixed, refused]) await isRefused(`signed/app/manifests/${path}`)
  assert.equal((await ask(`signed/app/manifests/${taken}`)).status, 200)

  // What refers to a signed manifest is not signed by that: anyone may push it.
  const about = await put(undefined, manifestType, {
    artifactType: 'application/spdx+json',
    config: { mediaType: 'application/vnd.oci.empty.v1+json', digest: digestOf(Buffer.from('{}')), size: 2 },
    layers: [],
    subject: await describe(signed.index),
  })
  await isRefused(`signed/app/manifests/${about}`)

  // An index of indexes: what the inner one names counts with it. A manifest that is signed itself comes by its digest alone.
  const outer = await put('outer', indexType, { manifests: [await describe(other.index)] })
  await deployctlOk(server, ['sign', 'signed/app:outer', '--sign-key', key])
  for (const path of [outer, other.index, ...other.platforms])
    assert.equal((await ask(`signed/app/manifests/${path}`)).status, 200, path)
  const single = plain.platforms[0] ?? ''
  await deployctlOk(server, ['sign', `plain/app@${single}`, '--sign-key', key])
  assert.equal((await ask(`plain/app/manifests/${single}`)).status, 200)
  await isRefused(`plain/app/manifests/${plain.platforms[1] ?? ''}`)

  // Under rules that are read again a client that has the index goes on with its platforms.
  process.kill(host.pid, 'SIGHUP')
  await until('the rules are read again', async () =>
    /reloaded/.test(await readFile(join(directory, 's1', 'agent.log'), 'utf8')),
  )
  for (const path of [...signed.platforms, ...other.platforms])
    assert.equal((await ask(`signed/app/manifests/${path}`)).status, 200, path)
  await isRefused(`signed/app/manifests/${about}`)
})

interface WrittenLayout {
  readonly directory: string
  readonly image: WrittenImage
  readonly index: string
  readonly platforms: readonly string[]
}

/** An index of two small platforms. */
async function layout(name: string): Promise<WrittenLayout> {
  const own = join(directory, name)
  const written = await writeIndexImage(own, [
    { architecture: 'amd64', layerBytes: 700_000 },
    { architecture: 'arm64', layerBytes: 300_000 },
  ])
  const { manifests } = JSON.parse(await readFile(join(own, 'index.json'), 'utf8')) as Index
  const index = manifests[0]?.digest ?? ''
  const listed = JSON.parse(await readFile(join(own, 'blobs', 'sha256', index.slice(7)), 'utf8')) as Index
  return { directory: own, image: written, index, platforms: listed.manifests.map(({ digest }) => digest) }
}

interface Index {
  readonly manifests: readonly { readonly digest: string }[]
}

async function openRegistry() {
  const http = createHttpClient({ baseUrl: server.publicUrl, credential: () => admin })
  return {
    client: createRegistryClient(http),
    [Symbol.asyncDispose]: () => http[Symbol.asyncDispose](),
  }
}

async function started(
  t: TestContext,
  host: string,
  options: { extra?: string; port?: number; signatures?: string } = {},
) {
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
