/** Bytes a second, over the last second or so. */
export class RateMeter {
  #bytes = 0
  #rate = 0
  #sinceMs: number
  total = 0

  constructor(nowMs: number) {
    this.#sinceMs = nowMs
  }

  add(bytes: number): void {
    this.#bytes += bytes
    this.total += bytes
  }

  get rate(): number {
    return this.#rate
  }

  /** To be called a few times a second. */
  tick(nowMs: number): void {
    const elapsedMs = nowMs - this.#sinceMs
    if (elapsedMs <= 0) return
    const weight = Math.min(1, elapsedMs / 500)
    this.#rate += weight * ((this.#bytes * 1000) / elapsedMs - this.#rate)
    if (this.#rate < 1) this.#rate = 0
    this.#bytes = 0
    this.#sinceMs = nowMs
  }
}
