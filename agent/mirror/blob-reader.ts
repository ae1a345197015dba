import type { FileHandle } from 'node:fs/promises'
import { open } from 'node:fs/promises'
import type { Digest } from '../../lib/protocol/digest.ts'
import { isMissing } from '../../lib/runtime/files.ts'
import type { BlobCache } from '../blob-cache.ts'
import { NoSpaceError } from '../blob-cache.ts'
import type { Arrival, BlobFetcher, BlobWant } from '../blob-fetcher.ts'
import { WrongDigestError } from '../blob-fetcher.ts'
import { MirrorError } from './mirror-error.ts'

/** The verified bytes of one blob, whether they are all here or still on their way. */
export interface BlobReader extends AsyncDisposable {
  readonly from: 'cache' | 'swarm'
  /**
   * Reads verified bytes from `position` on, before `end`: as many as are there and fit into `buffer`, and waits for the first. The last byte of a blob
   * is there once the SHA-256 of the whole is right.
   *
   * @throws Error when they do not come, or the blob turns out to be another
   */
  read(buffer: Uint8Array, position: number, end: number): Promise<number>
}

/** Reads blobs from the cache, and has those fetched that are not in it. */
export interface BlobReaders extends AsyncDisposable {
  /** Readers of blobs that are on their way. */
  readonly waiting: number
  /** @throws MirrorError 503 when too many readers wait already */
  open(want: BlobWant, signal: AbortSignal): Promise<BlobReader>
}

export interface BlobReadersDeps {
  cache: Pick<BlobCache, 'find' | 'touch' | 'hold' | 'file' | 'partialFile' | 'quotaBytes'>
  blobs: Pick<BlobFetcher, 'fetch'>
}

/** Of those that wait. */
const readersMax = 64
/** A fetch of which nothing comes for this long is not waited for: by then the watchdog has tried all it knows. */
const silenceMs = 30_000
/** A client that was cut off comes back for the rest within this. */
const lingerMs = 5_000
/** A fetch that no client waits for any more goes to its end if so much of it is there. */
const nearlyDone = 0.9

/** A fetch, and who reads it. */
interface Pull {
  readonly want: BlobWant
  readonly abort: AbortController
  readonly listeners: Set<() => void>
  readers: number
  arrival: Arrival | undefined
  outcome: 'under way' | 'done' | Error
  lingering: NodeJS.Timeout | undefined
}

export function createBlobReaders({ cache, blobs }: BlobReadersDeps): BlobReaders {
  const pulls = new Map<Digest, Pull>()
  let readers = 0

  const start = (want: BlobWant): Pull => {
    const pull: Pull = {
      want,
      abort: new AbortController(),
      listeners: new Set(),
      readers: 0,
      arrival: undefined,
      outcome: 'under way',
      lingering: undefined,
    }
    pulls.set(want.digest, pull)
    const changed = () => {
      for (const listener of pull.listeners) listener()
    }
    const watch = new DisposableStack()
    const settle = (outcome: Pull['outcome']) => {
      pull.outcome = outcome
      clearTimeout(pull.lingering)
      watch.dispose()
      if (pulls.get(want.digest) === pull) pulls.delete(want.digest)
      changed()
    }
    blobs
      .fetch(want, pull.abort.signal, (arrival) => {
        pull.arrival = arrival
        watch.use(arrival.onChange(changed))
        changed()
      })
      .then(
        () => {
          settle('done')
        },
        (error: unknown) => {
          settle(error instanceof Error ? error : new Error(String(error)))
        },
      )
    return pull
  }

  const giveUp = (pull: Pull, reason: string) => {
    if (pulls.get(pull.want.digest) === pull) pulls.delete(pull.want.digest)
    pull.abort.abort(new Error(reason))
  }

  const leave = (pull: Pull) => {
    readers--
    pull.readers--
    if (pull.readers > 0 || pull.outcome !== 'under way') return
    pull.lingering = setTimeout(() => {
      const done = pull.arrival?.bytesDone ?? 0
      if (pull.readers === 0 && done < nearlyDone * pull.want.sizeBytes)
        giveUp(pull, 'no client waits for it any more')
    }, lingerMs)
  }

  const join = (want: BlobWant): Pull => {
    if (want.sizeBytes > cache.quotaBytes)
      throw new NoSpaceError(`the blob has ${want.sizeBytes} bytes, the disk quota is ${cache.quotaBytes}`)
    if (readers >= readersMax)
      throw new MirrorError(503, 'TOOMANYREQUESTS', `${readersMax} clients wait for blobs already`)
    const pull = pulls.get(want.digest) ?? start(want)
    clearTimeout(pull.lingering)
    pull.readers++
    readers++
    return pull
  }

  return {
    get waiting() {
      return readers
    },
    open: async (want, signal) => {
      const owned = new AsyncDisposableStack()
      try {
        owned.use(cache.hold(want.digest))
        if (await cache.find(want.digest, want.sizeBytes)) {
          await cache.touch(want.digest)
          const file = owned.use(await open(cache.file(want.digest)))
          return {
            from: 'cache',
            read: (buffer, position, end) => readSome(file, buffer, position, end),
            [Symbol.asyncDispose]: () => owned.disposeAsync(),
          }
        }
        signal.throwIfAborted()
        const pull = join(want)
        owned.defer(() => {
          leave(pull)
        })
        let opened: { readonly file: FileHandle; readonly wrongTries: number | undefined } | undefined
        return {
          from: 'swarm',
          read: async (buffer, position, end) => {
            const verified = await verifiedFrom(pull, position, signal)
            if (!opened) {
              const wrongTries = pull.arrival?.wrongTries
              opened = { file: owned.use(await openEither(cache, want.digest)), wrongTries }
            }
            const bytesRead = await readSome(opened.file, buffer, position, Math.min(end, verified))
            if (opened.wrongTries !== pull.arrival?.wrongTries)
              throw new WrongDigestError(`Cannot serve ${want.digest}: the bytes that came are not its own`)
            return bytesRead
          },
          [Symbol.asyncDispose]: () => owned.disposeAsync(),
        }
      } catch (error) {
        await owned.disposeAsync()
        throw error
      }
    },
    [Symbol.asyncDispose]: async () => {
      for (const pull of [...pulls.values()]) {
        clearTimeout(pull.lingering)
        giveUp(pull, 'the agent is ending')
      }
    },
  }
}

/** Waits until the byte at `position` may be served. @returns where the bytes that may be served end */
async function verifiedFrom(pull: Pull, position: number, signal: AbortSignal): Promise<number> {
  for (;;) {
    signal.throwIfAborted()
    const { outcome, arrival, want } = pull
    if (outcome instanceof Error) throw outcome
    if (outcome === 'done') return want.sizeBytes
    if (arrival) {
      const verified = arrival.verifiedEnd(position)
      const end = arrival.isRight ? verified : Math.min(verified, want.sizeBytes - 1)
      if (end > position) return end
      if (arrival.lacksRoom) throw new NoSpaceError(`there is no room for ${want.digest}`)
    }
    await changeOf(pull, signal)
  }
}

function changeOf(pull: Pull, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer)
      pull.listeners.delete(changed)
      signal.removeEventListener('abort', left)
    }
    const changed = () => {
      end()
      resolve()
    }
    const left = () => {
      end()
      reject(signal.reason as Error)
    }
    const timer = setTimeout(() => {
      end()
      reject(new Error(`nothing of ${pull.want.digest} came for ${silenceMs / 1000} s`))
    }, silenceMs)
    pull.listeners.add(changed)
    signal.addEventListener('abort', left, { once: true })
  })
}

/** The part, or the blob that it has become. */
async function openEither(
  cache: Pick<BlobCache, 'file' | 'partialFile'>,
  digest: Digest,
): Promise<FileHandle> {
  return open(cache.partialFile(digest)).catch((error: unknown) => {
    if (isMissing(error)) return open(cache.file(digest))
    throw error
  })
}

async function readSome(
  file: FileHandle,
  buffer: Uint8Array,
  position: number,
  end: number,
): Promise<number> {
  const { bytesRead } = await file.read(buffer, 0, Math.min(buffer.length, end - position), position)
  if (bytesRead === 0) throw new Error(`the file ends at byte ${position}, before ${end}`)
  return bytesRead
}
