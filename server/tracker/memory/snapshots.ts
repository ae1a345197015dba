import { Worker } from 'node:worker_threads'
import type { Logger } from '../../../lib/runtime/log.ts'
import type { Topology } from '../topology.ts'
import type { MemoryPeerStore } from './memory-peer-store.ts'
import type { SaveResult } from './snapshot-worker.ts'
import { loadSnapshot } from './snapshot.ts'

export interface Snapshots extends AsyncDisposable {
  /** Saves now, or waits for the saving that is under way and then saves. */
  save(): Promise<void>
  /** Seconds since the last one was saved or loaded. */
  ageSeconds(): number
}

export interface SnapshotsOptions {
  readonly store: MemoryPeerStore
  readonly file: string
  /** Between two snapshots: what you trade is the swarms of that long, after a crash, against the disk. */
  readonly intervalMs: number
  readonly topology: Topology
  /** Whether a last one is to be saved at the end: not of a start that failed, beside a server that may be running. */
  readonly saveAtEnd: () => boolean
  /** Milliseconds since 1970. */
  readonly now: () => number
  readonly log: Logger
}

/** How long the end of the program waits for the last snapshot. */
const lastSaveMs = 60_000

/** Reads the last snapshot into the store, then saves one every interval and, disposed, a last one if it is to be. */
export async function startSnapshots(options: SnapshotsOptions): Promise<Snapshots> {
  const { store, file, intervalMs, topology, saveAtEnd, now, log } = options
  const loaded = await loadSnapshot(store, file, { topology, nowMs: now() })
  if (loaded?.fault !== undefined)
    log.warn({ file, fault: loaded.fault, peers: loaded.peers }, 'snapshot of the swarms was not whole')
  else if (loaded) log.info({ peers: loaded.peers, ageMs: loaded.ageMs }, 'swarms restored')

  let worker: Worker | undefined
  let savedAtMs = now()
  let underWay: Promise<void> | undefined
  /** The thread that saves; a new one where the last has failed. */
  const open = (): Worker => {
    if (worker) return worker
    const opened = new Worker(new URL('./snapshot-worker.ts', import.meta.url), {
      workerData: { shared: store.shared, file },
      // Young objects are frames on their way to the disk: a few are enough.
      resourceLimits: { maxYoungGenerationSizeMb: 4 },
    })
    opened.unref()
    // Whoever waits for it is told; between two snapshots nobody does.
    opened.on('error', (error) => {
      log.error({ err: error }, 'thread that saves the swarms failed')
    })
    opened.once('exit', () => {
      if (worker === opened) worker = undefined
    })
    worker = opened
    return opened
  }

  const saveOnce = async (): Promise<void> => {
    const result = await saveOn(open())
    if ('error' in result) throw new Error(`Cannot save the swarms to ${file}: ${result.error}`)
    savedAtMs = now()
    log.debug(result, 'swarms saved')
  }
  const save = (): Promise<void> => {
    underWay = (underWay ?? Promise.resolve()).catch(() => undefined).then(saveOnce)
    return underWay
  }
  const saveOrTell = () =>
    save().catch((error: unknown) => {
      log.error({ err: error }, 'swarms were not saved; a restart would lose what changed since')
    })
  let saving = false
  const timer = setInterval(() => {
    // A slow disk is no reason to line up.
    if (saving) return
    saving = true
    void saveOrTell().finally(() => (saving = false))
  }, intervalMs)
  timer.unref()

  return {
    save,
    ageSeconds: () => (now() - savedAtMs) / 1000,
    [Symbol.asyncDispose]: async () => {
      clearInterval(timer)
      if (!saveAtEnd()) {
        await worker?.terminate()
        return
      }
      open().ref()
      const late = Promise.withResolvers<undefined>()
      const limit = setTimeout(late.resolve, lastSaveMs, undefined)
      await Promise.race([saveOrTell(), late.promise])
      clearTimeout(limit)
      await worker?.terminate()
    },
  }
}

/** One snapshot. Rejects when the thread ends before it is done. */
function saveOn(worker: Worker): Promise<SaveResult> {
  return new Promise((resolve, reject) => {
    const off = () => {
      worker.off('message', done).off('error', failed).off('exit', exited)
    }
    const done = (result: SaveResult) => {
      off()
      resolve(result)
    }
    const failed = (error: unknown) => {
      off()
      reject(error instanceof Error ? error : new Error(String(error)))
    }
    const exited = () => {
      failed(new Error('the thread that saves the swarms ended'))
    }
    worker.on('message', done).on('error', failed).on('exit', exited)
    worker.postMessage('save')
  })
}
