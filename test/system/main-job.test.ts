import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { createAgentClient } from '../../lib/client/agent-client.ts'
import type { HeldReference } from '../../lib/client/api.ts'
import type { FleetAgent, FleetServer } from '../support/fleet.ts'
import {
  deployctl,
  deployctlOk,
  fetchOn,
  refreshFile,
  startFleetAgent,
  startFleetServer,
  writeRandomFile,
} from '../support/fleet.ts'
import { until } from '../support/until.ts'

const sizeBytes = 16 * 1024 * 1024 + 321
const follow = 'follow: ["web:latest"]\nfollow_jitter: 100ms\n'

test('a published build reaches every host that follows it, and a second version replaces it', async (t) => {
  const { directory, server, build } = await startedServer(t)
  const agents = await Promise.all(
    ['a1', 'a2', 'b1', 'b2'].map((host) => startedAgent(t, directory, server, host, follow)),
  )
  await deployctlOk(server, ['publish', build, 'web:1', '--wait', '100%', '--timeout', '60s'])
  const first = await readFile(build)
  for (const agent of agents)
    assert.deepEqual(await readFile(join((await held(agent, 'web:latest')).path, 'build.tar')), first)

  await refreshFile(build)
  await deployctlOk(server, ['publish', build, 'web:2', '--wait', '100%', '--timeout', '60s'])
  const second = await readFile(build)
  for (const agent of agents) {
    const { path } = await held(agent, 'web:latest')
    assert.deepEqual(await readFile(join(path, 'build.tar')), second)
    assert.deepEqual(await readFile(join(path, '..', 'previous', 'build.tar')), first)
  }
})

test('a rack is served by its own hosts: the second host of a rack takes little from outside it', async (t) => {
  const { directory, server, build } = await startedServer(t)
  await deployctlOk(server, ['publish', build, 'web:1'])
  const far = await startedAgent(t, directory, server, 'a1')
  const near = await startedAgent(t, directory, server, 'b1')
  await fetchOn(far, 'web:1')
  await fetchOn(near, 'web:1')
  const { held: second } = await fetchOn(await startedAgent(t, directory, server, 'b2'), 'web:1')
  assert.equal(second.bytes.webseed, 0)
  assert.equal(second.bytes.otherRacks, 0)
  assert.ok(second.bytes.ownRack >= sizeBytes)
})

test('a rack whose every host starts with nothing is not an island', async (t) => {
  const { directory, server, build } = await startedServer(t)
  await deployctlOk(server, ['publish', build, 'web:1'])
  await fetchOn(await startedAgent(t, directory, server, 'a1'), 'web:1')
  const rack = await Promise.all(['b1', 'b2', 'b3'].map((host) => startedAgent(t, directory, server, host)))
  const results = await Promise.all(rack.map((agent) => fetchOn(agent, 'web:1')))
  for (const { held: state } of results) assert.equal(state.state, 'held')
})

test('a build published while no host follows it says so, and --wait ends with the timeout code', async (t) => {
  const { server, build } = await startedServer(t)
  const { code, stderr } = await deployctl(server, [
    'publish',
    build,
    'lonely:1',
    '--wait',
    '95%',
    '--timeout',
    '2s',
  ])
  assert.equal(code, 8)
  assert.match(stderr, /lonely/)
})

test('kill -9 of the server in the middle of a deploy delays it and loses nothing', async (t) => {
  const { directory, server, build } = await startedServer(t, 'registry: { webseed: { rate: 4MiB } }\n')
  await deployctlOk(server, ['publish', build, 'web:1'])
  const agent = await startedAgent(t, directory, server, 'a1')
  const fetching = fetchOn(agent, 'web:1')
  await untilBytes(agent, 'web:1', 1)
  server.process.kill('SIGKILL')
  await server.exited
  const port = new URL(server.publicUrl).port
  const again = await startFleetServer(directory, {
    settings: 'registry: { webseed: { rate: 512MiB } }\n',
    http: `addr: 127.0.0.1:${port}`,
  })
  t.after(() => again[Symbol.asyncDispose]())
  const { held: state, files } = await fetching
  assert.equal(state.state, 'held')
  assert.equal(await sha256Of(files[0]?.path ?? ''), await sha256Of(build))
})

test('kill -9 of an agent in the middle of a fetch: the next start ends it right, and a finished one is seeded without the server', async (t) => {
  const { directory, server, build } = await startedServer(t)
  await deployctlOk(server, ['publish', build, 'web:1'])
  const slow = 'limits: { download: 6MiB }\n'
  const agent = await startFleetAgent(join(directory, 'a1'), server, {
    host: 'a1',
    place: 'a',
    extra: follow + slow,
  })
  await untilBytes(agent, 'web:latest', 1024 * 1024)
  agent.process.kill('SIGKILL')
  await agent.exited
  const again = await startFleetAgent(join(directory, 'a1'), server, {
    host: 'a1',
    place: 'a',
    extra: follow,
  })
  t.after(() => again[Symbol.asyncDispose]())
  const { path } = await held(again, 'web:latest')
  assert.equal(await sha256Of(join(path, 'build.tar')), await sha256Of(build))
})

test('a host that was revoked gets nothing more', async (t) => {
  const { directory, server, build } = await startedServer(t)
  await deployctlOk(server, ['publish', build, 'web:1'])
  const agent = await startedAgent(t, directory, server, 'a1')
  await deployctlOk(server, ['hosts', 'revoke', 'a1'])
  await assert.rejects(fetchOn(agent, 'web:1'))
})

async function startedServer(t: TestContext, settings = '') {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-main-job-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const server = await startFleetServer(directory, { settings: `min_announce_interval: 1s\n${settings}` })
  t.after(() => server[Symbol.asyncDispose]())
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, sizeBytes)
  return { directory, server, build }
}

/** An agent in the rack that its name begins with. */
async function startedAgent(
  t: TestContext,
  directory: string,
  server: FleetServer,
  host: string,
  extra = '',
): Promise<FleetAgent> {
  const agent = await startFleetAgent(join(directory, host), server, { host, place: host.slice(0, 1), extra })
  t.after(() => agent[Symbol.asyncDispose]())
  return agent
}

async function held(agent: FleetAgent, reference: string): Promise<HeldReference & { path: string }> {
  return pollReference(
    agent,
    reference,
    `${reference} is held`,
    ({ state, path }) => state === 'held' && path !== undefined,
  )
}

async function untilBytes(agent: FleetAgent, reference: string, bytes: number): Promise<void> {
  await pollReference(
    agent,
    reference,
    `${bytes} bytes of ${reference}`,
    ({ bytesDone }) => bytesDone >= bytes,
  )
}

async function pollReference(
  agent: FleetAgent,
  reference: string,
  what: string,
  wanted: (held: HeldReference & { path?: string | undefined }) => boolean,
): Promise<HeldReference & { path: string }> {
  await using client = createAgentClient({ socketPath: agent.socketPath })
  return await until(
    what,
    async () => {
      const found = (await client.status()).references.find((candidate) => candidate.reference === reference)
      return found && wanted(found) ? { ...found, path: found.path ?? '' } : undefined
    },
    { withinMs: 60_000 },
  )
}

async function sha256Of(file: string): Promise<string> {
  return createHash('sha256')
    .update(await readFile(file))
    .digest('hex')
}
