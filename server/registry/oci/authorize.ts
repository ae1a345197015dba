import type { FastifyRequest } from 'fastify'
import { isRepository } from '../../../lib/protocol/reference.ts'
import type { Action } from '../access.ts'
import { ApiError } from '../api-error.ts'
import type { OciTarget } from '../oci-path.ts'
import type { Context } from './context.ts'
import { queryOf } from './context.ts'

/** What a challenge asks a client to get a token for. Who deletes looks first: the scope names both. */
const actionsFor: Readonly<Record<Action, string>> = {
  pull: 'pull',
  publish: 'pull,push',
  delete: 'pull,delete',
  admin: '*',
}

/** @throws ApiError 401 where other credentials may help, else 403 */
export function require({ caller, access, request }: Context, action: Action, repository: string): void {
  if (caller.may(action, repository)) return
  // A client that can get more with its credentials learns where; docker and skopeo send none before they are asked.
  if (caller.kind === 'anonymous' || caller.kind === 'access') {
    const actions = actionsFor[action]
    const error = caller.kind === 'access' ? ',error="insufficient_scope"' : ''
    throw new ApiError(401, 'UNAUTHORIZED', `${caller.name} may not ${action} ${repository}`, {
      headers: {
        'www-authenticate': `${access.challenge},scope="${scopeOf(request, repository, actions)}"${error}`,
      },
    })
  }
  throw new ApiError(403, 'DENIED', `${caller.name} may not ${action} ${repository}`)
}

/**
 * Whether the caller may mount from a repository. A registry token that was not made for it asks again with one that is; one that
 * was, and does not have it, uploads.
 *
 * @throws ApiError 401
 */
export function mayMountFrom(context: Context, repository: string, from: string): boolean {
  const { caller, access, request } = context
  if (caller.may('pull', from)) return true
  if (caller.askedFor === undefined || caller.askedFor.includes(from)) return false
  throw new ApiError(401, 'UNAUTHORIZED', `${caller.name} may not pull ${from}`, {
    headers: {
      'www-authenticate': `${access.challenge},scope="${scopeOf(request, repository, 'pull,push')}",error="insufficient_scope"`,
    },
  })
}

/** The challenge names what the request needed, so that docker and skopeo ask for a token with that scope. */
export function withScope(error: unknown, target: OciTarget, request: FastifyRequest): unknown {
  if (!(error instanceof ApiError) || error.status !== 401 || !('repository' in target)) return error
  const { method } = request
  const deletes = method === 'DELETE' && target.kind !== 'upload'
  const actions = actionsFor[method === 'GET' || method === 'HEAD' ? 'pull' : deletes ? 'delete' : 'publish']
  const challenge = error.headers['www-authenticate']
  if (challenge === undefined) return error
  return new ApiError(401, error.code, error.message, {
    cause: error,
    headers: {
      ...error.headers,
      'www-authenticate': `${challenge},scope="${scopeOf(request, target.repository, actions)}"`,
    },
  })
}

/** What to ask a token for; a mount needs its source as well. */
function scopeOf(request: FastifyRequest, repository: string, actions: string): string {
  const scope = `repository:${repository}:${actions}`
  if (request.method !== 'POST') return scope
  const query = queryOf(request)
  const from = query.get('from')
  return query.has('mount') && from !== null && isRepository(from)
    ? `${scope} repository:${from}:pull`
    : scope
}
