import type { LookupAddress } from 'node:dns'
import { lookup as resolve } from 'node:dns'
import type { LookupFunction } from 'node:net'
import { isIP } from 'node:net'
import type { Ip } from '../../../lib/protocol/address.ts'
import { isLoopback, isUnspecified, socketAddress } from '../../../lib/protocol/address.ts'
import { UpstreamError } from './upstream-error.ts'

/** What an address reaches: this machine, what is beside it (the metadata service of a cloud, for one), or anything else. */
export type Reach = 'loopback' | 'link-local' | 'elsewhere'

export function reachOf(ip: Ip): Reach {
  const { family, bytes } = ip
  // 0.0.0.0 and :: connect to this machine.
  if (isLoopback(ip) || isUnspecified(ip) || (family === 4 && bytes[0] === 0)) return 'loopback'
  if (family === 4) return bytes[0] === 169 && bytes[1] === 254 ? 'link-local' : 'elsewhere'
  return bytes[0] === 0xfe && ((bytes[1] ?? 0) & 0xc0) === 0x80 ? 'link-local' : 'elsewhere'
}

/**
 * Holds what an upstream says (a redirect, a token server) to places that this server may be sent to: https or the scheme of the
 * upstream, and never this machine or its link unless the upstream is there itself. Names are judged by the addresses that are
 * connected to, so that a name which resolves to another address a moment later gets nowhere.
 */
export interface AddressGuard {
  /** @throws UpstreamError `broken` */
  check(url: URL): void
  /** For the connections. */
  readonly lookup: LookupFunction
}

export function createAddressGuard(upstream: URL): AddressGuard {
  const ownHost = bareHost(upstream)
  let own: Reach | undefined = isIP(ownHost) === 0 ? undefined : reachOfText(ownHost)
  const mayReach = (reach: Reach | undefined) =>
    reach === 'elsewhere' || (reach !== undefined && reach === own)
  return {
    check: (url) => {
      if (url.protocol !== 'https:' && url.protocol !== upstream.protocol)
        throw forbidden(`it leads to ${url.protocol} at ${url.host}`)
      const host = bareHost(url)
      if (isIP(host) !== 0 && !mayReach(reachOfText(host))) throw forbidden(`it leads to ${host}`)
    },
    lookup: (hostname, options, callback) => {
      resolve(hostname, { ...options, all: true }, (error: Error | null, found: LookupAddress[]) => {
        const [first] = found
        if (error || !first) {
          callback(error ?? new Error(`there is no address of ${hostname}`), [])
          return
        }
        const reaches = found.map(({ address }) => reachOfText(address))
        if (hostname === ownHost) own = reaches.find((reach) => reach !== 'elsewhere') ?? 'elsewhere'
        else if (!reaches.every(mayReach)) {
          callback(forbidden(`it leads to ${hostname}, which is an address of this machine or its link`), [])
          return
        }
        if (options.all === true) callback(null, found)
        else callback(null, first.address, first.family)
      })
    },
  }
}

function reachOfText(address: string): Reach | undefined {
  const ip = socketAddress(address)
  return ip && reachOf(ip)
}

/** A URL writes IPv6 addresses in brackets; sockets do not. */
function bareHost({ hostname }: URL): string {
  return hostname.replace(/^\[(.*)\]$/, '$1')
}

function forbidden(what: string): UpstreamError {
  return new UpstreamError('broken', `${what}, where no upstream may send this server`)
}
