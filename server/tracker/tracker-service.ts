import { Worker } from 'node:worker_threads'
import type { Logger, LogLevel } from '../../lib/runtime/log.ts'
import type { CounterMemory } from './counters.ts'
import { createCounterMemory, openCounters } from './counters.ts'
import type { OpenStore } from './create-store.ts'
import { createStore, storeDeps } from './create-store.ts'
import { createMemoryPeerStore } from './memory/memory-peer-store.ts'
import type { Snapshots } from './memory/snapshots.ts'
import { startSnapshots } from './memory/snapshots.ts'
import type { TlsMaterial } from './http-tls.ts'
import type { RedisSettings } from '../redis/connection.ts'
import type { PeerStore } from './peer-store.ts'
import { samplePeersMax } from './peer-store.ts'
import type { Resilience } from './redis/open-store.ts'
import { openRedisStore } from './redis/open-store.ts'
import type { TopologyConfig } from './topology.ts'
import { createTopology, levelCount } from './topology.ts'
import type { PreparedSettings, TrackerSettings, TrackerThread, TrackerThreadDeps } from './tracker-thread.ts'
import { startTrackerThread } from './tracker-thread.ts'
import type { WorkerAnswer, WorkerOrder, WorkerSetup } from './tracker-worker.ts'

export type StorageSettings =
  | {
      readonly name: 'memory'
      readonly peersMax: number
      readonly swarmsMax: number
      /** Where the swarms are kept for the next start; undefined for nowhere. */
      readonly snapshot: { readonly file: string; readonly intervalMs: number } | undefined
    }
  /** Shared by several servers. */
  | {
      readonly name: 'redis'
      readonly redis: RedisSettings
      /** Of what this server remembers for the time when Redis does not answer. */
      readonly peersMax: number
      readonly swarmsMax: number
      readonly resilience: Resilience
      /** Where servers tell each other of peers that stop. */
      readonly stops: string | undefined
    }
  | { readonly name: 'module'; readonly path: string; readonly config: Readonly<Record<string, unknown>> }
  /** For one thread alone. */
  | { readonly name: 'given'; readonly open: OpenStore }

export interface TrackerServiceDeps extends Omit<TrackerThreadDeps, 'store' | 'counters' | 'reusePort'> {
  /** With hooks or a store that the program has made itself: one alone. */
  readonly threads: number
  /** Another process may listen on the same ports. */
  readonly reusePort: boolean
  readonly storage: StorageSettings
}

/** The tracker of a server: a store, and one or more threads that answer. */
export interface TrackerService extends AsyncDisposable {
  readonly first: TrackerThread
  readonly store: PeerStore
  readonly snapshots: Snapshots | undefined
  readonly counters: CounterMemory
  /** Makes what other settings need, in all threads. Rejects, with nothing changed, where one of them cannot use them. */
  prepare(settings: TrackerSettings): Promise<PreparedSettings>
  /** Shows another certificate to new connections. Rejects, with nothing changed, when it cannot be used. */
  setTls(material: TlsMaterial): Promise<void>
  /** From now on each reply over HTTP is the last on its connection, so that clients go elsewhere before this one ends. */
  leave(): Promise<void>
  /** Places hosts otherwise from their next announce on; `PreparedSettings` do it together with all else. */
  setTopology(topology: TopologyConfig): Promise<void>
}

/** A thread that failed is started again after this long. */
const restartMs = 1000
/** Lists of millions of entries take seconds to read. */
const startTimeoutMs = 120_000
const orderTimeoutMs = 120_000
/** Somewhat longer than its listeners wait for what is under way. */
const closeTimeoutMs = 15_000

export async function startTrackerService(
  settings: TrackerSettings,
  deps: TrackerServiceDeps,
): Promise<TrackerService> {
  await using started = new AsyncDisposableStack()
  const { threads, storage, log } = deps
  const counters = createCounterMemory(threads)
  const memory =
    storage.name === 'memory' || storage.name === 'redis'
      ? started.use(
          createMemoryPeerStore({
            peersMax: storage.peersMax,
            swarmsMax: storage.swarmsMax,
            levels: levelCount(settings.topology),
            sampleMax: samplePeersMax,
            random: deps.random,
            now: deps.monotonic,
          }),
        )
      : undefined
  const module = storage.name === 'module' ? { name: storage.path, config: storage.config } : undefined
  const redis =
    storage.name === 'redis'
      ? {
          redis: storage.redis,
          resilience: storage.resilience,
          refused: new Uint32Array(new SharedArrayBuffer(4)),
          stops: storage.stops,
        }
      : undefined
  const openStore = async () => {
    if (memory) return redis ? openRedisStore(redis, memory, { sampleMax: samplePeersMax, ...deps }) : memory
    if (storage.name === 'given') return storage.open(storeDeps(settings, deps))
    return createStore(module ?? noModule, settings, deps)
  }
  const store = started.use(await openStore())
  let hasStarted = false
  const snapshots =
    memory && storage.name === 'memory' && storage.snapshot
      ? started.use(
          await startSnapshots({
            store: memory,
            ...storage.snapshot,
            topology: createTopology(settings.topology),
            saveAtEnd: () => hasStarted,
            now: deps.now,
            log,
          }),
        )
      : undefined
  const answering: AsyncDisposable[] = []
  // Together, since each waits for the requests that it has under way; and all, before the last snapshot.
  started.defer(async () => {
    const ended = await Promise.allSettled(answering.map(async (thread) => thread[Symbol.asyncDispose]()))
    for (const outcome of ended) if (outcome.status === 'rejected') throw outcome.reason
  })
  const first = await startTrackerThread(settings, {
    ...deps,
    store,
    counters: openCounters(counters, 0),
    reusePort: threads > 1 || deps.reusePort,
  })
  answering.push(first)
  // The others listen where the first one does, whatever port it was given.
  const others: WorkerThread[] = []
  let current = bound(settings, settings, first)
  for (let thread = 1; thread < threads; thread++) {
    const setup = () => ({
      settings: current,
      shared: memory?.shared,
      redis,
      storage: module ?? noModule,
      counters,
      thread,
      logLevel: log.level as LogLevel,
    })
    const other = await startWorkerThread(setup, log)
    answering.push(other)
    others.push(other)
  }
  hasStarted = true
  const owned = started.move()
  return {
    first,
    store,
    snapshots,
    counters,
    prepare: async (next) => {
      const fresh = bound(settings, next, first)
      await using made = new AsyncDisposableStack()
      const own = made.use(await first.prepare(next))
      made.defer(async () => {
        await Promise.all(others.map(async (other) => other.order({ kind: 'discard' })))
      })
      await Promise.all(others.map(async (other) => other.order({ kind: 'prepare', settings: fresh })))
      const unused = made.move()
      return {
        commit: async () => {
          unused.move()
          current = fresh
          const logLevel = log.level as LogLevel
          await Promise.all([
            own.commit(),
            ...others.map(async (other) => other.orderOrReplace({ kind: 'commit', logLevel })),
          ])
        },
        [Symbol.asyncDispose]: () => unused.disposeAsync(),
      }
    },
    leave: async () => {
      first.leave()
      await Promise.all(others.map(async (other) => other.orderOrReplace({ kind: 'leave' })))
    },
    setTls: async (material) => {
      first.setTls(material)
      current = { ...current, http: { ...current.http, tls: material } }
      await Promise.all(others.map(async (other) => other.orderOrReplace({ kind: 'setTls', material })))
    },
    setTopology: async (topology) => {
      first.setTopology(topology)
      current = { ...current, topology }
      await Promise.all(others.map(async (other) => other.orderOrReplace({ kind: 'setTopology', topology })))
    },
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

const noModule = { name: '', config: {} }

/** What a thread that starts later must be told: what may change as `next` says, the rest as the first thread has it. */
function bound(start: TrackerSettings, next: TrackerSettings, { addresses }: TrackerThread): TrackerSettings {
  return {
    ...next,
    posthooks: start.posthooks,
    http: {
      ...next.http,
      proxyProtocol: start.http.proxyProtocol,
      listeners: addresses.http.map((address, i) => ({
        ...address,
        tls: start.http.listeners[i]?.tls ?? false,
      })),
    },
    udp: { ...start.udp, addresses: addresses.udp },
  }
}

type OrderContent = WorkerOrder extends infer Order
  ? Order extends unknown
    ? Omit<Order, 'id'>
    : never
  : never

interface WorkerThread extends AsyncDisposable {
  /** Rejects with the words of the thread. One that is being started again needs no orders: it starts with what is in force. */
  order(content: OrderContent): Promise<void>
  /** The same; a thread that fails is replaced by one that starts with what is in force. */
  orderOrReplace(content: OrderContent): Promise<void>
}

/** @throws Error with the words of the thread that cannot start */
async function startWorkerThread(setup: () => WorkerSetup, log: Logger): Promise<WorkerThread> {
  let ending = false
  /** The one that has started, and the one that was made last. */
  let worker: Worker | undefined
  let latest: Worker | undefined
  let timer: NodeJS.Timeout | undefined
  let orders = 0

  const start = async (): Promise<void> => {
    const told = setup()
    const fresh = new Worker(new URL('./tracker-worker.ts', import.meta.url), { workerData: told })
    latest = fresh
    fresh.on('error', (error) => {
      log.error({ err: error, thread: setup().thread }, 'tracker thread failed')
    })
    fresh.once('exit', () => {
      if (worker === fresh) worker = undefined
      if (!ending) timer = setTimeout(startAgain, restartMs)
    })
    await answerOf(fresh, 0, startTimeoutMs).catch(async (error: unknown) => {
      await fresh.terminate()
      throw error
    })
    // What has changed meanwhile it was not told of.
    if (setup().settings === told.settings) worker = fresh
    else await fresh.terminate()
  }
  const startAgain = () => {
    start().then(
      () => {
        log.info({ thread: setup().thread }, 'tracker thread was started again')
      },
      (error: unknown) => {
        log.error({ err: error, thread: setup().thread }, 'tracker thread cannot be started again')
      },
    )
  }
  const order = async (content: OrderContent, timeoutMs = orderTimeoutMs): Promise<void> => {
    if (!worker) return
    const id = ++orders
    const answer = answerOf(worker, id, timeoutMs)
    worker.postMessage({ id, ...content } satisfies WorkerOrder)
    await answer
  }

  try {
    await start()
  } catch (error) {
    ending = true
    clearTimeout(timer)
    throw error
  }
  return {
    order,
    orderOrReplace: async (content) =>
      order(content).catch(async (error: unknown) => {
        log.error({ err: error, thread: setup().thread }, 'tracker thread is replaced')
        await worker?.terminate()
      }),
    [Symbol.asyncDispose]: async () => {
      ending = true
      clearTimeout(timer)
      await order({ kind: 'close' }, closeTimeoutMs).catch((error: unknown) => {
        log.warn({ err: error }, 'tracker thread did not end in order')
      })
      await latest?.terminate()
    },
  }
}

/** Rejects with the words of a thread that failed, or when it ends or takes too long. */
function answerOf(worker: Worker, id: number, timeoutMs: number): Promise<void> {
  return new Promise((resolve, reject) => {
    const settle = (answer: WorkerAnswer) => {
      if (answer.id !== id) return
      off()
      if (answer.fault === undefined) resolve()
      else reject(new Error(answer.fault))
    }
    const failed = (error: unknown) => {
      off()
      reject(error instanceof Error ? error : new Error(String(error)))
    }
    const exited = () => {
      failed(new Error('the thread ended'))
    }
    const timer = setTimeout(() => {
      failed(new Error(`the thread did not answer within ${timeoutMs / 1000} s`))
    }, timeoutMs)
    const off = () => {
      clearTimeout(timer)
      worker.off('message', settle).off('error', failed).off('exit', exited)
    }
    worker.on('message', settle).on('error', failed).on('exit', exited)
  })
}
