import { isIP } from 'node:net'
import { Netmask } from 'netmask'
import type { Family, Ip } from './address.ts'
import { parseIp } from './address.ts'
import { ClientError } from './errors.ts'

/** A network: the first `length` bits of `bytes`. */
export interface Cidr {
  readonly family: Family
  /** The network address, 4 or 16 bytes, host bits zero. */
  readonly bytes: Uint8Array
  readonly length: number
}

/**
 * Reads `10.0.0.0/8`, `fd00::/8`, or a lone address as its own network.
 *
 * @throws ClientError `bad_cidr`, naming what is wrong; host bits that are set are a slip, not repaired
 */
export function parseCidr(text: string): Cidr {
  const [address = '', length, ...rest] = text.split('/')
  // netmask reads 010.0.0.1 as 8.0.0.1 and 10.1 as 10.0.0.1; isIP lets neither reach it.
  if (isIP(address) === 0 || rest.length > 0)
    wrong(text, 'need an address and a prefix length such as 10.0.0.0/8')
  const bits = isIP(address) === 4 ? 32 : 128
  if (length !== undefined && (!/^\d{1,3}$/.test(length) || Number(length) > bits)) {
    wrong(text, `need a prefix length from 0 to ${bits}`)
  }
  const block = new Netmask(address, length ?? String(bits))
  const network = parseIp(block.base)
  const given = parseIp(address)
  if (!network || !given) return wrong(text, 'need an address and a prefix length')
  if (network.family !== (bits === 32 ? 4 : 6)) wrong(text, 'write an IPv4-mapped network as IPv4')
  if (Buffer.compare(network.bytes, given.bytes) !== 0)
    wrong(text, `host bits are set; did you mean ${block.base}/${block.bitmask}?`)
  // For IPv6 netmask gives the length back as the text it got, whatever its types say.
  return { family: network.family, bytes: network.bytes, length: Number.parseInt(String(block.bitmask), 10) }
}

/** The same for tables of many, a tenth of the time: undefined for whatever `parseCidr` does not take. */
export function readCidr(text: string): Cidr | undefined {
  const slash = text.indexOf('/')
  const ip = parseIp(slash === -1 ? text : text.slice(0, slash))
  // What is written as IPv6 and held as IPv4 is no network.
  if (!ip || (ip.family === 4 && text.includes(':'))) return undefined
  const { family, bytes } = ip
  const bits = 8 * bytes.length
  const length = slash === -1 ? bits : readLength(text, slash + 1)
  if (length > bits) return undefined
  for (let i = length >> 3; i < bytes.length; i++)
    if (((bytes[i] ?? 0) & (i === length >> 3 ? 0xff >> (length & 7) : 0xff)) !== 0) return undefined
  return { family, bytes, length }
}

/** One to three digits; Infinity for anything else. */
function readLength(text: string, from: number): number {
  const digits = text.length - from
  if (digits < 1 || digits > 3) return Number.POSITIVE_INFINITY
  let length = 0
  for (let i = from; i < text.length; i++) {
    const digit = text.charCodeAt(i) - 0x30
    if (digit < 0 || digit > 9) return Number.POSITIVE_INFINITY
    length = 10 * length + digit
  }
  return length
}

export function cidrContains({ family, bytes, length }: Cidr, ip: Ip): boolean {
  if (family !== ip.family) return false
  const whole = length >> 3
  for (let i = 0; i < whole; i++) if (bytes[i] !== ip.bytes[i]) return false
  const rest = length & 7
  return rest === 0 || ((bytes[whole] ?? 0) ^ (ip.bytes[whole] ?? 0)) >> (8 - rest) === 0
}

function wrong(text: string, what: string): never {
  throw new ClientError('bad_cidr', `Cannot read network ${JSON.stringify(text.slice(0, 64))}: ${what}`)
}
