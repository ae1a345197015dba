import { join } from 'node:path'
import type { BenchOptions, Benchmark, Side } from './harness.ts'
import type { LoadTarget } from './tracker-load.ts'
import { buildGenerator, rateFigures, toRateFigures, windowOf } from './tracker-load.ts'
import { describeOpentracker, startOpentracker, startReference } from './tracker-rivals.ts'
import { startTrackerServer } from './tracker-server.ts'

const shape = { protocol: 'http', swarms: 1000, peers: 50, numwant: 30, spin: true } as const

/** What an announce over HTTP costs, on one core. */
export const trackerHttp: Benchmark = {
  name: 'tracker-http',
  summary: 'HTTP announces, 30 peers a reply: a connection for each beside opentracker, kept beside fastify',
  figures: rateFigures,
  ignoresSize: true,
  prepare,
}

async function prepare(stack: AsyncDisposableStack, { directory }: BenchOptions): Promise<Side[]> {
  const generator = buildGenerator(directory)
  const at = (name: string) => join(directory, name)
  const own = stack.use(await startTrackerServer({ name: 'rackswarm', directory: at('own') }))
  const opentracker = stack.use(await startOpentracker(at('opentracker'), generator.hashes(shape.swarms)))
  const fastify = stack.use(await startReference('fastify', at('fastify'), 'fastify'))
  const bare = stack.use(await startReference('node:http', at('http'), 'http'))
  for (const [target, newConnections] of [
    [own.http, false],
    [opentracker, true],
  ] as const)
    await generator.load(target, { ...shape, newConnections, fill: true, seconds: 0 })

  const side = (target: LoadTarget, kind: string, settings: string, own: object): Side => ({
    name: `${target.name}, ${kind}`,
    settings,
    run: async () => toRateFigures(windowOf(await generator.load(target, { ...shape, ...own }))),
  })
  const each = { newConnections: true }
  const plain = { path: '/' }
  const load =
    'server on one core (taskset), generator on the other; 64 connections, one request at a time on each'
  return [
    side(
      own.http,
      'new connection each',
      `${shape.swarms} swarms of ${shape.peers} peers, no token approval; ${load}, over when the server has closed; 2 s of warm-up, 4 s measured; the kernel has the client pay for most of a connection, so where the server is not busy the rate is the generator's and the CPU compares`,
      each,
    ),
    side(opentracker, 'new connection each', `${describeOpentracker()}; the same swarms and load`, each),
    side(own.http, 'keep-alive', `the same swarms; ${load}`, {}),
    side(fastify, 'keep-alive', 'an empty route: GET / with an empty 200; the same Node and load', plain),
    side(bare, 'keep-alive', 'node:http with an empty 200; the same Node and load', plain),
    side(bare, 'new connection each', 'the same', { ...plain, ...each }),
  ]
}
