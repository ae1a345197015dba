import { infoHashAt } from '../../../lib/protocol/infohash.ts'
import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import type { RedisConnection } from '../../redis/connection.ts'
import type { StoppedPeer } from './stop-files.ts'

const infoHashBytes = 20
const channelOf = ({ keyPrefix }: RedisConnection) => `${keyPrefix}stops`

/** Tells the other servers that a peer has stopped: they would name it while Redis is away, as long as they think it lives. Nobody waits for it. */
export function tellStop(connection: RedisConnection, infoHash: InfoHash, endpoint: Uint8Array): void {
  const message = Buffer.concat([Buffer.from(infoHash, 'hex'), endpoint])
  connection.call('PUBLISH', channelOf(connection), message).catch(() => undefined)
}

/**
 * Hears of peers that stop at any server, until the signal aborts. What is told while the subscription is away is not heard: such a peer is
 * named for the rest of its life, if Redis is away too.
 */
export async function hearStops(
  connection: RedisConnection,
  heard: (peer: StoppedPeer) => void,
  signal: AbortSignal,
): Promise<void> {
  const read = (message: Buffer) => {
    const addressBytes = message.length - infoHashBytes - 2
    if (addressBytes !== 4 && addressBytes !== 16) return
    const bytes = Uint8Array.prototype.slice.call(message, infoHashBytes, infoHashBytes + addressBytes)
    heard({
      infoHash: infoHashAt(message, 0),
      source: { family: addressBytes === 4 ? 4 : 6, bytes },
      port: message.readUInt16BE(infoHashBytes + addressBytes),
    })
  }
  await connection.subscribe(channelOf(connection), read, signal)
}
