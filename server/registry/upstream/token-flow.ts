import { LRUCache } from 'lru-cache'
import { z } from 'zod'
import { parseChallenges } from './challenge.ts'
import { UpstreamError } from './upstream-error.ts'
import type { UpstreamHttp } from './upstream-http.ts'

export interface Credential {
  readonly user: string
  readonly password: string
}

export interface TokenFlowDeps {
  readonly http: UpstreamHttp
  /** Where the tokens are for. */
  readonly upstream: URL
  /** Read again for each token, so that a new one needs no restart. */
  readonly credential: () => Promise<Credential | undefined>
  readonly now: () => number
}

/** Distribution's token authentication, seen from the client: a challenge names a server of tokens, and a token opens a scope. */
export interface TokenFlow {
  /** The Authorization that was good for this scope the last time. */
  known(scope: string): Promise<string | undefined>
  /** The Authorization that a challenge asks for; undefined where there is none to be had. @throws UpstreamError */
  answer(challenge: string, scope: string, signal: AbortSignal): Promise<string | undefined>
  forget(scope: string): void
}

const TokenReply = z.looseObject({
  token: z.string().min(1).optional(),
  access_token: z.string().min(1).optional(),
  expires_in: z.number().positive().optional(),
})
const replyBytesMax = 64 * 1024
const tokensCached = 1000
/** What distribution says a token without `expires_in` lives. */
const tokenLifeSeconds = 60
/** A token is not used in its last tenth: it would end on the way. */
const usedShare = 0.9

export function createTokenFlow({ http, upstream, credential, now }: TokenFlowDeps): TokenFlow {
  const tokens = new LRUCache<string, { authorization: string; untilMs: number }>({ max: tokensCached })
  /** The upstream takes the credential itself. */
  let basic = false

  const basicHeader = async () => {
    const own = await credential()
    return own && `Basic ${Buffer.from(`${own.user}:${own.password}`).toString('base64')}`
  }
  const fetchToken = async (
    parameters: ReadonlyMap<string, string>,
    scope: string,
    signal: AbortSignal,
  ): Promise<string> => {
    const realm = URL.parse(parameters.get('realm') ?? '', upstream)
    if (!realm) throw new UpstreamError('broken', `${upstream.host} names no server of tokens`)
    const service = parameters.get('service')
    if (service !== undefined) realm.searchParams.set('service', service)
    realm.searchParams.append('scope', parameters.get('scope') ?? scope)
    const answer = await http.send({
      method: 'GET',
      url: realm,
      authorization: await basicHeader(),
      signal,
    })
    const body = await answer.text(replyBytesMax)
    if (answer.status !== 200) {
      const fault = answer.status >= 500 || answer.status === 429 ? 'down' : 'refused'
      throw new UpstreamError(fault, `${realm.host} gives no token: it answered ${answer.status}`)
    }
    const reply = TokenReply.safeParse(parseJson(body)).data
    const token = reply?.token ?? reply?.access_token
    // A line break would end the header that it goes into.
    if (token === undefined || !/^[\x21-\x7e]+$/.test(token))
      throw new UpstreamError('broken', `${realm.host} answered without a token`)
    const authorization = `Bearer ${token}`
    const lifeMs = (reply?.expires_in ?? tokenLifeSeconds) * 1000
    tokens.set(scope, { authorization, untilMs: now() + lifeMs * usedShare })
    return authorization
  }
  return {
    known: async (scope) => {
      const token = tokens.get(scope)
      if (token && token.untilMs > now()) return token.authorization
      return basic ? basicHeader() : undefined
    },
    answer: async (header, scope, signal) => {
      const challenges = parseChallenges(header)
      const bearer = challenges.find(({ scheme }) => scheme === 'bearer')
      if (bearer) return fetchToken(bearer.parameters, scope, signal)
      basic = challenges.some(({ scheme }) => scheme === 'basic')
      return basic ? basicHeader() : undefined
    },
    forget: (scope) => {
      tokens.delete(scope)
    },
  }
}

/** `USER:PASSWORD`; a user name has no colon (RFC 7617). @throws Error */
export function parseCredential(text: string): Credential {
  const colon = text.indexOf(':')
  if (colon < 1 || /[\r\n]/.test(text)) throw new Error('need one line USER:PASSWORD')
  return { user: text.slice(0, colon), password: text.slice(colon + 1) }
}

function parseJson(bytes: Buffer): unknown {
  try {
    return JSON.parse(bytes.toString())
  } catch {
    return undefined
  }
}
