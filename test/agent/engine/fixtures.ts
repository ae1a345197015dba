import { execFileSync } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import type { IncomingMessage, ServerResponse } from 'node:http'
import type { AddressInfo, Socket } from 'node:net'
import { createServer as createTcpServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { EngineConfig, EnginePeer } from '../../../agent/engine/engine.ts'
import { endpoint, parseIp } from '../../../lib/protocol/address.ts'
import type { Metainfo } from '../../../lib/protocol/metainfo.ts'
import {
  parseTorrent,
  pieceCount,
  pieceLengthFor,
  writeBlobInfo,
  writeTorrent,
} from '../../../lib/protocol/metainfo.ts'
import { infoHashToBytes } from '../../../lib/protocol/infohash.ts'
import type { Owner } from '../../support/tracker.ts'

export const mebibyte = 1024 * 1024

export async function temporaryDirectory(t: Owner): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-agent-'))
  t.after(() => rm(directory, { recursive: true, force: true, maxRetries: 3 }))
  return directory
}

export interface Blob {
  readonly bytes: Buffer
  readonly sha256: string
  readonly metainfo: Metainfo
  readonly torrent: Buffer
}

export function randomBlob(length: number): Blob {
  const bytes = randomBytes(length)
  const sha256 = createHash('sha256').update(bytes).digest('hex')
  const pieceLength = pieceLengthFor(length)
  const hashes: Buffer[] = []
  for (let at = 0; at < length; at += pieceLength) {
    hashes.push(
      createHash('sha1')
        .update(bytes.subarray(at, at + pieceLength))
        .digest(),
    )
  }
  const torrent = writeTorrent(
    writeBlobInfo({ sha256Hex: sha256, length, pieces: Buffer.concat(hashes) }),
    {},
  )
  return { bytes, sha256, metainfo: parseTorrent(torrent), torrent }
}

export async function blobFile(directory: string, name: string, bytes: Uint8Array): Promise<string> {
  const file = join(directory, name)
  await writeFile(file, bytes)
  return file
}

export function peerAt(port: number, options: { reserve?: boolean; host?: string } = {}): EnginePeer {
  const ip = parseIp(options.host ?? '127.0.0.1')
  if (ip === undefined) throw new Error('bad host')
  return {
    endpoint: endpoint(ip, port),
    distance: options.reserve === true ? 1 : 0,
    reserve: options.reserve ?? false,
  }
}

/** Peers that a test hands over when it likes. */
export function peerFeed(...first: EnginePeer[]) {
  const waiting = [...first]
  let wake = Promise.withResolvers<undefined>()
  return {
    push: (...peers: EnginePeer[]) => {
      waiting.push(...peers)
      wake.resolve(undefined)
    },
    async *[Symbol.asyncIterator](): AsyncGenerator<EnginePeer, never> {
      for (;;) {
        for (let peer = waiting.shift(); peer; peer = waiting.shift()) yield peer
        wake = Promise.withResolvers()
        if (waiting.length === 0) await wake.promise
      }
    },
  }
}

/** A real HTTP server with Range; `refuse` may answer instead. */
export async function startWebseed(
  t: Owner,
  bytes: Uint8Array,
  refuse: (request: IncomingMessage, response: ServerResponse) => boolean = () => false,
) {
  const requests: string[] = []
  const server = createServer((request, response) => {
    requests.push(request.headers.range ?? '')
    if (refuse(request, response)) return
    const match = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '')
    if (!match) {
      response.writeHead(416).end()
      return
    }
    const body = bytes.subarray(Number(match[1]), Number(match[2]) + 1)
    response.writeHead(206, {
      'content-length': body.length,
      'content-range': `bytes ${match[1]}-${match[2]}/${bytes.length}`,
    })
    response.end(body)
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  t.after(() => {
    server.closeAllConnections()
    server.close()
  })
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/blob`, requests }
}

/** A peer written on a raw socket: shakes hands, says it has everything, unchokes, and answers as it is told. */
export async function startRawPeer(
  t: Owner,
  metainfo: Metainfo,
  answer: (request: { piece: number; offset: number; length: number }) => Uint8Array | undefined,
) {
  const sockets = new Set<Socket>()
  const seen = { connections: 0, requests: 0 }
  const server = createTcpServer((socket) => {
    sockets.add(socket)
    seen.connections++
    socket.on('error', () => undefined)
    socket.on('close', () => sockets.delete(socket))
    let input = Buffer.alloc(0)
    let shaken = false
    socket.on('data', (chunk: Buffer) => {
      input = Buffer.concat([input, chunk])
      if (!shaken) {
        if (input.length < 68) return
        input = input.subarray(68)
        shaken = true
        const bitfield = Buffer.alloc(Math.ceil(pieceCount(metainfo) / 8))
        for (let i = 0; i < pieceCount(metainfo); i++)
          bitfield[i >> 3] = (bitfield[i >> 3] ?? 0) | (0x80 >> (i & 7))
        socket.write(
          Buffer.concat([handshake(infoHashToBytes(metainfo.infoHash)), message(5, bitfield), message(1)]),
        )
      }
      while (input.length >= 4) {
        const length = input.readUInt32BE()
        if (input.length < 4 + length) return
        const body = input.subarray(4, 4 + length)
        input = input.subarray(4 + length)
        if (body[0] !== 6) continue
        seen.requests++
        const request = {
          piece: body.readUInt32BE(1),
          offset: body.readUInt32BE(5),
          length: body.readUInt32BE(9),
        }
        const data = answer(request)
        if (data) socket.write(message(7, Buffer.concat([body.subarray(1, 9), data])))
      }
    })
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  t.after(() => {
    for (const socket of sockets) socket.destroy()
    server.close()
  })
  return { port: (server.address() as AddressInfo).port, seen }
}

/** BEP 3's handshake of a new peer, with the extension bit of BEP 10 where it is asked for. */
export function handshake(infoHash: Uint8Array, { extended = false } = {}): Buffer {
  const reserved = Buffer.alloc(8)
  if (extended) reserved[5] = 0x10
  return Buffer.concat([
    Buffer.from('\x13BitTorrent protocol', 'latin1'),
    reserved,
    infoHash,
    randomBytes(20),
  ])
}

export function message(id: number, body: Uint8Array = Buffer.alloc(0)): Buffer {
  const head = Buffer.alloc(5)
  head.writeUInt32BE(1 + body.length)
  head[4] = id
  return Buffer.concat([head, body])
}

/** The most memory that a process has ever had resident. */
export async function peakBytesOf(pid: number | undefined): Promise<number> {
  const status = await readFile(`/proc/${pid ?? 0}/status`, 'utf8')
  const kibibytes = /VmHWM:\s+(\d+)/.exec(status)?.[1]
  if (kibibytes === undefined) throw new Error(`Cannot read the memory of process ${pid ?? 0}: it has ended`)
  return 1024 * Number(kibibytes)
}

export async function mountSmallDisk(t: Owner, mebibytes: number): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-small-disk-'))
  const disk = join(directory, 'disk')
  await mkdir(disk)
  execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${mebibytes}m`, 'tmpfs', disk])
  t.after(async () => {
    execFileSync('umount', ['--lazy', disk])
    await rm(directory, { recursive: true })
  })
  return disk
}

/** mulberry32: what was random can be had again by its seed. */
export function randomOf(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

/** Fails where the promise takes longer. */
export async function withDeadline<Value>(
  promise: Promise<Value>,
  what: () => string,
  seconds = 30,
): Promise<Value> {
  const { promise: late, reject } = Promise.withResolvers<never>()
  const timer = setTimeout(() => {
    reject(new Error(`Not seen in ${seconds} s: ${what()}`))
  }, seconds * 1000)
  try {
    return await Promise.race([promise, late])
  } finally {
    clearTimeout(timer)
  }
}

/** One token opens everything; `until` says how long. */
export function admission(
  good: string,
  until: () => number = () => Infinity,
): Pick<EngineConfig, 'admission' | 'peerTokens'> {
  return {
    peerTokens: { tokenFor: () => good },
    admission: {
      admit: async (token) =>
        token === good ? { untilMs: until(), host: 'proven', place: undefined } : undefined,
    },
  }
}
