import assert from 'node:assert/strict'
import { createHash, createHmac, randomBytes } from 'node:crypto'
import { mkdtemp, readFile, readdir, rm } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import type { FleetServer } from '../support/fleet.ts'
import { deployctlOk, startFleetServer, writeRandomFile } from '../support/fleet.ts'

// One server for all: whatever one test throws at it, the next must find it well.
let directory = ''
let server: FleetServer
let admin = ''
let announceUrl: URL

before(async () => {
  directory = await mkdtemp(join(tmpdir(), 'rackswarm-bad-input-'))
  server = await startFleetServer(directory)
  admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, 1024 * 1024)
  await deployctlOk(server, ['publish', build, 'web:1'])
  const minted = JSON.parse(await deployctlOk(server, ['token', 'mint', 'web:1', '--json'])) as {
    announceUrl: string
  }
  announceUrl = new URL(minted.announceUrl)
})

after(async () => {
  const { exitCode } = server.process
  const uploads: string[] = await readdir(join(server.dataDirectory, 'uploads')).catch(() => [])
  await server[Symbol.asyncDispose]()
  await rm(directory, { recursive: true, force: true })
  // Still alive, after all of that, and nothing half-written.
  assert.deepEqual([exitCode, uploads], [null, []])
})

const goodQuery = 'peer_id=-RS0001-abcdefghijkl&port=6881&uploaded=0&downloaded=0&left=1&compact=1'

async function announce(token: string | undefined, hash = infoHash()): Promise<string> {
  const query = `info_hash=${escapeHex(hash)}&${goodQuery}${token === undefined ? '' : `&jwt=${token}`}`
  return (await fetch(`${server.publicUrl}/announce?${query}`)).text()
}

test('an announce with the token for its infohash is answered', async () => {
  assert.match(await announce(goodToken()), /^d8:completei/)
})

test('each wrong announce token is refused in the same words', async () => {
  const [header = '', claims = '', signature = ''] = goodToken().split('.')
  const publicKey = (await (await fetch(`${server.publicUrl}/.well-known/jwks.json`)).json()) as {
    keys: { kid: string }[]
  }
  const kid = publicKey.keys[0]?.kid ?? ''
  const encode = (value: object) => Buffer.from(JSON.stringify(value)).toString('base64url')
  const hmacHeader = encode({ alg: 'HS256', kid, typ: 'announce+jwt' })
  const hmac = createHmac('sha256', JSON.stringify(publicKey.keys[0]))
    .update(`${hmacHeader}.${claims}`)
    .digest('base64url')
  const wrong = {
    'alg none': `${encode({ alg: 'none', kid, typ: 'announce+jwt' })}.${claims}.`,
    'HS256 signed with the public key': `${hmacHeader}.${claims}.${hmac}`,
    'an unknown kid': `${encode({ alg: 'ES256', kid: 'nobody', typ: 'announce+jwt' })}.${claims}.${signature}`,
    'a changed claim': `${header}.${encode({ ...(JSON.parse(Buffer.from(claims, 'base64url').toString()) as object), infohash: '0'.repeat(40) })}.${signature}`,
    'a cut signature': `${header}.${claims}.${signature.slice(0, -4)}`,
    'an admin token': admin,
    'no token at all': 'x',
    'two dots': '..',
    'a token of 100 KiB': 'a'.repeat(6_000),
  }
  for (const [what, token] of Object.entries(wrong)) {
    assert.equal(await announce(token), 'd14:failure reason31:unapproved request: invalid jwte', what)
  }
  assert.equal(await announce(undefined), 'd14:failure reason31:unapproved request: missing jwte')
  assert.equal(
    await announce(goodToken(), 'f'.repeat(40)),
    'd14:failure reason31:unapproved request: invalid jwte',
  )
})

test('a scrape is protected like an announce', async () => {
  const scrape = async (query: string) => (await fetch(`${server.publicUrl}/scrape?${query}`)).text()
  assert.match(await scrape(`info_hash=${escapeHex(infoHash())}&jwt=${goodToken()}`), /^d5:filesd20:/)
  assert.equal(
    await scrape(`info_hash=${escapeHex(infoHash())}`),
    'd14:failure reason31:unapproved request: missing jwte',
  )
  assert.equal(
    await scrape(`info_hash=${escapeHex(infoHash())}&info_hash=${'%ff'.repeat(20)}&jwt=${goodToken()}`),
    'd14:failure reason31:unapproved request: invalid jwte',
  )
})

test('an upload whose bytes have another digest is refused, and nothing of it is kept', async () => {
  const wanted = `sha256:${createHash('sha256').update('what was promised').digest('hex')}`
  const response = await push(wanted, Buffer.from('what came'))
  assert.equal(response.status, 400)
  assert.equal(errorCode(await response.json()), 'DIGEST_INVALID')
  assert.equal((await get(`/v2/web/blobs/${wanted}`)).status, 404)
})

test('lengths that lie cost nothing: what came is kept for a resume, what is too much is refused', async () => {
  const bytes = randomBytes(100_000)
  const digest = `sha256:${createHash('sha256').update(bytes).digest('hex')}`
  const start = async (query = '') => {
    const response = await fetch(`${server.publicUrl}/v2/web/blobs/uploads/${query}`, {
      method: 'POST',
      headers: { authorization: `Bearer ${admin}` },
    })
    return {
      status: response.status,
      location: new URL(response.headers.get('location') ?? '', server.publicUrl),
    }
  }
  const call = async (location: URL, method: string, headers: Record<string, string> = {}, body?: Buffer) =>
    fetch(location, {
      method,
      headers: { authorization: `Bearer ${admin}`, ...headers },
      ...(body ? { body: new Uint8Array(body) } : {}),
    })

  // A declared length that is not the real one only costs the server a second pass.
  const declared = await start('?length=17')
  declared.location.searchParams.set('digest', digest)
  assert.equal((await call(declared.location, 'PUT', {}, bytes)).status, 201)
  assert.ok(Buffer.from(await (await get(`/v2/web/blobs/${digest}`)).arrayBuffer()).equals(bytes))

  for (const length of ['-1', 'many', '1e99', String(2 ** 60)])
    assert.ok([400, 413].includes((await start(`?length=${length}`)).status), length)

  // A client that promises more than it sends and goes away; then one that goes on from there.
  const { location } = await start()
  await raw(
    `PATCH ${location.pathname}${location.search} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ${admin}\r\ncontent-length: 100000\r\n\r\n${'x'.repeat(1000)}`,
  )
  let state = await call(location, 'GET')
  // It takes the server a moment to see that the client is gone.
  for (const deadline = Date.now() + 5000; state.headers.get('range') === '0-0' && Date.now() < deadline;)
    state = await call(location, 'GET')
  assert.deepEqual([state.status, state.headers.get('range')], [204, '0-999'])
  for (const range of ['5-1004', '2000-2999', '1000-999', 'a-b'])
    assert.ok(
      [400, 416].includes((await call(location, 'PATCH', { 'content-range': range }, bytes)).status),
      range,
    )
  assert.equal((await call(location, 'DELETE')).status, 204)
})

test('names with .. and other tricks never reach the file system', async () => {
  for (const name of [
    '..',
    '../../etc',
    'a/../b',
    'a//b',
    'A',
    '_tags',
    'a/_manifests',
    '%2e%2e/x',
    'x'.repeat(300),
  ]) {
    const response = await raw(
      `POST /v2/${name}/blobs/uploads/ HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ${admin}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n`,
    )
    assert.match(response, /^HTTP\/1\.1 4\d\d /, name)
  }
})

test('a manifest beyond the limit, a manifest that is not JSON and one that names blobs nobody pushed are refused', async () => {
  const put = async (body: string | Buffer) =>
    fetch(`${server.publicUrl}/v2/web/manifests/bad`, {
      method: 'PUT',
      headers: {
        authorization: `Bearer ${admin}`,
        'content-type': 'application/vnd.oci.image.manifest.v1+json',
      },
      body,
    })
  assert.equal((await put(Buffer.alloc(5 * 1024 * 1024, 0x20))).status, 413)
  assert.equal(errorCode(await (await put('{"schemaVersion":')).json()), 'MANIFEST_INVALID')
  const missing = { mediaType: 'application/octet-stream', digest: `sha256:${'0'.repeat(64)}`, size: 3 }
  const unknown = await put(
    JSON.stringify({
      schemaVersion: 2,
      mediaType: 'application/vnd.oci.image.manifest.v1+json',
      config: missing,
      layers: [missing],
    }),
  )
  assert.equal(errorCode(await unknown.json()), 'MANIFEST_BLOB_UNKNOWN')
})

test('whoever is refused in the middle of a long body reads why, and sees no broken pipe', async () => {
  const authorization = `Bearer ${admin}`
  const type = 'application/vnd.oci.image.manifest.v1+json'
  const long = () => {
    let left = 40
    return new ReadableStream({
      pull: (controller) => {
        if (left-- > 0) controller.enqueue(new Uint8Array(512 * 1024))
        else controller.close()
      },
    })
  }
  const cases: readonly (readonly [number, string, string, Record<string, string>])[] = [
    [413, 'PUT', '/v2/web/manifests/bad', { authorization, 'content-type': type }],
    [413, 'POST', '/api/v1/tokens', { authorization, 'content-type': 'application/json' }],
    [401, 'PUT', '/v2/web/manifests/bad', { 'content-type': type }],
    [404, 'PATCH', '/v2/web/blobs/uploads/00000000-0000-0000-0000-000000000000', { authorization }],
  ]
  for (const [status, method, path, headers] of cases) {
    for (const body of [long, () => new Uint8Array(20 * 1024 * 1024)]) {
      for (let i = 0; i < 5; i++) {
        const init = { method, headers, body: body(), duplex: 'half' } as RequestInit
        assert.equal((await fetch(`${server.publicUrl}${path}`, init)).status, status, `${method} ${path}`)
      }
    }
  }
})

test('API bodies that are too large, not JSON or of the wrong shape get a clear 4xx', async () => {
  const post = async (path: string, body: string) =>
    fetch(`${server.publicUrl}${path}`, {
      method: 'POST',
      headers: { authorization: `Bearer ${admin}`, 'content-type': 'application/json' },
      body,
    })
  assert.equal((await post('/api/v1/tokens', `{"name":"${'x'.repeat(2 * 1024 * 1024)}"}`)).status, 413)
  assert.equal((await post('/api/v1/tokens', '{"name":')).status, 400)
  const shape = await post('/api/v1/tokens', '{"name":"ci","scopes":["everything"]}')
  assert.equal(shape.status, 400)
  assert.match(await shape.text(), /scopes/)
  assert.equal((await post('/api/v1/enroll', '{"bootstrapToken":"rsb_x_y","host":"h"}')).status, 401)
})

test('a report that names what cannot be a name is refused, and the status of releases is still told', async () => {
  const post = async (path: string, body: object, token?: string) =>
    fetch(`${server.publicUrl}${path}`, {
      method: 'POST',
      headers: {
        'content-type': 'application/json',
        ...(token === undefined ? {} : { authorization: `Bearer ${token}` }),
      },
      body: JSON.stringify(body),
    })
  const bootstrapToken = (await readFile(join(server.dataDirectory, 'bootstrap-token'), 'utf8')).trim()
  const enrolled = await post('/api/v1/enroll', { bootstrapToken, host: 'liar' })
  const { credential } = (await enrolled.json()) as { credential: string }
  const report = async (fields: object) =>
    post(
      '/api/v1/hosts/self/report',
      { agentVersion: '1', follow: [], held: [], diskUsedBytes: 0, diskQuotaBytes: 1, ...fields },
      credential,
    )
  const status = await get('/api/v1/releases/status?reference=web:1')
  const { digest } = (await status.json()) as { digest: string }
  const held = {
    digest,
    state: 'held',
    bytesDone: 1,
    bytesTotal: 1,
    bytes: { ownRack: 1, otherRacks: 0, webseed: 0 },
    tookMs: 1,
  }
  assert.equal((await report({ follow: ['web:1'], held: [{ ...held, reference: 'web:1' }] })).status, 200)
  for (const name of ['NOT A NAME', '', '../web:1', 'web:1@sha256:0']) {
    assert.equal((await report({ follow: [name] })).status, 400, `follow ${name}`)
    assert.equal((await report({ held: [{ ...held, reference: name }] })).status, 400, `held ${name}`)
    assert.equal((await get('/api/v1/releases/status?reference=web:1')).status, 200, name)
  }
})

test('random bytes on the socket are answered or cut, and the server stays', async () => {
  for (let i = 0; i < 50; i++) await raw(randomBytes(1 + ((i * 37) % 900)))
  assert.equal((await get('/v2/')).status, 200)
})

test('a query bomb and a header bomb are refused', async () => {
  assert.match(
    await raw(`GET /announce?${'a=b&'.repeat(3000)} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n`),
    /failure reason|^HTTP\/1\.1 4\d\d/,
  )
  assert.match(
    await raw(`GET /announce?x HTTP/1.1\r\nhost: x\r\n${'x-a: b\r\n'.repeat(5000)}\r\n`),
    /^HTTP\/1\.1 431/,
  )
})

function infoHash(): string {
  const claims = JSON.parse(Buffer.from(goodToken().split('.')[1] ?? '', 'base64url').toString()) as {
    infohash: string
  }
  return claims.infohash
}

function goodToken(): string {
  return announceUrl.searchParams.get('jwt') ?? ''
}

function escapeHex(hex: string): string {
  return hex.replace(/../g, '%$&')
}

async function get(path: string): Promise<Response> {
  return fetch(`${server.publicUrl}${path}`, { headers: { authorization: `Bearer ${admin}` } })
}

async function push(digest: string, body: Buffer): Promise<Response> {
  const start = await fetch(`${server.publicUrl}/v2/web/blobs/uploads/`, {
    method: 'POST',
    headers: { authorization: `Bearer ${admin}` },
  })
  const location = new URL(start.headers.get('location') ?? '', server.publicUrl)
  location.searchParams.set('digest', digest)
  return fetch(location, { method: 'PUT', headers: { authorization: `Bearer ${admin}` }, body })
}

function errorCode(body: unknown): string | undefined {
  return (body as { errors: { code: string }[] }).errors[0]?.code
}

/** Sends bytes as they are, and returns all that comes until the server closes or is silent for a second. */
async function raw(bytes: string | Buffer): Promise<string> {
  const socket = connect(Number(new URL(server.publicUrl).port), '127.0.0.1')
  socket.setTimeout(1000, () => {
    socket.destroy()
  })
  let answer = ''
  socket.on('data', (data: Buffer) => (answer += data.toString('latin1')))
  socket.on('error', () => undefined)
  socket.write(bytes)
  await new Promise((settle) => socket.once('close', settle))
  return answer
}
