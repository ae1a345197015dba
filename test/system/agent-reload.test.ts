import assert from 'node:assert/strict'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { startFleetAgent, startFleetServer } from '../support/fleet.ts'
import { until } from '../support/until.ts'

test('SIGHUP puts the limits of an agent in force, names what needs a restart, and leaves all as it was where the file is wrong', async (t) => {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-agent-reload-'))
  t.after(() => rm(directory, { recursive: true }))
  const server = await startFleetServer(directory)
  t.after(() => server[Symbol.asyncDispose]())
  const home = join(directory, 'a1')
  const agent = await startFleetAgent(home, server, { host: 'a1', place: 'r1' })
  t.after(() => agent[Symbol.asyncDispose]())
  const file = join(home, 'agent.yaml')
  const before = await readFile(file, 'utf8')
  const log = () => readFile(join(home, 'agent.log'), 'utf8')
  const reloadWith = async (settings: string, answer: RegExp) => {
    await writeFile(file, before + settings)
    process.kill(agent.pid, 'SIGHUP')
    await until(`${String(answer)} in the log`, async () => answer.test(await log()))
  }
  await reloadWith(
    'limits: { upload: 1MiB, from_distance: [{ distance: 1, download: 2MiB }] }\n',
    /"msg":"reloaded"/,
  )
  await reloadWith('peers: any\n', /"needRestart":\["peers"\],"msg":"reloaded"/)
  await reloadWith(
    'limits: { upload: fast }\n',
    /limits\.upload: need a size.*"msg":"reload failed; what was in force stays"/,
  )
  await reloadWith(
    'engine: webtorrent\nlimits: { from_distance: [{ distance: 1 }] }\n',
    /limits\.from_distance: needs engine: rackswarm.*reload failed/,
  )
  assert.equal((await fetch(`${String(agent.ready['metricsUrl'])}/livez`)).status, 200)
})
