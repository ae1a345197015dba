import type { Bounds } from '../../simulator/bound.ts'
import type { Moment, Scenario } from '../../simulator/scenario.ts'
import type { HostStation } from './network.ts'

/** What can be done to a swarm; each is a key of a scenario, as the simulator knows it. */
export const faultNames = [
  'churn',
  'slow',
  'dead_gateways',
  'slow_racks',
  'seed_dies',
  'tracker_away',
  'server_away',
  'late',
  'releases',
] as const
export type FaultName = (typeof faultNames)[number]

/** The settings of a scenario that has a fault, at a random point. */
export function faultSettings(name: FaultName, random: () => number): Record<string, unknown> {
  const between = (from: number, to: number) => `${Math.round(from + random() * (to - from))}%`
  const settings: Record<FaultName, () => unknown> = {
    churn: () => ({ share: 0.2, away: between(10, 40) }),
    slow: () => ({ share: 0.1, factor: 0.1 }),
    dead_gateways: () => ({ racks: 1, at: between(10, 70) }),
    slow_racks: () => ({ share: 0.2, factor: 0.1, at: between(10, 60), for: between(20, 40) }),
    seed_dies: () => ({ after_copies: 1.05 }),
    tracker_away: () => ({ at: between(5, 60), for: between(20, 40) }),
    server_away: () => ({ at: between(5, 60), for: between(20, 40) }),
    late: () => ({ share: 0.1, at: between(30, 90) }),
    releases: () => 2,
  }
  return { [name]: settings[name]() }
}

/** What a scenario does to its swarm. */
export function faultsOf(scenario: Scenario): FaultName[] {
  return faultNames.filter((name) =>
    name === 'releases' ? scenario.releases > 1 : scenario[name] !== undefined,
  )
}

/** The hands that do it. */
export interface Deeds {
  readonly kill: (host: HostStation) => Promise<void>
  readonly start: (host: HostStation) => Promise<void>
  /** The host that has brought most into its rack, of those that do not have it all. */
  readonly gatewayOf: (rack: number) => Promise<HostStation | undefined>
  readonly setRackRate: (rack: number, rate: number) => Promise<void>
  readonly killServer: () => Promise<void>
  readonly startServer: () => Promise<void>
  readonly silenceTracker: (silent: boolean) => Promise<void>
}

export interface Deed {
  readonly atMs: number
  readonly what: string
  readonly act: (deeds: Deeds) => Promise<void>
}

/** Who is hit by what, and when, from the moment on that the tag is visible. */
export interface FaultPlan {
  readonly slow: ReadonlySet<number>
  readonly late: ReadonlySet<number>
  /** Grows: gateways are found when they die. */
  readonly hit: Set<number>
  readonly gone: Set<number>
  /** The longest that something is away, which a deploy may take longer. */
  readonly outageSeconds: number
  readonly deeds: readonly Deed[]
  /** The server is killed once it has sent so many copies. */
  readonly serverDiesAfter: number | undefined
}

export function planFaults(
  scenario: Scenario,
  {
    hosts,
    rackCount,
    bounds,
    random,
  }: {
    readonly hosts: readonly HostStation[]
    readonly rackCount: number
    readonly bounds: Bounds
    readonly random: () => number
  },
): FaultPlan {
  const ms = (moment: Moment) =>
    typeof moment === 'number' ? moment : moment.ofBound * bounds.seconds * 1000
  const { churn, slow, dead_gateways: gateways, slow_racks: slowRacks, late } = scenario
  const { tracker_away: trackerAway, server_away: serverAway, seed_dies: seedDies } = scenario
  const deeds: Deed[] = []
  const outages = [0]
  const slowHosts = shareOf(hosts.length, slow?.share ?? 0, random)
  const lateHosts = shareOf(hosts.length, late?.share ?? 0, random)
  const hit = new Set([...slowHosts, ...lateHosts])
  const gone = new Set<number>()
  const plan = (atMs: number, what: string, act: Deed['act']) => deeds.push({ atMs, what, act })

  for (const host of hosts.filter(({ index }) => late && lateHosts.has(index)))
    plan(ms(late?.at ?? 0), `host ${host.index} joins`, ({ start }) => start(host))
  outages.push(late ? ms(late.at) : 0)
  if (churn) {
    outages.push(ms(churn.away))
    for (const index of shareOf(hosts.length, churn.share, random)) {
      const host = hosts[index]
      if (host === undefined) continue
      hit.add(index)
      const atMs = random() * bounds.seconds * 1000
      plan(atMs, `host ${index} goes`, ({ kill }) => kill(host))
      plan(atMs + ms(churn.away), `host ${index} comes back`, ({ start }) => start(host))
    }
  }
  if (gateways) {
    for (const rack of shareOf(rackCount, gateways.racks, random))
      plan(ms(gateways.at), `the gateway of rack ${rack} dies`, async ({ gatewayOf, kill }) => {
        const host = await gatewayOf(rack)
        if (host === undefined) return
        hit.add(host.index)
        gone.add(host.index)
        await kill(host)
      })
  }
  if (slowRacks) {
    const racks = shareOf(rackCount, slowRacks.share, random)
    for (const host of hosts) if (racks.has(host.rack)) hit.add(host.index)
    for (const rack of racks) {
      plan(ms(slowRacks.at), `the uplink of rack ${rack} is slow`, ({ setRackRate }) =>
        setRackRate(rack, scenario.rack_uplink * slowRacks.factor),
      )
      if (slowRacks.for !== undefined)
        plan(ms(slowRacks.at) + ms(slowRacks.for), `the uplink of rack ${rack} is well`, ({ setRackRate }) =>
          setRackRate(rack, scenario.rack_uplink),
        )
    }
    outages.push(slowRacks.for === undefined ? 0 : ms(slowRacks.for))
  }
  if (trackerAway) {
    outages.push(ms(trackerAway.for))
    plan(ms(trackerAway.at), 'the tracker falls silent', ({ silenceTracker }) => silenceTracker(true))
    plan(ms(trackerAway.at) + ms(trackerAway.for), 'the tracker answers', ({ silenceTracker }) =>
      silenceTracker(false),
    )
  }
  if (serverAway) {
    outages.push(ms(serverAway.for))
    plan(ms(serverAway.at), 'the server dies', ({ killServer }) => killServer())
    plan(ms(serverAway.at) + ms(serverAway.for), 'the server is started', ({ startServer }) => startServer())
  }
  return {
    slow: slowHosts,
    late: lateHosts,
    hit,
    gone,
    outageSeconds: Math.max(...outages) / 1000,
    deeds,
    serverDiesAfter: seedDies?.after_copies,
  }
}

/** Indexes below `count` of a share of them. */
export function shareOf(count: number, share: number, random: () => number): Set<number> {
  const chosen = new Set<number>()
  while (chosen.size < Math.round(share * count)) chosen.add(Math.floor(random() * count))
  return chosen
}
