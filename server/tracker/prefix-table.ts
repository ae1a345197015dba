import type { Family, Ip } from '../../lib/protocol/address.ts'
import { formatIp } from '../../lib/protocol/address.ts'
import type { Cidr } from '../../lib/protocol/cidr.ts'
import type { Place } from '../../lib/protocol/place.ts'

/**
 * Networks with their places, compiled so that the longest one that contains an address is found by a search through a sorted
 * list. Plain data, for threads to be given.
 */
export interface PrefixTable {
  readonly places: readonly Place[]
  readonly families: Readonly<Record<Family, FamilyTable>>
}

/** Nested networks cut the addresses into ranges, in each of which one of them is the longest: its rule holds there. */
interface FamilyTable {
  /** The first address of each range, in order, as one or four words; the first range begins at 0. */
  readonly starts: Uint32Array
  /** The rule that holds in each range; -1 for none. */
  readonly holds: Int32Array
  /** Of each rule. */
  readonly rules: RuleColumns & {
    /** The longest of the shorter networks around it; -1 for none. */
    readonly around: Int32Array
  }
}

interface RuleColumns {
  /** The network address, as one or four words. */
  readonly networks: Uint32Array
  readonly lengths: Uint8Array
  /** Which of `places`. */
  readonly places: Uint32Array
  readonly sources: Int32Array
}

/** A network as it was given. */
export interface PrefixRule {
  /** `10.2.17.0/24` */
  readonly network: string
  readonly place: Place
  /** What `add` was told. */
  readonly source: number
}

/** A network that was given two places. */
export interface PrefixConflict {
  readonly first: PrefixRule
  readonly second: PrefixRule
}

export interface PrefixTableBuilder {
  readonly size: number
  /** `source` says where this was found, to whoever asks for the rule; it means nothing here. */
  add(cidr: Cidr, place: Place, source: number): void
  /** Of networks with two places the first one counts. */
  build(): { readonly table: PrefixTable; readonly conflicts: PrefixConflicts }
}

export interface PrefixConflicts {
  readonly count: number
  /** At most `conflictsMax` of each family; more tell nobody more. */
  readonly examples: readonly PrefixConflict[]
}

const conflictsMax = 20

export function createPrefixTableBuilder(): PrefixTableBuilder {
  const places = new Map<Place, number>()
  const given = { 4: createColumns(4), 6: createColumns(6) }
  return {
    get size() {
      return given[4].lengths.length + given[6].lengths.length
    },
    add: ({ family, bytes, length }, place, source) => {
      const columns = given[family]
      for (let at = 0; at < bytes.length; at += 4) columns.networks.push(word(bytes, at))
      columns.lengths.push(length)
      columns.sources.push(source)
      let index = places.get(place)
      if (index === undefined) places.set(place, (index = places.size))
      columns.places.push(index)
    },
    build: () => {
      const names = [...places.keys()]
      const [v4, v6] = [compile(given[4], names), compile(given[6], names)]
      return {
        table: { places: names, families: { 4: v4.table, 6: v6.table } },
        conflicts: {
          count: v4.conflicts.count + v6.conflicts.count,
          examples: [...v4.conflicts.examples, ...v6.conflicts.examples],
        },
      }
    },
  }
}

/** The rule of the longest network that contains the address, as a number; -1 where none does. */
export function findRule(table: PrefixTable, { family, bytes }: Ip): number {
  const { starts, holds } = table.families[family]
  return holds[family === 4 ? rangeOfIpv4(starts, word(bytes, 0)) : rangeOfIpv6(starts, bytes)] ?? -1
}

/** Which of `places` a rule says. */
export function placeOfRule({ families }: PrefixTable, family: Family, rule: number): number {
  return families[family].rules.places[rule] ?? 0
}

/** All networks that contain the address, longest first. */
export function rulesAround(table: PrefixTable, ip: Ip): PrefixRule[] {
  const { rules } = table.families[ip.family]
  const found: PrefixRule[] = []
  for (let rule = findRule(table, ip); rule >= 0; rule = rules.around[rule] ?? -1)
    found.push(ruleAt(rules, table.places, ip.family, rule))
  return found
}

/** All networks, IPv4 first, in the order of their addresses. */
export function* rulesOf({ families, places }: PrefixTable): Generator<PrefixRule> {
  for (const family of [4, 6] as const) {
    const { rules } = families[family]
    for (let rule = 0; rule < rules.lengths.length; rule++) yield ruleAt(rules, places, family, rule)
  }
}

/** How many networks there are, and how many of them lie within another one. */
export function countRules({ families }: PrefixTable, family: Family): { networks: number; nested: number } {
  const { around } = families[family].rules
  return { networks: around.length, nested: around.reduce((sum, rule) => sum + (rule >= 0 ? 1 : 0), 0) }
}

function rangeOfIpv4(starts: Uint32Array, address: number): number {
  let low = 0
  let high = starts.length
  while (high - low > 1) {
    const middle = (low + high) >>> 1
    if ((starts[middle] ?? 0) <= address) low = middle
    else high = middle
  }
  return low
}

function rangeOfIpv6(starts: Uint32Array, bytes: Uint8Array): number {
  const a = word(bytes, 0)
  const b = word(bytes, 4)
  const c = word(bytes, 8)
  const d = word(bytes, 12)
  let low = 0
  let high = starts.length >>> 2
  while (high - low > 1) {
    const middle = (low + high) >>> 1
    const at = middle << 2
    let difference = (starts[at] ?? 0) - a
    if (difference === 0) difference = (starts[at + 1] ?? 0) - b
    if (difference === 0) difference = (starts[at + 2] ?? 0) - c
    if (difference === 0) difference = (starts[at + 3] ?? 0) - d
    if (difference <= 0) low = middle
    else high = middle
  }
  return low
}

interface GivenColumns {
  readonly family: Family
  readonly width: number
  readonly networks: number[]
  readonly lengths: number[]
  readonly places: number[]
  readonly sources: number[]
}

function createColumns(family: Family): GivenColumns {
  return { family, width: family === 4 ? 1 : 4, networks: [], lengths: [], places: [], sources: [] }
}

function compile(
  given: GivenColumns,
  names: readonly Place[],
): { table: FamilyTable; conflicts: PrefixConflicts } {
  const { family, width } = given
  const { rules, conflicts } = sortRules(given)
  return {
    table: cutIntoRanges(rules, width),
    conflicts: {
      count: conflicts.length,
      examples: conflicts.slice(0, conflictsMax).map(([first, second]) => ({
        first: ruleAt(given, names, family, first),
        second: ruleAt(given, names, family, second),
      })),
    },
  }
}

/** By network, shorter ones before those within them, each once; and the pairs that name one network with two places. */
function sortRules(given: GivenColumns): { rules: RuleColumns; conflicts: [number, number][] } {
  const { width, lengths, places, sources } = given
  const networks = Uint32Array.from(given.networks)
  const compareNetworks = (a: number, b: number) => {
    for (let i = 0; i < width; i++) {
      const difference = (networks[a * width + i] ?? 0) - (networks[b * width + i] ?? 0)
      if (difference !== 0) return difference
    }
    return (lengths[a] ?? 0) - (lengths[b] ?? 0)
  }
  // Most pairs differ in their first 53 bits, which are one number.
  const heads = Float64Array.from(
    lengths,
    (_, i) =>
      (networks[i * width] ?? 0) * 2 ** 21 + (width === 1 ? 0 : (networks[i * width + 1] ?? 0) >>> 11),
  )
  const order = Uint32Array.from(lengths, (_, i) => i).sort(
    (a, b) => (heads[a] ?? 0) - (heads[b] ?? 0) || compareNetworks(a, b) || a - b,
  )
  const conflicts: [number, number][] = []
  const kept: number[] = []
  for (const rule of order) {
    const before = kept.at(-1)
    if (before === undefined || compareNetworks(before, rule) !== 0) kept.push(rule)
    else if (places[before] !== places[rule]) conflicts.push([before, rule])
  }
  return {
    rules: {
      networks: Uint32Array.from(
        { length: kept.length * width },
        (_, i) => networks[(kept[Math.floor(i / width)] ?? 0) * width + (i % width)] ?? 0,
      ),
      lengths: Uint8Array.from(kept, (rule) => lengths[rule] ?? 0),
      places: Uint32Array.from(kept, (rule) => places[rule] ?? 0),
      sources: Int32Array.from(kept, (rule) => sources[rule] ?? 0),
    },
    conflicts,
  }
}

/** Walks through the sorted rules, and keeps those open that contain where it is. */
function cutIntoRanges(rules: RuleColumns, width: number): FamilyTable {
  const { networks, lengths } = rules
  const starts: number[] = new Array<number>(width).fill(0)
  const holds = [-1]
  const around = new Int32Array(lengths.length)
  const open: number[] = []
  const after = new Uint32Array(width)

  const begin = (address: Uint32Array, at: number, rule: number) => {
    let isSame = true
    for (let i = 0; i < width; i++) if (starts[starts.length - width + i] !== address[at + i]) isSame = false
    if (isSame) {
      holds[holds.length - 1] = rule
      return
    }
    for (let i = 0; i < width; i++) starts.push(address[at + i] ?? 0)
    holds.push(rule)
  }
  const close = (rule: number) => {
    open.pop()
    for (let i = 0; i < width; i++) after[i] = networks[rule * width + i] ?? 0
    if (skip(after, lengths[rule] ?? 0)) begin(after, 0, open.at(-1) ?? -1)
  }
  for (let rule = 0; rule < lengths.length; rule++) {
    for (let last = open.at(-1); last !== undefined; last = open.at(-1)) {
      if (contains(rules, width, last, rule)) break
      close(last)
    }
    around[rule] = open.at(-1) ?? -1
    open.push(rule)
    begin(networks, rule * width, rule)
  }
  for (let last = open.at(-1); last !== undefined; last = open.at(-1)) close(last)
  return { starts: Uint32Array.from(starts), holds: Int32Array.from(holds), rules: { ...rules, around } }
}

/** Whether the second network lies within the first, which is not the longer one. */
function contains({ networks, lengths }: RuleColumns, width: number, outer: number, inner: number): boolean {
  const length = lengths[outer] ?? 0
  for (let i = 0; 32 * i < length; i++) {
    const differs = (networks[outer * width + i] ?? 0) ^ (networks[inner * width + i] ?? 0)
    const bits = Math.min(32, length - 32 * i)
    if (differs >>> (32 - bits) !== 0) return false
  }
  return true
}

/** Makes a network's address the first one after it. @returns false where there is none */
function skip(address: Uint32Array, length: number): boolean {
  if (length === 0) return false
  let at = (length - 1) >> 5
  let sum = (address[at] ?? 0) + 2 ** (31 - ((length - 1) & 31))
  address[at] = sum
  while (sum >= 2 ** 32) {
    if (--at < 0) return false
    sum = (address[at] ?? 0) + 1
    address[at] = sum
  }
  return true
}

function ruleAt(
  columns: { readonly [Column in keyof RuleColumns]: ArrayLike<number> },
  names: readonly Place[],
  family: Family,
  rule: number,
): PrefixRule {
  const bytes = new Uint8Array(family === 4 ? 4 : 16)
  const width = bytes.length / 4
  const view = new DataView(bytes.buffer)
  for (let i = 0; i < width; i++) view.setUint32(4 * i, columns.networks[rule * width + i] ?? 0)
  const place = names[columns.places[rule] ?? -1]
  if (place === undefined) throw new Error(`Cannot describe rule ${rule}: it has no place`)
  return {
    network: `${formatIp({ family, bytes })}/${columns.lengths[rule] ?? 0}`,
    place,
    source: columns.sources[rule] ?? 0,
  }
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
