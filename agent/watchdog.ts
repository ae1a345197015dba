/** What to do about a fetch that does not move, besides asking tracker and registry each time: nothing else, make its connections anew, plain HTTP. */
export type WatchdogStep = 'ask' | 'remake' | 'fallback'

/**
 * Watches one fetch. Every `stallMs` without a byte is one step further, round and round: a fetch is never given up
 * while anything may become reachable.
 */
export interface Watchdog {
  /** Tells the bytes so far that others have sent; any change is progress. */
  progress(receivedBytes: number, nowMs: number): void
  /** Tells the bytes that are known to be right: while what is on disk is checked no time passes, but that is no progress, as each remake does it. */
  checked(verifiedBytes: number, nowMs: number): void
  /** The step that is due, once. */
  check(nowMs: number): WatchdogStep | undefined
  /** Milliseconds without a byte. */
  stalledMs(nowMs: number): number
}

const steps: readonly WatchdogStep[] = ['ask', 'remake', 'fallback']

export function createWatchdog(stallMs: number, startMs: number): Watchdog {
  let received = -1
  let verified = -1
  let movedAt = startMs
  /** Since when the next step is waited for. */
  let waitsSince = startMs
  let taken = 0
  return {
    progress: (receivedBytes, nowMs) => {
      if (receivedBytes === received) return
      // The first number only says where a fetch starts from.
      if (received !== -1) {
        movedAt = waitsSince = nowMs
        taken = 0
      }
      received = receivedBytes
    },
    checked: (verifiedBytes, nowMs) => {
      if (verifiedBytes === verified) return
      if (verified !== -1) waitsSince = nowMs
      verified = verifiedBytes
    },
    check: (nowMs) => {
      if (nowMs - waitsSince < stallMs) return undefined
      // A process that slept does not take the steps it missed all at once.
      waitsSince = Math.max(waitsSince + stallMs, nowMs - stallMs)
      return steps[taken++ % steps.length]
    },
    stalledMs: (nowMs) => nowMs - movedAt,
  }
}
