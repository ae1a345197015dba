import type { Bencodable, BencodedDictionary } from './bencode.ts'
import { decodeDictionary, encode } from './bencode.ts'
import { ClientError } from './errors.ts'
import type { InfoHash } from './infohash.ts'
import { infoHashOf } from './infohash.ts'

/** A single-file v1 torrent (BEP 3): all that a client needs to fetch and check one blob. */
export interface Metainfo {
  readonly infoHash: InfoHash
  readonly name: string
  /** Bytes. */
  readonly length: number
  /** Bytes in every piece but the last. */
  readonly pieceLength: number
  /** SHA-1 of each piece, 20 bytes each, joined. */
  readonly pieces: Uint8Array
  readonly private: boolean
  readonly announce: string | undefined
  /** BEP 19 webseeds. */
  readonly urlList: readonly string[]
}

/** Blobs up to this many bytes travel over plain HTTP and have no torrent. */
export const swarmLengthMin = 256 * 1024

const pieceLengthMin = 256 * 1024
const pieceLengthMax = 16 * 1024 * 1024
const piecesMax = 1500

/**
 * The piece length for a blob: the smallest power of two ≥ 256 KiB that makes at most 1500 pieces, at most 16 MiB.
 * A function of the length alone, so that the infohash depends on the bytes alone.
 */
export function pieceLengthFor(length: number): number {
  let pieceLength = pieceLengthMin
  while (pieceLength < pieceLengthMax && Math.ceil(length / pieceLength) > piecesMax) pieceLength *= 2
  return pieceLength
}

/** The bencoded `info` of a blob: named by its SHA-256 in hex, private (BEP 27). */
export function writeBlobInfo(blob: { sha256Hex: string; length: number; pieces: Uint8Array }): Buffer {
  return encode({
    length: blob.length,
    name: blob.sha256Hex,
    'piece length': pieceLengthFor(blob.length),
    pieces: blob.pieces,
    private: 1,
  })
}

/** A .torrent around an already bencoded `info`, whose bytes stand in it unchanged. */
export function writeTorrent(
  info: Uint8Array,
  outer: { announce?: string; createdBy?: string; urlList?: readonly string[] },
): Buffer {
  const { announce, createdBy, urlList = [] } = outer
  return Buffer.concat([
    Buffer.from('d'),
    member({ announce }),
    member({ 'created by': createdBy }),
    Buffer.from('4:info'),
    info,
    member({ 'url-list': urlList.length === 0 ? undefined : urlList }),
    Buffer.from('e'),
  ])
}

/**
 * Reads a single-file v1 .torrent.
 *
 * @throws ClientError `bad_bencode`, or `bad_metainfo` naming the member that is wrong
 */
export function parseTorrent(bytes: Uint8Array): Metainfo {
  const { members, spans } = decodeDictionary(bytes)
  const info = members.get('info')
  const span = spans.get('info')
  if (!(info instanceof Map) || !span) return wrong('info', 'need a dictionary')
  if (info.has('files')) return wrong('info.files', 'need a single-file torrent')
  const name = text(info, 'info.name')
  if (name === '' || name === '.' || name === '..' || /[/\\\0]/.test(name))
    wrong('info.name', 'need a plain file name')
  const length = count(info, 'info.length')
  const pieceLength = count(info, 'info.piece length')
  if (pieceLength < 1) wrong('info.piece length', 'need at least 1')
  const pieces = info.get('pieces')
  if (!(pieces instanceof Uint8Array)) return wrong('info.pieces', 'need a byte string')
  if (pieces.length !== 20 * Math.ceil(length / pieceLength)) {
    wrong(
      'info.pieces',
      `got ${pieces.length} bytes, need 20 for each of ${Math.ceil(length / pieceLength)} pieces`,
    )
  }
  return {
    infoHash: infoHashOf(bytes.subarray(...span)),
    name,
    length,
    pieceLength,
    pieces,
    private: info.get('private') === 1,
    announce: members.has('announce') ? text(members, 'announce') : undefined,
    urlList: urlList(members),
  }
}

export function pieceCount({ pieces }: Pick<Metainfo, 'pieces'>): number {
  return pieces.length / 20
}

/** Bytes in one piece; the last may be short. */
export function pieceSize(
  { length, pieceLength }: Pick<Metainfo, 'length' | 'pieceLength'>,
  index: number,
): number {
  return Math.min(pieceLength, length - index * pieceLength)
}

/** The SHA-1 of each piece, in hex. */
export function pieceHashes(metainfo: Metainfo): string[] {
  const hashes = Buffer.from(metainfo.pieces)
  return Array.from({ length: pieceCount(metainfo) }, (_, piece) =>
    hashes.toString('hex', 20 * piece, 20 * piece + 20),
  )
}

/** A dictionary's members without its brackets. */
function member(dictionary: { [key: string]: Bencodable | undefined }): Buffer {
  return encode(dictionary).subarray(1, -1)
}

function urlList(members: BencodedDictionary): string[] {
  const value = members.get('url-list')
  if (value === undefined) return []
  const list = Array.isArray(value) ? value : [value]
  return list.map((item) => (item instanceof Uint8Array ? utf8(item) : wrong('url-list', 'need text')))
}

function text(members: BencodedDictionary, path: string): string {
  const value = members.get(path.slice(path.lastIndexOf('.') + 1))
  return value instanceof Uint8Array ? utf8(value) : wrong(path, 'need text')
}

function count(members: BencodedDictionary, path: string): number {
  const value = members.get(path.slice(path.lastIndexOf('.') + 1))
  return typeof value === 'number' && value >= 0 ? value : wrong(path, 'need a count')
}

function utf8(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('utf8')
}

function wrong(member: string, what: string): never {
  throw new ClientError('bad_metainfo', `Cannot read torrent: ${member}: ${what}`)
}
