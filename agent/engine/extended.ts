import { decodeDictionary, encode } from '../../lib/protocol/bencode.ts'
import { blockBytes, ownBlockBytes, WireError } from './wire.ts'

/** The extension message that is the extended handshake itself (BEP 10). */
export const extendedHandshakeId = 0
/** The ids that we take our own extensions under. */
export const claimExtensionId = 1
export const unclaimExtensionId = 2
export const busyExtensionId = 3
/** Their names in the `m` dictionary. */
const claimExtension = 'rs_claim'
const unclaimExtension = 'rs_unclaim'
const busyExtension = 'rs_busy'

/** What a peer says of itself in the extended handshake (BEP 10); all of it is a stranger's word. */
export interface ExtendedHandshake {
  /** Requests it takes at once, `reqq`. */
  readonly requestsMax: number
  /** Where it listens, `p`. */
  readonly port: number | undefined
  /** The `rs` dictionary: only Rackswarm agents send one. */
  readonly own: OwnHandshake | undefined
  /** The id of claims that it takes; undefined where it takes none. */
  readonly claimId: number | undefined
  /** The id of claims taken back; undefined where they only end by themselves. */
  readonly unclaimId: number | undefined
  /** The id under which it takes what others are sending; undefined where it does not. */
  readonly busyId: number | undefined
  /** Name and version of the client, `v`. */
  readonly client: string | undefined
}

export interface OwnHandshake {
  readonly host: string | undefined
  readonly place: string | undefined
  /** Shows that it may have this torrent. */
  readonly token: string | undefined
  /** The longest block that it takes and sends. */
  readonly blockBytesMax: number
  /** How much it is sending, 0 to 1 of what it may; undefined where it does not say. */
  readonly load: number | undefined
  /** It has everything, also where it shows only a part of it. */
  readonly isSeed: boolean
}

export function writeExtendedHandshake(handshake: {
  readonly requestsMax: number
  readonly port: number
  readonly client: string
  /** Told to agents alone. */
  readonly own:
    | {
        readonly host: string
        readonly place: string | undefined
        readonly token: string | undefined
        readonly load: number
        readonly isSeed: boolean
      }
    | undefined
}): Buffer {
  const { requestsMax, port, client, own } = handshake
  return encode({
    m: own
      ? {
          [busyExtension]: busyExtensionId,
          [claimExtension]: claimExtensionId,
          [unclaimExtension]: unclaimExtensionId,
        }
      : {},
    p: port,
    reqq: requestsMax,
    rs: own && {
      block: ownBlockBytes,
      host: own.host,
      load: Math.round(100 * own.load),
      place: own.place,
      seed: own.isSeed ? 1 : undefined,
      token: own.token,
    },
    v: client,
  })
}

/** @throws WireError where it is no dictionary; members of a wrong type count as missing */
export function readExtendedHandshake(payload: Uint8Array): ExtendedHandshake {
  let members: Map<string, unknown>
  try {
    members = decodeDictionary(payload).members
  } catch {
    throw new WireError('an extended handshake that is no dictionary')
  }
  const m = members.get('m')
  const rs = members.get('rs')
  const idOf = (extension: string) => (m instanceof Map ? integer(m.get(extension), 1, 255) : undefined)
  return {
    requestsMax: integer(members.get('reqq'), 1, 100_000) ?? 250,
    port: integer(members.get('p'), 1, 65_535),
    client: text(members.get('v'), 64, /^[\x20-\x7e]*$/),
    claimId: idOf(claimExtension),
    unclaimId: idOf(unclaimExtension),
    busyId: idOf(busyExtension),
    own:
      rs instanceof Map
        ? {
            host: text(rs.get('host'), 128, /^[A-Za-z0-9][A-Za-z0-9._-]*$/),
            place: text(rs.get('place'), 64, /^[A-Za-z0-9][A-Za-z0-9._:/-]*$/),
            token: text(rs.get('token'), 4096, /^[\w.-]+$/),
            blockBytesMax: integer(rs.get('block'), blockBytes, ownBlockBytes) ?? blockBytes,
            load: percent(rs.get('load')),
            isSeed: rs.get('seed') === 1,
          }
        : undefined,
  }
}

/** Pieces that a host has begun to fetch from afar, so that its neighbours need not; or those that it does not fetch after all. */
export function writeClaim(pieces: readonly number[]): Buffer {
  const bytes = Buffer.allocUnsafe(4 * pieces.length)
  for (const [i, piece] of pieces.entries()) bytes.writeUInt32BE(piece, 4 * i)
  return bytes
}

/** @throws WireError for a ragged length or a piece that there is not */
export function readClaim(payload: Uint8Array, pieceCount: number): number[] {
  if (payload.length % 4 !== 0) throw new WireError(`a claim of ${payload.length} bytes`)
  const view = new DataView(payload.buffer, payload.byteOffset, payload.length)
  return Array.from({ length: payload.length / 4 }, (_, i) => {
    const piece = view.getUint32(4 * i)
    if (piece >= pieceCount) throw new WireError(`a claim of piece ${piece} of ${pieceCount}`)
    return piece
  })
}

/** No host sends so many pieces at once. */
const busyPiecesMax = 64

/** What a host that has no turn for a piece is sending to others. */
export interface Busy {
  /** It sends as many pieces as it sends at once: it has no turn for any. */
  readonly isFull: boolean
  readonly pieces: readonly number[]
}

export function writeBusy({ isFull, pieces }: Busy): Buffer {
  return Buffer.concat([Buffer.of(isFull ? 1 : 0), writeClaim(pieces)])
}

/** @throws WireError for a wrong length or a piece that there is not */
export function readBusy(payload: Uint8Array, pieceCount: number): Busy {
  if (payload.length === 0 || payload.length > 1 + 4 * busyPiecesMax)
    throw new WireError(`pieces that it is sending, in ${payload.length} bytes`)
  return { isFull: payload[0] === 1, pieces: readClaim(payload.subarray(1), pieceCount) }
}

function integer(value: unknown, min: number, max: number): number | undefined {
  return typeof value === 'number' && value >= min ? Math.min(value, max) : undefined
}

function percent(value: unknown): number | undefined {
  const number = integer(value, 0, 100)
  return number === undefined ? undefined : number / 100
}

function text(value: unknown, lengthMax: number, form: RegExp): string | undefined {
  if (!(value instanceof Uint8Array) || value.length > lengthMax) return undefined
  const characters = Buffer.from(value.buffer, value.byteOffset, value.length).toString('latin1')
  return form.test(characters) ? characters : undefined
}
