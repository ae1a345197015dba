import type { LevelSample, SampledPeer, SwarmView } from './peer-store.ts'

export interface SelectionInput {
  readonly view: SwarmView
  /** The requester has everything: it is only told of leechers. */
  readonly seeding: boolean
  /** Peers wanted, after bounds; 0 for none. */
  readonly numwant: number
  /** Leechers of each rack that fetch from far peers at once, at most; a rack has one for every eight leechers. */
  readonly gatewaysPerRack: number
  /** Far peers that everyone gets besides its rack. */
  readonly reservePeers: number
  /** 0 ≤ random() < 1. */
  readonly random: () => number
}

export interface Selection {
  /** Nearest first. */
  readonly peers: readonly (SampledPeer & { readonly distance: number })[]
  /** The requester is one of its rack's gateways. */
  readonly gateway: boolean
}

/** Each further gateway of a rack may bring a piece that another brings too; few leechers are served by one. */
const leechersPerGateway = 8

/**
 * Chooses whom an announcer meets. Pure: the same input and draws give the same peers.
 *
 * Nearest level first, random inside a level. But a rack is never an island: filled greedily, the peers of a rack
 * without data would only ever hear of each other. So far peers have places of their own in each reply: half of it for a
 * gateway, and for a rack in which nobody holds all (its hosts can only go as fast as what reaches it); `reservePeers` for
 * everyone else. The same holds for a row, a datacentre and every other level: `spread` says how they share those places.
 */
export function selectPeers(input: SelectionInput): Selection {
  const { view, seeding, numwant, gatewaysPerRack, reservePeers, random } = input
  const gateways = Math.min(gatewaysPerRack, Math.ceil((view.rack.leechers + 1) / leechersPerGateway))
  const gateway = !seeding && view.gatewayRank < gateways
  const near = view.levels
    .filter(({ distance }) => distance === 0)
    .flatMap((level) => candidates(level, seeding, random))
  const far = view.levels
    .filter(({ distance }) => distance > 0)
    .map((level) => ({
      holders: seeding ? 0 : level.seeders.length,
      peers: candidates(level, seeding, random),
    }))
  const farCount = far.reduce((sum, { peers }) => sum + peers.length, 0)
  const starving = !seeding && view.rack.seeders === 0
  const wanted = gateway || starving ? Math.max(reservePeers, Math.floor(numwant / 2)) : reservePeers
  // Places kept for far peers: at least one whenever there is room for two; the rack gets the larger half.
  const kept =
    numwant < 2 && near.length > 0
      ? 0
      : Math.min(farCount, Math.max(1, Math.min(wanted, Math.floor(numwant / 2))))
  const nearChosen = near.slice(0, Math.max(0, numwant - kept))
  const places = spread(far, numwant - nearChosen.length)
  const farChosen = far.flatMap(({ peers }, i) => peers.slice(0, places[i]))
  return { peers: [...nearChosen, ...farChosen], gateway }
}

/**
 * How many places each far level gets, nearest first. One goes to the nearest level in which somebody holds all: data reaches a
 * row from there, however many of the row itself have none. Of the rest each level gets half of what nearer ones left, and
 * what a level cannot fill the others do.
 */
function spread(
  levels: readonly { readonly holders: number; readonly peers: readonly unknown[] }[],
  places: number,
): number[] {
  const taken = levels.map(() => 0)
  let left = places
  const take = (level: number, wanted: number) => {
    const has = levels[level]?.peers.length ?? 0
    const given = Math.max(0, Math.min(wanted, left, has - (taken[level] ?? 0)))
    taken[level] = (taken[level] ?? 0) + given
    left -= given
  }
  const holding = levels.findIndex(({ holders }) => holders > 0)
  if (holding >= 0) take(holding, 1)
  for (let level = 0; level < levels.length; level++)
    take(level, level === levels.length - 1 ? left : Math.ceil(left / 2))
  for (let level = 0; level < levels.length; level++) take(level, left)
  return taken
}

/** One level's peers in the order to hand them out: for a leecher those that hold all and those that still fetch, mixed at random. */
function candidates(
  level: LevelSample,
  seeding: boolean,
  random: () => number,
): (SampledPeer & { distance: number })[] {
  const { distance, seeders, leechers } = level
  if (seeding) return leechers.map((peer) => ({ ...peer, distance }))
  // In the own rack a fellow leecher is as good as a seeder: what it has is here already. From afar, data counts.
  const ordered = distance === 0 ? interleave(seeders, leechers, random) : [...seeders, ...leechers]
  return ordered.map((peer) => ({ ...peer, distance }))
}

/** Merges two lists that are in random order each, every interleaving equally likely. */
function interleave<Item>(a: readonly Item[], b: readonly Item[], random: () => number): Item[] {
  const merged: Item[] = []
  let [i, j] = [0, 0]
  while (i < a.length || j < b.length) {
    const left = a.length - i
    const fromA = random() * (left + b.length - j) < left
    const item = fromA ? a[i++] : b[j++]
    if (item !== undefined) merged.push(item)
  }
  return merged
}
