import { LRUCache } from 'lru-cache'
import { RequestError } from '../../lib/client/http.ts'
import type { PulledManifest, RegistryClient } from '../../lib/client/registry-client.ts'
import type { Digest } from '../../lib/protocol/digest.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { BlobCache } from '../blob-cache.ts'
import type { BlobFetcher } from '../blob-fetcher.ts'
import { isRefusal } from '../blob-fetcher.ts'
import type { ReleaseVerifier } from '../release-verifier.ts'
import { UnverifiedError } from '../release-verifier.ts'
import type { ManifestContent } from '../manifest.ts'
import { parseManifest } from '../manifest.ts'
import { MirrorError, cannotHelp } from './mirror-error.ts'

export interface CatalogueDeps {
  registry: Pick<RegistryClient, 'pullChangedManifest' | 'statBlob'>
  cache: Pick<BlobCache, 'find'>
  blobs: Pick<BlobFetcher, 'progress'>
  /** Rejects where this host does not take a manifest, or nobody can tell; undefined: it takes all. */
  verify: ReleaseVerifier['verify'] | undefined
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
  /** The rules by which manifests are taken are others now. */
  forgetApprovals(): void
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
/** Who has signed a manifest is asked once; the time that a client is kept waiting for it. */
const verifyMs = 5000
const approvedMax = 50_000

interface Known extends PulledManifest {
  readonly content: ManifestContent
  allowedAtMs: number
}

export function createCatalogue({
  registry,
  cache,
  blobs,
  verify,
  monotonic,
  log,
}: CatalogueDeps): Catalogue {
  const manifests = new LRUCache<string, Known>({
    max: manifestsMax,
    maxSize: manifestsMaxBytes,
    sizeCalculation: ({ bytes }) => bytes.length + 1,
  })
  const tags = new LRUCache<string, { readonly digest: Digest; readonly seenAtMs: number }>({ max: tagsMax })
  const sizes = new LRUCache<string, { readonly sizeBytes: number; readonly allowedAtMs: number }>({
    max: sizesMax,
  })
  /** Manifests that this host takes, by tag or digest; those that an index names with it. */
  let approved = new LRUCache<string, true>({ max: approvedMax })
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
    for (const { digest, sizeBytes } of known.content.blobs)
      sizes.set(`${repository}@${digest}`, { sizeBytes, allowedAtMs: known.allowedAtMs })
    return known
  }

  /** @throws MirrorError where this host does not take it: the registry may, and its client */
  const approve = async (
    repository: string,
    tag: string | undefined,
    { digest, content }: Known,
    signal: AbortSignal,
  ): Promise<void> => {
    if (!verify) return
    const taken = approved
    const key = tag === undefined ? `${repository}@${digest}` : `${repository}:${tag}@${digest}`
    if (!taken.has(key)) {
      try {
        await verify({ repository, tag, digest }, AbortSignal.any([signal, AbortSignal.timeout(verifyMs)]))
      } catch (error) {
        signal.throwIfAborted()
        if (tag === undefined && (await isNamedByApproved(repository, digest, signal))) return
        const why =
          error instanceof UnverifiedError
            ? `This host does not take ${repository}@${digest}`
            : `Nobody can tell who has signed ${repository}@${digest}`
        throw cannotHelp('MANIFEST_UNKNOWN', `${why}: ${(error as Error).message}`, error)
      }
    }
    // An index may name indexes, so what counts with another passes it on.
    for (const each of [key, ...[digest, ...content.manifests].map((named) => `${repository}@${named}`)])
      taken.set(each, true)
  }

  /** Whether an index that is known here names it and is signed: a client that has the index does not ask for it again, and rules may have changed since. */
  const isNamedByApproved = async (
    repository: string,
    digest: Digest,
    signal: AbortSignal,
  ): Promise<boolean> => {
    const naming = [...manifests].filter(
      ([key, { digest: its, content }]) =>
        key === `${repository}@${its}` && content.manifests.includes(digest),
    )
    const until = monotonic() + verifyMs
    for (const [, index] of naming) {
      if (monotonic() > until) break
      try {
        await approve(repository, undefined, index, signal)
        return true
      } catch (error) {
        if (!(error instanceof MirrorError)) throw error
      }
    }
    return false
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
    forgetApprovals: () => {
      // What is being verified now is by the rules of before.
      approved = new LRUCache({ max: approvedMax })
    },
    manifest: async (repository, reference, signal) => {
      const isTag = typeof reference === 'object'
      const name = isTag ? reference.tag : reference
      const key = isTag ? `${repository}:${name}` : `${repository}@${name}`
      const known = isTag ? knownTag(key, repository) : manifests.get(key)
      // A tag moves: the server is asked each time.
      if (known && !isTag && isFresh(known)) {
        await approve(repository, undefined, known, signal)
        return known
      }
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
        if (known) {
          await approve(repository, isTag ? name : undefined, known, signal)
          return known
        }
        throw cannotHelp(
          'MANIFEST_UNKNOWN',
          `The server does not answer, and ${repository}:${name} is not held`,
        )
      }
      const manifest = answer.value ? { ...answer.value, content: contentOf(answer.value.bytes) } : known
      if (!manifest) throw cannotHelp('MANIFEST_UNKNOWN', `The server sent no manifest ${repository}:${name}`)
      const current = allow(repository, { ...manifest, allowedAtMs: 0 })
      manifests.set(`${repository}@${current.digest}`, current)
      if (isTag) tags.set(key, { digest: current.digest, seenAtMs: monotonic() })
      await approve(repository, isTag ? name : undefined, current, signal)
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

/** What a manifest names; nothing where it is of a kind that is not known. */
function contentOf(bytes: Uint8Array): ManifestContent {
  try {
    return parseManifest(bytes)
  } catch (error) {
    if (error instanceof ClientError) return { blobs: [], manifests: [] }
    throw error
  }
}
