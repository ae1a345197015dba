/**
 * What hosts have told each other and not looked at yet: a list for each listener, all in one table, so that telling somebody something touches
 * nothing of the listener's own. The latest comes first.
 */
export class News {
  /** By listener: its latest entry, -1 for none. */
  readonly #latest: Int32Array
  /** Entries of three: the one before, from whom it is, and what. */
  #entries = new Int32Array(entryWords * 1024)
  #count = 0
  /** Entries to be used again, the first of a list. */
  #free = -1

  constructor(listeners: number) {
    this.#latest = new Int32Array(listeners).fill(-1)
  }

  /** `slot` and `piece` mean what the listener takes them for. @returns whether it had no other news */
  tell(listener: number, slot: number, piece: number): boolean {
    const before = this.#latest[listener] ?? -1
    const at = this.#take()
    this.#entries[at] = before
    this.#entries[at + 1] = slot
    this.#entries[at + 2] = piece
    this.#latest[listener] = at
    return before < 0
  }

  /** Takes all news of a listener; it must tell nobody anything meanwhile. */
  takeAll(listener: number, hear: (slot: number, piece: number) => void): void {
    const first = this.#latest[listener] ?? -1
    if (first < 0) return
    this.#latest[listener] = -1
    const entries = this.#entries
    let last = first
    for (let at = first; at >= 0; at = entries[at] ?? -1) {
      hear(entries[at + 1] ?? -1, entries[at + 2] ?? 0)
      last = at
    }
    this.#entries[last] = this.#free
    this.#free = first
  }

  #take(): number {
    const at = this.#free
    if (at >= 0) {
      this.#free = this.#entries[at] ?? -1
      return at
    }
    if (entryWords * (this.#count + 1) > this.#entries.length) {
      const larger = new Int32Array(2 * this.#entries.length)
      larger.set(this.#entries)
      this.#entries = larger
    }
    return entryWords * this.#count++
  }
}

const entryWords = 3
