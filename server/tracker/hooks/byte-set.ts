import { randomBytes } from 'node:crypto'

/**
 * Byte strings of one width, packed: 20 bytes and about 6 more for each infohash, where a Set of strings needs over 100.
 * It never grows, so adding costs the same each time; room that is not used yet is not resident either.
 */
export interface ByteSet {
  readonly size: number
  /** Adding what is there already changes nothing. @throws RangeError when the set is full */
  add(bytes: Uint8Array): void
  has(bytes: Uint8Array): boolean
}

export function createByteSet(width: number, capacity: number): ByteSet {
  const records = new Uint8Array(width * capacity)
  // Open addressing: 0 is a free slot, else 1 + the index of a record. At least a third of the slots stays free.
  const slots = new Uint32Array(2 ** Math.ceil(Math.log2(1.5 * capacity + 2)))
  const mask = slots.length - 1
  // Whoever gets torrents onto a list could make infohashes that share a slot, if the hash had no key.
  const seed = randomBytes(4).readInt32LE()
  let size = 0

  /** The slot that has `bytes`, else the free one where they belong. */
  const find = (bytes: Uint8Array): number => {
    for (let slot = hash(bytes, width, seed) & mask; ; slot = (slot + 1) & mask) {
      const record = slots[slot] ?? 0
      if (record === 0 || same(records, (record - 1) * width, bytes, width)) return slot
    }
  }
  return {
    get size() {
      return size
    },
    add: (bytes) => {
      const slot = find(bytes)
      if (slots[slot] !== 0) return
      if (size === capacity) throw new RangeError(`Cannot add to a set of ${capacity}: it is full`)
      for (let i = 0; i < width; i++) records[size * width + i] = bytes[i] ?? 0
      slots[slot] = ++size
    },
    has: (bytes) => slots[find(bytes)] !== 0,
  }
}

function same(records: Uint8Array, at: number, bytes: Uint8Array, width: number): boolean {
  for (let i = 0; i < width; i++) if (records[at + i] !== bytes[i]) return false
  return true
}

function hash(bytes: Uint8Array, width: number, seed: number): number {
  let value = seed
  for (let i = 0; i < width; i++) {
    value = Math.imul(value ^ (bytes[i] ?? 0), 0x9e3779b1)
    value ^= value >>> 15
  }
  value = Math.imul(value, 0x85ebca6b)
  return value ^ (value >>> 16)
}
