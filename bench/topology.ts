import { randomBytes } from 'node:crypto'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { Family, Ip } from '../lib/protocol/address.ts'
import { formatIp } from '../lib/protocol/address.ts'
import { readPlaceTable } from '../server/tracker/place-table.ts'
import type { PrefixTable } from '../server/tracker/prefix-table.ts'
import type { Topology } from '../server/tracker/topology.ts'
import { createTopology } from '../server/tracker/topology.ts'
import type { BenchOptions, Benchmark, Side } from './harness.ts'

const addressesAsked = 1_000_000

/** What a table of networks costs: at a start or reload, and in each announce. */
export const topology: Benchmark = {
  name: 'topology',
  summary: 'from a CSV file of nested networks to look-ups, and a look-up of addresses never seen before',
  figures: [
    { name: 'file to look-ups', unit: 'ms' },
    { name: 'IPv4', unit: 'ns' },
    { name: 'IPv6', unit: 'ns' },
    { name: 'IPv4 in no network', unit: 'ns' },
    { name: 'IPv6 in no network', unit: 'ns' },
  ],
  ignoresSize: true,
  prepare,
}

async function prepare(_stack: AsyncDisposableStack, { directory }: BenchOptions): Promise<Side[]> {
  return Promise.all(
    [50_000, 1_000_000].map(async (count): Promise<Side> => {
      const file = join(directory, `${count}.csv`)
      await writeFile(file, tableOf(count))
      return {
        name: `${count.toLocaleString('en')} networks`,
        settings: `half of them IPv4, from /12 to /32 within 8.0.0.0/6, half IPv6, from /32 to /96 within 2001:db8::/32, at random and in no order, in 2000 places; read in a thread of its own, as a server does; ${addressesAsked} random addresses, each asked for once`,
        run: async () => {
          const fromMs = performance.now()
          const opened = open(await readPlaceTable(file, []))
          const readMs = performance.now() - fromMs
          return {
            'file to look-ups': readMs,
            IPv4: lookUpNs(opened, 4, [10]),
            IPv6: lookUpNs(opened, 6, [0x20, 0x01, 0x0d, 0xb8]),
            'IPv4 in no network': lookUpNs(opened, 4, [203]),
            'IPv6 in no network': lookUpNs(opened, 6, [0xfd]),
          }
        },
      }
    }),
  )
}

function open(prefixes: PrefixTable): Topology {
  return createTopology({
    levels: ['rack'],
    places: {},
    prefixes,
    ipv4PrefixLength: 24,
    ipv6PrefixLength: 64,
  })
}

function tableOf(count: number): string {
  const lines = new Map<string, string>()
  while (lines.size < count) {
    const family = lines.size % 2 === 0 ? 4 : 6
    const bytes = randomIp(family, family === 4 ? [8 + below(4)] : [0x20, 0x01, 0x0d, 0xb8])
    const length = family === 4 ? 12 + below(21) : 32 + below(65)
    for (let bit = length; bit < 8 * bytes.length; bit++)
      bytes[bit >> 3] = (bytes[bit >> 3] ?? 0) & ~(0x80 >> (bit & 7))
    lines.set(`${formatIp({ family, bytes })}/${length}`, `rack-${below(2000)}`)
  }
  return ['cidr,place', ...[...lines].map((line) => line.join(',')), ''].join('\n')
}

function lookUpNs(places: Topology, family: Family, start: readonly number[]): number {
  const ips: Ip[] = Array.from({ length: addressesAsked }, () => ({ family, bytes: randomIp(family, start) }))
  let sum = 0
  const fromMs = performance.now()
  for (const ip of ips) sum ^= places.placeOfAddress(ip)
  const ms = performance.now() - fromMs
  if (!Number.isInteger(sum)) throw new Error('no places')
  return (1e6 * ms) / ips.length
}

let pool = Buffer.alloc(0)
/** Cut from one pool: a million calls for random bytes would take longer than all else. */
function randomIp(family: Family, start: readonly number[]): Uint8Array {
  const width = family === 4 ? 4 : 16
  if (pool.length < width) pool = randomBytes(2 ** 20)
  const bytes = Uint8Array.from(pool.subarray(0, width))
  pool = pool.subarray(width)
  bytes.set(start)
  return bytes
}

function below(count: number): number {
  return Math.floor(Math.random() * count)
}
