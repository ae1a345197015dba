import { randomBytes } from 'node:crypto'
import { monotonicMs } from '../../lib/runtime/clock.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { RedisArgument, RedisConnection } from '../redis/connection.ts'
import { RedisRefused, RedisUnavailable } from '../redis/connection.ts'
import type { Position, RawChange, Row, StateCopy } from './state-copy.ts'
import { copyOf, takenOverKey, isOfOwnFile } from './state-copy.ts'
import type { StateKeys, StateScript } from './state-scripts.ts'
import { stateScripts } from './state-scripts.ts'
import type { StateChange } from './state-store.ts'

/** How often and how a state in Redis was not what this server had seen. */
export interface StateLosses {
  /** Redis had nothing, or another state. */
  readonly lost: number
  /** Redis had lost its last changes: a replica that had not got them was promoted, or a file was older. */
  readonly rewound: number
  /** Entries that this server put back. */
  readonly restored: number
}

/**
 * Keeps a copy of the state that is in Redis, tells of each change once and in order, and puts back what Redis has lost. Writes are
 * refused by a state of another generation, so nothing comes between the loss and that.
 */
export interface StateFollower {
  /** Of the state that this server reads and writes; undefined until it has found one. */
  readonly generation: string | undefined
  /** Whether what Redis has is the state that this server knows; not before it was reached, and not while a lost state is put back. */
  readonly hasReached: boolean
  readonly losses: StateLosses
  /** Resolves once everything is known and copied that was written before the call. @throws RedisUnavailable */
  catchUp(): Promise<void>
}

const pageSize = 1000
/** How long one that puts the state back, and knows more of it, may stand still until another does it with what it has. */
const refillPatienceMs = 30_000
/** State that changes faster than it can be read is not what this is for. */
const triesMax = 5

export function createStateFollower({
  redis,
  keys,
  copy,
  tell,
  patienceMs = refillPatienceMs,
  log,
}: {
  redis: RedisConnection
  keys: StateKeys
  copy: StateCopy
  tell: (change: StateChange) => void
  patienceMs?: number | undefined
  log: Logger
}): StateFollower {
  let current = copy.position?.generation
  let hasReached = false
  const losses = { lost: 0, rewound: 0, restored: 0 }
  const run = async (name: StateScript, ...args: RedisArgument[]) =>
    redis.run(stateScripts[name], keys.all, args)

  /** What was changed after a position, as far as one reply goes; or why that cannot be said. */
  const changesAfter = async ({ generation: of, number, nonce }: Position) => {
    const answer = await run('changes', of, number, nonce, pageSize)
    return Buffer.isBuffer(answer)
      ? (answer.toString() as 'trimmed' | 'rewound')
      : (answer as [Buffer, Buffer[]][]).map((entry) => readLogEntry(of, entry))
  }

  /** All there is, as it was at the position that is returned with it. */
  const readAll = async (of: string): Promise<{ rows: Map<string, Row>; position: Position }> => {
    for (let tries = 0; tries < triesMax; tries++) {
      const [number, nonce] = (await run('position', of)) as [Buffer, Buffer]
      let position: Position = { generation: of, number: Number(number), nonce: nonce.toString() }
      const rows = new Map<string, Row>()
      for (let from = '-'; ;) {
        const page = readRows(await run('list', of, from, '+', pageSize))
        for (const row of page) rows.set(row.key, row)
        const last = page.at(-1)
        if (!last || page.length < pageSize) break
        from = `(${last.key}`
      }
      // What was changed meanwhile stands in the pages or does not; after it was done again in order, it does.
      for (;;) {
        const changes = await changesAfter(position)
        if (typeof changes === 'string') break
        const last = changes.at(-1)
        if (!last) return { rows, position }
        for (const { change } of changes)
          if (change.version === undefined) rows.delete(change.key)
          else rows.set(change.key, change)
        position = last.position
      }
    }
    throw new RedisUnavailable('Redis cannot be asked for the state: it changes faster than it can be read')
  }

  /** Makes the copy what Redis has, and tells of the difference. */
  const adopt = async (of: string) => {
    const { rows, position } = await readAll(of)
    const changes: RawChange[] = []
    const copied = new Set<string>()
    for await (const { key, value, version } of everything(copy)) {
      copied.add(key)
      const row = rows.get(key)
      if (!row) changes.push({ key, version: undefined })
      else if (copyOf(row).version !== version || row.value !== value) changes.push(row)
    }
    for (const [key, row] of rows) if (!copied.has(key)) changes.push(row)
    await copy.apply(changes, position)
    current = of
    for (const change of changes) tell(toldOf(change))
  }

  /** Puts what the copy has into Redis where that has nothing or what is older. @returns how many entries */
  const restore = async (into: string, { generation, number }: Position): Promise<number> => {
    const nonce = newNonce()
    let restored = 0
    let page: string[] = []
    const flush = async () => {
      if (page.length > 0)
        restored += Number(
          await redis.run(
            stateScripts.restore,
            [...keys.all, keys.refill],
            [into, generation, number, nonce, keys.channel, ...page],
          ),
        )
      page = []
    }
    if (isOfOwnFile(generation)) {
      // The first thing that is there, so that of two files one is taken over.
      const own = await copy.get(takenOverKey)
      if (own) page.push(own.key, `${own.version} ${own.value}`)
      await flush()
      await refuseOtherFile(own?.value)
    }
    for await (const { key, value, version } of everything(copy)) {
      page.push(key, `${version} ${value}`)
      if (page.length >= 2 * pageSize) await flush()
    }
    await flush()
    losses.restored += restored
    return restored
  }

  const refuseOtherFile = async (own: string | undefined) => {
    const found = await redis.call('HGET', keys.all[1], takenOverKey)
    const value = Buffer.isBuffer(found) ? readRow(takenOverKey, found).value : undefined
    if (value === own) return
    throw new Error(
      `Cannot take over the state of this server, which has become state-copy.sqlite: the state in Redis is that of another one, ${value ?? 'which is gone'}. ` +
        'Move state-copy.sqlite away to use what is in Redis, or set another redis.key_prefix',
    )
  }

  /** @returns the generation that counts from now on */
  const begin = async (lost: Position | undefined) => {
    const answer = await redis.run(
      stateScripts.begin,
      [keys.all[0], keys.restored, keys.refill],
      [randomBytes(8).toString('hex'), lost?.generation ?? '', lost?.number ?? 0],
    )
    return (answer as Buffer).toString()
  }

  let waitsFor: { progress: string; sinceMs: number } | undefined
  /** Asks to be the one that puts the state back. @throws RedisUnavailable while one does that knows more of it */
  const claim = async (lost: Position | undefined) => {
    const insists = waitsFor !== undefined && monotonicMs() - waitsFor.sinceMs >= patienceMs
    const answer = await redis.run(
      stateScripts.claim,
      [...keys.all, keys.refill],
      ['', lost?.generation ?? '', lost?.number ?? 0, insists ? '1' : ''],
    )
    if (!Buffer.isBuffer(answer)) {
      if (insists)
        log.error(
          'the server that was putting the state back stands still; this one goes on with what it knows',
        )
      waitsFor = undefined
      return
    }
    const progress = answer.toString()
    if (waitsFor?.progress !== progress) waitsFor = { progress, sinceMs: monotonicMs() }
    throw new RedisUnavailable(
      'Redis cannot be asked for the state: a server that knows more of it is putting it back',
    )
  }

  /** Finds out which state Redis has; into one that this server does not know it puts what only its copy has. */
  const join = async () => {
    const answer = await redis.call('GET', keys.all[0])
    const found = Buffer.isBuffer(answer) ? answer.toString() : undefined
    const known = copy.position
    if (found === undefined) await claim(known)
    if (!known) {
      const of = found ?? (await begin(undefined))
      await adopt(of)
      log.info({ generation: of, isNew: found === undefined }, 'using the state in Redis')
      return
    }
    if (found === known.generation) return
    // A copy that ends before one that was put back has nothing new; but what was deleted in between, it still has.
    const done = found === undefined ? null : await redis.call('HGET', keys.restored, known.generation)
    let generation = found
    let restored = 0
    if (generation === undefined || !Buffer.isBuffer(done) || Number(done) < known.number) {
      restored = await restore(generation ?? '', known)
      generation = await begin(known)
    }
    await adopt(generation)
    if (isOfOwnFile(known.generation)) {
      log.info({ generation, entries: restored }, 'the state of this server is in Redis now')
      return
    }
    losses.lost++
    log.error(
      { was: known.generation, generation, restored },
      'Redis has lost its state; what the copies of the servers have is there again',
    )
  }

  const pass = async () => {
    for (let tries = 0; tries < triesMax;) {
      try {
        if (!hasReached) await join()
        const { position } = copy
        if (!position) throw new Error('Cannot follow the state: it has no position')
        const changes = await changesAfter(position)
        hasReached = true
        if (changes === 'trimmed' || changes === 'rewound') {
          tries++
          if (changes === 'rewound') {
            const restored = await restore(position.generation, position)
            losses.rewound++
            log.error(
              { restored },
              'Redis has lost the last changes of its state; those that this server knew are there again',
            )
          }
          await adopt(position.generation)
          continue
        }
        const last = changes.at(-1)
        if (!last) return
        await copy.apply(
          changes.map(({ change }) => change),
          last.position,
        )
        for (const { change } of changes) tell(toldOf(change))
        if (changes.length < pageSize) return
      } catch (error) {
        if (!isOtherGeneration(error)) throw error
        tries++
        hasReached = false
      }
    }
    throw new RedisUnavailable('Redis cannot be asked for the state: it is being put back')
  }

  let running: Promise<void> | undefined
  let next: Promise<void> | undefined
  const startPass = async () => {
    running = pass().finally(() => {
      running = undefined
    })
    return running
  }
  return {
    get generation() {
      return current
    },
    get hasReached() {
      return hasReached
    },
    losses,
    catchUp: async () => {
      if (!running) return startPass()
      // That one may have read already; all who come now share the one after it.
      next ??= running
        .catch(() => undefined)
        .then(() => {
          next = undefined
          return startPass()
        })
      return next
    },
  }
}

/** Where an act was refused because Redis has another state than the one that was read before. */
export function isOtherGeneration(error: unknown): boolean {
  return error instanceof RedisRefused && error.code === 'GENERATION'
}

/** Random for each change. */
export function newNonce(): string {
  return randomBytes(6).toString('base64url')
}

/** Key, "VERSION JSON", key, ... */
export function readRows(answer: unknown): Row[] {
  const parts = answer as Buffer[]
  return parts.flatMap((value, i) => (i % 2 === 1 ? [readRow(String(parts[i - 1]), value)] : []))
}

export function readRow(key: string, stored: Buffer): Row {
  const text = stored.toString()
  const space = text.indexOf(' ')
  return { key, version: Number(text.slice(0, space)), value: text.slice(space + 1) }
}

function readLogEntry(
  generation: string,
  [id, fields]: [Buffer, Buffer[]],
): { change: RawChange; position: Position } {
  const [, nonce = '', , key = '', , value] = fields
  const number = Number(id.toString().split('-')[0])
  return {
    change: value === undefined ? { key: String(key), version: undefined } : readRow(String(key), value),
    position: { generation, number, nonce: String(nonce) },
  }
}

function toldOf(change: RawChange): StateChange {
  if (change.version === undefined) return { kind: 'delete', key: change.key }
  const { key, value, version } = change
  return { kind: 'put', entry: { key, value: JSON.parse(value), version } }
}

async function* everything(copy: StateCopy): AsyncGenerator<Row> {
  for (let after = ''; ;) {
    const page = await copy.list('', { after, limit: pageSize })
    yield* page
    const last = page.at(-1)
    if (!last || page.length < pageSize) return
    after = last.key
  }
}
