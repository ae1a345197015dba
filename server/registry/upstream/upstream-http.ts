import { rootCertificates } from 'node:tls'
import type { Dispatcher } from 'undici'
import { Agent, request } from 'undici'
import { createAddressGuard } from './address-guard.ts'
import { UpstreamError } from './upstream-error.ts'

export interface UpstreamCall {
  readonly method: 'GET' | 'HEAD'
  readonly url: URL
  readonly headers?: Readonly<Record<string, string>>
  /** For the host of `url` alone: a redirect to another host goes without. */
  readonly authorization?: string | undefined
  readonly signal: AbortSignal
}

export interface UpstreamAnswer {
  readonly status: number
  header(name: string): string | undefined
  /** The body as it comes; read it, or `discard` it. @throws UpstreamError */
  readonly bytes: AsyncIterable<Uint8Array>
  /** The whole body. @throws UpstreamError `broken` beyond `bytesMax` */
  text(bytesMax: number): Promise<Buffer>
  discard(): Promise<void>
}

/** GET and HEAD, at the upstream and where it redirects to. Bounded in time; never to where it has no business. */
export interface UpstreamHttp extends AsyncDisposable {
  /** Any answer but a redirect. @throws UpstreamError `down` where none came, `broken` where it leads astray */
  send(call: UpstreamCall): Promise<UpstreamAnswer>
}

const connectTimeoutMs = 5_000
/** How long the other end may be silent: before the head of its answer, and inside the body. */
const idleTimeoutMs = 30_000
const connectionsMax = 64
const redirectsMax = 5

export function createUpstreamHttp(upstream: URL, ca: string | undefined): UpstreamHttp {
  const guard = createAddressGuard(upstream)
  const agent = (authorities: string[] | undefined) =>
    new Agent({
      connect: {
        timeout: connectTimeoutMs,
        lookup: guard.lookup,
        ...(authorities === undefined ? {} : { ca: authorities }),
      },
      headersTimeout: idleTimeoutMs,
      bodyTimeout: idleTimeoutMs,
      connections: connectionsMax,
    })
  // The upstream shows a certificate of its own authority; a storage that it redirects to may show anyone's.
  const own = agent(ca === undefined ? undefined : [ca])
  const others = agent(ca === undefined ? undefined : [...rootCertificates, ca])

  const once = async (
    url: URL,
    { method, headers, signal }: UpstreamCall,
    authorization: string | undefined,
  ) => {
    try {
      return await request(url, {
        dispatcher: url.origin === upstream.origin ? own : others,
        method,
        headers: { ...headers, ...(authorization === undefined ? {} : { authorization }) },
        signal,
      })
    } catch (error) {
      throw unreachable(url, error, signal)
    }
  }
  return {
    send: async (call) => {
      let { url, authorization } = call
      for (let redirects = 0; redirects <= redirectsMax; redirects++) {
        guard.check(url)
        const response = await once(url, call, authorization)
        const location = response.headers['location']
        if (![301, 302, 303, 307, 308].includes(response.statusCode) || typeof location !== 'string')
          return answerOf(response, url, call.signal)
        await response.body.dump()
        const next = URL.parse(location, url)
        if (!next) throw new UpstreamError('broken', `${url.host} redirects to nowhere`)
        if (next.origin !== url.origin) authorization = undefined
        next.username = next.password = ''
        url = next
      }
      throw new UpstreamError('broken', `${call.url.host} redirects more than ${redirectsMax} times`)
    },
    [Symbol.asyncDispose]: async () => {
      await Promise.all([own.destroy(), others.destroy()])
    },
  }
}

function answerOf(response: Dispatcher.ResponseData, url: URL, signal: AbortSignal): UpstreamAnswer {
  const { statusCode, headers, body } = response
  // A body that nobody reads, and that breaks, must not bring the process down.
  body.on('error', () => undefined)
  async function* bytes(): AsyncGenerator<Uint8Array> {
    try {
      yield* body as AsyncIterable<Uint8Array>
    } catch (error) {
      throw unreachable(url, error, signal)
    }
  }
  return {
    status: statusCode,
    header: (name) => {
      const value = headers[name]
      return Array.isArray(value) ? value[0] : value
    },
    bytes: { [Symbol.asyncIterator]: bytes },
    text: async (bytesMax) => {
      const parts: Uint8Array[] = []
      let total = 0
      for await (const part of bytes()) {
        total += part.length
        // Leaving the loop destroys the body.
        if (total > bytesMax)
          throw new UpstreamError('broken', `${url.host} answered with more than ${bytesMax} bytes`)
        parts.push(part)
      }
      return Buffer.concat(parts)
    },
    discard: () => body.dump(),
  }
}

/** Names the host alone: paths and queries of redirects carry signatures. */
function unreachable({ host }: URL, error: unknown, signal: AbortSignal): unknown {
  if (signal.aborted) return signal.reason
  if (error instanceof UpstreamError) return error
  if (error instanceof Error && error.cause instanceof UpstreamError) return error.cause
  const inner = error instanceof AggregateError ? (error.errors[0] as unknown) : error
  const code = inner instanceof Error && 'code' in inner ? String(inner.code) : undefined
  const why = code ?? (inner instanceof Error ? inner.message : String(inner))
  return new UpstreamError('down', `Cannot reach ${host}: ${why}`, { cause: error })
}
