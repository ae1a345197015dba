import type { FastifyInstance, FastifyRequest } from 'fastify'
import type { Ip } from '../../lib/protocol/address.ts'
import { cidrContains } from '../../lib/protocol/cidr.ts'
import { digestFromHex } from '../../lib/protocol/digest.ts'
import { contentRange, parseRange } from '../../lib/protocol/http-range.ts'
import type { TokenVerifier } from '../../lib/token/claims.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import { TokenError } from '../../lib/token/claims.ts'
import { ApiError, tooBusy } from './api-error.ts'
import type { BlobStore } from './blob-store.ts'
import { sendBytes } from './oci/send-bytes.ts'
import { createRateLimiter } from './rate-limiter.ts'

export interface WebseedDeps {
  readonly store: BlobStore
  readonly verifier: TokenVerifier
  readonly repliesMax: number
  readonly bytesPerSecond: number
  readonly sourceOf: (request: FastifyRequest) => Ip
  readonly now: () => number
  readonly log: Logger
  readonly observer: WebseedObserver
}

export interface WebseedObserver {
  served(bytes: number): void
  /** Turned away because the budget was spent. */
  busy(): void
  /** Replies under way now. */
  replying(count: number): void
}

/** `GET /webseed/<token>/<sha256 hex>` (BEP 19): the server as a seed, within a budget of replies and bytes a second. */
export function registerWebseedRoutes(app: FastifyInstance, deps: WebseedDeps): void {
  const { store, verifier, observer } = deps
  const limiter = createRateLimiter({ bytesPerSecond: deps.bytesPerSecond, now: deps.now })
  let replies = 0
  /** Replies to each bearer: one that reads slowly, by fault or on purpose, must not hold them all. */
  const held = new Map<string, number>()
  const heldMax = Math.max(1, Math.floor(deps.repliesMax / 2))

  app.route<{ Params: { token: string; hex: string } }>({
    method: ['GET', 'HEAD'],
    url: '/webseed/:token/:hex',
    handler: async (request, reply) => {
      const { token, hex } = request.params
      const { infoHash, subject } = await claimsOfToken(verifier, token, deps.sourceOf(request))
      const blob = await store.blobOfInfoHash(infoHash)
      if (!blob || blob.digest !== digestFromHex(hex))
        throw new ApiError(404, 'NOT_FOUND', 'The token is for another blob')
      const range = parseRange(request.headers.range, blob.sizeBytes)
      if (range === 'unsatisfiable') {
        throw new ApiError(416, 'RANGE', 'The range is outside the blob', {
          headers: { 'content-range': contentRange(undefined, blob.sizeBytes) },
        })
      }
      const { start, end } = range ?? { start: 0, end: blob.sizeBytes }
      if (range) reply.code(206).header('content-range', contentRange(range, blob.sizeBytes))
      reply.headers({
        'content-length': String(end - start),
        'accept-ranges': 'bytes',
        'content-type': 'application/octet-stream',
        'cache-control': 'no-store',
      })
      if (request.method === 'HEAD') return reply.send()
      if (replies >= deps.repliesMax || (held.get(subject) ?? 0) >= heldMax) {
        observer.busy()
        for (const name of ['content-length', 'content-range', 'content-type']) reply.removeHeader(name)
        throw new ApiError(503, 'BUSY', 'The server seeds to as many as it may', {
          headers: { 'retry-after': '2' },
        })
      }
      // Gone while we looked: its `close` has been and would never give the turn back.
      if (reply.raw.destroyed) return reply.hijack()
      observer.replying(++replies)
      held.set(subject, (held.get(subject) ?? 0) + 1)
      reply.raw.once('close', () => {
        observer.replying(--replies)
        const left = (held.get(subject) ?? 1) - 1
        if (left === 0) held.delete(subject)
        else held.set(subject, left)
      })
      return sendBytes(
        reply,
        async function* (signal) {
          for await (const bytes of store.readBlob(blob.digest, { start, end }, signal)) {
            await limiter.take(bytes.length, signal)
            observer.served(bytes.length)
            yield bytes
          }
        },
        deps.log,
      )
    },
  })
}

/** @throws ApiError 403: the reason stays here, as on announces */
async function claimsOfToken(verifier: TokenVerifier, token: string, source: Ip) {
  try {
    const claims = await verifier.verify(token, 'announce', { from: source })
    if (!claims.scopes.has('webseed')) throw new TokenError('wrong_scope')
    if (claims.cidr && !cidrContains(claims.cidr, source)) throw new TokenError('wrong_address')
    return claims
  } catch (error) {
    if (error instanceof TokenError && error.fault === 'busy') throw tooBusy(error)
    if (error instanceof TokenError)
      throw new ApiError(403, 'DENIED', 'unapproved request: invalid jwt', { cause: error })
    throw error
  }
}
