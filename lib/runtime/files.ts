import { randomBytes } from 'node:crypto'
import type { FileHandle } from 'node:fs/promises'
import { mkdir, open, rename, stat, unlink } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'

/**
 * Replaces a file so that a reader, or the next start after power loss, sees the old bytes or the new ones, whole:
 * written beside it, synced, renamed, directory synced.
 */
export async function writeFileAtomic(
  file: string,
  bytes: string | Uint8Array,
  options: { mode?: number } = {},
): Promise<void> {
  const temporary = join(dirname(file), `.${basename(file)}.${randomBytes(6).toString('hex')}.tmp`)
  try {
    await using handle: FileHandle = await open(temporary, 'wx', options.mode ?? 0o644)
    await handle.writeFile(bytes)
    await handle.sync()
    await rename(temporary, file)
  } catch (error) {
    await unlink(temporary).catch(ignoreMissing)
    throw error
  }
  await syncDirectory(dirname(file))
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
