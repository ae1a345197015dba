import type { Row } from './sqlite-worker.ts'
import { openSqliteThread, rowsOf } from './sqlite-thread.ts'
import type { StateEntry, StateStore } from './state-store.ts'
import { VersionConflict } from './state-store.ts'
import { createWatchers } from './watchers.ts'

const listLimitDefault = 1000

/**
 * Opens the state in one SQLite file (0600), in a thread of its own.
 *
 * @throws Error naming the file when it is not a database or cannot be opened
 */
export async function openSqliteStateStore({ file }: { file: string }): Promise<StateStore> {
  const thread = await openSqliteThread(file)
  const { ask } = thread
  // What was a copy of a shared state is written to from here on, and must not count as that any more.
  await ask({ op: 'detach' })
  const watchers = createWatchers()
  return {
    get: async (key) => {
      const [row] = rowsOf(await ask({ op: 'get', key }))
      return row && entryOf(row)
    },
    put: async (key, value, { ifVersion } = {}) => {
      const text = JSON.stringify(value)
      const answer = await ask({ op: 'put', key, value: text, ifVersion })
      if (!('version' in answer))
        throw new VersionConflict(`Cannot write ${key}: it is not at version ${String(ifVersion)}`)
      watchers.tell({ kind: 'put', entry: { key, value: JSON.parse(text), version: answer.version } })
      return answer.version
    },
    delete: async (key, { ifVersion } = {}) => {
      const answer = await ask({ op: 'delete', key, ifVersion })
      if (!('deleted' in answer))
        throw new VersionConflict(`Cannot delete ${key}: it is not at version ${String(ifVersion)}`)
      if (answer.deleted) watchers.tell({ kind: 'delete', key })
      return answer.deleted
    },
    list: async (prefix, { after = '', limit = listLimitDefault } = {}) =>
      rowsOf(await ask({ op: 'list', prefix, after, limit })).map(entryOf),
    watch: watchers.watch,
    [Symbol.asyncDispose]: () => thread[Symbol.asyncDispose](),
  }
}

function entryOf({ key, value, version }: Row): StateEntry {
  return { key, value: JSON.parse(value), version }
}
