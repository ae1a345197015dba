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

const free = 0xffffffff
const noGroup = 0xffffffff
const kindBit = 0x80

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
 * leechers. Handles stand in *blocks* of eight, each block in one rack and of one kind, all full but the last. A rack lists its
 * blocks, and so does each group above it, so that a random peer of any level is a random block and a random place in it: nothing
 * walks the swarm, and a level above costs a word per eight peers. Joining, leaving and changing kind are a few words each.
 */
export class FamilySwarms {
  readonly endpointBytes: number
  readonly #seed: number
  readonly #levels: number

  // A record: endpoint, peer_id, place among the blocks, expiry tick and its list.
  readonly endpoints: Uint8Array
  readonly peerIds: Uint8Array
  readonly #slots: Uint32Array
  readonly #expiryTicks: Uint16Array
  readonly #wheelNext: Uint32Array
  readonly #wheelPrevious: Uint32Array
  readonly #wheel: Uint32Array
  readonly #peers: FreeList
  readonly #index: HashIndex

  readonly #entries: Uint32Array
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

    this.endpoints = arrays.u8(name('endpoints'), peersMax * this.endpointBytes)
    this.peerIds = arrays.u8(name('peerIds'), peersMax * 20)
    this.#slots = u32('slots', peersMax)
    this.#expiryTicks = arrays.u16(name('expiryTicks'), peersMax)
    this.#wheelNext = u32('wheelNext', peersMax)
    this.#wheelPrevious = u32('wheelPrevious', peersMax)
    this.#wheel = u32('wheel', wheelSlots)
    this.#peers = new FreeList(arrays, name('peers'), this.#wheelNext)
    this.#index = new HashIndex(arrays, name('index'), peersMax)

    // At worst every peer is alone in its rack.
    this.#entries = u32('entries', peersMax * blockSize)
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
    this.#groupIndex = new HashIndex(arrays, name('groupIndex'), groupsMax)
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
    return this.#slots[handle] !== free
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
    for (
      let at = index.start(hash), found;
      (found = index.candidate(at, hash)) !== none;
      at = index.after(at)
    ) {
      if (found >= 0 && this.#isAt(found, endpoint) && this.swarmOf(found) === swarm) return found
    }
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
    this.#wheelPrevious[handle] = unlinked
    const at = handle * this.endpointBytes
    for (let i = 0; i < this.endpointBytes; i++) this.endpoints[at + i] = endpoint[i] ?? 0
    this.#index.insert(this.#hash(swarm, endpoint, 0), handle)
    this.#enter(handle, this.#groupFor(swarm, where), kind)
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
    this.#leave(handle)
    this.#enter(handle, this.#groupFor(swarm, where), kind)
  }

  remove(handle: number): void {
    const swarm = this.swarmOf(handle)
    this.#index.remove(this.#hash(swarm, this.endpoints, handle * this.endpointBytes), handle, (known) =>
      this.#hash(this.swarmOf(known), this.endpoints, known * this.endpointBytes),
    )
    this.#leave(handle)
    this.#unlink(handle)
    this.#slots[handle] = free
    this.#peers.give(handle)
  }

  setPeerId(handle: number, peerId: Uint8Array): void {
    const at = handle * 20
    for (let i = 0; i < 20; i++) this.peerIds[at + i] = peerId[i] ?? 0
  }

  swarmOf(handle: number): number {
    return this.#swarms[this.groupOf(handle)] ?? 0
  }

  placeOf(handle: number): PlaceId {
    return this.#nodes[this.groupOf(handle)] ?? 0
  }

  kindOf(handle: number): Kind {
    return ((this.#fills[(this.#slots[handle] ?? 0) >>> blockBits] ?? 0) & kindBit) === 0 ? seeder : leecher
  }

  /** The rack of a peer in its swarm. */
  groupOf(handle: number): number {
    return this.#blockGroups[(this.#slots[handle] ?? 0) >>> blockBits] ?? 0
  }

  /** The group above another, or -1. */
  parentOf(group: number): number {
    const parent = this.#parents[group] ?? noGroup
    return parent === noGroup ? -1 : parent
  }

  /** The group of a node in a swarm, or -1. */
  groupAt(swarm: number, node: PlaceId): number {
    if (node === rootPlace) return (this.#roots[swarm] ?? 0) - 1
    const hash = finish(mix(mix(this.#seed, swarm), node))
    const index = this.#groupIndex
    for (
      let at = index.start(hash), found;
      (found = index.candidate(at, hash)) !== none;
      at = index.after(at)
    ) {
      if (found >= 0 && this.#nodes[found] === node && this.#swarms[found] === swarm) return found
    }
    return -1
  }

  /** Peers of a kind in a group; 0 for -1. */
  count(group: number, kind: Kind): number {
    return group < 0 ? 0 : (this.#counts[kind][group] ?? 0)
  }

  /** How many leechers of its rack come before this one by rank; `rankedMax` for all that are not among the first. */
  rankOf(handle: number): number {
    const slot = this.#slots[handle] ?? 0
    const block = slot >>> blockBits
    if (this.#lists.get(listOf(this.groupOf(handle), leecher), 0) !== block) return rankedMax
    const own = this.#rank(handle)
    let before = 0
    for (let i = (this.#fills[block] ?? 0) & ~kindBit; i-- > 0;)
      if (this.#rank(this.#entries[(block << blockBits) + i] ?? 0) < own) before++
    return before
  }

  /**
   * A random peer of a kind in `group` that is not in `except` (a group below it, or -1): drawn uniformly, so it may be one that was
   * drawn before. -1 where `tries` draws met none.
   */
  draw(group: number, except: number, kind: Kind, random: () => number, tries: number): number {
    const list = listOf(group, kind)
    const places = this.#lists.length(list) * blockSize
    if (places === 0) return -1
    const exceptDistance = except < 0 ? -1 : (this.#distances[except] ?? 0)
    for (let i = 0; i < tries; i++) {
      const place = Math.floor(random() * places)
      const block = this.#lists.get(list, place >>> blockBits)
      const position = place & (blockSize - 1)
      if (position >= ((this.#fills[block] ?? 0) & ~kindBit)) continue
      if (exceptDistance >= 0 && this.#above(this.#blockGroups[block] ?? 0, exceptDistance) === except)
        continue
      return this.#entries[(block << blockBits) + position] ?? 0
    }
    return -1
  }

  /** Writes handles of a kind in `group` but not in `except` to `target`, at most as many as it holds. @returns how many */
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

  /** Seconds of the expiry tick, modulo 2^16. */
  expiryTick(handle: number): number {
    return this.#expiryTicks[handle] ?? 0
  }

  /** Sets the tick at which a peer is due; less than `wheelSlots` from now. */
  schedule(handle: number, tick: number): void {
    const previous = this.#wheelPrevious[handle] ?? unlinked
    const low = tick & 0xffff
    if (previous !== unlinked) {
      if (this.#expiryTicks[handle] === low) return
      this.#unlink(handle)
    }
    const slot = tick % wheelSlots
    const first = this.#wheel[slot] ?? 0
    this.#expiryTicks[handle] = low
    this.#wheelNext[handle] = first
    this.#wheelPrevious[handle] = headBit | slot
    if (first > 0) this.#wheelPrevious[first - 1] = handle
    this.#wheel[slot] = handle + 1
  }

  /** A peer that is due at a tick, or -1. */
  due(tick: number): number {
    return (this.#wheel[tick % wheelSlots] ?? 0) - 1
  }

  #unlink(handle: number): void {
    const previous = this.#wheelPrevious[handle] ?? unlinked
    if (previous === unlinked) return
    const next = this.#wheelNext[handle] ?? 0
    if ((previous & headBit) === 0) this.#wheelNext[previous] = next
    else this.#wheel[previous & ~headBit] = next
    if (next > 0) this.#wheelPrevious[next - 1] = previous
    this.#wheelPrevious[handle] = unlinked
  }

  #collectGroup(group: number, kind: Kind, target: Uint32Array, from: number): number {
    const list = listOf(group, kind)
    let length = from
    for (let i = 0; i < this.#lists.length(list); i++) {
      const block = this.#lists.get(list, i)
      const fill = (this.#fills[block] ?? 0) & ~kindBit
      for (let position = 0; position < fill; position++) {
        if (length === target.length) return length
        target[length++] = this.#entries[(block << blockBits) + position] ?? 0
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
    else this.#groupIndex.insert(finish(mix(mix(this.#seed, swarm), node)), group)
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
      this.#groupIndex.remove(finish(mix(mix(this.#seed, swarm), node)), group, (known) =>
        finish(mix(mix(this.#seed, this.#swarms[known] ?? 0), this.#nodes[known] ?? 0)),
      )
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

  #enter(handle: number, group: number, kind: Kind): void {
    const rackList = listOf(group, kind)
    const count = this.count(group, kind)
    const block =
      (count & (blockSize - 1)) === 0
        ? this.#addBlock(group, kind)
        : this.#lists.get(rackList, this.#lists.length(rackList) - 1)
    const fill = (this.#fills[block] ?? 0) & ~kindBit
    this.#fills[block] = (fill + 1) | (kind === leecher ? kindBit : 0)
    this.#put(handle, (block << blockBits) + fill)
    this.#countUp(group, kind, 1)
    if (kind === leecher && count >= rankedMax) this.#rankIn(handle, group)
  }

  #leave(handle: number): void {
    const slot = this.#slots[handle] ?? 0
    const group = this.#blockGroups[slot >>> blockBits] ?? 0
    const kind = this.kindOf(handle)
    const list = listOf(group, kind)
    const last = this.#lists.get(list, this.#lists.length(list) - 1)
    const fill = (this.#fills[last] ?? 0) & ~kindBit
    const lastSlot = (last << blockBits) + fill - 1
    let gap = slot
    // One of the lowest ranks leaves: the lowest of the others takes its place, and the last one that one's.
    if (
      kind === leecher &&
      this.count(group, kind) > rankedMax &&
      slot >>> blockBits === this.#lists.get(list, 0)
    ) {
      const next = this.#lowestBeyond(group)
      const from = this.#slots[next] ?? 0
      this.#put(next, gap)
      gap = from
    }
    if (gap !== lastSlot) this.#put(this.#entries[lastSlot] ?? 0, gap)
    this.#fills[last] = (fill - 1) | (kind === leecher ? kindBit : 0)
    if (fill === 1) this.#removeBlock(last, group, kind)
    this.#countUp(group, kind, -1)
  }

  #put(handle: number, slot: number): void {
    this.#entries[slot] = handle
    this.#slots[handle] = slot
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
    this.#fills[block] = 0
    this.#lists.push(listOf(group, kind), block)
    for (let at = this.#parents[group] ?? noGroup; at !== noGroup; at = this.#parents[at] ?? noGroup) {
      const list = listOf(at, kind)
      const positions = this.#positions[this.#distances[at] ?? 0]
      if (positions) positions[block] = this.#lists.length(list)
      this.#lists.push(list, block)
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
      if (positions) positions[last] = position
      this.#lists.pop(list)
    }
    this.#blocks.give(block)
  }

  /** A leecher has joined at the end: if its rank is below one of the lowest, the two change places. */
  #rankIn(handle: number, group: number): void {
    const first = this.#lists.get(listOf(group, leecher), 0) << blockBits
    let highest = -1
    let highestAt = 0
    for (let slot = first; slot < first + rankedMax; slot++) {
      const rank = this.#rank(this.#entries[slot] ?? 0)
      if (rank > highest) [highest, highestAt] = [rank, slot]
    }
    if (this.#rank(handle) >= highest) return
    const from = this.#slots[handle] ?? 0
    this.#put(this.#entries[highestAt] ?? 0, from)
    this.#put(handle, highestAt)
  }

  /** The leecher with the lowest rank of those after the first block: of the first thousand, should there be more. */
  #lowestBeyond(group: number): number {
    const list = listOf(group, leecher)
    const blocks = Math.min(this.#lists.length(list), 1 + rankScanMax / blockSize)
    let lowest = Infinity
    let found = 0
    for (let i = 1; i < blocks; i++) {
      const block = this.#lists.get(list, i)
      for (let position = (this.#fills[block] ?? 0) & ~kindBit; position-- > 0;) {
        const handle = this.#entries[(block << blockBits) + position] ?? 0
        const rank = this.#rank(handle)
        if (rank < lowest) [lowest, found] = [rank, handle]
      }
    }
    return found
  }

  /** Rendezvous hash of swarm, place and endpoint: the same in every server, so it must not be keyed. */
  #rank(handle: number): number {
    const group = this.groupOf(handle)
    const at = handle * this.endpointBytes
    let hash = mix(this.#infoHashes[(this.#swarms[group] ?? 0) * 5] ?? 0, this.#nodes[group] ?? 0)
    for (let i = 0; i < this.endpointBytes; i += 2)
      hash = mix(hash, ((this.endpoints[at + i] ?? 0) << 8) | (this.endpoints[at + i + 1] ?? 0))
    return finish(hash)
  }

  #hash(swarm: number, bytes: Uint8Array, at: number): number {
    let hash = mix(this.#seed, swarm)
    for (let i = 0; i < this.endpointBytes; i += 2)
      hash = mix(hash, ((bytes[at + i] ?? 0) << 8) | (bytes[at + i + 1] ?? 0))
    return finish(hash)
  }

  #isAt(handle: number, endpoint: Uint8Array): boolean {
    const at = handle * this.endpointBytes
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
