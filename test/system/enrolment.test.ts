import assert from 'node:assert/strict'
import { mkdtemp, readFile, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import { infoHashFromHex } from '../../lib/protocol/infohash.ts'
import { parseTorrent } from '../../lib/protocol/metainfo.ts'
import { inspectToken, mintOffline } from '../../lib/token/offline.ts'
import type { FleetServer } from '../support/fleet.ts'
import { deployctl, deployctlOk, startFleetServer, writeRandomFile } from '../support/fleet.ts'

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

test('a host says neither where it is nor how long its announce tokens live: a quarter of an hour at most', async () => {
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
  const ttlSeconds = 10 * 365 * 86_400
  const long = await mint({ ttlSeconds })
  const torrent = await fetch(`${server.publicUrl}/v2/own/blobs/${digest}?ttl=${ttlSeconds}`, {
    headers: { authorization: `Bearer ${credential}`, accept: 'application/x-bittorrent' },
  })
  const { announce, urlList } = parseTorrent(Buffer.from(await torrent.arrayBuffer()))
  const [, webseedToken = ''] = /\/webseed\/([^/]+)\//.exec(urlList[0] ?? '') ?? []
  for (const [what, token] of Object.entries({
    'its own': String(plain.body['token']),
    'one it wants to live long': String(long.body['token']),
    "a torrent's": new URL(announce ?? '').searchParams.get('jwt') ?? '',
    "a torrent's webseed's": webseedToken,
  }))
    assert.ok(Number(inspectToken(token).claims['exp']) * 1000 <= Date.now() + 15 * 60_000, what)
})

test('a revocation ends every credential of a host, however often it has renewed', async () => {
  const enrolled = await enroll({ bootstrapToken: await bootstrap(), host: 'e1' })
  const credentials = [String(enrolled.body['credential'])]
  for (let i = 0; i < 12; i++) {
    const renewed = await call('/api/v1/hosts/self/renew', {}, credentials.at(-1))
    credentials.push(String(renewed.body['credential']))
  }
  assert.equal(await statusFor(credentials.at(-1)), 200)
  await deployctlOk(server, ['hosts', 'revoke', 'e1'])
  for (const [age, credential] of credentials.entries())
    assert.equal(await statusFor(credential), 401, `credential ${age}`)
})

test('renewals that are under way do not undo a revocation', async () => {
  const bootstrapToken = await bootstrap()
  const admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
  const round = async (host: string) => {
    const first = String((await enroll({ bootstrapToken, host })).body['credential'])
    const credentials = [first]
    const renewed = Promise.withResolvers<undefined>()
    /** Renews without a pause, until it is refused. */
    const renewing = async () => {
      for (let credential = first; credentials.length < 500;) {
        const { status, body } = await call('/api/v1/hosts/self/renew', {}, credential)
        renewed.resolve(undefined)
        if (status !== 200) return
        credential = String(body['credential'])
        credentials.push(credential)
      }
    }
    const chains = Promise.all([renewing(), renewing(), renewing(), renewing()])
    await renewed.promise
    const revoked = await fetch(`${server.publicUrl}/api/v1/hosts/${host}`, {
      method: 'DELETE',
      headers: { authorization: `Bearer ${admin}` },
    })
    assert.equal(revoked.status, 204)
    await chains
    assert.ok(credentials.length > 1 && credentials.length < 500, `${credentials.length} credentials`)
    for (const credential of credentials) assert.equal(await statusFor(credential), 401)
  }
  const hosts = Array.from({ length: 20 }, (_, i) => `race-${i}`)
  for (const host of hosts) await round(host)
  const listed = await listedHosts()
  for (const host of hosts) assert.equal(listed.get(host)?.revoked, true, host)
})

test('who enrols under a name that is taken takes nothing from the host that has it, and gets nothing of it', async () => {
  const build = join(directory, 'secret.tar')
  await writeRandomFile(build, 1000)
  await deployctlOk(server, ['publish', build, 'secret:1'])
  const [wide, narrow] = [await bootstrap(), await bootstrap('--repositories', 'web')]
  const pulls = (credential: string) => statusFor(credential, '/v2/secret/manifests/1')
  const renew = async (credential: string) =>
    String((await call('/api/v1/hosts/self/renew', {}, credential)).body['credential'])
  const first = await enroll({ bootstrapToken: wide, host: 'f1' })
  const thief = await enroll({ bootstrapToken: narrow, host: 'f1' })
  assert.deepEqual([thief.status, thief.code], [409, 'HOST_EXISTS'])
  assert.equal(await pulls(await renew(String(first.body['credential']))), 200)
  // The other way about it may be a host that is set up anew; what it had before learns nothing.
  const small = await enroll({ bootstrapToken: narrow, host: 'f2' })
  const large = await enroll({ bootstrapToken: wide, host: 'f2' })
  assert.deepEqual([small.status, large.status], [200, 200])
  assert.equal(await pulls(await renew(String(small.body['credential']))), 403)
  assert.equal(await pulls(await renew(String(large.body['credential']))), 200)
})

test('a host that was revoked enrols again only when it was forgotten', async () => {
  const bootstrapToken = await bootstrap()
  const old = String((await enroll({ bootstrapToken, host: 'g1' })).body['credential'])
  assert.notEqual((await deployctl(server, ['hosts', 'forget', 'g1'])).code, 0, 'not before it was revoked')
  assert.equal(await statusFor(old), 200)
  await deployctlOk(server, ['hosts', 'revoke', 'g1'])
  const refused = await enroll({ bootstrapToken, host: 'g1' })
  assert.deepEqual([refused.status, refused.code], [403, 'REVOKED'])
  await deployctlOk(server, ['hosts', 'forget', 'g1'])
  const again = await enroll({ bootstrapToken, host: 'g1' })
  assert.equal(again.status, 200)
  assert.equal(await statusFor(String(again.body['credential'])), 200)
  assert.equal(await statusFor(old), 401)
  assert.equal((await listedHosts()).get('g1')?.revoked, false)
})

test('a bootstrap token is listed without its secret, and enrols nobody once it is revoked', async () => {
  const made = await bootstrap('--places', 'rack-1', '--repositories', 'web', '--uses', '2', '--json')
  const { id, token, expiresAt } = JSON.parse(made) as { id: string; token: string; expiresAt: string }
  assert.equal((await enroll({ bootstrapToken: token, host: 'i1' })).status, 200)
  const list = async () => deployctlOk(server, ['token', 'list', '--json'])
  const { bootstrapTokens } = JSON.parse(await list()) as { bootstrapTokens: { id: string }[] }
  assert.deepEqual(
    bootstrapTokens.find((one) => one.id === id),
    { id, places: ['rack-1'], repositories: ['web'], usesLeft: 1, expiresAt },
  )
  assert.ok(!(await list()).includes(token.split('_').slice(2).join('_')))
  await deployctlOk(server, ['token', 'revoke', id])
  assert.ok(!(await list()).includes(id))
  assert.equal((await enroll({ bootstrapToken: token, host: 'i2' })).status, 401)
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

/** How the server answers a credential. */
async function statusFor(credential = '', path = '/api/v1/server'): Promise<number> {
  const response = await fetch(`${server.publicUrl}${path}`, {
    headers: { authorization: `Bearer ${credential}` },
  })
  return response.status
}

async function listedHosts(): Promise<Map<string, { revoked: boolean }>> {
  const { hosts } = JSON.parse(await deployctlOk(server, ['hosts', '--json'])) as {
    hosts: { host: string; revoked: boolean }[]
  }
  return new Map(hosts.map((one) => [one.host, one]))
}

async function blobDigest(reference: string): Promise<string> {
  const { blobs } = JSON.parse(await deployctlOk(server, ['show', reference, '--json'])) as {
    blobs: { digest: string; infohash?: string }[]
  }
  return blobs.find(({ infohash }) => infohash !== undefined)?.digest ?? ''
}
