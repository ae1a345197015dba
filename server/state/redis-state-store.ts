import { delay } from '../../lib/runtime/backoff.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { RedisArgument, RedisConnection } from '../redis/connection.ts'
import { checkRedis } from '../redis/check-redis.ts'
import { RedisUnavailable } from '../redis/connection.ts'
import type { Row } from './state-copy.ts'
import { isOfOwnFile, leasesPrefix, openStateCopy } from './state-copy.ts'
import type { StateLosses } from './state-follower.ts'
import { createStateFollower, isOtherGeneration, newNonce, readRow, readRows } from './state-follower.ts'
import type { StateScript } from './state-scripts.ts'
import { stateKeys, stateScripts } from './state-scripts.ts'
import type { StateEntry, StateStore } from './state-store.ts'
import { VersionConflict } from './state-store.ts'
import { createWatchers } from './watchers.ts'

/** A state that several servers share. */
export interface RedisStateStore extends StateStore {
  readonly losses: StateLosses
  /** Why what is read may be old and nothing can be written; undefined while all is well. */
  readonly fault: () => string | undefined
}

const listLimitDefault = 1000
/** Entries that one script reads, so that no other command waits for long. */
const pageSize = 1000
/** What was published may have been lost on its way: changes of others are seen after this at the latest. */
const pollMs = 1000
/** How long a start waits for Redis before it goes on with the copy. */
const startWaitMs = 3000
const triesMax = 3
/** How long a call waits while the state is being put back; beyond it the caller is told to come again. */
const catchUpWaitMs = 5000

/**
 * Opens the state in Redis. Each server keeps a copy of it in `file`: a write returns once it is in Redis and in the copy of the server
 * that wrote it, and a Redis that lost its memory is filled again from the copies. A server that starts while Redis is away reads from
 * its copy until it has reached Redis; without a copy it waits.
 *
 * @throws Error naming the file when it cannot be used; the signal's reason when it aborts first
 */
export async function openRedisStateStore(
  {
    redis,
    file,
    refillPatienceMs,
    signal,
  }: {
    redis: RedisConnection
    file: string
    refillPatienceMs?: number | undefined
    signal?: AbortSignal | undefined
  },
  { log }: { log: Logger },
): Promise<RedisStateStore> {
  await using started = new AsyncDisposableStack()
  const copy = started.use(await openStateCopy(file))
  const watchers = createWatchers()
  const keys = stateKeys(redis.keyPrefix)
  const follower = createStateFollower({
    redis,
    keys,
    copy,
    tell: watchers.tell,
    patienceMs: refillPatienceMs,
    log,
  })
  const ending = new AbortController()
  started.defer(() => {
    ending.abort()
  })

  const follow = () => {
    follower.catchUp().catch((error: unknown) => {
      if (!(error instanceof RedisUnavailable) && !ending.signal.aborted)
        log.error({ err: error }, 'the state in Redis cannot be followed')
    })
  }
  /** A Redis that throws away what it is given is refused; one that this server began without is only complained of. */
  let unfit: string | undefined
  const warned = new Set<string>()
  await firstContact()
  const poll = setInterval(follow, pollMs)
  poll.unref()
  started.defer(() => {
    clearInterval(poll)
  })
  started.defer(
    redis.onChange((isUp) => {
      if (!isUp) return
      follow()
      // It may be another server, or have been configured anew.
      check().catch(() => undefined)
    }),
  )
  void redis.subscribe(keys.channel, follow, ending.signal)

  async function check(): Promise<void> {
    const { faults, warnings } = await checkRedis(redis)
    for (const warning of warnings) {
      if (warned.has(warning)) continue
      warned.add(warning)
      log.warn({ redis: warning }, 'Redis may lose what it is given')
    }
    unfit = faults.length > 0 ? `Redis is not fit to keep the state: ${faults.join('; ')}` : undefined
    if (unfit !== undefined) log.error(unfit)
  }
  async function firstContact(): Promise<void> {
    // One that was not shared yet is shared before anything is written to it.
    const mayDoWithout = copy.position !== undefined && !isOfOwnFile(copy.position.generation)
    const waitMs = mayDoWithout ? startWaitMs : undefined
    if (!(await untilUp(redis, waitMs, signal))) {
      log.warn('Redis does not answer: reading the state from the copy of this server until it does')
      return
    }
    for (;;) {
      try {
        await check()
        if (unfit !== undefined) throw new Error(unfit)
        await follower.catchUp()
        return
      } catch (error) {
        if (!(error instanceof RedisUnavailable)) throw error
        if (mayDoWithout) return
        log.warn({ err: error }, 'Redis does not answer, and this server has no copy of the state: waiting')
        await untilUp(redis, undefined, signal)
        await delay(pollMs, signal ?? ending.signal)
      }
    }
  }

  const caughtUp = async () => {
    const late = Promise.withResolvers<never>()
    const timer = setTimeout(() => {
      late.reject(new RedisUnavailable('Redis cannot be asked for the state: it is being put back'))
    }, catchUpWaitMs)
    try {
      await Promise.race([follower.catchUp(), late.promise])
    } finally {
      clearTimeout(timer)
    }
  }
  /** Runs a script on the state that this server knows; where Redis has lost that, once it is there again. */
  const ask = async (script: StateScript, ...args: RedisArgument[]): Promise<unknown> => {
    for (let tries = 0; tries < triesMax; tries++) {
      const { generation } = follower
      if (generation === undefined) break
      try {
        return await redis.run(stateScripts[script], keys.all, [generation, ...args])
      } catch (error) {
        if (!isOtherGeneration(error)) throw error
        await caughtUp()
      }
    }
    throw new RedisUnavailable('Redis cannot be asked for the state: it is being put back')
  }
  /** Until Redis was reached, and while it is filled again, the copy is what there is. */
  const orCopy = async <Result>(read: () => Promise<Result>, fromCopy: () => Promise<Result>) => {
    try {
      return await read()
    } catch (error) {
      if (follower.hasReached || !(error instanceof RedisUnavailable)) throw error
      return fromCopy()
    }
  }
  const written = async (key: string) => {
    // Leases are worth nothing once their time is over.
    if (!key.startsWith(leasesPrefix)) await caughtUp()
  }

  const owned = started.move()
  return {
    losses: follower.losses,
    fault: () => (redis.stats().isUp ? unfit : 'Redis does not answer: hosts and tokens cannot be changed'),
    get: (key) =>
      orCopy(
        async () => {
          const answer = await ask('get', key)
          return Buffer.isBuffer(answer) ? entryOf(readRow(key, answer)) : undefined
        },
        async () => {
          const row = await copy.get(key)
          return row && entryOf(row)
        },
      ),
    list: (prefix, { after = '', limit = listLimitDefault } = {}) =>
      orCopy(
        async () => {
          const entries: StateEntry[] = []
          // Keys that begin with the prefix sort from it to it and a byte that UTF-8 does not have.
          let from = after >= prefix && after !== '' ? `(${after}` : `[${prefix}`
          const to = Buffer.concat([Buffer.from(`(${prefix}`), Buffer.of(0xff)])
          while (entries.length < limit) {
            const wanted = Math.min(pageSize, limit - entries.length)
            const page = readRows(await ask('list', from, to, wanted))
            for (const row of page) entries.push(entryOf(row))
            const last = page.at(-1)
            if (!last || page.length < wanted) break
            from = `(${last.key}`
          }
          return entries
        },
        async () => (await copy.list(prefix, { after, limit })).map(entryOf),
      ),
    put: async (key, value, { ifVersion } = {}) => {
      const answer = await ask('put', key, JSON.stringify(value), ifVersion ?? '', newNonce(), keys.channel)
      if (answer === null)
        throw new VersionConflict(`Cannot write ${key}: it is not at version ${String(ifVersion)}`)
      await written(key)
      return Number(answer)
    },
    delete: async (key, { ifVersion } = {}) => {
      const answer = await ask('delete', key, ifVersion ?? '', newNonce(), keys.channel)
      if (answer === null)
        throw new VersionConflict(`Cannot delete ${key}: it is not at version ${String(ifVersion)}`)
      if (answer === 0) return false
      await written(key)
      return true
    },
    watch: watchers.watch,
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

/** Whether Redis answers within a time, if one is given. @throws the signal's reason */
async function untilUp(
  redis: RedisConnection,
  withinMs: number | undefined,
  signal: AbortSignal | undefined,
): Promise<boolean> {
  if (redis.stats().isUp) return true
  const up = Promise.withResolvers<boolean>()
  const stopListening = redis.onChange((isUp) => {
    if (isUp) up.resolve(true)
  })
  const timer =
    withinMs === undefined
      ? undefined
      : setTimeout(() => {
          up.resolve(false)
        }, withinMs)
  const abort = () => {
    up.reject(signal?.reason as Error)
  }
  signal?.addEventListener('abort', abort, { once: true })
  try {
    signal?.throwIfAborted()
    return await up.promise
  } finally {
    stopListening()
    clearTimeout(timer)
    signal?.removeEventListener('abort', abort)
  }
}

function entryOf({ key, value, version }: Row): StateEntry {
  return { key, value: JSON.parse(value), version }
}
