import type { FastifyInstance, FastifyRequest } from 'fastify'
import type { AuditReply } from '../../lib/client/api.ts'
import { AuditQuery } from '../../lib/client/api.ts'
import type { Ip } from '../../lib/protocol/address.ts'
import { formatIp } from '../../lib/protocol/address.ts'
import { requireAdmin } from './access-control.ts'
import type { AccessControl, Caller } from './access.ts'
import { ApiError } from './api-error.ts'
import type { AuditEntry, AuditLog, SharedAuditLogs } from './audit-log.ts'
import { validate } from './validate.ts'

/** Who is written down as the one who did it. */
export type Actor = Pick<Caller, 'name'> & {
  readonly kind: string
  readonly credential: { readonly id: string } | undefined
}

/** An act of a request: its line is written and synced, then it is done. Rejects with ApiError where there can be no line. */
export type Audit = <Result>(
  request: FastifyRequest,
  actor: Actor,
  act: Pick<AuditEntry, 'action' | 'target' | 'details'>,
  work: () => Promise<Result>,
) => Promise<Result>

export function createAudit(log: AuditLog, sourceOf: (request: FastifyRequest) => Ip): Audit {
  return async (request, { kind, name, credential }, act, work) =>
    log.around(
      { who: { kind, name, credential: credential?.id }, address: formatIp(sourceOf(request)), ...act },
      work,
    )
}

const pageLines = 1000

/**
 * `GET /api/v1/audit?after=&since=&limit=&log=`: lines as they stand in the file, so that whoever asks can check their chain. Several servers have a
 * chain each: whoever asks for none is told their names.
 */
export function registerAuditRoutes(
  app: FastifyInstance,
  {
    access,
    auditLog,
    auditLogs,
  }: { access: AccessControl; auditLog: AuditLog; auditLogs: SharedAuditLogs | undefined },
): void {
  app.get('/api/v1/audit', async (request): Promise<AuditReply> => {
    await requireAdmin(access, request)
    const { after = 0, since, limit = pageLines, log } = validate(AuditQuery, request.query)
    const sinceMs = since === undefined ? 0 : Date.parse(since)
    const asked = { after, sinceMs, limit: Math.min(limit, pageLines) }
    const logs = await auditLogs?.names()
    if (logs && log === undefined) return { lines: [], logs }
    const page = log === undefined ? await auditLog.read(asked) : await auditLogs?.read(log, asked)
    if (!page)
      throw new ApiError(404, 'NOT_FOUND', `There is no audit log of a server ${log ?? ''}`, {
        hint: 'Ask without `log` for the names of all.',
      })
    const { lines, next } = page
    return { lines, ...(next === undefined ? {} : { next }), ...(logs && { logs }) }
  })
}
