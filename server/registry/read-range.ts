import type { FileHandle } from 'node:fs/promises'
import { open } from 'node:fs/promises'

/** What is read at once: it is sent while it is still in the processor's cache. */
const chunkBytes = 256 * 1024
/** Buffers that wait for the next reader. */
const spareMax = 64
const spare: Buffer[] = []

/**
 * Bytes `[start, end)` of a file, the next chunk being read while its reader has the one before. A chunk is good until the next one is asked
 * for: two buffers go round, since memory that the kernel has to clear first costs as much as the reading.
 *
 * @throws Error of the system; Error naming the file where it ends too early
 */
export async function* readRange(
  file: string,
  start: number,
  end: number,
  signal: AbortSignal,
): AsyncGenerator<Buffer> {
  if (end <= start) return
  await using handle = await open(file, 'r')
  const pair = [takeBuffer(), takeBuffer()] as const
  let [current, following] = pair
  const readInto = async (buffer: Buffer, position: number) =>
    readOnce(handle, buffer, position, Math.min(chunkBytes, end - position))
  let reading = readInto(current, start)
  try {
    for (let at = start; at < end;) {
      const bytes = await reading
      signal.throwIfAborted()
      if (bytes === 0) throw new Error(`${file} ends at byte ${at}, ${end} were wanted`)
      at += bytes
      if (at < end) reading = readInto(following, at)
      yield current.subarray(0, bytes)
      ;[current, following] = [following, current]
    }
  } finally {
    await reading.catch(() => undefined)
    for (const buffer of pair) if (spare.length < spareMax) spare.push(buffer)
  }
}

async function readOnce(
  handle: FileHandle,
  buffer: Buffer,
  position: number,
  length: number,
): Promise<number> {
  const { bytesRead } = await handle.read(buffer, 0, length, position)
  return bytesRead
}

function takeBuffer(): Buffer {
  return spare.pop() ?? Buffer.allocUnsafeSlow(chunkBytes)
}
