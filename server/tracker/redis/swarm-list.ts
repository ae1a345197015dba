import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import { infoHashFromBytes, infoHashToBytes } from '../../../lib/protocol/infohash.ts'
import type { RedisConnection } from '../../redis/connection.ts'
import { readScript } from '../../redis/script-file.ts'

/** The list of all swarms is in so many parts, by the first byte of the infohash. */
export const partCount = 256
/** How long the list is kept after a server has written to it; longer than any swarm of it. */
const listTtlSeconds = 7 * 86_400

const unlistScript = readScript(new URL('./scripts/unlist.lua', import.meta.url))

export interface ListedSwarm {
  readonly infoHash: InfoHash
  /** Millisecond at which it is surely over, as it stands in the list: changes whenever the swarm is listed again. */
  readonly overMs: string
}

/** All swarms by name, since a Redis with other users is not to be searched for them: sorted sets, with the millisecond at which each swarm is surely over. */
export interface SwarmList {
  /** Adds a swarm, or says that it is over later. */
  add(infoHash: InfoHash, overMs: number): Promise<void>
  /** Takes one out that is no more, unless it was listed again meanwhile. */
  remove(swarm: ListedSwarm): Promise<void>
  /** Those of one part. */
  part(index: number): Promise<readonly ListedSwarm[]>
}

export function openSwarmList(connection: RedisConnection): SwarmList {
  const keyOf = (index: number) => `${connection.keyPrefix}swarms:${index.toString(16).padStart(2, '0')}`
  const keyOfSwarm = (infoHash: InfoHash) => keyOf(infoHashToBytes(infoHash)[0] ?? 0)
  return {
    add: async (infoHash, overMs) => {
      const key = keyOfSwarm(infoHash)
      await Promise.all([
        connection.call('ZADD', key, overMs, Buffer.from(infoHashToBytes(infoHash))),
        connection.call('EXPIRE', key, listTtlSeconds),
      ])
    },
    remove: async ({ infoHash, overMs }) => {
      await connection.run(
        unlistScript,
        [keyOfSwarm(infoHash)],
        [Buffer.from(infoHashToBytes(infoHash)), overMs],
      )
    },
    part: async (index) => {
      // In lower case: so the client gives members and scores in one row, whatever protocol it speaks.
      const row = (await connection.call('zrange', keyOf(index), 0, -1, 'WITHSCORES')) as (Buffer | number)[]
      const swarms: ListedSwarm[] = []
      for (let i = 0; i + 1 < row.length; i += 2) {
        const member = row[i]
        if (member instanceof Buffer)
          swarms.push({ infoHash: infoHashFromBytes(member), overMs: String(row[i + 1]) })
      }
      return swarms
    },
  }
}
