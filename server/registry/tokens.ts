import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import type { AnnounceTokenReply, CreatedToken, TokenList } from '../../lib/client/api.ts'
import { AnnounceTokenRequest, CreateTokenRequest } from '../../lib/client/api.ts'
import { parseCidr } from '../../lib/protocol/cidr.ts'
import { parseDigest } from '../../lib/protocol/digest.ts'
import { infoHashFromHex } from '../../lib/protocol/infohash.ts'
import { isRepository } from '../../lib/protocol/reference.ts'
import { withFileLock } from '../../lib/runtime/file-lock.ts'
import { isMissing, writeFileAtomic } from '../../lib/runtime/files.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { TokenAuthority, TokenMinter } from '../../lib/token/token-authority.ts'
import { sweepEntries } from '../state/entries.ts'
import type { StateStore } from '../state/state-store.ts'
import { requireAdmin, requireCredential } from './access-control.ts'
import type { AccessControl, Caller } from './access.ts'
import type { Audit } from './audit.ts'
import type { AuditLog } from './audit-log.ts'
import { ApiError } from './api-error.ts'
import type { BlobStore } from './blob-store.ts'
import { createBootstrapToken } from './enrolment.ts'
import type { Revocations } from './revocations.ts'
import type { RevokedTorrents } from './revoked-torrents.ts'
import { refuseRevoked } from './revoked-torrents.ts'
import { announceTtlMs, signedAnnounceUrl } from './torrents.ts'
import { validate } from './validate.ts'

export interface TokenDeps {
  readonly authority: TokenAuthority
  readonly access: AccessControl
  readonly state: StateStore
  readonly store: BlobStore
  readonly revocations: Revocations
  readonly revokedTorrents: RevokedTorrents
  readonly audit: Audit
  readonly publicUrl: string
  readonly apiTtlMs: number
  readonly torrentTtlMs: number
  readonly agentTtlMs: number
  /** The network that a host's announce tokens are bound to, if any. */
  readonly cidrOf: (caller: Caller, request: FastifyRequest) => string | undefined
  readonly now: () => number
}

/** Registry tokens of the token flow: long enough for one push or pull to ask again in between. */
const accessTtlMs = 5 * 60_000
const tokensListed = 10_000

interface TokenRecord {
  readonly name: string
  readonly scopes: string[]
  readonly createdAt: string
  readonly expiresAt: string
}

/** Public keys, API tokens, signed announce URLs, and the registry token flow (distribution's token authentication). */
export function registerTokenRoutes(app: FastifyInstance, deps: TokenDeps): void {
  const { authority, access, state, revocations, audit, now } = deps

  app.get('/.well-known/jwks.json', (_request, reply) =>
    reply.header('cache-control', 'public, max-age=300').send(authority.jwks()),
  )

  app.post('/api/v1/tokens', async (request, reply): Promise<CreatedToken> => {
    const caller = await requireAdmin(access, request)
    const { name, scopes, ttlSeconds } = validate(CreateTokenRequest, request.body)
    const minted = await authority.minter.mintApi({
      name,
      scopes,
      ttlMs: ttlSeconds === undefined ? deps.apiTtlMs : ttlSeconds * 1000,
    })
    const record: TokenRecord = {
      name,
      scopes,
      createdAt: new Date(now()).toISOString(),
      expiresAt: minted.expiresAt.toISOString(),
    }
    const details = { name, scopes, expiresAt: record.expiresAt }
    await audit(request, caller, { action: 'token.create', target: minted.id, details }, () =>
      state.put(`tokens/${minted.id}`, record),
    )
    void reply.code(201)
    return { id: minted.id, token: minted.token, expiresAt: record.expiresAt }
  })
  app.get('/api/v1/tokens', async (request): Promise<TokenList> => {
    await requireAdmin(access, request)
    const entries = await state.list('tokens/', { limit: tokensListed })
    return {
      tokens: entries.map(({ key, value }) => {
        const id = key.slice('tokens/'.length)
        return { id, ...(value as TokenRecord), revoked: revocations.isRevoked(id) }
      }),
    }
  })
  app.delete<{ Params: { id: string } }>('/api/v1/tokens/:id', async (request, reply) => {
    const caller = await requireAdmin(access, request)
    const entry = await state.get(`tokens/${request.params.id}`)
    if (!entry)
      throw new ApiError(404, 'NOT_FOUND', `There is no token ${request.params.id}`, {
        hint: '`deployctl token list` shows them.',
      })
    const { name, expiresAt } = entry.value as TokenRecord
    const act = { action: 'token.revoke', target: request.params.id, details: { name } } as const
    await audit(request, caller, act, () => revocations.revoke(request.params.id, new Date(expiresAt)))
    return reply.code(204).send()
  })

  app.post('/api/v1/announce-tokens', async (request): Promise<AnnounceTokenReply> => {
    const caller = await requireCredential(access, request)
    const asked = validate(AnnounceTokenRequest, request.body)
    if (asked.cidr !== undefined) parseCidr(asked.cidr)
    if (asked.rack !== undefined && asked.rack !== caller.place && !caller.may('admin'))
      throw new ApiError(403, 'DENIED', `${caller.name} may not say that somebody is in ${asked.rack}`, {
        hint: 'Where a peer is, is the word of an administrator; without --rack its address decides.',
      })
    const infoHash = await askedInfoHash(asked, caller, deps.store)
    refuseRevoked(deps.revokedTorrents, infoHash, infoHash)
    const askedMs = asked.ttlSeconds === undefined ? undefined : asked.ttlSeconds * 1000
    const { token, id, expiresAt } = await authority.minter.mintAnnounce({
      infoHash,
      subject: caller.name,
      ttlMs: announceTtlMs({
        askedMs,
        usualMs: deps.torrentTtlMs,
        hostMs: deps.agentTtlMs,
        caller,
        nowMs: now(),
      }),
      rack: asked.rack ?? caller.place,
      cidr: asked.cidr ?? deps.cidrOf(caller, request),
    })
    const made = {
      infohash: infoHash,
      announceUrl: signedAnnounceUrl(deps.publicUrl, token),
      token,
      expiresAt: expiresAt.toISOString(),
    }
    const details = { token: id, rack: asked.rack, cidr: asked.cidr, expiresAt: made.expiresAt }
    const act = { action: 'announce-token.create', target: infoHash, details } as const
    return audit(request, caller, act, async () => made)
  })

  const flow = async (request: FastifyRequest, scopes: readonly string[]) => {
    const caller = await access.callerOf(request.headers)
    // Else a token that is to live for five minutes would renew itself for ever.
    if (caller.kind === 'access')
      throw new ApiError(401, 'UNAUTHORIZED', 'Cannot make a registry token from a registry token')
    const { credential } = caller
    const granted = scopes.flatMap((scope) => grantedOf(scope, caller))
    const ttlMs = Math.min(accessTtlMs, credential ? credential.expiresAt.getTime() - now() : accessTtlMs)
    const { token } = await authority.minter.mintAccess({
      subject: caller.name,
      access: granted,
      parent: credential,
      ttlMs,
    })
    return {
      token,
      access_token: token,
      expires_in: Math.max(1, Math.floor(ttlMs / 1000)),
      issued_at: new Date(now()).toISOString(),
    }
  }
  app.get('/v2/token', async (request) => {
    const query = new URL(request.raw.url ?? '/', 'http://registry').searchParams
    return flow(
      request,
      query.getAll('scope').flatMap((scopes) => scopes.split(' ')),
    )
  })
  void app.register((scope, _options, done) => {
    scope.addContentTypeParser(
      'application/x-www-form-urlencoded',
      { parseAs: 'string', bodyLimit: 64 * 1024 },
      (_request, body, parsed) => {
        parsed(null, new URLSearchParams(body.toString()))
      },
    )
    scope.post('/v2/token', async (request) => {
      const form = request.body instanceof URLSearchParams ? request.body : new URLSearchParams()
      const secret = form.get('password') ?? form.get('refresh_token')
      if (secret !== null) request.headers.authorization = `Bearer ${secret}`
      const answer = await flow(
        request,
        form.getAll('scope').flatMap((scopes) => scopes.split(' ')),
      )
      // Docker keeps this as its identity token; it is what it gave us, so nothing new is handed out.
      return secret === null ? answer : { ...answer, refresh_token: secret }
    })
    done()
  })
}

/** Forgets tokens that expired before `expiredBeforeMs`: no list shows them then. @returns how many */
export async function sweepTokens(
  state: StateStore,
  expiredBeforeMs: number,
  signal: AbortSignal,
): Promise<number> {
  const isOver = (value: unknown) => Date.parse((value as TokenRecord).expiresAt) < expiredBeforeMs
  return sweepEntries(state, 'tokens/', isOver, signal)
}

/**
 * Writes the first credentials of a server, 0600, and logs only their paths. Once: who puts them away, as they should, does not get
 * others at the next start. `first-tokens-written` remembers it, and whoever has lost them removes that file.
 */
export async function ensureFirstTokens(options: {
  directory: string
  /** Several servers have the directory, and may start for the first time at once. */
  shared: boolean
  minter: TokenMinter
  state: StateStore
  places: 'any' | readonly string[]
  auditLog: AuditLog
  now: () => number
  log: Logger
}): Promise<void> {
  const { directory, minter, state, places, auditLog, now, log } = options
  const ensure = async (name: 'admin-token' | 'bootstrap-token', make: () => Promise<string>) => {
    const file = join(directory, name)
    if (await isThere(file)) return
    const action = name === 'admin-token' ? 'token.create' : 'bootstrap.create'
    const who = { kind: 'server', name: 'first start' }
    const text = await auditLog.around({ who, action, target: name }, make)
    await writeFileAtomic(file, `${text}\n`, { mode: 0o600 })
    log.info({ file }, 'first credential written')
  }
  const marker = join(directory, 'first-tokens-written')
  if (await isThere(marker)) return
  await (options.shared ? withFileLock(join(directory, '.first-tokens'), ensureAll) : ensureAll())

  async function ensureAll(): Promise<void> {
    if (await isThere(marker)) return
    await ensure('admin-token', async () => {
      const scopes = ['admin']
      const { id, token, expiresAt } = await minter.mintApi({
        name: 'first-admin',
        scopes,
        ttlMs: firstTokenTtlMs,
      })
      const record: TokenRecord = {
        name: 'first-admin',
        scopes,
        createdAt: new Date(now()).toISOString(),
        expiresAt: expiresAt.toISOString(),
      }
      await state.put(`tokens/${id}`, record)
      return token
    })
    await ensure(
      'bootstrap-token',
      async () =>
        (await createBootstrapToken({ state, now }, { places, ttlMs: firstTokenTtlMs })).bootstrapToken,
    )
    await writeFileAtomic(marker, `${new Date(now()).toISOString()}\n`, { mode: 0o600 })
  }
}

async function isThere(file: string): Promise<boolean> {
  return stat(file).then(
    () => true,
    (error: unknown) => {
      if (isMissing(error)) return false
      throw error
    },
  )
}

const firstTokenTtlMs = 10 * 365 * 86_400_000

async function askedInfoHash(asked: AnnounceTokenRequest, caller: Caller, store: BlobStore) {
  if (asked.infohash !== undefined) {
    if (!caller.may('admin'))
      throw new ApiError(403, 'DENIED', 'A bare infohash needs the scope admin', {
        hint: 'Name the repository and the digest instead.',
      })
    return infoHashFromHex(asked.infohash)
  }
  if (asked.repository === undefined || asked.digest === undefined) {
    throw new ApiError(400, 'BAD_REQUEST', 'Cannot use the request: need infohash, or repository and digest')
  }
  const { repository } = asked
  if (!caller.may('pull', repository))
    throw new ApiError(403, 'DENIED', `${caller.name} may not pull ${repository}`)
  const digest = parseDigest(asked.digest)
  const torrent = (await store.statBlob(repository, digest)) && (await store.torrentOf(digest))
  if (!torrent) throw new ApiError(404, 'NOT_FOUND', `There is no torrent for ${digest} in ${repository}`)
  return torrent.infoHash
}

/** `repository:NAME:pull,push` as far as the caller may: without actions where it may nothing, so that it need not ask again. */
function grantedOf(scope: string, caller: Caller): { type: string; name: string; actions: string[] }[] {
  const match = /^repository:([^:]+):([a-z,*]+)$/.exec(scope)
  const name = match?.[1]
  if (name === undefined || !isRepository(name)) return []
  const asked = match?.[2] === '*' ? ['pull', 'push', 'delete'] : (match?.[2]?.split(',') ?? [])
  const actions = asked.filter((action) => {
    if (action === 'push') return caller.may('publish', name)
    return (action === 'pull' || action === 'delete') && caller.may(action, name)
  })
  return [{ type: 'repository', name, actions }]
}
