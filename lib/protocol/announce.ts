import type { Endpoint, Family } from './address.ts'
import { endpointIp, endpointPort, formatIp, parseCompactPeers } from './address.ts'
import type { Bencodable, BencodedDictionary } from './bencode.ts'
import { decode, encode } from './bencode.ts'
import { ClientError } from './errors.ts'
import type { InfoHash } from './infohash.ts'
import { infoHashFromBytes, infoHashToBytes } from './infohash.ts'
import type { QueryVisitor } from './query.ts'
import { escapeBytes, visitQuery } from './query.ts'

/** BEP 3, and `paused` of BEP 21: a partial seed that fetches no more. */
export type AnnounceEvent = 'started' | 'stopped' | 'completed' | 'paused'

/** What an announce says, whichever frontend it came through. Addresses are claims; the tracker decides what they count for. */
export interface Announce {
  readonly infoHash: InfoHash
  /** 20 raw bytes. */
  readonly peerId: Uint8Array
  readonly port: number
  readonly uploaded: number
  readonly downloaded: number
  /** Bytes still missing; 0 means a seeder. */
  readonly left: number
  readonly event: AnnounceEvent | undefined
  /** Peers wanted; undefined where the client did not say. */
  readonly numwant: number | undefined
  /** BEP 23; anything but `compact=0` means compact. */
  readonly compact: boolean
  /** Claimed addresses, as text: `ip` (BEP 3), `ipv4` and `ipv6` (BEP 7). */
  readonly ip: string | undefined
  readonly ipv4: string | undefined
  readonly ipv6: string | undefined
  /** What the last reply's `tracker id` said. */
  readonly trackerId: string | undefined
  readonly jwt: string | undefined
  /** The client understands the `rackswarm` reply key. */
  readonly rackswarm: boolean
  /** Where infohash and peer_id stand in the request, if they stand there as bytes: taking them from here spares their objects. */
  readonly raw?: RawIds | undefined
}

export interface RawIds {
  readonly bytes: Uint8Array
  readonly infoHashAt: number
  readonly peerIdAt: number
}

/** One peer of a reply. `distance`: 0 same rack, 1 next level …, 255 unknown. */
export interface ReplyPeer {
  readonly endpoint: Endpoint
  readonly peerId: Uint8Array
  readonly distance: number
}

export interface AnnounceReply {
  readonly complete: number
  readonly incomplete: number
  readonly downloaded: number
  readonly intervalSeconds: number
  readonly minIntervalSeconds: number
  readonly peers: readonly ReplyPeer[]
  /** BEP 24: the address the announcer is seen under. */
  readonly externalIp: Uint8Array | undefined
  readonly trackerId: string | undefined
  /** Only for clients that sent `rackswarm=1`. */
  readonly rackswarm: RackswarmHints | undefined
}

/** Hints for our own agents, in the reply's `rackswarm` key. */
export interface RackswarmHints {
  /** Random for each start of the tracker: when it changes, agents announce all they hold again. */
  readonly epoch: string
  /** The announcer is one of the few in its rack that should fetch from far peers at once. */
  readonly gateway: boolean
}

/** What a client learns from a reply; distances only from a Rackswarm tracker. */
export interface ParsedAnnounceReply {
  readonly complete: number
  readonly incomplete: number
  readonly intervalSeconds: number
  readonly minIntervalSeconds: number
  readonly peers: readonly { readonly endpoint: Endpoint; readonly distance: number }[]
  readonly trackerId: string | undefined
  readonly rackswarm: RackswarmHints | undefined
}

/** The distance of a peer whose place is not known. */
export const distanceUnknown = 255

/**
 * Reads the query of `/announce`. Error texts are chihaya's, since its users' alerts match on them.
 *
 * @throws ClientError whose message is the reply's `failure reason`
 */
export function parseAnnounce(rawQuery: string): Announce {
  const query = new AnnounceQuery()
  visitQuery(rawQuery, query)
  if (query.infoHashBroken) throw new ClientError('bad_infohash', 'provided invalid infohash')
  const event = parseEvent(query.event)
  if (query.infoHashes === 0) throw new ClientError('bad_infohash', 'no info_hash parameter supplied')
  if (query.infoHashes > 1) throw new ClientError('bad_infohash', 'multiple info_hash parameters supplied')
  const { peerId } = query
  if (peerId === undefined) throw new ClientError('bad_parameter', 'failed to parse parameter: peer_id')
  if (peerId.length !== 20) throw new ClientError('bad_parameter', 'failed to provide valid peer_id')
  const left = uint(query.left, 'left', 20)
  const downloaded = uint(query.downloaded, 'downloaded', 20)
  const uploaded = uint(query.uploaded, 'uploaded', 20)
  const numwant = query.numwant === undefined ? undefined : uint(query.numwant, 'numwant', 10)
  const port = uint(query.port, 'port', 5)
  if (port > 0xffff) throw new ClientError('bad_parameter', 'failed to parse parameter: port')
  if (port === 0) throw new ClientError('bad_parameter', 'invalid port')
  return new HttpAnnounce(query, peerId, { port, uploaded, downloaded, left, numwant, event })
}

/** The parameters of an announce as texts; keys of any case, the last value of each. All others are dropped. */
class AnnounceQuery implements QueryVisitor {
  infoHash = ''
  infoHashes = 0
  infoHashBroken = false
  peerId: string | undefined = undefined
  port: string | undefined = undefined
  uploaded: string | undefined = undefined
  downloaded: string | undefined = undefined
  left: string | undefined = undefined
  event = ''
  numwant: string | undefined = undefined
  compact: string | undefined = undefined
  ip: string | undefined = undefined
  ipv4: string | undefined = undefined
  ipv6: string | undefined = undefined
  trackerId: string | undefined = undefined
  jwt: string | undefined = undefined
  rackswarm: string | undefined = undefined

  pair(key: string, value: string): void {
    if (key === 'info_hash') {
      this.infoHash = value
      this.infoHashes++
      if (value.length !== 20) this.infoHashBroken = true
      return
    }
    switch (key.toLowerCase()) {
      case 'peer_id':
        this.peerId = value
        break
      case 'port':
        this.port = value
        break
      case 'uploaded':
        this.uploaded = value
        break
      case 'downloaded':
        this.downloaded = value
        break
      case 'left':
        this.left = value
        break
      case 'event':
        this.event = value
        break
      case 'numwant':
        this.numwant = value
        break
      case 'compact':
        this.compact = value
        break
      case 'ip':
        this.ip = value
        break
      case 'ipv4':
        this.ipv4 = value
        break
      case 'ipv6':
        this.ipv6 = value
        break
      case 'trackerid':
        this.trackerId = value
        break
      case 'jwt':
        this.jwt = value
        break
      case 'rackswarm':
        this.rackswarm = value
        break
    }
  }
}

/** The store takes the ids as bytes; the infohash as text is only made where it is asked for. */
class HttpAnnounce implements Announce, RawIds {
  readonly bytes = new Uint8Array(40)
  readonly infoHashAt = 0
  readonly peerIdAt = 20
  readonly port: number
  readonly uploaded: number
  readonly downloaded: number
  readonly left: number
  readonly event: AnnounceEvent | undefined
  readonly numwant: number | undefined
  readonly compact: boolean
  readonly ip: string | undefined
  readonly ipv4: string | undefined
  readonly ipv6: string | undefined
  readonly trackerId: string | undefined
  readonly jwt: string | undefined
  readonly rackswarm: boolean

  constructor(
    query: AnnounceQuery,
    peerId: string,
    read: Pick<Announce, 'port' | 'uploaded' | 'downloaded' | 'left' | 'numwant' | 'event'>,
  ) {
    for (let i = 0; i < 20; i++) {
      this.bytes[i] = query.infoHash.charCodeAt(i)
      this.bytes[20 + i] = peerId.charCodeAt(i)
    }
    this.port = read.port
    this.uploaded = read.uploaded
    this.downloaded = read.downloaded
    this.left = read.left
    this.event = read.event
    this.numwant = read.numwant
    this.compact = query.compact !== '0'
    this.ip = query.ip
    this.ipv4 = query.ipv4
    this.ipv6 = query.ipv6
    this.trackerId = query.trackerId
    this.jwt = query.jwt
    this.rackswarm = query.rackswarm === '1'
  }

  get raw(): RawIds {
    return this
  }

  get infoHash(): InfoHash {
    return infoHashFromBytes(this.bytes.subarray(0, 20))
  }

  get peerId(): Uint8Array {
    return this.bytes.subarray(20)
  }
}

/** Writes the query of an announce, without a leading `?`. */
export function writeAnnounce(announce: {
  infoHash: InfoHash
  peerId: Uint8Array
  port: number
  uploaded: number
  downloaded: number
  left: number
  event?: AnnounceEvent | undefined
  numwant?: number | undefined
  trackerId?: string | undefined
  jwt?: string | undefined
  rackswarm?: boolean
}): string {
  const pairs = [
    `info_hash=${escapeBytes(infoHashToBytes(announce.infoHash))}`,
    `peer_id=${escapeBytes(announce.peerId)}`,
    `port=${announce.port}`,
    `uploaded=${announce.uploaded}`,
    `downloaded=${announce.downloaded}`,
    `left=${announce.left}`,
    'compact=1',
  ]
  if (announce.event !== undefined) pairs.push(`event=${announce.event}`)
  if (announce.numwant !== undefined) pairs.push(`numwant=${announce.numwant}`)
  if (announce.trackerId !== undefined)
    pairs.push(`trackerid=${escapeBytes(Buffer.from(announce.trackerId))}`)
  if (announce.rackswarm === true) pairs.push('rackswarm=1')
  if (announce.jwt !== undefined) pairs.push(`jwt=${announce.jwt}`)
  return pairs.join('&')
}

/** Bencodes a reply: keys sorted (BEP 3), `peers` always there, IPv6 peers in `peers6` (BEP 7). */
export function writeAnnounceReply(reply: AnnounceReply, compact: boolean): Buffer {
  const v4 = reply.peers.filter((peer) => peer.endpoint.family === 4)
  const v6 = reply.peers.filter((peer) => peer.endpoint.family === 6)
  const hints = reply.rackswarm
  return encode({
    complete: reply.complete,
    downloaded: reply.downloaded,
    'external ip': reply.externalIp,
    incomplete: reply.incomplete,
    interval: reply.intervalSeconds,
    'min interval': reply.minIntervalSeconds,
    peers: compact ? joinCompact(v4) : [...v4, ...v6].map(dictionaryPeer),
    peers6: compact && v6.length > 0 ? joinCompact(v6) : undefined,
    rackswarm: hints && {
      d: distances(v4),
      d6: distances(v6),
      epoch: hints.epoch,
      gateway: hints.gateway ? 1 : 0,
      v: 1,
    },
    'tracker id': reply.trackerId,
  })
}

/** Peers as a reply carries them: endpoints in a row, 6 bytes each (BEP 23) or 18 (BEP 7), and a byte of distance for each. */
export interface CompactPeers {
  readonly compact: Readonly<Record<Family, Uint8Array>>
  readonly distances: Readonly<Record<Family, Uint8Array>>
  /** How many of each family there are. */
  readonly lengths: Readonly<Record<Family, number>>
}

/** The same bytes as `writeAnnounceReply` for a compact reply, without an object for each peer: the tracker's hot path. */
export function writeCompactAnnounceReply(reply: Omit<AnnounceReply, 'peers'>, peers: CompactPeers): Buffer {
  const { externalIp, rackswarm: hints, trackerId } = reply
  const [count4, count6] = [peers.lengths[4], peers.lengths[6]]
  const head = `d8:completei${reply.complete}e10:downloadedi${reply.downloaded}e`
  const middle = `10:incompletei${reply.incomplete}e8:intervali${reply.intervalSeconds}e12:min intervali${reply.minIntervalSeconds}e5:peers${count4 * 6}:`
  // What follows the endpoints is rare; its parts are short.
  const epoch = hints ? Buffer.from(hints.epoch) : undefined
  const id = trackerId === undefined ? undefined : Buffer.from(trackerId)
  const target = Buffer.allocUnsafe(
    head.length +
      middle.length +
      (externalIp ? 17 + externalIp.length : 0) +
      count4 * 7 +
      count6 * 19 +
      (epoch ? 100 + epoch.length : 0) +
      (id ? 30 + id.length : 0) +
      30,
  )
  let at = target.write(head, 0, 'latin1')
  if (externalIp) {
    at += target.write(`11:external ip${externalIp.length}:`, at, 'latin1')
    target.set(externalIp, at)
    at += externalIp.length
  }
  at += target.write(middle, at, 'latin1')
  at = copy(peers.compact[4], count4 * 6, target, at)
  if (count6 > 0) {
    at += target.write(`6:peers6${count6 * 18}:`, at, 'latin1')
    at = copy(peers.compact[6], count6 * 18, target, at)
  }
  if (hints && epoch) {
    at += target.write(`9:rackswarmd1:d${count4}:`, at, 'latin1')
    at = copy(peers.distances[4], count4, target, at)
    at += target.write(`2:d6${count6}:`, at, 'latin1')
    at = copy(peers.distances[6], count6, target, at)
    at += target.write(`5:epoch${epoch.length}:`, at, 'latin1')
    at = copy(epoch, epoch.length, target, at)
    at += target.write(`7:gatewayi${hints.gateway ? 1 : 0}e1:vi1ee`, at, 'latin1')
  }
  if (id) {
    at += target.write(`10:tracker id${id.length}:`, at, 'latin1')
    at = copy(id, id.length, target, at)
  }
  target[at++] = 0x65
  return target.subarray(0, at)
}

/** Copies the first `length` bytes. @returns where they end */
function copy(source: Uint8Array, length: number, target: Uint8Array, at: number): number {
  for (let i = 0; i < length; i++) target[at + i] = source[i] ?? 0
  return at + length
}

/** `d14:failure reason…e`; with BEP 31 `retry in`, minutes, where asking again later may help. */
export function writeFailure(reason: string, retryInMinutes?: number): Buffer {
  return encode({ 'failure reason': reason, 'retry in': retryInMinutes })
}

/**
 * Reads a tracker's reply, compact or not.
 *
 * @throws ClientError `tracker_failure` with the tracker's own words, or `bad_reply` / `bad_bencode`
 */
export function parseAnnounceReply(bytes: Uint8Array): ParsedAnnounceReply {
  const reply = decode(bytes)
  if (!(reply instanceof Map))
    throw new ClientError('bad_reply', 'Cannot read tracker reply: need a dictionary')
  const failure = reply.get('failure reason')
  if (failure instanceof Uint8Array) throw new ClientError('tracker_failure', utf8(failure))
  const own = reply.get('rackswarm')
  const hints = own instanceof Map && own.get('v') === 1 ? own : undefined
  const intervalSeconds = count(reply, 'interval')
  if (intervalSeconds === undefined)
    throw new ClientError('bad_reply', 'Cannot read tracker reply: interval is missing')
  const epoch = hints?.get('epoch')
  const trackerId = reply.get('tracker id')
  return {
    complete: count(reply, 'complete') ?? 0,
    incomplete: count(reply, 'incomplete') ?? 0,
    intervalSeconds,
    minIntervalSeconds: count(reply, 'min interval') ?? intervalSeconds,
    peers: [...readPeers(reply, 'peers', hints?.get('d')), ...readPeers(reply, 'peers6', hints?.get('d6'))],
    trackerId: trackerId instanceof Uint8Array ? utf8(trackerId) : undefined,
    rackswarm:
      epoch instanceof Uint8Array ? { epoch: utf8(epoch), gateway: hints?.get('gateway') === 1 } : undefined,
  }
}

function parseEvent(text: string): AnnounceEvent | undefined {
  switch (text.toLowerCase()) {
    case '':
    case 'none':
      return undefined
    case 'started':
      return 'started'
    case 'stopped':
      return 'stopped'
    case 'completed':
      return 'completed'
    case 'paused':
      return 'paused'
    default:
      throw new ClientError('bad_parameter', 'failed to provide valid client event')
  }
}

function uint(text: string | undefined, key: string, digitsMax: number): number {
  const value = text === undefined || text.length > digitsMax ? Number.NaN : readDigits(text)
  if (!(value < 2 ** 64)) throw new ClientError('bad_parameter', `failed to parse parameter: ${key}`)
  return value
}

/** NaN for anything but decimal digits. Up to 15 of them add up without rounding, at a fraction of what `Number` takes. */
function readDigits(text: string): number {
  if (text.length > 15) return /^\d+$/.test(text) ? Number(text) : Number.NaN
  let value = text.length === 0 ? Number.NaN : 0
  for (let i = 0; i < text.length; i++) {
    const digit = text.charCodeAt(i) - 0x30
    if (digit < 0 || digit > 9) return Number.NaN
    value = value * 10 + digit
  }
  return value
}

function joinCompact(peers: readonly ReplyPeer[]): Buffer {
  return Buffer.concat(peers.map((peer) => peer.endpoint.compact))
}

function distances(peers: readonly ReplyPeer[]): Uint8Array {
  return Uint8Array.from(peers, (peer) => peer.distance)
}

function dictionaryPeer({ endpoint, peerId }: ReplyPeer): Bencodable {
  return { ip: formatIp(endpointIp(endpoint)), 'peer id': peerId, port: endpointPort(endpoint) }
}

function* readPeers(
  reply: BencodedDictionary,
  key: 'peers' | 'peers6',
  hints: unknown,
): Generator<{ endpoint: Endpoint; distance: number }> {
  const value = reply.get(key)
  if (!(value instanceof Uint8Array)) return
  const known = hints instanceof Uint8Array ? hints : undefined
  for (const [i, endpoint] of parseCompactPeers(value, key === 'peers' ? 4 : 6).entries()) {
    yield { endpoint, distance: known?.[i] ?? distanceUnknown }
  }
}

function count(members: BencodedDictionary, key: string): number | undefined {
  const value = members.get(key)
  return typeof value === 'number' && value >= 0 ? value : undefined
}

function utf8(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('utf8')
}
