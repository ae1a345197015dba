import { randomBytes } from 'node:crypto'
import { delay } from '../../lib/runtime/backoff.ts'
import type { RedisConnection } from './connection.ts'
import { RedisUnavailable } from './connection.ts'

/** Random. */
export function newEpoch(): string {
  return randomBytes(8).toString('hex')
}

/** The epoch of swarms that are in Redis: the same for all servers, and another once Redis has lost them. */
export interface SharedEpoch extends AsyncDisposable {
  /** As it was a moment ago; the server's own until Redis has said it for the first time. */
  readonly current: string
}

const lookMs = 2000
/** Renewed with each look; after so long without any server nobody remembers it. */
const lifetimeSeconds = 86_400

export async function startSharedEpoch(redis: RedisConnection): Promise<SharedEpoch> {
  const key = `${redis.keyPrefix}epoch`
  const ended = new AbortController()
  let current = newEpoch()
  const look = async () => {
    try {
      // Not one that was there before: whoever knows that one must see that the swarms are gone.
      await redis.call('SET', key, newEpoch(), 'NX')
      const found = await redis.call('GET', key)
      await redis.call('EXPIRE', key, lifetimeSeconds)
      if (Buffer.isBuffer(found)) current = found.toString()
    } catch (error) {
      if (!(error instanceof RedisUnavailable)) throw error
    }
  }
  await look()
  const stopListening = redis.onChange((isUp) => {
    if (isUp) void look().catch(() => undefined)
  })
  const looking = (async () => {
    for (;;) {
      await delay(lookMs, ended.signal).catch(() => undefined)
      if (ended.signal.aborted) return
      await look().catch(() => undefined)
    }
  })()
  return {
    get current() {
      return current
    },
    [Symbol.asyncDispose]: async () => {
      stopListening()
      ended.abort()
      await looking
    },
  }
}
