import type { Ip } from '../../lib/protocol/address.ts'
import { ipFromBytes, parseIp } from '../../lib/protocol/address.ts'

// https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt: version 1 is section 2.1, version 2 section 2.2.

/**
 * What the bytes at the start of a connection are so far. `source` is the client that the proxy names; undefined where the
 * connection is the proxy's own (LOCAL) or the proxy does not know (UNKNOWN, UNSPEC): then the socket's address counts.
 */
export type ProxyHeader =
  | { readonly kind: 'more' }
  | { readonly kind: 'broken'; readonly message: string }
  | { readonly kind: 'header'; readonly source: Ip | undefined; readonly length: number }

/** The longest header that is read: the 16 fixed bytes of version 2 and 4 KiB of addresses and TLVs. */
export const proxyHeaderBytesMax = 16 + 4096

/** "a 108-byte buffer is always enough to store all the line and a trailing zero". */
const lineBytesMax = 107
const lineStart = Buffer.from('PROXY ')
const signature = Buffer.from('\r\n\r\n\0\r\nQUIT\n', 'latin1')

/** Reads a PROXY protocol header, version 1 or 2. Bytes after it are not looked at. */
export function readProxyHeader(bytes: Buffer): ProxyHeader {
  if (startsLike(bytes, signature)) return bytes.length < 16 ? { kind: 'more' } : readBinary(bytes)
  if (startsLike(bytes, lineStart)) return readLine(bytes)
  return broken('the connection does not start with one')
}

/** The bytes start with all of `start`, or are the beginning of it. */
function startsLike(bytes: Buffer, start: Buffer): boolean {
  const length = Math.min(bytes.length, start.length)
  return bytes.compare(start, 0, length, 0, length) === 0
}

/** `PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n` */
function readLine(bytes: Buffer): ProxyHeader {
  const end = bytes.subarray(0, lineBytesMax).indexOf('\r\n')
  if (end === -1) {
    return bytes.length < lineBytesMax
      ? { kind: 'more' }
      : broken(`the line has no end in ${lineBytesMax} bytes`)
  }
  const [, protocol, ...words] = bytes.toString('latin1', 0, end).split(' ')
  const length = end + 2
  // Whatever follows UNKNOWN must be ignored.
  if (protocol === 'UNKNOWN') return { kind: 'header', source: undefined, length }
  if (protocol !== 'TCP4' && protocol !== 'TCP6') return broken('need TCP4, TCP6 or UNKNOWN')
  const [source = '', destination = '', ...ports] = words
  const isWritten = (text: string) =>
    text.includes(':') === (protocol === 'TCP6') && parseIp(text) !== undefined
  if (!isWritten(source) || !isWritten(destination)) return broken(`need two addresses after ${protocol}`)
  if (ports.length !== 2 || !ports.every(isPort)) return broken('need two ports after the addresses')
  return { kind: 'header', source: parseIp(source), length }
}

function isPort(text: string): boolean {
  return /^(0|[1-9]\d{0,4})$/.test(text) && Number(text) <= 0xffff
}

/** The signature, version and command, family and transport, length; then addresses, ports and TLVs of that length. */
function readBinary(bytes: Buffer): ProxyHeader {
  const [version, command] = [(bytes[12] ?? 0) >> 4, (bytes[12] ?? 0) & 0xf]
  const [family, transport] = [(bytes[13] ?? 0) >> 4, (bytes[13] ?? 0) & 0xf]
  const length = 16 + bytes.readUInt16BE(14)
  if (version !== 2) return broken(`version ${version}, need 2`)
  if (command > 1) return broken(`command ${command}, need 0 (LOCAL) or 1 (PROXY)`)
  if (family > 3 || transport > 2) return broken(`unspecified address family or transport`)
  if (length > proxyHeaderBytesMax) return broken(`${length} bytes, at most ${proxyHeaderBytesMax} are read`)
  if (bytes.length < length) return { kind: 'more' }
  const addressBytes = family === 1 ? 4 : 16
  // LOCAL, UNSPEC and Unix sockets name no address.
  if (command === 0 || transport === 0 || family === 0 || family === 3) {
    return { kind: 'header', source: undefined, length }
  }
  if (length < 16 + 2 * addressBytes + 4) return broken('too short for its addresses')
  // A copy: the address is kept as long as the connection, the chunk should not be.
  return {
    kind: 'header',
    source: ipFromBytes(Uint8Array.from(bytes.subarray(16, 16 + addressBytes))),
    length,
  }
}

function broken(why: string): ProxyHeader {
  return { kind: 'broken', message: `Cannot read PROXY protocol header: ${why}` }
}
