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
  /** Milliseconds since 1970. */
  readonly now: () => number
  readonly log: Logger
}

/** How long the end of the program waits for the last snapshot. */
const lastSaveMs = 60_000

/** Reads the last snapshot into the store, then saves one every interval and, disposed, a last one. */
export async function startSnapshots(options: SnapshotsOptions): Promise<Snapshots> {
  const { store, file, intervalMs, topology, now, log } = options
  const loaded = await loadSnapshot(store, file, { topology, nowMs: now() })
  if (loaded?.fault !== undefined)
    log.warn({ file, fault: loaded.fault, peers: loaded.peers }, 'snapshot of the swarms was not whole')
  else if (loaded) log.info({ peers: loaded.peers, ageMs: loaded.ageMs }, 'swarms restored')

  const worker = new Worker(new URL('./snapshot-worker.ts', import.meta.url), {
    workerData: { shared: store.shared, file },
    // Young objects are frames on their way to the disk: a few are enough.
    resourceLimits: { maxYoungGenerationSizeMb: 4 },
  })
  worker.unref()
  let savedAtMs = now()
  let underWay: Promise<void> | undefined
  let gone: Error | undefined
  worker.on('error', (error) => {
    gone = error instanceof Error ? error : new Error(String(error))
    log.error({ err: gone }, 'snapshots have stopped: their thread failed')
  })

  const saveOnce = async (): Promise<void> => {
    if (gone) throw gone
    const result = await new Promise<SaveResult>((resolve, reject) => {
      worker.once('message', resolve)
      worker.once('error', reject)
      worker.postMessage('save')
    })
    worker.removeAllListeners('message')
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
  const timer = setInterval(() => void saveOrTell(), intervalMs)
  timer.unref()

  return {
    save,
    ageSeconds: () => (now() - savedAtMs) / 1000,
    [Symbol.asyncDispose]: async () => {
      clearInterval(timer)
      worker.ref()
      const late = Promise.withResolvers<undefined>()
      const limit = setTimeout(late.resolve, lastSaveMs, undefined)
      await Promise.race([saveOrTell(), late.promise])
      clearTimeout(limit)
      await worker.terminate()
    },
  }
}
