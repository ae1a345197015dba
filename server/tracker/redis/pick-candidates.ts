import type { Family } from '../../../lib/protocol/address.ts'
import { PeerSample } from '../peer-store.ts'
import type { StoreAnnounce } from '../peer-store.ts'
import type { Plan } from '../selection.ts'
import { drawOf } from '../selection.ts'
import type { Found } from './announce-call.ts'
import type { NodeCounts } from './stretches.ts'
import { entryBytes, listOf } from './stretches.ts'

export interface Picked {
  readonly peers: PeerSample
  /** How many the plan wants that were not among what was found. */
  readonly missing: number
}

export interface PickInput {
  readonly announce: StoreAnnounce
  readonly endpoint: Uint8Array
  /** The announcer is in the counts. */
  readonly isStored: boolean
  readonly nodes: readonly NodeCounts[]
  readonly found: readonly Found[]
  readonly plan: Plan
}

type Kinds = 'seeders' | 'leechers' | 'both'

/** Takes at random of what was found what a plan wants of each level, nearest first, in random order within a level. @returns a function that does */
export function pickCandidates({
  sampleMax,
  random,
}: {
  sampleMax: number
  random: () => number
}): (input: PickInput) => Picked {
  const rows: Readonly<Record<Family, Row>> = { 4: emptyRow(sampleMax), 6: emptyRow(sampleMax) }
  /** Candidates of one level: which of what was found, and where in its bytes. */
  let sources = new Uint16Array(1024)
  let offsets = new Uint32Array(1024)

  /** Looks for who may be taken of a level. @returns how many */
  const gather = ({ announce, endpoint, found }: PickInput, level: number, kinds: Kinds, family: Family) => {
    const first = listOf(family, 0)
    const size = entryBytes(first)
    const own = branchOf(announce, level)
    const isOwnFamily = announce.source.family === family
    let there = 0
    for (const [source, { level: its, list, bytes, at, entries, isMixed }] of found.entries()) {
      if (its !== level || (kinds !== 'leechers' && list !== first && list !== first + 1)) continue
      if (kinds === 'leechers' ? list !== first + 1 : kinds === 'seeders' && list !== first) continue
      while (offsets.length < there + entries) {
        sources = grown(sources)
        offsets = grown(offsets)
      }
      for (let i = 0, offset = at; i < entries; i++, offset += size) {
        if (
          level === 0
            ? isOwnFamily && isAt(bytes, offset, endpoint)
            : isMixed && word(bytes, offset + size - 4) === own
        )
          continue
        sources[there] = source
        offsets[there++] = offset
      }
    }
    return there
  }

  /** Takes some of a level. @returns how many of those that are wanted were not there */
  const take = (input: PickInput, level: number, kinds: Kinds, family: Family, want: number): number => {
    const there = gather(input, level, kinds, family)
    const distance = level === 0 ? 0 : (input.announce.ancestors[level - 1]?.distance ?? 0)
    const row = rows[family]
    const taken = Math.min(want, there, sampleMax - row.length)
    for (let i = 0; i < taken; i++) {
      const at = i + Math.floor(random() * (there - i))
      row.sources[row.length] = sources[at] ?? 0
      row.offsets[row.length] = offsets[at] ?? 0
      row.distances[row.length++] = distance
      sources[at] = sources[i] ?? 0
      offsets[at] = offsets[i] ?? 0
    }
    return want - taken
  }

  return (input) => {
    const { announce, nodes, plan, isStored } = input
    const { family: ownFamily } = announce.source
    const own = isStored ? listOf(ownFamily, announce.left === 0 ? 0 : 1) : 0
    /** Peers of a list at a level, the announcer and nearer ones left out. */
    const available = (level: number, list: number): number => {
      const nearer = level > 0 ? (nodes[level - 1]?.peers[list - 1] ?? 0) : list === own ? 1 : 0
      return (nodes[level]?.peers[list - 1] ?? 0) - nearer
    }
    const ofFamily = (level: number, kinds: Kinds, family: Family): number => {
      if (announce.ownFamilyOnly && family !== ownFamily) return 0
      return (
        (kinds === 'leechers' ? 0 : available(level, listOf(family, 0))) +
        (kinds === 'seeders' ? 0 : available(level, listOf(family, 1)))
      )
    }
    rows[4].length = 0
    rows[6].length = 0
    let missing = 0
    /** Divides what is wanted between the families, as chance would if all stood in one list. */
    const share = (level: number, kinds: Kinds, want: number) => {
      if (want <= 0) return
      const [ipv4, ipv6] = [ofFamily(level, kinds, 4), ofFamily(level, kinds, 6)]
      const wanted = Math.min(want, ipv4 + ipv6)
      const ofIpv4 = ipv4 === 0 ? 0 : drawOf(ipv4, ipv6, wanted, random)
      if (ofIpv4 > 0) missing += take(input, level, kinds, 4, ofIpv4)
      if (wanted > ofIpv4) missing += take(input, level, kinds, 6, wanted - ofIpv4)
    }
    share(0, 'both', plan.rack)
    for (let level = 0; level <= announce.ancestors.length; level++) {
      const [from4, from6] = [rows[4].length, rows[6].length]
      const [seeders, leechers] = [plan.seeders[level] ?? 0, plan.leechers[level] ?? 0]
      share(level, 'seeders', seeders)
      share(level, 'leechers', leechers)
      if (seeders > 0 && leechers > 0) {
        shuffle(rows[4], from4, random)
        shuffle(rows[6], from6, random)
      }
    }
    return { peers: write(input, rows, sampleMax), missing }
  }
}

/** Peers that were taken: in which of what was found, and where. */
interface Row {
  length: number
  readonly sources: Uint16Array
  readonly offsets: Uint32Array
  readonly distances: Uint8Array
}

function emptyRow(max: number): Row {
  return {
    length: 0,
    sources: new Uint16Array(max),
    offsets: new Uint32Array(max),
    distances: new Uint8Array(max),
  }
}

function grown<Table extends Uint16Array | Uint32Array>(table: Table): Table {
  const larger = new (table.constructor as new (length: number) => Table)(table.length * 2)
  larger.set(table)
  return larger
}

/** The child of a level's node that the announcer is in: what marks entries of its own branch. */
function branchOf({ place, ancestors }: StoreAnnounce, level: number): number {
  return level <= 1 ? place : (ancestors[level - 2]?.node ?? 0)
}

function word(bytes: Uint8Array, at: number): number {
  return (
    ((bytes[at] ?? 0) |
      ((bytes[at + 1] ?? 0) << 8) |
      ((bytes[at + 2] ?? 0) << 16) |
      ((bytes[at + 3] ?? 0) << 24)) >>>
    0
  )
}

function isAt(bytes: Uint8Array, at: number, endpoint: Uint8Array): boolean {
  for (let i = endpoint.length; i-- > 0;) if (bytes[at + i] !== endpoint[i]) return false
  return true
}

/** Kinds together stand in one random order; each alone was drawn in one. */
function shuffle({ sources, offsets, length }: Row, from: number, random: () => number): void {
  for (let i = length - 1; i > from; i--) {
    const j = from + Math.floor(random() * (i - from + 1))
    for (const column of [sources, offsets]) {
      const swapped = column[i] ?? 0
      column[i] = column[j] ?? 0
      column[j] = swapped
    }
  }
}

/** A table of its own for each reply, since several are under way; where peer_ids are asked for, with room for them and for what hooks may add. */
function write(
  { announce, found }: PickInput,
  rows: Readonly<Record<Family, Row>>,
  sampleMax: number,
): PeerSample {
  const peers = announce.withPeerIds
    ? new PeerSample(sampleMax)
    : new PeerSample({ 4: rows[4].length, 6: rows[6].length }, false)
  for (const family of [4, 6] as const) {
    const { length, sources, offsets, distances } = rows[family]
    if (length === 0) continue
    const compact = peers.compact[family]
    const size = family === 4 ? 6 : 18
    for (let i = 0, to = 0; i < length; i++) {
      const bytes = found[sources[i] ?? 0]?.bytes
      const from = offsets[i] ?? 0
      if (bytes) for (let j = 0; j < size; j++) compact[to++] = bytes[from + j] ?? 0
    }
    peers.distances[family].set(distances.subarray(0, length))
    peers.lengths[family] = length
  }
  return peers
}
