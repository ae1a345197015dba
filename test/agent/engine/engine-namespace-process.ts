// An engine in a process of its own, so that it can have a network of its own. It announces as an agent does. Says `ready`, `done` once it
// has everything, and its traffic as JSON whenever it gets a line; ends with its stdin.
import { readFile } from 'node:fs/promises'
import { Agent } from 'undici'
import { createAnnouncer } from '../../../agent/announcer.ts'
import type { EngineHandle } from '../../../agent/engine/engine.ts'
import { createRackswarmEngine } from '../../../agent/engine/rackswarm.ts'
import { createWebtorrentEngine } from '../../../agent/engine/webtorrent/webtorrent.ts'
import { parseTorrent } from '../../../lib/protocol/metainfo.ts'
import { silentLog } from '../../../lib/runtime/log.ts'
import { peerAt, peerFeed } from './fixtures.ts'
import { engineConfig, unlimited } from './own-engine.ts'

export interface EngineProcessOptions {
  readonly engine: 'rackswarm' | 'webtorrent'
  readonly kind: 'seed' | 'fetch'
  readonly port: number
  readonly torrent: string
  readonly file: string
  /** The tracker that tells it of peers, or the peers themselves. */
  readonly peers: string | readonly { readonly host: string; readonly port: number }[]
  readonly uploadBytesPerSecond?: number
}

const options = JSON.parse(process.argv[2] ?? '') as EngineProcessOptions
const { kind, file } = options
const metainfo = parseTorrent(await readFile(options.torrent))
const deps = { monotonic: () => performance.now(), random: Math.random }
const createEngine = { rackswarm: createRackswarmEngine, webtorrent: createWebtorrentEngine }[options.engine]
const engine = await createEngine(
  engineConfig({
    port: options.port,
    limits: { ...unlimited, uploadBytesPerSecond: options.uploadBytesPerSecond },
  }),
  deps,
)
const announcer = createAnnouncer({
  peerId: engine.peerId,
  port: engine.port,
  dispatcher: new Agent(),
  now: Date.now,
  log: silentLog(),
  ...deps,
})
// What is announced first is what is known before the torrent is added.
let handle: EngineHandle | undefined = undefined
const say = (line: string) => process.stdout.write(`${line}\n`)

const { announcement, peers } = announce()
const { signal } = new AbortController()
const added =
  kind === 'seed'
    ? engine.seed({ metainfo, file, peers, signal })
    : engine.fetch({ metainfo, file, peers, webseed: undefined, signal })
handle = added
say('ready')
process.stdin
  .on('data', () => say(JSON.stringify(added.traffic())))
  .on('end', () => {
    process.exit()
  })
await added.done
if (kind === 'fetch') announcement?.completed()
say('done')

function announce() {
  if (typeof options.peers !== 'string')
    return { peers: peerFeed(...options.peers.map(({ host, port }) => peerAt(port, { host }))) }
  const now = Date.now()
  const grant = { announceUrl: options.peers, token: 'none', obtainedAt: now, expiresAt: now + 3_600_000 }
  const announcement = announcer.add({
    infoHash: metainfo.infoHash,
    grant,
    renew: async () => grant,
    progress: () => ({
      left: kind === 'seed' ? 0 : metainfo.length - (handle?.bytesVerified ?? 0),
      downloaded: 0,
      uploaded: 0,
    }),
  })
  return { announcement, peers: announcement.peers }
}
