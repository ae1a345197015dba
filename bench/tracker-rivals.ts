import { spawn, spawnSync } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { chmod, mkdir, readFile, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { startChild } from '../lib/runtime/child.ts'
import type { LoadTarget } from './tracker-load.ts'
import { freePort, onServerCore } from './tracker-server.ts'

export interface Rival extends LoadTarget, AsyncDisposable {
  readonly host: string
}

const host = '127.0.0.1'
const startTimeoutMs = 10_000
const bittorrentTrackerVersion = '11.2.3'

/** `hashes`: all that it will serve, since Debian builds it with a white list. */
export async function startOpentracker(directory: string, hashes: readonly string[]): Promise<Rival> {
  await mkdir(directory, { recursive: true })
  // It gives up root, and reads the list after that.
  await chmod(directory, 0o755)
  const port = await freePort('tcp', host)
  await writeFile(join(directory, 'whitelist'), `${hashes.join('\n')}\n`, { mode: 0o644 })
  const config = join(directory, 'opentracker.conf')
  await writeFile(
    config,
    [
      `listen.tcp ${host}:${port}`,
      `listen.udp ${host}:${port}`,
      `tracker.rootdir ${directory}`,
      'tracker.user nobody',
      'access.whitelist whitelist',
      '',
    ].join('\n'),
  )
  const child = await onServerCore(async () =>
    spawn('opentracker', ['-f', config], { stdio: ['ignore', 'ignore', 'ignore'], cwd: directory }),
  )
  const exited = new Promise<never>((_, reject) => {
    child.once('error', reject)
    child.once('exit', (code) => {
      reject(new Error(`opentracker ended with code ${String(code)}`))
    })
  })
  // It is told to end when the benchmark has; nobody waits for this then.
  exited.catch(() => undefined)
  await Promise.race([exited, waitUntilServed(port, hashes[0] ?? '')])
  return {
    name: 'opentracker',
    host,
    port,
    pids: [child.pid ?? 0],
    [Symbol.asyncDispose]: async () => {
      child.kill('SIGKILL')
      await exited.catch(() => undefined)
    },
  }
}

/** Debian's version, and that the white list is a part of what it does. */
export function describeOpentracker(): string {
  const { stdout } = spawnSync('dpkg-query', ['-W', '-f', '${Version}', 'opentracker'], { encoding: 'utf8' })
  return `opentracker ${stdout} of Debian, whose build looks each infohash up in a white list (of all swarms here) and has no IPv6`
}

/** One of bench/tracker-reference.ts, under the Node that runs this. */
export async function startReference(
  name: string,
  directory: string,
  kind: string,
  ...args: readonly string[]
): Promise<Rival> {
  await mkdir(directory, { recursive: true })
  const child = await onServerCore(() =>
    startChild({
      file: join(import.meta.dirname, 'tracker-reference.ts'),
      args: [kind, ...args],
      readyMessage: 'reference is listening',
      logFile: join(directory, `${kind}.log`),
    }),
  )
  return {
    name,
    host,
    port: Number(child.ready['port']),
    pids: [child.pid],
    [Symbol.asyncDispose]: () => child[Symbol.asyncDispose](),
  }
}

/** Gets the package from the npm registry. @returns its version */
export async function installBittorrentTracker(directory: string): Promise<string> {
  await mkdir(directory, { recursive: true })
  await writeFile(join(directory, 'package.json'), '{ "private": true }\n')
  const { status } = spawnSync(
    'npm',
    [
      'install',
      '--no-audit',
      '--no-fund',
      '--omit=optional',
      '--ignore-scripts',
      '--loglevel=error',
      `bittorrent-tracker@${bittorrentTrackerVersion}`,
    ],
    { cwd: directory, stdio: ['ignore', 2, 2] },
  )
  if (status !== 0) throw new Error('Cannot install bittorrent-tracker from the npm registry, see above')
  const text = await readFile(join(directory, 'node_modules', 'bittorrent-tracker', 'package.json'), 'utf8')
  return (JSON.parse(text) as { version: string }).version
}

/** It serves once it has read the list, some time after it has begun to listen. */
async function waitUntilServed(port: number, hash: string): Promise<void> {
  const query = `info_hash=${hash.replace(/../g, '%$&')}&peer_id=${'a'.repeat(20)}&port=10000&left=1&numwant=0`
  const deadline = Date.now() + startTimeoutMs
  for (;;) {
    const reply = await get(port, `/announce?${query}`).catch((error: unknown) => String(error))
    if (reply.includes('5:peers')) break
    if (Date.now() > deadline) throw new Error(`Cannot start opentracker: it answers ${reply}`)
    await sleep(50)
  }
  // UDP has its own thread.
  const socket = createSocket('udp4')
  const packet = Buffer.from('000004172710198000000000deadbeef', 'hex')
  try {
    while (Date.now() < deadline) {
      const answered = new Promise((settle) => socket.once('message', () => settle(true)))
      socket.send(packet, port, host)
      if ((await Promise.race([answered, sleep(200)])) === true) return
    }
  } finally {
    socket.close()
  }
  throw new Error('Cannot start opentracker: it does not answer over UDP')
}

async function get(port: number, path: string): Promise<string> {
  const socket = connect(port, host)
  socket.setTimeout(1000, () => socket.destroy(new Error('no answer')))
  socket.write(`GET ${path} HTTP/1.1\r\nHost: ${host}\r\nConnection: close\r\n\r\n`)
  let text = ''
  for await (const data of socket) text += (data as Buffer).toString('latin1')
  return text
}
