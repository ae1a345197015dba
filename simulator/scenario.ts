import { z } from 'zod'
import { duration, rate, size } from '../lib/runtime/config.ts'

/** `500ms` since the start, or `50%` of the bound: then a scenario means the same for any size. As a number of ms, or a share below zero. */
function moment() {
  return z.union([
    duration(),
    z
      .string()
      .regex(/^\d+(\.\d+)?%$/, 'need a duration such as 500ms, or a share of the bound such as 50%')
      .transform((text) => ({ ofBound: Number.parseFloat(text) / 100 })),
  ])
}

export type Moment = z.output<ReturnType<typeof moment>>

const share = z.number().min(0).max(1)

/** What is simulated; a scenario file is YAML of this. */
export const Scenario = z.strictObject({
  seed: z.int().min(0).default(1).describe('Of all that is random: the same seed gives the same run.'),
  hosts: z.int().min(1).max(100_000).default(1000).describe('Hosts that fetch.'),
  racks: z.int().min(1).default(25).describe('Racks that they are spread over evenly.'),
  rack_sizes: z
    .array(z.int().min(1))
    .optional()
    .describe('In place of that: hosts of the first racks; the rest is spread over the others.'),
  rows: z.int().min(1).optional().describe('Rows that the racks are spread over, a level above them.'),
  size: size().prefault('1.5GB').describe('Of the build.'),
  releases: z.int().min(1).max(4).default(1).describe('Builds that every host fetches at once.'),
  host_uplink: rate().prefault('10Gb').describe('Of each host, in each direction.'),
  rack_uplink: rate().prefault('40Gb').describe('Of each rack, in each direction.'),
  row_uplink: rate().optional().describe('Of each row, in each direction. Default: no limit.'),
  server_uplink: rate().optional().describe('Of the server, which is a rack of its own. Default: as a host.'),
  jitter: duration().prefault('0ms').describe('Hosts begin within this long.'),
  setup: duration().prefault('0ms').describe('From the tag to the first announce, of each host.'),
  delay: duration()
    .prefault('0ms')
    .describe('Of all that one host says to another, one way: full queues make it long on slow links.'),
  from_server: z
    .boolean()
    .default(true)
    .describe('The server has the build, as its webseed. Else the first host does.'),
  slow: z
    .strictObject({ share, factor: z.number().positive().default(0.1) })
    .optional()
    .describe('A share of the hosts has only so much of its link.'),
  standard_clients: share
    .default(0)
    .describe('A share of the hosts runs other BitTorrent clients, which see no distances.'),
  churn: z
    .strictObject({ share, away: moment().prefault('50%') })
    .optional()
    .describe('A share of the hosts goes away at a random moment and comes back with what it had.'),
  late: z.strictObject({ share, at: moment() }).optional().describe('A share of the hosts begins only then.'),
  dead_gateways: z
    .strictObject({ racks: share.default(1), at: moment() })
    .optional()
    .describe('In a share of the racks a host that fetches from outside goes away for good.'),
  slow_racks: z
    .strictObject({
      share,
      factor: z.number().positive().default(0.1),
      at: moment().prefault('0ms'),
      for: moment().optional(),
    })
    .optional()
    .describe(
      'The uplinks of a share of the racks have only so much of their rate, from then on or for a while.',
    ),
  seed_dies: z
    .strictObject({ after_copies: z.number().positive() })
    .optional()
    .describe('Whoever had the build first is gone once it has sent so many copies of it.'),
  tracker_away: z
    .strictObject({ at: moment(), for: moment() })
    .optional()
    .describe('The tracker does not answer.'),
  server_away: z
    .strictObject({ at: moment(), for: moment() })
    .optional()
    .describe('Neither does it, nor does the server send.'),
})
export type Scenario = z.output<typeof Scenario>

/** Hosts of each rack; where the racks that are given are not enough for all, they have more than they were given, and fewer where they are too many. */
export function rackSizesOf({ hosts, racks, rack_sizes: given = [] }: Scenario): number[] {
  const sizes: number[] = []
  let left = hosts
  for (const size of given.slice(0, racks)) {
    sizes.push(Math.min(size, left))
    left -= sizes.at(-1) ?? 0
  }
  const others = racks - sizes.length
  const [from, count] = others > 0 ? [sizes.length, others] : [0, racks]
  for (let i = 0; i < count; i++)
    sizes[from + i] = (sizes[from + i] ?? 0) + Math.floor(left / count) + (i < left % count ? 1 : 0)
  return sizes.filter((size) => size > 0)
}
