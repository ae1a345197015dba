import type { Logger } from '../../../lib/runtime/log.ts'
import type { RedisConnection, RedisSettings } from '../../redis/connection.ts'
import { openRedis } from '../../redis/connection.ts'
import { startSharedEpoch } from '../../redis/shared-epoch.ts'
import type { MemoryPeerStore } from '../memory/memory-peer-store.ts'
import type { PeerStore } from '../peer-store.ts'
import { openRedisPeerStore } from './redis-peer-store.ts'
import type { ResilientPeerStoreOptions } from './resilient-peer-store.ts'
import { createResilientPeerStore } from './resilient-peer-store.ts'
import { openStopFiles } from './stop-files.ts'
import { hearStops } from './stops.ts'

/** What becomes of announces while Redis does not answer. */
export type Resilience = Pick<
  ResilientPeerStoreOptions,
  'staleMs' | 'degradedMaxMs' | 'toldPerSecond' | 'untoldMax'
>

/** What every thread of a server needs to open its store of the swarms in Redis; goes through `workerData`. */
export interface RedisStorage {
  readonly redis: RedisSettings
  readonly resilience: Resilience
  /** One word of shared memory: announces refused, of all threads. */
  readonly refused: Uint32Array
  /** A directory where servers tell each other of peers that stop while Redis cannot; undefined where they share none. */
  readonly stops: string | undefined
}

/**
 * The store of one thread, over a connection of its own that ends with it.
 *
 * @param local what all threads of this server have been told themselves, for the time when Redis does not answer
 */
export async function openRedisStore(
  { redis, resilience, refused, stops }: RedisStorage,
  local: MemoryPeerStore,
  deps: {
    /** Peers in a reply at most. */
    readonly sampleMax: number
    /** One thread of a process keeps house. Default: true. */
    readonly housekeeping?: boolean
    /** Milliseconds of a clock that never goes back. */
    readonly monotonic: () => number
    /** 0 ≤ random() < 1. */
    readonly random: () => number
    readonly log: Logger
  },
): Promise<PeerStore> {
  const { sampleMax, housekeeping = true, monotonic, random, log } = deps
  const connection = openRedis(redis, { random, log })
  // Else the first announces of a start would find a connection that is not there yet.
  await firstAnswer(connection, redis.connectTimeoutMs)
  const epoch = await startSharedEpoch(connection)
  const ending = new AbortController()
  // All threads have the same memory, so one of them is enough.
  if (housekeeping)
    void hearStops(
      connection,
      (peer) => {
        local.forget(peer)
      },
      ending.signal,
    )
  const files =
    stops === undefined
      ? undefined
      : await openStopFiles({
          directory: stops,
          heard: ({ peer, isTold, ageMs }) => {
            local.forget(peer)
            if (!isTold) store.stoppedElsewhere(peer, ageMs)
          },
          monotonic,
          log,
        })
  const store = createResilientPeerStore({
    ...resilience,
    shared: openRedisPeerStore(connection, {
      sampleMax,
      random,
      housekeeping,
      refused,
      deadline: { ms: redis.commandTimeoutMs, monotonic },
    }),
    local,
    stopped: (peer, isTold) => files?.tell(peer, isTold),
    isPartitioned: connection.isCluster,
    deadlineMs: redis.commandTimeoutMs,
    now: monotonic,
    random,
    log,
  })
  return {
    ...store,
    get epoch() {
      return epoch.current
    },
    [Symbol.asyncDispose]: async () => {
      ending.abort()
      await store[Symbol.asyncDispose]()
      await files?.[Symbol.asyncDispose]()
      await epoch[Symbol.asyncDispose]()
      await connection[Symbol.asyncDispose]()
    },
  }
}

/** Waits until Redis answers, but not longer than `waitMs`. */
async function firstAnswer(connection: RedisConnection, waitMs: number): Promise<void> {
  const up = Promise.withResolvers<undefined>()
  const done = () => {
    up.resolve(undefined)
  }
  const stop = connection.onChange((isUp) => {
    if (isUp) done()
  })
  const timer = setTimeout(done, waitMs)
  if (!connection.stats().isUp) await up.promise
  clearTimeout(timer)
  stop()
}
