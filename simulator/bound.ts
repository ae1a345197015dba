import type { Scenario } from './scenario.ts'

export interface Bounds {
  /** The largest of the others, seconds. */
  readonly seconds: number
  readonly fluid: number
  readonly rackUplink: number
  readonly storeAndForward: number
}

/**
 * What no scheme can be faster than, from the capacities alone: the fluid bound (Kumar and Ross, "Peer-assisted file distribution", 2006), one copy
 * over each rack's uplink, and the time until the last of so many pieces has doubled to all hosts (Mundinger, Weber and Weiss, 2008).
 */
export function boundsOf(scenario: Scenario, pieces: number, rackSizes: readonly number[]): Bounds {
  const bytes = scenario.size * scenario.releases
  const { hosts, host_uplink: host, rack_uplink: rack } = scenario
  const slowShare = scenario.slow?.share ?? 0
  const slowest = slowShare > 0 ? host * (scenario.slow?.factor ?? 1) : host
  const seed = scenario.from_server ? (scenario.server_uplink ?? host) : host
  const receivers = scenario.from_server ? hosts : hosts - 1
  const uploads = hosts * host * (1 - slowShare) + hosts * slowShare * slowest
  const fluid = Math.max(
    bytes / seed,
    bytes / slowest,
    (receivers * bytes) / (scenario.from_server ? seed + uploads : uploads),
  )
  const rackUplink = rackSizes.length > 1 || scenario.from_server ? bytes / rack : 0
  const storeAndForward = (bytes / host) * (1 + Math.floor(Math.log2(Math.max(1, receivers))) / pieces)
  return { seconds: Math.max(fluid, rackUplink, storeAndForward), fluid, rackUplink, storeAndForward }
}
