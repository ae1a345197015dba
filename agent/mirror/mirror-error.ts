/** What a client of the mirror is told. `code` is the OCI spec's where it has one. */
export class MirrorError extends Error {
  override readonly name = 'MirrorError'
  readonly status: number
  readonly code: string
  readonly headers: Readonly<Record<string, string>>

  constructor(
    status: number,
    code: string,
    message: string,
    options: ErrorOptions & { headers?: Record<string, string> } = {},
  ) {
    super(message, options)
    this.status = status
    this.code = code
    this.headers = options.headers ?? {}
  }
}

/** 404 sends every client on to the registry; of 429 containerd would ask the mirror again and again. */
export function cannotHelp(
  code: 'BLOB_UNKNOWN' | 'MANIFEST_UNKNOWN',
  message: string,
  cause?: unknown,
): MirrorError {
  return new MirrorError(404, code, message, cause === undefined ? {} : { cause })
}
