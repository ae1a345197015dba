import { Worker } from 'node:worker_threads'
import type { Scenario } from './scenario.ts'
import type { Progress, Result } from './simulate.ts'

/** What the thread tells. */
export type SimulationNews =
  { readonly seconds: number; readonly hosts: number } | { readonly result: Result }

/** Objects of one host in one swarm take no more than this, MiB; what a picker knows of pieces is beside that. */
const mibPerFetch = 0.26
const mibMin = 1024
/** Most of what a piece needs is over once it is there: with room for that little is moved on to where it is costly to collect. */
const youngMib = 192

/** A simulation needs more memory than it may take. */
export class SimulationTooLarge extends Error {}

/**
 * `simulate` in a thread of its own, whose memory is bounded by the number of hosts.
 *
 * @throws SimulationTooLarge
 */
export async function simulateInThread(scenario: Scenario, progress: Progress): Promise<Result> {
  const mib = Math.max(mibMin, Math.ceil(mibPerFetch * scenario.hosts * scenario.releases))
  const worker = new Worker(new URL('./simulate-worker.ts', import.meta.url), {
    workerData: scenario,
    resourceLimits: { maxOldGenerationSizeMb: mib, maxYoungGenerationSizeMb: youngMib },
  })
  const ended = Promise.withResolvers<Result>()
  worker.on('message', (news: SimulationNews) => {
    if ('result' in news) ended.resolve(news.result)
    else progress(news.seconds, news.hosts)
  })
  worker.on('error', (error) => {
    const isTooLarge = (error as NodeJS.ErrnoException).code === 'ERR_WORKER_OUT_OF_MEMORY'
    ended.reject(
      isTooLarge
        ? new SimulationTooLarge(
            `It needs more than ${mib} MiB of memory: simulate fewer hosts, or fewer releases at once`,
            { cause: error },
          )
        : error,
    )
  })
  worker.on('exit', () => {
    ended.reject(new Error('The thread that simulates has ended'))
  })
  return ended.promise
}
