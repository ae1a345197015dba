/** The same in every copy of this package: a hook of somebody else's throws the ClientError of the copy it was written for. */
const mark = Symbol.for('rackswarm.ClientError')

/**
 * A fault of the peer or caller: its message may be shown on the wire. Everything else that is thrown is ours,
 * and the wire says only "internal error". `code` comes from a closed set per protocol and may label a metric.
 */
export class ClientError extends Error {
  override readonly name = 'ClientError'
  readonly code: string
  /** BEP 31: minutes after which asking again may help. */
  readonly retryInMinutes: number | undefined

  constructor(code: string, message: string, options?: ErrorOptions & { retryInMinutes?: number }) {
    super(message, options)
    Object.defineProperty(this, mark, { value: true })
    this.code = code
    this.retryInMinutes = options?.retryInMinutes
  }

  static override [Symbol.hasInstance](value: unknown): value is ClientError {
    return typeof value === 'object' && value !== null && mark in value
  }
}
