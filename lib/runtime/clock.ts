/** The clock that never goes back starts somewhere else in each thread; this is how far apart they are. */
const offsetMs = Number(process.hrtime.bigint()) / 1e6 - performance.now()

/** Milliseconds, with a fraction, of a clock that never goes back and is the same in every thread of the process. */
export function monotonicMs(): number {
  return performance.now() + offsetMs
}
