import assert from 'node:assert/strict'
import { generateKeyPairSync } from 'node:crypto'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { infoHashFromHex } from '../../lib/protocol/infohash.ts'
import { inspectToken, mintOffline } from '../../lib/token/offline.ts'
import type { FleetServer } from '../support/fleet.ts'
import {
  deployctl,
  deployctlOk,
  fetchOn,
  startFleetAgent,
  startFleetServer,
  writeRandomFile,
} from '../support/fleet.ts'
import { startTracker } from '../support/tracker.ts'

const mebibyte = 1024 * 1024
const infohash = 'c0ffee'.padEnd(40, '0')

interface Key {
  readonly kid: string
  readonly algorithm: string
  readonly state: string
  readonly dueAt?: string
}

test('a rotation in the middle of a deploy disturbs nothing: fetches, renewals, trackers elsewhere', async (t) => {
  const { server, directory } = await setUp(t, 'tokens: { key_lead: 1s, agent_ttl: 3s }\n')
  const tracker = await startTracker(
    t,
    `tokens: { keys_url: '${server.publicUrl}/.well-known/jwks.json', keys_refresh: 250ms, issuer: '${server.publicUrl}', audience: '${server.publicUrl}' }\n`,
  )
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, 16 * mebibyte)
  await deployctlOk(server, ['publish', build, 'web:1'])
  const extra = 'limits: { download: 4MiB }\n'
  await using seeder = await startFleetAgent(join(directory, 'a1'), server, { host: 'a1', place: 'rack-1' })
  await fetchOn(seeder, 'web:1')
  await using fetcher = await startFleetAgent(join(directory, 'a2'), server, {
    host: 'a2',
    place: 'rack-1',
    extra,
  })
  const [old] = await keysOf(server)
  const fetched = fetchOn(fetcher, 'web:1').then(({ held }) => held)
  const deploy = { isOver: false }
  fetched.finally(() => (deploy.isOver = true)).catch(() => undefined)
  const signedBy = new Set<unknown>()
  const refusals: string[] = []
  const mint = async () => {
    const made = await deployctlOk(server, ['token', 'mint', '--infohash', infohash, '--json'])
    const { token } = JSON.parse(made) as { token: string }
    signedBy.add(inspectToken(token).header['kid'])
    return token
  }
  await mint()
  await deployctlOk(server, ['keys', 'rotate'])
  while (!deploy.isOver || signedBy.size < 2) {
    const token = await mint()
    for (const url of [`http://127.0.0.1:${tracker.main.port}`, server.publicUrl]) {
      const reply = await announce(url, token)
      if (!reply.startsWith('d8:complete')) refusals.push(`${url}: ${reply}`)
    }
  }
  assert.equal((await fetched).state, 'held')
  assert.deepEqual(refusals, [])
  assert.deepEqual(
    (await keysOf(server)).map(({ state }) => state),
    ['retiring', 'active'],
  )
  assert.ok(signedBy.has(old?.kid))
  // Tokens of agents live 3 s here, so they were renewed meanwhile, under both keys.
  const metrics = await (await fetch(`${server.metricsUrl}/metrics`)).text()
  assert.doesNotMatch(metrics, /rackswarm_tracker_token_refused_total\{reason="[^"]+"\} [1-9]/)
})

test('a key that is revoked ends what it signed, at once, and is published no longer; not by its own token', async (t) => {
  const { server, directory } = await setUp(t)
  const [old] = await keysOf(server)
  const kid = old?.kid ?? ''
  const { token } = JSON.parse(
    await deployctlOk(server, ['token', 'mint', '--infohash', infohash, '--json']),
  ) as {
    token: string
  }
  assert.match(await announce(server.publicUrl, token), /^d8:complete/)
  const own = await deployctl(server, ['keys', 'revoke', kid])
  assert.deepEqual([own.code, /it signed the token that you use/.test(own.stderr)], [6, true])
  await deployctlOk(server, ['keys', 'rotate', '--now', '--algorithm', 'Ed25519'])
  const file = join(directory, 'new-admin')
  await deployctlOk(server, ['token', 'create', '--name', 'new', '--scope', 'admin', '--output', file])
  const withNew = { DEPLOYCTL_TOKEN_FILE: file }
  await deployctlOk(server, ['keys', 'revoke', kid], withNew)
  assert.equal(
    await announce(server.publicUrl, token),
    'd14:failure reason31:unapproved request: invalid jwte',
  )
  assert.equal((await deployctl(server, ['keys', 'list'])).code, 4, 'the first admin token is void')
  const left = JSON.parse(await deployctlOk(server, ['keys', 'list', '--json'], withNew)) as { keys: Key[] }
  assert.deepEqual(
    left.keys.map(({ algorithm, state }) => [algorithm, state]),
    [['Ed25519', 'active']],
  )
  const jwks = await (await fetch(`${server.publicUrl}/.well-known/jwks.json`)).text()
  assert.ok(!jwks.includes(kid))
  assert.equal((await deployctl(server, ['keys', 'revoke', kid], { env: withNew })).code, 5)
})

test('a key from elsewhere is imported from PEM or JWK, by file or stdin, and what it signed counts', async (t) => {
  const { server, directory } = await setUp(t)
  const rsa = generateKeyPairSync('rsa', { modulusLength: 2048 }).privateKey
  const pem = rsa.export({ type: 'pkcs1', format: 'pem' })
  const keyFile = join(directory, 'quay.pem')
  await writeFile(keyFile, pem, { mode: 0o600 })
  const { token } = await mintOffline({
    keyFile,
    kid: 'quay-7',
    issuer: server.publicUrl,
    audience: server.publicUrl,
    infoHash: infoHashFromHex(infohash),
    subject: 'quay',
    ttlMs: 60_000,
    now: Date.now,
  })
  const refused = 'd14:failure reason31:unapproved request: invalid jwte'
  assert.equal(await announce(server.publicUrl, token), refused)
  const imported = await deployctl(server, [
    'keys',
    'import',
    keyFile,
    '--kid',
    'quay-7',
    '--verify-only',
    '--json',
  ])
  assert.equal(imported.code, 0, imported.stderr)
  assert.match(await announce(server.publicUrl, token), /^d8:complete/)
  assert.ok(!`${imported.stdout}${imported.stderr}`.includes(pem.split('\n')[1] ?? ''))
  const ec = generateKeyPairSync('ec', { namedCurve: 'P-256' }).privateKey
  const jwk = JSON.stringify({ ...ec.export({ format: 'jwk' }), kid: 'own' })
  const next = await deployctl(server, ['keys', 'import', '--json'], { input: jwk })
  assert.equal(next.code, 0, next.stderr)
  const states = (await keysOf(server)).map(({ kid, state }) => [kid, state]).slice(1)
  assert.deepEqual(states, [
    ['quay-7', 'retiring'],
    ['own', 'next'],
  ])
  const again = await deployctl(server, ['keys', 'import'], { input: jwk })
  assert.deepEqual([again.code, /there already/.test(again.stderr)], [6, true])
  const bad = await deployctl(server, ['keys', 'import'], { input: 'nonsense' })
  assert.deepEqual([bad.code, /neither PEM nor a JWK/.test(bad.stderr)], [2, true])
  const listed = await deployctlOk(server, ['keys', 'list', '--json'])
  for (const secret of [String(ec.export({ format: 'jwk' }).d), pem]) assert.ok(!listed.includes(secret))
  const audit = await deployctlOk(server, ['audit', '--json'])
  assert.match(audit, /"key\.import","target":"quay-7"/)
})

async function keysOf(server: FleetServer): Promise<Key[]> {
  return (JSON.parse(await deployctlOk(server, ['keys', 'list', '--json'])) as { keys: Key[] }).keys
}

async function announce(url: string, token: string): Promise<string> {
  const query = `info_hash=${infohash.replace(/../g, '%$&')}&peer_id=-RS0001-abcdefghijkl&port=6881&uploaded=0&downloaded=0&left=1&jwt=${token}`
  return (await fetch(`${url}/announce?${query}`)).text()
}

async function setUp(t: TestContext, settings = '') {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-keys-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const server = await startFleetServer(directory, { settings })
  t.after(() => server[Symbol.asyncDispose]())
  return { server, directory, admin: (await readFile(server.adminTokenFile, 'utf8')).trim() }
}
