import type { Digest } from '../../../lib/protocol/digest.ts'
import { digestOf, parseDigest } from '../../../lib/protocol/digest.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import { covers, isRepository, isTag } from '../../../lib/protocol/reference.ts'
import { ApiError } from '../api-error.ts'
import type { Manifest } from '../blob-store.ts'
import { parseManifest } from '../oci-manifest.ts'
import { createSlots } from './slots.ts'
import type { Credential } from './token-flow.ts'
import { createTokenFlow } from './token-flow.ts'
import { UpstreamError } from './upstream-error.ts'
import type { UpstreamAnswer } from './upstream-http.ts'
import { createUpstreamHttp } from './upstream-http.ts'

export interface UpstreamOptions {
  readonly name: string
  /** An origin: `https://registry.example.com`. */
  readonly url: URL
  /** As in scopes: `web`, `team/*`, `*`. */
  readonly repositories: readonly string[]
  readonly credential: () => Promise<Credential | undefined>
  /** PEM. */
  readonly ca: string | undefined
  readonly manifestMaxBytes: number
  readonly now: () => number
  readonly observer: UpstreamObserver
}

export interface UpstreamObserver {
  /** A request was answered, or not. */
  answered(upstream: string, outcome: 'ok' | UpstreamError['fault']): void
}

export interface CallOptions {
  readonly signal: AbortSignal
  /** Instead of the credential of the configuration: that of a caller, which goes to this upstream alone. */
  readonly authorization?: string | undefined
}

/** The bytes of a blob, as they come. */
export interface BlobStream {
  /** Undefined where the upstream does not say. */
  readonly sizeBytes: number | undefined
  /** Where the bytes begin. */
  readonly start: number
  readonly bytes: AsyncIterable<Uint8Array>
  discard(): Promise<void>
}

/**
 * Reads one registry by the OCI distribution API. What it does not have is undefined; all else that goes wrong is an UpstreamError with
 * its name. Nothing is followed but what this registry redirects to.
 */
export interface UpstreamClient extends AsyncDisposable {
  readonly name: string
  /** HOST or HOST:PORT. */
  readonly host: string
  readonly repositories: readonly string[]
  covers(repository: string): boolean
  /** Its digest, where the upstream says it. */
  headManifest(
    repository: string,
    reference: string,
    options: CallOptions,
  ): Promise<{ digest: Digest | undefined } | undefined>
  /** Its bytes have the digest that was asked for, or that the upstream named. */
  getManifest(
    repository: string,
    reference: string,
    options: CallOptions,
  ): Promise<Manifest<Digest> | undefined>
  headBlob(
    repository: string,
    digest: Digest,
    options: CallOptions,
  ): Promise<{ sizeBytes: number | undefined } | undefined>
  /** The bytes from `start` on, unchecked. */
  openBlob(
    repository: string,
    digest: Digest,
    start: number,
    options: CallOptions,
  ): Promise<BlobStream | undefined>
  /**
   * Digests of the manifests whose subject a digest is (distribution-spec 1.1, "Listing Referrers"): by the API, or by the tag that stands for
   * it in older registries.
   */
  listReferrers(repository: string, subject: Digest, options: CallOptions): Promise<Digest[]>
  listTags(repository: string, options: CallOptions): Promise<string[] | undefined>
  /** Undefined where it does not tell, as many do not. */
  listRepositories(options: CallOptions): Promise<string[] | undefined>
}

const manifestTypes = [
  'application/vnd.oci.image.manifest.v1+json',
  'application/vnd.oci.image.index.v1+json',
  'application/vnd.docker.distribution.manifest.v2+json',
  'application/vnd.docker.distribution.manifest.list.v2+json',
].join(', ')
/** Requests under way at one upstream, without the bodies of blobs, and those that wait for their turn. */
const requestsMax = 32
const requestsWaitingMax = 1000
/** An upstream that did not answer is not asked again for this long: each that asks would wait for the timeout. */
const restMs = 5_000
const restStatuses: ReadonlySet<number> = new Set([429, 502, 503, 504])
const pageBytesMax = 4 * 1024 * 1024
/** Referrers of one manifest: signatures, lists of what is in it. */
const referrersMax = 100
/** Names taken from one listing at most. */
const namesMax = 10_000

export function createUpstreamClient(options: UpstreamOptions): UpstreamClient {
  const { name, url: upstream, now, observer } = options
  const http = createUpstreamHttp(upstream, options.ca)
  const flow = createTokenFlow({ http, upstream, credential: options.credential, now })
  const slots = createSlots(name, { max: requestsMax, waitingMax: requestsWaitingMax })
  let down: { untilMs: number; message: string } | undefined
  const rest = (message: string) => {
    down = { untilMs: now() + restMs, message }
  }

  /** One request, with what it takes to be let in. 404 is undefined. */
  const ask = async (
    method: 'GET' | 'HEAD',
    path: string,
    scope: string,
    { signal, authorization, headers = {} }: CallOptions & { headers?: Record<string, string> },
  ): Promise<UpstreamAnswer | undefined> => {
    const send = async (value: string | undefined) => {
      try {
        const url = new URL(path, upstream)
        const answer = await http.send({ method, url, headers, authorization: value, signal })
        if (restStatuses.has(answer.status)) rest(`it answers ${answer.status}`)
        else down = undefined
        return answer
      } catch (error) {
        if (error instanceof UpstreamError && error.fault === 'down') rest(error.message)
        throw error
      }
    }
    if (down && down.untilMs > now()) throw new UpstreamError('down', down.message)
    return slots.run(async () => {
      signal.throwIfAborted()
      let answer = await send(authorization ?? (await flow.known(scope)))
      const challenge = answer.header('www-authenticate')
      if (answer.status === 401 && authorization === undefined && challenge !== undefined) {
        await answer.discard()
        flow.forget(scope)
        const fresh = await flow.answer(challenge, scope, signal)
        if (fresh === undefined)
          throw new UpstreamError('refused', 'it wants a credential, and none is configured')
        answer = await send(fresh)
      }
      const { status } = answer
      if (status === 200 || status === 206) return answer
      await answer.discard()
      if (status === 404) return undefined
      if (status === 401 || status === 403)
        throw new UpstreamError('refused', `it refuses the credential (status ${status})`)
      if (status === 429 || status >= 500) throw new UpstreamError('down', `it answers ${status}`)
      throw new UpstreamError('broken', `it answers ${status}`)
    })
  }

  /** The same, counted, and with the name of the upstream on what goes wrong. */
  const call = async <Result>(
    what: string,
    signal: AbortSignal,
    work: () => Promise<Result | undefined>,
  ): Promise<Result | undefined> => {
    try {
      const result = await work()
      observer.answered(name, result === undefined ? 'missing' : 'ok')
      return result
    } catch (error) {
      if (signal.aborted || !(error instanceof UpstreamError)) throw error
      observer.answered(name, error.fault)
      throw new UpstreamError(error.fault, `Cannot pull ${what} from ${name}: ${error.message}`, {
        cause: error,
      })
    }
  }

  const scopeOf = (repository: string) => `repository:${repository}:pull`
  /** All pages of a listing, by the Link header; a page that another host would give is not asked for. */
  const list = async (
    first: string,
    scope: string,
    key: 'tags' | 'repositories',
    callOptions: CallOptions,
  ): Promise<string[] | undefined> => {
    const names: string[] = []
    for (let path: string | undefined = first; path !== undefined && names.length < namesMax;) {
      const answer: UpstreamAnswer | undefined = await ask('GET', path, scope, callOptions)
      if (!answer) return names.length === 0 ? undefined : names
      const page = namesOf(await answer.text(pageBytesMax), key)
      if (page === undefined) throw new UpstreamError('broken', `it answered without ${key}`)
      for (const each of page) names.push(each)
      const link = /<([^>]*)>\s*;\s*rel="?next"?/.exec(answer.header('link') ?? '')?.[1]
      const next = link === undefined ? null : URL.parse(link, upstream)
      // A page without names could go on for ever.
      const goesOn = page.length > 0 && next?.origin === upstream.origin
      path = goesOn ? `${next.pathname}${next.search}` : undefined
    }
    return names.slice(0, namesMax)
  }

  return {
    name,
    host: upstream.host,
    repositories: options.repositories,
    covers: (repository) => options.repositories.some((pattern) => covers(pattern, repository)),
    headManifest: (repository, reference, callOptions) =>
      call(`${repository}:${reference}`, callOptions.signal, async () => {
        const answer = await ask('HEAD', `/v2/${repository}/manifests/${reference}`, scopeOf(repository), {
          ...callOptions,
          headers: { accept: manifestTypes },
        })
        if (!answer) return undefined
        await answer.discard()
        return { digest: readDigest(answer.header('docker-content-digest')) }
      }),
    getManifest: (repository, reference, callOptions) =>
      call(`${repository}:${reference}`, callOptions.signal, async () => {
        const answer = await ask('GET', `/v2/${repository}/manifests/${reference}`, scopeOf(repository), {
          ...callOptions,
          headers: { accept: manifestTypes },
        })
        if (!answer) return undefined
        const bytes = await answer.text(options.manifestMaxBytes)
        const mediaType = (answer.header('content-type') ?? '').split(';')[0]?.trim() ?? ''
        const wanted = reference.includes(':')
          ? parseDigest(reference)
          : readDigest(answer.header('docker-content-digest'))
        return checkedManifest(bytes, mediaType, wanted)
      }),
    headBlob: (repository, digest, callOptions) =>
      call(`${repository}@${digest}`, callOptions.signal, async () => {
        const answer = await ask(
          'HEAD',
          `/v2/${repository}/blobs/${digest}`,
          scopeOf(repository),
          callOptions,
        )
        if (!answer) return undefined
        await answer.discard()
        return { sizeBytes: readLength(answer.header('content-length')) }
      }),
    openBlob: (repository, digest, start, callOptions) =>
      call(`${repository}@${digest}`, callOptions.signal, async () => {
        const answer = await ask('GET', `/v2/${repository}/blobs/${digest}`, scopeOf(repository), {
          ...callOptions,
          // Compressed on the way it would have another length, and might have been meant to be stored so.
          headers: { 'accept-encoding': 'identity', ...(start > 0 ? { range: `bytes=${start}-` } : {}) },
        })
        if (!answer) return undefined
        return blobStreamOf(answer, start)
      }),
    listReferrers: async (repository, subject, callOptions) => {
      const found = await call(`the referrers of ${repository}@${subject}`, callOptions.signal, async () => {
        const get = (path: string) =>
          ask('GET', `/v2/${repository}/${path}`, scopeOf(repository), {
            ...callOptions,
            headers: { accept: manifestTypes },
          })
        const answer =
          (await get(`referrers/${subject}`)) ?? (await get(`manifests/${subject.replace(':', '-')}`))
        return answer && referrersIn(await answer.text(pageBytesMax))
      })
      return found ?? []
    },
    listTags: (repository, callOptions) =>
      call(`the tags of ${repository}`, callOptions.signal, async () => {
        const names = await list(
          `/v2/${repository}/tags/list?n=1000`,
          scopeOf(repository),
          'tags',
          callOptions,
        )
        return names?.filter(isTag)
      }),
    listRepositories: async (callOptions) => {
      try {
        return await call('its catalog', callOptions.signal, async () => {
          const names = await list('/v2/_catalog?n=1000', 'registry:catalog:*', 'repositories', callOptions)
          return names?.filter(isRepository)
        })
      } catch (error) {
        if (error instanceof UpstreamError && error.fault !== 'down') return undefined
        throw error
      }
    },
    [Symbol.asyncDispose]: () => http[Symbol.asyncDispose](),
  }
}

/** @throws UpstreamError `broken` unless it is a manifest of schema 2 with the digest that was promised */
function checkedManifest(bytes: Buffer, mediaType: string, wanted: Digest | undefined): Manifest<Digest> {
  const digest = digestOf(bytes)
  if (wanted !== undefined && wanted !== digest)
    throw new UpstreamError('broken', `the bytes of the manifest have ${digest}, not ${wanted}`)
  try {
    const { mediaType: own } = parseManifest(bytes)
    const type = own ?? mediaType
    if (!/^[\w.+-]+\/[\w.+-]+$/.test(type))
      throw new UpstreamError('broken', 'the manifest has no media type')
    return { digest, mediaType: type, bytes }
  } catch (cause) {
    if (cause instanceof ApiError) throw new UpstreamError('broken', cause.message, { cause })
    throw cause
  }
}

function blobStreamOf(answer: UpstreamAnswer, asked: number): BlobStream {
  const { bytes } = answer
  const discard = () => answer.discard()
  const length = readLength(answer.header('content-length'))
  // Not every storage knows ranges: then all of it comes again.
  if (answer.status === 200) return { sizeBytes: length, start: 0, bytes, discard }
  const range = /^bytes (\d+)-\d+\/(\d+)$/.exec(answer.header('content-range') ?? '')
  if (!range || Number(range[1]) !== asked)
    throw new UpstreamError('broken', 'it sends another part of the blob than it was asked for')
  return { sizeBytes: Number(range[2]), start: asked, bytes, discard }
}

/** @throws UpstreamError `broken` unless it is an index */
function referrersIn(index: Buffer): Digest[] {
  try {
    return (parseManifest(index).manifests ?? [])
      .slice(0, referrersMax)
      .flatMap(({ digest }) => readDigest(digest) ?? [])
  } catch (cause) {
    if (cause instanceof ApiError) throw new UpstreamError('broken', cause.message, { cause })
    throw cause
  }
}

function namesOf(body: Buffer, key: 'tags' | 'repositories'): string[] | undefined {
  try {
    const names = (JSON.parse(body.toString()) as Record<string, unknown> | null)?.[key]
    // A repository without tags has `null`.
    if (names === null) return []
    return Array.isArray(names) ? names.filter((name) => typeof name === 'string') : undefined
  } catch {
    return undefined
  }
}

function readDigest(text: string | undefined): Digest | undefined {
  try {
    return text === undefined ? undefined : parseDigest(text)
  } catch (error) {
    // Another algorithm: then the bytes will tell.
    if (error instanceof ClientError) return undefined
    throw error
  }
}

function readLength(text: string | undefined): number | undefined {
  return text !== undefined && /^\d{1,15}$/.test(text) ? Number(text) : undefined
}
