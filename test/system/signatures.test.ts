import assert from 'node:assert/strict'
import { mkdtemp, readFile, readlink, rm, stat, writeFile } from 'node:fs/promises'
import { createServer, request } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { createAgentClient } from '../../lib/client/agent-client.ts'
import type { AgentStatus } from '../../lib/client/api.ts'
import { createHttpClient } from '../../lib/client/http.ts'
import { bytesSource, createRegistryClient } from '../../lib/client/registry-client.ts'
import type { SignedManifest } from '../../lib/client/signatures.ts'
import { attachBundle } from '../../lib/client/signatures.ts'
import { digestOf, parseDigest } from '../../lib/protocol/digest.ts'
import { bundleType } from '../../lib/protocol/dsse.ts'
import { readReleaseKeys } from '../../lib/token/release-keys.ts'
import { eventually } from '../agent/engine/fixtures.ts'
import type { FleetAgent, FleetServer } from '../support/fleet.ts'
import { skopeoCopy, writeAuthFile, writeImage } from './oci-image.ts'
import {
  deployctl,
  deployctlOk,
  fetchOn,
  refreshFile,
  startFleetAgent,
  startFleetServer,
  writeRandomFile,
} from '../support/fleet.ts'

const follow = 'follow: ["web:latest"]\nfollow_jitter: 10ms\n'
const manifestType = 'application/vnd.oci.image.manifest.v1+json'

test('a signed release goes to a host; an unsigned one is refused, says why, and the one before it stays current; once it is signed it goes too', async (t) => {
  const { server, directory, build, key } = await started(t)
  const agent = await startAgent(t, directory, server, { signatures: `keys: ["${key}.pub"]`, extra: follow })
  await deployctlOk(server, ['publish', build, 'web:1', '--sign-key', key])
  const first = await untilHeld(agent, digestIn(await show(server, 'web:1')))

  await refreshFile(build)
  await deployctlOk(server, ['publish', build, 'web:2'])
  const second = digestIn(await show(server, 'web:2'))
  const refused = await untilState(agent, 'web:latest', second, 'failed')
  const words = /^refused: it is not signed\. Sign it for what it is: deployctl sign web:latest$/
  assert.match(refused.reason ?? '', words)
  assert.deepEqual(refused.bytes, { ownRack: 0, otherRacks: 0, webseed: 0 })
  assert.equal(refused.path, first.path)
  assert.equal(await readlink(join(first.path, '..', 'current')), first.digest.slice(7))

  const local = { DEPLOYCTL_SOCKET: agent.socketPath }
  await eventually(async () => (await deployctl(server, ['status', 'web:latest'])).code === 3, 'exit code 3')
  assert.match(await statusOf(server), /failed.*refused: it is not signed/)
  const transfers = await deployctlOk(server, ['transfers'], local)
  assert.match(transfers, new RegExp(`^web:latest ${second}\\nrefused: it is not signed`))
  const metrics = await metricsOf(agent)
  assert.match(metrics, /^rackswarm_agent_releases_refused 1$/m)
  assert.match(
    metrics,
    /^rackswarm_agent_signature_checks_total\{outcome="refused",fault="unsigned"\} [1-9]/m,
  )
  assert.match(metrics, /^rackswarm_agent_signature_checks_total\{outcome="signed",fault="none"\} 1$/m)
  const log = await readFile(join(directory, 'a1', 'agent.log'), 'utf8')
  assert.equal(log.match(/"msg":"release refused"/g)?.length, 1, 'a person is told once')
  const fetched = await deployctl(server, ['fetch', 'web:2'], { env: local })
  assert.deepEqual([fetched.code, fetched.stdout], [7, ''])
  assert.match(fetched.stderr, /refused: it is not signed\nSign it for what it is: deployctl sign web:2/)

  // Who asks for what the host follows does not wait until it is signed either.
  assert.equal((await deployctl(server, ['fetch', 'web:latest'], { env: local })).code, 7)

  await deployctlOk(server, ['sign', 'web:latest', '--sign-key', key])
  const next = await untilHeld(agent, second)
  assert.ok((await readFile(join(next.path, 'build.tar'))).equals(await readFile(build)))
  assert.match(await metricsOf(agent), /^rackswarm_agent_releases_refused 0$/m)
  assert.equal(await deployctlOk(server, ['transfers'], local), '')
  // It was signed for the one tag.
  const other = await deployctl(server, ['fetch', 'web:2'], { env: local })
  assert.equal(other.code, 7)
  assert.match(other.stderr, /its signature is for the tag latest/)
})

test('no tag moves before its signature can be found', async (t) => {
  const { server, build, key } = await started(t)
  const puts: string[] = []
  const proxy = createServer((incoming, outgoing) => {
    const { method, url = '', headers } = incoming
    if (method === 'PUT' && url.includes('/manifests/')) puts.push(url.replace(/.*\/manifests\//, ''))
    const target = new URL(url, server.publicUrl)
    const onward = request(target, { method, headers }, (answer) => {
      outgoing.writeHead(answer.statusCode ?? 502, answer.headers)
      answer.pipe(outgoing)
    })
    incoming.pipe(onward)
  })
  await new Promise<void>((resolve) => proxy.listen(0, '127.0.0.1', resolve))
  t.after(() => {
    proxy.closeAllConnections()
    proxy.close()
  })
  const through = `http://127.0.0.1:${(proxy.address() as AddressInfo).port}`
  const published = await deployctl(server, ['publish', build, 'web:1', '--sign-key', key, '--json'], {
    env: { DEPLOYCTL_SERVER: through },
  })
  assert.equal(published.code, 0, published.stderr)
  const { digest, signedBy } = JSON.parse(published.stdout) as { digest: string; signedBy: string }
  const [manifest, signature, ...tags] = puts
  assert.equal(manifest, digest)
  assert.match(signature ?? '', /^sha256:/)
  assert.deepEqual(tags, ['1', 'latest'])
  const index = (await (
    await fetch(`${server.publicUrl}/v2/web/referrers/${digest}`, { headers: await adminHeaders(server) })
  ).json()) as { manifests: { digest: string; artifactType: string; annotations: Record<string, string> }[] }
  // The server lists the torrent of the build too.
  const bundles = index.manifests.filter(({ artifactType }) => artifactType === bundleType)
  assert.deepEqual(
    bundles.map((referrer) => referrer.digest),
    [signature],
  )
  const [listed] = bundles
  assert.deepEqual(
    ['dev.sigstore.bundle.content', 'vnd.rackswarm.signature.key'].map((name) => listed?.annotations[name]),
    ['dsse-envelope', signedBy],
  )
})

test('a key is replaced without a release being refused: both are trusted for a while, each change by SIGHUP', async (t) => {
  const { server, directory, build, key: old } = await started(t)
  const fresh = join(directory, 'fresh.pem')
  await deployctlOk(server, ['keys', 'generate-signing', fresh, '--algorithm', 'Ed25519'])
  const agent = await startAgent(t, directory, server, { signatures: `keys: ["${old}.pub"]`, extra: follow })
  const publish = async (tag: string, key: string) => {
    await refreshFile(build)
    await deployctlOk(server, ['publish', build, `web:${tag}`, '--sign-key', key])
    return digestIn(await show(server, `web:${tag}`))
  }
  const trust = async (...keys: string[]) => {
    const file = join(directory, 'a1', 'agent.yaml')
    const list = keys.map((key) => `"${key}.pub"`).join(', ')
    await writeFile(
      file,
      (await readFile(file, 'utf8')).replace(/^signatures: .*$/m, `signatures: { keys: [${list}] }`),
    )
    process.kill(agent.pid, 'SIGHUP')
  }
  await untilHeld(agent, await publish('1', old))
  const second = await publish('2', fresh)
  const refused = await untilState(agent, 'web:latest', second, 'failed')
  assert.match(refused.reason ?? '', /signed by a key that is not trusted here: .*Add the public key/)
  await trust(old, fresh)
  await untilHeld(agent, second)
  await untilHeld(agent, await publish('3', old))
  await trust(fresh)
  await untilHeld(agent, await publish('4', fresh))
  await untilState(agent, 'web:latest', await publish('5', old), 'failed')
  // A file that is not there changes nothing.
  await trust(join(directory, 'absent'))
  const log = join(directory, 'a1', 'agent.log')
  await eventually(
    async () =>
      /signatures\.keys: Cannot use public key .*absent.*reload failed/.test(await readFile(log, 'utf8')),
    'the fault in the log',
  )
  await untilHeld(agent, await publish('6', fresh))
})

test('a signature of something else, one that was changed, one that is too large and one that is none are refused; a good one among them is found', async (t) => {
  const { server, directory, build, key } = await started(t)
  const agent = await startAgent(t, directory, server, { signatures: `keys: ["${key}.pub"]` })
  await deployctlOk(server, ['publish', build, 'web:1', '--sign-key', key])
  await deployctlOk(server, ['publish', build, 'db:2', '--sign-key', key])
  await deployctlOk(server, ['publish', build, 'web:2'])
  await using registry = await openRegistry(server)
  const { client } = registry
  const keyId = keyIdOf(key)
  const attach = async (bundle: Buffer, to: SignedManifest) => {
    await attachBundle(client, { repository: 'web', subject: to, bundle, keyId, createdAt: new Date() })
  }
  const refused = async (why: RegExp) => {
    await assert.rejects(fetchOn(agent, 'web:2'), why)
    const verified = await deployctl(server, ['verify', 'web:2', '--key', `${key}.pub`])
    assert.equal(verified.code, 7)
    assert.match(verified.stderr, why)
  }
  const subject = await manifestOf(client, 'web:2')
  await refused(/it is not signed/)
  await attach(Buffer.from('no bundle'), subject)
  await refused(/it is not JSON/)
  await attach(Buffer.alloc(2 * 1024 * 1024, 0x20), subject)
  await refused(/it is not JSON|2097152 bytes, at most 1048576 are read/)
  const good = await bundleOf(client, 'web:1')
  const changed = JSON.parse(good.toString()) as { dsseEnvelope: { payload: string } }
  changed.dsseEnvelope.payload = Buffer.from(
    Buffer.from(changed.dsseEnvelope.payload, 'base64')
      .toString()
      .replace((await manifestOf(client, 'web:1')).digest.slice(7), subject.digest.slice(7)),
  ).toString('base64')
  await attach(Buffer.from(JSON.stringify(changed)), subject)
  await refused(/it was changed/)
  // Swapped: whole and good, but for another release, and for another repository.
  await attach(await bundleOf(client, 'db:2'), subject)
  await refused(/its signature is for db/)
  await attach(good, subject)
  await refused(/its signature is for (db|web), sha256:/)
  await deployctlOk(server, ['sign', 'web:2', '--sign-key', key])
  await fetchOn(agent, 'web:2')
  assert.match(
    (await deployctl(server, ['sign', 'web:2', '--sign-key', key])).stderr,
    /is signed by this key already/,
  )
})

test('the same manifest in another repository is another release', async (t) => {
  const { server, directory, build, key } = await started(t)
  const agent = await startAgent(t, directory, server, { signatures: `keys: ["${key}.pub"]` })
  await deployctlOk(server, ['publish', build, 'staging:1', '--sign-key', key])
  await using registry = await openRegistry(server)
  const { client, call } = registry
  const { bytes } = await client.pullManifest('staging', '1')
  const { layers, config } = JSON.parse(bytes.toString()) as Record<'layers', { digest: string }[]> &
    Record<'config', { digest: string }>
  for (const { digest } of [...layers, config])
    await call('POST', `/v2/prod/blobs/uploads/?mount=${digest}&from=staging`)
  await client.pushManifest('prod', '1', manifestType, bytes)
  await attachBundle(client, {
    repository: 'prod',
    subject: await manifestOf(client, 'prod:1'),
    bundle: await bundleOf(client, 'staging:1'),
    keyId: keyIdOf(key),
    createdAt: new Date(),
  })
  await fetchOn(agent, 'staging:1')
  await assert.rejects(fetchOn(agent, 'prod:1'), /refused: its signature is for staging/)
})

test('an image that skopeo has pushed is signed afterwards, and taken', async (t) => {
  const { server, directory, key } = await started(t)
  const agent = await startAgent(t, directory, server, { signatures: `keys: ["${key}.pub"]` })
  const image = join(directory, 'image')
  const layer = await writeImage(image)
  const authFile = join(directory, 'auth.json')
  await writeAuthFile(authFile, server.publicUrl, (await readFile(server.adminTokenFile, 'utf8')).trim())
  const target = `docker://${new URL(server.publicUrl).host}/team/app:1`
  await skopeoCopy(authFile, '--dest-tls-verify=false', `oci:${image}:1`, target)
  await assert.rejects(fetchOn(agent, 'team/app:1'), /refused: it is not signed/)
  await deployctlOk(server, ['sign', 'team/app:1', '--sign-key', key])
  const { files } = await fetchOn(agent, 'team/app:1')
  assert.ok(files.some(({ digest }) => digest === `sha256:${layer}`))
  const shown = await deployctlOk(server, ['verify', 'team/app:1', '--key', `${key}.pub`])
  assert.match(shown, new RegExp(`^file {7}sha256:${layer}, sha256:${layer}, infohash \\w{40}$`, 'm'))
})

test('a good signature is found among a thousand, and too many that claim to be are refused in words', async (t) => {
  const { server, directory, build, key } = await started(t)
  const agent = await startAgent(t, directory, server, { signatures: `keys: ["${key}.pub"]` })
  await deployctlOk(server, ['publish', build, 'web:1'])
  await using registry = await openRegistry(server)
  const { client } = registry
  const junk = Buffer.from('{"mediaType": "junk"}')
  const [layer, config] = [await client.pushBlob('web', bytesSource(junk)), Buffer.from('{}')]
  const subject = await manifestOf(client, 'web:1')
  const keyId = keyIdOf(key)
  const attachMany = async (count: number, named: string) => {
    const push = async (i: number) => {
      const manifest = Buffer.from(
        JSON.stringify({
          schemaVersion: 2,
          mediaType: manifestType,
          artifactType: bundleType,
          config: { mediaType: 'application/vnd.oci.empty.v1+json', digest: digestOf(config), size: 2 },
          layers: [{ mediaType: bundleType, digest: layer, size: junk.length }],
          subject: { mediaType: manifestType, digest: subject.digest, size: subject.sizeBytes },
          annotations: { number: String(i), 'vnd.rackswarm.signature.key': named },
        }),
      )
      await client.pushManifest('web', digestOf(manifest), manifestType, manifest)
    }
    for (let i = 0; i < count; i += 20) await Promise.all(Array.from({ length: 20 }, (_, j) => push(i + j)))
  }
  await attachMany(1000, 'somebody else')
  await assert.rejects(
    fetchOn(agent, 'web:1'),
    /refused: 1000 signatures are attached to it, and only 100 are looked at/,
  )
  await deployctlOk(server, ['sign', 'web:1', '--sign-key', key])
  const { seconds } = await fetchOn(agent, 'web:1')
  assert.ok(seconds < 10, `${seconds} s`)
  await deployctlOk(server, ['publish', build, 'web:2'])
  Object.assign(subject, await manifestOf(client, 'web:2'))
  await attachMany(120, keyId)
  const verified = await deployctl(server, ['verify', 'web:2', '--key', `${key}.pub`])
  assert.equal(verified.code, 7)
  assert.match(verified.stderr, /120 signatures are attached to it, and only 100 are looked at/)
})

test('rules for some repositories, a warning in place of a refusal, and a tag that is promoted by moving it', async (t) => {
  const { server, directory, build, key } = await started(t)
  const agent = await startAgent(t, directory, server, {
    signatures: `keys: ["${key}.pub"], repositories: [{ match: ["team/*"], policy: warn }, { match: [lab], policy: accept_unsigned }, { match: [app], accept_other_tags: true }]`,
  })
  for (const name of ['team/one:1', 'lab:1', 'web:1']) await deployctlOk(server, ['publish', build, name])
  const warned = await fetchOn(agent, 'team/one:1')
  assert.equal(warned.held.reason, 'taken without a good signature: it is not signed')
  assert.equal((await fetchOn(agent, 'lab:1')).held.reason, undefined)
  await assert.rejects(fetchOn(agent, 'web:1'), /refused: it is not signed/)
  assert.match(
    await metricsOf(agent),
    /^rackswarm_agent_signature_checks_total\{outcome="warned",fault="unsigned"\} 1$/m,
  )
  await using registry = await openRegistry(server)
  for (const name of ['app', 'web']) {
    await deployctlOk(server, ['publish', build, `${name}:3`, '--no-latest', '--sign-key', key])
    const { bytes } = await registry.client.pullManifest(name, '3')
    await registry.client.pushManifest(name, 'stable', manifestType, bytes)
  }
  await fetchOn(agent, 'app:stable')
  await assert.rejects(fetchOn(agent, 'web:stable'), /its signature is for the tag 3/)
  // By its digest it has no tag that could be another.
  await fetchOn(agent, `web@${(await manifestOf(registry.client, 'web:3')).digest}`)
  const image = await deployctl(server, ['verify', 'web:stable', '--key', `${key}.pub`, '--any-tag'])
  assert.equal(image.code, 0, image.stderr)
})

test('an agent that trusts no key, and was not told to do without, takes nothing and says what to set', async (t) => {
  const { server, directory, build, key } = await started(t)
  const agent = await startAgent(t, directory, server, { signatures: '' })
  await deployctlOk(server, ['publish', build, 'web:1', '--sign-key', key])
  const fetched = await deployctl(server, ['fetch', 'web:1'], { env: { DEPLOYCTL_SOCKET: agent.socketPath } })
  assert.equal(fetched.code, 7)
  assert.match(fetched.stderr, /this host trusts no key for it\nName the public keys .* signatures\.keys/)
  assert.match(await readFile(join(directory, 'a1', 'agent.log'), 'utf8'), /no key is trusted/)
})

test('deployctl makes keys, signs with the one that it finds, and says who signed what', async (t) => {
  const { server, directory, build, key } = await started(t)
  assert.equal((await stat(key)).mode & 0o777, 0o600)
  assert.equal((await stat(`${key}.pub`)).mode & 0o777, 0o644)
  const again = await deployctl(server, ['keys', 'generate-signing', key])
  assert.deepEqual([again.code, again.stdout], [6, ''])
  const none = await deployctl(server, ['publish', build, 'web:1'], { env: { DEPLOYCTL_SIGN_KEY_FILE: '' } })
  assert.equal(none.code, 2)
  assert.match(none.stderr, /there is no key\n.*keys generate-signing.*--no-sign/)
  const home = { XDG_CONFIG_HOME: join(directory, 'home'), DEPLOYCTL_SIGN_KEY_FILE: '' }
  await deployctlOk(server, ['keys', 'generate-signing'], home)
  const usual = join(directory, 'home', 'deployctl', 'signing-key.pem')
  const github = {
    GITHUB_ACTIONS: 'true',
    GITHUB_REPOSITORY: 'acme/web',
    GITHUB_SHA: 'a'.repeat(40),
    GITHUB_RUN_ID: '99',
  }
  const text = await deployctlOk(server, ['publish', build, 'web:1'], { ...home, ...github })
  assert.match(text, /^signed {5}by key \S{44}$/m)
  const shown = await deployctlOk(server, ['verify', 'web:1', '--key', `${key}.pub`, '--key', `${usual}.pub`])
  assert.match(shown, /^verified {3}web:1 sha256:\w{64}$/m)
  assert.match(shown, new RegExp(`^signed by {2}${usual}\\.pub \\S{44}$`, 'm'))
  assert.match(shown, /^for {8}web:1, web:latest$/m)
  assert.match(shown, /^file {7}build\.tar, sha256:\w{64}, infohash \w{40}$/m)
  assert.match(shown, /^source {5}git\+https:\/\/github\.com\/acme\/web, commit a{40}$/m)
  assert.match(shown, /^run {8}https:\/\/github\.com\/acme\/web\/actions\/runs\/99\/attempts\/1$/m)
  const json = JSON.parse(
    await deployctlOk(server, ['verify', 'web:1', '--key', `${usual}.pub`, '--json']),
  ) as Record<string, unknown>
  assert.deepEqual(json['tags'], ['1', 'latest'])
  const cases: readonly (readonly [string[], number, RegExp])[] = [
    [['verify', 'web:1', '--key', `${key}.pub`], 7, /not trusted here.*\n.*deployctl sign web:1/],
    [['verify', 'web:1', '--key', key], 2, /private key/],
    [['verify', 'web:1', '--key', join(directory, 'absent')], 2, /absent/],
    [['verify', 'web:1'], 2, /--key/],
    [['publish', build, 'web:2', '--no-sign', '--sign-key', key], 2, /both sign and not sign/],
    [['verify', 'nothing:1', '--key', `${key}.pub`], 5, /nothing/],
    [['sign', 'web:1', '--sign-key', `${key}.pub`], 2, /others can read/],
    [['keys', 'generate-signing', join(directory, 'x'), '--algorithm', 'RSA'], 2, /ES256, Ed25519, RS256/],
  ]
  for (const [args, code, words] of cases) {
    const result = await deployctl(server, args)
    assert.deepEqual([result.code, result.stdout], [code, ''], `${args.join(' ')}: ${result.stderr}`)
    assert.match(result.stderr, words, args.join(' '))
  }
})

async function started(t: TestContext) {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-signed-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const server = await startFleetServer(directory)
  t.after(() => server[Symbol.asyncDispose]())
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, 600_000)
  const key = join(directory, 'key.pem')
  await deployctlOk(server, ['keys', 'generate-signing', key])
  return { directory, server, build, key }
}

async function startAgent(
  t: TestContext,
  directory: string,
  server: FleetServer,
  settings: { signatures: string; extra?: string },
): Promise<FleetAgent> {
  const agent = await startFleetAgent(join(directory, 'a1'), server, { host: 'a1', place: 'r1', ...settings })
  t.after(() => agent[Symbol.asyncDispose]())
  return agent
}

type Held = AgentStatus['references'][number]

async function untilHeld(agent: FleetAgent, digest: string): Promise<Held & { path: string }> {
  const held = await untilState(agent, 'web:latest', digest, 'held')
  return { ...held, path: held.path ?? '' }
}

async function untilState(
  agent: FleetAgent,
  reference: string,
  digest: string,
  state: Held['state'],
): Promise<Held> {
  await using client = createAgentClient({ socketPath: agent.socketPath })
  let found: Held | undefined
  await eventually(async () => {
    found = (await client.status()).references.find((held) => held.reference === reference)
    return found?.digest === digest && found.state === state
  }, `${reference} ${digest} is ${state}`)
  if (!found) throw new Error('unreachable')
  return found
}

async function statusOf(server: FleetServer): Promise<string> {
  return (await deployctl(server, ['status', 'web:latest', '--hosts'])).stdout
}

async function metricsOf(agent: FleetAgent): Promise<string> {
  return (await fetch(`${String(agent.ready['metricsUrl'])}/metrics`)).text()
}

async function show(server: FleetServer, reference: string): Promise<string> {
  return deployctlOk(server, ['show', reference, '--json'])
}

function digestIn(json: string): string {
  return (JSON.parse(json) as { digest: string }).digest
}

function keyIdOf(key: string): string {
  return readReleaseKeys(`${key}.pub`)[0]?.id ?? ''
}

async function adminHeaders(server: FleetServer): Promise<{ authorization: string }> {
  return { authorization: `Bearer ${(await readFile(server.adminTokenFile, 'utf8')).trim()}` }
}

async function openRegistry(server: FleetServer) {
  const token = (await readFile(server.adminTokenFile, 'utf8')).trim()
  const http = createHttpClient({ baseUrl: server.publicUrl, credential: () => token })
  return {
    client: createRegistryClient(http),
    call: async (method: 'POST', path: string) => {
      await (await http.ok({ method, path })).discard()
    },
    [Symbol.asyncDispose]: () => http[Symbol.asyncDispose](),
  }
}

type Client = Awaited<ReturnType<typeof openRegistry>>['client']

async function manifestOf(client: Client, reference: string): Promise<SignedManifest> {
  const [repository = '', tag = ''] = reference.split(':')
  const { digest, mediaType, bytes } = await client.pullManifest(repository, tag)
  return { digest, mediaType, sizeBytes: bytes.length }
}

/** The signature that publish stored. */
async function bundleOf(client: Client, reference: string): Promise<Buffer> {
  const [repository = ''] = reference.split(':')
  const { digest } = await manifestOf(client, reference)
  const [attached] = await client.referrers(repository, digest, bundleType)
  assert.ok(attached, `${reference} is signed`)
  const { bytes } = await client.pullManifest(repository, attached.digest)
  const { layers } = JSON.parse(bytes.toString()) as { layers: { digest: string }[] }
  const blob = await client.pullBlob(repository, parseDigest(layers[0]?.digest ?? ''), { start: 0 })
  return blob.bytes()
}
