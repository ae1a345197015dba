import type { Ip } from '../../lib/protocol/address.ts'
import { formatIp, parseIp } from '../../lib/protocol/address.ts'
import type { Cidr } from '../../lib/protocol/cidr.ts'
import { cidrContains } from '../../lib/protocol/cidr.ts'
import { ClientError } from '../../lib/protocol/errors.ts'

/** The header in which proxies say who their client is, as `real_ip_header` names it. */
export type ForwardedHeader = 'x-forwarded-for' | 'x-real-ip'

export function isTrusted(ip: Ip, trusted: readonly Cidr[]): boolean {
  return trusted.some((cidr) => cidrContains(cidr, ip))
}

/**
 * The client behind trusted proxies. X-Forwarded-For: the right-most hop that is not a trusted proxy, since everything left of
 * it was written by someone else. X-Real-IP: the one address it holds. The header of anyone else says nothing.
 *
 * @param forwarded the header's values, joined with commas; undefined where it is missing
 * @throws ClientError `bad_forwarded_for` or `bad_real_ip` when a trusted proxy wrote something else than addresses
 */
export function clientAddress(
  peer: Ip,
  forwarded: string | undefined,
  header: ForwardedHeader,
  trusted: readonly Cidr[],
): Ip {
  if (forwarded === undefined || !isTrusted(peer, trusted)) return peer
  return header === 'x-real-ip' ? realIp(peer, forwarded) : lastUntrustedHop(peer, forwarded, trusted)
}

function realIp(peer: Ip, forwarded: string): Ip {
  const text = forwarded.trim()
  if (text === '') return peer
  const ip = parseIp(text)
  if (!ip)
    throw new ClientError('bad_real_ip', `Cannot read X-Real-IP from ${formatIp(peer)}: need one address`)
  return ip
}

function lastUntrustedHop(peer: Ip, forwarded: string, trusted: readonly Cidr[]): Ip {
  const hops = forwarded.split(',')
  let current = peer
  while (isTrusted(current, trusted)) {
    const text = hops.pop()?.trim()
    if (text === undefined || text === '') return current
    const hop = parseIp(text)
    if (!hop)
      throw new ClientError(
        'bad_forwarded_for',
        `Cannot read X-Forwarded-For after ${formatIp(current)}: need addresses`,
      )
    current = hop
  }
  return current
}
