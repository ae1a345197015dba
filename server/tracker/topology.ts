import type { Ip } from '../../lib/protocol/address.ts'
import { ipTextMax, writeIp } from '../../lib/protocol/address.ts'
import type { Cidr } from '../../lib/protocol/cidr.ts'
import type { Place } from '../../lib/protocol/place.ts'
import type { PrefixRule, PrefixTable } from './prefix-table.ts'
import { createPrefixTableBuilder, findRule, placeOfRule, rulesAround } from './prefix-table.ts'

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
  /** By distance: which share of what nearer ones leave of a reply's far places is for those at that distance. */
  readonly shares: readonly number[]
  idOf(place: Place): PlaceId
  /** The nodes above a place, nearest first; the last one is the root. */
  ancestorsOf(id: PlaceId): readonly Ancestor[]
  /** The place of an address: the longest prefix of the table, else the masked prefix itself as a place. */
  placeOfAddress(ip: Ip): PlaceId
  /** The name of that place. */
  nameOfAddress(ip: Ip): string
  /** The networks that have places. */
  readonly table: PrefixTable
  /** Why an address is where it is. */
  explain(ip: Ip): PlaceExplanation
}

export interface PlaceExplanation {
  readonly place: string
  /** The network that decided. Without a rule it is the one of the prefix length. */
  readonly network: string
  readonly rule: PrefixRule | undefined
  /** Whether `places` names it. */
  readonly listed: boolean
  /** The parents with the names of their levels, nearest first. */
  readonly parents: readonly { readonly level: string; readonly name: string }[]
  /** Shorter networks that contain the address too, longest first. */
  readonly lost: readonly PrefixRule[]
}

/** Its name alone, or with what it costs to leave a node of it. */
export type Level =
  | string
  | {
      readonly name: string
      /** Of a byte that leaves a node, in whatever unit all levels have. */
      readonly cost?: number | undefined
      /** Bytes a second of a node's uplink. */
      readonly capacity?: number | undefined
    }

export interface TopologyConfig {
  /** Nearest first. */
  readonly levels: readonly Level[]
  /** Each listed leaf's parents, nearest first: one for each level above its own. */
  readonly places: Readonly<Record<string, { readonly parents: readonly string[] }>>
  /** Networks and their places, or the table of them where they have been compiled already. */
  readonly prefixes: readonly PrefixEntry[] | PrefixTable
  readonly ipv4PrefixLength: number
  readonly ipv6PrefixLength: number
}

export interface PrefixEntry {
  readonly cidr: Cidr
  readonly place: Place
}

/** Where a rule was given: in a line of `topology.table`, or in an entry of `topology.prefixes`. */
export type RuleSource =
  { readonly kind: 'table'; readonly line: number } | { readonly kind: 'prefixes'; readonly index: number }

/** The source of an entry of `topology.prefixes`; that of a line of the table is its number. */
export function sourceOfPrefix(index: number): number {
  return -index - 1
}

export function sourceOf({ source }: PrefixRule): RuleSource {
  return source > 0 ? { kind: 'table', line: source } : { kind: 'prefixes', index: -source - 1 }
}

/** `topology.prefixes.3`, or `line 17`. */
export function describeSource(rule: PrefixRule): string {
  const source = sourceOf(rule)
  return source.kind === 'table' ? `line ${source.line}` : `topology.prefixes.${source.index}`
}

/** Set in nodes above places alone: no place may pass for a row, whatever it is called. */
const nodeBit = 0x80000000

/** Whether a number may be that of a place, and is not that of a node above places. */
export function isLeafPlace(id: PlaceId): boolean {
  return id > rootPlace && id < nodeBit
}

/** @throws Error that names every place without all its parents, and every prefix that is given two places */
export function createTopology(config: TopologyConfig): Topology {
  const levels = levelCount(config)
  const names = config.levels.map((level) => (typeof level === 'string' ? level : level.name))
  checkPlaces(config, names)
  const table = 'families' in config.prefixes ? config.prefixes : compilePrefixes(config.prefixes)
  const rootOnly: readonly Ancestor[] = [{ node: rootPlace, distance: levels }]
  // A row is named within its datacentre, so two of the same name are two; and a rack that moves to another row is another place.
  const chains = new Map(
    Object.entries(config.places).map(([name, { parents }]) => [name, [name, ...parents]]),
  )
  const idOf = (name: string) => leafOf(hashName(chains.get(name)?.join('\n') ?? name))
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
  /** Of the places of the table, once they are asked for. */
  const ids = new Uint32Array(table.places.length)
  const idAt = (index: number): PlaceId => (ids[index] = idOf(table.places[index] ?? ''))
  const masked = { 4: createMask(config.ipv4PrefixLength), 6: createMask(config.ipv6PrefixLength) }
  /** Places that are called like a network may be listed, too: by the number that they would have if they were not. */
  const listedNetworks = new Map(
    [...chains.keys()]
      .filter((name) => name.includes('/'))
      .map((name) => [leafOf(hashName(name)), idOf(name)]),
  )
  const nameOfAddress = (ip: Ip) => {
    const rule = findRule(table, ip)
    return rule < 0 ? masked[ip.family].text(ip) : (table.places[placeOfRule(table, ip.family, rule)] ?? '')
  }

  return {
    levels,
    shares: sharesOf(config.levels, levels),
    idOf,
    ancestorsOf: (id) => listed.get(id) ?? rootOnly,
    placeOfAddress: (ip) => {
      const rule = findRule(table, ip)
      if (rule >= 0) {
        const index = placeOfRule(table, ip.family, rule)
        return ids[index] || idAt(index)
      }
      const id = leafOf(masked[ip.family].hash(ip))
      return listedNetworks.get(id) ?? id
    },
    nameOfAddress,
    table,
    explain: (ip) => {
      const [rule, ...lost] = rulesAround(table, ip)
      const place = nameOfAddress(ip)
      const parents = chains.get(place)?.slice(1)
      return {
        place,
        network: rule?.network ?? masked[ip.family].text(ip),
        rule,
        listed: parents !== undefined,
        parents: (parents ?? []).map((name, i) => ({ level: names[i + 1] ?? '', name })),
        lost,
      }
    },
  }
}

/** The number of levels; one, where none has a name. */
export function levelCount({ levels }: Pick<TopologyConfig, 'levels'>): number {
  return Math.max(1, levels.length)
}

/**
 * Where levels have a `cost` or a `capacity`, the far places of a reply are shared in proportion to capacity ÷ cost of the way:
 * that to distance 2 leaves a rack and a row, so it costs the sum of theirs, and carries what the narrower one does. A level without a
 * cost costs 1; a way without any capacity is as wide as the widest that has one. Where no level has either, each distance has half of
 * what nearer ones leave.
 */
function sharesOf(config: readonly Level[], levels: number): number[] {
  const given = config.map((level) => (typeof level === 'string' ? { name: level } : level))
  const capacities = given.flatMap(({ capacity }) => (capacity === undefined ? [] : [capacity]))
  const widest = capacities.length > 0 ? Math.max(...capacities) : 1
  const isPlain = capacities.length === 0 && given.every(({ cost }) => cost === undefined)
  let cost = 0
  let capacity = Number.POSITIVE_INFINITY
  const weights = given.slice(0, levels).map((level) => {
    cost += level.cost ?? 1
    capacity = Math.min(capacity, level.capacity ?? capacity)
    return Math.min(capacity, widest) / cost
  })
  return [
    0,
    ...Array.from({ length: levels }, (_, i) => {
      if (i === levels - 1) return 1
      if (isPlain) return 1 / 2
      return (weights[i] ?? 0) / weights.slice(i).reduce((sum, weight) => sum + weight, 0)
    }),
  ]
}

function compilePrefixes(entries: readonly PrefixEntry[]): PrefixTable {
  const builder = createPrefixTableBuilder()
  for (const [i, { cidr, place }] of entries.entries()) builder.add(cidr, place, sourceOfPrefix(i))
  const { table, conflicts } = builder.build()
  // Each of the two has a line in the file.
  const faults = conflicts.examples.flatMap(({ first, second }) => [
    conflictOf(first, second),
    conflictOf(second, first),
  ])
  if (faults.length > 0) throw new Error(faults.join('\n'))
  return table
}

function conflictOf(one: PrefixRule, other: PrefixRule): string {
  return `${describeSource(one)}: ${one.network} is given as ${one.place} here, and as ${other.place} in ${describeSource(other)}: keep one of the two`
}

function leafOf(hash: number): PlaceId {
  return (hash & ~nodeBit) >>> 0 || 1
}

function hashName(name: string): number {
  const bytes = Buffer.from(name)
  return hashBytes(bytes, bytes.length)
}

/** FNV-1a with the finaliser of MurmurHash3. */
function hashBytes(bytes: Uint8Array, length: number): number {
  let hash = 0x811c9dc5
  for (let i = 0; i < length; i++) hash = Math.imul(hash ^ (bytes[i] ?? 0), 0x01000193)
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b)
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35)
  return hash ^ (hash >>> 16)
}

/** `10.1.2.0/24`: how an address without a configured place is placed; and its hash, which needs no string. */
function createMask(length: number): { text(ip: Ip): string; hash(ip: Ip): number } {
  const suffix = Buffer.from(`/${length}`)
  const text = Buffer.alloc(ipTextMax + suffix.length)
  const bytes = { 4: new Uint8Array(4), 6: new Uint8Array(16) }
  const write = (ip: Ip): number => {
    const network = bytes[ip.family]
    for (let i = 0; i < network.length; i++) {
      const bits = length - 8 * i
      network[i] = (ip.bytes[i] ?? 0) & (bits >= 8 ? 0xff : bits <= 0 ? 0 : 0xff << (8 - bits))
    }
    const end = writeIp({ family: ip.family, bytes: network }, text, 0)
    text.set(suffix, end)
    return end + suffix.length
  }
  return {
    text: (ip) => text.toString('latin1', 0, write(ip)),
    hash: (ip) => hashBytes(text, write(ip)),
  }
}

function checkPlaces(config: TopologyConfig, names: readonly string[]): void {
  const needed = levelCount(config) - 1
  const faults = Object.entries(config.places)
    .filter(([, { parents }]) => parents.length !== needed)
    .map(
      ([name, { parents }]) =>
        `topology.places.${name}: got ${parents.length} parents, need ${needed} (${names.slice(1).join(', ')})`,
    )
  if (faults.length > 0) throw new Error(faults.join('\n'))
}
