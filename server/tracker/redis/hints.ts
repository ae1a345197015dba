import { LRUCache } from 'lru-cache'
import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import type { SwarmCounts } from '../../../lib/protocol/scrape.ts'
import type { StoreAnnounce } from '../peer-store.ts'
import type { Plan } from '../selection.ts'
import type { PlaceId } from '../topology.ts'
import type { AnnounceAnswer } from './announce-call.ts'
import type { NodeCounts, Wants } from './stretches.ts'
import { noCounts } from './stretches.ts'

/** What a server remembers of a swarm between two announces: guesses only. */
export interface SwarmHints {
  /** As last seen. */
  counts: SwarmCounts
  /** Until when (milliseconds) the swarm need not be listed again. */
  listedUntilMs: number
  /** How far the clock of the Redis that has the swarm is ahead of ours that never goes back; somewhat more than it is. */
  aheadMs?: number
  readonly nodes: Map<PlaceId, NodeCounts>
  readonly places: Map<number, PlaceHints>
}

/** The plans last chosen for hosts of a place, seeders and leechers apart; `choose` tells only afterwards what it wants, so the one before is taken for it. */
interface PlaceHints {
  numwant: number
  gateway: Plan | undefined
  other: Plan | undefined
  /** Lower ranks were gateways. */
  gatewaysBelow: number
  ranks: readonly number[]
}

/** Beyond them the oldest are forgotten: their next announce takes one more round trip. */
const swarmsMax = 10_000
const nodesPerSwarmMax = 2048

export function createHints(): LRUCache<InfoHash, SwarmHints> {
  return new LRUCache<InfoHash, SwarmHints>({ max: swarmsMax })
}

/** What an announcer of this rank may want, with a margin for what may have changed; undefined where nothing is known of its place. */
export function guessOf(
  hints: SwarmHints,
  announce: StoreAnnounce,
  rank: number,
): { wants: Wants; nodes: readonly NodeCounts[] } | undefined {
  const known = hints.places.get(keyOf(announce))
  if (!known) return undefined
  const plan = rankAmong(known.ranks, rank) < known.gatewaysBelow ? known.gateway : known.other
  if (!plan) return undefined
  const nodes = [hints.nodes.get(announce.place) ?? noCounts]
  for (const { node } of announce.ancestors) nodes.push(hints.nodes.get(node) ?? noCounts)
  const scale = Math.max(1, (announce.numwant ?? 0) / known.numwant)
  const more = (want: number) => (want === 0 ? 0 : Math.ceil(want * scale) + 1)
  return {
    wants: {
      rack: more(plan.rack) + (plan.rack >> 3),
      seeders: plan.seeders.map(more),
      leechers: plan.leechers.map(more),
    },
    nodes,
  }
}

/** Remembers what there was, and what was chosen of it. */
export function remember(
  hints: SwarmHints,
  announce: StoreAnnounce,
  { nodes, ranks }: AnnounceAnswer,
  chosen: { readonly plan: Plan; readonly rank: number },
): void {
  setBounded(hints.nodes, announce.place, nodes[0] ?? noCounts)
  for (const [i, { node }] of announce.ancestors.entries())
    setBounded(hints.nodes, node, nodes[i + 1] ?? noCounts)
  const key = keyOf(announce)
  const { plan, rank } = chosen
  let known = hints.places.get(key)
  if (!known) {
    known = { numwant: 0, gateway: undefined, other: undefined, gatewaysBelow: 0, ranks }
    setBounded(hints.places, key, known)
  }
  known.numwant = Math.max(1, announce.numwant ?? 1)
  known.ranks = ranks
  if (plan.gateway) {
    known.gateway = plan
    known.gatewaysBelow = Math.max(known.gatewaysBelow, rank + 1)
  } else {
    known.other = plan
    known.gatewaysBelow = Math.min(known.gatewaysBelow, rank)
  }
}

/** How many of the lowest ranks are lower than this one. */
export function rankAmong(ranks: readonly number[], rank: number): number {
  let lower = 0
  for (const other of ranks) if (other < rank) lower++
  return lower
}

function keyOf({ place, left }: StoreAnnounce): number {
  return place * 2 + (left === 0 ? 0 : 1)
}

/** Sets a value; where it is one too many the oldest goes. */
function setBounded<Key, Value>(map: Map<Key, Value>, key: Key, value: Value): void {
  map.set(key, value)
  if (map.size <= nodesPerSwarmMax) return
  for (const oldest of map.keys()) {
    map.delete(oldest)
    return
  }
}
