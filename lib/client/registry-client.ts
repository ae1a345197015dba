import { z } from 'zod'
import type { Digest } from '../protocol/digest.ts'
import { digestOf, parseDigest } from '../protocol/digest.ts'
import { backoff, delay } from '../runtime/backoff.ts'
import type { Answer, HttpClient } from './http.ts'
import { RequestError, UnreachableError } from './http.ts'

export interface PulledManifest {
  readonly digest: Digest
  readonly mediaType: string
  readonly bytes: Buffer
}

/** What refers to a manifest, as a list of referrers describes it. */
export interface Referrer {
  readonly digest: Digest
  readonly sizeBytes: number
  readonly annotations: Readonly<Record<string, string>>
}

/** A file on its way to the registry; `open` may be called again, from any offset, after a dropped connection. */
export interface BlobSource {
  readonly sizeBytes: number
  open(offset: number): AsyncIterable<Uint8Array>
  /** The digest of all that was read, asked for when the last byte has been sent. */
  digest(): Promise<Digest>
}

/** Push and pull by the OCI distribution API. All calls reject with RequestError or UnreachableError. */
export type RegistryClient = ReturnType<typeof createRegistryClient>

const manifestMaxBytes = 16 * 1024 * 1024
const manifestTypes = [
  'application/vnd.oci.image.manifest.v1+json',
  'application/vnd.oci.image.index.v1+json',
  'application/vnd.docker.distribution.manifest.v2+json',
  'application/vnd.docker.distribution.manifest.list.v2+json',
  // Artifacts have manifests of types of their own.
  '*/*',
].join(', ')
/** A page of a thousand referrers has some 600 KiB. */
const referrersPageMaxBytes = 16 * 1024 * 1024
/** Whoever may push may attach as much as they like; further pages are not looked at. */
const referrersPagesMax = 20
const indexType = 'application/vnd.oci.image.index.v1+json'
const ReferrerIndex = z.object({
  manifests: z.array(
    z.object({
      digest: z.string(),
      size: z.int().nonnegative(),
      artifactType: z.string().optional(),
      annotations: z.record(z.string(), z.string()).optional(),
    }),
  ),
})
/** Tries of one step of a push, some 15 s of them: a server that starts again is up by then. */
const triesMax = 8

export function createRegistryClient(http: HttpClient) {
  /** Whether the server has ever answered: one that never did is not away for a moment, but a wrong address or certificate. */
  let reached = false
  /** Tries again, with growing waits, what may go better the next time. */
  const persist = async <Result>(
    work: () => Promise<Result>,
    signal: AbortSignal | undefined,
  ): Promise<Result> => {
    const waits = backoff({ firstMs: 200, maxMs: 5000, random: Math.random })
    for (let tries = 1; ; tries++) {
      try {
        const result = await work()
        reached = true
        return result
      } catch (error) {
        if (!mayPass(error) || !reached || tries >= triesMax) throw error
        await delay(waits.next().value, signal ?? new AbortController().signal)
      }
    }
  }
  const askManifest = async (
    repository: string,
    reference: string,
    known: Digest | undefined,
    signal: AbortSignal | undefined,
  ): Promise<PulledManifest | undefined> => {
    const answer = await http.ok({
      path: `/v2/${repository}/manifests/${reference}`,
      headers: { accept: manifestTypes, ...(known === undefined ? {} : { 'if-none-match': `"${known}"` }) },
      signal,
    })
    if (answer.status === 304) {
      await answer.discard()
      return undefined
    }
    const bytes = await answer.bytes(manifestMaxBytes)
    const digest = digestOf(bytes)
    const wanted = reference.startsWith('sha256:') ? reference : answer.header('docker-content-digest')
    if (wanted !== undefined && wanted !== digest) {
      throw new UnreachableError(
        `Cannot trust manifest ${repository}:${reference}: its bytes have ${digest}, not ${wanted}`,
      )
    }
    return { digest, mediaType: answer.header('content-type') ?? '', bytes }
  }
  return {
    /** A manifest by tag or digest; its bytes have the digest that is returned. */
    pullManifest: async (
      repository: string,
      reference: string,
      signal?: AbortSignal,
    ): Promise<PulledManifest> => {
      const manifest = await askManifest(repository, reference, undefined, signal)
      if (manifest === undefined)
        throw new UnreachableError(`Cannot read manifest ${repository}:${reference}: the server sent none`)
      return manifest
    },
    /** Like `pullManifest`; undefined where it is still the one that is known. */
    pullChangedManifest: askManifest,
    pushManifest: async (
      repository: string,
      reference: string,
      mediaType: string,
      bytes: Uint8Array,
      signal?: AbortSignal,
    ): Promise<Digest> =>
      persist(async () => {
        const answer = await http.ok({
          method: 'PUT',
          path: `/v2/${repository}/manifests/${reference}`,
          headers: { 'content-type': mediaType },
          body: bytes,
          signal,
        })
        await answer.discard()
        return parseDigest(answer.header('docker-content-digest') ?? digestOf(bytes))
      }, signal),
    /** What refers to a manifest, of one artifact type (distribution-spec 1.1, "Listing Referrers"). */
    referrers: async (
      repository: string,
      subject: Digest,
      artifactType: string,
      signal?: AbortSignal,
    ): Promise<Referrer[]> => {
      const found: Referrer[] = []
      let path: string | undefined =
        `/v2/${repository}/referrers/${subject}?artifactType=${encodeURIComponent(artifactType)}`
      for (let page = 0; path !== undefined && page < referrersPagesMax; page++) {
        const answer = await http.ok({ path, headers: { accept: indexType }, signal })
        for (const each of referrersIn(await answer.bytes(referrersPageMaxBytes), artifactType))
          found.push(each)
        path = nextPage(answer)
      }
      return found
    },
    /**
     * The signature of a manifest that is good by one key (docs/protocol.md); undefined where there is none, or the registry does not look. Its word is to be checked.
     *
     * @param signedBy the key's SubjectPublicKeyInfo in DER, base64url
     * @param tag what it has to be for; undefined: any
     */
    findSignature: async (
      repository: string,
      subject: Digest,
      { artifactType, signedBy, tag }: { artifactType: string; signedBy: string; tag: string | undefined },
      signal?: AbortSignal,
    ): Promise<Referrer | undefined> => {
      const query = new URLSearchParams({ artifactType, signedBy, ...(tag === undefined ? {} : { tag }) })
      const path = `/v2/${repository}/referrers/${subject}?${query.toString()}`
      const answer = await http.ok({ path, headers: { accept: indexType }, signal })
      if (!/\bsignedBy\b/.test(answer.header('oci-filters-applied') ?? '')) {
        await answer.discard()
        return undefined
      }
      return referrersIn(await answer.bytes(referrersPageMaxBytes), artifactType)[0]
    },
    hasBlob: async (repository: string, digest: Digest): Promise<boolean> => {
      const answer = await http.send({ method: 'HEAD', path: `/v2/${repository}/blobs/${digest}` })
      await answer.discard()
      if (answer.status === 200) return true
      if (answer.status === 404) return false
      throw new RequestError(answer.status, `HTTP_${answer.status}`, `the server answered ${answer.status}`)
    },
    /** The length of a blob in bytes. */
    statBlob: async (repository: string, digest: Digest, signal?: AbortSignal): Promise<number> => {
      const answer = await http.ok({ method: 'HEAD', path: `/v2/${repository}/blobs/${digest}`, signal })
      await answer.discard()
      const length = answer.header('content-length') ?? ''
      if (/^\d{1,15}$/.test(length)) return Number(length)
      throw new UnreachableError(`Cannot tell how long ${digest} is: the server does not say`)
    },
    /** A blob's bytes from `start`, as they come; not checked against the digest. */
    pullBlob: async (
      repository: string,
      digest: Digest,
      range: { start: number; end?: number },
      signal?: AbortSignal,
    ): Promise<Answer> => {
      const whole = range.start === 0 && range.end === undefined
      const header = `bytes=${range.start}-${range.end === undefined ? '' : range.end - 1}`
      return http.ok({
        path: `/v2/${repository}/blobs/${digest}`,
        ...(whole ? {} : { headers: { range: header } }),
        signal,
      })
    },
    pullTorrent: async (
      repository: string,
      digest: Digest,
      options: { webseed: boolean; ttlSeconds?: number | undefined },
    ): Promise<Buffer> => {
      const query = new URLSearchParams({ webseed: options.webseed ? '1' : '0' })
      if (options.ttlSeconds !== undefined) query.set('ttl', String(options.ttlSeconds))
      const answer = await http.ok({
        path: `/v2/${repository}/blobs/${digest}?${query.toString()}`,
        headers: { accept: 'application/x-bittorrent' },
      })
      return answer.bytes()
    },
    /** Streams a blob once, hashing as it goes by; a dropped connection goes on from what the server has. */
    pushBlob: async (repository: string, source: BlobSource, signal?: AbortSignal): Promise<Digest> => {
      let location = await persist(async () => {
        const started = await http.ok({
          method: 'POST',
          path: `/v2/${repository}/blobs/uploads/?length=${source.sizeBytes}`,
          signal,
        })
        await started.discard()
        return locationOf(started)
      }, signal)
      let offset = 0
      let first = true
      await persist(async () => {
        if (!first) {
          const state = await http.ok({ path: location, signal })
          await state.discard()
          offset = Number(state.header('upload-offset') ?? 0)
        }
        first = false
        if (offset === source.sizeBytes) return
        const answer = await http.ok({
          method: 'PATCH',
          path: location,
          headers: {
            'content-type': 'application/octet-stream',
            'content-length': String(source.sizeBytes - offset),
            'content-range': `${offset}-${source.sizeBytes - 1}`,
          },
          body: source.open(offset),
          signal,
        })
        await answer.discard()
        location = locationOf(answer)
      }, signal)
      const digest = await source.digest()
      const separator = location.includes('?') ? '&' : '?'
      await persist(async () => {
        const done = await http.ok({
          method: 'PUT',
          path: `${location}${separator}digest=${digest}`,
          headers: { 'content-length': '0' },
          signal,
        })
        await done.discard()
      }, signal)
      return digest
    },
  }
}

/** A blob that is at hand. */
export function bytesSource(bytes: Buffer): BlobSource {
  return {
    sizeBytes: bytes.length,
    async *open(offset) {
      yield await Promise.resolve(bytes.subarray(offset))
    },
    digest: async () => Promise.resolve(digestOf(bytes)),
  }
}

function referrersIn(bytes: Buffer, artifactType: string): Referrer[] {
  let index: z.output<typeof ReferrerIndex>
  try {
    index = ReferrerIndex.parse(JSON.parse(bytes.toString()))
  } catch (cause) {
    throw new UnreachableError('Cannot understand the registry: its list of referrers is no index', { cause })
  }
  return (
    index.manifests
      // Not every registry filters, and some have digests of other algorithms.
      .filter((each) => each.artifactType === artifactType && each.digest.startsWith('sha256:'))
      .map(({ digest, size, annotations = {} }) => ({
        digest: parseDigest(digest),
        sizeBytes: size,
        annotations,
      }))
  )
}

/** Where a list goes on (RFC 8288): a path, or a whole URL of the registry's own. */
function nextPage(answer: Answer): string | undefined {
  const target = /<([^>]+)>\s*;\s*rel="?next"?/.exec(answer.header('link') ?? '')?.[1]
  if (target === undefined) return undefined
  const { pathname, search } = new URL(target, 'http://registry')
  return `${pathname}${search}`
}

/** The server is away, or has not yet seen that the connection before this one ended. */
function mayPass(error: unknown): boolean {
  return (
    error instanceof UnreachableError ||
    (error instanceof RequestError && [409, 416, 502, 503, 504].includes(error.status))
  )
}

/** The path of an upload session; the registry may answer with a path or a whole URL of its own. */
function locationOf(answer: Answer): string {
  const location = answer.header('location')
  if (location === undefined) throw new UnreachableError('Cannot push: the registry names no upload location')
  const url = new URL(location, 'http://registry')
  return `${url.pathname}${url.search}`
}
