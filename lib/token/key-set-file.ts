import type { FSWatcher } from 'node:fs'
import { watch } from 'node:fs'
import { stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { isMissing } from '../runtime/files.ts'
import { createTurn } from '../runtime/turn.ts'
import type { KeySet, KeySetDeps } from './current-keys.ts'
import {
  createCurrentKeys,
  describeError,
  limitLooks,
  readKeySetFile,
  tellPassedOver,
} from './current-keys.ts'
import { parseKeySet } from './verification-key.ts'

export interface KeySetFile {
  readonly file: string
}

/** For file systems that tell of nothing (NFS, some containers). */
const pollMs = 10_000

/** A JWKS file, read again whenever it changes. @throws Error naming the file and what is wrong */
export async function openKeySetFile({ file }: KeySetFile, deps: KeySetDeps): Promise<KeySet> {
  const { now, log } = deps
  const current = createCurrentKeys(now)
  const turn = createTurn()
  const passedOver = tellPassedOver(file, log)
  let seen: string | undefined

  const read = async () => {
    seen = await fingerprintOf(file)
    try {
      await current.load(async () => parseKeySet(JSON.parse(await readKeySetFile(file)), passedOver))
    } catch (cause) {
      throw new Error(`Cannot read key set ${file}: ${describeError(cause)}`, { cause })
    }
  }
  const readIfChanged = () =>
    turn(async () => {
      if ((await fingerprintOf(file)) === seen) return
      await read()
      log.info({ file, keys: current.keys.size }, 'key set changed')
    }).catch((error: unknown) => {
      log.warn(
        { reason: describeError(error) },
        'key set changed and cannot be used; the last good one stays',
      )
    })

  await read()
  const watcher = watchDirectoryOf(file, deps, () => void readIfChanged())
  const poll = setInterval(() => void readIfChanged(), pollMs)
  poll.unref()
  return {
    get keys() {
      return current.keys
    },
    status: () => current.status(),
    lookAgain: limitLooks(readIfChanged, now),
    reload: () => turn(read),
    [Symbol.asyncDispose]: async () => {
      watcher?.close()
      clearInterval(poll)
      await turn(async () => undefined)
    },
  }
}

/** The directory, since a file that is replaced is another file, and a mounted one is a link that moves. */
function watchDirectoryOf(file: string, { log }: KeySetDeps, changed: () => void): FSWatcher | undefined {
  try {
    const watcher = watch(dirname(file), { persistent: false }, changed)
    watcher.on('error', (error) => {
      log.warn({ err: error, file }, 'key set is not watched, only polled')
    })
    return watcher
  } catch (error) {
    log.warn({ err: error, file }, 'key set is not watched, only polled')
    return undefined
  }
}

/** Tells a file from what it was; empty while there is none. */
async function fingerprintOf(file: string): Promise<string> {
  try {
    const { dev, ino, size, mtimeNs, ctimeNs } = await stat(file, { bigint: true })
    return [dev, ino, size, mtimeNs, ctimeNs].join(' ')
  } catch (error) {
    if (isMissing(error)) return ''
    throw error
  }
}
