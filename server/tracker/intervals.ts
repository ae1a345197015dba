export interface IntervalConfig {
  /** Longest. */
  readonly announceIntervalMs: number
  /** Shortest. */
  readonly minAnnounceIntervalMs: number
}

/** What one swarm may ask of the tracker, announces a second: 10,000 leechers then announce every 20 s. */
const swarmAnnouncesPerSecond = 500

/**
 * When a peer should announce again, ms. Leechers soon, since the swarm changes under them, but later the more they
 * are; seeders as soon as there is someone to serve, else as late as allowed. Jittered by a tenth, so that hosts that
 * started together do not stay together.
 *
 * @param chance of the jitter, 0 ≤ chance < 1
 */
export function announceIntervalMs(
  swarm: { complete: number; incomplete: number; seeding: boolean },
  config: IntervalConfig,
  chance: number,
): number {
  const { announceIntervalMs: longest, minAnnounceIntervalMs: shortest } = config
  const fair = ((swarm.complete + swarm.incomplete) / swarmAnnouncesPerSecond) * 1000
  const leecher = Math.max(shortest, fair)
  // A seeder is found by those who announce; it announces to find those who cannot dial it.
  const wanted = swarm.seeding ? (swarm.incomplete > 0 ? leecher * 6 : longest) : leecher
  const jittered = wanted * (0.9 + chance * 0.2)
  return Math.min(longest, Math.max(shortest, jittered))
}

/** How long a peer is kept after being given an interval: it may miss one announce, not two. */
export function lifetimeMs(intervalMs: number): number {
  return Math.max(30_000, intervalMs * 2.5)
}
