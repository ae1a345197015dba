import { ApiError } from '../api-error.ts'

/**
 * Why an upstream did not help. `down`: nobody answers, or it says that it cannot now; later it may. `refused`: it wants other
 * credentials. `missing`: it has no such thing. `broken`: what it says is of no use, or wrong.
 */
export type UpstreamFault = 'down' | 'refused' | 'missing' | 'broken'

export class UpstreamError extends Error {
  override readonly name = 'UpstreamError'
  readonly fault: UpstreamFault

  constructor(fault: UpstreamFault, message: string, options?: ErrorOptions) {
    super(message, options)
    this.fault = fault
  }
}

/** What a client of ours is told. */
export function asApiError(error: unknown): unknown {
  if (!(error instanceof UpstreamError)) return error
  const { fault, message } = error
  const options = { cause: error }
  switch (fault) {
    case 'missing':
      return new ApiError(404, 'NAME_UNKNOWN', message, options)
    case 'down':
      return new ApiError(503, 'UNAVAILABLE', message, {
        ...options,
        hint: 'What is here already is still served; try the rest again later.',
        headers: { 'retry-after': '5' },
      })
    case 'refused':
      return new ApiError(502, 'UNKNOWN', message, {
        ...options,
        hint: 'The administrator of this server sets registry.upstreams.credential_file.',
      })
    case 'broken':
      return new ApiError(502, 'UNKNOWN', message, options)
  }
}
