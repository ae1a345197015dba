import type { SharedArrays } from './shared-arrays.ts'

const firstFree = 0
const unused = 1
const inUse = 2

/** Record numbers below `max`, given out and taken back. A free record's word of `next` holds the one that is free after it. */
export class FreeList {
  readonly #header: Uint32Array
  readonly #next: Uint32Array
  readonly #words: number
  readonly #max: number

  /** `next` has `words` words for each record; the first of them links those that are free. */
  constructor(arrays: SharedArrays, name: string, next: Uint32Array, words = 1) {
    this.#header = arrays.u32(`${name}.free`, 3)
    this.#next = next
    this.#words = words
    this.#max = Math.floor(next.length / words)
  }

  get used(): number {
    return this.#header[inUse] ?? 0
  }

  /** Records below this number have been in use at some time. */
  get touched(): number {
    return this.#header[unused] ?? 0
  }

  has(count: number): boolean {
    return this.used + count <= this.#max
  }

  /** @throws RangeError when all are in use: ask `has` first */
  take(): number {
    const header = this.#header
    const known = header[firstFree] ?? 0
    const record = known > 0 ? known - 1 : (header[unused] ?? 0)
    if (record >= this.#max) throw new RangeError(`Cannot take a record: all ${this.#max} are in use`)
    if (known > 0) header[firstFree] = this.#next[record * this.#words] ?? 0
    else header[unused] = record + 1
    header[inUse] = this.used + 1
    return record
  }

  give(record: number): void {
    const header = this.#header
    this.#next[record * this.#words] = header[firstFree] ?? 0
    header[firstFree] = record + 1
    header[inUse] = this.used - 1
  }
}
