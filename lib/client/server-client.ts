import { z } from 'zod'
import type {
  AnnounceTokenRequest,
  CreateBootstrapTokenRequest,
  CreateTokenRequest,
  EnrollRequest,
  GrantRequest,
  HostReport,
  ImportKeyRequest,
  RevokeTorrentRequest,
  RotateKeyRequest,
} from './api.ts'
import {
  AnnounceTokenReply,
  AuditReply,
  BootstrapTokenList,
  CreatedBootstrapToken,
  CreatedToken,
  GcStatus,
  HostCredential,
  HostList,
  KeyInfo,
  KeyList,
  Pin,
  PinList,
  ReleaseList,
  ReleaseStatus,
  ReportReply,
  RevokedTorrentList,
  ServerInfo,
  SwarmGrant,
  TokenExchangeReply,
  TokenList,
  TopologyExplanation,
} from './api.ts'
import type { HttpClient } from './http.ts'
import { UnreachableError } from './http.ts'

/** The calls of /api/v1, and the two of the tracker that are no announce loop. All reject with RequestError or UnreachableError. */
export type ServerClient = ReturnType<typeof createServerClient>

export function createServerClient(http: HttpClient) {
  const post = <Schema extends z.ZodType>(
    schema: Schema,
    path: string,
    body: unknown,
    signal?: AbortSignal,
  ) => http.json(schema, { method: 'POST', path: `/api/v1${path}`, body, signal })
  const get = <Schema extends z.ZodType>(schema: Schema, path: string) =>
    http.json(schema, { path: `/api/v1${path}` })
  const remove = async (path: string) => {
    await (await http.ok({ method: 'DELETE', path: `/api/v1${path}` })).discard()
  }
  return {
    enroll: (request: EnrollRequest, signal?: AbortSignal) =>
      post(HostCredential, '/enroll', request, signal),
    renew: (signal?: AbortSignal) => post(HostCredential, '/hosts/self/renew', {}, signal),
    report: (report: HostReport, signal?: AbortSignal) =>
      post(ReportReply, '/hosts/self/report', report, signal),
    swarmGrant: (request: GrantRequest, signal?: AbortSignal) =>
      post(SwarmGrant, '/swarm-grants', request, signal),
    announceToken: (request: AnnounceTokenRequest) => post(AnnounceTokenReply, '/announce-tokens', request),
    createToken: (request: CreateTokenRequest) => post(CreatedToken, '/tokens', request),
    listTokens: () => get(TokenList, '/tokens'),
    revokeToken: (id: string) => remove(`/tokens/${encodeURIComponent(id)}`),
    /** A short-lived API token for a token of an issuer that the server trusts (RFC 8693); call it without a credential. */
    exchangeToken: async (subjectToken: string, signal?: AbortSignal) => {
      const form = new URLSearchParams({
        grant_type: 'urn:ietf:params:oauth:grant-type:token-exchange',
        subject_token: subjectToken,
        subject_token_type: 'urn:ietf:params:oauth:token-type:jwt',
      })
      const answer = await http.ok({
        method: 'POST',
        path: '/api/v1/token-exchange',
        headers: { 'content-type': 'application/x-www-form-urlencoded' },
        body: form.toString(),
        signal,
      })
      const parsed = TokenExchangeReply.safeParse(parseJson(await answer.bytes(64 * 1024)))
      if (parsed.success) return parsed.data
      throw new UnreachableError('Cannot understand the answer to the token exchange')
    },
    /** Lines of the audit log, oldest first. */
    audit: ({ after, since, log }: { after: number; since: string | undefined; log?: string | undefined }) =>
      get(
        AuditReply,
        `/audit?after=${after}${since === undefined ? '' : `&since=${encodeURIComponent(since)}`}${log === undefined ? '' : `&log=${encodeURIComponent(log)}`}`,
      ),
    keys: () => get(KeyList, '/keys'),
    rotateKey: (request: RotateKeyRequest) => post(KeyInfo, '/keys/rotate', request),
    importKey: (request: ImportKeyRequest) => post(KeyInfo, '/keys', request),
    revokeKey: (kid: string) => remove(`/keys/${encodeURIComponent(kid)}`),
    revokedTorrents: (signal?: AbortSignal) =>
      http.json(RevokedTorrentList, { path: '/api/v1/revoked-torrents', signal }),
    revokeTorrent: async (infohash: string, request: RevokeTorrentRequest) => {
      const answer = await http.ok({
        method: 'PUT',
        path: `/api/v1/revoked-torrents/${infohash}`,
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify(request),
      })
      await answer.discard()
    },
    unrevokeTorrent: (infohash: string) => remove(`/revoked-torrents/${infohash}`),
    createBootstrapToken: (request: CreateBootstrapTokenRequest) =>
      post(CreatedBootstrapToken, '/bootstrap-tokens', request),
    listBootstrapTokens: () => get(BootstrapTokenList, '/bootstrap-tokens'),
    revokeBootstrapToken: (id: string) => remove(`/bootstrap-tokens/${encodeURIComponent(id)}`),
    hosts: () => get(HostList, '/hosts'),
    revokeHost: (host: string) => remove(`/hosts/${encodeURIComponent(host)}`),
    forgetHost: (host: string) => remove(`/hosts/${encodeURIComponent(host)}?forget=1`),
    releases: (repository?: string) =>
      get(
        ReleaseList,
        `/releases${repository === undefined ? '' : `?repository=${encodeURIComponent(repository)}`}`,
      ),
    releaseStatus: (reference: string) =>
      get(ReleaseStatus, `/releases/status?reference=${encodeURIComponent(reference)}`),
    collectGarbage: (request: { dryRun: boolean }) => post(GcStatus, '/gc', request),
    garbageCollection: () => get(GcStatus, '/gc'),
    pins: () => get(PinList, '/pins'),
    pin: (reference: string) =>
      http.json(Pin, { method: 'PUT', path: `/api/v1/pins/${encodeURIComponent(reference)}` }),
    unpin: (reference: string) => remove(`/pins/${encodeURIComponent(reference)}`),
    explainAddresses: (addresses: readonly string[]) =>
      get(
        TopologyExplanation,
        `/topology?${addresses.map((address) => `address=${encodeURIComponent(address)}`).join('&')}`,
      ),
    serverInfo: () => get(ServerInfo, '/server'),
    jwks: () =>
      http.json(z.object({ keys: z.array(z.looseObject({ kid: z.string() })) }), {
        path: '/.well-known/jwks.json',
      }),
    /** One announce with a query of the caller's making; the reply as it came. */
    announce: async (rawQuery: string, signal?: AbortSignal) => {
      const answer = await http.ok({ path: `/announce?${rawQuery}`, signal })
      return answer.bytes(1024 * 1024)
    },
  }
}

function parseJson(bytes: Buffer): unknown {
  try {
    return JSON.parse(bytes.toString())
  } catch {
    return undefined
  }
}
