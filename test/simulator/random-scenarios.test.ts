// Whatever a scenario file says at once, every host that can have the build gets it.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { describe, summarize } from '../../simulator/report.ts'
import { Scenario } from '../../simulator/scenario.ts'
import { simulate } from '../../simulator/simulate.ts'

const share = fc.constantFrom(0.1, 0.3, 1)
const moment = fc.constantFrom('100ms', '5s', '10%', '60%', '150%')
/** Moments and outages in seconds are no longer than that. */
const awaySeconds = 30

const scenario = fc.record(
  {
    seed: fc.nat(1000),
    hosts: fc.integer({ min: 1, max: 30 }),
    racks: fc.integer({ min: 1, max: 10 }),
    size: fc.constantFrom('1KiB', '300KiB', '4MiB', '16MiB'),
    host_uplink: fc.constantFrom('10Mb', '100Mb', '10Gb'),
    rack_uplink: fc.constantFrom('10Mb', '400Mb', '40Gb'),
    server_uplink: fc.constantFrom('5Mb', '1Gb'),
    rack_sizes: fc.constantFrom([1], [20], [3, 3]),
    rows: fc.integer({ min: 1, max: 3 }),
    row_uplink: fc.constantFrom('20Mb', '40Gb'),
    releases: fc.constantFrom(1, 2),
    jitter: fc.constantFrom('10ms', '5s'),
    setup: fc.constant('200ms'),
    delay: fc.constantFrom('1ms', '100ms'),
    from_server: fc.boolean(),
    slow: fc.record({ share, factor: fc.constantFrom(0.1, 0.5) }),
    standard_clients: fc.constantFrom(0.3, 1),
    churn: fc.record({ share, away: moment }),
    late: fc.record({ share, at: moment }),
    dead_gateways: fc.record({ racks: share, at: moment }),
    slow_racks: fc.record({ share, factor: fc.constantFrom(0.1, 0.5), at: moment }),
    tracker_away: fc.record({ at: moment, for: moment }),
    server_away: fc.record({ at: moment, for: moment }),
  },
  { requiredKeys: ['seed', 'hosts', 'racks', 'size', 'host_uplink', 'rack_uplink'] },
)

test('whatever is done to a fleet, every host that is there has the build in the end', () => {
  fc.assert(
    fc.property(scenario, (settings) => {
      const parsed = Scenario.parse(settings)
      const result = simulate(parsed)
      const { unfinished, seconds } = summarize(result)
      assert.equal(unfinished, 0, describe(result))
      const { hosts, size, releases, host_uplink: host, rack_uplink: rack } = parsed
      const { row_uplink: row = Infinity, server_uplink: server = Infinity } = parsed
      // Every host fetches its own copy over the slowest of all links, twice.
      const slowest = Math.min(host / 10, rack / 10, row, server)
      const worst = 60 + 4 * awaySeconds + (2 * hosts * size * releases) / slowest
      assert.ok((seconds.max ?? 0) < worst, `after ${worst} s: ${describe(result)}`)
    }),
    { numRuns: 60 },
  )
})
