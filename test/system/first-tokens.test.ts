import assert from 'node:assert/strict'
import { mkdtemp, readdir, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { deployctlOk, startFleetServer } from '../support/fleet.ts'

const firstTokens = ['admin-token', 'bootstrap-token']

test('the first tokens are written once: whoever puts them away finds no others at the next start', async (t) => {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-first-tokens-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const data = join(directory, 'server')
  /** Starts the server, uses what first tokens there are, and ends it. @returns their names */
  const tokensOfStart = async () => {
    await using server = await startFleetServer(directory)
    const names = (await readdir(data)).filter((name) => firstTokens.includes(name)).sort()
    for (const name of names) assert.equal((await stat(join(data, name))).mode & 0o777, 0o600, name)
    if (names.includes('admin-token')) await deployctlOk(server, ['hosts'])
    return names
  }
  const remove = (...names: string[]) => Promise.all(names.map((name) => rm(join(data, name))))
  assert.deepEqual(await tokensOfStart(), firstTokens)
  await remove(...firstTokens)
  assert.deepEqual(await tokensOfStart(), [])
  await remove('first-tokens-written')
  assert.deepEqual(await tokensOfStart(), firstTokens)
})
