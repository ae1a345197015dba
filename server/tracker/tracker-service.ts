import { Worker } from 'node:worker_threads'
import type { Logger, LogLevel } from '../../lib/runtime/log.ts'
import type { TokenVerifier } from '../../lib/token/claims.ts'
import type { CounterMemory } from './counters.ts'
import { createCounterMemory, openCounters } from './counters.ts'
import { createStore } from './create-store.ts'
import { createMemoryPeerStore } from './memory/memory-peer-store.ts'
import type { Snapshots } from './memory/snapshots.ts'
import { startSnapshots } from './memory/snapshots.ts'
import type { PeerStore } from './peer-store.ts'
import { samplePeersMax } from './peer-store.ts'
import { createTopology } from './topology.ts'
import type { TrackerSettings, TrackerThread } from './tracker-thread.ts'
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
  | { readonly name: 'module'; readonly path: string; readonly config: Readonly<Record<string, unknown>> }

export interface TrackerServiceDeps {
  readonly threads: number
  readonly storage: StorageSettings
  readonly verifier?: TokenVerifier | undefined
  readonly log: Logger
  readonly now: () => number
  readonly monotonic: () => number
  readonly random: () => number
}

/** The tracker of a server: a store, and one or more threads that answer. */
export interface TrackerService extends AsyncDisposable {
  readonly first: TrackerThread
  readonly store: PeerStore
  readonly snapshots: Snapshots | undefined
  readonly counters: CounterMemory
  /** Rejects, with the old settings in force in each thread that could not use the new ones. */
  reload(settings: TrackerSettings): Promise<void>
}

/** A thread that failed is started again after this long. */
const restartMs = 1000

export async function startTrackerService(
  settings: TrackerSettings,
  deps: TrackerServiceDeps,
): Promise<TrackerService> {
  await using started = new AsyncDisposableStack()
  const { threads, storage, log } = deps
  const counters = createCounterMemory(threads)
  const memory =
    storage.name === 'memory'
      ? started.use(
          createMemoryPeerStore({
            peersMax: storage.peersMax,
            swarmsMax: storage.swarmsMax,
            levels: Math.max(1, settings.topology.levels.length),
            sampleMax: samplePeersMax,
            random: deps.random,
            now: deps.monotonic,
          }),
        )
      : undefined
  const module = storage.name === 'module' ? { name: storage.path, config: storage.config } : undefined
  const store = memory ?? started.use(await createStore(module ?? noModule, settings, deps))
  const snapshots =
    memory && storage.name === 'memory' && storage.snapshot
      ? started.use(
          await startSnapshots({
            store: memory,
            ...storage.snapshot,
            topology: createTopology(settings.topology),
            now: deps.now,
            log,
          }),
        )
      : undefined
  const first = started.use(
    await startTrackerThread(settings, {
      ...deps,
      store,
      counters: openCounters(counters, 0),
      reusePort: threads > 1,
    }),
  )
  // The others listen where the first one does, whatever port it was given.
  const others: WorkerThread[] = []
  let current = bound(settings, first)
  for (let thread = 1; thread < threads; thread++) {
    const setup = () => ({
      settings: current,
      shared: memory?.shared,
      storage: module ?? noModule,
      counters,
      thread,
      logLevel: log.level as LogLevel,
    })
    others.push(started.use(await startWorkerThread(setup, log)))
  }
  const owned = started.move()
  return {
    first,
    store,
    snapshots,
    counters,
    reload: async (next) => {
      await first.reload(next)
      current = bound(next, first)
      for (const other of others) await other.reload(current)
    },
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

const noModule = { name: '', config: {} }

function bound(settings: TrackerSettings, { addresses }: TrackerThread): TrackerSettings {
  const { http, udp } = settings
  return {
    ...settings,
    http: {
      ...http,
      listeners: addresses.http.map((address, i) => ({ ...address, tls: http.listeners[i]?.tls ?? false })),
    },
    udp: { ...udp, addresses: addresses.udp },
  }
}

interface WorkerThread extends AsyncDisposable {
  reload(settings: TrackerSettings): Promise<void>
}

/** @throws Error with the words of the thread that cannot start */
async function startWorkerThread(setup: () => WorkerSetup, log: Logger): Promise<WorkerThread> {
  let ending = false
  let worker: Worker | undefined
  let timer: NodeJS.Timeout | undefined

  const start = async (): Promise<void> => {
    const fresh = new Worker(new URL('./tracker-worker.ts', import.meta.url), { workerData: setup() })
    worker = fresh
    fresh.on('error', (error) => {
      log.error({ err: error, thread: setup().thread }, 'tracker thread failed')
    })
    fresh.once('exit', () => {
      if (ending || worker !== fresh) return
      worker = undefined
      timer = setTimeout(() => {
        start().catch((error: unknown) => {
          log.error({ err: error, thread: setup().thread }, 'tracker thread cannot be started again')
        })
      }, restartMs)
    })
    await next(fresh)
  }

  const order = async (message: WorkerOrder): Promise<void> => {
    if (!worker) return
    worker.postMessage(message)
    await next(worker)
  }

  await start()
  return {
    reload: async (settings) => order({ kind: 'reload', settings }),
    [Symbol.asyncDispose]: async () => {
      ending = true
      clearTimeout(timer)
      await order({ kind: 'close' }).catch((error: unknown) => {
        log.warn({ err: error }, 'tracker thread did not end in order')
      })
      await worker?.terminate()
    },
  }
}

/** The thread's next answer. Rejects with its words if it failed, or ended. */
function next(worker: Worker): Promise<void> {
  return new Promise((resolve, reject) => {
    const settle = (answer: WorkerAnswer) => {
      off()
      if (answer.kind === 'failed') reject(new Error(answer.message))
      else resolve()
    }
    const failed = (error: unknown) => {
      off()
      reject(error instanceof Error ? error : new Error(String(error)))
    }
    const exited = () => {
      failed(new Error('the thread ended'))
    }
    const off = () => {
      worker.off('message', settle)
      worker.off('error', failed)
      worker.off('exit', exited)
    }
    worker.on('message', settle)
    worker.on('error', failed)
    worker.on('exit', exited)
  })
}
