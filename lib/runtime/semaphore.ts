/** At most so many at once, in the order of asking. */
export interface Semaphore {
  /** Those that wait for their turn. */
  readonly waiting: number
  /** Whoever asks now has to wait. */
  readonly isFull: boolean
  /** Resolves when it is one's turn. @returns gives it back; once more does nothing. Rejects with the signal's reason when it aborts first */
  take(signal?: AbortSignal): Promise<() => void>
}

export function createSemaphore(max: number): Semaphore {
  let free = max
  const waiting: (() => void)[] = []
  return {
    get waiting() {
      return waiting.length
    },
    get isFull() {
      return free === 0
    },
    take: async (signal) => {
      if (free > 0) {
        free--
      } else {
        const turn = Promise.withResolvers<undefined>()
        const next = () => {
          turn.resolve(undefined)
        }
        waiting.push(next)
        const leave = () => {
          const at = waiting.indexOf(next)
          if (at >= 0) {
            waiting.splice(at, 1)
            turn.reject(signal?.reason as Error)
          }
        }
        signal?.addEventListener('abort', leave, { once: true })
        await turn.promise
        signal?.removeEventListener('abort', leave)
      }
      let given = false
      return () => {
        if (given) return
        given = true
        const next = waiting.shift()
        // It goes to the next in line, and stays taken.
        if (next) next()
        else free++
      }
    },
  }
}
