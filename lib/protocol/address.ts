import { ClientError } from './errors.ts'

export type Family = 4 | 6

/** An IP address as raw bytes, 4 or 16. An IPv4-mapped IPv6 address is always held as IPv4. */
export interface Ip {
  readonly family: Family
  readonly bytes: Uint8Array
}

/** Where a peer listens. `compact` is its BEP 23 (6 bytes) or BEP 7 (18 bytes) form and its identity in a swarm. */
export interface Endpoint {
  readonly family: Family
  readonly compact: Uint8Array
}

/** Reads a textual address, strictly: four decimal octets without leading zeros, or RFC 4291. Undefined if it is neither. */
export function parseIp(text: string): Ip | undefined {
  if (!text.includes(':')) {
    const bytes = parseIpv4(text)
    return bytes && { family: 4, bytes }
  }
  const bytes = parseIpv6(text)
  return bytes && ipFromBytes(bytes)
}

/** Wraps 4 or 16 raw bytes; an IPv4-mapped address becomes IPv4. */
export function ipFromBytes(bytes: Uint8Array): Ip {
  if (bytes.length === 4) return { family: 4, bytes }
  if (bytes.length !== 16)
    throw new ClientError('bad_address', `Cannot read address: got ${bytes.length} bytes, need 4 or 16`)
  const mapped = bytes[10] === 0xff && bytes[11] === 0xff && bytes.subarray(0, 10).every((byte) => byte === 0)
  return mapped ? { family: 4, bytes: bytes.subarray(12) } : { family: 6, bytes }
}

/** Canonical text: dotted quad, or RFC 5952. */
export function formatIp(ip: Ip): string {
  return scratch.toString('latin1', 0, writeIp(ip, scratch, 0))
}

/** Bytes of the longest canonical text. */
export const ipTextMax = 39
const scratch = Buffer.alloc(ipTextMax)

/** Writes the canonical text as ASCII, for those who need no string of it. @returns where it ends */
export function writeIp({ family, bytes }: Ip, target: Uint8Array, at: number): number {
  if (family === 6) return writeIpv6(bytes, target, at)
  for (let i = 0; i < 4; i++) {
    if (i > 0) target[at++] = dot
    at = writeNumber(bytes[i] ?? 0, 10, target, at)
  }
  return at
}

export function isUnspecified(ip: Ip): boolean {
  return ip.bytes.every((byte) => byte === 0)
}

/** `::1` or 127.0.0.0/8. */
export function isLoopback({ family, bytes }: Ip): boolean {
  if (family === 4) return bytes[0] === 127
  return bytes[15] === 1 && bytes.subarray(0, 15).every((byte) => byte === 0)
}

/** @throws ClientError `bad_port` unless 1 ≤ port ≤ 65535 */
export function endpoint(ip: Ip, port: number): Endpoint {
  if (!Number.isInteger(port) || port < 1 || port > 0xffff) throw new ClientError('bad_port', 'invalid port')
  const compact = new Uint8Array(ip.bytes.length + 2)
  compact.set(ip.bytes)
  compact[ip.bytes.length] = port >> 8
  compact[ip.bytes.length + 1] = port & 0xff
  return { family: ip.family, compact }
}

export function endpointIp({ family, compact }: Endpoint): Ip {
  return { family, bytes: compact.subarray(0, compact.length - 2) }
}

export function endpointPort({ compact }: Endpoint): number {
  return ((compact[compact.length - 2] ?? 0) << 8) | (compact[compact.length - 1] ?? 0)
}

/** A socket's `remoteAddress` without its zone; undefined once the socket is closed. */
export function socketAddress(remoteAddress: string | undefined): Ip | undefined {
  if (remoteAddress === undefined) return undefined
  if (!remoteAddress.includes(':')) return parseIp(remoteAddress)
  // What a dual-stack listener says of IPv4; parseIp reads it too, more slowly.
  const mapped = remoteAddress.startsWith('::ffff:') && remoteAddress.includes('.')
  return parseIp(mapped ? remoteAddress.slice(7) : remoteAddress.replace(/%.*$/, ''))
}

/** `10.0.0.1:6881` or `[fd00::1]:6881`. */
export function formatAddress(ip: Ip, port: number): string {
  return ip.family === 6 ? `[${formatIp(ip)}]:${port}` : `${formatIp(ip)}:${port}`
}

export function formatEndpoint(peer: Endpoint): string {
  return formatAddress(endpointIp(peer), endpointPort(peer))
}

/** Splits a BEP 23 `peers` or BEP 7 `peers6` string. @throws ClientError `bad_peers` for a ragged length */
export function parseCompactPeers(bytes: Uint8Array, family: Family): Endpoint[] {
  const size = family === 4 ? 6 : 18
  if (bytes.length % size !== 0) {
    throw new ClientError(
      'bad_peers',
      `Cannot read peers: ${bytes.length} bytes is not a multiple of ${size}`,
    )
  }
  return Array.from({ length: bytes.length / size }, (_, i) => ({
    family,
    compact: bytes.slice(i * size, (i + 1) * size),
  }))
}

function parseIpv4(text: string): Uint8Array | undefined {
  const bytes = new Uint8Array(4)
  let octet = 0
  let digits = 0
  let value = 0
  for (let i = 0; i <= text.length; i++) {
    const code = i === text.length ? 0x2e : text.charCodeAt(i)
    if (code === 0x2e) {
      if (digits === 0 || octet === 4) return undefined
      bytes[octet++] = value
      digits = value = 0
    } else if (code >= 0x30 && code <= 0x39 && (digits === 0 || value > 0)) {
      value = value * 10 + code - 0x30
      digits++
      if (value > 255) return undefined
    } else {
      return undefined
    }
  }
  return octet === 4 ? bytes : undefined
}

function parseIpv6(text: string): Uint8Array | undefined {
  const halves = text.split('::')
  if (halves.length > 2) return undefined
  const [head, tail] = [readGroups(halves[0] ?? ''), readGroups(halves[1] ?? '')]
  if (!head || !tail) return undefined
  // An embedded dotted quad may only close the address.
  if (halves.length === 2 && (halves[0] ?? '').includes('.')) return undefined
  const missing = 16 - head.length - tail.length
  if (halves.length === 1 ? missing !== 0 : missing < 2) return undefined
  return Uint8Array.from([...head, ...new Array<number>(missing).fill(0), ...tail])
}

/** The bytes of colon-separated groups, the last of which may be a dotted quad. */
function readGroups(text: string): number[] | undefined {
  if (text === '') return []
  const groups = text.split(':')
  const bytes: number[] = []
  for (const [i, group] of groups.entries()) {
    if (i === groups.length - 1 && group.includes('.')) {
      const quad = parseIpv4(group)
      if (!quad) return undefined
      bytes.push(...quad)
    } else if (/^[0-9a-fA-F]{1,4}$/.test(group)) {
      const value = Number.parseInt(group, 16)
      bytes.push(value >> 8, value & 0xff)
    } else {
      return undefined
    }
  }
  return bytes.length <= 16 ? bytes : undefined
}

function writeIpv6(bytes: Uint8Array, target: Uint8Array, at: number): number {
  const group = (i: number) => ((bytes[2 * i] ?? 0) << 8) | (bytes[2 * i + 1] ?? 0)
  // The first of the longest runs of zeros; one alone is written out.
  let start = 8
  let longest = 1
  for (let i = 0; i < 8; i++) {
    let length = 0
    while (i + length < 8 && group(i + length) === 0) length++
    if (length > longest) [start, longest] = [i, length]
    i += length
  }
  for (let i = 0; i < 8; i++) {
    if (i > 0 || i === start) target[at++] = colon
    if (i === start) {
      i += longest - 1
      if (i === 7) target[at++] = colon
    } else at = writeNumber(group(i), 16, target, at)
  }
  return at
}

const dot = 0x2e
const colon = 0x3a

function writeNumber(value: number, base: 10 | 16, target: Uint8Array, at: number): number {
  let unit = 1
  while (unit * base <= value) unit *= base
  for (; unit >= 1; unit = Math.floor(unit / base)) {
    const digit = Math.floor(value / unit) % base
    target[at++] = digit < 10 ? 0x30 + digit : 0x57 + digit
  }
  return at
}
