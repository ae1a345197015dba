// SHA-256 of files that are still being written: each is read in order as far as its bytes are verified.
import { createHash } from 'node:crypto'
import type { Hash } from 'node:crypto'
import type { FileHandle } from 'node:fs/promises'
import { open } from 'node:fs/promises'
import { parentPort } from 'node:worker_threads'
import type { HashReply, HashRequest } from './prefix-hasher.ts'

interface Job {
  readonly file: string
  readonly length: number
  readonly hash: Hash
  handle: FileHandle | undefined
  /** One for all reads: a new one for each would pile up until the collector runs. */
  buffer: Buffer | undefined
  position: number
  wanted: number
  busy: boolean
}

const chunkBytes = 1024 * 1024
const jobs = new Map<number, Job>()

parentPort?.on('message', (message: HashRequest) => {
  if (message.kind === 'open') {
    const { id, file, length } = message
    jobs.set(id, {
      file,
      length,
      hash: createHash('sha256'),
      handle: undefined,
      buffer: undefined,
      position: 0,
      wanted: 0,
      busy: false,
    })
    return
  }
  const job = jobs.get(message.id)
  if (!job) return
  if (message.kind === 'close') {
    jobs.delete(message.id)
    if (!job.busy) void job.handle?.close()
    return
  }
  job.wanted = Math.max(job.wanted, message.bytes)
  if (!job.busy) void follow(message.id, job)
})

async function follow(id: number, job: Job): Promise<void> {
  job.busy = true
  try {
    job.handle ??= await open(job.file, 'r')
    const buffer = (job.buffer ??= Buffer.allocUnsafeSlow(chunkBytes))
    while (job.position < job.wanted && jobs.has(id)) {
      const { bytesRead } = await job.handle.read(
        buffer,
        0,
        Math.min(chunkBytes, job.wanted - job.position),
        job.position,
      )
      if (bytesRead === 0)
        throw new Error(`Cannot hash ${job.file}: it ends at byte ${job.position}, need ${job.wanted}`)
      job.hash.update(buffer.subarray(0, bytesRead))
      job.position += bytesRead
    }
    if (job.position === job.length && jobs.delete(id)) reply({ id, hex: job.hash.digest('hex') })
  } catch (error) {
    jobs.delete(id)
    reply({ id, error: error instanceof Error ? error.message : String(error) })
  } finally {
    job.busy = false
    if (!jobs.has(id)) await job.handle?.close()
  }
}

function reply(message: HashReply): void {
  parentPort?.postMessage(message)
}
