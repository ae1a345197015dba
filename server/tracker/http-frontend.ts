import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import type { Ip } from '../../lib/protocol/address.ts'
import { writeFailure } from '../../lib/protocol/announce.ts'
import type { TrackerRoutes } from './http-routes.ts'
import type { Tracker } from './tracker.ts'

export interface HttpFrontendDeps {
  readonly tracker: Tracker
  /** The client's address, trusted proxies applied. */
  readonly sourceOf: (request: FastifyRequest) => Ip
  readonly routes: TrackerRoutes
}

/** An announce with the largest token we accept has some 5,000 characters; a scrape of 50 infohashes 3,500. */
const queryCharactersMax = 8192

/** `GET` of announce and scrape routes: moves bytes between HTTP and the tracker, and knows nothing else. */
export function registerTrackerRoutes(
  app: FastifyInstance,
  { tracker, sourceOf, routes }: HttpFrontendDeps,
): void {
  const all = (['announce', 'scrape'] as const).flatMap((action) =>
    routes[action].map((route) => ({ action, route })),
  )
  for (const { action, route } of all) {
    app.route({
      method: ['GET', 'HEAD', 'POST', 'PUT', 'DELETE'],
      // find-my-way has no name for what a trailing wildcard stands for.
      url: route.replace(/\*\w+$/, '*'),
      handler: (request, reply) => {
        if (request.method !== 'GET') {
          return reply.code(405).header('allow', 'GET').type('text/plain').send(`/${action} takes GET\n`)
        }
        // Raw bytes travel percent-encoded in the query; fastify's parser would read them as UTF-8.
        const url = request.raw.url ?? ''
        const query = url.includes('?') ? url.slice(url.indexOf('?') + 1) : ''
        if (query.length > queryCharactersMax) return send(reply, writeFailure('query too long'))
        const bytes = tracker[action](query, sourceOf(request))
        return bytes instanceof Promise ? bytes.then((late) => send(reply, late)) : send(reply, bytes)
      },
    })
  }
}

function send(reply: FastifyReply, bytes: Buffer): FastifyReply {
  return reply.type('text/plain').send(bytes)
}
