import type { ServerClient } from '../lib/client/server-client.ts'
import type { InfoHash } from '../lib/protocol/infohash.ts'
import { infoHashFromHex } from '../lib/protocol/infohash.ts'
import type { Logger } from '../lib/runtime/log.ts'

/** Torrents that the server has revoked, as this host knows it. */
export interface RevokedTorrents {
  has(infoHash: InfoHash): boolean
  /** The version of the list, from a report: the list is read when it is another one. */
  heard(version: string | undefined): void
  /** Reads the list now: something was refused for it. */
  look(): void
}

export interface RevokedTorrentsDeps {
  readonly server: Pick<ServerClient, 'revokedTorrents'>
  /** Told of what is revoked now and was not, and of whether something is no longer. */
  readonly changed: (revoked: readonly InfoHash[], someBack: boolean) => void
  readonly log: Logger
}

const timeoutMs = 15_000

export function createRevokedTorrents({ server, changed, log }: RevokedTorrentsDeps): RevokedTorrents {
  let known: ReadonlySet<InfoHash> = new Set()
  let version = 'none'
  let looking: Promise<void> | undefined

  const read = async (): Promise<void> => {
    const list = await server.revokedTorrents(AbortSignal.timeout(timeoutMs))
    const before = known
    known = new Set(list.torrents.map(({ infohash }) => infoHashFromHex(infohash)))
    version = list.version
    const fresh = [...known].filter((infoHash) => !before.has(infoHash))
    const someBack = [...before].some((infoHash) => !known.has(infoHash))
    if (fresh.length === 0 && !someBack) return
    log.info({ revoked: known.size, fresh: fresh.length }, 'the list of revoked torrents has changed')
    changed(fresh, someBack)
  }
  const look = () => {
    looking ??= read()
      .catch((error: unknown) => {
        // The next report names the version again.
        log.warn({ reason: (error as Error).message }, 'the list of revoked torrents was not read')
      })
      .finally(() => (looking = undefined))
  }
  return {
    has: (infoHash) => known.has(infoHash),
    heard: (said) => {
      if (said !== undefined && said !== version) look()
    },
    look,
  }
}
