const free = 0
const held = 1
/** Held, and somebody sleeps until it is free. */
const contended = 2

/** Tries before sleeping: some 10 µs, which is longer than any holder takes unless it was put off its core. */
const spins = 500
/** A sleeper looks again after this long even if nobody woke it. */
const sleepMs = 5

/** A lock between threads in one word of shared memory (Drepper, "Futexes Are Tricky", mutex 2). Holders are quick: no I/O, no await. */
export class Lock {
  readonly #word: Int32Array

  /** `word[0]` is the lock; zero is free. */
  constructor(word: Int32Array) {
    this.#word = word
  }

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
    while (Atomics.exchange(this.#word, 0, contended) !== free)
      Atomics.wait(this.#word, 0, contended, sleepMs)
  }
}
