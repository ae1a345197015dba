import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { mkdir, mkdtemp, readFile, rm } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  deployctl,
  deployctlOk,
  fetchOn,
  startFleetAgent,
  startFleetServer,
  writeRandomFile,
} from '../support/fleet.ts'
import { untilRefused } from '../support/until.ts'

test('TLS on the main port: deployctl and an agent that know the authority get through, one that does not says so', async (t) => {
  const directory = await temporaryDirectory(t)
  const [cert, key] = [join(directory, 'cert.pem'), join(directory, 'key.pem')]
  execFileSync(
    'openssl',
    `req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -keyout ${key} -out ${cert}`.split(
      ' ',
    ),
    { stdio: 'pipe' },
  )
  await using server = await startFleetServer(directory, {
    http: `addr: 127.0.0.1:0, tls: { cert: ${cert}, key: ${key} }`,
  })
  assert.match(server.publicUrl, /^https:/)
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, 1024 * 1024)
  const stranger = await deployctl(server, ['publish', build, 'web:1'])
  assert.equal(stranger.code, 1)
  assert.match(stranger.stderr, /certificate/)
  await deployctlOk(server, ['publish', build, 'web:1', '--ca', cert])
  await using agent = await startFleetAgent(join(directory, 'a1'), server, {
    host: 'a1',
    place: 'a',
    extra: `ca: ${cert}\n`,
  })
  const { files } = await fetchOn(agent, 'web:1')
  assert.ok((await readFile(files[0]?.path ?? '')).equals(await readFile(build)))
})

test('an address that others reach needs TLS, or the word of the operator', async (t) => {
  const directory = await temporaryDirectory(t)
  const http = 'addr: 0.0.0.0:0'
  await assert.rejects(startFleetServer(directory, { http }), /code 78/)
  assert.match(await readFile(join(directory, 'server.log'), 'utf8'), /http\.tls.*insecure_plaintext/)
  await using server = await startFleetServer(directory, { http: `${http}, insecure_plaintext: true` })
  assert.equal((await fetch(`${server.publicUrl}/v2/`)).status, 401)
})

test('clients that send a byte a second are cut, in the head and in the body, and nothing stays of them', async (t) => {
  const directory = await temporaryDirectory(t)
  await using server = await startFleetServer(directory, { http: 'addr: 127.0.0.1:0, request_timeout: 1s' })
  const admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
  const authorization = `authorization: Bearer ${admin}`
  const started = await fetch(`${server.publicUrl}/v2/web/blobs/uploads/?length=1000000`, {
    method: 'POST',
    headers: { authorization: `Bearer ${admin}` },
  })
  const location = new URL(started.headers.get('location') ?? '', server.publicUrl)
  const heads = {
    'the head of an announce': 'GET /announce?info_hash=',
    'the body of an API call': `POST /api/v1/tokens HTTP/1.1\r\nhost: x\r\n${authorization}\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n`,
    'the body of an upload': `PATCH ${location.pathname}${location.search} HTTP/1.1\r\nhost: x\r\n${authorization}\r\ncontent-length: 1000000\r\n\r\n`,
  }
  await Promise.all(
    Object.entries(heads).map(async ([what, head]) => {
      const seconds = await trickle(Number(new URL(server.publicUrl).port), head)
      assert.ok(seconds < 10, `${what}: cut after ${seconds} s`)
    }),
  )
  const again = await fetch(location, { headers: { authorization: `Bearer ${admin}` } })
  assert.equal(again.status, 204, 'the upload may be resumed')
  await fetch(location, { method: 'DELETE', headers: { authorization: `Bearer ${admin}` } })
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, 1024 * 1024)
  await deployctlOk(server, ['publish', build, 'web:1'])
})

test('a server that ends answers what is under way, and is not kept by connections that stay open', async (t) => {
  const directory = await temporaryDirectory(t)
  await using server = await startFleetServer(directory)
  const admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
  const headers = { authorization: `Bearer ${admin}` }
  const started = await fetch(`${server.publicUrl}/v2/web/blobs/uploads/`, { method: 'POST', headers })
  const { port, pathname } = new URL(started.headers.get('location') ?? '', server.publicUrl)
  const socket = connect(Number(port), '127.0.0.1')
  t.after(() => socket.destroy())
  socket.on('error', () => undefined)
  socket.write(
    `PATCH ${pathname} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ${admin}\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n`,
  )
  const [ready] = (await once(socket, 'data')) as [Buffer]
  assert.match(ready.toString(), /^HTTP\/1\.1 100 /)
  server.process.kill('SIGTERM')
  await untilRefused(Number(port))
  const answered = once(socket, 'data') as Promise<[Buffer]>
  socket.write('build')
  assert.match((await answered)[0].toString(), /^HTTP\/1\.1 202 [^]*\r\nconnection: close\r\n/i)
  const code = await Promise.race([server.exited, sleep(5_000, 'still there', { ref: false })])
  assert.equal(code, 0)
})

test(
  'a full disk of the server refuses the push, loses nothing, and is over once there is room',
  { skip: process.getuid?.() !== 0 && 'needs root, to mount a small disk' },
  async (t) => {
    const directory = await temporaryDirectory(t)
    const disk = join(directory, 'server')
    await mkdir(disk)
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', disk])
    using mounted = new DisposableStack()
    mounted.defer(() => execFileSync('umount', ['--lazy', disk]))
    await using server = await startFleetServer(directory, { settings: 'registry: { disk_reserve: 0B }\n' })
    const admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
    const push = async (bytes: Buffer) => {
      const headers = { authorization: `Bearer ${admin}` }
      const started = await fetch(`${server.publicUrl}/v2/web/blobs/uploads/`, { method: 'POST', headers })
      if (started.status !== 202) return started.status
      const location = new URL(started.headers.get('location') ?? '', server.publicUrl)
      location.searchParams.set('digest', digestOf(bytes))
      return (await fetch(location, { method: 'PUT', headers, body: new Uint8Array(bytes) })).status
    }
    const first = randomBytes(3 * 1024 * 1024)
    const second = randomBytes(3 * 1024 * 1024)
    assert.equal(await push(first), 201)
    assert.equal(await push(randomBytes(6 * 1024 * 1024)), 507)
    execFileSync('mount', ['-o', 'remount,size=64m', disk])
    assert.equal(await push(second), 201)
    for (const bytes of [first, second]) {
      const response = await fetch(`${server.publicUrl}/v2/web/blobs/${digestOf(bytes)}`, {
        headers: { authorization: `Bearer ${admin}` },
      })
      assert.ok(Buffer.from(await response.arrayBuffer()).equals(bytes))
    }
  },
)

/** Sends a head, then a byte a second. @returns the seconds until the server closed */
async function trickle(port: number, head: string): Promise<number> {
  const socket = connect(port, '127.0.0.1')
  const closed = new Promise((settle) => socket.once('close', settle))
  socket.on('error', () => undefined)
  socket.resume()
  socket.write(head)
  const startedAt = Date.now()
  const timer = setInterval(() => socket.write('a'), 1000)
  await Promise.race([closed, sleep(20_000)])
  clearInterval(timer)
  socket.destroy()
  return (Date.now() - startedAt) / 1000
}

function digestOf(bytes: Buffer): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`
}

async function temporaryDirectory(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-main-port-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return directory
}
