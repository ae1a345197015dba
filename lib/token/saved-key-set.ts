import { stat } from 'node:fs/promises'
import { isMissing, writeFileAtomic } from '../runtime/files.ts'
import type { Logger } from '../runtime/log.ts'
import { readKeySetFile } from './current-keys.ts'
import type { VerificationKey } from './verification-key.ts'
import { parseKeySet, writeKeySet } from './verification-key.ts'

/**
 * The last good key set of a URL, as it was saved. Undefined where there is none that can be used: the URL has the last
 * word anyway.
 */
export async function readSavedKeySet(
  file: string,
  url: string,
  log: Logger,
): Promise<{ keys: Map<string, VerificationKey>; fetchedAtMs: number } | undefined> {
  try {
    // Its keys are public, but whoever can write it can sign.
    if (((await stat(file)).mode & 0o022) !== 0) throw new Error('others can write it')
    const saved = JSON.parse(await readKeySetFile(file)) as { url?: unknown; fetchedAt?: unknown }
    // Of another URL: what was trusted then is not what is trusted now.
    if (saved.url !== url) return undefined
    const fetchedAtMs = Date.parse(String(saved.fetchedAt))
    if (Number.isNaN(fetchedAtMs)) throw new Error('it does not say when it was fetched')
    return { keys: parseKeySet(saved), fetchedAtMs }
  } catch (error) {
    if (!isMissing(error)) log.warn({ file, reason: (error as Error).message }, 'saved key set passed over')
    return undefined
  }
}

/** Keeps a key set for the next start. That it cannot be kept is told; the keys are in force without it. */
export async function saveKeySet({
  file,
  url,
  keys,
  nowMs,
  log,
}: {
  file: string
  url: string
  keys: ReadonlyMap<string, VerificationKey>
  nowMs: number
  log: Logger
}): Promise<void> {
  const saved = { url, fetchedAt: new Date(nowMs).toISOString(), ...writeKeySet(keys.values()) }
  try {
    await writeFileAtomic(file, `${JSON.stringify(saved)}\n`, { mode: 0o600 })
  } catch (error) {
    log.warn({ file, err: error }, 'key set not saved')
  }
}
