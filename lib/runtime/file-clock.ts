import { open, unlink } from 'node:fs/promises'
import { join } from 'node:path'
import { ignoreMissing } from './files.ts'
import type { Logger } from './log.ts'

export interface FileClock extends AsyncDisposable {
  /** Milliseconds since 1970 by the clock of the file system, as times of modification are. */
  now(): number
}

const measureMs = 60_000

/**
 * A clock that all who share a directory agree on, whatever their own say: that of the file server. Written to a file of our own
 * every minute.
 *
 * @param name of this process, among those that share the directory
 */
export async function startFileClock(
  directory: string,
  { name, now, log }: { name: string; now: () => number; log: Logger },
): Promise<FileClock> {
  const file = join(directory, `.clock-${name}`)
  let offsetMs = 0
  const measure = async () => {
    await using handle = await open(file, 'w', 0o600)
    const before = now()
    await handle.writeFile('clock\n')
    // On a network nothing has a time before it is there.
    await handle.sync()
    const { mtimeMs } = await handle.stat()
    offsetMs = mtimeMs - (before + now()) / 2
  }
  await measure()
  const timer = setInterval(() => {
    measure().catch((error: unknown) => {
      log.warn({ err: error, file }, 'the clock of the shared directory cannot be read')
    })
  }, measureMs)
  timer.unref()
  return {
    now: () => now() + offsetMs,
    [Symbol.asyncDispose]: async () => {
      clearInterval(timer)
      await unlink(file).catch(ignoreMissing)
    },
  }
}
