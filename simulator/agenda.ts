interface Due {
  readonly atMs: number
  readonly order: number
  readonly act: () => void
}

/** What is to be done when, in virtual time: a heap, and in the order in which it was asked for what is due at the same time. */
export class Agenda {
  readonly #heap: Due[] = []
  #order = 0

  /** When the next is due; Infinity where nothing is. */
  get nextMs(): number {
    return this.#heap[0]?.atMs ?? Infinity
  }

  at(atMs: number, act: () => void): void {
    const heap = this.#heap
    const entry = { atMs, order: this.#order++, act }
    heap.push(entry)
    let at = heap.length - 1
    while (at > 0) {
      const above = (at - 1) >> 1
      const parent = heap[above]
      if (parent === undefined || isBefore(parent, entry)) break
      heap[at] = parent
      at = above
    }
    heap[at] = entry
  }

  /** The next, where it is due. */
  take(nowMs: number): (() => void) | undefined {
    const [next] = this.#heap
    if (next === undefined || next.atMs > nowMs) return undefined
    this.#pop()
    return next.act
  }

  #pop(): void {
    const heap = this.#heap
    const last = heap.pop()
    if (last === undefined || heap.length === 0) return
    let at = 0
    for (;;) {
      let below = 2 * at + 1
      const [left, right] = [heap[below], heap[below + 1]]
      if (left === undefined) break
      if (right !== undefined && isBefore(right, left)) below++
      const child = heap[below]
      if (child === undefined || isBefore(last, child)) break
      heap[at] = child
      at = below
    }
    heap[at] = last
  }
}

function isBefore(one: Due, other: Due): boolean {
  return one.atMs < other.atMs || (one.atMs === other.atMs && one.order < other.order)
}
