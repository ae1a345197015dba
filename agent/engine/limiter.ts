import type { Limits, Rates } from './engine.ts'
import { TokenBucket } from './token-bucket.ts'

export type Direction = 'download' | 'upload'

interface Buckets {
  readonly download: TokenBucket
  readonly upload: TokenBucket
}

/**
 * What the host may move, and within that what it may move to and from all peers of a distance or more: like the links of a network, of which
 * the farther ones carry what passes the nearer ones too. Rates change while it works.
 */
export class Limiter {
  readonly #now: () => number
  readonly #host: Buckets
  /** By the distance that each begins at. */
  readonly #from = new Map<number, Buckets>()

  constructor(limits: Limits, now: () => number) {
    this.#now = now
    this.#host = this.#createBuckets()
    this.set(limits)
  }

  set(limits: Limits): void {
    setRates(this.#host, limits)
    for (const distance of this.#from.keys())
      if (limits.fromDistance?.has(distance) !== true) this.#from.delete(distance)
    for (const [distance, rates] of limits.fromDistance ?? []) {
      const buckets = this.#from.get(distance) ?? this.#createBuckets()
      setRates(buckets, rates)
      this.#from.set(distance, buckets)
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
    let waitMs = this.#host[direction].waitMs
    for (const [from, buckets] of this.#from)
      if (distance >= from) waitMs = Math.max(waitMs, buckets[direction].waitMs)
    return waitMs
  }

  take(direction: Direction, distance: number, bytes: number): void {
    this.#host[direction].take(bytes)
    for (const [from, buckets] of this.#from) if (distance >= from) buckets[direction].take(bytes)
  }

  /** Gives back what was taken and not moved. */
  give(direction: Direction, distance: number, bytes: number): void {
    this.#host[direction].give(bytes)
    for (const [from, buckets] of this.#from) if (distance >= from) buckets[direction].give(bytes)
  }
}

function setRates({ download, upload }: Buckets, rates: Rates): void {
  download.rate = rates.downloadBytesPerSecond
  upload.rate = rates.uploadBytesPerSecond
}
