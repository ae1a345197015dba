import assert from 'node:assert/strict'
import { mkdtemp, readFile, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import createTorrent from 'create-torrent'
import { parseTorrent } from '../../lib/protocol/metainfo.ts'
import type { FleetAgent, FleetServer } from '../support/fleet.ts'
import {
  deployctl,
  deployctlOk,
  startFleetAgent,
  startFleetServer,
  writeRandomFile,
} from '../support/fleet.ts'
import { until } from '../support/until.ts'

let directory = ''
let server: FleetServer
let agent: FleetAgent
let build = ''

before(async () => {
  directory = await mkdtemp(join(tmpdir(), 'rackswarm-deployctl-'))
  server = await startFleetServer(directory)
  agent = await startFleetAgent(join(directory, 'a1'), server, { host: 'a1', place: 'rack-1' })
  build = join(directory, 'build.tar')
  await writeRandomFile(build, 1024 * 1024)
})

after(async () => {
  await agent[Symbol.asyncDispose]()
  await server[Symbol.asyncDispose]()
  await rm(directory, { recursive: true, force: true })
})

test('the exit code says what kind of failure it was, stderr says it in words, stdout stays empty', async () => {
  const cases: readonly (readonly [string[], number, RegExp, Record<string, string>?])[] = [
    [['publsh'], 2, /publish/],
    [['publish'], 2, /argument/],
    [['publish', join(directory, 'absent.tar')], 5, /no file .*absent\.tar/],
    [['publish', build, 'Web:1'], 2, /Web/],
    [['publish', build, '../etc:1'], 2, /\.\.\/etc/],
    [['show', 'nothing:1'], 5, /nothing/],
    [['torrent', 'nothing:1', '--output', join(directory, 'x')], 5, /nothing/],
    [['list'], 4, /token/, { DEPLOYCTL_TOKEN_FILE: join(directory, 'no-token') }],
    [['list'], 1, /127\.0\.0\.1:1/, { DEPLOYCTL_SERVER: 'http://127.0.0.1:1' }],
    [['list'], 2, /not a url/, { DEPLOYCTL_SERVER: 'not a url' }],
    [['token', 'revoke', 'nobody'], 5, /nobody/],
    [['token', 'create', '--name', 'x', '--scope', 'everything'], 2, /everything|scope/],
  ]
  for (const [args, code, words, env] of cases) {
    const result = await deployctl(server, args, env ? { env } : {})
    assert.equal(result.code, code, `${args.join(' ')}: ${result.stderr}`)
    assert.match(result.stderr, words, args.join(' '))
    assert.equal(result.stdout, '', args.join(' '))
    assert.ok(!result.stderr.includes('\u001B'), 'no colour where there is no terminal')
    assert.ok(!/^\s+at /m.test(result.stderr), 'no stack trace')
  }
})

test('help and version go to stdout and are no failure', async () => {
  for (const args of [['--help'], ['--version'], ['publish', '--help'], ['token', 'mint', '--help']]) {
    const { code, stdout, stderr } = await deployctl(server, args)
    assert.deepEqual([code, stderr], [0, ''], args.join(' '))
    assert.ok(stdout.length > 0)
  }
})

test('publish, list, show, status, fetch and torrent say the same of one release, in JSON too', async () => {
  const json = async (...args: string[]) =>
    JSON.parse(
      await deployctlOk(server, [...args, '--json'], { DEPLOYCTL_SOCKET: agent.socketPath }),
    ) as Record<string, unknown>
  const published = await json('publish', build, 'web:1')
  assert.match(String(published['digest']), /^sha256:[0-9a-f]{64}$/)
  const shown = await json('show', 'web:1')
  assert.equal(shown['digest'], published['digest'])
  assert.match(JSON.stringify(await json('list')), /web/)
  const output = join(directory, 'out')
  await json('fetch', 'web:1', '--output', output)
  assert.ok((await readFile(join(output, 'build.tar'))).equals(await readFile(build)))
  const torrent = join(directory, 'build.torrent')
  await json('torrent', 'web:1', '--output', torrent)
  assert.equal((await stat(torrent)).mode & 0o077, 0, 'it holds a token: for its owner alone')
  assert.ok(
    JSON.stringify(shown).includes(Buffer.from(parseTorrent(await readFile(torrent)).infoHash).toString()),
  )
  await until('the rack of the host is in the status', async () =>
    JSON.stringify(await json('status', 'web:1')).includes('rack-1'),
  )
})

test('publish names a release after its file and the hour, and latest moves to it', async () => {
  const { tag } = JSON.parse(await deployctlOk(server, ['publish', build, 'dated', '--json'])) as {
    tag: string
  }
  assert.match(tag, /^\d{8}-\d{6}$/)
  const digestOf = async (reference: string) =>
    (JSON.parse(await deployctlOk(server, ['show', reference, '--json'])) as { digest: string }).digest
  assert.equal(await digestOf('dated:latest'), await digestOf(`dated:${tag}`))
})

test('torrent create needs no server, and agrees with create-torrent', async () => {
  const file = join(directory, 'offline.torrent')
  await deployctlOk(server, ['torrent', 'create', build, '--output', file], {
    DEPLOYCTL_SERVER: 'http://127.0.0.1:1',
  })
  const ours = parseTorrent(await readFile(file))
  const theirs = await new Promise<Uint8Array>((resolve, reject) => {
    createTorrent(
      build,
      { name: ours.name, pieceLength: ours.pieceLength, private: true, announceList: [], createdBy: '' },
      (error: Error | null, torrent: Uint8Array) => {
        if (error) reject(error)
        else resolve(torrent)
      },
    )
  })
  assert.equal(parseTorrent(theirs).infoHash, ours.infoHash)
})

test('a token is created with its scopes, logs in, is inspected from stdin, and ends when it is revoked', async () => {
  const file = join(directory, 'ci-token')
  const created = JSON.parse(
    await deployctlOk(server, [
      'token',
      'create',
      '--name',
      'ci',
      '--scope',
      'pull:web',
      '--output',
      file,
      '--json',
    ]),
  ) as { id: string }
  assert.equal((await stat(file)).mode & 0o777, 0o600)
  const token = await readFile(file, 'utf8')
  const home = { XDG_CONFIG_HOME: join(directory, 'home'), DEPLOYCTL_TOKEN_FILE: '', DEPLOYCTL_SERVER: '' }
  const login = await deployctl(server, ['login', server.publicUrl], { env: home, input: token })
  assert.equal(login.code, 0, login.stderr)
  assert.ok(!`${login.stdout}${login.stderr}`.includes(token.trim()), 'a token is not shown')
  assert.equal((await deployctl(server, ['show', 'web:1'], { env: home })).code, 0)
  assert.equal((await deployctl(server, ['publish', build, 'web:2'], { env: home })).code, 4)
  assert.equal((await deployctl(server, ['token', 'list'], { env: home })).code, 4)
  const inspected = await deployctl(server, ['token', 'inspect', '--json'], { input: token })
  assert.match(inspected.stdout, /"pull:web"/)
  await deployctlOk(server, ['token', 'revoke', created.id])
  assert.equal((await deployctl(server, ['show', 'web:1'], { env: home })).code, 4)
})

test('token mint works with a key file and no server', async () => {
  const { keys } = (await (await fetch(`${server.publicUrl}/.well-known/jwks.json`)).json()) as {
    keys: { kid: string }[]
  }
  const key = join(server.dataDirectory, 'keys', `${keys[0]?.kid ?? ''}.json`)
  const infohash = 'ab'.repeat(20)
  const url = await deployctlOk(
    server,
    ['token', 'mint', '--infohash', infohash, '--key', key, '--announce', `${server.publicUrl}/announce`],
    { DEPLOYCTL_SERVER: 'http://127.0.0.1:1' },
  )
  const announce = `${url.trim()}&info_hash=${infohash.replace(/../g, '%$&')}&peer_id=-RS0001-abcdefghijkl&port=6881&uploaded=0&downloaded=0&left=1`
  assert.match(await (await fetch(announce)).text(), /^d8:complete/)
})

test('doctor finds nothing wrong where nothing is, and names what is wrong elsewhere', async () => {
  const env = { DEPLOYCTL_SOCKET: agent.socketPath }
  const well = await deployctl(server, ['doctor', '--json'], { env })
  assert.equal(well.code, 0, well.stdout)
  const { findings } = JSON.parse(well.stdout) as { findings: { check: string; verdict: string }[] }
  for (const check of [
    'configuration',
    'keys',
    'clock',
    'tracker, good token',
    'tracker, bad token',
    'agent',
  ])
    assert.equal(findings.find((finding) => finding.check === check)?.verdict, 'ok', check)
  const ill = await deployctl(server, ['doctor'], { env: { ...env, DEPLOYCTL_SERVER: 'http://127.0.0.1:1' } })
  assert.equal(ill.code, 1)
  assert.match(ill.stdout, /fail .*127\.0\.0\.1:1/)
})
