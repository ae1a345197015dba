// What docs/operations.md has for those who run several servers, run as it stands there.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { Redis } from 'ioredis'
import { parseCompactPeers } from '../../lib/protocol/address.ts'
import type { Child } from '../../lib/runtime/child.ts'
import { startChild } from '../../lib/runtime/child.ts'
import { blockAfter } from '../support/doc-examples.ts'
import { bin } from '../support/fleet.ts'
import { freePort } from '../support/foreign.ts'
import type { OciClient } from '../support/oci.ts'
import { ociClient, pushRelease } from '../support/oci.ts'
import { startRedis } from '../support/redis.ts'
import { createStreams } from '../support/streams.ts'
import { installTools } from '../support/tools.ts'
import { announceQuery, bencoded, httpGet, temporaryDirectory } from '../support/tracker.ts'

interface Several {
  readonly directory: string
  readonly ports: { readonly front: number; readonly main: number; readonly metrics: number }
  /** That of `public_url`, by which they are reached. */
  readonly publicUrl: string
  /** Starts the server at 127.0.0.`last`. */
  start(last: number): Promise<Child>
  log(last: number): Promise<string>
  adminToken(): Promise<string>
}

/** Servers that have the ports of the document, but for their numbers, at an address each. `redis` is what stands in that section. */
async function several(
  t: TestContext,
  { redis, settings = '' }: { redis: string; settings?: string },
): Promise<Several> {
  const directory = await temporaryDirectory(t)
  const ports = { front: await freePort(), main: await freePort(), metrics: await freePort() }
  const publicUrl = `http://127.0.0.1:${ports.front}`
  const shared = join(directory, 'shared')
  await mkdir(shared, { mode: 0o700 })
  const logOf = (last: number) => join(directory, `${last}.log`)
  return {
    directory,
    ports,
    publicUrl,
    start: async (last) => {
      const config = join(directory, `${last}.yaml`)
      await writeFile(
        config,
        `data_dir: ${directory}/data-${last}
server_name: s${last}
public_url: ${publicUrl}
http: { addr: '127.0.0.${last}:${ports.main}', trusted_proxies: [127.0.0.1/32] }
udp: { addr: [] }
metrics_addr: 127.0.0.${last}:${ports.metrics}
redis: { ${redis} }
storage: { name: redis }
state: { name: redis }
registry: { shared_dir: ${shared}, shared_settle: 300ms }
${settings}`,
      )
      const child = await startChild({
        file: bin('rackswarm-server'),
        args: ['--config', config],
        readyMessage: 'server is listening',
        logFile: logOf(last),
      })
      t.after(() => child[Symbol.asyncDispose]())
      return child
    },
    log: (last) => readFile(logOf(last), 'utf8'),
    adminToken: async () => (await readFile(join(shared, 'admin-token'), 'utf8')).trim(),
  }
}

/** The path of an announce URL with a token for the infohash that announces of tests have. */
async function announcePath(client: OciClient): Promise<string> {
  const response = await client.call('/api/v1/announce-tokens', {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ infohash: 'aa'.repeat(20) }),
  })
  const { pathname, search } = new URL(((await response.json()) as { announceUrl: string }).announceUrl)
  return `${pathname}${search}`
}

async function until(
  what: string,
  isTrue: () => boolean | Promise<boolean>,
  withinMs = 20_000,
): Promise<void> {
  const end = performance.now() + withinMs
  while (!(await isTrue())) {
    assert.ok(performance.now() < end, `in time: ${what}`)
    await sleep(50)
  }
}

test('HAProxy, configured as the document says: a server is drained, and no announce, pull or push is refused', async (t) => {
  installTools(['haproxy'])
  const redis = await startRedis(join(await temporaryDirectory(t), 'redis'))
  t.after(() => redis[Symbol.asyncDispose]())
  // Two checks and a second, as the document says.
  const fleet = await several(t, {
    redis: `url: 'redis://127.0.0.1:${redis.port}'`,
    settings: 'shutdown_delay: 5s\n',
  })
  const { directory, ports, publicUrl } = fleet
  const [a] = await Promise.all([fleet.start(11), fleet.start(12)])
  const text = (await blockAfter('operations.md', 'HAProxy:'))
    .replace('bind :6969', `bind 127.0.0.1:${ports.front}`)
    .replaceAll(':6969', `:${ports.main}`)
    .replaceAll('6880', String(ports.metrics))
    .replaceAll('10.0.0.', '127.0.0.')
  const file = join(directory, 'haproxy.cfg')
  await writeFile(file, text)
  const haproxy = spawn('/usr/sbin/haproxy', ['-f', file, '-db'], { stdio: ['ignore', 'pipe', 'pipe'] })
  let said = ''
  for (const stream of [haproxy.stdout, haproxy.stderr])
    stream.on('data', (chunk: Buffer) => (said += chunk.toString()))
  const exited = once(haproxy, 'exit')
  t.after(async () => {
    haproxy.kill('SIGKILL')
    await exited
  })
  // The third one of the document is down.
  await until(
    'HAProxy has seen who is there',
    () => said.includes('rackswarm/c is DOWN') || haproxy.exitCode !== null,
  )
  assert.equal(haproxy.exitCode, null, said)

  const client = ociClient(publicUrl, await fleet.adminToken())
  const { layer } = await pushRelease(client, 'web', '1', 5_000_000)
  const path = await announcePath(client)
  const announce = async (port: number, from: string) => {
    const { status, body } = await httpGet(
      { host: '127.0.0.1', port: ports.front },
      `${path}&${announceQuery({ port })}`,
      { from },
    )
    assert.equal(status, 200, body)
    const peers = bencoded(body).get('peers')
    assert.ok(peers instanceof Uint8Array, body)
    return parseCompactPeers(peers, 4)
  }
  await announce(1001, '127.0.0.77')
  // Whichever servers they came to; and it is the client's address that is handed out, not HAProxy's.
  for (let i = 0; i < 4; i++)
    assert.deepEqual(
      (await announce(1002, '127.0.0.78')).map(({ compact }) => [...compact].slice(0, 4)),
      [[127, 0, 0, 77]],
    )

  const streams = createStreams(t, { announces: 5, pulls: 5, pushes: 5 })
  let tags = 0
  streams.start('announces', () => announce(1003, '127.0.0.79'))
  streams.start('announces', () => announce(1004, '127.0.0.80'))
  streams.start('pulls', async () => assert.equal((await client.pullBlob('web', layer))?.length, 5_000_000))
  streams.start('pushes', () => pushRelease(client, 'web', `t${tags++}`, 50_000))
  await streams.someOfEach()
  a.process.kill('SIGTERM')
  assert.equal(await a.exited, 0)
  assert.match(said, /rackswarm\/a is DOWN/)
  await streams.someOfEach()
  await fleet.start(11)
  await until('HAProxy has seen it', () => said.includes('rackswarm/a is UP'))
  await streams.someOfEach()
  await streams.end()
  assert.deepEqual(streams.faults, [])
})

test('the user of Redis’ ACL that the document has may do all that servers do, and neither FLUSHALL nor anything outside of its prefix', async (t) => {
  const directory = await temporaryDirectory(t)
  const password = randomBytes(12).toString('hex')
  const line = (await blockAfter('operations.md', 'Its ACL user')).replace('PASSWORD', password)
  await writeFile(join(directory, 'users.acl'), `user default off\n${line}`)
  const redis = await startRedis(join(directory, 'redis'), {
    options: ['--aclfile', join(directory, 'users.acl')],
  })
  t.after(() => redis[Symbol.asyncDispose]())
  await writeFile(join(directory, 'password'), password, { mode: 0o600 })
  const fleet = await several(t, {
    redis: `url: 'redis://127.0.0.1:${redis.port}', username: rackswarm, password_file: ${directory}/password`,
  })
  await Promise.all([fleet.start(11), fleet.start(12)])
  const token = await fleet.adminToken()
  const [one, two] = [11, 12].map((last) => ociClient(`http://127.0.0.${last}:${fleet.ports.main}`, token))
  assert.ok(one && two)

  await pushRelease(one, 'web', '1')
  const path = await announcePath(one)
  const announce = async (last: number, fields: Parameters<typeof announceQuery>[0]) =>
    (await httpGet({ host: `127.0.0.${last}`, port: fleet.ports.main }, `${path}&${announceQuery(fields)}`))
      .body
  await announce(11, { port: 1001 })
  await announce(11, { port: 1002, left: 0, event: 'completed' })
  const peers = bencoded(await announce(12, { port: 1003 })).get('peers')
  assert.ok(peers instanceof Uint8Array && peers.length === 12, (await fleet.log(11)) + (await fleet.log(12)))
  await announce(12, { port: 1003, event: 'stopped' })
  const asJson = { 'content-type': 'application/json' }
  const body = JSON.stringify({ name: 'ci', scopes: ['pull:*'] })
  const made = await one.call('/api/v1/tokens', { method: 'POST', headers: asJson, body })
  const { id, token: ci } = (await made.json()) as { id: string; token: string }
  assert.equal(await two.statusOf(`/api/v1/tokens/${id}`, { method: 'DELETE' }), 204)
  const ciAtOne = ociClient(`http://127.0.0.11:${fleet.ports.main}`, ci)
  await until('the other server hears of it', async () => (await ciAtOne.statusOf('/v2/')) === 401)
  const status = (await (await one.call('/api/v1/releases/status?reference=web:1')).json()) as {
    unheard?: string[]
  }
  assert.equal(status.unheard, undefined, 'the servers hear of each other')
  const metricsOf = async (last: number, path: string) =>
    (await fetch(`http://127.0.0.${last}:${fleet.ports.metrics}${path}`)).text()
  await until('the totals are known', async () => /"leechers":1\b/.test(await metricsOf(12, '/stats.json')))
  for (const last of [11, 12]) {
    assert.match(await metricsOf(last, '/readyz'), /^\{"status":"ok"/)
    assert.doesNotMatch(await fleet.log(last), /NOPERM|no permissions|is refused|could not be asked/)
  }

  const user = new Redis({ port: redis.port, username: 'rackswarm', password, retryStrategy: () => null })
  user.on('error', () => undefined)
  t.after(() => {
    user.disconnect()
  })
  assert.equal(await user.set('rackswarm:x', 1), 'OK')
  for (const [command, ...args] of [
    ['FLUSHALL'],
    ['FLUSHDB'],
    ['KEYS', '*'],
    ['SHUTDOWN'],
    ['CONFIG', 'SET', 'maxmemory', '1'],
    ['SET', 'other:x', '1'],
    ['GET', 'other:x'],
    ['PUBLISH', 'other', '1'],
    ['EVAL', "return redis.call('SET', 'other:x', 1)", '0'],
  ])
    await assert.rejects(
      user.call(command ?? '', ...args),
      /NOPERM|can't access/,
      [command, ...args].join(' '),
    )
})
