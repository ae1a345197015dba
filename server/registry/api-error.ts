import { RedisUnavailable } from '../redis/connection.ts'
import { LeaseBusy } from '../state/lease.ts'

/** A refusal with its HTTP status. `code` is the OCI spec's where it has one; `hint` says what to do next. */
export class ApiError extends Error {
  override readonly name = 'ApiError'
  readonly status: number
  readonly code: string
  readonly hint: string | undefined
  readonly headers: Readonly<Record<string, string>>

  constructor(
    status: number,
    code: string,
    message: string,
    options: ErrorOptions & { hint?: string; headers?: Record<string, string> } = {},
  ) {
    super(message, options)
    this.status = status
    this.code = code
    this.hint = options.hint
    this.headers = options.headers ?? {}
  }
}

/** More tokens wait to be verified than this server takes on. */
export function tooBusy(cause: Error): ApiError {
  return new ApiError(503, 'TOOMANYREQUESTS', 'too many tokens wait to be verified', {
    hint: 'Try again in a moment.',
    headers: { 'retry-after': '2' },
    cause,
  })
}

/** What passes by itself: the state that servers share cannot be asked now, or another server is at the same work. */
export function passingFault(error: unknown): ApiError | undefined {
  if (error instanceof RedisUnavailable)
    return new ApiError(
      503,
      'UNAVAILABLE',
      'Cannot do this now: the Redis that the servers share does not answer',
      {
        hint: 'Nothing or all of it was done. Try again in a moment; deploys under way go on meanwhile.',
        headers: { 'retry-after': '2' },
        cause: error,
      },
    )
  if (error instanceof LeaseBusy)
    return new ApiError(503, 'UNAVAILABLE', 'Cannot do this now: another server is doing the same', {
      hint: 'Try again in a moment.',
      headers: { 'retry-after': '1' },
      cause: error,
    })
  return undefined
}
