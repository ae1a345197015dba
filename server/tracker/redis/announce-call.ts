import type { Family } from '../../../lib/protocol/address.ts'
import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import { finish, mix } from '../memory/hash-index.ts'
import type { StoreAnnounce } from '../peer-store.ts'
import type { PlaceId } from '../topology.ts'
import type { NodeCounts, Stretch } from './stretches.ts'
import { blockField, entryBytes, fieldBytes, noCounts, nodeField } from './stretches.ts'

/** What scripts/announce.lua is to do; the values are its own. */
export const modes = { record: 0, stop: 1, recordKnown: 2 } as const
export type Mode = (typeof modes)[keyof typeof modes]

export interface AnnounceCall {
  readonly mode: Mode
  readonly announce: StoreAnnounce
  /** Rendezvous hash of the announcer in its place. */
  readonly rank: number
  readonly lifeMs: number
  /** Milliseconds; 0 for those of Redis. */
  readonly nowMs: number
  /** Milliseconds of Redis after which it is not executed any more; 0 for any time. */
  readonly notAfterMs: number
  readonly stretches: readonly Stretch[]
}

const headBytes = 52
const ageMsMax = 2 ** 32 - 1
const stretchBytes = fieldBytes.block + 4

/** ARGV[2] of scripts/announce.lua. */
export function writeRequest({ announce, mode, rank, lifeMs, nowMs, notAfterMs }: AnnounceCall): Buffer {
  const { raw, place, ancestors } = announce
  const levels = ancestors.length + 1
  const bytes = Buffer.allocUnsafe(headBytes + fieldBytes.node * levels)
  bytes[0] = mode
  bytes[1] = announce.event === 'completed' ? 1 : 0
  bytes[2] = levels
  bytes.writeUInt32LE(rank, 3)
  bytes.writeUInt32LE(lifeMs, 7)
  bytes.writeUIntLE(nowMs, 11, 6)
  bytes.writeUInt32LE(Math.min(ageMsMax, Math.ceil(announce.belatedMs ?? 0)), 17)
  bytes.writeUIntLE(notAfterMs, 21, 6)
  bytes[27] = announce.left === 0 ? 0 : 1
  bytes.writeUInt32LE(place, 28)
  if (raw) for (let i = 0; i < 20; i++) bytes[32 + i] = raw.bytes[raw.peerIdAt + i] ?? 0
  else bytes.set(announce.peerId, 32)
  nodeField(place, bytes, headBytes)
  let at = headBytes
  for (const { node } of ancestors) nodeField(node, bytes, (at += fieldBytes.node))
  return bytes
}

/** ARGV[3]. */
export function writeStretches(stretches: readonly Stretch[]): Buffer {
  const bytes = Buffer.allocUnsafe(stretches.length * stretchBytes)
  let at = 0
  for (const { node, list, block, from, to } of stretches) {
    blockField(node, list, block, bytes, at)
    const size = entryBytes(list)
    bytes.writeUInt16LE(from * size + 1, at + fieldBytes.block)
    bytes.writeUInt16LE(to * size, at + fieldBytes.block + 2)
    at += stretchBytes
  }
  return bytes
}

/** Rendezvous hash of swarm, place and endpoint, the same as in the memory store: so every server gives the same answer. */
export function rankOf(infoHash: InfoHash, place: PlaceId, endpoint: Uint8Array): number {
  let hash = mix(Number.parseInt(infoHash.slice(0, 8), 16), place)
  for (let i = 0; i < endpoint.length; i += 2)
    hash = mix(hash, ((endpoint[i] ?? 0) << 8) | (endpoint[i + 1] ?? 0))
  return finish(hash)
}

/** ARGV[1]: a peer's identity, 6 or 18 bytes. */
export function endpointOf({ source, port }: Pick<StoreAnnounce, 'source' | 'port'>): Buffer {
  const length = source.bytes.length
  const bytes = Buffer.allocUnsafe(length + 2)
  bytes.set(source.bytes)
  bytes[length] = port >> 8
  bytes[length + 1] = port & 0xff
  return bytes
}

/** Entries that were found, of one stretch. */
export interface Found {
  readonly level: number
  readonly list: number
  readonly bytes: Buffer
  /** Where the first one is. */
  readonly at: number
  readonly entries: number
  /** The announcer's own branch may be among them. */
  readonly isMixed: boolean
}

/** What the script answers. */
export interface AnnounceAnswer {
  readonly isStored: boolean
  /** The swarm had no peers before. */
  readonly isNew: boolean
  /** It came too late, and changed nothing. */
  readonly isTooLate: boolean
  /** Of Redis, when it did it. */
  readonly nowMs: number
  readonly downloaded: number
  /** The place and the nodes above it, the root last; the announcer included. */
  readonly nodes: readonly NodeCounts[]
  /** The lowest ranks of the place's leechers of the announcer's family, lowest first: eight at least, or all. */
  readonly ranks: readonly number[]
  readonly found: readonly Found[]
}

const nodeBytes = 24
const ranksShown = 8

/** @param bytes what the script returned */
export function parseAnswer(
  bytes: Buffer,
  { ancestors, source }: Pick<StoreAnnounce, 'ancestors' | 'source'>,
  stretches: readonly Stretch[],
): AnnounceAnswer {
  const flags = bytes[0] ?? 0
  let at = answerHeadBytes
  const next = () => {
    const from = at + 2
    at = from + bytes.readUInt16LE(at)
    return from
  }
  const placeAt = next()
  const hasPlace = at > placeAt
  const nodes = [readNode(bytes, placeAt, at)]
  let rootAt = placeAt
  for (let i = 0; i < ancestors.length; i++) {
    rootAt = next()
    nodes.push(readNode(bytes, rootAt, at))
  }
  const hasRoot = at > rootAt
  const found: Found[] = []
  for (const { level, list } of stretches) {
    const from = next()
    if (at > from)
      found.push({
        level,
        list,
        bytes,
        at: from,
        entries: (at - from) / entryBytes(list),
        isMixed: level > 0,
      })
  }
  return {
    isStored: (flags & 1) !== 0,
    isNew: (flags & 2) !== 0,
    isTooLate: (flags & 4) !== 0,
    nowMs: bytes.readUIntLE(1, 6),
    downloaded: hasRoot ? bytes.readUInt32LE(rootAt + nodeBytes) : 0,
    nodes,
    ranks: hasPlace ? readRanks(bytes, placeAt, source.family) : [],
    found,
  }
}

const answerHeadBytes = 7

function readNode(bytes: Buffer, at: number, end: number): NodeCounts {
  if (at === end) return noCounts
  return {
    peers: [
      bytes.readUInt32LE(at),
      bytes.readUInt32LE(at + 4),
      bytes.readUInt32LE(at + 8),
      bytes.readUInt32LE(at + 12),
    ],
    children: bytes.readUInt32LE(at + 20),
  }
}

/** What follows in a place: its path, how many ranks there are of each family, and they. */
function readRanks(bytes: Buffer, placeAt: number, family: Family): number[] {
  const at = placeAt + nodeBytes + 1 + 4 * (bytes[placeAt + nodeBytes] ?? 0)
  const [ipv4, ipv6] = [bytes[at] ?? 0, bytes[at + 1] ?? 0]
  const from = at + 2 + (family === 4 ? 0 : 4 * ipv4)
  const ranks: number[] = []
  for (let i = 0; i < Math.min(ranksShown, family === 4 ? ipv4 : ipv6); i++)
    ranks.push(bytes.readUInt32LE(from + 4 * i))
  return ranks
}
