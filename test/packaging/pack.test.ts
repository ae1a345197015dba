import assert from 'node:assert/strict'
import { mkdtemp, readFile, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { installTarball, packTarball, root, run } from '../support/package.ts'

test('the packed tarball installs offline in an empty directory, and its programs publish and fetch a file', async (t) => {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-pack-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const home = join(directory, 'installed')
  await installTarball(await packTarball(directory), home)
  assert.deepEqual(
    (await readdir(join(home, 'node_modules'))).filter((name) => !name.startsWith('.')),
    ['rackswarm'],
  )
  const { version } = JSON.parse(await readFile(join(root, 'package.json'), 'utf8')) as { version: string }
  const bin = (name: string) => join(home, 'node_modules', 'rackswarm', 'bin', `${name}.js`)
  const program = (name: string, ...args: string[]) =>
    run(process.execPath, [bin(name), ...args], { cwd: home, env: { ...process.env, HOME: directory } })
  for (const name of ['rackswarm-server', 'rackswarm-agent', 'deployctl'])
    assert.match((await program(name, '--version')).stdout, new RegExp(version))
  // Worker threads are separate files of the bundle: a whole publish and fetch proves that they are found.
  process.env['RACKSWARM_TEST_BIN'] = join(home, 'node_modules', 'rackswarm', 'bin')
  t.after(() => delete process.env['RACKSWARM_TEST_BIN'])
  const { deployctlOk, fetchOn, startFleetAgent, startFleetServer, writeRandomFile } =
    await import('../support/fleet.ts')
  const server = await startFleetServer(directory)
  t.after(() => server[Symbol.asyncDispose]())
  const build = join(directory, 'build.tar')
  const sha256 = await writeRandomFile(build, 5_000_000)
  await deployctlOk(server, ['publish', build, 'web:1'])
  const agent = await startFleetAgent(join(directory, 'agent'), server, { host: 'h1', place: 'a' })
  t.after(() => agent[Symbol.asyncDispose]())
  const { files } = await fetchOn(agent, 'web:1')
  assert.equal(files[0]?.digest, `sha256:${sha256}`)
})
