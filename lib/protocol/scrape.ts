import { encode } from './bencode.ts'
import { ClientError } from './errors.ts'
import type { InfoHash } from './infohash.ts'
import { infoHashFromBytes, infoHashToBytes } from './infohash.ts'
import { parseQuery } from './query.ts'

/** BEP 48. */
export interface Scrape {
  readonly infoHashes: readonly InfoHash[]
  readonly jwt: string | undefined
}

export interface SwarmCounts {
  /** Seeders. */
  readonly complete: number
  /** Leechers. */
  readonly incomplete: number
  /** Completed downloads since the swarm was first seen. */
  readonly downloaded: number
}

/** Reads the query of `/scrape`; without an infohash it asks for all swarms. @throws ClientError whose message is the reply's `failure reason` */
export function parseScrape(rawQuery: string): Scrape {
  const query = parseQuery(rawQuery)
  for (const value of query.infoHashes) {
    if (value.length !== 20) throw new ClientError('bad_infohash', 'provided invalid infohash')
  }
  return {
    infoHashes: query.infoHashes.map((value) => infoHashFromBytes(Buffer.from(value, 'latin1'))),
    jwt: query.values.get('jwt'),
  }
}

export function writeScrapeReply(files: ReadonlyMap<InfoHash, SwarmCounts>): Buffer {
  const members = new Map(
    [...files].map(([infoHash, counts]) => [
      Buffer.from(infoHashToBytes(infoHash)).toString('latin1'),
      { complete: counts.complete, downloaded: counts.downloaded, incomplete: counts.incomplete },
    ]),
  )
  return encode({ files: members })
}
