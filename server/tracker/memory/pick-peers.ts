import type { Family } from '../../../lib/protocol/address.ts'
import type { PeerSample, StoreAnnounce } from '../peer-store.ts'
import type { Plan } from '../selection.ts'
import { drawOf } from '../selection.ts'
import type { FamilySwarms, Kind } from './family-swarms.ts'
import { blockSize, leecher, seeder } from './family-swarms.ts'

/** Where fewer than one draw in this many would meet a peer that counts, they are listed instead. */
const drawsPerPeerMax = 8
/** Blocks are nearly empty where every peer is alone in its place; even then so many draws are sure to meet one. */
const drawTries = 1024
/**
 * Of how many peers on several are taken of a block that was drawn, and how many of one further away; of the own rack the whole block. It is
 * one cache line, fetched once. Each peer is as likely as before to be met; only those who joined side by side are met together more
 * often, and there are hundreds of such groups.
 */
const runsFrom = 1024
const runMax = 4
/** Beyond twice as many as are wanted (and a few), drawing again what was drawn before is rare enough. */
const listedAnyway = 16

/**
 * Draws the peers of a plan and writes them to the sample, nearest first, in random order within a level.
 *
 * @returns a function of the announcer's groups (its place and the nodes above it, -1 where there is none), the announce, the plan, and
 *   the announcer's handle or -1
 */
export function pickPeers({
  families,
  sample,
  sampleMax,
  random,
}: {
  families: Readonly<Record<Family, FamilySwarms>>
  sample: PeerSample
  sampleMax: number
  random: () => number
}): (
  groups: Readonly<Record<Family, Int32Array>>,
  announce: StoreAnnounce,
  plan: Plan,
  self: number,
) => void {
  const chosen = new Uint32Array(sampleMax)
  const listed = new Uint32Array(Math.max(512, sampleMax * 4))
  const drawn = createDrawnSet(sampleMax)
  const sides: Readonly<Record<Family, Side>> = { 4: emptySide(), 6: emptySide() }
  const compactHalves = {
    4: new Uint16Array(sample.compact[4].buffer),
    6: new Uint16Array(sample.compact[6].buffer),
  }
  let length = 0

  /** Chooses as many of a kind as are wanted of one level, all equally likely. */
  const choose = (peers: FamilySwarms, { group, below, available, want }: Side, kind: Kind, self: number) => {
    if (want[kind] <= 0) return
    const end = length + want[kind]
    const rejectionPays = available[kind] * drawsPerPeerMax >= peers.count(group, kind)
    if (available[kind] > 2 * want[kind] + listedAnyway && rejectionPays) {
      drawn.clear()
      const run = available[kind] > runsFrom ? runMax : 1
      for (let tries = drawTries + want[kind]; length < end && tries > 0; tries--) {
        const slot = peers.draw(group, below, kind, run, random)
        if (slot < 0) continue
        if (run === 1) {
          if (slot !== self && drawn.add(slot)) chosen[length++] = slot
          continue
        }
        // Round the block, from the slot that was drawn.
        const fill = peers.fillOf(slot)
        const first = slot - (slot & (blockSize - 1))
        for (let i = 0; i < Math.min(run, fill) && length < end; i++) {
          const next = first + (((slot & (blockSize - 1)) + i) % fill)
          if (next !== self && drawn.add(next)) chosen[length++] = next
        }
      }
      return
    }
    let there = peers.collect(group, below, kind, listed)
    while (length < end && there > 0) {
      const at = Math.floor(random() * there)
      const slot = listed[at] ?? 0
      listed[at] = listed[--there] ?? 0
      if (slot !== self) chosen[length++] = slot
    }
  }

  /** Writes what belongs to the `count` chosen peers whose endpoints stand from `to` on, and counts them in. */
  const complete = (family: Family, to: number, count: number, distance: number, withPeerIds: boolean) => {
    const peers = families[family]
    const distances = sample.distances[family]
    for (let i = to; i < to + count; i++) distances[i] = distance
    if (withPeerIds)
      for (let i = 0; i < count; i++)
        sample.peerIds[family].set(peers.peerIdOf(peers.handleAt(chosen[i] ?? 0)), (to + i) * 20)
    sample.lengths[family] = to + count
  }

  const write = (family: Family, distance: number, withPeerIds: boolean) => {
    const to = sample.lengths[family]
    const count = Math.min(length, sampleMax - to)
    for (let i = 0; i < count; i++)
      families[family].writeEndpoint(chosen[i] ?? 0, compactHalves[family], to + i)
    complete(family, to, count, distance, withPeerIds)
  }

  /**
   * Writes `want` peers of the announcer's own rack, of both kinds alike. It steps through them, as if they stood in one row, from a random
   * place on by a random stride that has no divisor in common with their number: nobody comes twice, all are equally likely, and
   * nothing is listed, shuffled or looked up first. Through a large rack it goes by blocks.
   */
  const writeRack = (
    groups: Readonly<Record<Family, Int32Array>>,
    want: number,
    own: Family,
    self: number,
    withPeerIds: boolean,
  ) => {
    const there = (family: Family) => {
      const group = groups[family][0] ?? -1
      const all = families[family].count(group, seeder) + families[family].count(group, leecher)
      return all - (family === own && self >= 0 ? 1 : 0)
    }
    const [ipv4, ipv6] = [there(4), there(6)]
    const wantIpv4 = ipv6 === 0 ? want : drawOf(ipv4, ipv6, want, random)
    for (const family of bothFamilies) {
      const wanted = family === 4 ? wantIpv4 : want - wantIpv4
      if (wanted <= 0) continue
      const peers = families[family]
      const skip = family === own && self >= 0
      const total = (family === 4 ? ipv4 : ipv6) + (skip ? 1 : 0)
      const to = sample.lengths[family]
      const group = groups[family][0] ?? -1
      const large = total > runsFrom
      const row = large ? peers.blocksOf(group) : total
      const options = {
        from: Math.floor(random() * row),
        stride: strideOf(row, random),
        want: Math.min(wanted, sampleMax - to),
        self: skip ? peers.slotOf(self) : -1,
      }
      const written = large
        ? peers.writeRackByBlocks(group, options, chosen, compactHalves[family], to)
        : peers.writeRack(group, options, chosen, compactHalves[family], to)
      complete(family, to, written, 0, withPeerIds)
    }
  }

  return (groups, announce, plan, self) => {
    const own = announce.source.family
    if (plan.rack > 0) writeRack(groups, plan.rack, own, self, announce.withPeerIds)
    for (let i = 0; i <= announce.ancestors.length; i++) {
      const distance = i === 0 ? 0 : (announce.ancestors[i - 1]?.distance ?? 0)
      const [seeders, leechers] = [plan.seeders[i] ?? 0, plan.leechers[i] ?? 0]
      if (seeders + leechers === 0) continue
      for (const family of bothFamilies) look(family, groups[family], i)
      if (i === 0 && self >= 0) sides[own].available[families[own].kindOf(self)]--
      share(seeder, seeders)
      share(leecher, leechers)
      for (const family of bothFamilies) {
        const side = sides[family]
        if (side.want[seeder] + side.want[leecher] === 0) continue
        const skip = family === own && self >= 0 ? families[own].slotOf(self) : -1
        length = 0
        choose(families[family], side, seeder, skip)
        const seedersChosen = length
        choose(families[family], side, leecher, skip)
        if (seedersChosen > 0 && seedersChosen < length) shuffle(chosen, length, random)
        write(family, distance, announce.withPeerIds)
      }
    }
  }

  /** Looks at one level of one family. */
  function look(family: Family, groups: Int32Array, level: number): void {
    const peers = families[family]
    const side = sides[family]
    const group = groups[level] ?? -1
    const below = level === 0 ? -1 : (groups[level - 1] ?? -1)
    side.group = group
    side.below = below
    side.available[seeder] = peers.count(group, seeder) - peers.count(below, seeder)
    side.available[leecher] = peers.count(group, leecher) - peers.count(below, leecher)
  }

  /** Divides what is wanted of a kind between the families, as chance would if all peers stood in one list. */
  function share(kind: Kind, want: number): void {
    const ofIpv4 = drawOf(sides[4].available[kind], sides[6].available[kind], want, random)
    sides[4].want[kind] = ofIpv4
    sides[6].want[kind] = want - ofIpv4
  }
}

/** One level of one family: the group, the one below it that is not meant, and by kind how many there are and are wanted. */
interface Side {
  group: number
  below: number
  readonly available: [number, number]
  readonly want: [number, number]
}

function emptySide(): Side {
  return { group: -1, below: -1, available: [0, 0], want: [0, 0] }
}

const bothFamilies: readonly Family[] = [4, 6]

/** Primes, so that one that does not divide a number has no divisor in common with it. */
const primes = [
  100_003, 100_019, 100_043, 100_049, 100_057, 100_069, 100_103, 100_109, 100_129, 100_151, 100_153, 100_169,
  100_183, 100_189, 100_193, 100_207, 100_213, 100_237, 100_267, 100_271, 100_279, 100_291, 100_297, 100_313,
  100_333, 100_343, 100_357, 100_361, 100_363, 100_379, 100_391, 100_393,
]

/** A stride that visits all of `total` places before it comes back. */
function strideOf(total: number, random: () => number): number {
  for (let i = Math.floor(random() * primes.length); i < 2 * primes.length; i++) {
    const prime = primes[i % primes.length] ?? 1
    if (total % prime !== 0) return prime % total
  }
  return 1
}

/** Kinds together stand in one random order; each alone was drawn in one. */
function shuffle(items: Uint32Array, length: number, random: () => number): void {
  for (let i = length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1))
    const swapped = items[i] ?? 0
    items[i] = items[j] ?? 0
    items[j] = swapped
  }
}

/** A set of numbers that is emptied by counting up. */
function createDrawnSet(max: number) {
  const slots = 2 ** Math.ceil(Math.log2(max * 2 + 2))
  const members = new Uint32Array(slots)
  const rounds = new Uint32Array(slots)
  let round = 0
  return {
    clear: () => {
      round = (round + 1) >>> 0
      if (round === 0) rounds.fill(0)
    },
    /** @returns whether it was not there */
    add: (member: number): boolean => {
      let at = Math.imul(member, 0x9e3779b1) >>> 7
      for (at &= slots - 1; rounds[at] === round; at = (at + 1) & (slots - 1))
        if (members[at] === member) return false
      rounds[at] = round
      members[at] = member
      return true
    },
  }
}
