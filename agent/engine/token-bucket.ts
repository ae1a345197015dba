/**
 * Bytes that may be moved, at a rate. Without a rate it costs a comparison. What is taken may exceed what is there, once: then
 * nothing is given until the debt is paid, so that a block larger than the bucket passes too.
 */
export class TokenBucket {
  #rate: number | undefined
  #tokens = 0
  #filledAtMs = 0
  readonly #now: () => number

  /** `now`: milliseconds of a clock that never goes back. */
  constructor(rate: number | undefined, now: () => number) {
    this.#now = now
    this.rate = rate
  }

  /** Bytes a second; undefined means no limit. */
  get rate(): number | undefined {
    return this.#rate
  }

  set rate(rate: number | undefined) {
    this.#fill()
    this.#rate = rate
    this.#tokens = Math.min(this.#tokens, this.#burst)
  }

  get ready(): boolean {
    if (this.#rate === undefined) return true
    this.#fill()
    return this.#tokens > 0
  }

  take(bytes: number): void {
    if (this.#rate !== undefined) this.#tokens -= bytes
  }

  /** Gives back what was taken and not moved. */
  give(bytes: number): void {
    if (this.#rate !== undefined) this.#tokens = Math.min(this.#burst, this.#tokens + bytes)
  }

  /** Milliseconds until it is ready; 0 where it is. */
  get waitMs(): number {
    if (this.#rate === undefined || this.ready) return 0
    return Math.max(1, ((1 - this.#tokens) * 1000) / this.#rate)
  }

  #fill(): void {
    const now = this.#now()
    if (this.#rate !== undefined)
      this.#tokens = Math.min(this.#burst, this.#tokens + ((now - this.#filledAtMs) * this.#rate) / 1000)
    this.#filledAtMs = now
  }

  /** A tenth of a second's worth: a peer is not starved by the one before it for longer. */
  get #burst(): number {
    return (this.#rate ?? 0) / 10
  }
}
