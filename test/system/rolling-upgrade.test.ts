import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import type { IncomingMessage } from 'node:http'
import { Agent, get, request as httpRequest } from 'node:http'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { writeUdpAnnounce } from '../../lib/protocol/udp.ts'
import type { FleetServer } from '../support/fleet.ts'
import { startFleetServer } from '../support/fleet.ts'
import { freePort } from '../support/foreign.ts'
import { layerOf, manifestType, ociClient, sha256Of } from '../support/oci.ts'
import { startRedis } from '../support/redis.ts'
import { createStreams } from '../support/streams.ts'
import { startTcpProxy } from '../support/tcp-proxy.ts'
import type { Address, TrackerProcess } from '../support/tracker.ts'
import {
  announceFields,
  announceQuery,
  first,
  startTracker,
  temporaryDirectory,
  udpProbe,
} from '../support/tracker.ts'
import { until } from '../support/until.ts'

interface Stream extends AsyncDisposable {
  readonly answered: number
  readonly faults: readonly string[]
}

const clients = 8

/**
 * Announces without a pause over kept-alive connections, and over a connection for each. As RFC 9110 9.2.2 allows, a request is sent once
 * more where a connection that had been used before ended without an answer; where a new one did, that is a fault.
 */
function announceTo({ host, port }: Address): Stream {
  let isEnding = false
  const stream = { answered: 0, faults: [] as string[] }
  const client = async (number: number) => {
    const agent = number % 2 === 0 ? new Agent({ keepAlive: true, maxSockets: 1 }) : undefined
    while (!isEnding) {
      const path = `/announce?${announceQuery({ port: 2000 + number })}`
      const outcome = await ask(path, agent)
      if (outcome === 'answered') stream.answered++
      else if (outcome !== 'again') stream.faults.push(outcome)
      await new Promise((resolve) => setTimeout(resolve, 2))
    }
    agent?.destroy()
  }
  const ask = (path: string, agent: Agent | undefined) =>
    new Promise<string>((resolve) => {
      const request = get({ host, port, path, agent: agent ?? false }, (response) => {
        let body = ''
        response.setEncoding('latin1').on('data', (chunk: string) => (body += chunk))
        response.once('error', (error) => {
          resolve(`a reply that broke off: ${error.message}`)
        })
        response.once('end', () => {
          resolve(body.includes('8:interval') ? 'answered' : `not an answer: ${body}`)
        })
      })
      request.once('error', (error) => {
        resolve(request.reusedSocket ? 'again' : error.message)
      })
    })
  const all = Array.from({ length: clients }, (_, number) => client(number))
  return Object.assign(stream, {
    [Symbol.asyncDispose]: async () => {
      isEnding = true
      await Promise.all(all)
    },
  })
}

async function someMore(stream: Stream): Promise<void> {
  const { answered } = stream
  await until('more answers', () => stream.answered > answered + 100)
}

test('two servers behind a balancer are restarted one after the other, and no announce is refused', async (t) => {
  const directories = [await temporaryDirectory(t), await temporaryDirectory(t)]
  const start = async (directory: string, ports: { main: number; metrics: number }) =>
    startTracker(
      t,
      `tracker: { approval: none }
shutdown_delay: 700ms
http: { addr: '127.0.0.1:${ports.main}' }
`,
      { directory, metricsPort: ports.metrics },
    )
  const servers = await Promise.all(
    directories.map(async (directory) => start(directory, { main: 0, metrics: 0 })),
  )
  await using proxy = await startTcpProxy(
    servers.map(({ main, ready }) => ({
      port: main.port,
      readyUrl: `${String(ready['metricsUrl'])}/readyz`,
    })),
  )
  await using stream = announceTo({ host: '127.0.0.1', port: proxy.port })
  await someMore(stream)
  for (const [i, server] of servers.entries()) {
    const link = proxy.links[i] ?? assert.fail()
    const metricsPort = Number(new URL(String(server.ready['metricsUrl'])).port)
    await server[Symbol.asyncDispose]()
    assert.equal(await server.exited, 0)
    await someMore(stream)
    await start(directories[i] ?? '', { main: server.main.port, metrics: metricsPort })
    await until('the balancer sees it', () => link.isReady)
    await someMore(stream)
  }
  assert.deepEqual(stream.faults, [])
  assert.deepEqual(
    proxy.links.map(({ cutUnderWay }) => cutUnderWay),
    [0, 0],
  )
})

test('a new server takes the ports of the old one over, and no announce is refused or lost', async (t) => {
  const old = await startSharing(t, 0, 0)
  const [{ port }, udp] = [first(old.http), first(old.udp)]
  await using stream = announceTo({ host: '127.0.0.1', port })
  await someMore(stream)
  const young = await startSharing(t, port, udp.port)
  const probes = await Promise.all(Array.from({ length: 8 }, async () => udpProbe(t, udp)))
  const connectionId = await first(probes).connectionId()
  let transactionId = 1
  let isEnding = false
  // Ids of connections are good at both, since they share the secret.
  const packets = probes.map(async (probe, i) => {
    const id = i === 0 ? connectionId : await probe.connectionId()
    let answered = 0
    while (!isEnding) {
      const reply = await probe.ask(
        writeUdpAnnounce(
          { connectionId: id, transactionId: transactionId++ },
          announceFields({ port: 3000 + i }),
        ),
      )
      assert.equal(reply.readUInt32BE(0), 1)
      answered++
      await new Promise((resolve) => setTimeout(resolve, 2))
    }
    return answered
  })
  await someMore(stream)
  await old[Symbol.asyncDispose]()
  assert.equal(await old.exited, 0)
  await someMore(stream)
  isEnding = true
  for (const answered of await Promise.all(packets)) assert.ok(answered > 10)
  // Between the last connection that was taken and the close the kernel may take one more, and reset it: docs/operations.md.
  const resets = stream.faults.filter((fault) => fault.endsWith('ECONNRESET'))
  assert.deepEqual(stream.faults, resets)
  assert.ok(resets.length <= 1, `${resets.length} of ${stream.answered}`)
  const { http } = young
  assert.equal(first(http).port, port)
})

test('a new registry takes the port of the old one over, and no pull, push or announce is refused or cut', async (t) => {
  const directory = await temporaryDirectory(t)
  const redis = await startRedis(join(directory, 'redis'))
  t.after(() => redis[Symbol.asyncDispose]())
  const port = await freePort()
  const start = async (name: string): Promise<FleetServer> => {
    const server = await startFleetServer(join(directory, name), {
      http: `addr: 127.0.0.1:${port}`,
      settings: `server_name: ${name}
redis: { url: 'redis://127.0.0.1:${redis.port}' }
storage: { name: redis }
state: { name: redis }
registry: { shared_dir: ${directory}/shared, shared_settle: 300ms }
reuse_port: true
shutdown_delay: 300ms
`,
    })
    t.after(() => server[Symbol.asyncDispose]())
    return server
  }
  const old = await start('old')
  const token = (await readFile(join(directory, 'shared', 'admin-token'), 'utf8')).trim()
  const client = ociClient(`http://127.0.0.1:${port}`, token)
  const large = new Uint8Array(randomBytes(30_000_000))
  const layer = await client.pushBlob('web', large)
  const url = (path: string) => ({ host: '127.0.0.1', port, path })
  const authorization = `Bearer ${token}`
  const minted = await client.call('/api/v1/announce-tokens', {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ infohash: 'aa'.repeat(20) }),
  })
  const { announceUrl } = (await minted.json()) as { announceUrl: string }
  const announcePath = announceUrl.slice(`http://127.0.0.1:${port}`.length)

  // Under way at the old one, from before its end until after its port is closed.
  const [pull] = (await once(
    get({ ...url(`/v2/web/blobs/${layer}`), headers: { authorization } }),
    'response',
  )) as [IncomingMessage]
  const pulled: Buffer[] = []
  pull.pause()
  const slow = new Uint8Array(randomBytes(2_000_000))
  const upload = await client.call('/v2/web/blobs/uploads/', { method: 'POST' })
  await upload.arrayBuffer()
  const location = new URL(upload.headers.get('location') ?? '', `http://127.0.0.1:${port}`)
  const push = httpRequest({
    ...url(location.pathname),
    method: 'PATCH',
    headers: { authorization, 'content-type': 'application/octet-stream', 'content-length': slow.length },
  })
  const pushed = once(push, 'response') as Promise<[IncomingMessage]>
  push.write(slow.subarray(0, 1_000_000))

  const streams = createStreams(t, { pulls: 2, pushes: 5, announces: 20 })
  let number = 0
  /** What ends a connection that had been used before may be sent once more, as RFC 9112 9.3.1 allows. */
  const asked = (path: string, { agent, method = 'GET', body, type }: Asked = {}): Promise<Buffer> =>
    new Promise((resolve, reject) => {
      const request = httpRequest(
        {
          ...url(path),
          method,
          agent: agent ?? false,
          headers: {
            authorization,
            ...(type !== undefined && { 'content-type': type }),
            ...(body && { 'content-length': body.length }),
          },
        },
        (response) => {
          const chunks: Buffer[] = []
          response.on('data', (chunk: Buffer) => chunks.push(chunk))
          response.once('error', reject)
          response.once('end', () => {
            const { statusCode = 0, headers } = response
            if (statusCode >= 300) reject(new Error(`${method} ${path}: ${statusCode}`))
            else
              resolve(headers.location === undefined ? Buffer.concat(chunks) : Buffer.from(headers.location))
          })
        },
      )
      request.once('error', (error) => {
        if (request.reusedSocket && method === 'GET') resolve(asked(path, { agent }))
        else reject(error)
      })
      request.end(body)
    })
  const pullOnce = (agent: Agent | undefined) => async () => {
    const bytes = await asked(`/v2/web/blobs/${layer}`, { agent })
    assert.ok(bytes.equals(large), 'the same bytes')
  }
  const pushOnce = async () => {
    const bytes = new Uint8Array(randomBytes(100_000))
    const begun = await asked('/v2/web/blobs/uploads/', { method: 'POST' })
    const { pathname } = new URL(begun.toString(), 'http://x')
    const type = 'application/octet-stream'
    await asked(pathname, { method: 'PATCH', body: bytes, type })
    await asked(`${pathname}?digest=${sha256Of(bytes)}`, { method: 'PUT' })
    const manifest = { schemaVersion: 2, mediaType: manifestType, layers: [layerOf(bytes)] }
    const body = Buffer.from(JSON.stringify(manifest))
    await asked(`/v2/web/manifests/t${number++}`, { method: 'PUT', body, type: manifestType })
  }
  const announceOnce = async () => {
    const body = await asked(`${announcePath}&${announceQuery({ port: 2000 })}`)
    assert.ok(body.includes('8:interval'), body.toString('latin1'))
  }
  const kept = new Agent({ keepAlive: true, maxSockets: 1 })
  t.after(() => {
    kept.destroy()
  })
  streams.start('pulls', pullOnce(kept))
  streams.start('pulls', pullOnce(undefined))
  streams.start('pushes', pushOnce)
  streams.start('pushes', pushOnce)
  streams.start('announces', announceOnce)
  await streams.someOfEach()
  const young = await start('young')
  await streams.someOfEach()
  assert.equal(await listenersOn(port), 2)
  old.process.kill('SIGTERM')
  while ((await listenersOn(port)) > 1) await new Promise((resolve) => setTimeout(resolve, 10))
  pull.on('data', (chunk: Buffer) => pulled.push(chunk)).resume()
  push.end(slow.subarray(1_000_000))
  const [[answer]] = await Promise.all([pushed, once(pull, 'end')])
  assert.equal(answer.statusCode, 202)
  answer.resume()
  assert.ok(Buffer.concat(pulled).equals(large), 'the pull that was under way')
  assert.equal(await old.exited, 0)
  assert.equal(await client.statusOf(`${location.pathname}?digest=${sha256Of(slow)}`, { method: 'PUT' }), 201)
  await streams.someOfEach()
  await streams.end()
  // As above: what the kernel takes between the last connection and the close.
  const resets = streams.faults.filter((fault) => fault.endsWith('ECONNRESET'))
  assert.deepEqual(streams.faults, resets)
  assert.ok(resets.length <= 1, `${resets.length} of ${JSON.stringify(streams.done)}`)
  for (let tag = 0; tag < number; tag++)
    assert.equal(await client.statusOf(`/v2/web/manifests/t${tag}`, { method: 'HEAD' }), 200)
  young.process.kill('SIGTERM')
  assert.equal(await young.exited, 0)
})

interface Asked {
  readonly agent?: Agent | undefined
  readonly method?: string
  readonly body?: Uint8Array
  readonly type?: string
}

/** How many sockets of this machine wait for connections on a port of IPv4. */
async function listenersOn(port: number): Promise<number> {
  const local = `:${port.toString(16).toUpperCase().padStart(4, '0')}`
  const lines = (await readFile('/proc/net/tcp', 'utf8')).split('\n').map((line) => line.trim().split(/\s+/))
  return lines.filter(([, address, , state]) => address?.endsWith(local) && state === '0A').length
}

const startSharing = async (t: TestContext, port: number, udpPort: number): Promise<TrackerProcess> =>
  startTracker(
    t,
    `tracker: { approval: none }
reuse_port: true
shutdown_delay: 300ms
http: { addr: '127.0.0.1:${port}' }
udp: { addr: '127.0.0.1:${udpPort}', private_key: 'shared by old and young' }
`,
  )
