import { randomBytes } from 'node:crypto'
import type { FileHandle } from 'node:fs/promises'
import { link, mkdir, open, readdir, rename, stat, unlink } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'

const temporarySuffix = '.tmp'
/** No write of a small file takes as long. */
const temporaryMaxMs = 3_600_000

/**
 * Replaces a file so that a reader, or the next start after power loss, sees the old bytes or the new ones, whole:
 * written beside it, synced, renamed, directory synced.
 */
export async function writeFileAtomic(
  file: string,
  bytes: string | Uint8Array,
  options: { mode?: number } = {},
): Promise<void> {
  await writeBeside(file, bytes, options.mode, (temporary) => rename(temporary, file))
}

/** The same for a file that must not be there yet: of several who make it at once one does. @returns whether it was this one */
export async function createFileAtomic(
  file: string,
  bytes: string | Uint8Array,
  options: { mode?: number } = {},
): Promise<boolean> {
  try {
    await writeBeside(file, bytes, options.mode, async (temporary) => {
      await link(temporary, file)
      await unlink(temporary).catch(ignoreMissing)
    })
    return true
  } catch (error) {
    if (errorCode(error) !== 'EEXIST') throw error
    return false
  }
}

async function writeBeside(
  file: string,
  bytes: string | Uint8Array,
  mode: number | undefined,
  putInPlace: (temporary: string) => Promise<void>,
): Promise<void> {
  const temporary = join(
    dirname(file),
    `.${basename(file)}.${randomBytes(6).toString('hex')}${temporarySuffix}`,
  )
  try {
    await using handle: FileHandle = await open(temporary, 'wx', mode ?? 0o644)
    await handle.writeFile(bytes)
    await handle.sync()
    await putInPlace(temporary)
  } catch (error) {
    await unlink(temporary).catch(ignoreMissing)
    throw error
  }
  await syncDirectory(dirname(file))
}

/**
 * Removes what `writeFileAtomic` left in a directory when it was killed, once nobody can be at it any more.
 *
 * @returns how many files
 */
export async function sweepTemporary(directory: string, nowMs: number): Promise<number> {
  let removed = 0
  for (const name of (await readdir(directory).catch(ignoreMissing)) ?? []) {
    if (!name.startsWith('.') || !name.endsWith(temporarySuffix)) continue
    const file = join(directory, name)
    const found = await stat(file).catch(ignoreMissing)
    if (!found || nowMs - found.mtimeMs < temporaryMaxMs) continue
    await unlink(file).catch(ignoreMissing)
    removed++
  }
  return removed
}

/** Makes a rename or a new name in `directory` survive power loss. */
export async function syncDirectory(directory: string): Promise<void> {
  await using handle: FileHandle = await open(directory, 'r')
  await handle.sync()
}

/** Makes a directory and its parents, and syncs each parent that got a new child. */
export async function makeDirectory(directory: string, mode = 0o755): Promise<void> {
  const first = await mkdir(directory, { recursive: true, mode })
  if (first === undefined) return
  for (let child = directory; ; child = dirname(child)) {
    await syncDirectory(dirname(child))
    if (child === first) return
  }
}

/** Changes whenever the file is another or has other content, as far as the file system tells. */
export async function versionOf(file: string): Promise<string> {
  try {
    const { dev, ino, size, mtimeNs, ctimeNs } = await stat(file, { bigint: true })
    return [dev, ino, size, mtimeNs, ctimeNs].join(' ')
  } catch (error) {
    return errorCode(error) ?? String(error)
  }
}

/** For `.catch`: a file that is not there is as good as removed. */
export function ignoreMissing(error: unknown): undefined {
  if (!isMissing(error)) throw error
}

export function isMissing(error: unknown): boolean {
  return errorCode(error) === 'ENOENT'
}

/** The `code` of a system error, `ENOSPC` and the like. */
export function errorCode(error: unknown): string | undefined {
  return error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : undefined
}
