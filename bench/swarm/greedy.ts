// A hook of the tracker, for the side `greedy` of bench/swarm.ts: chihaya's preference of subnets as it was. Peers of one's own subnet until the
// reply is full, others only if it is not; and clients that know nothing of distances.
import type { PreHook } from '../../server/tracker/hooks.ts'

export default function ({ peersMax }: { peersMax: number }): PreHook {
  return {
    name: 'greedy',
    peers: (_request, peers) =>
      peers
        .toSorted((a, b) => a.distance - b.distance)
        .slice(0, peersMax)
        .map((peer) => ({ ...peer, distance: 0 })),
  }
}
