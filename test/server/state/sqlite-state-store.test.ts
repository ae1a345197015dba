import assert from 'node:assert/strict'
import { mkdtemp, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, test } from 'node:test'
import { openSqliteStateStore } from '../../../server/state/sqlite-state-store.ts'
import { stateStoreContract } from './state-store.contract.ts'

const directory = await mkdtemp(join(tmpdir(), 'rackswarm-state-'))
after(() => rm(directory, { recursive: true, force: true }))
let stores = 0

stateStoreContract('SQLite', async () => {
  const file = join(directory, `${++stores}.sqlite`)
  const store = await openSqliteStateStore({ file })
  return {
    store,
    reopen: async () => {
      await store[Symbol.asyncDispose]()
      return openSqliteStateStore({ file })
    },
  }
})

test('SQLite: the file is readable by its owner alone', async () => {
  const file = join(directory, 'mode.sqlite')
  await using store = await openSqliteStateStore({ file })
  await store.put('a', 1)
  assert.equal((await stat(file)).mode & 0o777, 0o600)
})

test('SQLite: a file that is no database is refused by its name', async () => {
  const file = join(directory, 'text.sqlite')
  await writeFile(file, 'not a database, though it is long enough to be read as the head of one '.repeat(100))
  await assert.rejects(openSqliteStateStore({ file }), (error: Error) => error.message.includes(file))
})
