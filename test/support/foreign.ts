// Other people's BitTorrent clients, as processes: Debian's aria2 and python3-libtorrent.
import type { ChildProcess } from 'node:child_process'
import { spawn } from 'node:child_process'
import { createServer as createHttpServer } from 'node:http'
import { createServer } from 'node:net'
import type { AddressInfo } from 'node:net'
import { encode } from '../../lib/protocol/bencode.ts'
import { untilListening } from './until.ts'

export const aria2Options = [
  '--no-conf=true',
  '--enable-dht=false',
  '--enable-dht6=false',
  '--enable-peer-exchange=false',
  '--bt-enable-lpd=false',
  '--file-allocation=none',
  '--bt-tracker-interval=1',
  '--bt-request-peer-speed-limit=10000M',
  '--summary-interval=0',
  '--quiet=true',
]

/** A foreign client that holds a whole copy and serves it. */
export interface ForeignSeeder extends AsyncDisposable {
  readonly pid: number
}

/** Starts aria2 on a directory that holds the torrent's file. Resolves once it listens. */
export async function startAria2Seeder(directory: string, torrent: string): Promise<ForeignSeeder> {
  const port = await freePort()
  const child = spawn(
    'aria2c',
    [
      ...aria2Options,
      `--listen-port=${port}`,
      `--dir=${directory}`,
      '--seed-ratio=0.0',
      '--check-integrity=true',
      torrent,
    ],
    {
      stdio: 'ignore',
    },
  )
  await untilListening(port)
  return seeder(child)
}

/** Downloads a torrent with aria2 and ends. Its child is for watching; `done` rejects unless it ended well. */
export async function fetchWithAria2(
  directory: string,
  torrent: string,
): Promise<{ child: ChildProcess; done: Promise<void> }> {
  const child = spawn(
    'aria2c',
    [...aria2Options, `--listen-port=${await freePort()}`, `--dir=${directory}`, '--seed-time=0', torrent],
    { stdio: 'ignore' },
  )
  return { child, done: endsWell(child, 'aria2c') }
}

/** One libtorrent session: `fetch` ends with the download, `seed` stays. Prints `ready` once it listens or has finished. */
const libtorrentScript = `
import sys, time
import libtorrent as lt
mode, torrent, directory, port = sys.argv[1:5]
session = lt.session({'listen_interfaces': '127.0.0.1:' + port, 'enable_dht': False, 'enable_lsd': False, 'enable_upnp': False,
                      'enable_natpmp': False, 'allow_multiple_connections_per_ip': True, 'enable_outgoing_utp': False, 'enable_incoming_utp': False})
handle = session.add_torrent({'ti': lt.torrent_info(torrent), 'save_path': directory})
deadline = time.time() + 120
while not handle.status().is_seeding:
    if time.time() > deadline:
        sys.exit('no whole copy after 120 s: ' + str(handle.status().state) + ' ' + str(handle.status().progress))
    time.sleep(0.05)
print('ready', flush=True)
if mode == 'seed':
    time.sleep(3600)
`

export async function startLibtorrentSeeder(directory: string, torrent: string): Promise<ForeignSeeder> {
  const child = await startLibtorrent('seed', directory, torrent)
  await new Promise<void>((settle, reject) => {
    child.stdout?.once('data', () => {
      settle()
    })
    child.once('exit', (code) => {
      reject(new Error(`libtorrent ended with code ${String(code)}`))
    })
  })
  return seeder(child)
}

export async function fetchWithLibtorrent(
  directory: string,
  torrent: string,
): Promise<{ child: ChildProcess; done: Promise<void> }> {
  const child = await startLibtorrent('fetch', directory, torrent)
  return { child, done: endsWell(child, 'libtorrent') }
}

async function startLibtorrent(
  mode: 'fetch' | 'seed',
  directory: string,
  torrent: string,
): Promise<ChildProcess> {
  // Debian's interpreter: another Python first in PATH does not see Debian's modules.
  return spawn(
    '/usr/bin/python3',
    ['-c', libtorrentScript, mode, torrent, directory, String(await freePort())],
    {
      stdio: ['ignore', 'pipe', 'inherit'],
    },
  )
}

function seeder(child: ChildProcess): ForeignSeeder {
  const ended = new Promise((settle) => child.once('exit', settle))
  return {
    pid: child.pid ?? 0,
    [Symbol.asyncDispose]: async () => {
      child.kill('SIGKILL')
      await ended
    },
  }
}

async function endsWell(child: ChildProcess, name: string): Promise<void> {
  const code = await new Promise((settle, reject) => {
    child.once('error', reject)
    child.once('exit', settle)
  })
  if (code !== 0) throw new Error(`${name} ended with code ${String(code)}`)
}

/** Tells clients that take peers from a tracker alone what `peersFor` answers, as compact endpoints of IPv4, to the parameters of their announce. */
export async function startTinyTracker(
  peersFor: (announce: URLSearchParams) => Uint8Array,
): Promise<{ readonly url: string } & AsyncDisposable> {
  const server = createHttpServer((request, response) => {
    const { searchParams } = new URL(request.url ?? '', 'http://tracker')
    response.end(encode({ interval: 1, peers: peersFor(searchParams) }))
  })
  await new Promise<void>((settle) => server.listen(0, '127.0.0.1', settle))
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/announce`,
    [Symbol.asyncDispose]: async () => {
      server.closeAllConnections()
      await new Promise((settle) => server.close(settle))
    },
  }
}

/** Below those that Linux gives to whoever asks for none: between two processes nobody else may take it. */
const ownPorts = { first: 20_000, count: 12_000 }

/** A port of loopback at which nobody listens. */
export async function freePort(): Promise<number> {
  for (;;) {
    const port = ownPorts.first + Math.floor(Math.random() * ownPorts.count)
    const server = createServer()
    const isFree = await new Promise<boolean>((settle) => {
      server.once('error', () => {
        settle(false)
      })
      server.listen(port, '127.0.0.1', () => {
        settle(true)
      })
    })
    if (!isFree) continue
    await new Promise((settle) => server.close(settle))
    return port
  }
}
