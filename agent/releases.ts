import { lstat, mkdir, readFile, readdir, readlink, rename, rm, rmdir, stat, symlink } from 'node:fs/promises'
import { join } from 'node:path'
import type { Digest } from '../lib/protocol/digest.ts'
import { digestFromHex, digestHex } from '../lib/protocol/digest.ts'
import type { Reference } from '../lib/protocol/reference.ts'
import { formatReference, isRepository, isTag } from '../lib/protocol/reference.ts'
import {
  errorCode,
  ignoreMissing,
  makeDirectory,
  syncDirectory,
  writeFileAtomic,
} from '../lib/runtime/files.ts'
import { createTurn } from '../lib/runtime/turn.ts'
import type { BlobCache } from './blob-cache.ts'
import type { ManifestBlob } from './manifest.ts'

export interface ExposedRelease {
  /** NAME:TAG, or NAME@DIGEST. */
  readonly reference: string
  readonly digest: Digest
  /** The directory with the files. */
  readonly path: string
  readonly blobs: readonly ManifestBlob[]
}

/**
 * `releases/<repository>/<tag>/<manifest hex>/…`, hard links into the cache, and beside it `current` and `previous`. The
 * slashes of a repository are written `+`, which no repository name contains, so that no two can collide.
 */
export interface ReleaseStore {
  /** Builds the directory aside, renames it, swaps `current`. All blobs must be in the cache. */
  expose(
    reference: Reference,
    digest: Digest,
    blobs: readonly ManifestBlob[],
    keep: number,
  ): Promise<ExposedRelease>
  current(reference: string): ExposedRelease | undefined
  /** Every release that is exposed, `current` or not. */
  list(): readonly ExposedRelease[]
  /** Removes the exposures that hold a blob. */
  withdraw(digest: Digest): Promise<void>
}

interface Exposed extends ExposedRelease {
  readonly exposedAt: number
}

export async function openReleaseStore(
  directory: string,
  cache: Pick<BlobCache, 'linkTo'>,
): Promise<ReleaseStore> {
  await makeDirectory(directory, 0o755)
  const exposed = new Map<string, Exposed[]>()
  const currents = new Map<string, Digest>()
  for (const repositoryFolder of await readdir(directory)) {
    for (const tagFolder of await readdir(join(directory, repositoryFolder))) {
      const reference = referenceOf(repositoryFolder, tagFolder)
      if (reference === undefined) continue
      const base = join(directory, repositoryFolder, tagFolder)
      const found = await readExposed(base, reference)
      if (found.length > 0) exposed.set(reference, found)
      const current = await readlink(join(base, 'current')).catch(ignoreMissing)
      if (current !== undefined && found.some(({ digest }) => digestHex(digest) === current))
        currents.set(reference, digestFromHex(current))
    }
  }

  const remove = async (release: Exposed) => {
    const kept = (exposed.get(release.reference) ?? []).filter((other) => other !== release)
    if (kept.length > 0) exposed.set(release.reference, kept)
    else exposed.delete(release.reference)
    const base = join(release.path, '..')
    for (const link of ['current', 'previous']) {
      const target = await readlink(join(base, link)).catch(ignoreMissing)
      if (target === digestHex(release.digest)) await rm(join(base, link), { force: true })
    }
    if (currents.get(release.reference) === release.digest) currents.delete(release.reference)
    await rm(release.path, { recursive: true, force: true })
    if (!exposed.has(release.reference))
      await rmdir(base).catch((error: unknown) => {
        if (!['ENOENT', 'ENOTEMPTY', 'EEXIST'].includes(errorCode(error) ?? '')) throw error
      })
  }

  // One change at a time: an exposure and a withdrawal share directories, links and what is remembered of them.
  const inTurn = createTurn()

  const expose: ReleaseStore['expose'] = async (reference, digest, blobs, keep) => {
    const name = keyOf(reference)
    const base = join(
      directory,
      reference.repository.replaceAll('/', '+'),
      reference.tag ?? `@${digestHex(digest)}`,
    )
    const path = join(base, digestHex(digest))
    await makeDirectory(base, 0o755)
    const before = exposed.get(name) ?? []
    let release = before.find((other) => other.digest === digest)
    if (!release || !(await isWhole(release))) {
      await build(path, blobs, cache)
      release = { reference: name, digest, path, blobs, exposedAt: Date.now() }
    }
    const previous = currents.get(name)
    await pointTo(base, 'current', digest)
    if (previous !== undefined && previous !== digest && keep > 1) await pointTo(base, 'previous', previous)
    await syncDirectory(base)
    currents.set(name, digest)
    const others = before.filter((other) => other.digest !== digest)
    exposed.set(name, [...others, release])
    const old = others.toSorted(
      (a, b) => Number(a.digest === previous) - Number(b.digest === previous) || a.exposedAt - b.exposedAt,
    )
    for (const surplus of old.slice(0, Math.max(0, old.length - (keep - 1)))) await remove(surplus)
    return release
  }

  return {
    expose: (...release) => inTurn(() => expose(...release)),
    current: (reference) => {
      const digest = currents.get(reference)
      return exposed.get(reference)?.find((release) => release.digest === digest)
    },
    list: () => [...exposed.values()].flat(),
    withdraw: (digest) =>
      inTurn(async () => {
        for (const release of [...exposed.values()].flat()) {
          if (release.blobs.some((blob) => blob.digest === digest)) await remove(release)
        }
      }),
  }
}

/** How a reference is called in status and reports: NAME:TAG, or NAME@DIGEST where it has no tag. */
export function keyOf(reference: Reference): string {
  return formatReference({ ...reference, digest: reference.tag === undefined ? reference.digest : undefined })
}

async function build(
  path: string,
  blobs: readonly ManifestBlob[],
  cache: Pick<BlobCache, 'linkTo'>,
): Promise<void> {
  const aside = `${path}.tmp`
  await rm(aside, { recursive: true, force: true })
  await mkdir(aside, { mode: 0o755 })
  for (const blob of blobs) {
    // The same blob may stand in a manifest twice under one name.
    await cache.linkTo(blob.digest, join(aside, blob.name)).catch((error: unknown) => {
      if (errorCode(error) !== 'EEXIST') throw error
    })
  }
  // Hidden from `ls`; says after a restart which blobs the release holds.
  await writeFileAtomic(join(aside, '.blobs.json'), JSON.stringify(blobs))
  await syncDirectory(aside)
  await rm(path, { recursive: true, force: true })
  await rename(aside, path)
}

async function pointTo(base: string, name: string, digest: Digest): Promise<void> {
  const aside = join(base, `.${name}.tmp`)
  await rm(aside, { force: true })
  await symlink(digestHex(digest), aside)
  await rename(aside, join(base, name))
}

async function isWhole(release: ExposedRelease): Promise<boolean> {
  for (const { name, sizeBytes } of release.blobs) {
    const stats = await stat(join(release.path, name)).catch(() => undefined)
    if (stats?.size !== sizeBytes) return false
  }
  return true
}

async function readExposed(base: string, reference: string): Promise<Exposed[]> {
  const found: Exposed[] = []
  for (const name of await readdir(base)) {
    const path = join(base, name)
    if (name.endsWith('.tmp')) await rm(path, { recursive: true, force: true })
    if (!/^[0-9a-f]{64}$/.test(name)) continue
    try {
      const blobs = JSON.parse(await readFile(join(path, '.blobs.json'), 'utf8')) as ManifestBlob[]
      const exposedAt = (await lstat(path)).mtimeMs
      found.push({ reference, digest: digestFromHex(name), path, blobs, exposedAt })
    } catch {
      // Half removed, or not ours: what it should hold is fetched again when it is wanted.
      await rm(path, { recursive: true, force: true })
    }
  }
  return found
}

function referenceOf(repositoryFolder: string, tagFolder: string): string | undefined {
  const repository = repositoryFolder.replaceAll('+', '/')
  if (!isRepository(repository)) return undefined
  if (/^@[0-9a-f]{64}$/.test(tagFolder)) return `${repository}@sha256:${tagFolder.slice(1)}`
  return isTag(tagFolder) ? `${repository}:${tagFolder}` : undefined
}
