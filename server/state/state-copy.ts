import { randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { rename } from 'node:fs/promises'
import { dirname } from 'node:path'
import { syncDirectory } from '../../lib/runtime/files.ts'
import { openSqliteThread, rowsOf } from './sqlite-thread.ts'
import type { Position, Row } from './sqlite-worker.ts'

export type { Position, Row } from './sqlite-worker.ts'

/** An entry as it is now, or a key that is gone. */
export type RawChange = Row | { readonly key: string; readonly version: undefined }

/** A copy in a file of a state that is elsewhere: what it was at one position of that one's log of changes. */
export interface StateCopy extends AsyncDisposable {
  /** Undefined for a copy of nothing yet. */
  readonly position: Position | undefined
  get(key: string): Promise<Row | undefined>
  list(prefix: string, options: { after: string; limit: number }): Promise<Row[]>
  /** Durable, and all or nothing, when it returns. */
  apply(changes: readonly RawChange[], position: Position): Promise<void>
}

/** What is written all the time and read by nobody who has only the copy. */
export const leasesPrefix = 'leases/'
/**
 * A lease changes every few seconds, and all that must never be lost of it is how far its version has come. So the copy has it at the
 * next thousand, and is written once in a thousand times.
 */
const leaseStep = 1000

/** @throws Error naming the file when it is not a database or cannot be opened */
export async function openStateCopy(file: string): Promise<StateCopy> {
  const thread = await openSqliteThread(file)
  const answer = await thread.ask({ op: 'position' })
  let position = 'position' in answer ? answer.position : undefined
  const leases = new Map<string, number>()
  const list: StateCopy['list'] = async (prefix, { after, limit }) =>
    rowsOf(await thread.ask({ op: 'list', prefix, after, limit }))
  for (const { key, version } of await list(leasesPrefix, { after: '', limit: Number.MAX_SAFE_INTEGER }))
    leases.set(key, version)
  return {
    get position() {
      return position
    },
    get: async (key) => rowsOf(await thread.ask({ op: 'get', key }))[0],
    list,
    apply: async (changes, next) => {
      const latest = new Map<string, RawChange>()
      for (const change of changes) {
        const copied = copyOf(change)
        if (!isLease(copied) || leases.get(copied.key) !== copied.version) latest.set(copied.key, copied)
      }
      if (latest.size > 0 || next.generation !== position?.generation)
        await thread.ask({
          op: 'copy',
          puts: [...latest.values()].flatMap((change) => (change.version === undefined ? [] : [change])),
          deletes: [...latest.values()].flatMap(({ key, version }) => (version === undefined ? [key] : [])),
          position: next,
        })
      for (const change of latest.values())
        if (isLease(change) && change.version !== undefined) leases.set(change.key, change.version)
      position = next
    },
    [Symbol.asyncDispose]: () => thread[Symbol.asyncDispose](),
  }
}

/** As it stands in the copy. */
export function copyOf(change: RawChange): RawChange {
  if (!isLease(change) || change.version === undefined) return change
  return { ...change, version: Math.ceil((change.version + 1) / leaseStep) * leaseStep }
}

/** Under which the state says whose it was before it was shared. */
export const takenOverKey = 'taken-over'
const ownFilePrefix = 'sqlite-'

/** Whether a copy is the state that one server had for itself, and has not been put into Redis yet. */
export function isOfOwnFile(generation: string): boolean {
  return generation.startsWith(ownFilePrefix)
}

/**
 * Makes the state that a server had for itself its copy of the one that it will share: a copy of a state that Redis does not have is what
 * Redis is filled from. Does nothing where there is none, or a copy is there already.
 *
 * @param from its name, for who comes with another one
 * @returns whether there is such a file that stays as it is, since there is a copy
 */
export async function takeOver(file: string, copy: string, { from }: { from: string }): Promise<boolean> {
  if (!existsSync(file)) return false
  if (existsSync(copy)) return true
  {
    await using thread = await openSqliteThread(file)
    const answer = await thread.ask({ op: 'position' })
    // One that was stopped on its way is what it was to become.
    if (!('position' in answer && answer.position)) {
      const id = `${ownFilePrefix}${randomBytes(8).toString('hex')}`
      await thread.ask({
        op: 'copy',
        puts: [{ key: takenOverKey, value: JSON.stringify({ from, id }), version: 1 }],
        deletes: [],
        position: { generation: id, number: 0, nonce: '' },
      })
    }
  }
  // Closed, it is one file.
  await rename(file, copy)
  await syncDirectory(dirname(copy))
  return false
}

function isLease({ key }: RawChange): boolean {
  return key.startsWith(leasesPrefix)
}
