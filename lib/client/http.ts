import { Agent, request } from 'undici'
import type { Dispatcher } from 'undici'
import type { z } from 'zod'
import { ApiErrorBody } from './api.ts'

/** The server answered, and refused. */
export class RequestError extends Error {
  override readonly name = 'RequestError'
  readonly status: number
  /** The body's own code, `HTTP_503` and the like where it has none. */
  readonly code: string
  readonly hint: string | undefined
  readonly retryAfterSeconds: number | undefined

  constructor(
    status: number,
    code: string,
    message: string,
    more: { hint?: string | undefined; retryAfterSeconds?: number | undefined } = {},
  ) {
    super(message)
    this.status = status
    this.code = code
    this.hint = more.hint
    this.retryAfterSeconds = more.retryAfterSeconds
  }
}

/** No answer came. The message names only the origin: paths and queries carry tokens. */
export class UnreachableError extends Error {
  override readonly name = 'UnreachableError'
}

export interface HttpOptions {
  /** `https://tracker.example:6969`, or any `http:` origin for a unix socket. */
  readonly baseUrl: string
  /** PEM of the authority that signed the server's certificate. */
  readonly ca?: string | undefined
  readonly socketPath?: string | undefined
  readonly credential?: () => string | undefined
  readonly userAgent?: string
  readonly connectTimeoutMs?: number
  /** How long the other end may be silent: before the head of its answer, and inside the body. */
  readonly idleTimeoutMs?: number
}

export interface Call {
  readonly method?: 'GET' | 'HEAD' | 'POST' | 'PUT' | 'PATCH' | 'DELETE'
  /** Absolute path with query, below `baseUrl`. */
  readonly path: string
  readonly headers?: Record<string, string>
  readonly body?: string | Uint8Array | AsyncIterable<Uint8Array>
  readonly signal?: AbortSignal | undefined
}

export interface Answer {
  readonly status: number
  header(name: string): string | undefined
  /** The body as it comes. Read it or `discard` it. */
  readonly stream: AsyncIterable<Uint8Array>
  /** The whole body. @throws UnreachableError beyond `bytesMax` */
  bytes(bytesMax?: number): Promise<Buffer>
  discard(): Promise<void>
}

/** A thin layer over undici: one origin, a credential, deadlines, bounded bodies, errors that a person can use. */
export interface HttpClient extends AsyncDisposable {
  /** Any answer, refusals too. @throws UnreachableError */
  send(call: Call): Promise<Answer>
  /** An answer below 400. @throws RequestError, UnreachableError */
  ok(call: Call): Promise<Answer>
  /** Sends JSON, and reads JSON of a known shape. @throws RequestError, UnreachableError */
  json<Schema extends z.ZodType>(
    schema: Schema,
    call: Omit<Call, 'body'> & { body?: unknown },
  ): Promise<z.output<Schema>>
}

const answerMaxBytes = 16 * 1024 * 1024

export function createHttpClient(options: HttpOptions): HttpClient {
  const idleTimeoutMs = options.idleTimeoutMs ?? 30_000
  const dispatcher = new Agent({
    connect: {
      timeout: options.connectTimeoutMs ?? 5_000,
      ...(options.ca === undefined ? {} : { ca: options.ca }),
      ...(options.socketPath === undefined ? {} : { socketPath: options.socketPath }),
    },
    headersTimeout: idleTimeoutMs,
    bodyTimeout: idleTimeoutMs,
    connections: 64,
  })
  const base = new URL(options.baseUrl)

  const send = async (call: Call): Promise<Answer> => {
    const credential = options.credential?.()
    try {
      const response = await request(`${base.origin}${base.pathname.replace(/\/$/, '')}${call.path}`, {
        dispatcher,
        method: call.method ?? 'GET',
        headers: {
          ...(options.userAgent === undefined ? {} : { 'user-agent': options.userAgent }),
          ...(credential === undefined ? {} : { authorization: `Bearer ${credential}` }),
          ...call.headers,
        },
        ...(call.body === undefined
          ? {}
          : { body: call.body as NonNullable<Dispatcher.RequestOptions['body']> }),
        signal: call.signal ?? null,
      })
      return answerOf(response, (error) => unreachable(error, call.signal))
    } catch (error) {
      throw unreachable(error, call.signal)
    }
  }
  const unreachable = (error: unknown, signal: AbortSignal | undefined): Error => {
    if (signal?.aborted === true) return signal.reason instanceof Error ? signal.reason : new Error('aborted')
    if (error instanceof UnreachableError) return error
    return new UnreachableError(`Cannot reach ${options.socketPath ?? base.origin}: ${reasonOf(error)}`, {
      cause: error,
    })
  }
  const ok = async (call: Call): Promise<Answer> => {
    const answer = await send(call)
    if (answer.status < 400) return answer
    throw refusal(answer, await answer.bytes().catch(() => Buffer.alloc(0)))
  }
  return {
    send,
    ok,
    json: async (schema, { body, ...call }) => {
      const sent =
        body === undefined
          ? {}
          : { body: JSON.stringify(body), headers: { ...call.headers, 'content-type': 'application/json' } }
      const answer = await ok({ ...call, ...sent })
      const parsed = schema.safeParse(parseJson(await answer.bytes()))
      if (parsed.success) return parsed.data
      const [issue] = parsed.error.issues
      throw new UnreachableError(
        `Cannot understand ${options.socketPath ?? base.origin}: ${issue?.path.join('.') ?? ''} ${issue?.message ?? 'is not JSON'}; is it a Rackswarm server of this version?`,
      )
    },
    [Symbol.asyncDispose]: () => dispatcher.destroy(),
  }
}

function answerOf(response: Dispatcher.ResponseData, unreachable: (error: unknown) => Error): Answer {
  const { statusCode, headers, body } = response
  // A body that nobody reads, and that breaks, must not bring the process down.
  body.on('error', () => undefined)
  async function* stream(): AsyncGenerator<Uint8Array> {
    try {
      yield* body as AsyncIterable<Uint8Array>
    } catch (error) {
      throw unreachable(error)
    }
  }
  return {
    status: statusCode,
    header: (name) => {
      const value = headers[name.toLowerCase()]
      return Array.isArray(value) ? value[0] : value
    },
    stream: { [Symbol.asyncIterator]: stream },
    bytes: async (bytesMax = answerMaxBytes) => {
      const parts: Uint8Array[] = []
      let total = 0
      for await (const part of stream()) {
        total += part.length
        if (total > bytesMax) {
          body.destroy()
          throw unreachable(new Error(`the answer is larger than ${bytesMax} bytes`))
        }
        parts.push(part)
      }
      return Buffer.concat(parts)
    },
    discard: async () => body.dump(),
  }
}

function refusal(answer: Answer, body: Buffer): RequestError {
  const json = parseJson(body)
  const retryAfter = Number(answer.header('retry-after'))
  const retryAfterSeconds = Number.isFinite(retryAfter) ? retryAfter : undefined
  const own = ApiErrorBody.safeParse(json)
  if (own.success) {
    const { code, message, hint } = own.data.error
    return new RequestError(answer.status, code, message, { hint, retryAfterSeconds })
  }
  const [oci] = (json as { errors?: { code?: string; message?: string }[] } | undefined)?.errors ?? []
  const text = body.toString('utf8', 0, 200).trim()
  return new RequestError(
    answer.status,
    oci?.code ?? `HTTP_${answer.status}`,
    oci?.message ?? (text === '' ? `the server answered ${answer.status}` : text),
    { retryAfterSeconds },
  )
}

function reasonOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error)
  const code = 'code' in error ? String(error.code) : ''
  const inner = error instanceof AggregateError ? (error.errors[0] as unknown) : undefined
  if (inner instanceof Error) return reasonOf(inner)
  switch (code) {
    case 'ECONNREFUSED':
      return 'nothing listens there (connection refused)'
    case 'ENOTFOUND':
      return 'there is no host of that name'
    case 'ENOENT':
      return 'there is no such socket'
    case 'EACCES':
      return 'permission denied'
    case 'UND_ERR_CONNECT_TIMEOUT':
      return 'it does not answer (connect timeout)'
    case 'UND_ERR_HEADERS_TIMEOUT':
    case 'UND_ERR_BODY_TIMEOUT':
      return 'it fell silent'
    default:
      return error.message === '' ? code : error.message
  }
}

function parseJson(bytes: Buffer): unknown {
  try {
    return JSON.parse(bytes.toString())
  } catch {
    return undefined
  }
}
