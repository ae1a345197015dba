import type { IncomingHttpHeaders } from 'node:http'
import type { TokenVerifier } from '../../lib/token/claims.ts'
import { TokenError } from '../../lib/token/claims.ts'
import type { AccessControl, Action, Caller } from './access.ts'
import { covers } from '../../lib/protocol/reference.ts'
import { ApiError, tooBusy } from './api-error.ts'

export interface AccessControlOptions {
  readonly verifier: TokenVerifier
  readonly anonymousPull: boolean
  readonly publicUrl: string
}

/** Reads credentials of requests: Bearer with an api, host or access token, or Basic with an api token as the password. */
export function createAccessControl({
  verifier,
  anonymousPull,
  publicUrl,
}: AccessControlOptions): AccessControl {
  const challenge = `Bearer realm="${publicUrl}/v2/token",service="${serviceOf(publicUrl)}"`
  const unauthorized = (message: string, cause?: unknown) =>
    new ApiError(401, 'UNAUTHORIZED', message, {
      cause,
      hint: 'Log in with `deployctl login`, or ask an administrator for a token.',
      headers: { 'www-authenticate': challenge },
    })
  return {
    challenge,
    callerOf: async (headers) => {
      const header = headers.authorization
      if (header === undefined) {
        if (anonymousPull) return anonymous
        throw unauthorized('Cannot tell who asks: there is no credential')
      }
      const token = readCredential(header)
      if (token === undefined)
        throw unauthorized('Cannot read the credential: need Bearer, or Basic with a token as the password')
      try {
        return await callerOfToken(verifier, token)
      } catch (error) {
        if (error instanceof TokenError && error.fault === 'busy') throw tooBusy(error)
        if (error instanceof TokenError)
          throw unauthorized(`Cannot accept the credential: ${error.fault.replaceAll('_', ' ')}`, error)
        throw error
      }
    },
  }
}

/** @throws ApiError 401 or 403 */
export async function requireAdmin(
  access: AccessControl,
  request: { headers: IncomingHttpHeaders },
): Promise<Caller> {
  const caller = await access.callerOf(request.headers)
  if (!caller.may('admin'))
    throw new ApiError(403, 'DENIED', `${caller.name} is not an administrator`, {
      hint: 'Use a token with the scope admin.',
    })
  return caller
}

/** For what is about the fleet or makes tokens: `anonymous_pull` opens pulls, and nothing else. @throws ApiError 401 */
export async function requireCredential(
  access: AccessControl,
  request: { headers: IncomingHttpHeaders },
): Promise<Caller> {
  const caller = await access.callerOf(request.headers)
  if (caller.kind === 'anonymous')
    throw new ApiError(401, 'UNAUTHORIZED', 'Cannot tell who asks: there is no credential', {
      hint: 'Log in with `deployctl login`; pulls alone are open to anyone.',
    })
  return caller
}

/** What the registry calls itself in the token flow. */
function serviceOf(publicUrl: string): string {
  return new URL(publicUrl).host
}

const anonymous: Caller = {
  kind: 'anonymous',
  name: 'anonymous',
  scopes: ['pull:*'],
  place: undefined,
  credential: undefined,
  may: (action) => action === 'pull',
}

/** The token of an Authorization header. Docker sends a token as the password, beside any user name. */
export function readCredential(header: string): string | undefined {
  const [scheme, value] = header.split(' ')
  if (value === undefined) return undefined
  if (scheme?.toLowerCase() === 'bearer') return value
  if (scheme?.toLowerCase() !== 'basic') return undefined
  const decoded = Buffer.from(value, 'base64').toString()
  return decoded.includes(':') ? decoded.slice(decoded.indexOf(':') + 1) : undefined
}

async function callerOfToken(verifier: TokenVerifier, token: string): Promise<Caller> {
  switch (typeOf(token)) {
    case 'host+jwt': {
      const { host, place, repositories, id, expiresAt } = await verifier.verify(token, 'host')
      const scopes = repositories.map((pattern) => `pull:${pattern}`)
      return {
        kind: 'host',
        name: host,
        scopes,
        place,
        credential: { id, expiresAt },
        may: (action, repository) => scopesAllow(scopes, action, repository),
      }
    }
    case 'at+jwt': {
      const { subject, access, parent } = await verifier.verify(token, 'access')
      return {
        kind: 'access',
        name: subject,
        scopes: access.flatMap(({ name, actions }) =>
          actions.map((action) => `${action === 'push' ? 'publish' : action}:${name}`),
        ),
        place: undefined,
        askedFor: access.map(({ name }) => name),
        credential: parent,
        may: (action, repository) =>
          access.some(
            ({ name, actions }) =>
              name === repository && actions.includes(action === 'publish' ? 'push' : action),
          ),
      }
    }
    default: {
      const { name, scopes, id, expiresAt } = await verifier.verify(token, 'api')
      return {
        kind: 'api',
        name,
        scopes,
        place: undefined,
        credential: { id, expiresAt },
        may: (action, repository) => scopesAllow(scopes, action, repository),
      }
    }
  }
}

/** `admin` allows all, `publish` allows to pull as well, `delete` nothing but that. Without a repository only `admin` is asked about. */
function scopesAllow(scopes: readonly string[], action: Action, repository: string | undefined): boolean {
  return scopes.some((scope) => {
    if (scope === 'admin') return true
    const [granted, pattern] = scope.split(':')
    if (action === 'admin' || repository === undefined || pattern === undefined) return false
    return (granted === action || (granted === 'publish' && action === 'pull')) && covers(pattern, repository)
  })
}

/** The `typ` that a token claims, unproven: it only chooses which kind to verify it as. */
function typeOf(token: string): string | undefined {
  try {
    const header = JSON.parse(Buffer.from(token.slice(0, token.indexOf('.')), 'base64url').toString()) as {
      typ?: string
    }
    return header.typ
  } catch {
    return undefined
  }
}
