import type { SharedArrays } from './shared-arrays.ts'

/** `candidate` found the end of the run: what is looked for is not there. */
export const none = -1
/** `candidate` found an entry whose hash differs. */
const other = -2

/** Five slots for four entries: short runs, and a quarter of the memory of the next power of two. */
const slack = 1.25

/**
 * Handles by hash, open addressing with linear probing. An entry is the handle plus one, and the bits of the hash that are left
 * above it, which spare most looks at the records themselves. The keys are in the caller's records:
 *
 *     for (let at = index.start(hash), found; (found = index.candidate(at, hash)) !== none; at = index.after(at))
 *       if (found >= 0 && matches(found)) return found
 */
export class HashIndex {
  readonly #table: Uint32Array
  readonly #slots: number
  readonly #handleMask: number

  /** `handlesMax` bounds both the handles and how many there are. */
  constructor(arrays: SharedArrays, name: string, handlesMax: number) {
    this.#slots = Math.ceil(handlesMax * slack) + 16
    this.#table = arrays.u32(name, this.#slots)
    this.#handleMask = 2 ** Math.ceil(Math.log2(handlesMax + 2)) - 1
  }

  /** Where the run of a hash (32 bits, unsigned or not) begins. */
  start(hash: number): number {
    return Math.floor(((hash >>> 0) * this.#slots) / 2 ** 32)
  }

  after(at: number): number {
    return at + 1 === this.#slots ? 0 : at + 1
  }

  /** A handle that may be the one, negative where there is nothing to compare. */
  candidate(at: number, hash: number): number {
    const entry = this.#table[at] ?? 0
    if (entry === 0) return none
    return ((entry ^ hash) & ~this.#handleMask) === 0 ? (entry & this.#handleMask) - 1 : other
  }

  insert(hash: number, handle: number): void {
    let at = this.start(hash)
    while ((this.#table[at] ?? 0) !== 0) at = this.after(at)
    this.#table[at] = (hash & ~this.#handleMask) | (handle + 1)
  }

  /** Takes a handle out and closes the gap; `hashOf` gives the hash of any handle in the index. */
  remove(hash: number, handle: number, hashOf: (handle: number) => number): void {
    const table = this.#table
    let gap = this.start(hash)
    while (((table[gap] ?? 0) & this.#handleMask) !== handle + 1) {
      if ((table[gap] ?? 0) === 0) return
      gap = this.after(gap)
    }
    for (let at = this.after(gap); ; at = this.after(at)) {
      const entry = table[at] ?? 0
      if (entry === 0) break
      // An entry may fill the gap unless its run begins after it.
      const start = this.start(hashOf((entry & this.#handleMask) - 1))
      const reaches = gap <= at ? start <= gap || start > at : start <= gap && start > at
      if (!reaches) continue
      table[gap] = entry
      gap = at
    }
    table[gap] = 0
  }
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
