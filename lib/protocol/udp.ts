import type { Family } from './address.ts'
import { formatIp, ipFromBytes, parseCompactPeers, parseIp } from './address.ts'
import type { Announce, AnnounceEvent, ParsedAnnounceReply, RawIds } from './announce.ts'
import { distanceUnknown } from './announce.ts'
import { ClientError } from './errors.ts'
import type { InfoHash } from './infohash.ts'
import { infoHashAt, infoHashToBytes } from './infohash.ts'
import { parseQuery } from './query.ts'
import type { Scrape, SwarmCounts } from './scrape.ts'

/**
 * The UDP tracker protocol: BEP 15, and BEP 41's options behind an announce. Numbers are big-endian.
 *
 * Every request: connection id 8 (of a connect: the protocol id), action 4, transaction id 4. Then
 * - announce: infohash 20, peer_id 20, downloaded 8, left 8, uploaded 8, event 4, IP 4, key 4, numwant 4, port 2, options.
 *   The old IPv6 announce of opentracker (action 4) differs in an IP of 16 bytes.
 * - scrape: infohashes, 20 each.
 *
 * Every reply: action 4, transaction id 4. Then
 * - connect: connection id 8.
 * - announce: interval 4, leechers 4, seeders 4, peers: 6 bytes each over IPv4, 18 over IPv6, whichever action asked.
 * - scrape: seeders 4, completed 4, leechers 4 for each infohash.
 * - error: text, ended by a zero byte.
 *
 * Writers write into a buffer of the caller's, which must be large enough, and return where they stopped.
 */
export const udpActions = { connect: 0, announce: 1, scrape: 2, error: 3, oldIpv6Announce: 4 } as const

/** Payload that crosses Ethernet (IPv4), or any IPv6 path, in one piece: 1500 - 20 - 8 and 1280 - 40 - 8. */
export const udpReplyMax = { 4: 1472, 6: 1232 } as const satisfies Record<Family, number>
/** What fits one packet of a client's (BEP 15: "about 74"). */
export const udpScrapeMax = 74

const protocolIdHigh = 0x417
const protocolIdLow = 0x27101980
const headerBytes = 16
const replyHeaderBytes = 8
const announceReplyBytes = 20
const optionEnd = 0
const optionNop = 1
const optionUrlData = 2
const optionBytesMax = 255
/** The largest token has 4096 characters; the rest is for the path and other parameters. */
const urlDataMax = 5120
/** Twenty-one full options hold the largest URLData; clients that cut it finer get some room. NOPs are not counted. */
const optionsMax = 64
const uint32Max = 0xffffffff
/** No tracker has this much to say; the text goes into logs. */
const failureCharactersMax = 512
const events: readonly (AnnounceEvent | undefined)[] = [undefined, 'completed', 'started', 'stopped']

/** The action of a request; undefined for what is not one, or is a connect without BEP 15's protocol id: no answer. */
export function readUdpAction(packet: Uint8Array): number | undefined {
  if (packet.length < headerBytes) return undefined
  const action = uint32(packet, 8)
  if (action !== udpActions.connect) return action
  return uint32(packet, 0) === protocolIdHigh && uint32(packet, 4) === protocolIdLow ? action : undefined
}

/** Of a request that has an action. */
export function readUdpTransactionId(packet: Uint8Array): number {
  return uint32(packet, 12)
}

/**
 * Reads an announce that came in a packet over `family`. A claimed address counts as one only if it has that family,
 * since the reply's peers have it, too.
 *
 * @throws ClientError whose message goes into the error reply
 */
export function parseUdpAnnounce(packet: Buffer, family: Family): Announce {
  const ipEnd = uint32(packet, 8) === udpActions.oldIpv6Announce ? 100 : 88
  const optionsAt = ipEnd + 10
  if (packet.length < optionsAt) throw malformed()
  const event = uint32(packet, 80)
  if (event > 3) throw new ClientError('bad_parameter', 'malformed event ID')
  const port = ((packet[ipEnd + 8] ?? 0) << 8) | (packet[ipEnd + 9] ?? 0)
  if (port === 0) throw new ClientError('bad_parameter', 'invalid port')
  const ip = uint32(packet, 84) === 0 && ipEnd === 88 ? undefined : claimedIp(packet, ipEnd, family)
  return new UdpAnnounce(packet, { ipEnd, event: events[event], port, ip })
}

/** The fields of an announce packet; those that most announces are answered without are only made when they are asked for. */
class UdpAnnounce implements Announce, RawIds {
  readonly bytes: Buffer
  readonly infoHashAt = 16
  readonly peerIdAt = 36
  readonly port: number
  readonly left: number
  readonly event: AnnounceEvent | undefined
  readonly numwant: number | undefined
  readonly compact = true
  readonly ip: string | undefined
  readonly ipv4 = undefined
  readonly ipv6 = undefined
  readonly trackerId: string | undefined
  readonly jwt: string | undefined
  readonly rackswarm = false

  constructor(
    packet: Buffer,
    fields: {
      readonly ipEnd: number
      readonly event: AnnounceEvent | undefined
      readonly port: number
      readonly ip: string | undefined
    },
  ) {
    const optionsAt = fields.ipEnd + 10
    const parameters = packet.length > optionsAt ? parseUdpOptions(packet, optionsAt) : undefined
    const numwant = uint32(packet, fields.ipEnd + 4)
    this.bytes = packet
    this.port = fields.port
    this.left = uint64(packet, 64)
    this.event = fields.event
    this.numwant = numwant === uint32Max ? undefined : numwant
    this.ip = fields.ip
    this.trackerId = parameters?.get('trackerid')
    this.jwt = parameters?.get('jwt')
  }

  get raw(): RawIds {
    return this
  }

  get infoHash(): InfoHash {
    return infoHashAt(this.bytes, this.infoHashAt)
  }

  get peerId(): Uint8Array {
    return this.bytes.subarray(this.peerIdAt, this.peerIdAt + 20)
  }

  get downloaded(): number {
    return uint64(this.bytes, 56)
  }

  get uploaded(): number {
    return uint64(this.bytes, 72)
  }
}

/**
 * Reads BEP 41's options from `start` to the end: the query parameters of URLData, undefined if there are none. Each byte is
 * looked at once; options that we do not know are stepped over by their length.
 *
 * @throws ClientError whose message goes into the error reply
 */
export function parseUdpOptions(packet: Buffer, start: number): ReadonlyMap<string, string> | undefined {
  let urlData = ''
  let options = 0
  for (let at = start; at < packet.length;) {
    const type = packet[at++]
    if (type === optionEnd) break
    if (type === optionNop) continue
    if (++options > optionsMax)
      throw new ClientError('bad_packet', `too many options: at most ${optionsMax} in one announce`)
    const length = packet[at++]
    if (length === undefined || at + length > packet.length) throw malformed()
    if (type === optionUrlData) urlData += packet.toString('latin1', at, at + length)
    at += length
  }
  if (urlData === '') return undefined
  if (urlData.length > urlDataMax)
    throw new ClientError('bad_packet', `URLData is too long: at most ${urlDataMax} bytes`)
  if (!urlData.startsWith('/')) throw malformed()
  const query = urlData.indexOf('?')
  return query < 0 ? undefined : parseQuery(urlData.slice(query + 1)).values
}

/** @throws ClientError whose message goes into the error reply */
export function parseUdpScrape(packet: Buffer, infoHashesMax: number): Scrape {
  const count = (packet.length - headerBytes) / 20
  if (count < 1 || !Number.isInteger(count)) throw malformed()
  if (count > infoHashesMax)
    throw new ClientError('bad_scrape', `too many infohashes: at most ${infoHashesMax} in one scrape`)
  return {
    infoHashes: Array.from({ length: count }, (_, i) => infoHashAt(packet, headerBytes + 20 * i)),
    jwt: undefined,
  }
}

/** 16 bytes. */
export function writeUdpConnectReply(
  target: Uint8Array,
  at: number,
  transactionId: number,
  connectionId: Uint8Array,
): number {
  putUint32(target, at, udpActions.connect)
  putUint32(target, at + 4, transactionId)
  for (let i = 0; i < 8; i++) target[at + 8 + i] = connectionId[i] ?? 0
  return at + 16
}

/** 20 bytes; the peers follow. `action` is the request's. */
export function writeUdpAnnounceHeader(
  target: Uint8Array,
  at: number,
  header: {
    readonly action: number
    readonly transactionId: number
    readonly intervalSeconds: number
    readonly leechers: number
    readonly seeders: number
  },
): number {
  putUint32(target, at, header.action)
  putUint32(target, at + 4, header.transactionId)
  putUint32(target, at + 8, header.intervalSeconds)
  putUint32(target, at + 12, header.leechers)
  putUint32(target, at + 16, header.seeders)
  return at + announceReplyBytes
}

/** 8 bytes and 12 for each swarm, in the order of the request. */
export function writeUdpScrapeReply(
  target: Uint8Array,
  at: number,
  transactionId: number,
  swarms: readonly SwarmCounts[],
): number {
  putUint32(target, at, udpActions.scrape)
  putUint32(target, at + 4, transactionId)
  let end = at + replyHeaderBytes
  for (const { complete, downloaded, incomplete } of swarms) {
    putUint32(target, end, complete)
    putUint32(target, end + 4, Math.min(downloaded, uint32Max))
    putUint32(target, end + 8, incomplete)
    end += 12
  }
  return end
}

/** 8 bytes, the text and a zero byte, as chihaya ends it. The text is cut, at a whole character, to make `bytesMax` in all. */
export function writeUdpError(
  target: Buffer,
  at: number,
  transactionId: number,
  message: string,
  bytesMax: number,
): number {
  putUint32(target, at, udpActions.error)
  putUint32(target, at + 4, transactionId)
  const textAt = at + replyHeaderBytes
  const textEnd = textAt + target.write(message, textAt, Math.max(0, bytesMax - replyHeaderBytes - 1), 'utf8')
  target[textEnd] = 0
  return textEnd + 1
}

/** What identifies a request; `connectionId` has 8 bytes. */
export interface UdpRequestIds {
  readonly connectionId: Uint8Array
  readonly transactionId: number
}

/** What a client announces over UDP. */
export interface UdpAnnounceFields {
  readonly infoHash: InfoHash
  /** 20 bytes. */
  readonly peerId: Uint8Array
  readonly port: number
  readonly uploaded: number
  readonly downloaded: number
  readonly left: number
  /** BEP 15 has no number for `paused`, which is sent as no event. */
  readonly event?: AnnounceEvent | undefined
  readonly numwant?: number | undefined
  /** An IPv4 address, for trackers that trust the claim. */
  readonly ip?: string | undefined
  /** Tells the tracker that it is still the same client when its address changes. */
  readonly key?: number | undefined
}

export function writeUdpConnect(transactionId: number): Buffer {
  const packet = Buffer.alloc(headerBytes)
  putUint32(packet, 0, protocolIdHigh)
  putUint32(packet, 4, protocolIdLow)
  putUint32(packet, 8, udpActions.connect)
  putUint32(packet, 12, transactionId)
  return packet
}

/** `urlData`: path and query for BEP 41, latin1, beginning with "/"; it goes into as many options as it takes. */
export function writeUdpAnnounce(ids: UdpRequestIds, fields: UdpAnnounceFields, urlData = ''): Buffer {
  const packet = Buffer.alloc(98 + urlData.length + 2 * Math.ceil(urlData.length / optionBytesMax))
  putHeader(packet, ids, udpActions.announce)
  packet.set(infoHashToBytes(fields.infoHash), 16)
  packet.set(fields.peerId, 36)
  putUint64(packet, 56, fields.downloaded)
  putUint64(packet, 64, fields.left)
  putUint64(packet, 72, fields.uploaded)
  putUint32(packet, 80, Math.max(0, events.indexOf(fields.event)))
  const ip = fields.ip === undefined ? undefined : parseIp(fields.ip)
  if (ip?.family === 4) packet.set(ip.bytes, 84)
  putUint32(packet, 88, fields.key ?? 0)
  putUint32(packet, 92, fields.numwant ?? uint32Max)
  packet.writeUInt16BE(fields.port, 96)
  let at = 98
  for (let from = 0; from < urlData.length; from += optionBytesMax) {
    const part = urlData.slice(from, from + optionBytesMax)
    packet[at] = optionUrlData
    packet[at + 1] = part.length
    at += 2 + packet.write(part, at + 2, 'latin1')
  }
  return packet
}

export function writeUdpScrape(ids: UdpRequestIds, infoHashes: readonly InfoHash[]): Buffer {
  const packet = Buffer.alloc(headerBytes + 20 * infoHashes.length)
  putHeader(packet, ids, udpActions.scrape)
  for (const [i, infoHash] of infoHashes.entries())
    packet.set(infoHashToBytes(infoHash), headerBytes + 20 * i)
  return packet
}

/** Undefined for what is too short to be a reply. */
export function readUdpReplyTransactionId(packet: Uint8Array): number | undefined {
  return packet.length < replyHeaderBytes ? undefined : uint32(packet, 4)
}

/** The connection id, 8 bytes. @throws ClientError `tracker_failure` with the tracker's own words, or `bad_reply` */
export function parseUdpConnectReply(packet: Buffer): Uint8Array {
  expectReply(packet, 'connect', [udpActions.connect])
  if (packet.length < 16) throw badReply('connect', `got ${packet.length} bytes, need 16`)
  return Uint8Array.from(packet.subarray(8, 16))
}

/** `family`: the one the packet came over. @throws ClientError `tracker_failure` with the tracker's own words, or `bad_reply` */
export function parseUdpAnnounceReply(packet: Buffer, family: Family): ParsedAnnounceReply {
  expectReply(packet, 'announce', [udpActions.announce, udpActions.oldIpv6Announce])
  const peerBytes = family === 4 ? 6 : 18
  const rest = packet.length - announceReplyBytes
  if (rest < 0 || rest % peerBytes !== 0)
    throw badReply(
      'announce',
      `got ${packet.length} bytes, need ${announceReplyBytes} and ${peerBytes} a peer`,
    )
  const intervalSeconds = uint32(packet, 8)
  return {
    complete: uint32(packet, 16),
    incomplete: uint32(packet, 12),
    intervalSeconds,
    minIntervalSeconds: intervalSeconds,
    peers: parseCompactPeers(packet.subarray(announceReplyBytes), family).map((endpoint) => ({
      endpoint,
      distance: distanceUnknown,
    })),
    trackerId: undefined,
    rackswarm: undefined,
  }
}

/**
 * Counts in the order of the request. A tracker may answer fewer than the `asked`, never more.
 *
 * @throws ClientError `tracker_failure` with the tracker's own words, or `bad_reply`
 */
export function parseUdpScrapeReply(packet: Buffer, asked: number): SwarmCounts[] {
  expectReply(packet, 'scrape', [udpActions.scrape])
  const count = (packet.length - replyHeaderBytes) / 12
  if (!Number.isInteger(count) || count > asked)
    throw badReply('scrape', `got ${packet.length} bytes, need 8 and 12 for each of ${asked} infohashes`)
  return Array.from({ length: count }, (_, i) => {
    const at = replyHeaderBytes + 12 * i
    return {
      complete: uint32(packet, at),
      downloaded: uint32(packet, at + 4),
      incomplete: uint32(packet, at + 8),
    }
  })
}

function claimedIp(packet: Buffer, ipEnd: number, family: Family): string | undefined {
  const bytes = packet.subarray(84, ipEnd)
  if (bytes.every((byte) => byte === 0)) return undefined
  const ip = ipFromBytes(bytes)
  return ip.family === family ? formatIp(ip) : undefined
}

function malformed(): ClientError {
  return new ClientError('bad_packet', 'malformed packet')
}

/** Refuses errors and other kinds of reply. */
function expectReply(packet: Buffer, kind: string, actions: readonly number[]): void {
  if (packet.length < replyHeaderBytes)
    throw badReply(kind, `got ${packet.length} bytes, need at least ${replyHeaderBytes}`)
  const action = uint32(packet, 0)
  if (action === udpActions.error) {
    const text = packet.toString('utf8', replyHeaderBytes, replyHeaderBytes + failureCharactersMax)
    throw new ClientError('tracker_failure', text.replace(/\0[^]*$/, ''))
  }
  if (!actions.includes(action)) throw badReply(kind, `got action ${action}, need ${actions.join(' or ')}`)
}

function badReply(kind: string, fault: string): ClientError {
  return new ClientError('bad_reply', `Cannot read UDP tracker's ${kind} reply: ${fault}`)
}

function putHeader(packet: Buffer, { connectionId, transactionId }: UdpRequestIds, action: number): void {
  packet.set(connectionId, 0)
  putUint32(packet, 8, action)
  putUint32(packet, 12, transactionId)
}

// Plain byte arithmetic: half the time of Buffer's methods, which check their arguments on each call.

function uint32(bytes: Uint8Array, at: number): number {
  return (
    (((bytes[at] ?? 0) << 24) |
      ((bytes[at + 1] ?? 0) << 16) |
      ((bytes[at + 2] ?? 0) << 8) |
      (bytes[at + 3] ?? 0)) >>>
    0
  )
}

/** Exact to 2^53; a larger number, such as the -1 of clients that do not know, is only large. */
function uint64(bytes: Uint8Array, at: number): number {
  return uint32(bytes, at) * 0x1_0000_0000 + uint32(bytes, at + 4)
}

function putUint32(target: Uint8Array, at: number, value: number): void {
  target[at] = value >>> 24
  target[at + 1] = value >>> 16
  target[at + 2] = value >>> 8
  target[at + 3] = value
}

function putUint64(target: Uint8Array, at: number, value: number): void {
  putUint32(target, at, Math.floor(value / 0x1_0000_0000))
  putUint32(target, at + 4, value)
}
