import type { FastifyInstance, FastifyRequest } from 'fastify'
import type { Logger } from '../../../lib/runtime/log.ts'
import { requireCredential } from '../access-control.ts'
import type { AccessControl } from '../access.ts'
import { ApiError } from '../api-error.ts'
import type { EventObserver, EventQueue } from './event-queue.ts'
import type { PullThrough } from './pull-through.ts'
import { readPushEvents } from './push-events.ts'

export interface NotificationDeps {
  readonly access: AccessControl
  /** Whoever sends no credential may send events and jobs. */
  readonly anonymous: boolean
  readonly queue: EventQueue
  readonly pullThrough: Pick<PullThrough, 'upstreamOf'>
  readonly observer: EventObserver
  readonly log: Logger
}

export interface NotificationReply {
  readonly accepted: number
  readonly duplicates: number
  readonly ignored: readonly { readonly index: number; readonly reason: string }[]
}

/**
 * `POST /registry/notifications`: what another registry says was pushed to it, by distribution's notifications or Harbor's Kraken driver.
 * Answered 202 once it is stored. `GET /health`, which Harbor asks first.
 */
export function registerNotificationRoutes(app: FastifyInstance, deps: NotificationDeps): void {
  const { queue, pullThrough, observer, log } = deps
  app.get('/health', () => ({ status: 'ok' }))
  void app.register((scope, _options, done) => {
    scope.addContentTypeParser(
      /^application\/vnd\.docker\.distribution\.events\.v\d+\+json/,
      { parseAs: 'string' },
      scope.getDefaultJsonParser('error', 'error'),
    )
    scope.post('/registry/notifications', async (request, reply): Promise<NotificationReply> => {
      const sender = await senderOf(request, deps)
      const { events, ignored } = readPushEvents(
        request.body,
        (repository) => pullThrough.upstreamOf(repository) !== undefined,
      )
      for (const { repository } of events) sender.requirePublish(repository)
      for (const { reason } of ignored) {
        observer.event('ignored')
        log.debug({ by: sender.name, reason }, 'event ignored')
      }
      const { accepted, duplicates } = await queue.add(events)
      void reply.code(202)
      return { accepted, duplicates, ignored }
    })
    done()
  })
}

export interface Sender {
  readonly name: string
  /** @throws ApiError 403 */
  requirePublish(repository: string): void
}

/** Who sends events and jobs: they make this server pull, so they need the right to publish. @throws ApiError 401 */
export async function senderOf(
  request: FastifyRequest,
  { access, anonymous }: Pick<NotificationDeps, 'access' | 'anonymous'>,
): Promise<Sender> {
  if (anonymous && request.headers.authorization === undefined)
    return { name: 'anonymous', requirePublish: () => undefined }
  const caller = await requireCredential(access, request)
  return {
    name: caller.name,
    requirePublish: (repository) => {
      if (caller.may('publish', repository)) return
      throw new ApiError(403, 'DENIED', `${caller.name} may not publish ${repository}`, {
        hint: `Give the sender a token made with: deployctl token create --scope publish:${repository}`,
      })
    },
  }
}
