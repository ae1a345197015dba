import { endpoint, parseIp } from '../../lib/protocol/address.ts'
import type { ReplyPeer } from '../../lib/protocol/announce.ts'

/** A peer of an announce reply on the loopback address. */
export function compactOf({ port, distance }: { port: number; distance: number }): ReplyPeer {
  const ip = parseIp('127.0.0.1')
  if (!ip) throw new Error('unreachable')
  return { endpoint: endpoint(ip, port), peerId: Buffer.alloc(20), distance }
}
