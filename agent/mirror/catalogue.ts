import { LRUCache } from 'lru-cache'
import { RequestError } from '../../lib/client/http.ts'
import type { PulledManifest, RegistryClient } from '../../lib/client/registry-client.ts'
import type { Digest } from '../../lib/protocol/digest.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { BlobCache } from '../blob-cache.ts'
import type { BlobFetcher } from '../blob-fetcher.ts'
import { isRefusal } from '../blob-fetcher.ts'
import type { ManifestBlob } from '../manifest.ts'
import { parseManifest } from '../manifest.ts'
import { cannotHelp } from './mirror-error.ts'

export interface CatalogueDeps {
  registry: Pick<RegistryClient, 'pullChangedManifest' | 'statBlob'>
  cache: Pick<BlobCache, 'find'>
  blobs: Pick<BlobFetcher, 'progress'>
  /** Milliseconds since some start. */
  monotonic: () => number
  log: Logger
}

/**
 * What this host may pull, and what it looks like: asked of the server with the host's own credential, and remembered. While the server is away, what
 * is known counts on. Rejects with MirrorError where the mirror cannot help, within a second whatever the server does.
 */
export interface Catalogue {
  /** Of manifests in memory. */
  readonly manifestBytes: number
  manifest(
    repository: string,
    reference: Digest | { tag: string },
    signal: AbortSignal,
  ): Promise<PulledManifest>
  /** The length of a blob that this host may pull, in bytes. */
  blobSize(repository: string, digest: Digest, signal: AbortSignal): Promise<number>
}

/** The server's answer has to be here by then: a client that is told no goes on to the registry. */
const answerMs = 800
/** A server that did not answer is not asked for this long: the layers of an image come one after the other. */
const awayMs = 1000
/** What the server has allowed counts this long without asking again. */
const allowedMs = 60_000
/** So long may a tag be answered from memory while the server is away. */
const tagAgeMaxMs = 24 * 3600_000
const manifestsMax = 1000
const manifestsMaxBytes = 16 * 1024 * 1024
const tagsMax = 10_000
const sizesMax = 50_000

interface Known extends PulledManifest {
  readonly blobs: readonly ManifestBlob[]
  allowedAtMs: number
}

export function createCatalogue({ registry, cache, blobs, monotonic, log }: CatalogueDeps): Catalogue {
  const manifests = new LRUCache<string, Known>({
    max: manifestsMax,
    maxSize: manifestsMaxBytes,
    sizeCalculation: ({ bytes }) => bytes.length + 1,
  })
  const tags = new LRUCache<string, { readonly digest: Digest; readonly seenAtMs: number }>({ max: tagsMax })
  const sizes = new LRUCache<string, { readonly sizeBytes: number; readonly allowedAtMs: number }>({
    max: sizesMax,
  })
  let awayUntilMs = 0

  /** What the server says; undefined while it is away. @throws MirrorError with its refusal */
  const ask = async <Value>(
    work: (signal: AbortSignal) => Promise<Value>,
    code: 'BLOB_UNKNOWN' | 'MANIFEST_UNKNOWN',
    signal: AbortSignal,
  ): Promise<{ readonly value: Value } | undefined> => {
    if (monotonic() < awayUntilMs) return undefined
    try {
      return { value: await work(AbortSignal.any([signal, AbortSignal.timeout(answerMs)])) }
    } catch (error) {
      signal.throwIfAborted()
      if (isRefusal(error))
        throw cannotHelp(code, `The server does not give it to this host: ${(error as Error).message}`, error)
      // One that answers that it is busy is not away.
      if (!(error instanceof RequestError)) awayUntilMs = monotonic() + awayMs
      log.debug({ error: (error as Error).message }, 'the mirror has no answer from the server')
      return undefined
    }
  }

  const allow = (repository: string, known: Known): Known => {
    known.allowedAtMs = monotonic()
    for (const { digest, sizeBytes } of known.blobs)
      sizes.set(`${repository}@${digest}`, { sizeBytes, allowedAtMs: known.allowedAtMs })
    return known
  }

  const isFresh = (entry: { allowedAtMs: number }) => monotonic() - entry.allowedAtMs < allowedMs

  /** What is known of a tag, while it may be told without the server. */
  const knownTag = (tagKey: string, repository: string) => {
    const tag = tags.get(tagKey)
    if (!tag || monotonic() - tag.seenAtMs > tagAgeMaxMs) return undefined
    return manifests.get(`${repository}@${tag.digest}`)
  }

  return {
    get manifestBytes() {
      return manifests.calculatedSize
    },
    manifest: async (repository, reference, signal) => {
      const isTag = typeof reference === 'object'
      const name = isTag ? reference.tag : reference
      const key = isTag ? `${repository}:${name}` : `${repository}@${name}`
      const known = isTag ? knownTag(key, repository) : manifests.get(key)
      // A tag moves: the server is asked each time.
      if (known && !isTag && isFresh(known)) return known
      const answer = await ask(
        (limited) => registry.pullChangedManifest(repository, name, known?.digest, limited),
        'MANIFEST_UNKNOWN',
        signal,
      ).catch((error: unknown) => {
        if (isTag) tags.delete(key)
        else manifests.delete(key)
        throw error
      })
      if (!answer) {
        if (known) return known
        throw cannotHelp(
          'MANIFEST_UNKNOWN',
          `The server does not answer, and ${repository}:${name} is not held`,
        )
      }
      const manifest = answer.value ? { ...answer.value, blobs: blobsOf(answer.value.bytes) } : known
      if (!manifest) throw cannotHelp('MANIFEST_UNKNOWN', `The server sent no manifest ${repository}:${name}`)
      const current = allow(repository, { ...manifest, allowedAtMs: 0 })
      manifests.set(`${repository}@${current.digest}`, current)
      if (isTag) tags.set(key, { digest: current.digest, seenAtMs: monotonic() })
      return current
    },
    blobSize: async (repository, digest, signal) => {
      const key = `${repository}@${digest}`
      const known = sizes.get(key)
      if (known && isFresh(known)) return known.sizeBytes
      const answer = await ask(
        (limited) => registry.statBlob(repository, digest, limited),
        'BLOB_UNKNOWN',
        signal,
      ).catch((error: unknown) => {
        sizes.delete(key)
        throw error
      })
      if (answer) {
        sizes.set(key, { sizeBytes: answer.value, allowedAtMs: monotonic() })
        return answer.value
      }
      const held = await cache.find(digest)
      if (held) return held.sizeBytes
      // Its swarm goes on without the server.
      if (known && blobs.progress(digest)?.state === 'fetching') return known.sizeBytes
      throw cannotHelp('BLOB_UNKNOWN', `The server does not answer, and ${digest} is not held`)
    },
  }
}

/** Blobs whose lengths a manifest tells; none where it is of a kind that is not known. */
function blobsOf(bytes: Uint8Array): readonly ManifestBlob[] {
  try {
    return parseManifest(bytes).blobs
  } catch (error) {
    if (error instanceof ClientError) return []
    throw error
  }
}
