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
 * everyone else. Far peers that hold data come first: they are what a rack needs from outside.
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
    .flatMap((level) => candidates(level, seeding, random))
  const starving = !seeding && view.rack.seeders === 0
  const wanted = gateway || starving ? Math.max(reservePeers, Math.floor(numwant / 2)) : reservePeers
  // Places kept for far peers: at least one whenever there is room for two; the rack gets the larger half.
  const kept =
    numwant < 2 && near.length > 0
      ? 0
      : Math.min(far.length, Math.max(1, Math.min(wanted, Math.floor(numwant / 2))))
  const nearChosen = near.slice(0, Math.max(0, numwant - kept))
  const farChosen = far.slice(0, numwant - nearChosen.length)
  return { peers: [...nearChosen, ...farChosen], gateway }
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
