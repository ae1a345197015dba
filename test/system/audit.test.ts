import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdir, mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { createChainCheck } from '../../lib/protocol/audit-chain.ts'
import type { FleetServer } from '../support/fleet.ts'
import { deployctl, deployctlOk, startFleetServer, writeRandomFile } from '../support/fleet.ts'
import { until } from '../support/until.ts'

test('what people and hosts did stands in the log: who, from where, what, on what', async (t) => {
  const { server, directory, publish } = await setUp(t)
  await publish('web:1')
  await publish('web:2')
  const admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
  const call = async (method: string, path: string, body?: object, token = admin) => {
    const response = await fetch(`${server.publicUrl}${path}`, {
      method,
      headers: { authorization: `Bearer ${token}`, ...(body ? { 'content-type': 'application/json' } : {}) },
      ...(body ? { body: JSON.stringify(body) } : {}),
    })
    assert.ok(response.ok, `${method} ${path}: ${response.status}`)
    return response
  }
  await call('DELETE', '/v2/web/manifests/1')
  const created = JSON.parse(
    await deployctlOk(server, ['token', 'create', '--name', 'ci', '--scope', 'pull:*', '--json']),
  ) as { id: string; token: string }
  await deployctlOk(server, ['token', 'revoke', created.id])
  const bootstrap = JSON.parse(await deployctlOk(server, ['token', 'bootstrap', '--json'])) as {
    id: string
    token: string
  }
  const enrolled = await fetch(`${server.publicUrl}/api/v1/enroll`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ bootstrapToken: bootstrap.token, host: 'h1' }),
  })
  const { credential } = (await enrolled.json()) as { credential: string }
  await call('POST', '/api/v1/hosts/self/renew', {}, credential)
  await deployctlOk(server, ['token', 'revoke', bootstrap.id])
  await deployctlOk(server, ['hosts', 'revoke', 'h1'])
  await deployctlOk(server, ['hosts', 'forget', 'h1'])
  await deployctlOk(server, ['token', 'mint', '--infohash', 'ab'.repeat(20)])
  await deployctlOk(server, ['keys', 'rotate', '--now'])
  await deployctlOk(server, ['torrent', 'revoke', 'ab'.repeat(20), '--reason', 'bad build'])
  await deployctlOk(server, ['torrent', 'unrevoke', 'ab'.repeat(20)])
  const lines = await auditOf(server)
  const acts = lines.map(
    ({ action, who, target }) => `${who.kind}:${who.name} ${action} ${target.split('@')[0] ?? ''}`,
  )
  const uuid = /[0-9a-f]{8}-[0-9a-f-]{27}/
  const shape = (text: string) =>
    text.replace(uuid, 'UUID').replace(bootstrap.id, 'BOOTSTRAP').replace(bootstrap.id, 'BOOTSTRAP')
  assert.deepEqual(
    acts.map(shape).map((text) => text.replace(/key\.(\w+) .*/, 'key.$1')),
    [
      'server:key rotation key.create',
      'server:first start token.create admin-token',
      'server:first start bootstrap.create bootstrap-token',
      'api:first-admin tag.move web:1',
      'api:first-admin tag.move web:latest',
      'api:first-admin tag.move web:2',
      'api:first-admin tag.move web:latest',
      'api:first-admin tag.delete web:1',
      'api:first-admin token.create UUID',
      'api:first-admin token.revoke UUID',
      'api:first-admin bootstrap.create BOOTSTRAP',
      'bootstrap:BOOTSTRAP host.enrol h1',
      'host:h1 host.renew h1',
      'api:first-admin bootstrap.revoke BOOTSTRAP',
      'api:first-admin host.revoke h1',
      'api:first-admin host.forget h1',
      `api:first-admin announce-token.create ${'ab'.repeat(20)}`,
      'api:first-admin key.rotate',
      'server:key rotation key.create',
      'server:key rotation key.activate',
      `api:first-admin torrent.revoke ${'ab'.repeat(20)}`,
      `api:first-admin torrent.unrevoke ${'ab'.repeat(20)}`,
    ],
  )
  const moved = lines[6]
  assert.equal(moved?.address, '127.0.0.1')
  assert.match(String(moved.details?.['was']), /^sha256:/)
  assert.match(moved.who.credential ?? '', uuid)
  const text = await readFile(join(server.dataDirectory, 'audit.log'), 'utf8')
  for (const secret of [admin, created.token, credential, bootstrap.token]) assert.ok(!text.includes(secret))
  assert.equal((await stat(join(server.dataDirectory, 'audit.log'))).mode & 0o777, 0o600)
  const scoped = await deployctlOk(server, ['token', 'create', '--name', 'x', '--scope', 'publish:*'])
  await writeFile(join(directory, 'scoped'), scoped)
  assert.equal(
    (await deployctl(server, ['audit', '--token-file', join(directory, 'scoped')])).code,
    4,
    'for administrators alone',
  )
})

test('deployctl audit shows what is asked for, and finds a line that is missing or was changed', async (t) => {
  const { server, publish } = await setUp(t)
  await publish('web:1')
  assert.match(await deployctlOk(server, ['audit']), /api:first-admin\t127\.0\.0\.1\ttag\.move\tweb:1/)
  const nothing = await deployctl(server, ['audit', '--since', '2100-01-01T00:00:00Z'])
  assert.deepEqual([nothing.code, nothing.stdout], [0, ''])
  assert.equal((await deployctl(server, ['audit', '--since', 'yesterday'])).code, 2)
  const verified = JSON.parse(await deployctlOk(server, ['audit', '--verify', '--json'])) as Record<
    string,
    unknown
  >
  assert.deepEqual([verified['lines'], verified['first'], verified['last']], [5, 1, 5])
  const file = join(server.dataDirectory, 'audit.log')
  const lines = (await readFile(file, 'utf8')).split('\n')
  for (const [what, edited] of [
    ['changed', lines.with(3, (lines[3] ?? '').replace('web:1', 'web:9'))],
    ['removed', lines.toSpliced(3, 1)],
  ] as const) {
    await writeFile(file, edited.join('\n').padEnd(lines.join('\n').length, ' '))
    const { code, stderr } = await deployctl(server, ['audit', '--verify'])
    assert.equal(code, 7, what)
    assert.match(stderr, /line \d/, what)
  }
})

test('kill -9 in the middle of publishes loses no line of what was acknowledged', async (t) => {
  // The port is another one after the restart; the tokens must not mind.
  const settings = 'tokens: { issuer: rackswarm, audience: rackswarm }\n'
  const { server, directory, publish } = await setUp(t, settings)
  const acknowledged: string[] = []
  let going = true
  const publishing = Promise.all(
    [0, 1, 2].map(async (worker) => {
      for (let i = 0; going; i++) {
        await publish(`w${worker}:${i}`)
          .then(() => acknowledged.push(`w${worker}:${i}`))
          .catch(() => undefined)
      }
    }),
  )
  await until('some publishes', () => acknowledged.length >= 4)
  server.process.kill('SIGKILL')
  await server.exited
  going = false
  await publishing
  await using again = await startFleetServer(directory, { settings })
  const lines = await auditOf(again)
  const moved = new Set(lines.filter(({ action }) => action === 'tag.move').map(({ target }) => target))
  for (const reference of acknowledged) assert.ok(moved.has(reference), reference)
  const check = createChainCheck()
  const text = await readFile(join(again.dataDirectory, 'audit.log'), 'utf8')
  assert.deepEqual(
    text
      .trimEnd()
      .split('\n')
      .flatMap((line) => check.follow(line) ?? []),
    [],
  )
})

test(
  'where no line can be written nothing is done: a full disk refuses the call, and it works once there is room',
  { skip: process.getuid?.() !== 0 && 'needs root, to mount a small disk' },
  async (t) => {
    const directory = await mkdtemp(join(tmpdir(), 'rackswarm-audit-full-'))
    t.after(() => rm(directory, { recursive: true, force: true }))
    const disk = join(directory, 'server')
    await mkdir(disk, { mode: 0o700 })
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=8m,mode=700', 'tmpfs', disk])
    using mounted = new DisposableStack()
    mounted.defer(() => execFileSync('umount', [disk]))
    await using server = await startFleetServer(directory, {
      settings: 'registry: { disk_reserve: 64KiB }\n',
    })
    const create = () => deployctl(server, ['token', 'create', '--name', 'x', '--scope', 'pull:*', '--json'])
    assert.equal((await create()).code, 0)
    const filler = join(disk, 'filler')
    await writeFile(filler, Buffer.alloc(16 * 1024 * 1024)).catch(() => undefined)
    // What is left of the last page of the file.
    let refused = await create()
    for (let i = 0; i < 40 && refused.code === 0; i++) refused = await create()
    assert.notEqual(refused.code, 0)
    assert.equal(refused.stdout, '')
    await rm(filler)
    assert.equal((await create()).code, 0)
    await deployctlOk(server, ['audit', '--verify'])
  },
)

interface Line {
  readonly who: { kind: string; name: string; credential?: string }
  readonly address?: string
  readonly action: string
  readonly target: string
  readonly details?: Record<string, unknown>
}

async function auditOf(server: FleetServer): Promise<Line[]> {
  const text = await deployctlOk(server, ['audit', '--json'])
  return text
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line) as Line)
}

async function setUp(t: TestContext, settings = '') {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-audit-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const server = await startFleetServer(directory, { settings })
  t.after(() => server[Symbol.asyncDispose]())
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, 1000)
  return { server, directory, publish: (name: string) => deployctlOk(server, ['publish', build, name]) }
}
