import { createHash } from 'node:crypto'
import { ClientError } from './errors.ts'

declare const brand: unique symbol

/** A torrent's 20-byte identity (BEP 3; BEP 52 truncates to it). Only this file knows that it is held as lower-case hex. */
export type InfoHash = string & { readonly [brand]: 'InfoHash' }

/** @throws ClientError `bad_infohash` unless `bytes` holds exactly 20 bytes */
export function infoHashFromBytes(bytes: Uint8Array): InfoHash {
  if (bytes.length !== 20) {
    throw new ClientError('bad_infohash', `Cannot read infohash: got ${bytes.length} bytes, need 20`)
  }
  return Buffer.from(bytes.buffer, bytes.byteOffset, 20).toString('hex') as InfoHash
}

/** Reads 40 hex digits of either case. @throws ClientError `bad_infohash` for anything else */
export function infoHashFromHex(hex: string): InfoHash {
  if (!/^[0-9a-fA-F]{40}$/.test(hex)) {
    throw new ClientError(
      'bad_infohash',
      `Cannot read infohash ${JSON.stringify(hex.slice(0, 64))}: need 40 hex digits`,
    )
  }
  return hex.toLowerCase() as InfoHash
}

/** The 20 bytes at `at`, which must be there: what `infoHashFromBytes` makes of a view of them, at half the cost. */
export function infoHashAt(bytes: Buffer, at: number): InfoHash {
  return bytes.toString('hex', at, at + 20) as InfoHash
}

/** Whether the 20 bytes at `at` are this infohash, without making a text of them. */
export function isInfoHashAt(infoHash: InfoHash, bytes: Uint8Array, at: number): boolean {
  for (let i = 0; i < 20; i++) {
    const byte = (hexDigit(infoHash.charCodeAt(2 * i)) << 4) | hexDigit(infoHash.charCodeAt(2 * i + 1))
    if (byte !== bytes[at + i]) return false
  }
  return true
}

/** Of a digit in lower case. */
function hexDigit(code: number): number {
  return code < 0x3a ? code - 0x30 : code - 0x57
}

/** The SHA-1 of a bencoded `info` dictionary, as its bytes stand in the torrent. */
export function infoHashOf(info: Uint8Array): InfoHash {
  return createHash('sha1').update(info).digest('hex') as InfoHash
}

/** 40 lower-case hex digits. */
export function infoHashToHex(infoHash: InfoHash): string {
  return infoHash
}

/** The 20 raw bytes. */
export function infoHashToBytes(infoHash: InfoHash): Uint8Array {
  return Buffer.from(infoHash, 'hex')
}
