const free = 0
const held = 1
/** Held, and somebody sleeps until it is free. */
const contended = 2

/** Tries before sleeping: some 10 µs, which is longer than any holder takes unless it was put off its core. */
const spins = 500
/** A sleeper looks again after this long even if nobody woke it. */
const sleepMs = 5

/** No holder takes as long, so it has died: what it was changing is half done, and nobody may touch it any more. */
const abandonedMsDefault = 10_000

/** A lock between threads in one word of shared memory (Drepper, "Futexes Are Tricky", mutex 2). Holders are quick: no I/O, no await. */
export class Lock {
  readonly #word: Int32Array
  readonly #abandonedMs: number

  /** `word[0]` is the lock; zero is free. */
  constructor(word: Int32Array, abandonedMs: number = abandonedMsDefault) {
    this.#word = word
    this.#abandonedMs = abandonedMs
  }

  /** @throws Error when the thread that holds it must have died */
  acquire(): void {
    if (Atomics.compareExchange(this.#word, 0, free, held) !== free) this.#wait()
  }

  release(): void {
    if (Atomics.exchange(this.#word, 0, free) === contended) Atomics.notify(this.#word, 0, 1)
  }

  #wait(): void {
    for (let i = 0; i < spins; i++) {
      if (Atomics.load(this.#word, 0) === free && Atomics.compareExchange(this.#word, 0, free, held) === free)
        return
    }
    const startMs = performance.now()
    while (Atomics.exchange(this.#word, 0, contended) !== free) {
      if (performance.now() - startMs > this.#abandonedMs)
        throw new Error(
          `Cannot get a lock: it has been held for ${this.#abandonedMs / 1000} s, so the thread that holds it has died`,
        )
      Atomics.wait(this.#word, 0, contended, sleepMs)
    }
  }
}
