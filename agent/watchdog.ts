/** What to do about a fetch that does not move: ask tracker and registry, make its connections anew, plain HTTP. */
export type WatchdogStep = 'ask' | 'remake' | 'fallback'

/**
 * Watches one fetch. Every `stallMs` without a byte is one step further, round and round: a fetch is never given up
 * while anything may become reachable.
 */
export interface Watchdog {
  /** Tells the bytes so far; any change is progress. */
  progress(bytes: number, nowMs: number): void
  /** The step that is due, once. */
  check(nowMs: number): WatchdogStep | undefined
  /** Milliseconds without a byte. */
  stalledMs(nowMs: number): number
}

const steps: readonly WatchdogStep[] = ['ask', 'remake', 'fallback']

export function createWatchdog(stallMs: number, startMs: number): Watchdog {
  let seen = -1
  let movedAt = startMs
  let taken = 0
  return {
    progress: (bytes, nowMs) => {
      if (bytes === seen) return
      // The first number only says where a fetch starts from.
      if (seen !== -1) {
        movedAt = nowMs
        taken = 0
      }
      seen = bytes
    },
    check: (nowMs) => {
      const reached = Math.floor((nowMs - movedAt) / stallMs)
      if (reached <= taken) return undefined
      // A process that slept does not take the steps it missed all at once.
      taken = taken + 1 < reached ? Math.max(taken + 1, reached - 2) : reached
      return steps[(taken - 1) % steps.length]
    },
    stalledMs: (nowMs) => nowMs - movedAt,
  }
}
