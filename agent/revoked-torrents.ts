import { readFile } from 'node:fs/promises'
import { z } from 'zod'
import type { ServerClient } from '../lib/client/server-client.ts'
import type { InfoHash } from '../lib/protocol/infohash.ts'
import { infoHashFromHex, infoHashToHex } from '../lib/protocol/infohash.ts'
import { isMissing, writeFileAtomic } from '../lib/runtime/files.ts'
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

/** The file: what the server said last, so that a host which starts while the server is away shares nothing of it. */
const Saved = z.object({ version: z.string(), infohashes: z.array(z.string().regex(/^[0-9a-f]{40}$/)) })

/** @throws Error naming a file that cannot be read */
export async function openRevokedTorrents(
  file: string,
  { server, changed, log }: RevokedTorrentsDeps,
): Promise<RevokedTorrents> {
  const saved = await read(file)
  let known: ReadonlySet<InfoHash> = new Set(saved.infohashes.map(infoHashFromHex))
  let { version } = saved
  let looking: Promise<void> | undefined

  const ask = async (): Promise<void> => {
    const list = await server.revokedTorrents(AbortSignal.timeout(timeoutMs))
    const before = known
    known = new Set(list.torrents.map(({ infohash }) => infoHashFromHex(infohash)))
    const fresh = [...known].filter((infoHash) => !before.has(infoHash))
    const someBack = [...before].some((infoHash) => !known.has(infoHash))
    if (fresh.length > 0 || someBack) {
      log.info({ revoked: known.size, fresh: fresh.length }, 'the list of revoked torrents has changed')
      changed(fresh, someBack)
    }
    // Written last, and only then known: what could not be written is asked for again.
    const infohashes = [...known].map(infoHashToHex)
    await writeFileAtomic(file, `${JSON.stringify({ version: list.version, infohashes })}\n`, { mode: 0o600 })
    version = list.version
  }
  const look = () => {
    looking ??= ask()
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

async function read(file: string): Promise<z.output<typeof Saved>> {
  try {
    return Saved.parse(JSON.parse(await readFile(file, 'utf8')))
  } catch (error) {
    if (isMissing(error)) return { version: 'none', infohashes: [] }
    throw new Error(
      `Cannot read revoked torrents from ${file}: ${(error as Error).message}; without the file the list comes from the server`,
      { cause: error },
    )
  }
}
