// An own engine in a process of its own, for tests that kill it. Prints what happens, one word and one number a line.
import { readFile } from 'node:fs/promises'
import { parseTorrent, pieceCount } from '../../../lib/protocol/metainfo.ts'
import { createRackswarmEngine } from '../../../agent/engine/rackswarm.ts'
import { peerAt, peerFeed } from './fixtures.ts'
import { engineConfig } from './own-engine.ts'

const [kind, torrent = '', file = '', peerPorts = '', uploadBytesPerSecond] = process.argv.slice(2)
const metainfo = parseTorrent(await readFile(torrent))
const engine = await createRackswarmEngine(
  engineConfig({
    limits: {
      downloadBytesPerSecond: undefined,
      uploadBytesPerSecond: uploadBytesPerSecond === undefined ? undefined : Number(uploadBytesPerSecond),
    },
  }),
  { monotonic: () => performance.now(), random: Math.random },
)
const { signal } = new AbortController()
if (kind === 'seed') {
  engine.seed({ metainfo, file, peers: peerFeed(), signal })
} else {
  const handle = engine.fetch({
    metainfo,
    file,
    peers: peerFeed(...peerPorts.split(',').map((port) => peerAt(Number(port)))),
    webseed: undefined,
    signal,
  })
  handle.onPiece((piece) => process.stdout.write(`piece ${piece}\n`))
  void handle.done.then(() => process.stdout.write(`done ${pieceCount(metainfo)}\n`))
}
process.stdout.write(`port ${engine.port}\n`)
