import { chmod, open } from 'node:fs/promises'
import { dirname } from 'node:path'
import { Worker } from 'node:worker_threads'
import { makeDirectory } from '../../lib/runtime/files.ts'
import type { Answer, Call, Row } from './sqlite-worker.ts'
import type { StateChange, StateEntry, StateStore } from './state-store.ts'
import { VersionConflict } from './state-store.ts'

/** Calls that wait for the database thread; beyond it a caller is told, memory does not grow. */
const callsMax = 10_000
const listLimitDefault = 1000
/** Changes a slow watcher may fall behind by. */
const watchBacklogMax = 10_000

/**
 * Opens the state in one SQLite file (0600), in a thread of its own.
 *
 * @throws Error naming the file when it is not a database or cannot be opened
 */
export async function openSqliteStateStore({ file }: { file: string }): Promise<StateStore> {
  await makeDirectory(dirname(file), 0o700)
  await using handle = await open(file, 'a', 0o600)
  await chmod(file, 0o600)
  await handle.close()
  const worker = new Worker(new URL('./sqlite-worker.ts', import.meta.url), { workerData: { file } })
  const waiting = new Map<number, { resolve: (answer: Answer) => void; reject: (error: Error) => void }>()
  const watchers = new Set<(change: StateChange) => void>()
  let nextId = 0
  let broken: Error | undefined
  const fail = (cause: Error | undefined) => {
    broken = new Error(`Cannot use the state in ${file}: ${cause?.message ?? 'its thread ended'}`, { cause })
    for (const { reject } of waiting.values()) reject(broken)
    waiting.clear()
  }
  worker.on('error', fail)
  worker.on('exit', () => {
    fail(broken)
  })
  worker.on('message', ({ id, answer, error }: { id: number; answer?: Answer; error?: string }) => {
    const caller = waiting.get(id)
    waiting.delete(id)
    if (answer) caller?.resolve(answer)
    else caller?.reject(new Error(`Cannot use the state in ${file}: ${error ?? 'no answer'}`))
  })
  const waitFor = async (id: number) =>
    new Promise<Answer>((resolve, reject) => {
      waiting.set(id, { resolve, reject })
    })
  const ask = async (call: Call): Promise<Answer> => {
    if (broken) throw broken
    if (waiting.size >= callsMax)
      throw new Error(`Cannot use the state in ${file}: ${callsMax} calls wait already`)
    const id = nextId++
    const answer = waitFor(id)
    worker.postMessage({ id, call })
    return answer
  }
  // The thread says -1 once the database is open, or ends with the reason why it is not.
  await waitFor(-1)

  const changed = (change: StateChange) => {
    for (const watcher of watchers) watcher(change)
  }
  return {
    get: async (key) => {
      const [row] = rows(await ask({ op: 'get', key }))
      return row && entryOf(row)
    },
    put: async (key, value, { ifVersion } = {}) => {
      const text = JSON.stringify(value)
      const answer = await ask({ op: 'put', key, value: text, ifVersion })
      if (!('version' in answer))
        throw new VersionConflict(`Cannot write ${key}: it is not at version ${String(ifVersion)}`)
      changed({ kind: 'put', entry: { key, value: JSON.parse(text), version: answer.version } })
      return answer.version
    },
    delete: async (key, { ifVersion } = {}) => {
      const answer = await ask({ op: 'delete', key, ifVersion })
      if (!('deleted' in answer))
        throw new VersionConflict(`Cannot delete ${key}: it is not at version ${String(ifVersion)}`)
      if (answer.deleted) changed({ kind: 'delete', key })
      return answer.deleted
    },
    list: async (prefix, { after = '', limit = listLimitDefault } = {}) =>
      rows(await ask({ op: 'list', prefix, after, limit })).map(entryOf),
    watch: (prefix, signal) => watch(watchers, prefix, signal),
    [Symbol.asyncDispose]: async () => {
      if (!broken) await ask({ op: 'close' })
      await worker.terminate()
    },
  }
}

/** Registers at the call, not at the first `next`, so that no change in between is missed. */
function watch(
  watchers: Set<(change: StateChange) => void>,
  prefix: string,
  signal: AbortSignal,
): AsyncIterable<StateChange> {
  const backlog: StateChange[] = []
  let wake: (() => void) | undefined
  let lost = false
  const watcher = (change: StateChange) => {
    if (!(change.kind === 'put' ? change.entry.key : change.key).startsWith(prefix)) return
    if (backlog.length >= watchBacklogMax) lost = true
    else backlog.push(change)
    wake?.()
  }
  watchers.add(watcher)
  signal.addEventListener('abort', () => wake?.())
  return {
    async *[Symbol.asyncIterator]() {
      try {
        while (!signal.aborted) {
          const change = backlog.shift()
          if (change) yield change
          else if (lost)
            throw new Error(`Cannot watch ${prefix}: the reader fell ${watchBacklogMax} changes behind`)
          else await new Promise<void>((resolve) => (wake = resolve))
        }
      } finally {
        watchers.delete(watcher)
      }
    },
  }
}

function rows(answer: Answer): Row[] {
  return 'rows' in answer ? answer.rows : []
}

function entryOf({ key, value, version }: Row): StateEntry {
  return { key, value: JSON.parse(value), version }
}
