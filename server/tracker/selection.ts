import type { SwarmView } from './peer-store.ts'

export interface SelectionInput {
  readonly view: SwarmView
  /** The requester has everything: it is only told of leechers. */
  readonly seeding: boolean
  /** Peers wanted, after bounds; 0 for none. */
  readonly numwant: number
  /** Leechers of each rack that fetch from far peers at once, at most; a rack has one for every four leechers, and two at least. */
  readonly gatewaysPerRack: number
  /** Far peers that everyone gets besides its rack. */
  readonly reservePeers: number
  /** By distance: which share of what nearer levels leave of the far places is for those at that distance. */
  readonly shares: readonly number[]
}

/** How many of whom an announcer is to hear of; the lists have a number for each level of the view it was made of. */
export interface Plan {
  /** Of the announcer's own place, seeders and leechers alike; besides those of the lists. */
  readonly rack: number
  readonly seeders: readonly number[]
  readonly leechers: readonly number[]
  /** The requester is one of its rack's gateways. */
  readonly gateway: boolean
}

/** Each further gateway of a rack may bring a piece that another brings too; few leechers are served by few. */
const leechersPerGateway = 4
/**
 * Of what a gateway wants, so much is far away: with more it misses some of its rack, and fetches what those have or fetch already. Nor may others
 * miss each other.
 */
const gatewayFarShare = 1 / 3
/** …and of what anybody else of a rack in which nobody holds all. */
const starvingFarShare = 1 / 5
/** Where one dies, the other goes on. */
const gatewaysMin = 2

/**
 * Chooses whom an announcer meets: how many of which level; who they are is drawn at random by the store. Pure.
 *
 * Nearest level first, random inside a level. But a rack is never an island: filled greedily, the peers of a rack
 * without data would only ever hear of each other. So far peers have places of their own in each reply: a third of it for a
 * gateway, a fifth where nobody of the rack holds all (its hosts can only go as fast as what reaches it), and `reservePeers` for
 * everyone else. The same holds for a row, a datacentre and every other level: `spread` says how they share those places.
 */
export function planSelection(input: SelectionInput): Plan {
  const { view, seeding, numwant, gatewaysPerRack, reservePeers } = input
  const { levels } = view
  const rack = levels[0]
  const rackSeeders = rack?.seeders ?? 0
  const rackLeechers = rack?.leechers ?? 0
  const gateways = Math.min(
    gatewaysPerRack,
    Math.max(gatewaysMin, Math.ceil((rackLeechers + 1) / leechersPerGateway)),
  )
  const gateway = !seeding && view.gatewayRank < gateways
  const seeders = levels.map(() => 0)
  const leechers = levels.map(() => 0)
  if (numwant <= 0) return { rack: 0, seeders, leechers, gateway }

  const near = rackLeechers + (seeding ? 0 : rackSeeders)
  let farCount = 0
  for (let i = 1; i < levels.length; i++) farCount += candidates(input, i)
  const starving = !seeding && rackSeeders === 0
  const share = gateway ? gatewayFarShare : starving ? starvingFarShare : 0
  const wanted = Math.max(reservePeers, Math.floor(numwant * share))
  // Places kept for far peers: at least one whenever there is room for two; the rack gets the larger half.
  const kept =
    numwant < 2 && near > 0 ? 0 : Math.min(farCount, Math.max(1, Math.min(wanted, Math.floor(numwant / 2))))
  const nearChosen = Math.min(near, Math.max(0, numwant - kept))
  if (seeding) leechers[0] = nearChosen
  if (farCount > 0)
    spread(input, numwant - nearChosen, (level, places) => {
      // From afar, data counts.
      const holders = seeding ? 0 : (levels[level]?.seeders ?? 0)
      seeders[level] = Math.min(places, holders)
      leechers[level] = places - Math.min(places, holders)
    })
  // In the own rack a fellow leecher is as good as a seeder: what it has is here already.
  return { rack: seeding ? 0 : nearChosen, seeders, leechers, gateway }
}

/**
 * Shares places among the far levels, nearest first. One goes to the nearest level in which somebody holds all: data reaches a
 * row from there, however many of the row itself have none. Of the rest each level gets its share of what nearer ones left (half, or
 * what cost and capacity make it: `Topology.shares`), but however cheap it is, it leaves one place to each level further away, or half of
 * them all: no row or zone is an island either. What a level cannot fill the others do.
 */
function spread(input: SelectionInput, places: number, give: (level: number, places: number) => void): void {
  const { levels } = input.view
  const taken = levels.map(() => 0)
  let left = places
  const take = (level: number, wanted: number) => {
    const given = Math.max(0, Math.min(wanted, left, candidates(input, level) - (taken[level] ?? 0)))
    taken[level] = (taken[level] ?? 0) + given
    left -= given
  }
  const holding = input.seeding ? -1 : levels.findIndex(({ seeders }, i) => i > 0 && seeders > 0)
  if (holding > 0) take(holding, 1)
  let further = 0
  for (let i = 1; i < levels.length; i++) if (candidates(input, i) > 0) further++
  for (let i = 1; i < levels.length; i++) {
    if (candidates(input, i) > 0) further--
    const share = Math.ceil(left * (input.shares[levels[i]?.distance ?? 0] ?? 1))
    take(i, i === levels.length - 1 ? left : Math.min(share, Math.max(Math.ceil(left / 2), left - further)))
  }
  for (let i = 1; i < levels.length; i++) take(i, left)
  for (let i = 1; i < levels.length; i++) give(i, taken[i] ?? 0)
}

/** Peers of a level that the requester may hear of. */
function candidates({ view, seeding }: SelectionInput, level: number): number {
  const there = view.levels[level]
  return there === undefined ? 0 : there.leechers + (seeding ? 0 : there.seeders)
}

/** How many of `draws` from both kinds together are of the first one, each peer equally likely: a draw of the hypergeometric distribution. */
export function drawOf(first: number, second: number, draws: number, random: () => number): number {
  if (second === 0) return draws
  let drawn = 0
  for (let i = 0; i < draws && drawn < first; i++)
    if (random() * (first + second - i) < first - drawn) drawn++
  return drawn
}
