import type { FastifyInstance } from 'fastify'
import type { GcStatus, Pin, PinList } from '../../lib/client/api.ts'
import { GcRequest } from '../../lib/client/api.ts'
import { formatReference, parseReference } from '../../lib/protocol/reference.ts'
import { delay } from '../../lib/runtime/backoff.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import { requireAdmin } from './access-control.ts'
import type { AccessControl } from './access.ts'
import type { Audit } from './audit.ts'
import { ApiError } from './api-error.ts'
import type { GarbageCollector } from './garbage-collector.ts'
import type { Pins } from './pins.ts'
import { validate } from './validate.ts'

export interface GcRouteDeps {
  readonly access: AccessControl
  readonly audit: Audit
  readonly collector: GarbageCollector
  readonly pins: Pins
  readonly log: Logger
}

/** A client is not kept waiting for longer than this; it asks again how the run goes on. */
const answerWithinMs = 10_000

/** `/api/v1/gc` and `/api/v1/pins`. */
export function registerGcRoutes(
  app: FastifyInstance,
  { access, audit, collector, pins, log }: GcRouteDeps,
): void {
  app.post('/api/v1/gc', async (request): Promise<GcStatus> => {
    const caller = await requireAdmin(access, request)
    const { dryRun = false } = validate(GcRequest, request.body)
    log.info({ by: caller.name, dryRun }, 'garbage collection asked for')
    const run = () => collector.run({ dryRun })
    const act = { action: 'gc', target: 'registry' } as const
    const answered = new AbortController()
    try {
      await Promise.race([
        dryRun ? run() : audit(request, caller, act, run),
        delay(answerWithinMs, answered.signal),
      ])
    } finally {
      answered.abort()
    }
    return collector.latestStatus()
  })
  app.get('/api/v1/gc', async (request): Promise<GcStatus> => {
    await requireAdmin(access, request)
    return collector.latestStatus()
  })

  app.get('/api/v1/pins', async (request): Promise<PinList> => {
    await requireAdmin(access, request)
    return { pins: await pins.list() }
  })
  app.put<{ Params: { reference: string } }>('/api/v1/pins/:reference', async (request): Promise<Pin> => {
    const caller = await requireAdmin(access, request)
    const reference = parseReference(request.params.reference)
    const act = { action: 'pin.put', target: formatReference(reference) } as const
    return audit(request, caller, act, () => pins.pin(reference, caller.name))
  })
  app.delete<{ Params: { reference: string } }>('/api/v1/pins/:reference', async (request, reply) => {
    const caller = await requireAdmin(access, request)
    const reference = parseReference(request.params.reference)
    const act = { action: 'pin.remove', target: formatReference(reference) } as const
    if (!(await audit(request, caller, act, () => pins.unpin(reference))))
      throw new ApiError(404, 'NOT_FOUND', `There is no pin ${formatReference(reference)}`, {
        hint: '`deployctl registry pins` shows them.',
      })
    return reply.code(204).send()
  })
}
