import type { Limits, Rates } from './engine.ts'
import { TokenBucket } from './token-bucket.ts'

export type Direction = 'download' | 'upload'

interface Buckets {
  readonly download: TokenBucket
  readonly upload: TokenBucket
}

/** What the host may move, and beside that what it may move to and from all peers of a distance. Rates change while it works. */
export class Limiter {
  readonly #now: () => number
  readonly #host: Buckets
  readonly #byDistance = new Map<number, Buckets>()

  constructor(limits: Limits, now: () => number) {
    this.#now = now
    this.#host = this.#createBuckets()
    this.set(limits)
  }

  set(limits: Limits): void {
    setRates(this.#host, limits)
    for (const distance of this.#byDistance.keys())
      if (limits.byDistance?.has(distance) !== true) this.#byDistance.delete(distance)
    for (const [distance, rates] of limits.byDistance ?? []) {
      const buckets = this.#byDistance.get(distance) ?? this.#createBuckets()
      setRates(buckets, rates)
      this.#byDistance.set(distance, buckets)
    }
  }

  #createBuckets(): Buckets {
    return { download: new TokenBucket(undefined, this.#now), upload: new TokenBucket(undefined, this.#now) }
  }

  /** Bytes a second that the whole host may move; undefined where nothing limits it. */
  rate(direction: Direction): number | undefined {
    return this.#host[direction].rate
  }

  /** Milliseconds until bytes may be moved; 0 means now. */
  waitMs(direction: Direction, distance: number): number {
    return Math.max(this.#host[direction].waitMs, this.#byDistance.get(distance)?.[direction].waitMs ?? 0)
  }

  take(direction: Direction, distance: number, bytes: number): void {
    this.#host[direction].take(bytes)
    this.#byDistance.get(distance)?.[direction].take(bytes)
  }

  /** Gives back what was taken and not moved. */
  give(direction: Direction, distance: number, bytes: number): void {
    this.#host[direction].give(bytes)
    this.#byDistance.get(distance)?.[direction].give(bytes)
  }
}

function setRates({ download, upload }: Buckets, rates: Rates): void {
  download.rate = rates.downloadBytesPerSecond
  upload.rate = rates.uploadBytesPerSecond
}
