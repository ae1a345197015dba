import { link, open, rename, unlink } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { delay } from '../../lib/runtime/backoff.ts'
import { errorCode, ignoreMissing, isMissing, makeDirectory, syncDirectory } from '../../lib/runtime/files.ts'

/** A file, or a directory with all in it, on its way out of a directory that several servers share. */
export interface Withdrawal {
  readonly place: string
  /** Where it waits meanwhile, in the same file system. */
  readonly aside: string
  /** Of a directory, the file in it whose time of modification says when it was used last. */
  readonly file?: string
}

/**
 * Takes things out of place, waits until no server can take them to be there still, and then looks whether anybody has used them since:
 * all of them come back then, or none.
 *
 * No lock is held, and whoever uses something does nothing more than to set its time of modification. If that comes before
 * the move it is seen here; a client of a network file system that does not know of the move yet sets it on what lies aside, and that is seen at the
 * end; and whoever does not find the thing in its place puts it back from where it lies (`putBack`). The end is one step, too: what has been put back cannot
 * be removed any more, and what is removed cannot be put back.
 *
 * @param unusedSinceMs used then or later, it comes back
 * @param isNeeded asked at the end: true has all of it come back
 * @returns whether all of it lies aside; the caller then removes it, and what has gone from there meanwhile was put back
 */
export async function withdraw(
  things: readonly Withdrawal[],
  options: {
    unusedSinceMs: number
    settleMs: number
    signal: AbortSignal
    isNeeded?: (() => Promise<boolean>) | undefined
  },
): Promise<boolean> {
  const { unusedSinceMs, settleMs, signal, isNeeded } = options
  const isUsed = async () => {
    for (const thing of things) {
      const usedAtMs = await usedAtMsFresh(join(thing.aside, thing.file ?? ''))
      if (usedAtMs === undefined || usedAtMs >= unusedSinceMs) return true
    }
    return false
  }
  let settled = false
  try {
    for (const { place, aside } of things) {
      await makeDirectory(dirname(aside), 0o700)
      try {
        await rename(place, aside)
      } catch (error) {
        if (!isMissing(error)) throw error
        return false
      }
    }
    if (await isUsed()) return false
    await delay(settleMs, signal)
    if ((await isUsed()) || (await isNeeded?.()) === true) return false
    settled = true
    return true
  } finally {
    if (!settled) for (const thing of things.toReversed()) await returnToPlace(thing)
  }
}

/** Puts a thing back in one step, whatever is in its place but a directory that is full. @returns whether it lay aside */
export async function putBack({ place, aside }: Withdrawal): Promise<boolean> {
  try {
    await rename(aside, place)
  } catch (error) {
    if (isMissing(error) || isOccupied(error)) return false
    throw error
  }
  await syncDirectory(dirname(place))
  return true
}

/** What has come into its place meanwhile stays: it is as good, and newer. */
export async function returnToPlace({ place, aside, file }: Withdrawal): Promise<void> {
  if (file !== undefined) {
    await putBack({ place, aside })
    return
  }
  try {
    await link(aside, place)
  } catch (error) {
    if (isMissing(error)) return
    if (!isOccupied(error)) throw error
  }
  await syncDirectory(dirname(place))
  await unlink(aside).catch(ignoreMissing)
}

export function isOccupied(error: unknown): boolean {
  return ['EEXIST', 'ENOTEMPTY'].includes(errorCode(error) ?? '')
}

/** Opened, since a network file system then asks its server. Whole milliseconds, as the system keeps a little less than what it was given. */
async function usedAtMsFresh(file: string): Promise<number | undefined> {
  try {
    await using handle = await open(file, 'r')
    return Math.round((await handle.stat()).mtimeMs)
  } catch (error) {
    if (isMissing(error)) return undefined
    throw error
  }
}
