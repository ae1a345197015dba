// An own engine in a process of its own. It is told what to do in lines of JSON, and tells in lines of JSON what it sees.
import { createHash } from 'node:crypto'
import { open, readFile } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import type { EngineHandle } from '../../../agent/engine/engine.ts'
import { createRackswarmEngine } from '../../../agent/engine/rackswarm.ts'
import { parseTorrent } from '../../../lib/protocol/metainfo.ts'
import { peerAt, peerFeed, randomOf } from '../../agent/engine/fixtures.ts'
import { engineConfig } from '../../agent/engine/own-engine.ts'

export interface HostOptions {
  readonly kind: 'fetch' | 'seed'
  readonly torrent: string
  readonly file: string
  readonly uploadBytesPerSecond?: number | undefined
  readonly seed: number
}

export interface HostPeer {
  readonly port: number
  readonly host?: string
}

export type Command =
  | { readonly kind: 'peers'; readonly peers: readonly HostPeer[] }
  /** After a fetch has failed. */
  | { readonly kind: 'again' }

/** How a fetch goes. */
export interface Progress {
  readonly receivedBytes: number
  readonly verifiedBytes: number
  /** The longest time without a byte since there were peers. */
  readonly stillMs: number
  readonly waiting: string | undefined
}

export type Report =
  | { readonly kind: 'listening'; readonly port: number }
  | { readonly kind: 'piece'; readonly piece: number }
  | ({ readonly kind: 'progress' } & Progress)
  | { readonly kind: 'done'; readonly sha256: string; readonly tookMs: number }
  | { readonly kind: 'failed'; readonly message: string }

const progressMs = 50

const options = JSON.parse(process.argv[2] ?? '') as HostOptions
const metainfo = parseTorrent(await readFile(options.torrent))
const engine = await createRackswarmEngine(
  engineConfig({
    limits: { downloadBytesPerSecond: undefined, uploadBytesPerSecond: options.uploadBytesPerSecond },
  }),
  { monotonic: () => performance.now(), random: randomOf(options.seed) },
)
const known: HostPeer[] = []
let feed = peerFeed()
let toldAtMs: number | undefined
if (options.kind === 'seed')
  engine.seed({ metainfo, file: options.file, peers: feed, signal: new AbortController().signal })
else fetchOnce()
report({ kind: 'listening', port: engine.port })

const commands = createInterface(process.stdin)
commands.on('line', (line) => {
  const command = JSON.parse(line) as Command
  if (command.kind === 'again') {
    feed = peerFeed(...known.map(enginePeer))
    fetchOnce()
    return
  }
  toldAtMs ??= performance.now()
  known.push(...command.peers)
  feed.push(...command.peers.map(enginePeer))
})
// Whoever started it has ended.
commands.once('close', () => {
  process.exit()
})

function fetchOnce(): void {
  const { file } = options
  const handle = engine.fetch({
    metainfo,
    file,
    peers: feed,
    webseed: undefined,
    signal: new AbortController().signal,
  })
  handle.onPiece((piece) => {
    report({ kind: 'piece', piece })
  })
  const watch = watchProgress(handle)
  const timer = setInterval(watch, progressMs)
  void handle.done.then(
    async () => {
      clearInterval(timer)
      watch()
      const tookMs = performance.now() - (toldAtMs ?? 0)
      report({ kind: 'done', sha256: await sha256Of(file), tookMs })
    },
    (error: unknown) => {
      clearInterval(timer)
      report({ kind: 'failed', message: error instanceof Error ? error.message : String(error) })
    },
  )
}

function watchProgress(handle: EngineHandle): () => void {
  let receivedBytes = 0
  let movedAtMs: number | undefined
  let stillMs = 0
  return () => {
    const now = performance.now()
    const received = handle.traffic().reduce((sum, { downloadedBytes }) => sum + downloadedBytes, 0)
    if (toldAtMs !== undefined) stillMs = Math.max(stillMs, now - (movedAtMs ??= toldAtMs))
    if (received > receivedBytes) movedAtMs = now
    receivedBytes = received
    report({
      kind: 'progress',
      receivedBytes,
      verifiedBytes: handle.bytesVerified,
      stillMs,
      waiting: handle.waitingReason,
    })
  }
}

function enginePeer({ port, host }: HostPeer) {
  return peerAt(port, host === undefined ? {} : { host })
}

async function sha256Of(file: string): Promise<string> {
  const hash = createHash('sha256')
  // One buffer: what is resident is to be the engine's.
  const buffer = Buffer.alloc(64 * 1024)
  await using handle = await open(file, 'r')
  for (;;) {
    const { bytesRead } = await handle.read(buffer, 0, buffer.length)
    if (bytesRead === 0) break
    hash.update(buffer.subarray(0, bytesRead))
  }
  return hash.digest('hex')
}

function report(what: Report): void {
  process.stdout.write(`${JSON.stringify(what)}\n`)
}
