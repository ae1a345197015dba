// Peers written on raw sockets, which do exactly what a test tells them, however wrong.
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import type { AddressInfo, Socket } from 'node:net'
import { connect, createServer } from 'node:net'
import { infoHashToBytes } from '../../../lib/protocol/infohash.ts'
import type { Metainfo } from '../../../lib/protocol/metainfo.ts'
import { pieceCount } from '../../../lib/protocol/metainfo.ts'
import type { Owner } from '../../support/tracker.ts'
import type { Blob } from './fixtures.ts'
import { mebibyte, message, randomBlob } from './fixtures.ts'

export interface RawRequest {
  readonly piece: number
  readonly offset: number
  readonly length: number
}

export interface RawMessage {
  readonly id: number
  readonly body: Buffer
}

/** One connection of a raw peer. */
export interface RawConnection {
  readonly socket: Socket
  send(...parts: readonly Buffer[]): void
  /** Repeats until the connection ends. */
  every(intervalMs: number, act: () => void): void
}

/** What a raw peer does when; what is left out it does as an honest seeder would, but for requests, which it ignores. */
export interface Behaviour {
  connected?(connection: RawConnection): void
  /** The handshake of the other side has come. */
  shaken?(connection: RawConnection): void
  requested?(connection: RawConnection, request: RawRequest): void
  told?(connection: RawConnection, message: RawMessage): void
}

export interface RawPeer {
  readonly port: number
  readonly seen: { connections: number; closed: number; readonly requests: RawRequest[] }
}

/** A peer that is dialled. */
export async function startRawListener(t: Owner, metainfo: Metainfo, behaviour: Behaviour): Promise<RawPeer> {
  const seen = { connections: 0, closed: 0, requests: [] as RawRequest[] }
  const sockets = new Set<Socket>()
  const server = createServer((socket) => {
    sockets.add(socket)
    seen.connections++
    socket.once('close', () => {
      sockets.delete(socket)
      seen.closed++
    })
    speak(socket, metainfo, {
      ...behaviour,
      requested: (connection, request) => {
        seen.requests.push(request)
        behaviour.requested?.(connection, request)
      },
    })
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.after(() => {
    for (const socket of sockets) socket.destroy()
    server.close()
  })
  return { port: (server.address() as AddressInfo).port, seen }
}

/** A peer that dials. Resolves once it is connected. */
export async function dialRaw(
  t: Owner,
  port: number,
  metainfo: Metainfo,
  behaviour: Behaviour,
): Promise<RawConnection> {
  const socket = connect({ port, host: '127.0.0.1' })
  t.after(() => {
    socket.destroy()
  })
  const connection = speak(socket, metainfo, behaviour)
  await once(socket, 'connect')
  return connection
}

/** The handshake of a peer that has no name that anyone knows. */
export function rawHandshake(
  metainfo: Metainfo,
  { fast = false, extended = false, peerId = randomBytes(20) } = {},
): Buffer {
  const reserved = Buffer.alloc(8)
  if (extended) reserved[5] = 0x10
  if (fast) reserved[7] = 0x04
  return Buffer.concat([
    Buffer.from('\x13BitTorrent protocol', 'latin1'),
    reserved,
    infoHashToBytes(metainfo.infoHash),
    peerId,
  ])
}

/** Shakes hands, says that it has everything, and unchokes. */
export function greetAsSeeder(connection: RawConnection, metainfo: Metainfo, { fast = false } = {}): void {
  connection.send(rawHandshake(metainfo, { fast }), fullBitfield(metainfo), message(1))
}

/** The same as an agent, which is asked for large blocks. */
export function greetAsAgent(connection: RawConnection, metainfo: Metainfo): void {
  const peerId = Buffer.concat([Buffer.from('-RS0200-'), randomBytes(12)])
  connection.send(
    rawHandshake(metainfo, { extended: true, peerId }),
    message(20, Buffer.from('\0d1:mde2:rsd5:blocki262144eee')),
    fullBitfield(metainfo),
    message(1),
  )
}

export function fullBitfield(metainfo: Metainfo): Buffer {
  const pieces = pieceCount(metainfo)
  const bits = Buffer.alloc(Math.ceil(pieces / 8), 0xff)
  if (pieces % 8 > 0) bits[bits.length - 1] = (0xff00 >> (pieces % 8)) & 0xff
  return message(5, bits)
}

/** Four bytes, as a `have` carries them. */
export function numberOf(value: number): Buffer {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32BE(value)
  return bytes
}

export function rangeOf({ piece, offset, length }: RawRequest): Buffer {
  const body = Buffer.alloc(12)
  body.writeUInt32BE(piece)
  body.writeUInt32BE(offset, 4)
  body.writeUInt32BE(length, 8)
  return body
}

/** The message that brings a block. */
export function blockOf({ piece, offset }: RawRequest, bytes: Uint8Array): Buffer {
  return message(7, Buffer.concat([rangeOf({ piece, offset, length: 0 }).subarray(0, 8), bytes]))
}

/** The bytes that a request is for. */
export function bytesOf({ bytes, metainfo }: Blob, { piece, offset, length }: RawRequest): Buffer {
  const start = piece * metainfo.pieceLength + offset
  return bytes.subarray(start, start + length)
}

/** Each is met by a fetch that knows nobody else at first. */
export const badPeers: Record<string, (blob: Blob) => Behaviour> = {
  'closes at once': () => ({
    connected: ({ socket }) => {
      socket.destroy()
    },
  }),
  'never shakes hands': () => ({ shaken: () => undefined }),
  'closes within the handshake': ({ metainfo }) => ({
    connected: ({ socket }) => {
      socket.end(rawHandshake(metainfo).subarray(0, 30))
    },
  }),
  'shakes hands at a byte a second': ({ metainfo }) => ({
    connected: (connection) => {
      let sent = 0
      connection.every(1000, () => {
        connection.send(rawHandshake(metainfo).subarray(sent, ++sent))
      })
    },
    shaken: () => undefined,
  }),
  'speaks something else': () => ({
    connected: (connection) => {
      connection.send(randomBytes(5000))
    },
    shaken: () => undefined,
  }),
  'has another torrent': () => ({
    shaken: (connection) => {
      connection.send(rawHandshake(randomBlob(mebibyte).metainfo))
    },
  }),
  'closes after its handshake': ({ metainfo }) => ({
    shaken: ({ socket }) => {
      socket.end(rawHandshake(metainfo))
    },
  }),
  'sends garbage after its handshake': ({ metainfo }) => ({
    shaken: (connection) => {
      connection.send(rawHandshake(metainfo), randomBytes(100_000))
    },
  }),
  'closes after its bitfield': ({ metainfo }) => ({
    shaken: ({ socket }) => {
      socket.end(Buffer.concat([rawHandshake(metainfo), fullBitfield(metainfo)]))
    },
  }),
  'closes within a block': (blob) => ({
    requested: ({ socket }, request) => {
      socket.end(blockOf(request, bytesOf(blob, request)).subarray(0, 9000))
    },
  }),
  'sends blocks that are too short': (blob) => ({
    requested: (connection, request) => {
      connection.send(blockOf(request, bytesOf(blob, request).subarray(1)))
    },
  }),
  'sends blocks that are too long': (blob) => ({
    requested: (connection, request) => {
      connection.send(blockOf(request, Buffer.concat([bytesOf(blob, request), Buffer.alloc(1)])))
    },
  }),
  'sends blocks of other places': (blob) => ({
    requested: (connection, request) => {
      connection.send(blockOf({ ...request, offset: request.offset + 1 }, bytesOf(blob, request)))
    },
  }),
  'sends garbage for blocks': () => ({
    requested: (connection, request) => {
      connection.send(blockOf(request, randomBytes(request.length)))
    },
  }),
  'sends the first block for ever': (blob) => {
    const begun = new Set<RawConnection>()
    return {
      requested: (connection, request) => {
        if (begun.has(connection)) return
        begun.add(connection)
        connection.every(50, () => {
          connection.send(blockOf(request, bytesOf(blob, request)))
        })
      },
    }
  },
  'sends a byte a second': (blob) => ({
    requested: (connection, request) => {
      const block = blockOf(request, bytesOf(blob, request))
      let sent = 0
      connection.every(1000, () => {
        connection.send(block.subarray(sent, ++sent))
      })
    },
  }),
  'never ends a block, at a byte each 100 ms': (blob) => {
    const begun = new Set<RawConnection>()
    return {
      requested: (connection, request) => {
        if (begun.has(connection)) return
        begun.add(connection)
        const block = blockOf(request, bytesOf(blob, request))
        let sent = 14
        connection.send(block.subarray(0, sent))
        connection.every(100, () => {
          connection.send(block.subarray(sent, ++sent))
        })
      },
    }
  },
  'never answers': () => ({}),
  'claims what it lacks, and rejects': ({ metainfo }) => ({
    shaken: (connection) => {
      greetAsSeeder(connection, metainfo, { fast: true })
    },
    requested: (connection, request) => {
      connection.send(message(16, rangeOf(request)))
    },
  }),
  'chokes whoever asks, and unchokes later': () => ({
    requested: (connection) => {
      connection.send(message(0))
      setTimeout(() => {
        connection.send(message(1))
      }, 100)
    },
  }),
  'asks for what no piece has': (blob) => ({
    shaken: (connection) => {
      greetAsSeeder(connection, blob.metainfo)
      connection.send(message(2), message(6, rangeOf({ piece: 0, offset: 0xfffffff0, length: 0xffffffff })))
    },
  }),
  'tells of pieces that there are not': (blob) => ({
    shaken: (connection) => {
      greetAsSeeder(connection, blob.metainfo)
      connection.send(message(4, numberOf(0xffffffff)))
    },
  }),
}

function speak(socket: Socket, metainfo: Metainfo, behaviour: Behaviour): RawConnection {
  const timers: NodeJS.Timeout[] = []
  const connection: RawConnection = {
    socket,
    send: (...parts) => {
      if (socket.writable) socket.write(Buffer.concat(parts))
    },
    every: (intervalMs, act) => {
      timers.push(setInterval(act, intervalMs))
    },
  }
  const handshakeBytes = 68
  let input = Buffer.alloc(0)
  let isShaken = false
  socket.on('error', () => undefined)
  socket.once('close', () => {
    for (const timer of timers) clearInterval(timer)
  })
  socket.on('data', (chunk: Buffer) => {
    input = Buffer.concat([input, chunk])
    if (!isShaken) {
      if (input.length < handshakeBytes) return
      input = input.subarray(handshakeBytes)
      isShaken = true
      if (behaviour.shaken) behaviour.shaken(connection)
      else greetAsSeeder(connection, metainfo)
    }
    while (input.length >= 4) {
      const length = input.readUInt32BE()
      if (input.length < 4 + length) return
      const body = input.subarray(4, 4 + length)
      input = input.subarray(4 + length)
      if (body.length === 0) continue
      behaviour.told?.(connection, { id: body[0] ?? 0, body: body.subarray(1) })
      if (body[0] !== 6) continue
      behaviour.requested?.(connection, {
        piece: body.readUInt32BE(1),
        offset: body.readUInt32BE(5),
        length: body.readUInt32BE(9),
      })
    }
  })
  behaviour.connected?.(connection)
  return connection
}
