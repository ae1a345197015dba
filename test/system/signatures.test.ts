import assert from 'node:assert/strict'
import { mkdtemp, readFile, readlink, rm, stat, writeFile } from 'node:fs/promises'
import { createServer, request } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { after, before, test } from 'node:test'
import { createAgentClient } from '../../lib/client/agent-client.ts'
import { runPublish } from '../../cli/commands/publish.ts'
import { runVerify } from '../../cli/commands/signing.ts'
import { createContext } from '../../cli/context.ts'
import { exitCodes } from '../../cli/failure.ts'
import { createOutput } from '../../cli/output.ts'
import type { AgentStatus } from '../../lib/client/api.ts'
import { createHttpClient } from '../../lib/client/http.ts'
import type { RegistryClient } from '../../lib/client/registry-client.ts'
import { bytesSource, createRegistryClient } from '../../lib/client/registry-client.ts'
import type { SignedManifest } from '../../lib/client/signatures.ts'
import { attachBundle } from '../../lib/client/signatures.ts'
import { digestOf } from '../../lib/protocol/digest.ts'
import { bundleType, parseAttaching } from '../../lib/protocol/dsse.ts'
import type { Algorithm } from '../../lib/token/algorithms.ts'
import { generateReleaseKeys, readReleaseKeys } from '../../lib/token/release-keys.ts'
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
import { until } from '../support/until.ts'

const manifestType = 'application/vnd.oci.image.manifest.v1+json'

let directory = ''
let server: FleetServer
/** Trusts `key`, and follows nothing. */
let agent: FleetAgent
let registry: Awaited<ReturnType<typeof openRegistry>>
let client: RegistryClient
let build = ''
let key = ''

before(async () => {
  directory = await mkdtemp(join(tmpdir(), 'rackswarm-signed-'))
  build = join(directory, 'build.tar')
  await writeRandomFile(build, 600_000)
  key = await writeKey('key')
  server = await startFleetServer(directory)
  agent = await startFleetAgent(join(directory, 'usual'), server, {
    host: 'usual',
    place: 'r1',
    signatures: `keys: ["${key}.pub"]`,
  })
  registry = await openRegistry()
  client = registry.client
})

after(async () => {
  await registry[Symbol.asyncDispose]()
  await agent[Symbol.asyncDispose]()
  await server[Symbol.asyncDispose]()
  await rm(directory, { recursive: true, force: true })
})

test('a signed release goes to a host; an unsigned one is refused, says why, and the one before it stays current; once it is signed it goes too', async (t) => {
  const agent = await startAgent(t, 'a1', { signatures: `keys: ["${key}.pub"]`, follow: 'web' })
  const first = await untilHeld(agent, 'web:latest', await publish('web:1', key))

  await refreshFile(build)
  const second = await publish('web:2')
  const refused = await untilState(agent, 'web:latest', second, 'failed')
  const words = /^refused: it is not signed\. Sign it for what it is: deployctl sign web:latest$/
  assert.match(refused.reason ?? '', words)
  assert.deepEqual(refused.bytes, { ownRack: 0, otherRacks: 0, webseed: 0 })
  assert.equal(refused.path, first.path)
  assert.equal(await readlink(join(first.path, '..', 'current')), first.digest.slice(7))

  const local = { DEPLOYCTL_SOCKET: agent.socketPath }
  await until('exit code 3', async () => {
    const { code, stdout } = await deployctl(server, ['status', 'web:latest', '--hosts'])
    return code === 3 && /failed.*refused: it is not signed/.test(stdout)
  })
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
  const next = await untilHeld(agent, 'web:latest', second)
  assert.ok((await readFile(join(next.path, 'build.tar'))).equals(await readFile(build)))
  assert.match(await metricsOf(agent), /^rackswarm_agent_releases_refused 0$/m)
  assert.equal(await deployctlOk(server, ['transfers'], local), '')
  // It was signed for the one tag.
  const other = await deployctl(server, ['fetch', 'web:2'], { env: local })
  assert.equal(other.code, 7)
  assert.match(other.stderr, /its signature is for the tag latest/)
})

test('no tag moves before its signature can be found', async (t) => {
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
  const published = await deployctl(server, ['publish', build, 'first:1', '--sign-key', key, '--json'], {
    env: { DEPLOYCTL_SERVER: through },
  })
  assert.equal(published.code, 0, published.stderr)
  const { digest, signedBy } = JSON.parse(published.stdout) as { digest: string; signedBy: string }
  const [manifest, signature, ...tags] = puts
  assert.equal(manifest, digest)
  assert.match(signature ?? '', /^sha256:/)
  assert.deepEqual(tags, ['1', 'latest'])
  const index = (await (
    await fetch(`${server.publicUrl}/v2/first/referrers/${digest}`, {
      headers: { authorization: `Bearer ${await adminToken()}` },
    })
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
  const old = key
  const fresh = await writeKey('fresh', 'Ed25519')
  const agent = await startAgent(t, 'a2', { signatures: `keys: ["${old}.pub"]`, follow: 'turn' })
  const publishNew = async (tag: string, signKey: string) => {
    await refreshFile(build)
    return publish(`turn:${tag}`, signKey)
  }
  const held = (digest: string) => untilHeld(agent, 'turn:latest', digest)
  const trust = async (...keys: string[]) => {
    const file = join(directory, 'a2', 'agent.yaml')
    const list = keys.map((key) => `"${key}.pub"`).join(', ')
    await writeFile(
      file,
      (await readFile(file, 'utf8')).replace(/^signatures: .*$/m, `signatures: { keys: [${list}] }`),
    )
    process.kill(agent.pid, 'SIGHUP')
  }
  await held(await publishNew('1', old))
  const second = await publishNew('2', fresh)
  const refused = await untilState(agent, 'turn:latest', second, 'failed')
  assert.match(refused.reason ?? '', /signed by a key that is not trusted here: .*Add the public key/)
  await trust(old, fresh)
  await held(second)
  await held(await publishNew('3', old))
  await trust(fresh)
  await held(await publishNew('4', fresh))
  await untilState(agent, 'turn:latest', await publishNew('5', old), 'failed')
  // A file that is not there changes nothing.
  await trust(join(directory, 'absent'))
  const log = join(directory, 'a2', 'agent.log')
  await until('the fault in the log', async () =>
    /signatures\.keys: Cannot use public key .*absent.*reload failed/.test(await readFile(log, 'utf8')),
  )
  await held(await publishNew('6', fresh))
})

test('a signature of something else, one that was changed, one that is too large and one that is none are refused; a good one among them is found', async () => {
  await publish('mixed:1', key)
  await publish('db:2', key)
  await publish('mixed:2')
  const keyId = keyIdOf(key)
  const attach = async (bundle: Buffer, to: SignedManifest) => {
    await attachBundle(client, { repository: 'mixed', subject: to, bundle, keyId, createdAt: new Date() })
  }
  const refused = async (why: RegExp) => {
    await assert.rejects(fetchOn(agent, 'mixed:2'), why)
    const verifying = runVerify(
      { reference: 'mixed:2', keys: [`${key}.pub`], anyTag: false },
      deployctlContext(),
    )
    await assert.rejects(verifying, { exitCode: exitCodes.verification, message: why })
  }
  const subject = await manifestOf('mixed:2')
  await refused(/it is not signed/)
  await attach(Buffer.from('no bundle'), subject)
  await refused(/it is not JSON/)
  await attach(Buffer.alloc(2 * 1024 * 1024, 0x20), subject)
  await refused(/it is not JSON|2097152 bytes, at most 1048576 are read/)
  const good = await bundleOf('mixed:1')
  const changed = JSON.parse(good.toString()) as { dsseEnvelope: { payload: string } }
  changed.dsseEnvelope.payload = Buffer.from(
    Buffer.from(changed.dsseEnvelope.payload, 'base64')
      .toString()
      .replace((await manifestOf('mixed:1')).digest.slice(7), subject.digest.slice(7)),
  ).toString('base64')
  await attach(Buffer.from(JSON.stringify(changed)), subject)
  await refused(/it was changed/)
  // Swapped: whole and good, but for another release, and for another repository.
  await attach(await bundleOf('db:2'), subject)
  await refused(/its signature is for db/)
  await attach(good, subject)
  await refused(/its signature is for (db|mixed), sha256:/)
  await deployctlOk(server, ['sign', 'mixed:2', '--sign-key', key])
  await fetchOn(agent, 'mixed:2')
  assert.match(
    (await deployctl(server, ['sign', 'mixed:2', '--sign-key', key])).stderr,
    /is signed by this key already/,
  )
})

test('the same manifest in another repository is another release', async () => {
  await publish('staging:1', key)
  const { bytes } = await client.pullManifest('staging', '1')
  const { layers, config } = JSON.parse(bytes.toString()) as Record<'layers', { digest: string }[]> &
    Record<'config', { digest: string }>
  for (const { digest } of [...layers, config])
    await registry.call('POST', `/v2/prod/blobs/uploads/?mount=${digest}&from=staging`)
  await client.pushManifest('prod', '1', manifestType, bytes)
  await attachBundle(client, {
    repository: 'prod',
    subject: await manifestOf('prod:1'),
    bundle: await bundleOf('staging:1'),
    keyId: keyIdOf(key),
    createdAt: new Date(),
  })
  await fetchOn(agent, 'staging:1')
  await assert.rejects(fetchOn(agent, 'prod:1'), /refused: its signature is for staging/)
})

test('an image that skopeo has pushed is signed afterwards, and taken', async () => {
  const image = join(directory, 'image')
  const layer = await writeImage(image)
  const authFile = join(directory, 'auth.json')
  await writeAuthFile(authFile, server.publicUrl, await adminToken())
  const target = `docker://${new URL(server.publicUrl).host}/team/app:1`
  await skopeoCopy(authFile, '--dest-tls-verify=false', `oci:${image}:1`, target)
  await assert.rejects(fetchOn(agent, 'team/app:1'), /refused: it is not signed/)
  await deployctlOk(server, ['sign', 'team/app:1', '--sign-key', key])
  const { files } = await fetchOn(agent, 'team/app:1')
  assert.ok(files.some(({ digest }) => digest === `sha256:${layer}`))
  const shown = await deployctlOk(server, ['verify', 'team/app:1', '--key', `${key}.pub`])
  assert.match(shown, new RegExp(`^file {7}sha256:${layer}, sha256:${layer}, infohash \\w{40}$`, 'm'))
})

test('a good signature is found however many false ones are attached before and after it, in the name of its key', async () => {
  await publish('crowd:0', key)
  const digest = await publish('crowd:1')
  const subject = await manifestOf('crowd:1')
  // Bytes of no use, and what is good for another release.
  const other = await bundleOf('crowd:0')
  const junk = Buffer.from('{"mediaType": "junk"}')
  const layers = [
    { mediaType: bundleType, digest: await client.pushBlob('crowd', bytesSource(junk)), size: junk.length },
    { mediaType: bundleType, digest: digestOf(other), size: other.length },
  ]
  let made = 0
  const makeFalse = () =>
    Buffer.from(
      JSON.stringify({
        schemaVersion: 2,
        mediaType: manifestType,
        artifactType: bundleType,
        config: {
          mediaType: 'application/vnd.oci.empty.v1+json',
          digest: digestOf(Buffer.from('{}')),
          size: 2,
        },
        layers: [layers[made++ % 2]],
        subject: { mediaType: manifestType, digest, size: subject.sizeBytes },
        annotations: { number: String(made), 'vnd.rackswarm.signature.key': keyIdOf(key) },
      }),
    )
  /** Lists are in the order of digests. */
  const attach = async (count: number, before = 'sha256:g') => {
    for (let pushed = 0; pushed < count;) {
      const batch: Buffer[] = []
      while (batch.length < 25) {
        const manifest = makeFalse()
        if (digestOf(manifest) < before) batch.push(manifest)
      }
      await Promise.all(
        batch.map((manifest) => client.pushManifest('crowd', digestOf(manifest), manifestType, manifest)),
      )
      pushed += batch.length
    }
  }
  await attach(150)
  const refusal =
    /150 signatures are attached to it, the server finds no good one, and only 100 are looked at/
  await assert.rejects(fetchOn(agent, 'crowd:1'), refusal)
  const verify = () => deployctl(server, ['verify', 'crowd:1', '--key', `${key}.pub`, '--json'])
  const before = await verify()
  assert.equal(before.code, 7)
  assert.match(before.stderr, refusal)

  await deployctlOk(server, ['sign', 'crowd:1', '--sign-key', key])
  // The answer that there is none may stand for a moment.
  await until('the signature is found', async () => (await verify()).code === 0)
  const verified = JSON.parse((await verify()).stdout) as { attachedBy: string }
  await attach(150, verified.attachedBy)
  const [first] = await client.referrers('crowd', subject.digest, bundleType)
  assert.notEqual(first?.digest, verified.attachedBy, 'the false ones are listed before it')
  const { seconds } = await fetchOn(agent, 'crowd:1')
  assert.ok(seconds < 5, `${seconds} s`)
  assert.deepEqual(JSON.parse((await verify()).stdout), verified)
  // For a tag that nobody signed it for it is as false as the others.
  await client.pushManifest('crowd', '2', manifestType, subject.bytes)
  await assert.rejects(fetchOn(agent, 'crowd:2'), /301 signatures are attached to it/)
})

test('rules for some repositories, a warning in place of a refusal, and a tag that is promoted by moving it', async (t) => {
  const agent = await startAgent(t, 'a3', {
    signatures: `keys: ["${key}.pub"], repositories: [{ match: ["team/*"], policy: warn }, { match: [lab], policy: accept_unsigned }, { match: [app], accept_other_tags: true }]`,
  })
  for (const name of ['team/one:1', 'lab:1', 'plain:1']) await publish(name)
  const warned = await fetchOn(agent, 'team/one:1')
  assert.equal(warned.held.reason, 'taken without a good signature: it is not signed')
  assert.equal((await fetchOn(agent, 'lab:1')).held.reason, undefined)
  await assert.rejects(fetchOn(agent, 'plain:1'), /refused: it is not signed/)
  assert.match(
    await metricsOf(agent),
    /^rackswarm_agent_signature_checks_total\{outcome="warned",fault="unsigned"\} 1$/m,
  )
  for (const name of ['app', 'plain']) {
    await publish(`${name}:3`, key, false)
    const { bytes } = await client.pullManifest(name, '3')
    await client.pushManifest(name, 'stable', manifestType, bytes)
  }
  await fetchOn(agent, 'app:stable')
  await assert.rejects(fetchOn(agent, 'plain:stable'), /its signature is for the tag 3/)
  // By its digest it has no tag that could be another.
  await fetchOn(agent, `plain@${(await manifestOf('plain:3')).digest}`)
  const image = await deployctl(server, ['verify', 'plain:stable', '--key', `${key}.pub`, '--any-tag'])
  assert.equal(image.code, 0, image.stderr)
})

test('an agent that trusts no key, and was not told to do without, takes nothing and says what to set', async (t) => {
  const agent = await startAgent(t, 'a4', { signatures: '' })
  await publish('keyless:1', key)
  const fetched = await deployctl(server, ['fetch', 'keyless:1'], {
    env: { DEPLOYCTL_SOCKET: agent.socketPath },
  })
  assert.equal(fetched.code, 7)
  assert.match(fetched.stderr, /this host trusts no key for it\nName the public keys .* signatures\.keys/)
  assert.match(await readFile(join(directory, 'a4', 'agent.log'), 'utf8'), /no key is trusted/)
})

test('deployctl makes keys, signs with the one that it finds, and says who signed what', async () => {
  const key = join(directory, 'made.pem')
  await deployctlOk(server, ['keys', 'generate-signing', key])
  assert.equal((await stat(key)).mode & 0o777, 0o600)
  assert.equal((await stat(`${key}.pub`)).mode & 0o777, 0o644)
  const again = await deployctl(server, ['keys', 'generate-signing', key])
  assert.deepEqual([again.code, again.stdout], [6, ''])
  const none = await deployctl(server, ['publish', build, 'said:1'], { env: { DEPLOYCTL_SIGN_KEY_FILE: '' } })
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
  const text = await deployctlOk(server, ['publish', build, 'said:1'], { ...home, ...github })
  assert.match(text, /^signed {5}by key \S{44}$/m)
  const shown = await deployctlOk(server, [
    'verify',
    'said:1',
    '--key',
    `${key}.pub`,
    '--key',
    `${usual}.pub`,
  ])
  assert.match(shown, /^verified {3}said:1 sha256:\w{64}$/m)
  assert.match(shown, new RegExp(`^signed by {2}${usual}\\.pub \\S{44}$`, 'm'))
  assert.match(shown, /^for {8}said:1, said:latest$/m)
  assert.match(shown, /^file {7}build\.tar, sha256:\w{64}, infohash \w{40}$/m)
  assert.match(shown, /^source {5}git\+https:\/\/github\.com\/acme\/web, commit a{40}$/m)
  assert.match(shown, /^run {8}https:\/\/github\.com\/acme\/web\/actions\/runs\/99\/attempts\/1$/m)
  const json = JSON.parse(
    await deployctlOk(server, ['verify', 'said:1', '--key', `${usual}.pub`, '--json']),
  ) as Record<string, unknown>
  assert.deepEqual(json['tags'], ['1', 'latest'])
  const cases: readonly (readonly [string[], number, RegExp])[] = [
    [['verify', 'said:1', '--key', `${key}.pub`], 7, /not trusted here.*\n.*deployctl sign said:1/],
    [['verify', 'said:1', '--key', key], 2, /private key/],
    [['verify', 'said:1', '--key', join(directory, 'absent')], 2, /absent/],
    [['verify', 'said:1'], 2, /--key/],
    [['publish', build, 'said:2', '--no-sign', '--sign-key', key], 2, /both sign and not sign/],
    [['verify', 'nothing:1', '--key', `${key}.pub`], 5, /nothing/],
    [['sign', 'said:1', '--sign-key', `${key}.pub`], 2, /others can read/],
    [['keys', 'generate-signing', join(directory, 'x'), '--algorithm', 'RSA'], 2, /ES256, Ed25519, RS256/],
  ]
  for (const [args, code, words] of cases) {
    const result = await deployctl(server, args)
    assert.deepEqual([result.code, result.stdout], [code, ''], `${args.join(' ')}: ${result.stderr}`)
    assert.match(result.stderr, words, args.join(' '))
  }
})

/** @returns the file of a new private key; beside it is the public one */
async function writeKey(name: string, algorithm: Algorithm = 'ES256'): Promise<string> {
  const file = join(directory, `${name}.pem`)
  const { privatePem, publicPem } = generateReleaseKeys(algorithm)
  await writeFile(file, privatePem, { mode: 0o600 })
  await writeFile(`${file}.pub`, publicPem)
  return file
}

/** What deployctl works with, in this process: a start of its own costs more than what it does. */
function deployctlContext() {
  const written = { stdout: '' }
  const out = createOutput({
    stdout: { write: (text) => (written.stdout += text) },
    stderr: { write: () => undefined },
    env: {},
    json: true,
    quiet: true,
    colour: false,
  })
  const { signal } = new AbortController()
  const base = { out, env: {}, now: Date.now, signal, stdin: process.stdin }
  return { written, ...createContext(base, { server: server.publicUrl, tokenFile: server.adminTokenFile }) }
}

/** @returns the digest of the manifest */
async function publish(name: string, signKey?: string, latest = true): Promise<string> {
  const { written, ...context } = deployctlContext()
  const sign = signKey !== undefined
  await runPublish({ file: build, name, wait: undefined, timeoutMs: 0, latest, sign, signKey }, context)
  return (JSON.parse(written.stdout) as { digest: string }).digest
}

async function startAgent(
  t: TestContext,
  host: string,
  { signatures, follow }: { signatures: string; follow?: string },
): Promise<FleetAgent> {
  const extra = follow === undefined ? '' : `follow: ["${follow}:latest"]\nfollow_jitter: 10ms\n`
  const started = await startFleetAgent(join(directory, host), server, {
    host,
    place: 'r1',
    signatures,
    extra,
  })
  t.after(() => started[Symbol.asyncDispose]())
  return started
}

type Held = AgentStatus['references'][number]

async function untilHeld(
  agent: FleetAgent,
  reference: string,
  digest: string,
): Promise<Held & { path: string }> {
  const held = await untilState(agent, reference, digest, 'held')
  return { ...held, path: held.path ?? '' }
}

async function untilState(
  agent: FleetAgent,
  reference: string,
  digest: string,
  state: Held['state'],
): Promise<Held> {
  await using client = createAgentClient({ socketPath: agent.socketPath })
  return await until(`${reference} ${digest} is ${state}`, async () => {
    const found = (await client.status()).references.find((held) => held.reference === reference)
    return found?.digest === digest && found.state === state ? found : undefined
  })
}

async function metricsOf(agent: FleetAgent): Promise<string> {
  return (await fetch(`${String(agent.ready['metricsUrl'])}/metrics`)).text()
}

function keyIdOf(key: string): string {
  return readReleaseKeys(`${key}.pub`)[0]?.id ?? ''
}

async function adminToken(): Promise<string> {
  return (await readFile(server.adminTokenFile, 'utf8')).trim()
}

async function openRegistry() {
  const token = await adminToken()
  const http = createHttpClient({ baseUrl: server.publicUrl, credential: () => token })
  return {
    client: createRegistryClient(http),
    call: async (method: 'POST', path: string) => {
      await (await http.ok({ method, path })).discard()
    },
    [Symbol.asyncDispose]: () => http[Symbol.asyncDispose](),
  }
}

async function manifestOf(reference: string): Promise<SignedManifest & { bytes: Buffer }> {
  const [repository = '', tag = ''] = reference.split(':')
  const { digest, mediaType, bytes } = await client.pullManifest(repository, tag)
  return { digest, mediaType, bytes, sizeBytes: bytes.length }
}

/** The signature that publish stored. */
async function bundleOf(reference: string): Promise<Buffer> {
  const [repository = ''] = reference.split(':')
  const { digest } = await manifestOf(reference)
  const [attached] = await client.referrers(repository, digest, bundleType)
  assert.ok(attached, `${reference} is signed`)
  const { bytes } = await client.pullManifest(repository, attached.digest)
  const blob = await client.pullBlob(repository, parseAttaching(bytes).digest, { start: 0 })
  return blob.bytes()
}
