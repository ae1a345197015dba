import { ClientError } from '../../../lib/protocol/errors.ts'
import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import type { PreHook } from '../hooks.ts'

/** Refuses torrents that the registry has revoked, where no token is asked for that would be refused already. */
export function refuseRevokedTorrents(isRevoked: (infoHash: InfoHash) => boolean): PreHook {
  const check = (infoHash: InfoHash) => {
    if (isRevoked(infoHash)) throw revoked
  }
  return {
    name: 'revoked torrents',
    announce: ({ announce }) => {
      check(announce.infoHash)
    },
    scrape: ({ scrape }) => {
      for (const infoHash of scrape.infoHashes) check(infoHash)
    },
  }
}

/** One for all, as that of torrent approval, whose words it has. */
const revoked = new ClientError('unapproved_torrent', 'unapproved torrent')
