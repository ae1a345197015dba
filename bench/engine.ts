import { spawn, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { mkdir, open, rename, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { createInterface } from 'node:readline'
import { pieceLengthFor, writeBlobInfo, writeTorrent } from '../lib/protocol/metainfo.ts'
import { bundle } from '../packaging/bundle.ts'
import { peerAt, withDeadline } from '../test/agent/engine/fixtures.ts'
import { removeAll, writeRandomFile } from '../test/support/fleet.ts'
import { aria2Options, freePort, startTinyTracker } from '../test/support/foreign.ts'
import { untilListening } from '../test/support/until.ts'
import type { BenchOptions, Benchmark, Side } from './harness.ts'
import { cpuSecondsOf } from './harness.ts'
import { readDescendants, readPeakMemoryMiB, readTotalCpu } from './proc.ts'
import { transferFigures } from './transfer.ts'

/** Engines alone: no agent, no SHA-256, no tracker. */
export const engine: Benchmark = {
  name: 'engine',
  summary:
    'one blob from one engine to another, and to eight, beside webtorrent, aria2, libtorrent and the raw floor',
  figures: [...transferFigures, { name: 'busy while fetching', unit: '' }],
  prepare,
}

const crowd = 8
/**
 * The blob that eight fetch, as a part of `--size`: they write twice that, which stays in the memory that the harness warms, and below
 * what has the kernel hold writers up for the disk.
 */
const crowdShare = 1 / 4
const startSeconds = 120
const fetchSeconds = 600

interface Blob {
  readonly sizeBytes: number
  /** Named by its SHA-256, alone in `directory`. */
  readonly name: string
  readonly directory: string
  readonly file: string
  readonly torrent: string
  /** The bencoded `info` of the torrent. */
  readonly info: Buffer
}

interface Seeder extends AsyncDisposable {
  readonly pid: number
  readonly port: number
}

interface Fetcher extends AsyncDisposable {
  readonly pid: number
  /** Resolves when every piece is verified. */
  fetch(seeder: Seeder): Promise<void>
  /** Resolves when the file can be compared. */
  flushed(): Promise<void>
}

interface Client {
  readonly name: string
  readonly settings: string
  startSeeder(blob: Blob): Promise<Seeder>
  /** Starts it up to where it can be told to fetch. Its copy is to have the blob's name in `directory`. */
  startFetcher(blob: Blob, directory: string): Promise<Fetcher>
}

async function prepare(stack: AsyncDisposableStack, options: BenchOptions): Promise<Side[]> {
  const { directory, sizeBytes } = options
  const program = join(directory, 'bundled', 'engine-process.js')
  await bundle({ 'engine-process': 'bench/engine-process.ts' }, dirname(program))
  const blob = await writeBlob(join(directory, 'blob'), sizeBytes)
  const shared = await writeBlob(join(directory, 'shared'), Math.ceil(sizeBytes * crowdShare))
  const rackswarm = own(
    program,
    'rackswarm',
    'createRackswarmEngine, bundled as it is shipped, no limits, 64 connections',
  )
  const secure = own(program, 'rackswarm-tls', 'the same, peer_tls: require')
  const webtorrent = own(
    program,
    'webtorrent',
    'createWebtorrentEngine, bundled as it is shipped, no limits, 64 connections',
  )
  const floor = own(
    program,
    'floor',
    'bench/engine-floor.ts: one TCP connection without a protocol; read into 256 KiB, copied into pieces, SHA-1 and write in one worker thread',
  )
  const libtorrent = startableLibtorrent()

  let number = 0
  const side = async (client: Client, of: Blob, fetchers: number): Promise<Side> => {
    const seeder = stack.use(await client.startSeeder(of))
    const several = fetchers > 1
    return {
      name: several ? `${client.name}, one to ${fetchers}` : client.name,
      settings: `${client.settings}; ${several ? `${fetchers} fetchers at once that know the seeder alone, a blob of ${of.sizeBytes} bytes each; rate and CPU of all, memory of the largest` : 'one fetcher'}; from "go" to every piece verified; every copy compared`,
      run: async () => {
        const home = join(directory, `fetched-${++number}`)
        try {
          return await measureFetch(client, of, seeder, fetchers, home)
        } finally {
          await removeAll(home)
        }
      },
    }
  }
  return [
    await side(rackswarm, blob, 1),
    await side(secure, blob, 1),
    await side(webtorrent, blob, 1),
    await side(await startableAria2(stack, blob), blob, 1),
    await side(libtorrent, blob, 1),
    await side(floor, blob, 1),
    await side(await nginx(stack, blob), blob, 1),
    await side(rackswarm, shared, crowd),
    await side(libtorrent, shared, crowd),
  ]
}

async function measureFetch(client: Client, blob: Blob, seeder: Seeder, count: number, home: string) {
  await using running = new AsyncDisposableStack()
  const directories = Array.from({ length: count }, (_, index) => join(home, String(index)))
  const fetchers: Fetcher[] = []
  for (const directory of directories) {
    await mkdir(directory, { recursive: true })
    fetchers.push(running.use(await client.startFetcher(blob, directory)))
  }
  const pids = Object.fromEntries(fetchers.map(({ pid }, index) => [`fetching ${index}`, pid]))
  const before = await readTotalCpu()
  const { result: seconds, cpu } = await cpuSecondsOf({ seeding: seeder.pid, ...pids }, async () => {
    const start = performance.now()
    await Promise.all(fetchers.map((fetcher) => fetcher.fetch(seeder)))
    return (performance.now() - start) / 1000
  })
  const after = await readTotalCpu()
  const fetching = Object.keys(pids).reduce((sum, name) => sum + (cpu[name] ?? 0), 0)
  const memory = await Promise.all(fetchers.map(({ pid }) => readPeakMemoryMiB(pid)))
  const bytes = count * blob.sizeBytes
  const figures = {
    rate: bytes / 2 ** 20 / seconds,
    'fetching CPU': fetching / (bytes / 2 ** 30),
    'seeding CPU': (cpu['seeding'] ?? 0) / (bytes / 2 ** 30),
    'fetching memory': Math.max(...memory),
    'seeding memory': await readPeakMemoryMiB(seeder.pid),
    'busy while fetching':
      (after.busySeconds - before.busySeconds) / (after.totalSeconds - before.totalSeconds),
  }
  for (const fetcher of fetchers) await fetcher.flushed()
  for (const directory of directories) await assertSame(blob.file, join(directory, blob.name))
  return figures
}

/** What bench/engine-process.ts runs. */
function own(program: string, name: string, settings: string): Client {
  const start = (mode: string, blob: Blob, directory: string) =>
    startLines(process.execPath, [program, name, mode, blob.torrent, join(directory, blob.name)])
  const names: Record<string, string> = { floor: 'raw floor', 'rackswarm-tls': 'rackswarm engine, TLS' }
  return { name: names[name] ?? `${name} engine`, settings, ...byLines(start) }
}

function startableLibtorrent(): Client {
  // Debian's interpreter: another Python first in PATH does not see Debian's modules.
  const python = '/usr/bin/python3'
  const start = (mode: string, blob: Blob, directory: string) =>
    startLines(python, [join(import.meta.dirname, 'engine-libtorrent.py'), mode, blob.torrent, directory])
  const version = spawnSync(python, ['-c', 'import libtorrent; print(libtorrent.version)'], {
    encoding: 'utf8',
  }).stdout.trim()
  const { startSeeder, startFetcher } = byLines(start)
  return {
    name: 'libtorrent',
    settings: `libtorrent ${version} (python3-libtorrent), high_performance_seed() on both sides, no encryption, no uTP, a tick of 50 ms, since it dials on that; its memory has the pages of the file in it, which it maps`,
    startSeeder,
    startFetcher: async (blob, directory) => {
      const fetcher = await startFetcher(blob, directory)
      return { ...fetcher, flushed: fetcher.flushes }
    },
  }
}

/** What people do without any of this: one file from a web server, and its hash. */
async function nginx(stack: AsyncDisposableStack, blob: Blob): Promise<Client> {
  const port = await freePort()
  const home = `${blob.directory}-nginx`
  await mkdir(home)
  const settings = join(home, 'nginx.conf')
  await writeFile(
    settings,
    `daemon off; worker_processes 1; pid ${home}/pid; error_log stderr; user root;
events {}
http { access_log off; sendfile on; client_body_temp_path ${home}; proxy_temp_path ${home}; fastcgi_temp_path ${home};
uwsgi_temp_path ${home}; scgi_temp_path ${home}; server { listen 127.0.0.1:${port}; root ${blob.directory}; } }
`,
  )
  const version = spawnSync('nginx', ['-v'], { encoding: 'utf8' }).stderr.trim()
  return {
    name: 'nginx + curl + sha1sum',
    settings: `${version}, one worker, sendfile; curl to a file, then sha1sum of it`,
    startSeeder: async () => {
      const server = stack.use(startLines('nginx', ['-c', settings]))
      await untilListening(port)
      return { pid: await workerOf(server.pid), port, [Symbol.asyncDispose]: () => Promise.resolve() }
    },
    startFetcher: async (_blob, directory) => {
      const command = `echo ready 0; read go; curl -sf -o ${directory}/${blob.name} http://127.0.0.1:${port}/${blob.name} && sha1sum ${directory}/${blob.name} >/dev/null && echo done; read end`
      const lines = startLines('sh', ['-c', command])
      await lines.says('ready', startSeconds)
      return {
        pid: lines.pid,
        fetch: async () => {
          lines.tell('go')
          await lines.says('done', fetchSeconds)
        },
        flushed: () => Promise.resolve(),
        [Symbol.asyncDispose]: () => lines[Symbol.asyncDispose](),
      }
    },
  }
}

/** The child of a process that has one. */
async function workerOf(pid: number): Promise<number> {
  const [, worker] = await readDescendants(pid)
  return worker ?? pid
}

/** Seeders and fetchers that speak the lines of engine-process.ts. */
function byLines(start: (mode: string, blob: Blob, directory: string) => Lines) {
  const ready = async (lines: Lines) => {
    try {
      return Number(await lines.says('ready', startSeconds))
    } catch (error) {
      await lines[Symbol.asyncDispose]()
      throw error
    }
  }
  return {
    startSeeder: async (blob: Blob): Promise<Seeder> => {
      const lines = start('seed', blob, blob.directory)
      const port = await ready(lines)
      return { pid: lines.pid, port, [Symbol.asyncDispose]: () => lines[Symbol.asyncDispose]() }
    },
    startFetcher: async (blob: Blob, directory: string) => {
      const lines = start('fetch', blob, directory)
      await ready(lines)
      return {
        pid: lines.pid,
        fetch: async (seeder: Seeder) => {
          lines.tell(`go ${seeder.port}`)
          await lines.says('done', fetchSeconds)
        },
        flushed: () => Promise.resolve(),
        flushes: async () => {
          await lines.says('flushed', startSeconds)
        },
        [Symbol.asyncDispose]: () => lines[Symbol.asyncDispose](),
      }
    },
  }
}

/**
 * aria2 takes peers from a tracker alone: here from one that answers with the seeder's address. Fetchers are up and are given the
 * torrent over their control socket.
 */
async function startableAria2(stack: AsyncDisposableStack, blob: Blob): Promise<Client> {
  const seederPort = await freePort()
  const seederCame = Promise.withResolvers<undefined>()
  const peers = peerAt(seederPort).endpoint.compact
  const tracker = stack.use(
    await startTinyTracker((announce) => {
      if (announce.get('left') !== '0') return peers
      seederCame.resolve(undefined)
      return Buffer.alloc(0)
    }),
  )
  const torrent = writeTorrent(blob.info, { announce: tracker.url })
  const torrentFile = `${blob.torrent}-aria2`
  await writeFile(torrentFile, torrent)
  const version = spawnSync('aria2c', ['--version'], { encoding: 'utf8' }).stdout.split('\n')[0] ?? 'aria2'
  const common = [...aria2Options, '--seed-ratio=0.0', `--stop-with-process=${process.pid}`]
  return {
    name: 'aria2',
    settings: `${version}; ${aria2Options.join(' ')}; the seeder's address from a tracker in the process that measures; its announce is within the time, and the second or so until the seeder unchokes`,
    startSeeder: async () => {
      await using started = new AsyncDisposableStack()
      const { pid } = started.use(
        startLines('aria2c', [
          ...common,
          `--listen-port=${seederPort}`,
          `--dir=${blob.directory}`,
          '--check-integrity=true',
          torrentFile,
        ]),
      )
      // It announces once it has checked the file.
      await withDeadline(seederCame.promise, () => 'an announce of the aria2 seeder', startSeconds)
      const owned = started.move()
      return { pid, port: seederPort, [Symbol.asyncDispose]: () => owned.disposeAsync() }
    },
    startFetcher: async (_blob, directory) => {
      await using started = new AsyncDisposableStack()
      const control = await freePort()
      const { pid } = started.use(
        startLines('aria2c', [
          ...common,
          `--listen-port=${await freePort()}`,
          `--dir=${directory}`,
          '--enable-rpc=true',
          `--rpc-listen-port=${control}`,
        ]),
      )
      await untilListening(control)
      const socket = await openSocket(`ws://127.0.0.1:${control}/jsonrpc`)
      started.defer(() => {
        socket.close()
      })
      const owned = started.move()
      return {
        pid,
        fetch: () => fetchByControl(socket, torrent),
        flushed: () => Promise.resolve(),
        [Symbol.asyncDispose]: () => owned.disposeAsync(),
      }
    },
  }
}

async function openSocket(url: string): Promise<WebSocket> {
  const socket = new WebSocket(url)
  await withDeadline(
    new Promise((settle, reject) => {
      socket.addEventListener('open', settle)
      socket.addEventListener('error', () => {
        reject(new Error(`Cannot open ${url}`))
      })
    }),
    () => 'the control socket of aria2',
    startSeconds,
  )
  return socket
}

async function fetchByControl(socket: WebSocket, torrent: Buffer): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<undefined>()
  socket.addEventListener('message', ({ data }) => {
    const message = JSON.parse(String(data)) as { method?: string; error?: unknown }
    if (message.method === 'aria2.onBtDownloadComplete') resolve(undefined)
    else if (message.method === 'aria2.onDownloadError' || message.error !== undefined)
      reject(new Error(`aria2 does not fetch: ${String(data)}`))
  })
  socket.addEventListener('close', () => {
    reject(new Error('aria2 has ended'))
  })
  const params = [torrent.toString('base64')]
  socket.send(JSON.stringify({ jsonrpc: '2.0', id: '1', method: 'aria2.addTorrent', params }))
  await withDeadline(promise, () => 'the end of the fetch of aria2', fetchSeconds)
}

/** A process that is told things and says things, a line each. */
interface Lines extends AsyncDisposable {
  readonly pid: number
  tell(line: string): void
  /** Waits for its next line, which begins with this word. @returns the rest of it */
  says(word: string, seconds: number): Promise<string>
}

function startLines(command: string, args: readonly string[]): Lines {
  // A group of its own: a child that is left over would hold the pipe, and this process with it.
  const child = spawn(command, args, { stdio: ['pipe', 'pipe', 'inherit'], detached: true })
  const ended = new Promise<string>((settle) => {
    child.once('error', (error) => {
      settle(error.message)
    })
    child.once('exit', (code, signal) => {
      settle(`it ended with ${String(code ?? signal)}`)
    })
  })
  // It has ended, and whoever waits for a line is told.
  child.stdin.on('error', () => undefined)
  const lines = createInterface(child.stdout)[Symbol.asyncIterator]()
  return {
    pid: child.pid ?? 0,
    tell: (line) => child.stdin.write(`${line}\n`),
    says: async (word, seconds) => {
      const next = await withDeadline(lines.next(), () => `${command} saying ${word}`, seconds)
      if (next.done === true) throw new Error(`${command} does not say ${word}: ${await ended}`)
      const [first, rest = ''] = next.value.split(' ')
      if (first !== word) throw new Error(`${command} says ${next.value} in place of ${word}`)
      return rest
    },
    [Symbol.asyncDispose]: async () => {
      if (child.pid !== undefined && child.exitCode === null && child.signalCode === null)
        process.kill(-child.pid, 'SIGKILL')
      await ended
    },
  }
}

/** Random bytes, alone in a directory under their SHA-256, and the torrent beside that. */
async function writeBlob(home: string, sizeBytes: number): Promise<Blob> {
  const directory = join(home, 'seed')
  await mkdir(directory, { recursive: true })
  const written = join(home, 'written')
  const name = await writeRandomFile(written, sizeBytes)
  const file = join(directory, name)
  await rename(written, file)
  const info = writeBlobInfo({
    sha256Hex: name,
    length: sizeBytes,
    pieces: await hashPieces(file, sizeBytes),
  })
  const torrent = join(home, 'torrent')
  await writeFile(torrent, writeTorrent(info, {}))
  return { sizeBytes, name, directory, file, torrent, info }
}

async function hashPieces(file: string, sizeBytes: number): Promise<Buffer> {
  await using handle = await open(file)
  const piece = Buffer.alloc(pieceLengthFor(sizeBytes))
  const hashes: Buffer[] = []
  for (let at = 0; at < sizeBytes; at += piece.length) {
    const { bytesRead } = await handle.read(piece, 0, piece.length, at)
    hashes.push(createHash('sha1').update(piece.subarray(0, bytesRead)).digest())
  }
  return Buffer.concat(hashes)
}

/** @throws Error where two files differ */
async function assertSame(file: string, copy: string): Promise<void> {
  await using left = await open(file)
  await using right = await open(copy)
  const { size } = await left.stat()
  if ((await right.stat()).size !== size) throw new Error(`${copy} has not ${size} bytes`)
  const [one, other] = [Buffer.alloc(1024 * 1024), Buffer.alloc(1024 * 1024)]
  for (let at = 0; at < size; at += one.length) {
    const { bytesRead } = await left.read(one, 0, one.length, at)
    await right.read(other, 0, other.length, at)
    if (!one.subarray(0, bytesRead).equals(other.subarray(0, bytesRead)))
      throw new Error(`${copy} is not the blob, at byte ${at} or after`)
  }
}
