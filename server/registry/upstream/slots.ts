import { UpstreamError } from './upstream-error.ts'

/** So many at once, so many more in line, and no more. */
export interface Slots {
  /** Runs when its turn comes. @throws UpstreamError `down` when the line is full */
  run<Result>(work: () => Promise<Result>): Promise<Result>
}

export function createSlots(what: string, { max, waitingMax }: { max: number; waitingMax: number }): Slots {
  const waiting: (() => void)[] = []
  let taken = 0
  const take = async () => {
    if (taken < max) taken++
    else if (waiting.length >= waitingMax)
      throw new UpstreamError('down', `${waitingMax} wait for ${what} already`)
    else await new Promise<void>((resolve) => waiting.push(resolve))
  }
  const giveBack = () => {
    const next = waiting.shift()
    // The slot goes to the next in line, and stays taken.
    if (next) next()
    else taken--
  }
  return {
    run: async (work) => {
      await take()
      try {
        return await work()
      } finally {
        giveBack()
      }
    },
  }
}
