import { chmod, open } from 'node:fs/promises'
import { dirname } from 'node:path'
import { Worker } from 'node:worker_threads'
import { makeDirectory } from '../../lib/runtime/files.ts'
import type { Answer, Call, Row } from './sqlite-worker.ts'

/** A database in a thread of its own. */
export interface SqliteThread extends AsyncDisposable {
  /** @throws Error naming the file when it cannot be used, or too many calls wait */
  readonly ask: (call: Call) => Promise<Answer>
}

/** Calls that wait for the database thread; beyond it a caller is told, memory does not grow. */
const callsMax = 10_000

/**
 * Opens a state in one SQLite file (0600).
 *
 * @throws Error naming the file when it is not a database or cannot be opened
 */
export async function openSqliteThread(file: string): Promise<SqliteThread> {
  await makeDirectory(dirname(file), 0o700)
  await using handle = await open(file, 'a', 0o600)
  await chmod(file, 0o600)
  await handle.close()
  const worker = new Worker(new URL('./sqlite-worker.ts', import.meta.url), { workerData: { file } })
  const waiting = new Map<number, { resolve: (answer: Answer) => void; reject: (error: Error) => void }>()
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
  return {
    ask,
    [Symbol.asyncDispose]: async () => {
      if (!broken) await ask({ op: 'close' })
      await worker.terminate()
    },
  }
}

export function rowsOf(answer: Answer): Row[] {
  return 'rows' in answer ? answer.rows : []
}
