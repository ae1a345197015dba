// A further tracker thread, on the ports and swarms of the first. In: WorkerOrder. Out: WorkerAnswer.
import { parentPort, workerData } from 'node:worker_threads'
import { monotonicMs } from '../../lib/runtime/clock.ts'
import type { LogLevel } from '../../lib/runtime/log.ts'
import { createLog } from '../../lib/runtime/log.ts'
import type { CounterMemory } from './counters.ts'
import { openCounters } from './counters.ts'
import { createStore } from './create-store.ts'
import type { SharedStore } from './memory/memory-peer-store.ts'
import { openMemoryPeerStore } from './memory/memory-peer-store.ts'
import { samplePeersMax } from './peer-store.ts'
import type { TrackerSettings } from './tracker-thread.ts'
import { startTrackerThread } from './tracker-thread.ts'

export interface WorkerSetup {
  readonly settings: TrackerSettings
  /** The swarms of the first thread; undefined where a store of somebody else's is opened by each thread. */
  readonly shared: SharedStore | undefined
  readonly storage: { readonly name: string; readonly config: Readonly<Record<string, unknown>> }
  readonly counters: CounterMemory
  readonly thread: number
  readonly logLevel: LogLevel
}

export type WorkerOrder = { kind: 'reload'; settings: TrackerSettings } | { kind: 'close' }
export type WorkerAnswer =
  { kind: 'started' } | { kind: 'reloaded' } | { kind: 'closed' } | { kind: 'failed'; message: string }

const { settings, shared, storage, counters, thread, logLevel } = workerData as WorkerSetup
const log = createLog('rackswarm-server', logLevel).child({ thread })
const deps = { random: Math.random, now: Date.now, monotonic: monotonicMs, log }

const answer = (message: WorkerAnswer) => {
  parentPort?.postMessage(message)
}
const failed = (error: unknown) => {
  answer({ kind: 'failed', message: error instanceof Error ? error.message : String(error) })
}

try {
  const store = shared
    ? openMemoryPeerStore(shared, { ...deps, now: monotonicMs, sampleMax: samplePeersMax })
    : await createStore(storage, settings, deps)
  const running = await startTrackerThread(settings, {
    ...deps,
    store,
    counters: openCounters(counters, thread),
    reusePort: true,
  })
  parentPort?.on('message', (order: WorkerOrder) => {
    if (order.kind === 'reload') {
      running.reload(order.settings).then(() => {
        answer({ kind: 'reloaded' })
      }, failed)
    } else {
      running[Symbol.asyncDispose]().then(() => {
        answer({ kind: 'closed' })
        parentPort?.close()
      }, failed)
    }
  })
  answer({ kind: 'started' })
} catch (error) {
  failed(error)
}
