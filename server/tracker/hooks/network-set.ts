import type { Family, Ip } from '../../../lib/protocol/address.ts'
import type { Cidr } from '../../../lib/protocol/cidr.ts'
import type { ByteSet } from './byte-set.ts'
import { createByteSet } from './byte-set.ts'

/** Networks, asked whether one of them contains an address: one look-up per prefix length in use. */
export interface NetworkSet {
  /** Distinct networks. */
  readonly size: number
  add(cidr: Cidr): void
  has(ip: Ip): boolean
}

export function createNetworkSet(capacity: number): NetworkSet {
  const byFamily = { 4: createFamily(4, capacity), 6: createFamily(6, capacity) }
  return {
    get size() {
      return byFamily[4].networks.size + byFamily[6].networks.size
    },
    add: ({ family, bytes, length }) => {
      const { networks, lengths, key } = byFamily[family]
      key.set(bytes)
      key[bytes.length] = length
      networks.add(key)
      if (lengths.includes(length)) return
      lengths.push(length)
      lengths.sort((a, b) => b - a)
    },
    has: ({ family, bytes }) => {
      const { networks, lengths, key } = byFamily[family]
      for (let i = 0; i < bytes.length; i++) key[i] = bytes[i] ?? 0
      // Longest first, so that each length only has to clear some more of the bits.
      for (const length of lengths) {
        clearFrom(key, length, bytes.length)
        key[bytes.length] = length
        if (networks.has(key)) return true
      }
      return false
    },
  }
}

interface FamilySet {
  /** Network addresses, each followed by its prefix length. */
  readonly networks: ByteSet
  /** Prefix lengths in use, longest first. */
  readonly lengths: number[]
  /** Where a key is put together. */
  readonly key: Uint8Array
}

function createFamily(family: Family, capacity: number): FamilySet {
  const width = family === 4 ? 5 : 17
  return { networks: createByteSet(width, capacity), lengths: [], key: new Uint8Array(width) }
}

function clearFrom(bytes: Uint8Array, bit: number, end: number): void {
  const whole = bit >> 3
  if (whole >= end) return
  bytes[whole] = (bytes[whole] ?? 0) & (0xff00 >> (bit & 7))
  for (let i = whole + 1; i < end; i++) bytes[i] = 0
}
