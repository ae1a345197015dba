import { randomBytes } from 'node:crypto'
import { open, readFile, rename, stat, unlink, utimes } from 'node:fs/promises'
import { delay } from './backoff.ts'
import { monotonicMs } from './clock.ts'
import { errorCode, ignoreMissing } from './files.ts'

export interface FileLockOptions {
  /** A lock that nobody has renewed for this long is of a process that is gone. Counted by our own clock, never read off the file. */
  readonly staleMs?: number
  /** Between two looks at a lock that another has. */
  readonly pollMs?: number
  readonly waitMaxMs?: number
}

/**
 * Does work that one process at a time may do, of all that share a directory: who creates the file has the lock. Needs nothing of the
 * file system but that creating a file that is there fails, and renaming one that is gone, as NFS promises.
 *
 * A process that stands still for longer than `staleMs` and then goes on has lost its lock and does not know it: the work must be
 * such that doing it twice does no harm.
 *
 * @throws Error naming the lock that another process has kept for `waitMaxMs`
 */
export async function withFileLock<Result>(
  file: string,
  work: () => Promise<Result>,
  { staleMs = 10_000, pollMs = 100, waitMaxMs = 60_000 }: FileLockOptions = {},
): Promise<Result> {
  const own = randomBytes(8).toString('hex')
  const startedMs = monotonicMs()
  let seen: { version: string; atMs: number } | undefined
  while (!(await create(file, own))) {
    const nowMs = monotonicMs()
    if (nowMs - startedMs > waitMaxMs)
      throw new Error(
        `Cannot get the lock ${file}: another server has had it for ${waitMaxMs / 1000} s; remove it if none runs`,
      )
    const version = await versionOfLock(file)
    if (version !== undefined && seen?.version === version && nowMs - seen.atMs >= staleMs)
      await breakLock(file, version)
    else if (seen?.version !== version && version !== undefined) seen = { version, atMs: nowMs }
    await delay(pollMs, new AbortController().signal)
  }
  const renewal = setInterval(() => {
    const now = new Date()
    utimes(file, now, now).catch(() => undefined)
  }, staleMs / 4)
  try {
    return await work()
  } finally {
    clearInterval(renewal)
    if ((await readFile(file, 'utf8').catch(ignoreMissing)) === own) await unlink(file).catch(ignoreMissing)
  }
}

async function create(file: string, own: string): Promise<boolean> {
  try {
    await using handle = await open(file, 'wx', 0o600)
    await handle.writeFile(own)
    return true
  } catch (error) {
    if (errorCode(error) === 'EEXIST') return false
    throw error
  }
}

async function versionOfLock(file: string): Promise<string | undefined> {
  const own = await readFile(file, 'utf8').catch(ignoreMissing)
  const found = await stat(file, { bigint: true }).catch(ignoreMissing)
  return own === undefined || !found ? undefined : `${own} ${found.mtimeNs}`
}

/** Moved aside first: of several that find it stale one succeeds. */
async function breakLock(file: string, version: string): Promise<void> {
  const aside = `${file}.${randomBytes(6).toString('hex')}`
  try {
    await rename(file, aside)
  } catch (error) {
    ignoreMissing(error)
    return
  }
  // Another was faster, and this is the lock of who came after it.
  if ((await versionOfLock(aside)) !== version) await rename(aside, file)
  else await unlink(aside)
}
