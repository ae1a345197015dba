// Saves snapshots of a shared store. In: 'save'. Out: SaveResult. It runs beside the event loop: reading millions of peers takes seconds.
import { parentPort, workerData } from 'node:worker_threads'
import { monotonicMs } from '../../../lib/runtime/clock.ts'
import type { SharedStore } from './memory-peer-store.ts'
import { openMemoryPeerStore } from './memory-peer-store.ts'
import { saveSnapshot } from './snapshot.ts'

export type SaveResult = { peers: number; bytes: number } | { error: string }

const { shared, file } = workerData as { shared: SharedStore; file: string }
const store = openMemoryPeerStore(shared, { random: Math.random, now: monotonicMs, sampleMax: 1 })

parentPort?.on('message', () => {
  saveSnapshot(store, file, Date.now()).then(
    (result) => parentPort?.postMessage(result satisfies SaveResult),
    (error: unknown) =>
      parentPort?.postMessage({
        error: error instanceof Error ? error.message : String(error),
      } satisfies SaveResult),
  )
})
