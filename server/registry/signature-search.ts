import { LRUCache } from 'lru-cache'
import type { ContentDigest, Digest } from '../../lib/protocol/digest.ts'
import { isSha256 } from '../../lib/protocol/digest.ts'
import { bundleMaxBytes, bundleType, parseAttaching } from '../../lib/protocol/dsse.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import type { ReleaseIdentity } from '../../lib/protocol/statement.ts'
import { checkRelease } from '../../lib/protocol/statement.ts'
import { createSemaphore } from '../../lib/runtime/semaphore.ts'
import type { ReleaseKey } from '../../lib/token/release-keys.ts'
import { openBundle } from '../../lib/token/release-signature.ts'
import { ApiError } from './api-error.ts'
import type { BlobStore } from './blob-store.ts'
import { describeReferrer } from './referrers.ts'

/**
 * Finds the good signature of a release among all that are attached to it. Whoever may push may attach any number of false ones; hosts look at a few, so
 * the server looks at all of them, by the key that a host trusts. It cannot lie: the host checks what it is told.
 */
export interface SignatureSearch {
  /**
   * The manifest that attaches a signature of this release by this key; undefined where none does.
   *
   * @throws ApiError 503 when it takes longer than `searchMs`, or too many wait: whoever asks again finds the search further on
   */
  find(release: ReleaseIdentity, key: ReleaseKey): Promise<ContentDigest | undefined>
}

export interface SignatureSearchDeps {
  readonly store: Pick<BlobStore, 'listReferrers' | 'getManifest' | 'statBlob' | 'readBlob'>
  readonly monotonicMs: () => number
}

/** A false signature costs 0.6 ms here, so some 15 000 are looked at in this time; to push them took ten times as long. */
const searchMs = 10_000
/** Where nothing was found the answer stays for so many times what the search took: hosts that ask for ever take a tenth of the time. */
const restFactor = 10
/** Each has one signature in memory, of 1 MiB at most. */
const searchesAtOnce = 4
/** Different questions; the same one, asked by a thousand hosts, is one search. */
const searchesWaitingMax = 1000
/** What was no good once never is. 250 bytes each. */
const refutedMax = 100_000
const questionsMax = 10_000

/** How the last search for a question ended. */
type SearchEnd =
  | { readonly kind: 'found'; readonly digest: ContentDigest }
  | { readonly kind: 'none'; readonly untilMs: number }
  | { readonly kind: 'cut'; readonly at: ContentDigest }

export function createSignatureSearch({ store, monotonicMs }: SignatureSearchDeps): SignatureSearch {
  const turns = createSemaphore(searchesAtOnce)
  const running = new Map<string, Promise<ContentDigest | undefined>>()
  const refuted = new LRUCache<string, true>({ max: refutedMax })
  const ends = new LRUCache<string, SearchEnd>({ max: questionsMax })

  const inTurn = async <Result>(work: () => Promise<Result>): Promise<Result> => {
    const giveBack = await turns.take()
    try {
      return await work()
    } finally {
      giveBack()
    }
  }

  const search = async (question: string, release: ReleaseIdentity, key: ReleaseKey) => {
    const entryOf = (digest: ContentDigest) => `${question} ${digest}`
    const isGood = async (digest: ContentDigest): Promise<boolean> => {
      const bundle = await bundleOf(release.repository, digest)
      if (bundle === 'absent') return false
      const good = bundle !== undefined && isSigned(bundle, release, key)
      if (!good) refuted.set(entryOf(digest), true)
      return good
    }
    const before = ends.get(question)
    if (before?.kind === 'found' && (await isGood(before.digest))) return before.digest
    const startedMs = monotonicMs()
    if (before?.kind === 'none' && startedMs < before.untilMs) return undefined
    const all = (await store.listReferrers(release.repository, release.digest)).filter(isSha256)
    const from = before?.kind === 'cut' ? before.at : ''
    for (const digest of [...all.filter((each) => each >= from), ...all.filter((each) => each < from)]) {
      if (refuted.has(entryOf(digest))) continue
      if (monotonicMs() - startedMs > searchMs) {
        ends.set(question, { kind: 'cut', at: digest })
        throw busy(`${all.length} things refer to ${release.digest}, and the search goes on`)
      }
      if (await isGood(digest)) {
        ends.set(question, { kind: 'found', digest })
        return digest
      }
    }
    const endedMs = monotonicMs()
    ends.set(question, { kind: 'none', untilMs: endedMs + (endedMs - startedMs) * restFactor })
    return undefined
  }

  /** Undefined: it attaches no signature that hosts would read. `absent`: it may come, or come back. */
  const bundleOf = async (
    repository: string,
    referrer: ContentDigest,
  ): Promise<Buffer | 'absent' | undefined> => {
    const manifest = await store.getManifest(repository, referrer)
    if (!manifest) return 'absent'
    const digest = digestIn(manifest.bytes)
    if (digest === undefined || describeReferrer(manifest)?.artifactType !== bundleType) return undefined
    const blob = await store.statBlob(repository, digest)
    if (!blob) return 'absent'
    if (blob.sizeBytes > bundleMaxBytes) return undefined
    const parts: Uint8Array[] = []
    const whole = { start: 0, end: blob.sizeBytes }
    for await (const part of store.readBlob(digest, whole, AbortSignal.timeout(searchMs)))
      parts.push(Uint8Array.from(part))
    return Buffer.concat(parts)
  }

  return {
    find: (release, key) => {
      const question = [release.repository, release.digest, release.tag ?? '', key.id].join(' ')
      const known = running.get(question)
      if (known) return known
      if (turns.waiting >= searchesWaitingMax)
        return Promise.reject(busy(`${searchesWaitingMax} searches for signatures wait already`))
      const asked = inTurn(() => search(question, release, key)).finally(() => running.delete(question))
      running.set(question, asked)
      return asked
    },
  }
}

function digestIn(manifest: Uint8Array): Digest | undefined {
  try {
    return parseAttaching(manifest).digest
  } catch (error) {
    if (error instanceof ClientError) return undefined
    throw error
  }
}

function isSigned(bundle: Uint8Array, release: ReleaseIdentity, key: ReleaseKey): boolean {
  try {
    checkRelease(openBundle(bundle, [key]).statement, release)
    return true
  } catch (error) {
    if (error instanceof ClientError) return false
    throw error
  }
}

function busy(why: string): ApiError {
  return new ApiError(503, 'TOOMANYREQUESTS', `Cannot tell who has signed it yet: ${why}`, {
    hint: 'Ask again in a moment.',
    headers: { 'retry-after': '2' },
  })
}
