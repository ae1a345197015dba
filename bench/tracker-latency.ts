import { join } from 'node:path'
import type { BenchOptions, Benchmark, Side } from './harness.ts'
import type { LoadOptions, LoadTarget } from './tracker-load.ts'
import { buildGenerator, windowOf } from './tracker-load.ts'
import { describeOpentracker, startOpentracker, startReference } from './tracker-rivals.ts'
import { startTrackerServer } from './tracker-server.ts'

const shape = { swarms: 1000, peers: 50, numwant: 30 } as const
/** Enough for as many requests as wait while a server pauses for 50 ms. */
const connections = 1024

/** How long an announce takes at half of the rate that a server can do. */
export const trackerLatency: Benchmark = {
  name: 'tracker-latency',
  summary: 'latency of announces at half of the highest rate, from when each was to be sent',
  figures: [
    { name: 'highest rate', unit: 'announces/s' },
    { name: 'p50', unit: 'µs' },
    { name: 'p90', unit: 'µs' },
    { name: 'p99', unit: 'µs' },
    { name: 'p99.9', unit: 'µs' },
    { name: 'longest', unit: 'µs' },
    { name: 'CPU', unit: 'µs/announce' },
    { name: 'lost', unit: '' },
  ],
  ignoresSize: true,
  prepare,
}

async function prepare(stack: AsyncDisposableStack, { directory }: BenchOptions): Promise<Side[]> {
  const generator = buildGenerator(directory)
  const at = (name: string) => join(directory, name)
  const own = stack.use(
    await startTrackerServer({ name: 'rackswarm', directory: at('own'), udpHost: '127.0.0.1' }),
  )
  const opentracker = stack.use(await startOpentracker(at('opentracker'), generator.hashes(shape.swarms)))
  const bare = stack.use(await startReference('node:http', at('http'), 'http'))
  for (const target of [own.udp, opentracker])
    await generator.load(target, { protocol: 'udp', ...shape, fill: true, seconds: 0 })

  const side = (
    target: LoadTarget,
    kind: string,
    settings: string,
    own: Pick<LoadOptions, 'protocol' | 'path'>,
  ): Side => ({
    name: `${target.name}, ${kind}`,
    settings,
    run: async () => {
      const most = windowOf(await generator.load(target, { ...shape, ...own }))
      const half = windowOf(
        await generator.load(target, { ...shape, ...own, rate: most.rate / 2, connections, seconds: 10 }),
      )
      const { p50, p90, p99, p999, max } = half.latencyUs
      return {
        'highest rate': most.rate,
        p50,
        p90,
        p99,
        'p99.9': p999,
        longest: max,
        CPU: (half.cpuSeconds / half.announces) * 1e6,
        lost: half.lost,
      }
    },
  })
  return [
    side(
      own.udp,
      'UDP',
      `${shape.swarms} swarms of ${shape.peers} peers, no token approval; server on one core (taskset), generator on the other; 4 s as fast as it answers, then 10 s at half of that rate, evenly spaced, whether replies come or not`,
      { protocol: 'udp' },
    ),
    side(opentracker, 'UDP', `${describeOpentracker()}; the same swarms and load`, { protocol: 'udp' }),
    side(
      own.http,
      'HTTP keep-alive',
      `the same swarms; 64 connections for the highest rate, up to ${connections} at half of it`,
      { protocol: 'http' },
    ),
    side(bare, 'HTTP keep-alive', 'node:http with an empty 200; the same load', {
      protocol: 'http',
      path: '/',
    }),
  ]
}
