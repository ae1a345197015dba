import { randomInt } from 'node:crypto'
import type { Socket } from 'node:dgram'
import { createSocket } from 'node:dgram'
import { lookup } from 'node:dns/promises'
import { once } from 'node:events'
import type { Family } from '../protocol/address.ts'
import type { ParsedAnnounceReply } from '../protocol/announce.ts'
import { ClientError } from '../protocol/errors.ts'
import type { InfoHash } from '../protocol/infohash.ts'
import { escapeBytes } from '../protocol/query.ts'
import type { SwarmCounts } from '../protocol/scrape.ts'
import type { UdpAnnounceFields, UdpRequestIds } from '../protocol/udp.ts'
import {
  parseUdpAnnounceReply,
  parseUdpConnectReply,
  parseUdpScrapeReply,
  readUdpReplyTransactionId,
  udpScrapeMax,
  writeUdpAnnounce,
  writeUdpConnect,
  writeUdpScrape,
} from '../protocol/udp.ts'
import { UnreachableError } from './http.ts'

export interface UdpTrackerOptions {
  /** `udp://tracker.example:6969/announce?…`: path and query go to the tracker with each announce (BEP 41). */
  readonly url: string
  /** Which kind of address to use where the host has both; undefined: whichever its name resolves to first. */
  readonly family?: Family | undefined
  /** The address to send from. */
  readonly localAddress?: string | undefined
  /** How long the first try waits for its reply; each later one waits twice as long. BEP 15: 15 s. */
  readonly firstTimeoutMs?: number
  /** BEP 15: 9, of which the last waits an hour. */
  readonly triesMax?: number
  /** Milliseconds since some start; it never goes back. */
  readonly monotonic?: () => number
}

export interface UdpAnnounce extends UdpAnnounceFields {
  readonly jwt?: string | undefined
  readonly trackerId?: string | undefined
}

export interface UdpCall {
  readonly signal?: AbortSignal | undefined
}

/**
 * One UDP tracker (BEP 15). Calls reject with ClientError `tracker_failure` and the tracker's own words, ClientError
 * `bad_reply`, UnreachableError, or the reason of their signal.
 *
 * Only packets from the tracker's address and port are looked at: the socket is connected. What comes after its request
 * has ended is dropped.
 */
export interface UdpTracker extends AsyncDisposable {
  announce(announce: UdpAnnounce, call?: UdpCall): Promise<ParsedAnnounceReply>
  /** At most 74 infohashes. A tracker may answer for fewer: the others are not in the map. */
  scrape(infoHashes: readonly InfoHash[], call?: UdpCall): Promise<ReadonlyMap<InfoHash, SwarmCounts>>
}

/** BEP 15: a client may use a connection id for one minute. */
const connectionLifeMs = 60_000
/** Requests under way at once. */
const requestsMax = 256
const timerMaxMs = 2 ** 31 - 1

/** A connected socket: one address that the tracker's name had. */
interface Link {
  readonly socket: Socket
  readonly family: Family
  /** By transaction id. */
  readonly waiting: Map<number, PromiseWithResolvers<Buffer | undefined>>
  connection: Connection | undefined
  users: number
  /** Its tracker cannot be reached: the next request looks the name up again. */
  retired: boolean
}

interface Connection {
  readonly id: Uint8Array
  readonly obtainedAt: number
}

interface Request<Reply> {
  write(ids: UdpRequestIds): Buffer
  parse(packet: Buffer, family: Family): Reply
  /** Two, so that a late answer to a connect is not taken for that to the request. */
  readonly connectTransactionId: number
  readonly transactionId: number
  readonly signal: AbortSignal
}

/** @throws Error for a URL that is not a UDP tracker's */
export function createUdpTracker(options: UdpTrackerOptions): UdpTracker {
  const { host, port, urlData, origin } = readUrl(options.url)
  const { firstTimeoutMs = 15_000, triesMax = 9, monotonic = () => performance.now() } = options
  const closing = new AbortController()
  let current: Promise<Link> | undefined
  let requests = 0

  const unreachable = (reason: string, cause?: unknown) =>
    new UnreachableError(`Cannot reach ${origin}: ${reason}`, { cause })

  const open = async (): Promise<Link> => {
    const found = await lookup(host, { family: options.family ?? 0 }).catch((error: unknown) => {
      throw unreachable('there is no host of that name, or it has no address of the family wanted', error)
    })
    const family = found.family === 6 ? 6 : 4
    if (family !== (options.family ?? family)) throw unreachable(`it has only an IPv${family} address`)
    const socket = createSocket(family === 6 ? 'udp6' : 'udp4')
    const link: Link = { socket, family, waiting: new Map(), connection: undefined, users: 0, retired: false }
    // Of an ICMP message it is not known which request it answers, so it answers all.
    socket.on('error', (error) => {
      for (const { reject } of link.waiting.values()) reject(unreachable(reasonOf(error), error))
    })
    socket.on('message', (packet) => {
      const transactionId = readUdpReplyTransactionId(packet)
      if (transactionId !== undefined) link.waiting.get(transactionId)?.resolve(packet)
    })
    try {
      await connectSocket(socket, { address: found.address, port, localAddress: options.localAddress })
      return link
    } catch (error) {
      socket.close()
      throw unreachable(reasonOf(error), error)
    }
  }

  const take = async (signal: AbortSignal): Promise<Link> => {
    for (;;) {
      const opening = (current ??= open())
      opening.catch(() => {
        if (current === opening) current = undefined
      })
      const link = await unlessAborted(opening, signal)
      if (link.retired) continue
      link.users++
      return link
    }
  }
  const closeIfUnused = (link: Link) => {
    if (link.retired && link.users === 0) link.socket.close()
  }
  const retire = (link: Link) => {
    if (link.retired) return
    link.retired = true
    current = undefined
  }

  /** Sends one packet; undefined if no reply comes in time. */
  const exchange = async (
    link: Link,
    packet: Buffer,
    { transactionId, timeoutMs, signal }: { transactionId: number; timeoutMs: number; signal: AbortSignal },
  ): Promise<Buffer | undefined> => {
    signal.throwIfAborted()
    const waiter = Promise.withResolvers<Buffer | undefined>()
    const abort = () => waiter.reject(signal.reason)
    link.waiting.set(transactionId, waiter)
    signal.addEventListener('abort', abort, { once: true })
    const timer = setTimeout(() => waiter.resolve(undefined), Math.min(timeoutMs, timerMaxMs))
    try {
      link.socket.send(packet, (error) => {
        if (error) waiter.reject(unreachable(reasonOf(error), error))
      })
      return await waiter.promise
    } finally {
      clearTimeout(timer)
      signal.removeEventListener('abort', abort)
      link.waiting.delete(transactionId)
    }
  }

  /** One try: a connection id, unless there is one of the last minute, then the request. Undefined if no reply comes. */
  const attempt = async <Reply>(
    link: Link,
    request: Request<Reply>,
    { timeoutMs, mayReuse }: { timeoutMs: number; mayReuse: boolean },
  ): Promise<Reply | undefined> => {
    const { connectTransactionId, transactionId, signal } = request
    const known = link.connection
    const reused = mayReuse && known !== undefined && monotonic() - known.obtainedAt < connectionLifeMs
    let connection = known
    if (!reused) {
      const packet = writeUdpConnect(connectTransactionId)
      const reply = await exchange(link, packet, { transactionId: connectTransactionId, timeoutMs, signal })
      if (reply === undefined) return undefined
      connection = { id: parseUdpConnectReply(reply), obtainedAt: monotonic() }
      link.connection = connection
    }
    if (connection === undefined) return undefined
    const packet = request.write({ connectionId: connection.id, transactionId })
    const reply = await exchange(link, packet, { transactionId, timeoutMs, signal })
    if (reply === undefined) return undefined
    try {
      return request.parse(reply, link.family)
    } catch (error) {
      // A tracker that was started anew, with another key, does not know the ids of before.
      if (!reused || !isAboutConnectionId(error)) throw error
      if (link.connection === connection) link.connection = undefined
      return await attempt(link, request, { timeoutMs, mayReuse: false })
    }
  }

  const transact = async <Reply>(request: Request<Reply>): Promise<Reply> => {
    const link = await take(request.signal)
    try {
      for (let tries = 0; tries < triesMax; tries++) {
        const reply = await attempt(link, request, { timeoutMs: firstTimeoutMs * 2 ** tries, mayReuse: true })
        if (reply !== undefined) return reply
      }
      throw unreachable(`it does not answer (tries: ${triesMax})`)
    } catch (error) {
      if (error instanceof UnreachableError && !closing.signal.aborted) retire(link)
      throw error
    } finally {
      link.users--
      closeIfUnused(link)
    }
  }

  const bounded = async <Reply>(
    request: Pick<Request<Reply>, 'write' | 'parse'>,
    signal: AbortSignal | undefined,
  ): Promise<Reply> => {
    const both = signal === undefined ? closing.signal : AbortSignal.any([signal, closing.signal])
    both.throwIfAborted()
    if (requests >= requestsMax)
      throw unreachable(`too many requests under way: at most ${requestsMax} at once`)
    requests++
    try {
      return await transact({
        ...request,
        connectTransactionId: randomInt(2 ** 32),
        transactionId: randomInt(2 ** 32),
        signal: both,
      })
    } finally {
      requests--
    }
  }

  return {
    announce: (announce, { signal } = {}) => {
      const data = withParameters(urlData, announce)
      return bounded(
        { write: (ids) => writeUdpAnnounce(ids, announce, data), parse: parseUdpAnnounceReply },
        signal,
      )
    },
    scrape: async (infoHashes, { signal } = {}) => {
      const asked = infoHashes.length
      if (asked < 1 || asked > udpScrapeMax)
        throw new RangeError(`Cannot scrape ${asked} infohashes at once: need 1 to ${udpScrapeMax}`)
      const counts = await bounded(
        {
          write: (ids) => writeUdpScrape(ids, infoHashes),
          parse: (packet) => parseUdpScrapeReply(packet, asked),
        },
        signal,
      )
      const answered = new Map<InfoHash, SwarmCounts>()
      for (const [i, infoHash] of infoHashes.entries()) {
        const swarm = counts[i]
        if (swarm !== undefined) answered.set(infoHash, swarm)
      }
      return answered
    },
    [Symbol.asyncDispose]: async () => {
      closing.abort(unreachable('its client was closed'))
      const link = await current?.catch(() => undefined)
      if (link === undefined || link.retired) return
      const closed = once(link.socket, 'close')
      retire(link)
      closeIfUnused(link)
      await closed
    },
  }
}

function readUrl(text: string): { host: string; port: number; urlData: string; origin: string } {
  const url = URL.canParse(text) ? new URL(text) : undefined
  const port = Number(url?.port)
  if (url?.protocol !== 'udp:' || url.hostname === '' || port === 0)
    throw new Error(`Cannot use the tracker URL: need udp://HOST:PORT, such as udp://tracker.example:6969`)
  const path = url.pathname + url.search
  return {
    host: url.hostname.replace(/^\[(.*)\]$/, '$1'),
    port,
    urlData: path === '/' ? '' : path,
    origin: `udp://${url.host}`,
  }
}

/** URLData begins with "/"; without path and parameters there is none, and the packet is a plain BEP 15 one. */
function withParameters(urlData: string, { jwt, trackerId }: UdpAnnounce): string {
  const parameters: string[] = []
  if (trackerId !== undefined) parameters.push(`trackerid=${escapeBytes(Buffer.from(trackerId))}`)
  if (jwt !== undefined) parameters.push(`jwt=${escapeBytes(Buffer.from(jwt))}`)
  if (parameters.length === 0) return urlData
  const base = urlData.startsWith('/') ? urlData : `/${urlData}`
  return `${base}${base.includes('?') ? '&' : '?'}${parameters.join('&')}`
}

async function connectSocket(
  socket: Socket,
  { address, port, localAddress }: { address: string; port: number; localAddress: string | undefined },
): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<undefined>()
  socket.once('error', reject)
  const connect = () => {
    socket.connect(port, address, () => {
      resolve(undefined)
    })
  }
  if (localAddress === undefined) connect()
  else socket.bind({ address: localAddress, port: 0 }, connect)
  try {
    await promise
  } finally {
    socket.removeListener('error', reject)
  }
}

async function unlessAborted<Value>(promise: Promise<Value>, signal: AbortSignal): Promise<Value> {
  signal.throwIfAborted()
  const aborted = Promise.withResolvers<never>()
  const abort = () => aborted.reject(signal.reason)
  signal.addEventListener('abort', abort, { once: true })
  try {
    return await Promise.race([promise, aborted.promise])
  } finally {
    signal.removeEventListener('abort', abort)
  }
}

/** "bad connection ID" (chihaya, Rackswarm), "Connection ID missmatch." (opentracker), and the like. */
function isAboutConnectionId(error: unknown): boolean {
  return (
    error instanceof ClientError && error.code === 'tracker_failure' && /connection.?id/i.test(error.message)
  )
}

function reasonOf(error: unknown): string {
  const code = error instanceof Error && 'code' in error ? String(error.code) : ''
  switch (code) {
    case 'ECONNREFUSED':
      return 'nothing listens there (connection refused)'
    case 'EMSGSIZE':
      return 'the request is too large for a packet'
    default:
      return error instanceof Error ? error.message : String(error)
  }
}
