import { open, readFile } from 'node:fs/promises'
import type { Logger } from '../runtime/log.ts'
import { keySetBytesMax } from './fetch-key-set.ts'
import type { KeySource, VerificationKey } from './verification-key.ts'
import { keepIdentity } from './verification-key.ts'

export interface KeySetStatus {
  /** In force; none means that every token is refused. */
  readonly keys: number
  /** Since the set was last known to be what its source says; undefined before the first time. */
  readonly ageSeconds: number | undefined
  /** Why the last look failed; undefined when it did not. */
  readonly lastError: string | undefined
}

/** Public keys from elsewhere. The last good set stays in force whatever happens to its source. */
export interface KeySet extends KeySource, AsyncDisposable {
  status(): KeySetStatus
  /** Looks now. Rejects with what is wrong; the old set is kept. */
  reload(): Promise<void>
}

export interface KeySetDeps {
  readonly now: () => number
  /** 0 ≤ random() < 1. */
  readonly random: () => number
  readonly log: Logger
}

type Keys = ReadonlyMap<string, VerificationKey>

/** The set in force, and how it came to be. */
export interface CurrentKeys {
  readonly keys: Keys
  status(): KeySetStatus
  /** Puts in force what `get` comes back with; the map in force, again, means that nothing has changed. Rejects as `get`. */
  load(get: () => Promise<Keys>): Promise<void>
  /** What was in force at that time. */
  restore(saved: Keys, savedAtMs: number): void
}

/** A `kid` that is not known may be news, or anyone's invention: it costs one look in this time at most. */
export const lookAgainMs = 10_000

export function createCurrentKeys(now: () => number): CurrentKeys {
  let keys: Keys = new Map()
  let goodAtMs: number | undefined
  let lastError: string | undefined
  return {
    get keys() {
      return keys
    },
    load: async (get) => {
      try {
        const fresh = await get()
        if (fresh !== keys) keys = keepIdentity(keys, fresh)
        goodAtMs = now()
        lastError = undefined
      } catch (error) {
        lastError = describeError(error)
        throw error
      }
    },
    restore: (saved, savedAtMs) => {
      keys = saved
      goodAtMs = savedAtMs
    },
    status: () => ({
      keys: keys.size,
      ageSeconds: goodAtMs === undefined ? undefined : Math.max(0, (now() - goodAtMs) / 1000),
      lastError,
    }),
  }
}

/** One look in `lookAgainMs`, shared by all that come while it lasts. `look` never rejects. */
export function limitLooks(look: () => Promise<unknown>, now: () => number): () => Promise<void> | undefined {
  let lookedAtMs = -Infinity
  let looking: Promise<void> | undefined
  return () => {
    if (looking) return looking
    if (now() - lookedAtMs < lookAgainMs) return undefined
    lookedAtMs = now()
    looking = look().then(() => (looking = undefined))
    return looking
  }
}

/** Tells once of each change in what is passed over: it is the same at each look. */
export function tellPassedOver(keySet: string, log: Logger): (why: readonly string[]) => void {
  let last = ''
  return (why) => {
    const text = why.join('\n')
    if (text !== '' && text !== last)
      log.warn({ keySet, keys: why.length, why: why.slice(0, 10) }, 'keys of the set cannot be used')
    last = text
  }
}

/** The text of a file no larger than a key set may be. */
export async function readKeySetFile(file: string): Promise<string> {
  await using handle = await open(file, 'r')
  const { size } = await handle.stat()
  if (size > keySetBytesMax) throw new Error(`it has ${size} bytes, at most ${keySetBytesMax} are read`)
  return await readFile(handle, 'utf8')
}

/** Network errors say what happened in their cause. */
export function describeError(error: unknown): string {
  if (!(error instanceof Error)) return String(error)
  const { message, cause } = error
  if (message !== '') return message
  return cause instanceof Error ? cause.message : error.name
}
