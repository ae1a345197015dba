import type { SharedArrays } from './shared-arrays.ts'

/** Rooms are powers of two; the smallest has four words, two of which link it while it is free. */
const smallest = 2
const classes = 32

/** Header words: the first free room of each class (its offset plus one), and the largest class that was ever asked for. */
const largestWord = classes

/** In `states`, for the first unit of a room that is free: its class, with this bit. */
const freeBit = 0x80

/**
 * Growable lists of 32-bit values in one arena of shared memory, which a buddy allocator divides (Knuth, TAOCP 2.5): rooms that lie
 * side by side become one again, so that no mixture of sizes over time leaves the arena in pieces. A list of one value is kept in
 * place of its pointer. One that outgrows its room moves to one of twice the size, and to half when three quarters are unused.
 */
export class Lists {
  readonly #arena: Uint32Array
  readonly #states: Uint8Array
  readonly #header: Uint32Array
  readonly #at: Uint32Array
  readonly #lengths: Uint32Array
  /** Class of the list's room; 0 where its one value stands in `at`. */
  readonly #rooms: Uint8Array
  readonly #top: number

  /** `valuesMax`: values in all lists together; the arena has four times that, most of which is never touched. */
  constructor(arrays: SharedArrays, name: string, options: { listsMax: number; valuesMax: number }) {
    this.#top = Math.max(12, Math.ceil(Math.log2(options.valuesMax * 4)))
    this.#arena = arrays.u32(`${name}.arena`, 2 ** this.#top)
    this.#states = arrays.u8(`${name}.states`, 2 ** (this.#top - smallest))
    this.#header = arrays.u32(`${name}.header`, classes + 1)
    this.#at = arrays.u32(`${name}.at`, options.listsMax)
    this.#lengths = arrays.u32(`${name}.lengths`, options.listsMax)
    this.#rooms = arrays.u8(`${name}.rooms`, options.listsMax)
    if (this.#header[largestWord] === 0) {
      this.#header[largestWord] = smallest
      this.#link(0, this.#top)
    }
  }

  /** Whether one more value in a few lists, whichever they are, is sure to find room. */
  hasRoom(): boolean {
    // A list may need a room of the next class; half of a room of the class after that is left for the others.
    for (let room = (this.#header[largestWord] ?? 0) + 2; room <= this.#top; room++)
      if ((this.#header[room] ?? 0) > 0) return true
    return false
  }

  length(list: number): number {
    return this.#lengths[list] ?? 0
  }

  get(list: number, index: number): number {
    const at = this.#at[list] ?? 0
    return this.#rooms[list] === 0 ? at : (this.#arena[at + index] ?? 0)
  }

  set(list: number, index: number, value: number): void {
    if (this.#rooms[list] === 0) this.#at[list] = value
    else this.#arena[(this.#at[list] ?? 0) + index] = value
  }

  push(list: number, value: number): void {
    const length = this.#lengths[list] ?? 0
    const room = this.#rooms[list] ?? 0
    if (length > 0 && length === 1 << room) this.#move(list, Math.max(smallest, room + 1), length)
    this.#lengths[list] = length + 1
    this.set(list, length, value)
  }

  pop(list: number): void {
    const length = (this.#lengths[list] ?? 0) - 1
    this.#lengths[list] = length
    const room = this.#rooms[list] ?? 0
    if (room === 0 || length > (1 << room) >> 2) return
    if (length > 1) {
      if (room > smallest) this.#move(list, room - 1, length)
      return
    }
    const at = this.#at[list] ?? 0
    this.#at[list] = this.#arena[at] ?? 0
    this.#rooms[list] = 0
    this.#free(at, room)
  }

  #move(list: number, room: number, length: number): void {
    const from = this.#at[list] ?? 0
    const before = this.#rooms[list] ?? 0
    const to = this.#allocate(room)
    if (before === 0) {
      this.#arena[to] = from
    } else {
      this.#arena.copyWithin(to, from, from + length)
      this.#free(from, before)
    }
    this.#at[list] = to
    this.#rooms[list] = room
  }

  #allocate(room: number): number {
    const header = this.#header
    if (room > (header[largestWord] ?? 0)) header[largestWord] = room
    let from = room
    while (from <= this.#top && (header[from] ?? 0) === 0) from++
    if (from > this.#top)
      throw new RangeError(`Cannot make room for a list of ${1 << room} values: the arena is full`)
    const at = (header[from] ?? 0) - 1
    this.#unlink(at, from)
    while (from > room) {
      from--
      this.#link(at + (1 << from), from)
    }
    return at
  }

  #free(room: number, ofClass: number): void {
    let at = room
    let size = ofClass
    for (; size < this.#top; size++) {
      const buddy = at ^ (1 << size)
      if (this.#states[buddy >>> smallest] !== (freeBit | size)) break
      this.#unlink(buddy, size)
      at &= ~(1 << size)
    }
    this.#link(at, size)
  }

  #link(at: number, room: number): void {
    const first = this.#header[room] ?? 0
    this.#arena[at] = first
    this.#arena[at + 1] = 0
    if (first > 0) this.#arena[first] = at + 1
    this.#header[room] = at + 1
    this.#states[at >>> smallest] = freeBit | room
  }

  #unlink(at: number, room: number): void {
    const [next, previous] = [this.#arena[at] ?? 0, this.#arena[at + 1] ?? 0]
    if (previous > 0) this.#arena[previous - 1] = next
    else this.#header[room] = next
    if (next > 0) this.#arena[next] = previous
    this.#states[at >>> smallest] = 0
  }
}
