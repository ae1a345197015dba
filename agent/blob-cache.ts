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

export interface CachedBlob {
  readonly digest: Digest
  readonly sizeBytes: number
  readonly lastUsedAt: number
}

/** What is needed to seed a blob again without asking anyone. */
export interface StoredTorrent {
  readonly metainfo: Metainfo
  /** A repository it may be pulled through, to renew its grant. */
  readonly repository: string
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
  reserve(digest: Digest, sizeBytes: number): Promise<Disposable>
  /** Makes a part whose SHA-256 was found right a blob, durably. */
  commit(digest: Digest): Promise<void>
  dropPartial(digest: Digest): Promise<void>
  /** Keeps a blob from eviction until disposed. */
  hold(digest: Digest): Disposable
  touch(digest: Digest): Promise<void>
  /** Hard-links a blob to another name. */
  linkTo(digest: Digest, file: string): Promise<void>
  putTorrent(digest: Digest, torrent: Uint8Array, repository: string): Promise<void>
  getTorrent(digest: Digest): Promise<StoredTorrent | undefined>
}

export interface BlobCacheDeps {
  now: () => number
  log: Logger
  /** Blobs that must stay: followed, pinned. */
  isProtected(digest: Digest): boolean
  /** Called before a blob goes, to end its seeding and its exposure. */
  onEvict(digest: Digest): Promise<void>
}

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

  /** The part or blob used longest ago that may go. */
  const nextVictim = () => {
    const stale = [...parts]
      .filter(([digest]) => !reserved.has(digest))
      .map(([digest, { lastUsedAt }]) => ({ digest, lastUsedAt, kind: 'part' as const }))
    const idle = [...blobs]
      .filter(([digest]) => !holds.has(digest) && !deps.isProtected(digest))
      .map(([digest, { lastUsedAt }]) => ({ digest, lastUsedAt, kind: 'blob' as const }))
    return [...stale, ...idle].toSorted((a, b) => a.lastUsedAt - b.lastUsedAt)[0]
  }

  const evict = async ({ digest, kind }: NonNullable<ReturnType<typeof nextVictim>>) => {
    if (kind === 'part') {
      parts.delete(digest)
      await unlink(partialOf(digest)).catch(ignoreMissing)
      return
    }
    const size = blobs.get(digest)?.sizeBytes
    blobs.delete(digest)
    await deps.onEvict(digest)
    for (const file of [fileOf(digest), ...torrentFiles(digest)]) await unlink(file).catch(ignoreMissing)
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
  // One at a time: two fetches must not both count on the same free bytes.
  let turn: Promise<unknown> = Promise.resolve()

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
      const known = blobs.get(digest)
      if (!known) return undefined
      const stats = await stat(fileOf(digest)).catch(ignoreMissing)
      if (stats && (sizeBytes === undefined || stats.size === sizeBytes)) return { digest, ...known }
      blobs.delete(digest)
      if (stats) {
        deps.log.warn(
          { digest, sizeBytes: stats.size, wantedBytes: sizeBytes },
          'a blob on disk has the wrong size: fetching it again',
        )
        await deps.onEvict(digest)
        await chmod(fileOf(digest), 0o640)
        await rename(fileOf(digest), partialOf(digest))
        parts.set(digest, { sizeBytes: allocated(stats), lastUsedAt: deps.now() })
      }
      return undefined
    },
    file: fileOf,
    partialFile: partialOf,
    reserve: async (digest, sizeBytes) => {
      const mine = turn.then(async () => {
        reserved.set(digest, sizeBytes)
        try {
          await makeRoom(sizeBytes)
        } catch (error) {
          reserved.delete(digest)
          throw error
        }
      })
      turn = mine.catch(() => undefined)
      await mine
      return {
        [Symbol.dispose]: () => {
          reserved.delete(digest)
          if (!blobs.has(digest)) parts.set(digest, { sizeBytes, lastUsedAt: deps.now() })
        },
      }
    },
    commit: async (digest) => {
      const part = partialOf(digest)
      let size: number
      {
        await using handle = await open(part, 'r+')
        await handle.datasync()
        await handle.chmod(0o444)
        size = (await handle.stat()).size
      }
      await rename(part, fileOf(digest))
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
    putTorrent: async (digest, torrent, repository) => {
      const [torrentFile = '', repositoryFile = ''] = torrentFiles(digest)
      await writeFileAtomic(repositoryFile, `${JSON.stringify({ repository })}\n`)
      await writeFileAtomic(torrentFile, torrent)
    },
    getTorrent: async (digest) => {
      const [torrentFile = '', repositoryFile = ''] = torrentFiles(digest)
      try {
        const metainfo = parseTorrent(await readFile(torrentFile))
        const { repository } = JSON.parse(await readFile(repositoryFile, 'utf8')) as { repository?: unknown }
        return typeof repository === 'string' ? { metainfo, repository } : undefined
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

/** Bytes on the disk; a part is sparse where nothing was written. */
function allocated(stats: Stats | BigIntStats): number {
  return Math.min(Number(stats.blocks) * 512, Number(stats.size))
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0)
}
