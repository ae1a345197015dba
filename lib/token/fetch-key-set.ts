import { Agent, request } from 'undici'

export type KeySetReply = (
  | { readonly kind: 'fresh'; readonly json: unknown; readonly etag: string | undefined }
  /** 304: it is as it was. */
  | { readonly kind: 'unchanged' }
) & { readonly maxAgeSeconds: number | undefined }

export interface KeySetFetcher extends AsyncDisposable {
  /** The URL without what may be a secret in it. */
  readonly name: string
  /** `etag`: that of the set in force. Rejects with what is wrong, in words for a log. */
  fetch(etag: string | undefined, signal: AbortSignal): Promise<KeySetReply>
}

/** A key has some 300 bytes, an RSA key with its certificates 10 KB. */
export const keySetBytesMax = 1024 * 1024
const redirectsMax = 3

/**
 * GETs a JWK Set, bounded in time and size. With `issuer` the URL is that of its OpenID configuration (OpenID Connect
 * Discovery 1.0 section 4), which says where the set is.
 *
 * @throws Error when the URL is none that can be fetched
 */
export function createKeySetFetcher(options: {
  url: string
  issuer?: string | undefined
  timeoutMs: number
  ca?: string | undefined
}): KeySetFetcher {
  const url = parseUrl(options.url)
  // No connection is kept: there is one request in minutes.
  const agent = new Agent({
    pipelining: 0,
    connect: options.ca === undefined ? {} : { ca: options.ca },
    connectTimeout: options.timeoutMs,
  })
  const get = async (from: URL, etag: string | undefined, signal: AbortSignal): Promise<KeySetReply> => {
    let at = from
    for (let redirects = 0; redirects <= redirectsMax; redirects++) {
      const { statusCode, headers, body } = await request(at, {
        dispatcher: agent,
        signal,
        headers: {
          accept: 'application/jwk-set+json, application/json',
          ...(etag === undefined ? {} : { 'if-none-match': etag }),
        },
      })
      const maxAgeSeconds = maxAgeOf(headers['cache-control'])
      if (statusCode === 304 && etag !== undefined) {
        await body.dump()
        return { kind: 'unchanged', maxAgeSeconds }
      }
      if ([301, 302, 303, 307, 308].includes(statusCode)) {
        await body.dump()
        at = redirectOf(at, headers['location'])
        continue
      }
      if (statusCode !== 200) {
        await body.dump()
        throw new Error(`it answered ${statusCode}`)
      }
      const json = parseJson(await readBounded(body))
      return { kind: 'fresh', json, etag: textOf(headers['etag']), maxAgeSeconds }
    }
    throw new Error(`more than ${redirectsMax} redirects`)
  }
  /** Where the set was the last time: its `etag` says nothing of another one. */
  let last = options.issuer === undefined ? url.href : undefined
  const find = async (issuer: string | undefined, signal: AbortSignal): Promise<URL> => {
    if (issuer === undefined) return url
    const reply = await get(url, undefined, signal)
    return keySetUrlOf(reply.kind === 'fresh' ? reply.json : undefined, issuer, url)
  }
  return {
    name: `${url.origin}${url.pathname}`,
    fetch: async (etag, signal) => {
      const timeout = AbortSignal.timeout(options.timeoutMs)
      try {
        const within = AbortSignal.any([signal, timeout])
        const at = await find(options.issuer, within)
        const reply = await get(at, at.href === last ? etag : undefined, within)
        last = at.href
        return reply
      } catch (error) {
        if (timeout.aborted) throw new Error(`no answer within ${options.timeoutMs} ms`, { cause: error })
        throw error
      }
    },
    [Symbol.asyncDispose]: () => agent.destroy(),
  }
}

function parseUrl(text: string): URL {
  const url = URL.parse(text)
  if (!url || (url.protocol !== 'https:' && url.protocol !== 'http:'))
    throw new Error('Cannot use the URL of the key set: need https://HOST/PATH or http://HOST/PATH')
  return url
}

/** @throws Error saying what is wrong with the OpenID configuration */
function keySetUrlOf(configuration: unknown, issuer: string, from: URL): URL {
  const { issuer: its, jwks_uri } = (configuration ?? {}) as { issuer?: unknown; jwks_uri?: unknown }
  // Section 4.3: else one issuer could speak for another.
  if (its !== issuer) throw new Error('its OpenID configuration is that of another issuer')
  const url = typeof jwks_uri === 'string' ? URL.parse(jwks_uri) : null
  if (!url || (url.protocol !== 'https:' && url.protocol !== from.protocol))
    throw new Error('its OpenID configuration has no jwks_uri that can be used')
  return url
}

/** Who may say where the keys are is the host that was configured, and no weaker channel. */
function redirectOf(from: URL, location: string | string[] | undefined): URL {
  const to = URL.parse(textOf(location) ?? '', from)
  if (!to) throw new Error('it redirects to nowhere')
  if (to.hostname !== from.hostname) throw new Error(`it redirects to another host, ${to.hostname}`)
  if (to.protocol !== 'https:' && to.protocol !== from.protocol)
    throw new Error(`it redirects to ${to.protocol}`)
  return to
}

async function readBounded(body: AsyncIterable<Uint8Array>): Promise<string> {
  const chunks: Uint8Array[] = []
  let length = 0
  for await (const chunk of body) {
    length += chunk.length
    // Leaving the loop destroys the body.
    if (length > keySetBytesMax) throw new Error(`it has more than ${keySetBytesMax} bytes`)
    chunks.push(chunk)
  }
  return Buffer.concat(chunks).toString('utf8')
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch (cause) {
    throw new Error('it is not JSON', { cause })
  }
}

/** RFC 9111 section 5.2.2; undefined where it does not help. */
function maxAgeOf(header: string | string[] | undefined): number | undefined {
  const directives = textOf(header)?.toLowerCase() ?? ''
  if (/\bno-(store|cache)\b/.test(directives)) return undefined
  const seconds = /(?:^|[\s,])max-age="?(\d{1,9})/.exec(directives)?.[1]
  return seconds === undefined ? undefined : Number(seconds)
}

function textOf(header: string | string[] | undefined): string | undefined {
  return typeof header === 'string' ? header : header?.join(', ')
}
