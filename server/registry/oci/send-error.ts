import type { FastifyReply } from 'fastify'
import { ClientError } from '../../../lib/protocol/errors.ts'
import type { Logger } from '../../../lib/runtime/log.ts'
import { ApiError, passingFault } from '../api-error.ts'

/** Answers with the body of the distribution-spec ("Error Codes"); what is not the caller's fault is logged and not told. */
export async function sendError(error: unknown, reply: FastifyReply, log: Logger): Promise<FastifyReply> {
  if (reply.raw.headersSent) {
    reply.raw.destroy()
    return reply
  }
  const known = knownError(error)
  if (!known) log.error({ err: error }, 'registry request failed')
  const { status, code, message, hint, headers } = known ?? new ApiError(500, 'UNKNOWN', 'internal error')
  // What is left of a body that is refused would be read as the next request.
  if (!reply.request.raw.complete) reply.header('connection', 'close')
  // What the answer would have been is not what it is.
  for (const name of ['content-length', 'etag', 'accept-ranges', 'docker-content-digest'])
    reply.removeHeader(name)
  return reply
    .code(status)
    .headers(headers)
    .type('application/json')
    .send({ errors: [{ code, message, ...(hint === undefined ? {} : { detail: { hint } }) }] })
}

/** What may be told; fastify refuses what it cannot read, a Content-Type that is none for example, before a handler sees it. */
function knownError(error: unknown): ApiError | undefined {
  if (error instanceof ApiError) return error
  const passing = passingFault(error)
  if (passing) return passing
  if (error instanceof ClientError) return new ApiError(400, error.code, error.message)
  if (!(error instanceof Error) || !('statusCode' in error) || typeof error.statusCode !== 'number')
    return undefined
  if (error.statusCode >= 500) return undefined
  return new ApiError(error.statusCode, 'UNSUPPORTED', `Cannot read the request: ${error.message}`)
}
