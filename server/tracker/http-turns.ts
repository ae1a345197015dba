/** How long requests are answered before the event loop looks for new connections, of which libuv takes one at each look. */
const turnMs = 1

/**
 * Shares the event loop among the connections of a listener. The kernel holds megabytes of pipelined requests for each of them; answered
 * as they lie there, they would hold up all others, new connections too, for as long as all of them take.
 */
export class Turns {
  /** Each connection waits once at most, so `connectionsMax` bounds them. */
  #waiting: (() => void)[] = []
  #begun = false
  #endsAt = 0

  /** The time of this turn is used up. Whoever asks first begins one. */
  get over(): boolean {
    if (!this.#begun) this.#begin()
    return performance.now() >= this.#endsAt
  }

  /** Has `work` done in a later turn, behind all that waits already. It must not throw. */
  queue(work: () => void): void {
    if (!this.#begun) this.#begin()
    this.#waiting.push(work)
  }

  /** Packets that come before the next one count to this turn. */
  #begin(): void {
    this.#begun = true
    this.#endsAt = performance.now() + turnMs
    setImmediate(() => {
      this.#begun = false
      if (this.#waiting.length > 0) this.#resume()
    })
  }

  #resume(): void {
    const waiting = this.#waiting
    this.#waiting = []
    let done = 0
    while (done < waiting.length && !this.over) waiting[done++]?.()
    if (done < waiting.length) this.#waiting = [...waiting.slice(done), ...this.#waiting]
  }
}
