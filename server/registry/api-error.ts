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
