import type { Family, Ip } from '../../lib/protocol/address.ts'
import { formatIp } from '../../lib/protocol/address.ts'
import type { Cidr } from '../../lib/protocol/cidr.ts'
import type { Place } from '../../lib/protocol/place.ts'

/** Longest-prefix match over networks. A look-up costs one Map access per prefix length in use. */
export interface PrefixTable {
  find(ip: Ip): Place | undefined
}

/** @throws Error naming each network that is given two places */
export function createPrefixTable(
  entries: readonly { readonly cidr: Cidr; readonly place: Place }[],
): PrefixTable {
  const faults: string[] = []
  const byFamily = {
    4: new Map<number, Map<number | bigint, Place>>(),
    6: new Map<number, Map<number | bigint, Place>>(),
  }
  for (const { cidr, place } of entries) {
    const lengths = byFamily[cidr.family]
    const networks = lengths.get(cidr.length) ?? new Map<number | bigint, Place>()
    lengths.set(cidr.length, networks)
    const key = keyOf(cidr.bytes, cidr.family, cidr.length)
    const other = networks.get(key)
    if (other !== undefined && other !== place) {
      faults.push(`topology.prefixes: ${formatIp(cidr)}/${cidr.length} is given as ${other} and as ${place}`)
    }
    networks.set(key, place)
  }
  if (faults.length > 0) throw new Error(faults.join('\n'))
  const longestFirst = (family: Family) => [...byFamily[family]].sort(([a], [b]) => b - a)
  const sorted = { 4: longestFirst(4), 6: longestFirst(6) }
  return {
    find: ({ family, bytes }) => {
      for (const [length, networks] of sorted[family]) {
        const place = networks.get(keyOf(bytes, family, length))
        if (place !== undefined) return place
      }
      return undefined
    },
  }
}

/** The first `length` bits as a number: an unsigned 32-bit integer for IPv4, a bigint for IPv6. */
function keyOf(bytes: Uint8Array, family: Family, length: number): number | bigint {
  if (family === 4) {
    if (length === 0) return 0
    return (word(bytes, 0) >>> (32 - length)) >>> 0
  }
  let value = 0n
  for (let i = 0; i < 4; i++) value = (value << 32n) | BigInt(word(bytes, 4 * i))
  return value >> BigInt(128 - length)
}

function word(bytes: Uint8Array, at: number): number {
  return (
    (((bytes[at] ?? 0) << 24) |
      ((bytes[at + 1] ?? 0) << 16) |
      ((bytes[at + 2] ?? 0) << 8) |
      (bytes[at + 3] ?? 0)) >>>
    0
  )
}
