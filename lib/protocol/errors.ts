/**
 * A fault of the peer or caller: its message may be shown on the wire. Everything else that is thrown is ours,
 * and the wire says only "internal error". `code` comes from a closed set per protocol and may label a metric.
 */
export class ClientError extends Error {
  override readonly name = 'ClientError'
  readonly code: string

  constructor(code: string, message: string, options?: ErrorOptions) {
    super(message, options)
    this.code = code
  }
}
