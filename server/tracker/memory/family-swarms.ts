import type { Family } from '../../../lib/protocol/address.ts'
import type { Ancestor, PlaceId } from '../topology.ts'
import { rootPlace } from '../topology.ts'
import { FreeList } from './free-list.ts'
import { HashIndex, finish, mix, none } from './hash-index.ts'
import { Lists } from './lists.ts'
import type { SharedArrays } from './shared-arrays.ts'

/** What a peer is in its swarm; also the index of its list in a group. */
export type Kind = 0 | 1
export const seeder: Kind = 0
export const leecher: Kind = 1

/** Peers in a block: one cache line of handles. */
const blockBits = 3
export const blockSize = 1 << blockBits
/** The first block of a place's leechers holds those with the lowest ranks, its gateways first of all. */
export const rankedMax = blockSize
/** How many leechers are looked at for the next lowest rank when one of the lowest leaves: more than a rack has hosts. */
const rankScanMax = 1024

const noGroup = 0xffffffff
const kindBit = 0x80
/** In a list of blocks: how many of its slots are in use, below the block. */
const fillBits = 4
const fillMask = 0xf

/** A peer's record: where it stands, its neighbours in the wheel, when it is due, and its peer_id. One cache line, or two. */
const recordWords = 9
const nextWord = 0
const slotWord = 1
const previousWord = 2
const tickWord = 3
const peerIdAt = 16
/** In place of the slot: the record is not in use. */
const free = 0xffffffff

export interface FamilySwarmsOptions {
  readonly family: Family
  readonly peersMax: number
  readonly swarmsMax: number
  /** Levels of the topology: the distance of the root, and so of the longest path to it. */
  readonly levels: number
  readonly seed: number
}

/**
 * The peers of one address family: fixed records in typed arrays, a handle being an index, found by swarm and endpoint.
 *
 * Where they are: a *group* is a node of the topology (a rack, its row …, the root) in one swarm, with lists of its seeders and
 * leechers. Peers stand in *blocks* of eight *slots*, each block in one rack and of one kind, all full but the last. A rack lists its
 * blocks, and so does each group above it, so that a random peer of any level is a random block and a random slot of it: nothing
 * walks the swarm, and a level above costs a word per eight peers. Joining, leaving and changing kind are a few words each.
 * Endpoints lie in their slots, side by side: with millions of peers it is cache misses that a reply costs.
 */
export class FamilySwarms {
  readonly endpointBytes: number
  readonly #seed: number
  readonly #levels: number

  readonly #records: Uint32Array
  readonly #recordBytes: Uint8Array
  readonly #wheel: Uint32Array
  readonly #peers: FreeList
  readonly #index: HashIndex

  /** Handles and endpoints by slot: block and position in it. */
  readonly #entries: Uint32Array
  readonly endpoints: Uint8Array
  /** The same as 16-bit halves, in the byte order of the machine: for copying. */
  readonly endpointHalves: Uint16Array
  /** How many of the eight are in use; `kindBit` set in a block of leechers. */
  readonly #fills: Uint8Array
  readonly #blockGroups: Uint32Array
  /** Where a block stands in the list of the group at each distance; the rack's own list needs none, since it is a stack. */
  readonly #positions: readonly Uint32Array[]
  readonly #blocks: FreeList

  readonly #nodes: Uint32Array
  readonly #swarms: Uint32Array
  readonly #distances: Uint8Array
  readonly #parents: Uint32Array
  readonly #firstChildren: Uint32Array
  readonly #nextSiblings: Uint32Array
  readonly #previousSiblings: Uint32Array
  readonly #counts: readonly [Uint32Array, Uint32Array]
  readonly #groups: FreeList
  readonly #groupIndex: HashIndex
  readonly #lists: Lists
  /** Root group of each swarm, plus one. */
  readonly #roots: Uint32Array
  /** Five words for each swarm. */
  readonly #infoHashes: Uint32Array

  constructor(
    arrays: SharedArrays,
    { roots, infoHashes }: { roots: Uint32Array; infoHashes: Uint32Array },
    options: FamilySwarmsOptions,
  ) {
    const { family, peersMax, levels } = options
    const name = (field: string) => `ipv${family}.${field}`
    const u32 = (field: string, length: number) => arrays.u32(name(field), length)
    this.endpointBytes = family === 4 ? 6 : 18
    this.#seed = options.seed
    this.#levels = levels
    this.#roots = roots
    this.#infoHashes = infoHashes

    this.#records = u32('records', peersMax * recordWords)
    this.#recordBytes = new Uint8Array(this.#records.buffer)
    this.#wheel = u32('wheel', wheelSlots)
    this.#peers = new FreeList(arrays, name('peers'), this.#records, recordWords)
    this.#index = new HashIndex(arrays, name('index'), peersMax, (handle) =>
      this.#hash(this.swarmOf(handle), this.endpoints, this.slotOf(handle) * this.endpointBytes),
    )

    // At worst every peer is alone in its rack.
    this.#entries = u32('entries', peersMax * blockSize)
    this.endpoints = arrays.u8(name('endpoints'), peersMax * blockSize * this.endpointBytes)
    this.endpointHalves = new Uint16Array(this.endpoints.buffer)
    this.#fills = arrays.u8(name('fills'), peersMax)
    this.#blockGroups = u32('blockGroups', peersMax)
    this.#positions = Array.from({ length: levels + 1 }, (_, distance) =>
      u32(`positions.${distance}`, distance === 0 ? 0 : peersMax),
    )
    this.#blocks = new FreeList(arrays, name('blocks'), this.#blockGroups)

    // At worst every peer is alone on every level below the root, of which each swarm has one.
    const groupsMax = Math.min(peersMax, options.swarmsMax) + (peersMax + 64) * levels
    this.#nodes = u32('nodes', groupsMax)
    this.#swarms = u32('swarms', groupsMax)
    this.#distances = arrays.u8(name('distances'), groupsMax)
    this.#parents = u32('parents', groupsMax)
    this.#firstChildren = u32('firstChildren', groupsMax)
    this.#nextSiblings = u32('nextSiblings', groupsMax)
    this.#previousSiblings = u32('previousSiblings', groupsMax)
    this.#counts = [u32('seeders', groupsMax), u32('leechers', groupsMax)]
    this.#groups = new FreeList(arrays, name('groups'), this.#nextSiblings)
    this.#groupIndex = new HashIndex(arrays, name('groupIndex'), groupsMax, (group) =>
      this.#groupHash(this.#swarms[group] ?? 0, this.#nodes[group] ?? 0),
    )
    this.#lists = new Lists(arrays, name('lists'), {
      listsMax: groupsMax * 2,
      valuesMax: peersMax * (levels + 1),
    })
  }

  get used(): number {
    return this.#peers.used
  }

  /** Handles below this may be in use. */
  get touched(): number {
    return this.#peers.touched
  }

  isUsed(handle: number): boolean {
    return this.slotOf(handle) !== free
  }

  /** Whether one more peer, in a place and swarm of its own, is sure to fit. */
  hasRoom(): boolean {
    return (
      this.#peers.has(1) && this.#blocks.has(1) && this.#groups.has(this.#levels + 1) && this.#lists.hasRoom()
    )
  }

  /** The handle of a peer, or -1. `endpoint` holds `endpointBytes` bytes. */
  find(swarm: number, endpoint: Uint8Array): number {
    const hash = this.#hash(swarm, endpoint, 0)
    const index = this.#index
    for (let found = index.first(hash); found !== none; found = index.next(hash))
      if (this.#isAt(found, endpoint) && this.swarmOf(found) === swarm) return found
    return -1
  }

  /** Adds a peer that is not there; it is in no wheel slot yet. @returns its handle */
  add(
    swarm: number,
    endpoint: Uint8Array,
    where: { readonly place: PlaceId; readonly ancestors: readonly Ancestor[] },
    kind: Kind,
  ): number {
    const handle = this.#peers.take()
    this.#records[handle * recordWords + previousWord] = unlinked
    this.#index.insert(this.#hash(swarm, endpoint, 0), handle)
    this.#enter(handle, endpoint, this.#groupFor(swarm, where), kind)
    return handle
  }

  /** Moves a peer to another place or kind, if that is another. */
  move(
    handle: number,
    where: { readonly place: PlaceId; readonly ancestors: readonly Ancestor[] },
    kind: Kind,
  ): void {
    const group = this.groupOf(handle)
    if (this.#nodes[group] === where.place && this.kindOf(handle) === kind) return
    const swarm = this.#swarms[group] ?? 0
    const endpoint = this.endpointOf(handle)
    this.#leave(handle)
    this.#enter(handle, endpoint, this.#groupFor(swarm, where), kind)
  }

  remove(handle: number): void {
    this.#index.remove(
      this.#hash(this.swarmOf(handle), this.endpoints, this.slotOf(handle) * this.endpointBytes),
      handle,
    )
    this.#leave(handle)
    this.#unlink(handle)
    this.#records[handle * recordWords + slotWord] = free
    this.#peers.give(handle)
  }

  /** Takes the 20 bytes at `from`. */
  setPeerId(handle: number, bytes: Uint8Array, from: number): void {
    const at = handle * recordWords * 4 + peerIdAt
    for (let i = 0; i < 20; i++) this.#recordBytes[at + i] = bytes[from + i] ?? 0
  }

  /** A view of its 20 bytes. */
  peerIdOf(handle: number): Uint8Array {
    const at = handle * recordWords * 4 + peerIdAt
    return this.#recordBytes.subarray(at, at + 20)
  }

  /** A copy of its `endpointBytes` bytes. */
  endpointOf(handle: number): Uint8Array {
    const at = this.slotOf(handle) * this.endpointBytes
    return this.endpoints.slice(at, at + this.endpointBytes)
  }

  /** Where the peer stands among the blocks; moves with the comings and goings of others. */
  slotOf(handle: number): number {
    return this.#records[handle * recordWords + slotWord] ?? 0
  }

  /** The peer that stands there. */
  handleAt(slot: number): number {
    return this.#entries[slot] ?? 0
  }

  swarmOf(handle: number): number {
    return this.#swarms[this.groupOf(handle)] ?? 0
  }

  placeOf(handle: number): PlaceId {
    return this.#nodes[this.groupOf(handle)] ?? 0
  }

  kindOf(handle: number): Kind {
    return ((this.#fills[this.slotOf(handle) >>> blockBits] ?? 0) & kindBit) === 0 ? seeder : leecher
  }

  /** The rack of a peer in its swarm. */
  groupOf(handle: number): number {
    return this.#blockGroups[this.slotOf(handle) >>> blockBits] ?? 0
  }

  /** The group above another, or -1. */
  parentOf(group: number): number {
    const parent = this.#parents[group] ?? noGroup
    return parent === noGroup ? -1 : parent
  }

  /** The group of a node in a swarm, or -1. */
  groupAt(swarm: number, node: PlaceId): number {
    if (node === rootPlace) return (this.#roots[swarm] ?? 0) - 1
    const hash = this.#groupHash(swarm, node)
    const index = this.#groupIndex
    for (let found = index.first(hash); found !== none; found = index.next(hash))
      if (this.#nodes[found] === node && this.#swarms[found] === swarm) return found
    return -1
  }

  /** Peers of a kind in a group; 0 for -1. */
  count(group: number, kind: Kind): number {
    return group < 0 ? 0 : (this.#counts[kind][group] ?? 0)
  }

  /** How many leechers of its rack come before this one by rank; `rankedMax` for all that are not among the first. */
  rankOf(handle: number): number {
    const slot = this.slotOf(handle)
    const block = slot >>> blockBits
    const entry = this.#lists.get(listOf(this.groupOf(handle), leecher), 0)
    if (entry >>> fillBits !== block) return rankedMax
    const own = this.#rank(slot)
    let before = 0
    for (let i = entry & fillMask; i-- > 0;) if (this.#rank((block << blockBits) + i) < own) before++
    return before
  }

  /**
   * Draws a block of a kind in `group` that is not in `except` (a group below it, or -1), and a slot of it, from which on `run` slots
   * round the block are to be taken, or all where it has fewer: so every peer is as likely to be met.
   *
   * @returns the slot; -1 where none was met
   */
  draw(group: number, except: number, kind: Kind, run: number, random: () => number): number {
    const list = listOf(group, kind)
    const place = Math.floor(random() * this.#lists.length(list) * blockSize)
    const entry = this.#lists.get(list, place >>> blockBits)
    const fill = entry & fillMask
    const position = place & (blockSize - 1)
    if (position >= fill && position >= run) return -1
    const block = entry >>> fillBits
    if (except >= 0 && this.#above(this.#blockGroups[block] ?? 0, this.#distances[except] ?? 0) === except)
      return -1
    return (block << blockBits) + (position < fill ? position : position % fill)
  }

  /**
   * Writes the endpoints of `want` peers of a rack, seeders and leechers as if they stood in one row, from place `from` on by `stride`,
   * leaving out the peer in slot `self`. The slots go to `slots`, the endpoints to `halves` from the `to`-th on.
   *
   * @returns how many were written
   */
  writeRack(
    group: number,
    { from, stride, want, self }: { from: number; stride: number; want: number; self: number },
    slots: Uint32Array,
    halves: Uint16Array,
    to: number,
  ): number {
    const seeders = this.count(group, seeder)
    const total = seeders + this.count(group, leecher)
    const [seederList, leecherList] = [listOf(group, seeder), listOf(group, leecher)]
    let at = from
    let written = 0
    for (let i = 0; i < total && written < want; i++) {
      const isSeeder = at < seeders
      const index = isSeeder ? at : at - seeders
      const entry = this.#lists.get(isSeeder ? seederList : leecherList, index >>> blockBits)
      const slot = ((entry >>> fillBits) << blockBits) + (index & (blockSize - 1))
      at += stride
      if (at >= total) at -= total
      if (slot === self) continue
      this.writeEndpoint(slot, halves, to + written)
      slots[written++] = slot
    }
    return written
  }

  /** Blocks of a rack, of both kinds. */
  blocksOf(group: number): number {
    return this.#lists.length(listOf(group, seeder)) + this.#lists.length(listOf(group, leecher))
  }

  /** The same for a large rack, block by block: from block `from` on by `stride`, all peers of each. */
  writeRackByBlocks(
    group: number,
    { from, stride, want, self }: { from: number; stride: number; want: number; self: number },
    slots: Uint32Array,
    halves: Uint16Array,
    to: number,
  ): number {
    const [seederList, leecherList] = [listOf(group, seeder), listOf(group, leecher)]
    const seederBlocks = this.#lists.length(seederList)
    const total = seederBlocks + this.#lists.length(leecherList)
    let at = from
    let written = 0
    for (let i = 0; i < total && written < want; i++) {
      const entry =
        at < seederBlocks ? this.#lists.get(seederList, at) : this.#lists.get(leecherList, at - seederBlocks)
      const first = (entry >>> fillBits) << blockBits
      at += stride
      if (at >= total) at -= total
      const fill = entry & fillMask
      // From anywhere in the block: of the last one only some are taken.
      for (let j = 0; j < fill && written < want; j++) {
        const slot = first + ((from + j) % fill)
        if (slot === self) continue
        this.writeEndpoint(slot, halves, to + written)
        slots[written++] = slot
      }
    }
    return written
  }

  /** Writes the endpoint of a slot as the `to`-th of a row. */
  writeEndpoint(slot: number, halves: Uint16Array, to: number): void {
    const size = this.endpointBytes / 2
    const [source, target] = [slot * size, to * size]
    for (let half = 0; half < size; half++) halves[target + half] = this.endpointHalves[source + half] ?? 0
  }

  /** How many peers the block of a slot holds: those of its slots that come first. */
  fillOf(slot: number): number {
    return (this.#fills[slot >>> blockBits] ?? 0) & ~kindBit
  }

  /** Writes slots of a kind in `group` but not in `except` to `target`, at most as many as it holds. @returns how many */
  collect(group: number, except: number, kind: Kind, target: Uint32Array): number {
    if (except < 0) return this.#collectGroup(group, kind, target, 0)
    let length = 0
    for (
      let child = this.#firstChildren[group] ?? noGroup;
      child !== noGroup;
      child = this.#nextSiblings[child] ?? noGroup
    ) {
      if (child !== except) length = this.#collectGroup(child, kind, target, length)
      if (length === target.length) break
    }
    return length
  }

  /** When the peer is due. */
  expiryTick(handle: number): number {
    return this.#records[handle * recordWords + tickWord] ?? 0
  }

  /**
   * Sets the tick at which a peer is due; less than `wheelSlots` from now. A later one is only noted: the peer is moved when the slot
   * it stands in comes round, so that an announce does not touch its neighbours.
   */
  schedule(handle: number, tick: number): void {
    const records = this.#records
    const at = handle * recordWords
    const linked = records[at + previousWord] !== unlinked
    const later = tick >= (records[at + tickWord] ?? 0)
    records[at + tickWord] = tick
    if (linked && later) return
    if (linked) this.#unlink(handle)
    this.#link(handle, tick)
  }

  /** Moves a peer whose slot has come round to the slot of the tick at which it is due. */
  postpone(handle: number): void {
    this.#unlink(handle)
    this.#link(handle, this.expiryTick(handle))
  }

  /** The next peer of a tick's slot, which is due then or later; -1 where there is none. */
  inSlot(tick: number): number {
    return (this.#wheel[tick % wheelSlots] ?? 0) - 1
  }

  #link(handle: number, tick: number): void {
    const records = this.#records
    const at = handle * recordWords
    const slot = tick % wheelSlots
    const first = this.#wheel[slot] ?? 0
    records[at + nextWord] = first
    records[at + previousWord] = headBit | slot
    if (first > 0) records[(first - 1) * recordWords + previousWord] = handle
    this.#wheel[slot] = handle + 1
  }

  #unlink(handle: number): void {
    const records = this.#records
    const at = handle * recordWords
    const previous = records[at + previousWord] ?? unlinked
    if (previous === unlinked) return
    const next = records[at + nextWord] ?? 0
    if ((previous & headBit) === 0) records[previous * recordWords + nextWord] = next
    else this.#wheel[previous & ~headBit] = next
    if (next > 0) records[(next - 1) * recordWords + previousWord] = previous
    records[at + previousWord] = unlinked
  }

  #collectGroup(group: number, kind: Kind, target: Uint32Array, from: number): number {
    const list = listOf(group, kind)
    let length = from
    for (let i = 0; i < this.#lists.length(list); i++) {
      const entry = this.#lists.get(list, i)
      const first = (entry >>> fillBits) << blockBits
      for (let position = 0; position < (entry & fillMask); position++) {
        if (length === target.length) return length
        target[length++] = first + position
      }
    }
    return length
  }

  /** The group at a distance (or, where the path has none there, the next above) that holds `group`. */
  #above(group: number, distance: number): number {
    let at = group
    while ((this.#distances[at] ?? 0) < distance && this.#parents[at] !== noGroup) at = this.#parents[at] ?? 0
    return at
  }

  #groupFor(
    swarm: number,
    { place, ancestors }: { readonly place: PlaceId; readonly ancestors: readonly Ancestor[] },
  ): number {
    const known = this.groupAt(swarm, place)
    if (known >= 0) return known
    const made = this.#addGroup(swarm, place, 0)
    let child = made
    for (const { node, distance } of ancestors) {
      const above = this.groupAt(swarm, node)
      const parent = above >= 0 ? above : this.#addGroup(swarm, node, distance)
      this.#adopt(parent, child)
      if (above >= 0) break
      child = parent
    }
    return made
  }

  #addGroup(swarm: number, node: PlaceId, distance: number): number {
    const group = this.#groups.take()
    this.#nodes[group] = node
    this.#swarms[group] = swarm
    this.#distances[group] = distance
    this.#parents[group] = noGroup
    this.#firstChildren[group] = noGroup
    this.#nextSiblings[group] = noGroup
    this.#previousSiblings[group] = noGroup
    if (node === rootPlace) this.#roots[swarm] = group + 1
    else this.#groupIndex.insert(this.#groupHash(swarm, node), group)
    return group
  }

  #adopt(parent: number, child: number): void {
    const first = this.#firstChildren[parent] ?? noGroup
    this.#parents[child] = parent
    this.#nextSiblings[child] = first
    this.#previousSiblings[child] = noGroup
    if (first !== noGroup) this.#previousSiblings[first] = child
    this.#firstChildren[parent] = child
  }

  #removeGroup(group: number): void {
    const parent = this.#parents[group] ?? noGroup
    const node = this.#nodes[group] ?? 0
    const swarm = this.#swarms[group] ?? 0
    if (node === rootPlace) {
      this.#roots[swarm] = 0
    } else {
      this.#groupIndex.remove(this.#groupHash(swarm, node), group)
      const [next, previous] = [
        this.#nextSiblings[group] ?? noGroup,
        this.#previousSiblings[group] ?? noGroup,
      ]
      if (next !== noGroup) this.#previousSiblings[next] = previous
      if (previous !== noGroup) this.#nextSiblings[previous] = next
      else this.#firstChildren[parent] = next
    }
    this.#groups.give(group)
  }

  #enter(handle: number, endpoint: Uint8Array, group: number, kind: Kind): void {
    const list = listOf(group, kind)
    const count = this.count(group, kind)
    const block =
      (count & (blockSize - 1)) === 0
        ? this.#addBlock(group, kind)
        : this.#lists.get(list, this.#lists.length(list) - 1) >>> fillBits
    const fill = (this.#fills[block] ?? 0) & ~kindBit
    const slot = (block << blockBits) + fill
    this.#entries[slot] = handle
    this.#records[handle * recordWords + slotWord] = slot
    for (let i = 0; i < this.endpointBytes; i++)
      this.endpoints[slot * this.endpointBytes + i] = endpoint[i] ?? 0
    this.#setFill(block, group, kind, fill + 1)
    this.#countUp(group, kind, 1)
    if (kind === leecher && count >= rankedMax) this.#rankIn(slot, group)
  }

  #leave(handle: number): void {
    const slot = this.slotOf(handle)
    const group = this.#blockGroups[slot >>> blockBits] ?? 0
    const kind = this.kindOf(handle)
    const list = listOf(group, kind)
    const last = this.#lists.get(list, this.#lists.length(list) - 1) >>> fillBits
    const fill = (this.#fills[last] ?? 0) & ~kindBit
    const lastSlot = (last << blockBits) + fill - 1
    let gap = slot
    // One of the lowest ranks leaves: the lowest of the others takes its place, and the last one that one's.
    if (
      kind === leecher &&
      this.count(group, kind) > rankedMax &&
      slot >>> blockBits === this.#lists.get(list, 0) >>> fillBits
    ) {
      const next = this.#lowestBeyond(group)
      this.#moveSlot(next, gap)
      gap = next
    }
    if (gap !== lastSlot) this.#moveSlot(lastSlot, gap)
    if (fill === 1) this.#removeBlock(last, group, kind)
    else this.#setFill(last, group, kind, fill - 1)
    this.#countUp(group, kind, -1)
  }

  /** Puts the peer of one slot into another. */
  #moveSlot(from: number, to: number): void {
    const handle = this.#entries[from] ?? 0
    const size = this.endpointBytes
    this.#entries[to] = handle
    this.#records[handle * recordWords + slotWord] = to
    this.endpoints.copyWithin(to * size, from * size, from * size + size)
  }

  /** How many peers a block holds is also written beside it in every list: who draws it need not look it up. */
  #setFill(block: number, group: number, kind: Kind, fill: number): void {
    const entry = (block << fillBits) | fill
    this.#fills[block] = fill | (kind === leecher ? kindBit : 0)
    const list = listOf(group, kind)
    this.#lists.set(list, this.#lists.length(list) - 1, entry)
    for (let at = this.#parents[group] ?? noGroup; at !== noGroup; at = this.#parents[at] ?? noGroup)
      this.#lists.set(listOf(at, kind), this.#positions[this.#distances[at] ?? 0]?.[block] ?? 0, entry)
  }

  /** Counts a peer in or out of a group and all above it; empty groups go. */
  #countUp(group: number, kind: Kind, by: 1 | -1): void {
    const counts = this.#counts[kind]
    const others = this.#counts[1 - kind] ?? counts
    for (let at = group; at !== noGroup;) {
      const count = (counts[at] ?? 0) + by
      const parent = this.#parents[at] ?? noGroup
      counts[at] = count
      if (count === 0 && others[at] === 0) this.#removeGroup(at)
      at = parent
    }
  }

  #addBlock(group: number, kind: Kind): number {
    const block = this.#blocks.take()
    this.#blockGroups[block] = group
    this.#fills[block] = kind === leecher ? kindBit : 0
    this.#lists.push(listOf(group, kind), block << fillBits)
    for (let at = this.#parents[group] ?? noGroup; at !== noGroup; at = this.#parents[at] ?? noGroup) {
      const list = listOf(at, kind)
      const positions = this.#positions[this.#distances[at] ?? 0]
      if (positions) positions[block] = this.#lists.length(list)
      this.#lists.push(list, block << fillBits)
    }
    return block
  }

  /** Takes the last block out of its rack's list, and out of the lists above. */
  #removeBlock(block: number, group: number, kind: Kind): void {
    this.#lists.pop(listOf(group, kind))
    for (let at = this.#parents[group] ?? noGroup; at !== noGroup; at = this.#parents[at] ?? noGroup) {
      const list = listOf(at, kind)
      const positions = this.#positions[this.#distances[at] ?? 0]
      const position = positions?.[block] ?? 0
      const last = this.#lists.get(list, this.#lists.length(list) - 1)
      this.#lists.set(list, position, last)
      if (positions) positions[last >>> fillBits] = position
      this.#lists.pop(list)
    }
    this.#blocks.give(block)
  }

  /** A leecher has joined at the end: if its rank is below one of the lowest, the two change places. */
  #rankIn(slot: number, group: number): void {
    const first = (this.#lists.get(listOf(group, leecher), 0) >>> fillBits) << blockBits
    let highest = -1
    let highestAt = 0
    for (let at = first; at < first + rankedMax; at++) {
      const rank = this.#rank(at)
      if (rank > highest) [highest, highestAt] = [rank, at]
    }
    if (this.#rank(slot) >= highest) return
    const size = this.endpointBytes
    const handle = this.#entries[slot] ?? 0
    const endpoint = this.endpoints.slice(slot * size, slot * size + size)
    this.#moveSlot(highestAt, slot)
    this.#entries[highestAt] = handle
    this.#records[handle * recordWords + slotWord] = highestAt
    this.endpoints.set(endpoint, highestAt * size)
  }

  /** The slot of the leecher with the lowest rank after the first block: of the first thousand, should there be more. */
  #lowestBeyond(group: number): number {
    const list = listOf(group, leecher)
    const blocks = Math.min(this.#lists.length(list), 1 + rankScanMax / blockSize)
    let lowest = Infinity
    let found = 0
    for (let i = 1; i < blocks; i++) {
      const entry = this.#lists.get(list, i)
      const first = (entry >>> fillBits) << blockBits
      for (let position = entry & fillMask; position-- > 0;) {
        const rank = this.#rank(first + position)
        if (rank < lowest) [lowest, found] = [rank, first + position]
      }
    }
    return found
  }

  /** Rendezvous hash of swarm, place and endpoint: the same in every server, so it must not be keyed. */
  #rank(slot: number): number {
    const group = this.#blockGroups[slot >>> blockBits] ?? 0
    const at = slot * this.endpointBytes
    let hash = mix(this.#infoHashes[(this.#swarms[group] ?? 0) * 5] ?? 0, this.#nodes[group] ?? 0)
    for (let i = 0; i < this.endpointBytes; i += 2)
      hash = mix(hash, ((this.endpoints[at + i] ?? 0) << 8) | (this.endpoints[at + i + 1] ?? 0))
    return finish(hash)
  }

  #groupHash(swarm: number, node: PlaceId): number {
    return finish(mix(mix(this.#seed, swarm), node))
  }

  #hash(swarm: number, bytes: Uint8Array, at: number): number {
    let hash = mix(this.#seed, swarm)
    for (let i = 0; i < this.endpointBytes; i += 2)
      hash = mix(hash, ((bytes[at + i] ?? 0) << 8) | (bytes[at + i + 1] ?? 0))
    return finish(hash)
  }

  #isAt(handle: number, endpoint: Uint8Array): boolean {
    const at = this.slotOf(handle) * this.endpointBytes
    for (let i = 0; i < this.endpointBytes; i++) if (this.endpoints[at + i] !== endpoint[i]) return false
    return true
  }
}

/** One turn of the wheel is some nine hours of seconds; a peer's life is shorter. */
export const wheelSlots = 32_768
/** In `wheelPrevious`: the peer is the first of the slot in the lower bits. */
const headBit = 0x80000000
const unlinked = 0xffffffff

function listOf(group: number, kind: Kind): number {
  return group * 2 + kind
}
