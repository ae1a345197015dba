import { createSemaphore } from '../../../lib/runtime/semaphore.ts'
import { UpstreamError } from './upstream-error.ts'

/** So many at once, so many more in line, and no more. */
export interface Slots {
  /** Runs when its turn comes. @throws UpstreamError `down` when the line is full */
  run<Result>(work: () => Promise<Result>): Promise<Result>
}

export function createSlots(what: string, { max, waitingMax }: { max: number; waitingMax: number }): Slots {
  const turns = createSemaphore(max)
  return {
    run: async (work) => {
      if (turns.isFull && turns.waiting >= waitingMax)
        throw new UpstreamError('down', `${waitingMax} wait for ${what} already`)
      const giveBack = await turns.take()
      try {
        return await work()
      } finally {
        giveBack()
      }
    },
  }
}
