// One side of a transfer in a process of its own: `rackswarm|rackswarm-tls|webtorrent|floor seed|fetch TORRENT FILE`.
// It says `ready PORT`. A fetch starts with the line `go PORT` on stdin, where PORT is the seeder's, and says `done` once every
// piece is verified and written. It stays, to be asked for its CPU and memory, until stdin ends.
import { readFile } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import type { Engine } from '../agent/engine/engine.ts'
import { createHostIdentity } from '../agent/host-identity.ts'
import type { Metainfo } from '../lib/protocol/metainfo.ts'
import { parseTorrent } from '../lib/protocol/metainfo.ts'
import { peerAt, peerFeed } from '../test/agent/engine/fixtures.ts'
import { engineConfig } from '../test/agent/engine/own-engine.ts'

type Mode = 'seed' | 'fetch'

interface Transfer {
  /** 0 where nobody can dial it. */
  readonly port: number
  fetch(from: number): Promise<void>
}

const config = engineConfig({ connectionsMax: 64, address: '127.0.0.1' })
const deps = { monotonic: () => performance.now(), random: Math.random }

const [name = '', mode = '', torrent = '', file = ''] = process.argv.slice(2)
if (mode !== 'seed' && mode !== 'fetch') throw new Error(`There is no mode ${mode}`)
const metainfo = parseTorrent(await readFile(torrent))
const transfer = await start(name, mode)
const lines = createInterface(process.stdin)
lines.once('close', () => process.exit())
process.stdout.write(`ready ${transfer.port}\n`)
if (mode === 'fetch') {
  const line = await new Promise<string>((settle) => lines.once('line', settle))
  await transfer.fetch(Number(line.split(' ')[1]))
  process.stdout.write('done\n')
}

/** What is not asked for is not imported, so that it takes no memory. */
async function start(side: string, as: Mode): Promise<Transfer> {
  switch (side) {
    case 'rackswarm': {
      const { createRackswarmEngine } = await import('../agent/engine/rackswarm.ts')
      return startEngine(await createRackswarmEngine(config, deps), as, metainfo)
    }
    case 'rackswarm-tls': {
      const { createRackswarmEngine } = await import('../agent/engine/rackswarm.ts')
      const tls = { ...createHostIdentity('bench'), required: true }
      return startEngine(await createRackswarmEngine({ ...config, tls }, deps), as, metainfo)
    }
    case 'webtorrent': {
      const { createWebtorrentEngine } = await import('../agent/engine/webtorrent/webtorrent.ts')
      return startEngine(await createWebtorrentEngine(config, deps), as, metainfo)
    }
    case 'floor': {
      const { prepareFloorFetch, startFloorSeeder } = await import('./engine-floor.ts')
      return as === 'seed' ? startFloorSeeder(file) : prepareFloorFetch(metainfo, file)
    }
    default:
      throw new Error(`There is no side ${side}`)
  }
}

async function startEngine(engine: Engine, as: Mode, blob: Metainfo): Promise<Transfer> {
  const { signal } = new AbortController()
  if (as === 'seed') await engine.seed({ metainfo: blob, file, peers: peerFeed(), signal }).done
  return {
    port: engine.port,
    fetch: (from) =>
      engine.fetch({ metainfo: blob, file, peers: peerFeed(peerAt(from)), webseed: undefined, signal }).done,
  }
}
