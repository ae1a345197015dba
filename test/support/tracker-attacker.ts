// Attacks on a tracker, each a process of its own: `tracker-attacker.ts KIND OPTIONS`. Prints a line of JSON once it is in full swing, then
// a few times a second what it has seen, and once more when its stdin ends.
import { randomBytes, randomInt } from 'node:crypto'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import type { Socket } from 'node:net'
import { connect } from 'node:net'
import { constants, setPriority } from 'node:os'
import { escapeBytes } from '../../lib/protocol/query.ts'
import { infoHashFromBytes } from '../../lib/protocol/infohash.ts'
import { parseUdpConnectReply, writeUdpAnnounce, writeUdpConnect } from '../../lib/protocol/udp.ts'

export interface AttackOptions {
  readonly http: { readonly host: string; readonly port: number }
  readonly udp: { readonly host: string; readonly port: number }
  /** Connections, or sockets. */
  readonly count: number
  /** `tokens`: a token whose signature is replaced, again and again. */
  readonly token?: string
  readonly infoHash?: string
}

/** What an attacker has seen so far. */
export interface AttackStats {
  /** Requests or packets sent, or connections opened. */
  readonly sent: number
  /** Replies, of any kind. */
  readonly answered: number
  /** Connections that the server ended. */
  readonly closed: number
  /** Connections that are open. */
  readonly open: number
}

const attacks = { slow, sockets, bombs, tokens, swarms, garbage }
export type AttackKind = keyof typeof attacks

const stats = { sent: 0, answered: 0, closed: 0, open: 0 }
let over = false

if (import.meta.main) {
  // Real attackers have machines of their own; they take no time from the server's, nor from the honest.
  setPriority(constants.priority.PRIORITY_BELOW_NORMAL)
  const [kind = '', json = '{}'] = process.argv.slice(2)
  await attacks[kind as AttackKind](JSON.parse(json) as AttackOptions)
  process.stdout.write('"ready"\n')
  const report = (then?: () => void) => process.stdout.write(`${JSON.stringify(stats)}\n`, then)
  setInterval(report, 100)
  process.stdin.resume()
  await once(process.stdin, 'end')
  over = true
  report(() => process.exit(0))
}

/** Clients that say nothing, that say a byte at a time, and that ask for more than they read; whoever is cut comes back. */
async function slow({ http, count }: AttackOptions): Promise<void> {
  const hash = '%dd'.repeat(20)
  const batches = [
    `/scrape?${`info_hash=${hash}&`.repeat(40)}`,
    `/announce?info_hash=${hash}&peer_id=${'a'.repeat(20)}&port=1&left=1&uploaded=0&downloaded=0&numwant=100`,
  ].map((target) => `GET ${target} HTTP/1.1\r\nHost: t\r\n\r\n`.repeat(20))
  const begin = async (i: number): Promise<void> => {
    const socket = await open(http, i)
    socket.once('close', () => {
      if (!over) void begin(i)
    })
    if (i % 3 === 1) {
      socket.write('GET /announce?')
      const drip = setInterval(() => socket.write('a'), 50)
      socket.once('close', () => {
        clearInterval(drip)
      })
    } else if (i % 3 === 2) {
      socket.pause()
      const batch = batches[i % batches.length] ?? ''
      const ask = () => {
        do stats.sent += 20
        while (socket.write(batch))
      }
      socket.on('drain', ask)
      ask()
    }
  }
  await Promise.all(Array.from({ length: count }, (_, i) => begin(i)))
}

/** Connections that are opened and held. Those that the server turns away are counted and not tried again. */
async function sockets({ http, count }: AttackOptions): Promise<void> {
  for (let i = 0; i < count; i++) await open(http, i)
}

/** Heads and queries as large and as odd as they get, as fast as they are refused. */
async function bombs({ http, count }: AttackOptions): Promise<void> {
  const get = (target: string, ...lines: string[]) =>
    `GET ${target} HTTP/1.1\r\n${['Host: t', ...lines].join('\r\n')}\r\n\r\n`
  const hash = '%aa'.repeat(20)
  const heads = [
    get(`/announce?${'a'.repeat(20_000)}`),
    get('/announce', ...Array.from({ length: 5000 }, (_, i) => `x-${i}: b`)),
    get('/announce', `x: ${'a'.repeat(200_000)}`),
    'GET /announce'.repeat(2000),
    get(`/announce?${'a=b&'.repeat(2000)}`),
    get(`/announce?${'%41'.repeat(2700)}=1`),
    get(`/announce?${';'.repeat(8000)}`),
    get(`/announce?${'%'.repeat(8000)}`),
    get(`/scrape?${`info_hash=${hash}&`.repeat(110)}`),
    get(`/announce?info_hash=${hash}&peer_id=${'%00'.repeat(20)}&jwt=${'a.'.repeat(3000)}`),
    get(`/${'a/'.repeat(4000)}announce`),
    get('/announce?x=1').repeat(500),
    `POST /announce HTTP/1.1\r\nHost: t\r\nContent-Length: 100000000\r\n\r\n${'x'.repeat(100_000)}`,
  ]
  const begin = async (i: number): Promise<void> => {
    const socket = await open(http, i)
    socket.once('close', () => {
      if (!over) void begin(i + 1)
    })
    const throwOne = () => {
      stats.sent++
      socket.write(heads[randomInt(heads.length)] ?? '')
    }
    socket.on('data', throwOne)
    throwOne()
  }
  await Promise.all(Array.from({ length: count }, (_, i) => begin(i)))
}

/** Tokens that are right but for their signature, each one new, over HTTP and UDP, from one network. */
async function tokens({ http, udp, count, token = '', infoHash = '' }: AttackOptions): Promise<void> {
  const unsigned = token.slice(0, token.lastIndexOf('.') + 1)
  const forged = () => unsigned + randomBytes(64).toString('base64url')
  const hash = Buffer.from(infoHash, 'hex')
  const begin = async (i: number): Promise<void> => {
    const socket = await open(http, i)
    const ask = () => {
      stats.sent++
      socket.write(
        `GET /announce?info_hash=${escapeBytes(hash)}&peer_id=${'a'.repeat(20)}&port=1&left=1&uploaded=0&downloaded=0&jwt=${forged()} HTTP/1.1\r\nHost: t\r\n\r\n`,
      )
    }
    socket.on('data', ask)
    ask()
  }
  await Promise.all(Array.from({ length: count }, (_, i) => begin(i)))
  const fields = {
    infoHash: infoHashFromBytes(hash),
    peerId: randomBytes(20),
    port: 1,
    uploaded: 0,
    downloaded: 0,
    left: 1,
  }
  await floodUdp(udp, { window: 200, renewMs: 1000 }, (connectionId, transactionId) =>
    writeUdpAnnounce({ connectionId, transactionId }, fields, `/?jwt=${forged()}`),
  )
}

/** Ever new peers in ever new swarms, over UDP and HTTP. */
async function swarms({ http, udp, count }: AttackOptions): Promise<void> {
  const begin = async (i: number): Promise<void> => {
    const socket = await open(http, i)
    const ask = () => {
      stats.sent++
      socket.write(
        `GET /announce?info_hash=${escapeBytes(randomBytes(20))}&peer_id=${'a'.repeat(20)}&port=${randomInt(1, 65536)}&left=1&uploaded=0&downloaded=0 HTTP/1.1\r\nHost: t\r\n\r\n`,
      )
    }
    socket.on('data', ask)
    ask()
  }
  await Promise.all(Array.from({ length: count }, (_, i) => begin(i)))
  await floodUdp(udp, { window: 200, renewMs: 1000 }, (connectionId, transactionId) =>
    writeUdpAnnounce(
      { connectionId, transactionId },
      {
        infoHash: infoHashFromBytes(randomBytes(20)),
        peerId: randomBytes(20),
        port: randomInt(1, 65536),
        uploaded: 0,
        downloaded: 0,
        left: randomInt(2),
      },
    ),
  )
}

/** Random bytes, some behind a beginning that makes sense. */
async function garbage({ http, udp, count }: AttackOptions): Promise<void> {
  const beginnings = ['', 'GET /announce?info_hash=', 'GET ', '\x16\x03\x01', 'PROXY TCP4 ', '\r\n\r\n']
  const begin = async (i: number): Promise<void> => {
    const socket = await open(http, i)
    socket.once('close', () => {
      if (!over) void begin(i)
    })
    stats.sent++
    socket.write(
      Buffer.concat([
        Buffer.from(beginnings[randomInt(beginnings.length)] ?? ''),
        randomBytes(randomInt(1, 5000)),
      ]),
    )
    if (randomInt(2) === 0) socket.end()
  }
  await Promise.all(Array.from({ length: count }, (_, i) => begin(i)))
  await floodUdp(udp, { window: 100, renewMs: 20 }, (connectionId) => {
    const packet = randomBytes(randomInt(0, 1500))
    if (packet.length >= 16 && randomInt(2) === 0) packet.set(connectionId)
    if (packet.length >= 16) packet.writeUInt32BE(randomInt(6), 8)
    return packet
  })
}

/** From 127.0.0.2 to 127.0.0.251: one network, and ports enough. */
async function open({ host, port }: AttackOptions['http'], i: number): Promise<Socket> {
  const socket = connect({ host, port, localAddress: `127.0.0.${2 + (i % 250)}` })
  socket.on('error', () => undefined)
  socket.on('data', () => stats.answered++)
  const connected = once(socket, 'connect').then(
    () => true,
    () => false,
  )
  if (await connected) {
    stats.open++
    socket.once('close', () => {
      stats.open--
      stats.closed++
    })
  } else {
    stats.closed++
  }
  return socket
}

/**
 * Keeps `window` packets under way: one more for each answer, and all of them anew each `renewMs`, for those that get none. More than the
 * server takes would only be lost in the kernel, with those of everyone else: that is for the network to keep away.
 */
async function floodUdp(
  { host, port }: AttackOptions['udp'],
  { window, renewMs }: { window: number; renewMs: number },
  write: (connectionId: Uint8Array, transactionId: number) => Buffer,
): Promise<void> {
  const socket = createSocket('udp4')
  socket.bind(0, '127.0.0.2')
  await once(socket, 'listening')
  socket.connect(port, host)
  await once(socket, 'connect')
  const hello = once(socket, 'message') as Promise<[Buffer]>
  socket.send(writeUdpConnect(1))
  const connectionId = parseUdpConnectReply((await hello)[0])
  let underWay = 0
  const fill = () => {
    for (; underWay < window; underWay++) socket.send(write(connectionId, stats.sent++ >>> 0))
  }
  socket.on('error', () => undefined)
  socket.on('message', () => {
    stats.answered++
    underWay--
    fill()
  })
  setInterval(() => {
    underWay = 0
    fill()
  }, renewMs)
  fill()
}
