import type { BigIntStats, Stats } from 'node:fs'
import { chmod, link, open, readFile, readdir, rename, stat, statfs, unlink, utimes } from 'node:fs/promises'
import { join } from 'node:path'
import type { Digest } from '../lib/protocol/digest.ts'
import { digestFromHex, digestHex } from '../lib/protocol/digest.ts'
import type { Metainfo } from '../lib/protocol/metainfo.ts'
import { parseTorrent } from '../lib/protocol/metainfo.ts'
import {
  errorCode,
  ignoreMissing,
  isMissing,
  makeDirectory,
  syncDirectory,
  writeFileAtomic,
} from '../lib/runtime/files.ts'
import type { Logger } from '../lib/runtime/log.ts'
import { createTurn } from '../lib/runtime/turn.ts'

export interface CachedBlob {
  readonly digest: Digest
  readonly sizeBytes: number
  readonly lastUsedAt: number
}

/** The right by which this host has a blob. */
export interface StoredGrant {
  /** A repository it may be pulled through, to renew its grant. */
  readonly repository: string
  /** What other agents are shown; a secret. Undefined where the server gives none. */
  readonly peerToken: string | undefined
}

/** What is needed to seed a blob again without asking anyone. */
export interface StoredTorrent extends StoredGrant {
  readonly metainfo: Metainfo
}

/** There is no room now; there may be later. The message says what is missing. */
export class NoSpaceError extends Error {
  override readonly name = 'NoSpaceError'
}

/**
 * Verified blobs on disk, content-addressed. What stands in `blobs/` had the right SHA-256 when it was renamed there and
 * is trusted from then on; what is on its way stands in `partial/`. Sizes and times of use are those of the files, so there
 * is no journal that could disagree with them.
 */
export interface BlobCache {
  readonly quotaBytes: number
  /** Bytes of blobs, parts, and space promised to fetches. */
  readonly usedBytes: number
  list(): readonly CachedBlob[]
  /** Parts of blobs, of fetches under way and of those that were cut short. */
  listParts(): readonly CachedBlob[]
  /** A whole blob. One of another size than wanted is set aside to be fetched again. */
  find(digest: Digest, sizeBytes?: number): Promise<CachedBlob | undefined>
  file(digest: Digest): string
  partialFile(digest: Digest): string
  /**
   * Sets space aside for a blob, evicting what was used longest ago. Dispose it when the fetch ends either way.
   *
   * @throws NoSpaceError
   */
  reserve(digest: Digest, sizeBytes: number): Promise<AsyncDisposable>
  /** Makes a part whose SHA-256 was found right a blob, durably. */
  commit(digest: Digest): Promise<void>
  dropPartial(digest: Digest): Promise<void>
  /** Keeps a blob from eviction until disposed. */
  hold(digest: Digest): Disposable
  touch(digest: Digest): Promise<void>
  /** Hard-links a blob to another name. */
  linkTo(digest: Digest, file: string): Promise<void>
  putTorrent(digest: Digest, torrent: Uint8Array): Promise<void>
  putGrant(digest: Digest, grant: StoredGrant): Promise<void>
  getTorrent(digest: Digest): Promise<StoredTorrent | undefined>
}

export interface BlobCacheDeps {
  now: () => number
  log: Logger
  /** What a blob is kept for: `current` of what is followed or pinned must stay, `previous` goes when nothing else is left. */
  keptFor(digest: Digest): 'current' | 'previous' | undefined
  /** Called before a blob goes, to end its seeding and its exposure. */
  onEvict(digest: Digest): Promise<void>
}

const blobMode = 0o444
const partMode = 0o640
/** A time of use younger than this is not written again. */
const touchAgainMs = 60_000

export async function openBlobCache(
  options: { directory: string; quotaBytes: number; reserveBytes: number },
  deps: BlobCacheDeps,
): Promise<BlobCache> {
  const { directory, quotaBytes, reserveBytes } = options
  const folder = {
    blobs: join(directory, 'blobs', 'sha256'),
    partial: join(directory, 'partial'),
    torrents: join(directory, 'torrents'),
  }
  for (const path of Object.values(folder)) await makeDirectory(path, 0o750)
  const fileOf = (digest: Digest) => join(folder.blobs, digestHex(digest))
  const partialOf = (digest: Digest) => join(folder.partial, digestHex(digest))

  const blobs = new Map<Digest, { sizeBytes: number; lastUsedAt: number }>()
  const parts = new Map<Digest, { sizeBytes: number; lastUsedAt: number }>()
  for (const [path, found] of [
    [folder.blobs, blobs],
    [folder.partial, parts],
  ] as const) {
    for (const name of await readdir(path)) {
      if (!/^[0-9a-f]{64}$/.test(name)) continue
      const stats = await stat(join(path, name))
      // A crash may have come between the rename and the change of mode.
      const mode = path === folder.blobs ? blobMode : partMode
      if ((stats.mode & 0o777) !== mode) await chmod(join(path, name), mode)
      found.set(digestFromHex(name), {
        sizeBytes: path === folder.blobs ? stats.size : allocated(stats),
        lastUsedAt: stats.mtimeMs,
      })
    }
  }

  const reserved = new Map<Digest, number>()
  const holds = new Map<Digest, number>()

  const used = () =>
    sum([...blobs.values()].map(({ sizeBytes }) => sizeBytes)) +
    sum([...reserved.values()]) +
    sum([...parts].filter(([digest]) => !reserved.has(digest)).map(([, { sizeBytes }]) => sizeBytes))

  const hold = (digest: Digest): Disposable => {
    holds.set(digest, (holds.get(digest) ?? 0) + 1)
    let held = true
    return {
      [Symbol.dispose]: () => {
        if (!held) return
        held = false
        const left = (holds.get(digest) ?? 1) - 1
        if (left === 0) holds.delete(digest)
        else holds.set(digest, left)
      },
    }
  }

  /** The part or blob used longest ago that may go; what a release before the current one needs, only if nothing else may. */
  const nextVictim = () => {
    const stale = [...parts]
      .filter(([digest]) => !reserved.has(digest))
      .map(([digest, { lastUsedAt }]) => ({ digest, lastUsedAt, kind: 'part' as const }))
    const idle = (keptFor: 'previous' | undefined) =>
      [...blobs]
        .filter(([digest]) => !holds.has(digest) && deps.keptFor(digest) === keptFor)
        .map(([digest, { lastUsedAt }]) => ({ digest, lastUsedAt, kind: 'blob' as const }))
    const oldest = (list: readonly { digest: Digest; lastUsedAt: number; kind: 'part' | 'blob' }[]) =>
      list.toSorted((a, b) => a.lastUsedAt - b.lastUsedAt)[0]
    return oldest([...stale, ...idle(undefined)]) ?? oldest(idle('previous'))
  }

  const evict = async ({ digest, kind }: NonNullable<ReturnType<typeof nextVictim>>) => {
    if (kind === 'part') {
      parts.delete(digest)
      await removeAll([partialOf(digest), ...torrentFiles(digest)])
      return
    }
    const size = blobs.get(digest)?.sizeBytes
    blobs.delete(digest)
    await deps.onEvict(digest)
    await removeAll([fileOf(digest), ...torrentFiles(digest)])
    deps.log.info({ digest, sizeBytes: size }, 'blob evicted')
  }

  const torrentFiles = (digest: Digest) =>
    ['torrent', 'json'].map((suffix) => join(folder.torrents, `${digestHex(digest)}.${suffix}`))

  /** Space that fetches were promised and have not written yet. */
  const unwritten = async () => {
    let bytes = 0
    for (const [digest, size] of reserved) {
      const written = await stat(partialOf(digest)).then(allocated, () => 0)
      bytes += Math.max(0, size - written)
    }
    return bytes
  }

  const makeRoom = async (sizeBytes: number): Promise<void> => {
    if (sizeBytes > quotaBytes)
      throw new NoSpaceError(`the blob has ${sizeBytes} bytes, the disk quota is ${quotaBytes}`)
    for (;;) {
      const disk = await statfs(directory)
      // Counted with this blob's own reservation, which is in the map already.
      const free = disk.bavail * disk.bsize - (await unwritten())
      const overQuota = used() - quotaBytes
      if (overQuota <= 0 && free >= reserveBytes) return
      const victim = nextVictim()
      if (victim === undefined) {
        throw new NoSpaceError(
          overQuota > 0
            ? `the disk quota of ${quotaBytes} bytes is ${overQuota} short, and all that is kept is followed, pinned or in use`
            : `the disk would have ${Math.max(0, free)} bytes left, ${reserveBytes} are to stay free (disk.reserve)`,
        )
      }
      await evict(victim)
    }
  }
  // One at a time: two fetches must not both count on the same free bytes, nor set the same damaged blob aside.
  const inTurn = createTurn()

  /** A blob on disk as it should be; undefined for one that is gone or has another size. */
  const intact = async (digest: Digest, sizeBytes: number | undefined): Promise<CachedBlob | undefined> => {
    const known = blobs.get(digest)
    if (!known) return undefined
    const stats = await stat(fileOf(digest)).catch(ignoreMissing)
    return stats && (sizeBytes === undefined || stats.size === sizeBytes) ? { digest, ...known } : undefined
  }

  /** Ends the use of a blob that is not as it should be; what is left of it becomes a part, to be fetched again. */
  const setAside = async (digest: Digest, sizeBytes: number | undefined) => {
    if (!blobs.has(digest)) return
    const again = await intact(digest, sizeBytes)
    if (again) return
    blobs.delete(digest)
    await deps.onEvict(digest)
    const stats = await stat(fileOf(digest)).catch(ignoreMissing)
    deps.log.warn(
      { digest, sizeBytes: stats?.size, wantedBytes: sizeBytes },
      'a blob on disk is damaged or gone: fetching it again',
    )
    if (!stats) return
    await chmod(fileOf(digest), partMode)
    await rename(fileOf(digest), partialOf(digest))
    parts.set(digest, { sizeBytes: allocated(stats), lastUsedAt: deps.now() })
  }

  return {
    quotaBytes,
    get usedBytes() {
      return used()
    },
    list: () => [...blobs].map(([digest, blob]) => ({ digest, ...blob })),
    listParts: () =>
      [...new Set([...parts.keys(), ...reserved.keys()])].map((digest) => ({
        digest,
        sizeBytes: reserved.get(digest) ?? parts.get(digest)?.sizeBytes ?? 0,
        lastUsedAt: parts.get(digest)?.lastUsedAt ?? deps.now(),
      })),
    find: async (digest, sizeBytes) => {
      if (!blobs.has(digest)) return undefined
      const found = await intact(digest, sizeBytes)
      if (!found) await inTurn(() => setAside(digest, sizeBytes))
      return found
    },
    file: fileOf,
    partialFile: partialOf,
    reserve: async (digest, sizeBytes) => {
      await inTurn(async () => {
        reserved.set(digest, sizeBytes)
        try {
          await makeRoom(sizeBytes)
        } catch (error) {
          reserved.delete(digest)
          throw error
        }
      })
      return {
        [Symbol.asyncDispose]: async () => {
          const stats = await stat(partialOf(digest)).catch(ignoreMissing)
          reserved.delete(digest)
          // What was promised and not written is free again.
          if (stats) parts.set(digest, { sizeBytes: allocated(stats), lastUsedAt: deps.now() })
          else parts.delete(digest)
        },
      }
    },
    commit: async (digest) => {
      const part = partialOf(digest)
      const wanted = reserved.get(digest)
      let size: number
      {
        await using handle = await open(part, 'r+')
        await handle.datasync()
        size = (await handle.stat()).size
        if (wanted !== undefined && size !== wanted)
          throw new Error(`Cannot keep ${digest}: its file has ${size} bytes, not ${wanted}`)
        // Renamed first: a part that is read-only could not be gone on with after a crash.
        await rename(part, fileOf(digest))
        await handle.chmod(blobMode)
      }
      await syncDirectory(folder.blobs)
      parts.delete(digest)
      reserved.delete(digest)
      blobs.set(digest, { sizeBytes: size, lastUsedAt: deps.now() })
    },
    dropPartial: async (digest) => {
      parts.delete(digest)
      await unlink(partialOf(digest)).catch(ignoreMissing)
    },
    hold,
    touch: async (digest) => {
      const blob = blobs.get(digest)
      if (!blob || deps.now() - blob.lastUsedAt < touchAgainMs) return
      blob.lastUsedAt = deps.now()
      await utimes(fileOf(digest), deps.now() / 1000, deps.now() / 1000).catch(ignoreMissing)
    },
    linkTo: async (digest, file) => {
      await link(fileOf(digest), file)
    },
    putTorrent: async (digest, torrent) => {
      const [torrentFile = ''] = torrentFiles(digest)
      await writeFileAtomic(torrentFile, torrent)
    },
    putGrant: async (digest, { repository, peerToken }) => {
      const [, grantFile = ''] = torrentFiles(digest)
      await writeFileAtomic(grantFile, `${JSON.stringify({ repository, peerToken })}\n`, { mode: 0o600 })
    },
    getTorrent: async (digest) => {
      const [torrentFile = '', grantFile = ''] = torrentFiles(digest)
      try {
        const metainfo = parseTorrent(await readFile(torrentFile))
        const { repository, peerToken } = JSON.parse(await readFile(grantFile, 'utf8')) as {
          repository?: unknown
          peerToken?: unknown
        }
        if (typeof repository !== 'string') return undefined
        return { metainfo, repository, peerToken: typeof peerToken === 'string' ? peerToken : undefined }
      } catch (error) {
        if (!isMissing(error))
          deps.log.warn(
            { digest, error: errorCode(error) ?? String(error) },
            'a stored torrent cannot be read',
          )
        return undefined
      }
    },
  }
}

async function removeAll(files: readonly string[]): Promise<void> {
  for (const file of files) await unlink(file).catch(ignoreMissing)
}

/** Bytes on the disk; a part is sparse where nothing was written. */
function allocated(stats: Stats | BigIntStats): number {
  return Math.min(Number(stats.blocks) * 512, Number(stats.size))
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0)
}
