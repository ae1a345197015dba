// The thread that owns the state database. In: {id, call}. Out: {id, result} or {id, error}.
import { DatabaseSync } from 'node:sqlite'
import { parentPort, workerData } from 'node:worker_threads'

export type Call =
  | { readonly op: 'get'; readonly key: string }
  | {
      readonly op: 'put'
      readonly key: string
      readonly value: string
      readonly ifVersion: number | undefined
    }
  | { readonly op: 'delete'; readonly key: string; readonly ifVersion: number | undefined }
  | { readonly op: 'list'; readonly prefix: string; readonly after: string; readonly limit: number }
  | { readonly op: 'position' }
  /** From now on it is no copy. */
  | { readonly op: 'detach' }
  | {
      readonly op: 'copy'
      readonly puts: readonly Row[]
      readonly deletes: readonly string[]
      readonly position: Position
    }
  | { readonly op: 'close' }

export interface Row {
  readonly key: string
  readonly value: string
  readonly version: number
}

/** Up to which change this is a copy of a state that is elsewhere. */
export interface Position {
  readonly generation: string
  readonly number: number
  /** Of that change; empty for number 0. */
  readonly nonce: string
}

export type Answer =
  | { readonly rows: Row[] }
  | { readonly position: Position | undefined }
  | { readonly version: number }
  | { readonly deleted: boolean }
  | { readonly conflict: true }

const { file } = workerData as { file: string }
const database = new DatabaseSync(file)
// WAL with FULL: a write that has returned is synced, so it survives power loss too.
database.exec('PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 5000')
database.exec(
  'CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL, version INTEGER NOT NULL) STRICT, WITHOUT ROWID',
)
database.exec(
  'CREATE TABLE IF NOT EXISTS position (id INTEGER PRIMARY KEY CHECK (id = 1), generation TEXT NOT NULL, number INTEGER NOT NULL, nonce TEXT NOT NULL) STRICT',
)
const select = database.prepare('SELECT key, value, version FROM state WHERE key = ?')
const upsert = database.prepare(
  'INSERT INTO state (key, value, version) VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value, version = excluded.version',
)
const remove = database.prepare('DELETE FROM state WHERE key = ?')
const range = database.prepare(
  'SELECT key, value, version FROM state WHERE key > ? AND key >= ? AND key < ? ORDER BY key LIMIT ?',
)
const selectPosition = database.prepare('SELECT generation, number, nonce FROM position')
const replacePosition = database.prepare(
  'INSERT OR REPLACE INTO position (id, generation, number, nonce) VALUES (1, ?, ?, ?)',
)

parentPort?.on('message', ({ id, call }: { id: number; call: Call }) => {
  try {
    parentPort?.postMessage({ id, answer: answer(call) })
  } catch (error) {
    parentPort?.postMessage({ id, error: error instanceof Error ? error.message : String(error) })
  }
})
parentPort?.postMessage({ id: -1, answer: { rows: [] } })

function answer(call: Call): Answer {
  switch (call.op) {
    case 'get':
      return { rows: rowsOf(select.all(call.key)) }
    case 'list':
      // U+FFFF sorts after every character that a key may hold.
      return { rows: rowsOf(range.all(call.after, call.prefix, `${call.prefix}\uffff`, call.limit)) }
    case 'put': {
      // One thread, one connection: nothing comes between the read and the write.
      const version = versionOf(call.key)
      if (call.ifVersion !== undefined && call.ifVersion !== version) return { conflict: true }
      upsert.run(call.key, call.value, version + 1)
      return { version: version + 1 }
    }
    case 'delete': {
      const version = versionOf(call.key)
      if (call.ifVersion !== undefined && call.ifVersion !== version) return { conflict: true }
      return { deleted: remove.run(call.key).changes > 0 }
    }
    case 'position': {
      const row = selectPosition.get()
      return {
        position: row && {
          generation: String(row['generation']),
          number: Number(row['number']),
          nonce: String(row['nonce']),
        },
      }
    }
    case 'detach':
      database.exec('DELETE FROM position')
      return { rows: [] }
    case 'copy': {
      database.exec('BEGIN IMMEDIATE')
      try {
        for (const { key, value, version } of call.puts) upsert.run(key, value, version)
        for (const key of call.deletes) remove.run(key)
        const { generation, number, nonce } = call.position
        replacePosition.run(generation, number, nonce)
        database.exec('COMMIT')
      } catch (error) {
        database.exec('ROLLBACK')
        throw error
      }
      return { rows: [] }
    }
    case 'close':
      database.close()
      return { rows: [] }
  }
}

function versionOf(key: string): number {
  return rowsOf(select.all(key))[0]?.version ?? 0
}

function rowsOf(rows: Record<string, unknown>[]): Row[] {
  return rows.map(({ key, value, version }) => ({
    key: String(key),
    value: String(value),
    version: Number(version),
  }))
}
