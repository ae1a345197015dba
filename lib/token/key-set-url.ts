import { backoff, delay } from '../runtime/backoff.ts'
import type { KeySet, KeySetDeps } from './current-keys.ts'
import { createCurrentKeys, describeError, limitLooks, tellPassedOver } from './current-keys.ts'
import type { KeySetReply } from './fetch-key-set.ts'
import { createKeySetFetcher } from './fetch-key-set.ts'
import { readSavedKeySet, saveKeySet } from './saved-key-set.ts'
import { parseKeySet } from './verification-key.ts'

export interface KeySetUrl {
  /** `https:`, or `http:` on a network that is trusted with the keys. */
  readonly url: string
  /** The URL is that of the OpenID configuration of this issuer, which says where the set is. */
  readonly issuer?: string | undefined
  /** How often it is fetched, unless its `Cache-Control: max-age` asks otherwise within bounds. Default 5 min. */
  readonly refreshIntervalMs?: number | undefined
  /** For one fetch, all of it. Default 5 s. */
  readonly timeoutMs?: number | undefined
  /** Where the last good set is kept, for a start while the URL is down. */
  readonly cacheFile?: string | undefined
  /** PEM of the authority that signed the certificate of the URL. */
  readonly ca?: string | undefined
}

const refreshIntervalMs = 300_000
const timeoutMs = 5_000
/** Within these `max-age` is followed: less would be a flood, more would keep a key that was given up for too long. */
const refreshMinMs = 30_000
const refreshMaxMs = 900_000
const retryFirstMs = 500
const retryMaxMs = 60_000

/** A JWKS URL, fetched at intervals. It opens whether the URL answers or not. @throws Error when the URL is none */
export async function openKeySetUrl(source: KeySetUrl, { now, random, log }: KeySetDeps): Promise<KeySet> {
  const { url, cacheFile } = source
  const intervalMs = source.refreshIntervalMs ?? refreshIntervalMs
  const fetcher = createKeySetFetcher({ ...source, timeoutMs: source.timeoutMs ?? timeoutMs })
  const { name } = fetcher
  const current = createCurrentKeys(now)
  const passedOver = tellPassedOver(name, log)
  const ended = new AbortController()
  let waitMs = intervalMs
  let etag: string | undefined

  const fetchKeys = async () => {
    const before = current.keys
    await current.load(async () => {
      const reply = await fetcher.fetch(etag, ended.signal)
      const keys = reply.kind === 'unchanged' ? before : parseKeySet(reply.json, passedOver)
      // Only now: "unchanged" must mean a set that could be used.
      if (reply.kind === 'fresh') ({ etag } = reply)
      waitMs = refreshWaitMs(reply, intervalMs)
      return keys
    })
    if (current.keys !== before) log.info({ url: name, keys: current.keys.size }, 'key set fetched')
    if (cacheFile !== undefined)
      await saveKeySet({ file: cacheFile, url, keys: current.keys, nowMs: now(), log })
  }
  let fetching: Promise<void> | undefined
  /** One fetch at a time, shared by all that want one. */
  const refresh = () =>
    (fetching ??= fetchKeys()
      .catch((cause: unknown) => {
        throw new Error(`Cannot fetch key set ${name}: ${describeError(cause)}`, { cause })
      })
      .finally(() => (fetching = undefined)))
  const refreshed = async (): Promise<boolean> => {
    try {
      await refresh()
      return true
    } catch (error) {
      if (!ended.signal.aborted)
        log.warn(
          { reason: describeError(error), keys: current.keys.size },
          'the last good key set stays in force',
        )
      return false
    }
  }
  const keepFresh = async (first: Promise<boolean>) => {
    const maxMs = Math.max(retryFirstMs, Math.min(intervalMs, retryMaxMs))
    const newRetries = () => backoff({ firstMs: retryFirstMs, maxMs, random })
    let retries = newRetries()
    for (let good = await first; ;) {
      // Jitter: a fleet of trackers that started together does not fetch together.
      await delay(good ? waitMs * (0.9 + 0.2 * random()) : retries.next().value, ended.signal)
      good = await refreshed()
      if (good) retries = newRetries()
    }
  }

  const saved = cacheFile === undefined ? undefined : await readSavedKeySet(cacheFile, url, log)
  if (saved) current.restore(saved.keys, saved.fetchedAtMs)
  const first = refreshed()
  // What was saved is good enough to begin with: a URL that hangs keeps nobody from starting.
  if (!saved) await first
  const loop = keepFresh(first).catch((error: unknown) => {
    if (!ended.signal.aborted) throw error
  })
  return {
    get keys() {
      return current.keys
    },
    status: () => current.status(),
    lookAgain: limitLooks(refreshed, now),
    reload: refresh,
    [Symbol.asyncDispose]: async () => {
      ended.abort(new Error('the key set was closed'))
      await loop
      await fetching?.catch(() => undefined)
      await fetcher[Symbol.asyncDispose]()
    },
  }
}

/** When to fetch again, as the reply asks within bounds; without a word of it, at the interval. */
export function refreshWaitMs(
  { maxAgeSeconds }: Pick<KeySetReply, 'maxAgeSeconds'>,
  intervalMs: number,
): number {
  if (maxAgeSeconds === undefined) return intervalMs
  const least = Math.min(intervalMs, refreshMinMs)
  const most = Math.max(intervalMs, refreshMaxMs)
  return Math.min(Math.max(maxAgeSeconds * 1000, least), most)
}
