import { join } from 'node:path'
import type { BenchOptions, Benchmark, Side } from './harness.ts'
import type { LoadTarget } from './tracker-load.ts'
import { buildGenerator, rateFigures, toRateFigures, windowOf } from './tracker-load.ts'
import {
  describeOpentracker,
  installBittorrentTracker,
  startOpentracker,
  startReference,
} from './tracker-rivals.ts'
import { startTrackerServer } from './tracker-server.ts'

const swarms = 1000
const peers = 50
const numwant = 30
/** BEP 15: 20 bytes, and 6 for each peer. */
const replyBytes = 20 + numwant * 6
const manyPeers = 5000
/** More than a slow server answers within a second would be lost to it, though it is not. */
const slowWindow = 32

/** What an announce over UDP costs, on one core. */
export const trackerUdp: Benchmark = {
  name: 'tracker-udp',
  summary:
    'UDP announces, 30 peers a reply, beside an empty Node UDP echo, opentracker and bittorrent-tracker',
  figures: rateFigures,
  ignoresSize: true,
  prepare,
}

async function prepare(stack: AsyncDisposableStack, { directory }: BenchOptions): Promise<Side[]> {
  const generator = buildGenerator(directory)
  const at = (name: string) => join(directory, name)
  const own = stack.use(
    await startTrackerServer({ name: 'rackswarm', directory: at('own'), udpHost: '127.0.0.1' }),
  )
  const echo = stack.use(
    await startReference('empty Node UDP echo', at('echo'), 'udp-echo', String(replyBytes)),
  )
  const opentracker = stack.use(await startOpentracker(at('opentracker'), generator.hashes(swarms)))
  const version = await installBittorrentTracker(at('bittorrent-tracker'))
  const foreign = stack.use(
    await startReference('bittorrent-tracker', at('foreign'), 'bittorrent-tracker', at('bittorrent-tracker')),
  )
  const two = stack.use(
    await startTrackerServer({
      name: 'rackswarm, 2 workers',
      directory: at('two'),
      udpHost: '127.0.0.1',
      workers: 2,
      pinned: false,
    }),
  )
  const many = stack.use(
    await startTrackerServer({
      name: 'rackswarm, 5 million peers',
      directory: at('many'),
      udpHost: '127.0.0.1',
      peersMax: 6_000_000,
    }),
  )
  const shape = { protocol: 'udp', swarms, peers, numwant } as const
  for (const target of [own.udp, opentracker, two.udp])
    await generator.load(target, { ...shape, fill: true, seconds: 0 })
  await generator.load(foreign, { ...shape, window: slowWindow, fill: true, seconds: 0 })
  process.stderr.write('Filling a tracker with 5 million peers\n')
  await generator.load(many.udp, { ...shape, peers: manyPeers, fill: true, seconds: 0 })

  const side = (target: LoadTarget, settings: string, own = {}, pinned = true): Side => ({
    name: target.name,
    settings,
    run: async () =>
      toRateFigures(windowOf(await generator.load(target, { ...shape, spin: pinned, ...own }, pinned))),
  })
  return [
    side(
      own.udp,
      `${swarms} swarms of ${peers} peers, no token approval; server on one core (taskset), generator on the other, where it never sleeps (to wake it would be at the cost of the server, the more the slower that is); 128 announces under way over 16 sockets, 2 s of warm-up, 4 s measured; each reply checked`,
    ),
    side(
      echo,
      `node:dgram under the same Node and load, answers every datagram with the same ${replyBytes} bytes, which nobody looks at`,
      { blind: true },
    ),
    side(opentracker, `${describeOpentracker()}; the same swarms and load`),
    side(
      foreign,
      `bittorrent-tracker ${version} of npm under the same Node, UDP alone; the same swarms, ${slowWindow} announces under way`,
      { window: slowWindow },
    ),
    side(
      two.udp,
      'workers: 2, neither the server nor the generator held on a core: they share both, so look at the CPU and not at the rate',
      {},
      false,
    ),
    side(many.udp, `${swarms} swarms of ${manyPeers} peers, announced again at random`, { peers: manyPeers }),
  ]
}
