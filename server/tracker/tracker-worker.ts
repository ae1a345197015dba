// A further tracker thread, on the ports and swarms of the first. In: WorkerOrder. Out: WorkerAnswer.
import { parentPort, workerData } from 'node:worker_threads'
import { monotonicMs } from '../../lib/runtime/clock.ts'
import type { LogLevel } from '../../lib/runtime/log.ts'
import { createLog } from '../../lib/runtime/log.ts'
import { createRandom } from '../../lib/runtime/random.ts'
import type { CounterMemory } from './counters.ts'
import { openCounters } from './counters.ts'
import { createStore } from './create-store.ts'
import type { SharedStore } from './memory/memory-peer-store.ts'
import { openMemoryPeerStore } from './memory/memory-peer-store.ts'
import type { PeerStore } from './peer-store.ts'
import { samplePeersMax } from './peer-store.ts'
import type { RedisStorage } from './redis/open-store.ts'
import { openRedisStore } from './redis/open-store.ts'
import type { TlsMaterial } from './http-tls.ts'
import type { TopologyConfig } from './topology.ts'
import type { PreparedSettings, TrackerSettings } from './tracker-thread.ts'
import { startTrackerThread } from './tracker-thread.ts'

export interface WorkerSetup {
  readonly settings: TrackerSettings
  /**
   * The swarms of the first thread, or with Redis what the server has been told of them itself; undefined where a store of somebody
   * else's is opened by each thread.
   */
  readonly shared: SharedStore | undefined
  /** Where the swarms are in Redis. */
  readonly redis: RedisStorage | undefined
  readonly storage: { readonly name: string; readonly config: Readonly<Record<string, unknown>> }
  readonly counters: CounterMemory
  readonly thread: number
  readonly logLevel: LogLevel
}

/** `prepare` makes what other settings need, `commit` puts it in force, `discard` drops it. */
export type WorkerOrder = { readonly id: number } & (
  | { readonly kind: 'prepare'; readonly settings: TrackerSettings }
  | { readonly kind: 'commit'; readonly logLevel: LogLevel }
  | { readonly kind: 'discard' }
  | { readonly kind: 'setTls'; readonly material: TlsMaterial }
  | { readonly kind: 'setTopology'; readonly topology: TopologyConfig }
  | { readonly kind: 'leave' }
  | { readonly kind: 'close' }
)
/** To the order of that id; 0 to the start. */
export interface WorkerAnswer {
  readonly id: number
  /** Undefined where it was done. */
  readonly fault: string | undefined
}

const { settings, shared, redis, storage, counters, thread, logLevel } = workerData as WorkerSetup
const log = createLog('rackswarm-server', logLevel).child({ thread })
const deps = { random: createRandom(Math.random), now: Date.now, monotonic: monotonicMs, log }

const answer = (id: number, work: Promise<void>): Promise<void> =>
  work.then(
    () => {
      parentPort?.postMessage({ id, fault: undefined } satisfies WorkerAnswer)
    },
    (error: unknown) => {
      const fault = error instanceof Error ? error.message : String(error)
      parentPort?.postMessage({ id, fault } satisfies WorkerAnswer)
    },
  )

void answer(0, start())

async function openStore(): Promise<PeerStore> {
  if (!shared) return createStore(storage, settings, deps)
  const memory = openMemoryPeerStore(shared, { ...deps, now: monotonicMs, sampleMax: samplePeersMax })
  // The first thread keeps house for all.
  return redis
    ? openRedisStore(redis, memory, { sampleMax: samplePeersMax, housekeeping: false, ...deps })
    : memory
}

async function start(): Promise<void> {
  const store = await openStore()
  const running = await startTrackerThread(settings, {
    ...deps,
    store,
    counters: openCounters(counters, thread),
    reusePort: true,
  })
  let prepared: PreparedSettings | undefined
  const obey = async (order: WorkerOrder): Promise<void> => {
    switch (order.kind) {
      case 'prepare':
        prepared = await running.prepare(order.settings)
        return
      case 'commit': {
        if (!prepared) throw new Error('nothing was prepared')
        const next = prepared
        prepared = undefined
        log.level = order.logLevel
        return next.commit()
      }
      case 'discard':
        await prepared?.[Symbol.asyncDispose]()
        prepared = undefined
        return
      case 'setTls':
        running.setTls(order.material)
        return
      case 'setTopology':
        running.setTopology(order.topology)
        return
      case 'leave':
        running.leave()
        return
      case 'close':
        await running[Symbol.asyncDispose]()
        return store[Symbol.asyncDispose]()
    }
  }
  parentPort?.on('message', (order: WorkerOrder) => {
    void answer(order.id, obey(order)).then(() => {
      if (order.kind === 'close') parentPort?.close()
    })
  })
}
