import assert from 'node:assert/strict'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { createAgentClient } from '../../lib/client/agent-client.ts'
import type { FleetAgent, FleetServer } from '../support/fleet.ts'
import {
  deployctl,
  deployctlOk,
  fetchOn,
  startFleetAgent,
  startFleetServer,
  writeRandomFile,
} from '../support/fleet.ts'
import { until } from '../support/until.ts'

const mebibyte = 1024 * 1024

test('a torrent that is revoked is shared no longer: not by hosts that seed it or fetch it, nor by the server', async (t) => {
  const { server, directory, infohash, digest, manifest } = await setUp(t)
  await using seeder = await startFleetAgent(join(directory, 'a1'), server, { host: 'a1', place: 'rack-1' })
  await fetchOn(seeder, 'web:1')
  await using fetcher = await startFleetAgent(join(directory, 'a2'), server, {
    host: 'a2',
    place: 'rack-1',
    extra: 'limits: { download: 1MiB }\n',
  })
  const { token } = JSON.parse(await deployctlOk(server, ['token', 'mint', 'web:1', '--json'])) as {
    token: string
  }
  const outcome = fetchOn(fetcher, 'web:1').then(
    () => 'fetched',
    (error: unknown) => (error as Error).message,
  )
  await until('the second host fetches from the first', async () => (await peersOf(fetcher)) > 0)
  await deployctlOk(server, ['torrent', 'revoke', `web@${manifest}`, '--reason', 'leaks a key'])
  assert.equal(
    await announce(server, infohash, token),
    'd14:failure reason31:unapproved request: invalid jwte',
  )
  assert.match(await outcome, /revoked/)
  await until('the first host seeds no more', async () => !(await seeds(seeder)))
  assert.equal(await peersOf(seeder), 0)
  const admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
  const ask = async (
    path: string,
    init: { method?: string; headers?: Record<string, string>; body?: string } = {},
  ) =>
    fetch(`${server.publicUrl}${path}`, {
      ...init,
      headers: { authorization: `Bearer ${admin}`, ...init.headers },
    })
  const grant = await ask('/api/v1/swarm-grants', {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ repository: 'web', digest }),
  })
  assert.equal(grant.status, 403)
  assert.match(await grant.text(), /TORRENT_REVOKED.*deployctl torrent unrevoke/)
  for (const path of [`/c1/torrent/web/blobs/${digest}`, `/v2/web/blobs/${digest}`])
    assert.equal((await ask(path, { headers: { accept: 'application/x-bittorrent' } })).status, 403, path)
  for (const args of [
    ['torrent', 'web:1', '--output', join(directory, 'x.torrent')],
    ['token', 'mint', 'web:1'],
  ])
    assert.equal((await deployctl(server, args)).code, 4, args.join(' '))
  assert.match(
    await deployctlOk(server, ['torrent', 'revoked']),
    new RegExp(`^${infohash}\\t.*\\tleaks a key\n$`),
  )
  const late = await startFleetAgent(join(directory, 'a3'), server, { host: 'a3', place: 'rack-1' })
  t.after(() => late[Symbol.asyncDispose]())
  await assert.rejects(fetchOn(late, 'web:1'), /its torrent .* was revoked/)

  await deployctlOk(server, ['torrent', 'unrevoke', infohash])
  assert.match(await announce(server, infohash, token), /^d8:complete/)
  await until('the first host seeds again', async () => seeds(seeder))
  await fetchOn(late, 'web:1')
})

test('a revocation holds after a restart, for tokens that were made before, and where no token is asked for', async (t) => {
  const settings = 'tokens: { issuer: rackswarm, audience: rackswarm }\n'
  const { server, directory, infohash } = await setUp(t, settings)
  const { token } = JSON.parse(await deployctlOk(server, ['token', 'mint', 'web:1', '--json'])) as {
    token: string
  }
  await deployctlOk(server, ['torrent', 'revoke', 'web:1'])
  assert.equal((await deployctl(server, ['torrent', 'unrevoke', 'ab'.repeat(20)])).code, 5)
  server.process.kill('SIGKILL')
  await server.exited
  {
    await using again = await startFleetServer(directory, { settings })
    assert.equal(
      await announce(again, infohash, token),
      'd14:failure reason31:unapproved request: invalid jwte',
    )
    await again[Symbol.asyncDispose]()
  }
  await using open = await startFleetServer(directory, {
    settings: `${settings}tracker: { approval: none }\n`,
  })
  assert.equal(await announce(open, infohash, ''), 'd14:failure reason18:unapproved torrente')
  assert.match(await announce(open, 'ab'.repeat(20), ''), /^d8:complete/)
})

async function seeds(agent: FleetAgent): Promise<boolean> {
  await using client = createAgentClient({ socketPath: agent.socketPath })
  return (await client.status()).blobs.some(({ seeding }) => seeding)
}

async function peersOf(agent: FleetAgent): Promise<number> {
  await using client = createAgentClient({ socketPath: agent.socketPath })
  const { transfers } = await client.transfers()
  return transfers.reduce((sum, { peerCount }) => sum + peerCount, 0)
}

async function announce(server: FleetServer, infohash: string, token: string): Promise<string> {
  const query = `info_hash=${infohash.replace(/../g, '%$&')}&peer_id=-RS0001-abcdefghijkl&port=6881&uploaded=0&downloaded=0&left=1`
  const url = `${server.publicUrl}/announce?${query}${token === '' ? '' : `&jwt=${token}`}`
  return (await fetch(url)).text()
}

async function setUp(t: TestContext, settings = '') {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-revoked-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const server = await startFleetServer(directory, { settings })
  t.after(() => server[Symbol.asyncDispose]())
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, 16 * mebibyte)
  const { file, digest } = JSON.parse(await deployctlOk(server, ['publish', build, 'web:1', '--json'])) as {
    digest: string
    file: { digest: string; infohash: string }
  }
  return { server, directory, infohash: file.infohash, digest: file.digest, manifest: digest }
}
