import type { Ip } from '../../lib/protocol/address.ts'
import { formatIp } from '../../lib/protocol/address.ts'
import type { Cidr } from '../../lib/protocol/cidr.ts'
import type { Place } from '../../lib/protocol/place.ts'
import { createPrefixTable } from './prefix-table.ts'

/**
 * A node of the topology (a rack, a row …) as 32 bits: a hash of its name and of the names above it, so that every thread, every
 * server and every start give the same place the same number, and strangers' places fill no table.
 */
export type PlaceId = number

/** A node above a place. */
export interface Ancestor {
  readonly node: PlaceId
  /** How far peers that meet only here are: 1 the same row … */
  readonly distance: number
}

/** The node above all others. */
export const rootPlace: PlaceId = 0

/**
 * Where hosts are and how far apart. A place is a leaf name (a rack); its parents come only from configuration.
 * A leaf that no configuration names is its own rack directly under the root.
 */
export interface Topology {
  /** The distance of peers that share only the root. */
  readonly levels: number
  idOf(place: Place): PlaceId
  /** The nodes above a place, nearest first; the last one is the root. */
  ancestorsOf(id: PlaceId): readonly Ancestor[]
  /** The place of an address: the longest prefix of the table, else the masked prefix itself as a place. */
  placeOfAddress(ip: Ip): PlaceId
  /** The name of that place. */
  nameOfAddress(ip: Ip): string
}

export interface TopologyConfig {
  /** Names of the levels, nearest first. */
  readonly levels: readonly string[]
  /** Each listed leaf's parents, nearest first: one for each level above its own. */
  readonly places: Readonly<Record<string, { readonly parents: readonly string[] }>>
  readonly prefixes: readonly { readonly cidr: Cidr; readonly place: Place }[]
  readonly ipv4PrefixLength: number
  readonly ipv6PrefixLength: number
}

/** Set in nodes above places alone: no place may pass for a row, whatever it is called. */
const nodeBit = 0x80000000

/** Whether a number may be that of a place, and is not that of a node above places. */
export function isLeafPlace(id: PlaceId): boolean {
  return id > rootPlace && id < nodeBit
}

/** Addresses whose place is remembered; when there are more, all are forgotten and looked up again. */
const rememberedMax = 65_536

/** @throws Error that names every place without all its parents, and every prefix that is given two places */
export function createTopology(config: TopologyConfig): Topology {
  const levels = Math.max(1, config.levels.length)
  checkPlaces(config, levels)
  const table = createPrefixTable(config.prefixes)
  const rootOnly: readonly Ancestor[] = [{ node: rootPlace, distance: levels }]
  // A row is named within its datacentre, so two of the same name are two; and a rack that moves to another row is another place.
  const chains = new Map(
    Object.entries(config.places).map(([name, { parents }]) => [name, [name, ...parents]]),
  )
  const idOf = (name: string) => (hashName(chains.get(name)?.join('\n') ?? name) & ~nodeBit) >>> 0 || 1
  const listed = new Map(
    [...chains].map(([name, chain]) => [
      idOf(name),
      [
        ...chain.slice(1).map((_, i) => ({
          node: (hashName(chain.slice(i + 1).join('\n')) | nodeBit) >>> 0,
          distance: i + 1,
        })),
        ...rootOnly,
      ],
    ]),
  )
  const nameOfAddress = (ip: Ip) =>
    table.find(ip) ?? maskedPrefix(ip, ip.family === 4 ? config.ipv4PrefixLength : config.ipv6PrefixLength)

  const remembered = { 4: new Map<number, PlaceId>(), 6: new Map<string, PlaceId>() }
  // Within a network of the longest prefix in use all addresses are in one place.
  const longest = (family: 4 | 6, fallback: number) =>
    config.prefixes.reduce(
      (most, { cidr }) => (cidr.family === family ? Math.max(most, cidr.length) : most),
      fallback,
    )
  const ipv4Shift = 32 - longest(4, config.ipv4PrefixLength)
  const ipv6Bytes = Math.ceil(longest(6, config.ipv6PrefixLength) / 8)

  const remember = <Key>(known: Map<Key, PlaceId>, key: Key, ip: Ip): PlaceId => {
    const there = known.get(key)
    if (there !== undefined) return there
    if (known.size >= rememberedMax) known.clear()
    const id = idOf(nameOfAddress(ip))
    known.set(key, id)
    return id
  }

  return {
    levels,
    idOf,
    ancestorsOf: (id) => listed.get(id) ?? rootOnly,
    placeOfAddress: (ip) => {
      const { family, bytes } = ip
      if (family === 6) return remember(remembered[6], latin1(bytes.subarray(0, ipv6Bytes)), ip)
      const word =
        ((bytes[0] ?? 0) << 24) | ((bytes[1] ?? 0) << 16) | ((bytes[2] ?? 0) << 8) | (bytes[3] ?? 0)
      return remember(remembered[4], ipv4Shift === 32 ? 0 : word >>> ipv4Shift, ip)
    },
    nameOfAddress,
  }
}

/** FNV-1a with the finaliser of MurmurHash3. */
function hashName(name: string): PlaceId {
  let hash = 0x811c9dc5
  for (const byte of Buffer.from(name)) hash = Math.imul(hash ^ byte, 0x01000193)
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b)
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35)
  return hash ^ (hash >>> 16)
}

/** `10.1.2.0/24`: how an address without a configured place is placed. */
function maskedPrefix({ family, bytes }: Ip, length: number): string {
  const masked = bytes.map((byte, i) => byte & (0xff << Math.max(0, Math.min(8, 8 - (length - 8 * i)))))
  return `${formatIp({ family, bytes: masked })}/${length}`
}

function latin1(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('latin1')
}

function checkPlaces({ places, levels: names }: TopologyConfig, levels: number): void {
  const faults = Object.entries(places)
    .filter(([, { parents }]) => parents.length !== levels - 1)
    .map(
      ([name, { parents }]) =>
        `topology.places.${name}: got ${parents.length} parents, need ${levels - 1} (${names.slice(1).join(', ')})`,
    )
  if (faults.length > 0) throw new Error(faults.join('\n'))
}
