import type { SharedArrays } from './shared-arrays.ts'

/** What is looked for is not there. */
export const none = -1

/** Six slots for five entries: runs stay short, and it is a fifth of the memory of the next power of two. */
const slack = 1.2
/** A table that is fuller than this is left for one of sixteen times the size. */
const fullAt = 0.75
const growth = 16
const slotsMin = 4096
/** Slots of the old table that each insertion empties; one that grows is done long before the new one is full. */
const movedPerInsert = 4

/** In place of an entry that has left the old table: the run goes on behind it. */
const moved = 0xffffffff

/** Header words: entries, which table is in use, and how far the one before it has been emptied. */
const countWord = 0
const tableWord = 1
const cursorWord = 2

/**
 * Handles by hash, open addressing with linear probing. An entry is the handle plus one, and the bits of the hash that are left
 * above it, which spare most looks at the records themselves. The keys are in the caller's records:
 *
 *     for (let found = index.first(hash); found !== none; found = index.next(hash)) if (matches(found)) return found
 *
 * It begins small, since what is spread over the table of millions is in no cache, and grows without a pause: each insertion moves a few
 * entries, and meanwhile both tables are looked at.
 */
export class HashIndex {
  readonly #tables: readonly Uint32Array[]
  readonly #header: Uint32Array
  readonly #handleMask: number
  readonly #hashOf: (handle: number) => number
  // Where the look for one hash has come to.
  #table: Uint32Array
  #at = 0
  #inOld = false

  /** `handlesMax` bounds both the handles and how many there are; `hashOf` gives the hash of any handle in the index. */
  constructor(arrays: SharedArrays, name: string, handlesMax: number, hashOf: (handle: number) => number) {
    const slots = Math.ceil(handlesMax * slack) + 16
    const sizes = [slots]
    while ((sizes[0] ?? 0) > slotsMin * growth) sizes.unshift(Math.ceil((sizes[0] ?? 0) / growth))
    this.#tables = sizes.map((size) => arrays.u32(`${name}.${size}`, size))
    this.#header = arrays.u32(`${name}.header`, 3)
    this.#handleMask = 2 ** Math.ceil(Math.log2(handlesMax + 2)) - 1
    this.#hashOf = hashOf
    this.#table = this.#current()
  }

  /** A handle that may be the one, or `none`. */
  first(hash: number): number {
    this.#table = this.#current()
    this.#at = start(this.#table, hash)
    this.#inOld = false
    return this.#scan(hash)
  }

  /** The next one, before anything else is asked of the index. */
  next(hash: number): number {
    this.#at = after(this.#table, this.#at)
    return this.#scan(hash)
  }

  insert(hash: number, handle: number): void {
    const header = this.#header
    const count = (header[countWord] ?? 0) + 1
    header[countWord] = count
    const index = header[tableWord] ?? 0
    const next = this.#tables[index + 1]
    if (next && count > this.#current().length * fullAt) {
      header[tableWord] = index + 1
      header[cursorWord] = 0
    }
    this.#put(hash, handle)
    this.#moveSome()
  }

  /** Takes a handle out and closes the gap. */
  remove(hash: number, handle: number): void {
    this.#header[countWord] = (this.#header[countWord] ?? 0) - 1
    let gap = this.#slotIn(this.#current(), hash, handle)
    if (gap < 0) {
      const old = this.#old()
      const slot = old ? this.#slotIn(old, hash, handle) : -1
      if (old && slot >= 0) old[slot] = moved
      return
    }
    const table = this.#current()
    for (let at = after(table, gap); ; at = after(table, at)) {
      const entry = table[at] ?? 0
      if (entry === 0) break
      // An entry may fill the gap unless its run begins after it.
      const first = start(table, this.#hashOf((entry & this.#handleMask) - 1))
      const reaches = gap <= at ? first <= gap || first > at : first <= gap && first > at
      if (!reaches) continue
      table[gap] = entry
      gap = at
    }
    table[gap] = 0
  }

  #scan(hash: number): number {
    for (;;) {
      const entry = this.#table[this.#at] ?? 0
      if (entry === 0) {
        const old = this.#inOld ? undefined : this.#old()
        if (!old) return none
        this.#table = old
        this.#at = start(old, hash)
        this.#inOld = true
        continue
      }
      if (entry !== moved && ((entry ^ hash) & ~this.#handleMask) === 0) return (entry & this.#handleMask) - 1
      this.#at = after(this.#table, this.#at)
    }
  }

  #put(hash: number, handle: number): void {
    const table = this.#current()
    let at = start(table, hash)
    while ((table[at] ?? 0) !== 0) at = after(table, at)
    table[at] = (hash & ~this.#handleMask) | (handle + 1)
  }

  #moveSome(): void {
    const old = this.#old()
    if (!old) return
    const from = this.#header[cursorWord] ?? 0
    const until = Math.min(from + movedPerInsert, old.length)
    for (let at = from; at < until; at++) {
      const entry = old[at] ?? 0
      if (entry === 0 || entry === moved) continue
      const handle = (entry & this.#handleMask) - 1
      this.#put(this.#hashOf(handle), handle)
      old[at] = moved
    }
    this.#header[cursorWord] = until
  }

  #slotIn(table: Uint32Array, hash: number, handle: number): number {
    for (let at = start(table, hash); ; at = after(table, at)) {
      const entry = table[at] ?? 0
      if (entry === 0) return -1
      if (entry !== moved && (entry & this.#handleMask) === handle + 1) return at
    }
  }

  #current(): Uint32Array {
    return this.#tables[this.#header[tableWord] ?? 0] ?? emptyTable
  }

  /** The table before the current one, while it has entries. */
  #old(): Uint32Array | undefined {
    const old = this.#tables[(this.#header[tableWord] ?? 0) - 1]
    return old && (this.#header[cursorWord] ?? 0) < old.length ? old : undefined
  }
}

const emptyTable = new Uint32Array(1)

/** Where the run of a hash (32 bits, unsigned or not) begins. */
function start(table: Uint32Array, hash: number): number {
  return Math.floor(((hash >>> 0) * table.length) / 2 ** 32)
}

function after(table: Uint32Array, at: number): number {
  return at + 1 === table.length ? 0 : at + 1
}

/** Mixes a word into a 32-bit hash (the round of MurmurHash3). */
export function mix(hash: number, word: number): number {
  const scrambled = Math.imul(word, 0xcc9e2d51)
  const mixed = hash ^ Math.imul((scrambled << 15) | (scrambled >>> 17), 0x1b873593)
  return (Math.imul((mixed << 13) | (mixed >>> 19), 5) + 0xe6546b64) | 0
}

/** Spreads what was mixed over all bits (the finaliser of MurmurHash3). */
export function finish(hash: number): number {
  let h = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b)
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35)
  return (h ^ (h >>> 16)) >>> 0
}
