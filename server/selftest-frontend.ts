import { randomBytes, randomInt } from 'node:crypto'
import { once } from 'node:events'
import type { IncomingMessage } from 'node:http'
import { request } from 'node:http'
import type { Socket } from 'node:net'
import { connect } from 'node:net'
import type { ConnectionOptions } from 'node:tls'
import { connect as connectTls } from 'node:tls'
import { UnreachableError } from '../lib/client/http.ts'
import type { UdpTracker } from '../lib/client/udp-tracker.ts'
import { createUdpTracker } from '../lib/client/udp-tracker.ts'
import { endpointPort, formatEndpoint } from '../lib/protocol/address.ts'
import type { ParsedAnnounceReply } from '../lib/protocol/announce.ts'
import { parseAnnounceReply, writeAnnounce } from '../lib/protocol/announce.ts'
import { ClientError } from '../lib/protocol/errors.ts'
import type { InfoHash } from '../lib/protocol/infohash.ts'

/** Where a tracker is asked, and how it is reached. */
export interface Frontend {
  /** `http://127.0.0.1:6969/announce`, `udp://127.0.0.1:6969`. */
  readonly url: string
  /** For `https:`. */
  readonly tls: ConnectionOptions
  /** The frontend takes us for a proxy, and waits for the PROXY protocol header. */
  readonly proxyHeader: boolean
}

export interface Finding {
  readonly frontend: string
  /** `partial`: what could be checked was right, and it was not all. */
  readonly verdict: 'ok' | 'partial' | 'fail'
  readonly detail: string
  /** What to do, where it is not ok. */
  readonly advice?: string | undefined
}

export interface Swarm {
  readonly infoHash: InfoHash
  /** Nobody else can be in it. */
  readonly isOurs: boolean
  readonly jwt: string | undefined
}

/** What is known of the tracker; undefined where nobody says. */
export interface Expected {
  readonly tokensNeeded: boolean | undefined
  /** Names of the hooks that an announce must pass. */
  readonly prehooks: readonly string[]
}

const missingToken = 'unapproved request: missing jwt'
const answerBytesMax = 1024 * 1024
/** What built-in hooks refuse with, when they do what they are there for. */
const refusalsOfHooks: Readonly<Record<string, string>> = {
  'unapproved client': 'client approval',
  'unapproved torrent': 'torrent approval',
  'unapproved network': 'network approval',
}

/**
 * Announces as two peers that fetch: the second must be told of the first, and of nobody else. Both leave at the end, whatever
 * happened. Never rejects.
 */
export async function checkFrontend(
  frontend: Frontend,
  swarm: Swarm,
  expected: Expected,
  timeoutMs: number,
): Promise<Finding> {
  await using client = openClient(frontend, timeoutMs)
  try {
    return { frontend: client.name, ...(await converse(client, swarm, expected)) }
  } catch (error) {
    return { frontend: client.name, ...describeFault(error, expected) }
  }
}

/** One request to the main port of the same server. @throws Error */
export async function exchange(
  frontend: Frontend,
  call: { method: 'GET' | 'POST'; path: string; headers?: Record<string, string>; body?: string },
  timeoutMs: number,
): Promise<{ status: number; body: Buffer }> {
  const signal = AbortSignal.timeout(timeoutMs)
  const { host } = new URL(frontend.url)
  let socket: Socket | undefined
  try {
    socket = await openSocket(frontend, signal)
    const opened = socket
    const sent = request({
      createConnection: () => opened,
      method: call.method,
      path: call.path,
      headers: { host, connection: 'close', ...call.headers },
      signal,
    })
    sent.end(call.body)
    const [response] = (await once(sent, 'response')) as [IncomingMessage]
    return { status: response.statusCode ?? 0, body: await readBody(response) }
  } catch (error) {
    if (signal.aborted) throw new UnreachableError(`no answer within ${timeoutMs / 1000} s`, { cause: error })
    throw error
  } finally {
    socket?.destroy()
  }
}

interface Peer {
  readonly id: Uint8Array
  readonly port: number
}

type Ask = (peer: Peer, event: 'started' | 'stopped', swarm: Swarm) => Promise<ParsedAnnounceReply>

interface Client extends AsyncDisposable {
  readonly name: string
  readonly announce: Ask
}

type Judgement = Omit<Finding, 'frontend'>

async function converse({ announce }: Client, swarm: Swarm, expected: Expected): Promise<Judgement> {
  const portA = randomInt(20_000, 40_000)
  const [a, b] = [newPeer(portA), newPeer(portA + randomInt(1, 20_000))]
  const { tokensNeeded } = expected
  if (swarm.jwt === undefined || tokensNeeded === true) {
    const stranger = { ...swarm, jwt: undefined }
    const refused = await isRefusedWithoutToken(announce, a, stranger)
    if (!refused && tokensNeeded === true) {
      await leave(announce, [a], stranger)
      return {
        verdict: 'fail',
        detail: 'an announce without a token was accepted, and tracker.approval is token',
        advice: 'The server that runs has another configuration: reload it or start it again.',
      }
    }
    if (refused && swarm.jwt === undefined) return judgeRefusal(tokensNeeded)
  }
  try {
    return await meet(announce, [a, b], swarm)
  } catch (error) {
    await leave(announce, [b, a], swarm).catch(() => undefined)
    throw error
  }
}

async function meet(announce: Ask, [a, b]: readonly [Peer, Peer], swarm: Swarm): Promise<Judgement> {
  await announce(a, 'started', swarm)
  const { peers, complete, incomplete } = await announce(b, 'started', swarm)
  const left = await leave(announce, [b, a], swarm)
  const shown = peers.map(({ endpoint }) => formatEndpoint(endpoint)).join(', ')
  const found = peers.find(({ endpoint }) => endpointPort(endpoint) === a.port)
  const isExact = peers.length === 1 && complete === 0 && incomplete === 2
  if (!found || (swarm.isOurs && !isExact))
    return {
      verdict: 'fail',
      detail: `of two peers that were to be alone in a swarm, the second was told of ${peers.length} (${shown}), and that ${complete + incomplete} are there`,
      advice:
        'Servers behind one address that do not share their swarms look like this, and so does a cache in front of the server.',
    }
  if (swarm.isOurs && left.complete + left.incomplete > 0)
    return {
      verdict: 'fail',
      detail: `${left.complete + left.incomplete} peers are left in the swarm, and both have stopped`,
      advice: 'This is a fault of the tracker: please report it.',
    }
  return {
    verdict: 'ok',
    detail: `two peers found each other, the first as ${formatEndpoint(found.endpoint)}`,
  }
}

/** @throws Error where the answer is neither a welcome nor that refusal */
async function isRefusedWithoutToken(announce: Ask, peer: Peer, swarm: Swarm): Promise<boolean> {
  try {
    await announce(peer, 'started', swarm)
    return false
  } catch (error) {
    if (error instanceof ClientError && error.message === missingToken) return true
    throw error
  }
}

function judgeRefusal(tokensNeeded: boolean | undefined): Judgement {
  return tokensNeeded === false
    ? {
        verdict: 'fail',
        detail: `refused ("${missingToken}"), and tracker.approval is none`,
        advice: 'The server that runs has another configuration: reload it or start it again.',
      }
    : {
        verdict: 'partial',
        detail: 'refused without a token, as it should be; without one, this is all that can be checked',
        advice: 'Name a file with an announce token, or with an API token of scope admin: --token FILE.',
      }
}

/** @returns what the last of them was told */
async function leave(announce: Ask, peers: readonly Peer[], swarm: Swarm): Promise<ParsedAnnounceReply> {
  let reply: ParsedAnnounceReply | undefined
  for (const peer of peers) reply = await announce(peer, 'stopped', swarm)
  if (!reply) throw new Error('Cannot leave a swarm without a peer')
  return reply
}

function newPeer(port: number): Peer {
  return { id: Buffer.from(`-RS0000-${randomBytes(6).toString('hex')}`), port }
}

function fieldsOf({ id, port }: Peer, event: 'started' | 'stopped', { infoHash, jwt }: Swarm) {
  return { infoHash, peerId: id, port, uploaded: 0, downloaded: 0, left: 100, numwant: 50, event, jwt }
}

/** A client of the frontend. Its name is the URL without what may be secret. */
function openClient(frontend: Frontend, timeoutMs: number): Client {
  const url = new URL(frontend.url)
  const name = `${url.protocol}//${url.host}${url.protocol === 'udp:' ? '' : url.pathname}`
  if (url.protocol === 'udp:') {
    // Two tries: a packet may be lost.
    const udp: UdpTracker = createUdpTracker({
      url: frontend.url,
      firstTimeoutMs: timeoutMs / 3,
      triesMax: 2,
    })
    return {
      name,
      announce: async (peer, event, swarm) => udp.announce(fieldsOf(peer, event, swarm)),
      [Symbol.asyncDispose]: () => udp[Symbol.asyncDispose](),
    }
  }
  return {
    name,
    announce: async (peer, event, swarm) => {
      const query = writeAnnounce(fieldsOf(peer, event, swarm))
      const path = `${url.pathname}${url.search === '' ? '?' : `${url.search}&`}${query}`
      const { status, body } = await exchange(frontend, { method: 'GET', path }, timeoutMs)
      if (status !== 200) throw new StatusError(status)
      return parseAnnounceReply(body)
    },
    [Symbol.asyncDispose]: async () => Promise.resolve(),
  }
}

class StatusError extends Error {
  override readonly name = 'StatusError'

  constructor(status: number) {
    super(`the answer has HTTP status ${status}`)
  }
}

async function openSocket({ url, tls, proxyHeader }: Frontend, signal: AbortSignal): Promise<Socket> {
  const { hostname, port, protocol } = new URL(url)
  const host = hostname.replace(/^\[(.*)\]$/, '$1')
  const isTls = protocol === 'https:'
  const plain = connect({ host, port: Number(port === '' ? (isTls ? 443 : 80) : port), noDelay: true })
  try {
    await once(plain, 'connect', { signal })
    if (proxyHeader) plain.write('PROXY UNKNOWN\r\n')
    if (!isTls) return plain
    const secured = connectTls({ host, servername: isName(host) ? host : '', ...tls, socket: plain })
    await once(secured, 'secureConnect', { signal })
    return secured
  } catch (error) {
    plain.destroy()
    throw error
  }
}

/** Names, and not addresses, may be asked for in a handshake. */
export function isName(host: string): boolean {
  return !host.includes(':') && !/^[\d.]+$/.test(host)
}

async function readBody(response: IncomingMessage): Promise<Buffer> {
  const chunks: Buffer[] = []
  let length = 0
  for await (const chunk of response as AsyncIterable<Buffer>) {
    length += chunk.length
    if (length > answerBytesMax) throw new Error(`the answer has more than ${answerBytesMax} bytes`)
    chunks.push(chunk)
  }
  return Buffer.concat(chunks)
}

/** What went wrong, and what to do about it. */
export function describeFault(error: unknown, { prehooks }: Expected): Judgement {
  const message = error instanceof Error ? reasonOf(error) : String(error)
  const code = error instanceof Error && 'code' in error ? String(error.code) : ''
  const fail = (advice: string, detail = message): Judgement => ({ verdict: 'fail', detail, advice })
  if (error instanceof ClientError && code === 'tracker_failure') {
    const hook = refusalsOfHooks[message]
    if (hook !== undefined && prehooks.includes(hook))
      return {
        verdict: 'partial',
        detail: `refused by the hook "${hook}", as configured; this is all that can be checked`,
        advice: 'The selftest is a peer nobody knows, with an infohash nobody has.',
      }
    if (message.startsWith('unapproved request'))
      return fail(
        'The token does not suit: look at tokens.issuer, tokens.audience, public_url, the keys, the clocks, and the address it is bound to. At log_level debug the server says why.',
        `refused: "${message}"`,
      )
    return fail(
      'That is the answer of the tracker: the settings named in it say why.',
      `refused: "${message}"`,
    )
  }
  if (error instanceof StatusError)
    return fail('Is this a tracker, and is its route in http.announce_routes?')
  if (/CERTIFICATE_REQUIRED|HANDSHAKE_FAILURE/.test(code))
    return fail('It wants the certificate of a client: --cert FILE --key FILE.')
  if (/^(ERR_TLS|CERT_|DEPTH_|SELF_SIGNED|UNABLE_TO|ERR_SSL)/.test(code))
    return fail(
      'If the certificate is right, name its authority with --ca FILE, or do not look at it: --insecure.',
    )
  if (code === 'ECONNREFUSED' || message.includes('connection refused'))
    return fail('Is the server running? Its log line "server is listening" says where.')
  return fail('Look at the log of the server, and for a firewall on the way.')
}

function reasonOf(error: Error): string {
  const first = error instanceof AggregateError ? (error.errors[0] as unknown) : undefined
  const { message } = first instanceof Error ? first : error
  if ('code' in error && error.code === 'ECONNREFUSED') return 'nothing listens there (connection refused)'
  return message
}
