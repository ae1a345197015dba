import assert from 'node:assert/strict'
import { mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import { infoHashFromHex } from '../../lib/protocol/infohash.ts'
import { inspectToken, mintOffline } from '../../lib/token/offline.ts'
import type { FleetServer } from '../support/fleet.ts'
import { deployctlOk, startFleetServer, writeRandomFile } from '../support/fleet.ts'

let directory = ''
let server: FleetServer

before(async () => {
  directory = await mkdtemp(join(tmpdir(), 'rackswarm-enrolment-'))
  server = await startFleetServer(directory)
})

after(async () => {
  await server[Symbol.asyncDispose]()
  await rm(directory, { recursive: true, force: true })
})

test('a bootstrap token enrols as many hosts as it may, at the places it may, and no more', async () => {
  const bootstrapToken = await bootstrap('--places', 'rack-1,rack-2', '--uses', '3')
  assert.equal((await enroll({ bootstrapToken, host: 'thief', place: 'rack-9' })).code, 'PLACE_NOT_ALLOWED')
  // All at once: each takes its own use, and no use is taken twice.
  const answers = await Promise.all(
    Array.from({ length: 6 }, (_, i) => enroll({ bootstrapToken, host: `h${i}`, place: 'rack-1' })),
  )
  assert.equal(answers.filter(({ status }) => status === 200).length, 3)
  assert.ok(
    answers.every(({ status, code }) => status === 200 || (status === 401 && code === 'UNAUTHORIZED')),
  )
})

test('a host cannot say where it is unless its bootstrap token lets it', async () => {
  const bootstrapToken = await bootstrap()
  assert.equal((await enroll({ bootstrapToken, host: 'b1', place: 'rack-1' })).status, 403)
  const placed = await enroll({ bootstrapToken, host: 'b1' })
  assert.equal(placed.status, 200)
  assert.equal(placed.body['place'], undefined)
})

test('a credential renews itself, gets grants for its repositories only, and nothing once it is revoked', async () => {
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, 512 * 1024)
  for (const name of ['web:1', 'db:1']) await deployctlOk(server, ['publish', build, name])
  const digest = await blobDigest('web:1')
  const bootstrapToken = await bootstrap('--repositories', 'web')
  const enrolled = await enroll({ bootstrapToken, host: 'c1' })
  const renewed = await call('/api/v1/hosts/self/renew', {}, String(enrolled.body['credential']))
  assert.equal(renewed.status, 200)
  const credential = String(renewed.body['credential'])
  const grant = async (repository: string) => call('/api/v1/swarm-grants', { repository, digest }, credential)
  const granted = await grant('web')
  assert.equal(granted.status, 200)
  assert.match(String(granted.body['infohash']), /^[0-9a-f]{40}$/)
  assert.ok([403, 404].includes((await grant('db')).status))
  for (const path of ['/api/v1/tokens', '/api/v1/bootstrap-tokens'])
    assert.equal((await call(path, { name: 'x', scopes: ['admin'] }, credential)).status, 403, path)
  await deployctlOk(server, ['hosts', 'revoke', 'c1'])
  for (const old of [credential, String(enrolled.body['credential'])])
    assert.ok([401, 403].includes((await call('/api/v1/hosts/self/renew', {}, old)).status))
  assert.ok([401, 403].includes((await grant('web')).status))
})

test('an announce token that is expired, not valid yet, or bound to another address is refused in the same words', async () => {
  const infohash = 'c0ffee'.padEnd(40, '0')
  const keys = join(server.dataDirectory, 'keys')
  const keyFile = join(keys, (await readdir(keys)).find((name) => name.endsWith('.json')) ?? '')
  const announce = async (options: {
    startsInMs?: number
    ttlMs?: number
    cidr?: string
    audience?: string
  }) => {
    const { token } = await mintOffline({
      keyFile,
      issuer: server.publicUrl,
      audience: options.audience ?? server.publicUrl,
      infoHash: infoHashFromHex(infohash),
      subject: 'test',
      cidr: options.cidr,
      ttlMs: options.ttlMs ?? 60_000,
      now: () => Date.now() + (options.startsInMs ?? 0),
    })
    const query = `info_hash=${infohash.replace(/../g, '%$&')}&peer_id=-RS0001-abcdefghijkl&port=6881&uploaded=0&downloaded=0&left=1&jwt=${token}`
    return (await fetch(`${server.publicUrl}/announce?${query}`)).text()
  }
  const refusal = 'd14:failure reason31:unapproved request: invalid jwte'
  assert.match(await announce({}), /^d8:complete/)
  assert.match(await announce({ cidr: '127.0.0.0/8' }), /^d8:complete/)
  assert.match(await announce({ startsInMs: -150_000, ttlMs: 60_000 }), /^d8:complete/, 'clocks may differ')
  assert.equal(await announce({ startsInMs: -200_000, ttlMs: 60_000 }), refusal, 'expired')
  assert.equal(await announce({ startsInMs: 180_000 }), refusal, 'not valid yet')
  assert.equal(await announce({ cidr: '10.0.0.0/8' }), refusal, 'bound to another address')
  assert.equal(await announce({ audience: 'https://other.example.com' }), refusal, 'made for another server')
  const metrics = await (await fetch(`${server.metricsUrl}/metrics`)).text()
  for (const fault of ['expired', 'not_yet_valid', 'wrong_address', 'wrong_audience'])
    assert.match(metrics, new RegExp(`reason="${fault}"[^\\n]*} 1`), fault)
})

test('a host that may pull can say neither where it is nor outlive its credential with an announce token', async () => {
  const build = join(directory, 'own.tar')
  await writeRandomFile(build, 512 * 1024)
  await deployctlOk(server, ['publish', build, 'own:1'])
  const digest = await blobDigest('own:1')
  const bootstrapToken = await bootstrap('--places', 'rack-1')
  const enrolled = await enroll({ bootstrapToken, host: 'd1', place: 'rack-1' })
  const credential = String(enrolled.body['credential'])
  const mint = (more: object) =>
    call('/api/v1/announce-tokens', { repository: 'own', digest, ...more }, credential)
  assert.equal((await mint({ rack: 'rack-2' })).status, 403)
  const plain = await mint({})
  assert.equal(inspectToken(String(plain.body['token'])).claims['rack'], 'rack-1')
  const long = await mint({ ttlSeconds: 10 * 365 * 86_400 })
  assert.ok(
    Date.parse(String(long.body['expiresAt'])) <= Date.parse(String(enrolled.body['expiresAt'])),
    'as long as the credential at most',
  )
})

test('no more hosts are enrolled than may be; one that is known may come again', async (t) => {
  const own = await mkdtemp(join(tmpdir(), 'rackswarm-hosts-max-'))
  t.after(() => rm(own, { recursive: true, force: true }))
  await using small = await startFleetServer(own, {
    enrolment: 'hosts_max: 2',
  })
  const bootstrapToken = (await deployctlOk(small, ['token', 'bootstrap'])).trim()
  const statuses: number[] = []
  for (const host of ['h1', 'h2', 'h3', 'h1'])
    statuses.push((await call('/api/v1/enroll', { bootstrapToken, host }, undefined, small)).status)
  assert.deepEqual(statuses, [200, 200, 507, 200])
})

test('guessing bootstrap tokens gets an address turned away', async () => {
  const statuses: number[] = []
  for (let i = 0; i < 25; i++) {
    const guess = `rsb_${'0'.repeat(12)}_${String(i).padStart(32, 'x')}`
    statuses.push((await enroll({ bootstrapToken: guess, host: 'guesser' })).status)
  }
  assert.equal(statuses[0], 401)
  assert.equal(statuses.at(-1), 429)
})

async function bootstrap(...args: string[]): Promise<string> {
  return (await deployctlOk(server, ['token', 'bootstrap', ...args])).trim()
}

async function enroll(body: { bootstrapToken: string; host: string; place?: string }) {
  return call('/api/v1/enroll', body)
}

async function call(path: string, body: object, token?: string, at = server) {
  const response = await fetch(`${at.publicUrl}${path}`, {
    method: 'POST',
    headers: {
      'content-type': 'application/json',
      ...(token === undefined ? {} : { authorization: `Bearer ${token}` }),
    },
    body: JSON.stringify(body),
  })
  const answer = (await response.json()) as Record<string, unknown>
  return {
    status: response.status,
    body: answer,
    code: (answer['error'] as { code?: string } | undefined)?.code,
  }
}

async function blobDigest(reference: string): Promise<string> {
  const { blobs } = JSON.parse(await deployctlOk(server, ['show', reference, '--json'])) as {
    blobs: { digest: string; infohash?: string }[]
  }
  return blobs.find(({ infohash }) => infohash !== undefined)?.digest ?? ''
}
