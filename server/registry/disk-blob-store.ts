import { randomUUID } from 'node:crypto'
import {
  mkdir,
  open,
  readFile,
  readdir,
  rename,
  rm,
  stat,
  statfs,
  unlink,
  utimes,
  writeFile,
} from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { LRUCache } from 'lru-cache'
import type { ContentDigest, Digest } from '../../lib/protocol/digest.ts'
import { contentDigestFromHex, digestHex, isSha256 } from '../../lib/protocol/digest.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import { infoHashOf } from '../../lib/protocol/infohash.ts'
import { parseTorrent, swarmLengthMin, writeBlobInfo, writeTorrent } from '../../lib/protocol/metainfo.ts'
import { monotonicMs } from '../../lib/runtime/clock.ts'
import {
  createFileAtomic,
  errorCode,
  ignoreMissing,
  isMissing,
  sweepTemporary,
  syncDirectory,
  writeFileAtomic,
} from '../../lib/runtime/files.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import { createTurns } from '../../lib/runtime/turn.ts'
import { ApiError } from './api-error.ts'
import type { BlobStat, BlobStore, BlobUpload, Manifest, Stored, Tag } from './blob-store.ts'
import { isSameTag } from './blob-store.ts'
import { createHashPool } from './hash-pool.ts'
import { subjectIn } from './oci-manifest.ts'
import { createReadCache } from './read-cache.ts'
import { readRange } from './read-range.ts'
import { keepFile, lastWriteMs, ownFile, sizeSoFar, takeFile } from './shared-upload.ts'
import { startUploadSession, tooLarge } from './upload-session.ts'
import type { UploadSession } from './upload-session.ts'
import type { Withdrawal } from './withdrawal.ts'
import { isOccupied, putBack, returnToPlace, withdraw } from './withdrawal.ts'

export interface DiskBlobStoreOptions {
  readonly directory: string
  readonly blobMaxBytes: number
  readonly uploadsMax: number
  /** A session without a byte for this long is dropped. */
  readonly uploadTtlMs: number
  /** Uploads are refused while less than this is free. */
  readonly diskReserveBytes: number
  /**
   * Several servers have the directory, and none sees it as it was longer ago than half of this. What a server has claimed counts for the other half:
   * whoever names it later claims it again (`claimHoldsMs`). Undefined: it is this server's alone.
   */
  readonly settleMs?: number | undefined
  /** Milliseconds since 1970; of several servers, of a clock that they share. */
  readonly now: () => number
  readonly log: Logger
}

/** Files looked at at once while a directory is read through. */
const scanWidth = 64

/** An upload that nobody has touched for this long may lose its open file to another; its bytes stay. */
const idleMs = 10_000
/** Manifests and tags that were read within a second: what a whole fleet asks for at once is read once. */
const freshMs = 1000
const manifestsCached = 2000
/** The usual manifest has 1 to 4 KiB; together at most 32 MiB. */
const manifestCachedMaxBytes = 16 * 1024
const tagsCached = 10_000
/** Directories whose place on disk is remembered; one that is not is synced once more. */
const directoriesRemembered = 20_000
/** Each round means that another server took the thing away in between. */
const claimTriesMax = 10

/**
 * Blobs, manifests and tags in a directory:
 *
 *     blobs/sha256/ab/<64 hex>/{data, info}      info: the bencoded torrent `info`, where there is one
 *     blobs/sha512/ab/<128 hex>/data             what was pushed by that digest
 *     infohashes/<40 hex>                        the digest, for looking a swarm up
 *     uploads/<uuid>/{data, session}
 *     repositories/<name>/_blobs/<hex>           the blob is readable through this repository
 *     repositories/<name>/_manifests/<hex>       media type, newline, the manifest's bytes
 *     repositories/<name>/_referrers/<hex>/<hex> the second manifest's subject is the first; made of the manifests where it is missing
 *     repositories/<name>/_tags/<tag>            digest
 *     trash/<hex>-<uuid>/                        blobs on their way out
 *
 * and where several servers share it (withdrawal.ts, shared-upload.ts):
 *
 *     uploads/<uuid>/data-<token>                instead of `data`: the token is of the server that writes it
 *     repositories/<name>/_withdrawn/<kind>-<…>  links, manifests and tags, and
 *     withdrawn/<hex>/                           blobs, that go unless somebody turns out to use them
 *
 * A blob's directory is renamed into place when all in it is synced, and out of it before anything in it goes. `_` cannot begin a
 * part of a repository's name. When something was last used is the time of modification of its file: `data`, the link, the manifest.
 *
 * What is seen here need not be on disk yet: another request may be about to sync it, or the server before this one was killed
 * before it could. So whatever is acknowledged syncs what it rests on too, even where that is there already.
 */
export async function startDiskBlobStore(options: DiskBlobStoreOptions): Promise<BlobStore> {
  const { directory, now, log, settleMs } = options
  const paths = storePaths(directory)
  const ensureDirectory = createDirectories(directory)
  await ensureDirectory(paths.blobs, paths.uploads, paths.infoHashes, paths.repositories, paths.trash)
  await emptyTrash(paths)
  const ended = new AbortController()
  const pool = createHashPool()
  const sessions = new Map<string, UploadSession>()
  /** One at a time links, claims or removes a blob, or changes the manifests of a repository. */
  const inTurn = createTurns()

  const checkRoom = async () => {
    const { bavail, bsize } = await statfs(directory)
    if (bavail * bsize < options.diskReserveBytes) throw diskFull()
  }

  /** An empty file that says so by being there, on disk when this returns. */
  const putMark = async (file: string) => {
    await ensureDirectory(dirname(file))
    await using handle = await open(file, 'a', 0o600)
    await handle.close()
    await syncDirectory(dirname(file))
  }

  /** Counts as used now; what another server has taken out of its place comes back. @returns whether there is such a thing */
  const claim = async (thing: Withdrawal): Promise<boolean> => {
    const file = join(thing.place, thing.file ?? '')
    for (let tries = 0; tries < claimTriesMax; tries++) {
      if (await touch(file, now())) return true
      if (settleMs === undefined || !(await putBack(thing))) return false
    }
    return false
  }

  /**
   * The bytes count as used too, once before the link is there, so that they stay for it, and once after: a collection that looked through the
   * repository in between has not seen the link, and began before that. @returns whether there are any bytes
   */
  const link = async (repository: string, digest: ContentDigest): Promise<boolean> => {
    if (!(await claim(paths.withdrawnBlob(digest)))) return false
    const file = paths.link(repository, digest)
    // Another server may take the mark away between the two steps.
    for (let tries = 0; tries < claimTriesMax; tries++) {
      await putMark(file)
      if (await touch(file, now())) return claim(paths.withdrawnBlob(digest))
    }
    return false
  }

  const commit = async (session: UploadSession, expected: ContentDigest): Promise<BlobStat> => {
    const { sha256Hex, sha512Hex, pieces, offset } = await session.finish(!isSha256(expected))
    sessions.delete(session.id)
    const digest = contentDigestFromHex(sha512Hex ?? sha256Hex)
    const ready = settleMs === undefined ? paths.upload(session.id) : await takeOut(session)
    if (digest !== expected) {
      await rm(ready, { recursive: true, force: true })
      throw new ClientError(
        'DIGEST_INVALID',
        `Cannot store blob: its bytes have ${digest ?? ''}, not ${expected}`,
      )
    }
    const blob = { digest: expected, sizeBytes: offset }
    return inTurn(expected, async () => {
      const shelf = dirname(paths.blob(expected))
      await ensureDirectory(shelf)
      if (await claim(paths.withdrawnBlob(expected))) await rm(ready, { recursive: true, force: true })
      else await moveIntoPlace(paths, ready, blob, pieces, settleMs !== undefined)
      await syncDirectory(shelf)
      if (!(await link(session.repository, expected)))
        throw new Error(`Cannot store blob ${expected}: it was removed while it was stored`)
      return blob
    })
  }

  /** Of a directory that is shared: out of the way of whoever would go on with the upload. @returns where it lies, with its data alone */
  const takeOut = async (session: UploadSession): Promise<string> => {
    const ready = paths.upload(randomUUID())
    await mkdir(ready, { mode: 0o700 })
    if (!(await moveIfThere(fileOf(session.id), join(ready, 'data')))) {
      await rm(ready, { recursive: true, force: true })
      throw takenOver()
    }
    files.delete(session.id)
    await rm(paths.upload(session.id), { recursive: true, force: true })
    return ready
  }

  const statBlob = async (repository: string, digest: ContentDigest): Promise<BlobStat | undefined> => {
    if (!(await exists(paths.link(repository, digest)))) return undefined
    const sizeBytes = await sizeOf(paths.blobData(digest))
    return sizeBytes === undefined ? undefined : { digest, sizeBytes }
  }

  const wrap = (session: UploadSession): BlobUpload => ({
    id: session.id,
    get offset() {
      return session.offset
    },
    append: (bytes, signal, written) => session.append(bytes, signal, written).catch(mapDiskFull),
    commit: (expected) => commit(session, expected).catch(mapDiskFull),
    read: ({ start, end }, signal) => readRange(fileOf(session.id), start, end, signal),
    cancel: async () => {
      sessions.delete(session.id)
      await session.drop()
      await rm(paths.upload(session.id), { recursive: true, force: true })
    },
    [Symbol.asyncDispose]: async () => Promise.resolve(),
  })

  /** Of a directory that is shared: the files that this server writes. */
  const files = new Map<string, string>()
  const fileOf = (id: string) => files.get(id) ?? join(paths.upload(id), 'data')
  /** Forgets a session that another server goes on with. */
  const abandon = async (session: UploadSession): Promise<void> => {
    sessions.delete(session.id)
    files.delete(session.id)
    await session.drop()
  }

  /** Sessions on their way into `sessions`: one that is resumed reads all its bytes again, once for all who ask meanwhile. */
  const opening = new Map<string, Promise<UploadSession>>()
  /** Sessions whose file is being closed. */
  const closing = new Map<string, Promise<void>>()

  /** @param prepare makes what a new session needs on disk */
  const openSession = async (
    id: string,
    { repository, length }: { repository: string; length?: number | undefined },
    prepare: () => Promise<{ from?: string }> = () => Promise.resolve({}),
  ): Promise<UploadSession> => {
    const known = opening.get(id)
    if (known) return known
    // All before the first wait: whoever asks next must count this one.
    makeSessionRoom()
    const started = (async () => {
      await closing.get(id)
      const { from } = await prepare()
      if (settleMs !== undefined)
        files.set(id, from === undefined ? ownFile(paths.upload(id)) : join(paths.upload(id), randomUUID()))
      const session = await startUploadSession({
        id,
        repository,
        length,
        file: fileOf(id),
        from,
        synced: settleMs !== undefined,
        pool,
        now,
        blobMaxBytes: options.blobMaxBytes,
        checkRoom,
      })
      if (from !== undefined) {
        // It is whole now. Whoever has taken what it was read from meanwhile goes on instead.
        const whole = await keepFile(fileOf(id), paths.upload(id))
        if (whole !== undefined) files.set(id, whole)
        if (whole === undefined || !(await removeFile(from))) {
          await unlink(fileOf(id)).catch(ignoreMissing)
          await abandon(session)
          throw takenOver()
        }
      }
      sessions.set(id, session)
      return session
    })()
    opening.set(id, started)
    try {
      return await started
    } finally {
      opening.delete(id)
    }
  }

  /**
   * Keeps open sessions within their bound. One that nobody has touched for a while gives way: it stays on disk and can be
   * resumed, so that clients that went away do not keep others out for `uploadTtlMs`.
   */
  const makeSessionRoom = () => {
    if (sessions.size + opening.size < options.uploadsMax) return
    const [idle] = [...sessions.values()]
      .filter(({ busy, touchedMs }) => !busy && now() - touchedMs >= idleMs)
      .sort((a, b) => a.touchedMs - b.touchedMs)
    if (!idle) {
      throw new ApiError(
        429,
        'TOOMANYREQUESTS',
        `Cannot start an upload: ${options.uploadsMax} are under way already`,
        { headers: { 'retry-after': '5' } },
      )
    }
    sessions.delete(idle.id)
    files.delete(idle.id)
    const closed = idle
      .drop()
      .catch((error: unknown) => {
        log.warn({ err: error, upload: idle.id }, 'an idle upload was not closed')
      })
      .finally(() => closing.delete(idle.id))
    closing.set(idle.id, closed)
  }

  /** Sessions that nobody came back to, those from before a restart included. */
  const sweep = async () => {
    for (const id of await readdir(paths.uploads)) {
      const session = sessions.get(id)
      const touchedMs =
        settleMs === undefined
          ? (session?.touchedMs ??
            (await stat(join(paths.upload(id), 'data')).catch(ignoreMissing))?.mtimeMs ??
            0)
          : await lastWriteMs(paths.upload(id))
      if (now() - touchedMs < options.uploadTtlMs || session?.busy === true || opening.has(id)) continue
      if (session) await abandon(session)
      await rm(paths.upload(id), { recursive: true, force: true })
      log.info({ upload: id }, 'abandoned upload dropped')
    }
  }
  const sweeper = setInterval(() => {
    sweep().catch((error: unknown) => {
      log.warn({ err: error }, 'abandoned uploads could not be dropped')
    })
  }, 60_000)
  sweeper.unref()
  await sweep()

  /** What writes left behind that were killed, here or on another start. In the background: there may be many repositories. */
  const sweepLeftovers = async () => {
    let removed = await sweepTemporary(paths.infoHashes, now())
    for await (const repository of findRepositories(paths.repositories, '', ['_manifests', '_tags'])) {
      if (ended.signal.aborted) return
      for (const part of ['_manifests', '_tags'])
        removed += await sweepTemporary(join(paths.repository(repository), part), now())
    }
    if (removed > 0) log.info({ files: removed }, 'what unfinished writes had left was removed')
  }
  const leftoversSwept = sweepLeftovers().catch((error: unknown) => {
    log.warn({ err: error }, 'what unfinished writes have left could not be removed')
  })

  const manifests = createReadCache<Manifest>({
    entriesMax: manifestsCached,
    freshMs,
    keeps: ({ bytes }) => bytes.length <= manifestCachedMaxBytes,
    now,
  })
  const tags = createReadCache<Tag>({ entriesMax: tagsCached, freshMs, keeps: () => true, now })

  const readManifest = async (repository: string, digest: ContentDigest): Promise<Manifest | undefined> => {
    const content = await readFile(paths.manifest(repository, digest)).catch(ignoreMissing)
    if (!content) return undefined
    const newline = content.indexOf(0x0a)
    return { digest, mediaType: content.toString('utf8', 0, newline), bytes: content.subarray(newline + 1) }
  }

  const listManifests = async (repository: string): Promise<ContentDigest[]> =>
    digestsOf(await list(join(paths.repository(repository), '_manifests')))

  /** Repositories whose referrers are known to be there. */
  const referrersReady = new LRUCache<string, Promise<void>>({ max: directoriesRemembered })
  const ensureReferrers = async (repository: string): Promise<void> => {
    const known = referrersReady.get(repository)
    if (known) return known
    const ready = makeReferrers(repository)
    referrersReady.set(repository, ready)
    ready.catch(() => referrersReady.delete(repository))
    return ready
  }

  /** Makes the marks of a repository from before there were any. They come into sight all at once. */
  const makeReferrers = async (repository: string): Promise<void> => {
    const final = paths.referrers(repository)
    if (!(await exists(final))) {
      const aside = `${final}.new`
      await rm(aside, { recursive: true, force: true })
      for (const digest of await listManifests(repository)) {
        const manifest = await readManifest(repository, digest)
        const subject = manifest && subjectIn(manifest.bytes)
        if (subject !== undefined) await putMark(join(aside, digestHex(subject), digestHex(digest)))
      }
      await mkdir(aside, { recursive: true, mode: 0o700 })
      await rename(aside, final)
    }
    await ensureDirectory(final)
  }

  const readTag = (repository: string, tag: string) => parseTag(paths.tag(repository, tag), tag)

  const savedUpload = async (id: string) => {
    const text = await readFile(join(paths.upload(id), 'session'), 'utf8').catch(ignoreMissing)
    return text === undefined ? undefined : parseSession(text)
  }

  const claimManifest = async (repository: string, digest: ContentDigest): Promise<boolean> => {
    const file = paths.manifest(repository, digest)
    if (await touch(file, now())) return true
    if (settleMs === undefined) return false
    await putBackManifests(repository)
    return touch(file, now())
  }

  /** Manifests that another server has taken out of place together come back together: one step decides for all of them. */
  const putBackManifests = async (repository: string): Promise<void> => {
    const withdrawn = paths.withdrawn(repository)
    for (const name of await list(withdrawn))
      if (name.startsWith(withdrawnManifests))
        await moveIfThere(join(withdrawn, name), join(withdrawn, `${returning}${name}`))
    for (const name of await list(withdrawn)) {
      if (!name.startsWith(returning)) continue
      const directory = join(withdrawn, name)
      for (const hex of await list(directory))
        await putBack({
          place: join(paths.repository(repository), '_manifests', hex),
          aside: join(directory, hex),
        })
      await rm(directory, { recursive: true, force: true })
    }
  }

  const forgetReferrer = async (repository: string, digest: ContentDigest, subject: ContentDigest) =>
    // A mark without its manifest says nothing, so this need not be on disk.
    unlink(paths.referrer(repository, subject, digest)).catch(ignoreMissing)

  const removeManifests = async (
    repository: string,
    digests: readonly ContentDigest[],
    unusedSinceMs: number,
    isNeeded: (() => Promise<boolean>) | undefined,
  ): Promise<boolean> => {
    const subjects = new Map<ContentDigest, ContentDigest>()
    for (const digest of digests) {
      const manifest = await readManifest(repository, digest)
      const subject = manifest && subjectIn(manifest.bytes)
      if (subject !== undefined) subjects.set(digest, subject)
    }
    const forget = () => {
      for (const digest of digests) manifests.forget(manifestKey(repository, digest))
    }
    if (settleMs === undefined) {
      for (const digest of digests)
        if (((await usedAtMsOf(paths.manifest(repository, digest))) ?? 0) >= unusedSinceMs) return false
      let removed = false
      for (const digest of digests) {
        removed = (await removeFile(paths.manifest(repository, digest))) || removed
        const subject = subjects.get(digest)
        if (subject !== undefined) await forgetReferrer(repository, digest, subject)
      }
      forget()
      return removed
    }
    const aside = join(paths.withdrawn(repository), `${withdrawnManifests}${randomUUID()}`)
    const things = digests.map((digest) => ({
      place: paths.manifest(repository, digest),
      aside: join(aside, digestHex(digest)),
    }))
    for (const { place } of things) if (((await usedAtMsOf(place)) ?? Infinity) >= unusedSinceMs) return false
    const gone = join(paths.trash, randomUUID())
    const removed =
      (await withdraw(things, { unusedSinceMs, settleMs, signal: ended.signal, isNeeded })) &&
      (await moveIfThere(aside, gone))
    forget()
    await rm(removed ? gone : aside, { recursive: true, force: true })
    if (!removed) return false
    await syncDirectory(join(paths.repository(repository), '_manifests'))
    for (const [digest, subject] of subjects) {
      await forgetReferrer(repository, digest, subject)
      // Pushed again meanwhile.
      if (await exists(paths.manifest(repository, digest)))
        await putMark(paths.referrer(repository, subject, digest))
    }
    return true
  }

  return {
    claimHoldsMs: settleMs === undefined ? Infinity : settleMs / 2,
    settleMs,
    recover: async () => {
      if (settleMs === undefined) return
      for (const hex of await list(paths.withdrawnBlobs)) {
        const digest = contentDigestFromHex(hex)
        if (digest && !(await putBack(paths.withdrawnBlob(digest))))
          await moveToTrash(paths, paths.withdrawnBlob(digest).aside, digest)
      }
      for await (const repository of findRepositories(paths.repositories, '', ['_withdrawn'])) {
        await putBackManifests(repository)
        for (const name of await list(paths.withdrawn(repository))) {
          const thing = paths.withdrawnAs(repository, name)
          if (thing) await returnToPlace(thing)
        }
      }
    },
    get uploadsOpen() {
      return sessions.size + opening.size
    },
    startUpload: async (repository, lengthHint) => {
      if (lengthHint !== undefined && lengthHint > options.blobMaxBytes) throw tooLarge(options.blobMaxBytes)
      await checkRoom()
      const id = randomUUID()
      const saved = { repository, length: lengthHint }
      // Nothing is promised of an upload that is under way when the power goes: no sync.
      const session = await openSession(id, saved, async () => {
        await mkdir(paths.upload(id), { mode: 0o700 })
        await writeFile(join(paths.upload(id), 'session'), JSON.stringify(saved))
        return {}
      }).catch(mapDiskFull)
      return wrap(session)
    },
    resumeUpload: async (repository, id) => {
      if (!/^[0-9a-f-]{36}$/.test(id)) return undefined
      const open = sessions.get(id)
      if (open && open.repository !== repository) return undefined
      if (open && (settleMs === undefined || open.busy)) return wrap(open)
      if (open) {
        const renewed = await keepFile(fileOf(id), paths.upload(id))
        if (renewed !== undefined) {
          files.set(id, renewed)
          return wrap(open)
        }
        await abandon(open)
      }
      const saved = await savedUpload(id)
      if (saved?.repository !== repository) return undefined
      if (settleMs === undefined) return wrap(await openSession(id, saved))
      return wrap(
        await openSession(id, saved, async () => {
          const from = await takeFile(paths.upload(id))
          if (from === undefined) throw takenOver()
          return { from }
        }).catch(mapDiskFull),
      )
    },
    statUpload: async (repository, id) => {
      if (!/^[0-9a-f-]{36}$/.test(id)) return undefined
      const open = sessions.get(id)
      const saved = await savedUpload(id)
      if (saved?.repository !== repository) return undefined
      if (settleMs === undefined) return { id, offset: open?.offset ?? (await sizeOf(fileOf(id))) ?? 0 }
      if (open && (await exists(fileOf(id)))) return { id, offset: open.offset }
      return { id, offset: await sizeSoFar(paths.upload(id)) }
    },
    statBlob,
    claimBlob: (repository, digest) =>
      inTurn(digest, async () => {
        // Once claimed the link comes back, even if another server takes it away to look at it.
        if (!(await claim(paths.withdrawnLink(repository, digest)))) return undefined
        for (let tries = 0; tries < claimTriesMax; tries++) {
          const sizeBytes = await sizeOf(paths.blobData(digest))
          if (sizeBytes !== undefined) return { digest, sizeBytes }
          if (settleMs === undefined || !(await claim(paths.withdrawnBlob(digest)))) return undefined
        }
        return undefined
      }),
    readBlob: (digest, { start, end }, signal) => readRange(paths.blobData(digest), start, end, signal),
    mountBlob: (repository, digest, from) =>
      inTurn(digest, async () => {
        if (!(await statBlob(from, digest))) return false
        return link(repository, digest)
      }),
    unlinkBlob: async (repository, digest, unusedSinceMs, isNeeded) => {
      const thing = paths.withdrawnLink(repository, digest)
      const isUnused = async () => ((await usedAtMsOf(thing.place)) ?? Infinity) < unusedSinceMs
      if (settleMs === undefined)
        return inTurn(digest, async () => (await isUnused()) && removeFile(thing.place))
      if (!(await isUnused())) return false
      const gone =
        (await withdraw([thing], { unusedSinceMs, settleMs, signal: ended.signal, isNeeded })) &&
        (await removeFile(thing.aside))
      if (gone) await syncDirectory(dirname(thing.place))
      return gone
    },
    deleteBlob: async (digest, unusedSinceMs) => {
      const thing = paths.withdrawnBlob(digest)
      const isUnused = async () => ((await usedAtMsOf(paths.blobData(digest))) ?? Infinity) < unusedSinceMs
      if (settleMs === undefined)
        return inTurn(
          digest,
          async () => (await isUnused()) && (await moveToTrash(paths, thing.place, digest)),
        )
      if (!(await isUnused())) return false
      return (
        (await withdraw([thing], { unusedSinceMs, settleMs, signal: ended.signal })) &&
        (await moveToTrash(paths, thing.aside, digest))
      )
    },
    scanBlobs: async function* () {
      for (const shelf of await shelvesOf(paths)) {
        const digests = digestsOf(await list(shelf))
        yield* looked(digests, async (digest) => {
          const found = await stat(paths.blobData(digest)).catch(ignoreMissing)
          return found && { digest, usedAtMs: Math.round(found.mtimeMs), sizeBytes: found.size }
        })
      }
    },
    scanLinks: (repository) => scanStored(join(paths.repository(repository), '_blobs')),
    repositoriesWith: async (digest) => {
      if (!(await exists(paths.blobData(digest)))) return []
      const found: string[] = []
      for await (const name of findRepositories(paths.repositories, '', ['_blobs']))
        if (await exists(paths.link(name, digest))) found.push(name)
      return found
    },
    torrentOf: async (digest) => {
      const info = await readFile(join(paths.blob(digest), 'info')).catch(ignoreMissing)
      return info && { ...parseTorrent(writeTorrent(info, {})), info }
    },
    blobOfInfoHash: async (infoHash) => {
      if (!/^[0-9a-f]{40}$/.test(infoHash)) return undefined
      const digest = await readFile(join(paths.infoHashes, infoHash), 'utf8').catch(ignoreMissing)
      const sizeBytes = digest === undefined ? undefined : await sizeOf(paths.blobData(digest as Digest))
      return digest === undefined || sizeBytes === undefined
        ? undefined
        : { digest: digest as Digest, sizeBytes }
    },
    putManifest: (repository, { digest, mediaType, bytes }) =>
      inTurn(repository, async () => {
        const startedMs = monotonicMs()
        const file = paths.manifest(repository, digest)
        const subject = subjectIn(bytes)
        const content = Buffer.concat([Buffer.from(`${mediaType}\n`), bytes])
        const write = async () => {
          await ensureDirectory(dirname(file))
          // The blobs that it names were found here, and must be found again after it.
          await syncDirectory(dirname(paths.link(repository, digest))).catch(ignoreMissing)
          if (subject !== undefined) {
            await ensureReferrers(repository)
            await putMark(paths.referrer(repository, subject, digest))
          }
          await writeFileAtomic(file, content)
          await touch(file, now())
          // Another server may have removed the manifest, and with it the mark, before it was there again.
          if (subject !== undefined && settleMs !== undefined && monotonicMs() - startedMs > settleMs / 2)
            await putMark(paths.referrer(repository, subject, digest))
        }
        await write().catch(mapDiskFull)
        manifests.forget(manifestKey(repository, digest))
      }),
    getManifest: async (repository, digest) => {
      const found = await manifests.get(manifestKey(repository, digest), () =>
        readManifest(repository, digest),
      )
      return found && { ...found, digest }
    },
    listManifests,
    listReferrers: async (repository, subject) => {
      if (!(await exists(join(paths.repository(repository), '_manifests')))) return []
      await ensureReferrers(repository)
      return digestsOf(await list(join(paths.referrers(repository), digestHex(subject)))).sort()
    },
    deleteManifests: (repository, digests, { unusedSinceMs = Infinity, isNeeded } = {}) => {
      const remove = () => removeManifests(repository, digests, unusedSinceMs, isNeeded)
      return settleMs === undefined ? inTurn(repository, remove) : remove()
    },
    claimManifest,
    manifestUsedAtMs: (repository, digest) => usedAtMsOf(paths.manifest(repository, digest)),
    scanManifests: async function* (repository) {
      const directory = join(paths.repository(repository), '_manifests')
      // Whoever asks removes what no manifest names: one that is passed over would lose what it needs.
      const strange = (await list(directory)).find(
        (name) => contentDigestFromHex(name) === undefined && !name.startsWith('.'),
      )
      if (strange !== undefined)
        throw new Error(
          `Cannot tell what ${join(directory, strange)} is: a newer version may have written it`,
        )
      yield* scanStored(directory)
    },
    putTag: async (repository, tag, digest) => {
      const file = paths.tag(repository, tag)
      const text = JSON.stringify({ digest, updatedAt: new Date(now()).toISOString() })
      const write = async () => {
        await ensureDirectory(dirname(file))
        await writeFileAtomic(file, text)
      }
      await write().catch(mapDiskFull)
      tags.forget(`${repository}:${tag}`)
    },
    getTag: (repository, tag) => tags.get(`${repository}:${tag}`, () => readTag(repository, tag)),
    deleteTag: async (repository, tag, unchanged) => {
      const file = paths.tag(repository, tag)
      tags.forget(`${repository}:${tag}`)
      if (settleMs === undefined) return removeFile(file)
      // Aside first: what is there then cannot be what another server is just putting in its place.
      const thing = { place: file, aside: paths.withdrawnTag(repository, tag) }
      await ensureDirectory(dirname(thing.aside))
      if (!(await moveIfThere(thing.place, thing.aside))) return false
      const found = await parseTag(thing.aside, tag)
      if (unchanged && found && !isSameTag(found, unchanged)) {
        await returnToPlace(thing)
        return false
      }
      await syncDirectory(dirname(file))
      return removeFile(thing.aside)
    },
    listTags: async (repository) => {
      const names = (await list(join(paths.repository(repository), '_tags')))
        .filter((name) => !name.startsWith('.'))
        .sort()
      return (await Promise.all(names.map((tag) => readTag(repository, tag)))).filter(
        (tag) => tag !== undefined,
      )
    },
    hasRepository: async (repository) => {
      const kinds = ['_manifests', '_blobs'].map((kind) => exists(join(paths.repository(repository), kind)))
      return (await Promise.all(kinds)).includes(true)
    },
    listRepositories: async () => {
      const found: string[] = []
      for await (const name of findRepositories(paths.repositories, '', ['_manifests'])) found.push(name)
      return found.sort()
    },
    scanRepositories: () => findRepositories(paths.repositories, '', ['_manifests', '_blobs']),
    [Symbol.asyncDispose]: async () => {
      clearInterval(sweeper)
      ended.abort(new Error('the server ends'))
      await leftoversSwept
      await pool[Symbol.asyncDispose]()
    },
  }
}

type StorePaths = ReturnType<typeof storePaths>

function storePaths(directory: string) {
  const repositories = join(directory, 'repositories')
  const blob = (digest: ContentDigest) => {
    const [algorithm = ''] = digest.split(':')
    return join(directory, 'blobs', algorithm, digestHex(digest).slice(0, 2), digestHex(digest))
  }
  const repository = (name: string) => join(repositories, name)
  const referrers = (name: string) => join(repository(name), '_referrers')
  const link = (name: string, digest: ContentDigest) => join(repository(name), '_blobs', digestHex(digest))
  const manifest = (name: string, digest: ContentDigest) =>
    join(repository(name), '_manifests', digestHex(digest))
  const tag = (name: string, its: string) => join(repository(name), '_tags', its)
  const withdrawn = (name: string) => join(repository(name), '_withdrawn')
  const withdrawnBlobs = join(directory, 'withdrawn')
  const withdrawnLink = (name: string, digest: ContentDigest): Withdrawal => ({
    place: link(name, digest),
    aside: join(withdrawn(name), `blob-${digestHex(digest)}`),
  })
  return {
    blobs: join(directory, 'blobs', 'sha256'),
    shelves: ['sha256', 'sha512'].map((algorithm) => join(directory, 'blobs', algorithm)),
    repositories,
    uploads: join(directory, 'uploads'),
    infoHashes: join(directory, 'infohashes'),
    trash: join(directory, 'trash'),
    blob,
    blobData: (digest: ContentDigest) => join(blob(digest), 'data'),
    upload: (id: string) => join(directory, 'uploads', id),
    repository,
    link,
    manifest,
    withdrawn,
    withdrawnLink,
    withdrawnBlobs,
    withdrawnBlob: (digest: ContentDigest): Withdrawal => ({
      place: blob(digest),
      aside: join(withdrawnBlobs, digestHex(digest)),
      file: 'data',
    }),
    withdrawnTag: (name: string, its: string) => join(withdrawn(name), `tag-${randomUUID()}-${its}`),
    /** What lies aside under a name. */
    withdrawnAs: (name: string, aside: string): Withdrawal | undefined => {
      const digest = contentDigestFromHex(/^blob-(.*)$/.exec(aside)?.[1] ?? '')
      if (digest) return withdrawnLink(name, digest)
      const its = /^tag-[0-9a-f-]{36}-(.*)$/.exec(aside)?.[1]
      return its === undefined ? undefined : { place: tag(name, its), aside: join(withdrawn(name), aside) }
    },
    referrers,
    referrer: (name: string, subject: ContentDigest, digest: ContentDigest) =>
      join(referrers(name), digestHex(subject), digestHex(digest)),
    tag,
  }
}

/** Directories of manifests that went together, and what they are called once they are on their way back. */
const withdrawnManifests = 'manifests-'
const returning = 'returning-'

/** @returns whether it was there */
async function moveIfThere(from: string, to: string): Promise<boolean> {
  try {
    await rename(from, to)
    return true
  } catch (error) {
    if (isMissing(error)) return false
    throw error
  }
}

async function parseTag(file: string, tag: string): Promise<Tag | undefined> {
  const text = await readFile(file, 'utf8').catch(ignoreMissing)
  if (text === undefined) return undefined
  const { digest, updatedAt } = JSON.parse(text) as { digest: Digest; updatedAt: string }
  return { tag, digest, updatedAt: new Date(updatedAt) }
}

/**
 * Makes directories with their parents, and sees that each is on disk below `root` before anything in it is acknowledged:
 * once, also where it was there before.
 */
function createDirectories(root: string): (...directories: string[]) => Promise<void> {
  const onDisk = new LRUCache<string, Promise<void>>({ max: directoriesRemembered })
  const levels = (from: string, to: string) => {
    const found: string[] = []
    for (let level = from; level !== to; level = dirname(level)) found.push(level)
    return found
  }
  return async (...directories) => {
    for (const directory of directories) {
      const first = await mkdir(directory, { recursive: true, mode: 0o700 })
      if (first !== undefined) for (const made of levels(directory, dirname(first))) onDisk.delete(made)
    }
    const wanted = new Set(directories.flatMap((directory) => levels(directory, root)))
    const unknown = [...wanted].filter((level) => !onDisk.has(level))
    for (const [parent, children] of Map.groupBy(unknown, dirname)) {
      const synced = syncDirectory(parent)
      for (const child of children) {
        onDisk.set(child, synced)
        synced.catch(() => onDisk.delete(child))
      }
    }
    await Promise.all([...wanted].flatMap((level) => onDisk.get(level) ?? []))
  }
}

/** The data was synced by the worker; the torrent is written and synced beside it, and then the directory moves. */
async function moveIntoPlace(
  paths: StorePaths,
  from: string,
  blob: BlobStat,
  pieces: Uint8Array,
  shared: boolean,
): Promise<void> {
  const to = paths.blob(blob.digest)
  let name: string | undefined
  if (isSha256(blob.digest) && blob.sizeBytes > swarmLengthMin) {
    const info = writeBlobInfo({ sha256Hex: digestHex(blob.digest), length: blob.sizeBytes, pieces })
    await writeSynced(join(from, 'info'), info)
    // Before the blob, so that a crash in between leaves a name without a blob, never a blob that its swarm cannot find.
    name = join(paths.infoHashes, infoHashOf(info))
    await writeFileAtomic(name, blob.digest)
  }
  await unlink(join(from, 'session')).catch(ignoreMissing)
  await syncDirectory(from)
  try {
    await rename(from, to)
  } catch (error) {
    // Another upload of the same blob was first; its copy is as good.
    if (!isOccupied(error)) throw error
    await rm(from, { recursive: true, force: true })
  }
  // Another server that was removing the blob may have taken the name before the blob was there again.
  if (shared && name !== undefined) await createFileAtomic(name, blob.digest)
}

/** For a directory that nobody sees yet, and that is synced as a whole. */
async function writeSynced(file: string, bytes: Uint8Array): Promise<void> {
  await using handle = await open(file, 'w', 0o600)
  await handle.writeFile(bytes)
  await handle.sync()
}

/** What was known of an upload before a restart; after a power failure it may be cut short. */
function parseSession(text: string): { repository: string; length?: number } | undefined {
  try {
    return JSON.parse(text) as { repository: string; length?: number }
  } catch {
    return undefined
  }
}

function manifestKey(repository: string, digest: ContentDigest): string {
  return `${repository}@${digest}`
}

function digestsOf(names: readonly string[]): ContentDigest[] {
  return names.map(contentDigestFromHex).filter((digest) => digest !== undefined)
}

/**
 * Out of place in one step, and for good before anything in it goes: a directory with half of a blob would be in the way of whoever
 * pushes it again.
 */
async function moveToTrash(paths: StorePaths, from: string, digest: ContentDigest): Promise<boolean> {
  const to = join(paths.trash, `${digestHex(digest)}-${randomUUID()}`)
  if (!(await moveIfThere(from, to))) return false
  await syncDirectory(paths.trash)
  await syncDirectory(dirname(from))
  await dropTrash(paths, to, digest)
  return true
}

async function dropTrash(paths: StorePaths, directory: string, digest: ContentDigest): Promise<void> {
  const info = await readFile(join(directory, 'info')).catch(ignoreMissing)
  if (info) {
    const name = join(paths.infoHashes, infoHashOf(info))
    // A name without a blob: nobody finds anything under it, but it would stay for ever.
    await unlink(name).catch(ignoreMissing)
    // Pushed through another server meanwhile.
    if (await exists(paths.blobData(digest))) await createFileAtomic(name, digest)
  }
  await rm(directory, { recursive: true, force: true })
}

/** What a crash kept from going. A blob that has been pushed again since keeps the name of its swarm. */
async function emptyTrash(paths: StorePaths): Promise<void> {
  for (const name of await list(paths.trash)) {
    const directory = join(paths.trash, name)
    const digest = contentDigestFromHex(name.split('-')[0] ?? '')
    if (digest && !(await exists(paths.blobData(digest)))) await dropTrash(paths, directory, digest)
    else await rm(directory, { recursive: true, force: true })
  }
}

/** Repositories are the directories that have one of `parts` in them; their names may hold slashes. */
async function* findRepositories(
  directory: string,
  name: string,
  parts: readonly string[],
): AsyncGenerator<string> {
  const entries = (await readdir(directory, { withFileTypes: true }).catch(ignoreMissing)) ?? []
  const children = entries.filter((entry) => entry.isDirectory()).map((entry) => entry.name)
  if (children.some((child) => parts.includes(child))) yield name
  for (const child of children)
    if (!child.startsWith('_'))
      yield* findRepositories(join(directory, child), name === '' ? child : `${name}/${child}`, parts)
}

/** The directories of blobs, of either algorithm. */
async function shelvesOf({ shelves }: StorePaths): Promise<string[]> {
  const found: string[] = []
  for (const directory of shelves) for (const name of await list(directory)) found.push(join(directory, name))
  return found
}

/** Links or manifests, which are named by a digest each. */
async function* scanStored(directory: string): AsyncGenerator<Stored> {
  const digests = digestsOf(await list(directory))
  yield* looked(digests, async (digest) => {
    const usedAtMs = await usedAtMsOf(join(directory, digestHex(digest)))
    return usedAtMs === undefined ? undefined : { digest, usedAtMs }
  })
}

/** What `look` finds for each item, some at once; what is gone by then is left out. */
async function* looked<Item, Found>(
  items: readonly Item[],
  look: (item: Item) => Promise<Found | undefined>,
): AsyncGenerator<Found> {
  for (let at = 0; at < items.length; at += scanWidth)
    for (const found of await Promise.all(items.slice(at, at + scanWidth).map(look)))
      if (found !== undefined) yield found
}

async function list(directory: string): Promise<string[]> {
  return (await readdir(directory).catch(ignoreMissing)) ?? []
}

async function sizeOf(file: string): Promise<number | undefined> {
  return (await stat(file).catch(ignoreMissing))?.size
}

async function exists(file: string): Promise<boolean> {
  return (await stat(file).catch(ignoreMissing)) !== undefined
}

/** Milliseconds, whole ones: the system keeps a time that is a little less than what it was given. */
async function usedAtMsOf(file: string): Promise<number | undefined> {
  const found = await stat(file).catch(ignoreMissing)
  return found && Math.round(found.mtimeMs)
}

/** @returns whether there is such a file */
async function touch(file: string, nowMs: number): Promise<boolean> {
  try {
    await utimes(file, nowMs / 1000, nowMs / 1000)
    return true
  } catch (error) {
    if (isMissing(error)) return false
    throw error
  }
}

async function removeFile(file: string): Promise<boolean> {
  try {
    await unlink(file)
  } catch (error) {
    if (isMissing(error)) return false
    throw error
  }
  await syncDirectory(dirname(file))
  return basename(file) !== ''
}

function takenOver(): ApiError {
  return new ApiError(
    409,
    'BLOB_UPLOAD_INVALID',
    'Cannot use the upload: another request has gone on with it through another server',
    { hint: 'Ask where it stands (GET of its URL), and go on from there.' },
  )
}

function mapDiskFull(error: unknown): never {
  throw ['ENOSPC', 'EDQUOT'].includes(errorCode(error) ?? '') ? diskFull(error) : error
}

function diskFull(cause?: unknown): ApiError {
  return new ApiError(507, 'UNKNOWN', 'Cannot store: the disk of the server is full', {
    cause,
    hint: 'Make room on the server, then push again: the upload goes on where it stopped.',
  })
}
