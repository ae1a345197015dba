import type { FastifyInstance, FastifyRequest } from 'fastify'
import type { TokenExchangeReply } from '../../lib/client/api.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import { TokenError } from '../../lib/token/claims.ts'
import type { IdToken, IdTokenVerifier } from '../../lib/token/id-token.ts'
import { IssuerUnavailable } from '../../lib/token/id-token.ts'
import type { TokenMinter } from '../../lib/token/token-authority.ts'
import type { Audit } from './audit.ts'
import { ApiError, tooBusy } from './api-error.ts'

/** What a claim must say: the text, one of the texts, a text that begins so, or one that fits a pattern. */
export type ClaimPattern =
  string | readonly string[] | { readonly prefix: string } | { readonly glob: string }

/** Whose tokens are exchanged, and for what. */
export interface TrustEntry {
  readonly name: string
  readonly issuer: string
  readonly audience: string
  readonly claims: Readonly<Record<string, ClaimPattern>>
  readonly grants: readonly string[]
  readonly ttlMs: number
}

export interface TokenExchangeDeps {
  readonly trust: readonly TrustEntry[]
  readonly idTokens: IdTokenVerifier
  readonly minter: TokenMinter
  readonly audit: Audit
  readonly log: Logger
}

const grantType = 'urn:ietf:params:oauth:grant-type:token-exchange'
const subjectTypes = ['urn:ietf:params:oauth:token-type:jwt', 'urn:ietf:params:oauth:token-type:id_token']
const formBytesMax = 64 * 1024
/** Of a claim, in the audit log. */
const claimCharactersMax = 200

/** `POST /api/v1/token-exchange` (RFC 8693): a token of an issuer that is trusted for a short-lived API token. Twice for the same one is the same grant twice. */
export function registerTokenExchange(app: FastifyInstance, deps: TokenExchangeDeps): void {
  const { trust, minter, audit, log } = deps
  void app.register((scope, _options, done) => {
    scope.addContentTypeParser(
      'application/x-www-form-urlencoded',
      { parseAs: 'string', bodyLimit: formBytesMax },
      (_request, body, parsed) => {
        parsed(null, new URLSearchParams(body.toString()))
      },
    )
    scope.post('/api/v1/token-exchange', async (request, reply): Promise<TokenExchangeReply> => {
      const idToken = await verified(deps.idTokens, subjectTokenOf(request))
      const entries = trust.filter((entry) => fits(entry, idToken))
      if (entries.length === 0) {
        const { issuer, subject, audience } = idToken
        log.info({ issuer, subject, audience }, 'token exchange refused: no entry of registry.trust fits')
        throw new ApiError(
          403,
          'DENIED',
          `Cannot exchange the token: no entry of registry.trust fits what ${issuer} says`,
          {
            hint: 'Compare its aud and claims (deployctl token inspect) with the entry that was meant.',
          },
        )
      }
      const name = entries
        .map((entry) => entry.name)
        .join('+')
        .slice(0, 128)
      const scopes = [...new Set(entries.flatMap(({ grants }) => grants))]
      const minted = await minter.mintApi({
        name,
        scopes,
        ttlMs: Math.min(...entries.map(({ ttlMs }) => ttlMs)),
      })
      void reply.header('cache-control', 'no-store')
      const details = {
        scopes,
        issuer: idToken.issuer,
        sub: clip(idToken.subject),
        claims: claimsOf(entries, idToken),
      }
      const actor = { kind: 'oidc', name, credential: undefined }
      const act = { action: 'token.exchange', target: minted.id, details } as const
      return audit(request, actor, act, async () => ({
        access_token: minted.token,
        issued_token_type: 'urn:ietf:params:oauth:token-type:access_token',
        token_type: 'Bearer',
        expires_in: Math.max(1, Math.floor(Math.min(...entries.map(({ ttlMs }) => ttlMs)) / 1000)),
        scope: scopes.join(' '),
      }))
    })
    done()
  })
}

/** Whether an entry is for a token: its issuer, its audience, and every claim that the entry names. */
export function fits(
  { issuer, audience, claims }: Pick<TrustEntry, 'issuer' | 'audience' | 'claims'>,
  token: Pick<IdToken, 'issuer' | 'audience' | 'claims'>,
): boolean {
  return (
    token.issuer === issuer &&
    token.audience.includes(audience) &&
    Object.entries(claims).every(
      ([name, pattern]) => Object.hasOwn(token.claims, name) && claimFits(pattern, token.claims[name]),
    )
  )
}

/** A list fits where one of its members does; numbers, true and false as they are written. */
export function claimFits(pattern: ClaimPattern, claim: unknown): boolean {
  if (Array.isArray(claim))
    return claim.some((member) => !Array.isArray(member) && claimFits(pattern, member))
  if (typeof claim !== 'string' && typeof claim !== 'number' && typeof claim !== 'boolean') return false
  const text = String(claim)
  if (typeof pattern === 'string') return text === pattern
  if ('prefix' in pattern) return text.startsWith(pattern.prefix)
  if ('glob' in pattern) return globFits(pattern.glob, text)
  return pattern.includes(text)
}

/** `*` stands for any letters but `/`, `**` for any at all. Time grows with the product of the lengths, whatever the pattern. */
function globFits(glob: string, text: string): boolean {
  const parts = glob.match(/\*\*|\*|[^*]/gsu) ?? []
  /** Which beginnings of the text the parts so far fit, by length. */
  let ends = new Set([0])
  const letters = Array.from(text)
  for (const part of parts) {
    const next = new Set<number>()
    for (const end of ends) {
      if (part !== '*' && part !== '**') {
        if (letters[end] === part) next.add(end + 1)
        continue
      }
      for (let at = end; !next.has(at); at++) {
        next.add(at)
        if (at >= letters.length || (part === '*' && letters[at] === '/')) break
      }
    }
    ends = next
  }
  return ends.has(letters.length)
}

/** @throws ApiError 400 naming the field that is wrong */
function subjectTokenOf({ body }: FastifyRequest): string {
  const form = body instanceof URLSearchParams ? body : new URLSearchParams()
  const bad = (what: string) =>
    new ApiError(400, 'BAD_REQUEST', `Cannot exchange the token: ${what}`, {
      hint: 'Send a form: grant_type, subject_token and subject_token_type as in RFC 8693 section 2.1.',
    })
  if (form.get('grant_type') !== grantType) throw bad(`need grant_type ${grantType}`)
  const type = form.get('subject_token_type')
  if (type === null || !subjectTypes.includes(type))
    throw bad(`need subject_token_type ${subjectTypes.join(' or ')}`)
  const token = form.get('subject_token')
  if (token === null || token === '') throw bad('need subject_token')
  return token
}

async function verified(idTokens: IdTokenVerifier, token: string): Promise<IdToken> {
  try {
    return await idTokens.verify(token)
  } catch (error) {
    if (error instanceof IssuerUnavailable)
      throw new ApiError(
        503,
        'ISSUER_UNAVAILABLE',
        `Cannot exchange the token: the keys of its issuer are not known: ${error.message}`,
        {
          headers: { 'retry-after': '10' },
          cause: error,
        },
      )
    if (!(error instanceof TokenError)) throw error
    if (error.fault === 'busy') throw tooBusy(error)
    throw new ApiError(
      401,
      'UNAUTHORIZED',
      `Cannot exchange the token: ${error.fault.replaceAll('_', ' ')}`,
      {
        hint: hintFor(error),
        cause: error,
      },
    )
  }
}

function hintFor({ fault }: TokenError): string {
  if (fault === 'wrong_issuer')
    return 'No entry of registry.trust names its issuer: it must be the same letter for letter.'
  if (fault === 'expired') return 'Have the issuer make a new one, and compare the clocks.'
  return '`deployctl token inspect` shows what it says.'
}

/** What decided, for the audit log. */
function claimsOf(entries: readonly TrustEntry[], { claims }: IdToken): Record<string, string> {
  const names = new Set(entries.flatMap((entry) => Object.keys(entry.claims)))
  return Object.fromEntries(Array.from(names, (name) => [name, clip(String(claims[name]))]))
}

function clip(text: string): string {
  return text.slice(0, claimCharactersMax)
}
