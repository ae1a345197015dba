import { createServer } from 'node:http'
import type { IncomingMessage, ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { TestContext } from 'node:test'
import { compactOf } from './compact.ts'
import { writeAnnounceReply, parseAnnounce } from '../../lib/protocol/announce.ts'
import type { Announce } from '../../lib/protocol/announce.ts'
import { writeFailure } from '../../lib/protocol/announce.ts'
import type { Blob } from './engine/fixtures.ts'
import { temporaryDirectory } from './engine/fixtures.ts'
import { digestOf } from '../../lib/protocol/digest.ts'
import type { AnnounceScope } from '../../lib/token/claims.ts'
import type { Minted } from '../../lib/token/token-authority.ts'
import { openTokenAuthority } from '../../lib/token/token-authority.ts'

/**
 * The calls that an agent makes, answered by a real HTTP server that a test can bend: what it holds, whom it refuses, which
 * bytes it gives. The whole server is tested in test/system.
 */
export interface MiniServer {
  readonly url: string
  readonly announces: Announce[]
  readonly grants: { digest: string; stalledSeconds?: number; certificate?: string }[]
  readonly reports: { held: { reference: string; digest: string; state: string }[] }[]
  readonly blobReads: string[]
  /** NAME:TAG → manifest digest. */
  readonly tags: Map<string, string>
  epoch: string
  webseed: boolean
  /** Peers that announces answer with, by port on the loopback address. */
  peers: { port: number; distance: number }[]
  gateway: boolean
  failAnnounce: string | undefined
  intervalSeconds: number
  tokenLifeMs: number
  /** What is said by the tokens for other agents. */
  peerClaims: { scopes: AnnounceScope[]; cidr?: string; rack?: string }
  /** Answers in place of the server where it returns true. */
  intercept: (request: IncomingMessage, response: ServerResponse) => boolean
  publish(reference: string, blobs: readonly { blob: Blob; title?: string; torrent?: Blob }[]): string
}

export async function startMiniServer(t: TestContext): Promise<MiniServer> {
  const blobs = new Map<string, Buffer>()
  const torrents = new Map<string, Blob>()
  const manifests = new Map<string, Buffer>()
  const peerTokens = new Map<string, Minted>()
  const server = createServer((request, response) => {
    void answer(request, response).catch(() => response.destroy())
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  t.after(() => {
    server.closeAllConnections()
    server.close()
  })
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  const authority = await openTokenAuthority({
    keysDirectory: await temporaryDirectory(t),
    algorithm: 'ES256',
    issuer: url,
    audience: url,
    clockToleranceMs: 0,
    now: Date.now,
  })
  t.after(() => authority[Symbol.asyncDispose]())
  const mini: MiniServer = {
    url,
    announces: [],
    grants: [],
    reports: [],
    blobReads: [],
    tags: new Map(),
    epoch: 'one',
    webseed: true,
    peers: [],
    gateway: false,
    failAnnounce: undefined,
    intervalSeconds: 60,
    tokenLifeMs: 900_000,
    peerClaims: { scopes: ['peer'], cidr: '127.0.0.0/8' },
    intercept: () => false,
    publish: (reference, list) => {
      const layers = list.map(({ blob, title, torrent }) => {
        const digest = `sha256:${blob.sha256}`
        blobs.set(digest, blob.bytes)
        torrents.set(digest, torrent ?? blob)
        return {
          mediaType: 'application/octet-stream',
          digest,
          size: blob.bytes.length,
          ...(title === undefined ? {} : { annotations: { 'org.opencontainers.image.title': title } }),
        }
      })
      const manifest = Buffer.from(
        JSON.stringify({ schemaVersion: 2, mediaType: 'application/vnd.oci.image.manifest.v1+json', layers }),
      )
      const digest = digestOf(manifest)
      manifests.set(digest, manifest)
      mini.tags.set(reference, digest)
      return digest
    },
  }

  async function answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const parts: Buffer[] = []
    for await (const part of request as AsyncIterable<Buffer>) parts.push(part)
    if (mini.intercept(request, response)) return
    const [path = '', query = ''] = (request.url ?? '').split('?')
    const json = (value: unknown) =>
      response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify(value))
    const refuse = (status: number, code: string) =>
      response
        .writeHead(status, { 'content-type': 'application/json' })
        .end(JSON.stringify({ error: { code, message: code } }))
    const body = (parts.length > 0 ? JSON.parse(Buffer.concat(parts).toString()) : {}) as Record<
      string,
      unknown
    >
    if (path === '/announce') {
      const announce = parseAnnounce(query)
      mini.announces.push(announce)
      response.end(
        mini.failAnnounce !== undefined
          ? writeFailure(mini.failAnnounce)
          : writeAnnounceReply(
              {
                complete: 1,
                incomplete: 1,
                downloaded: 0,
                intervalSeconds: mini.intervalSeconds,
                minIntervalSeconds: 0,
                peers: announce.event === 'stopped' ? [] : mini.peers.map(compactOf),
                externalIp: undefined,
                trackerId: 'ticket',
                rackswarm: { epoch: mini.epoch, gateway: mini.gateway },
              },
              true,
            ),
      )
      return
    }
    if (path === '/api/v1/enroll' || path === '/api/v1/hosts/self/renew') {
      json({
        host: body['host'],
        credential: 'host-credential',
        place: body['place'],
        expiresAt: new Date(Date.now() + 864e5).toISOString(),
      })
      return
    }
    if (path === '/api/v1/hosts/self/report') {
      mini.reports.push(body as never)
      json({
        epoch: mini.epoch,
        tags: Object.fromEntries(
          (body['follow'] as string[]).map((reference) => [reference, mini.tags.get(reference) ?? null]),
        ),
        place: 'rack-1',
        reportIntervalSeconds: 0.2,
        serverTime: new Date().toISOString(),
      })
      return
    }
    if (path === '/.well-known/jwks.json') {
      json(authority.jwks())
      return
    }
    if (path === '/api/v1/swarm-grants') {
      mini.grants.push(body as never)
      const torrent = torrents.get(String(body['digest']))
      if (!torrent) {
        refuse(404, 'NO_TORRENT')
        return
      }
      const claims = {
        infoHash: torrent.metainfo.infoHash,
        subject: 'a-host',
        ttlMs: mini.tokenLifeMs,
        certificate: mini.grants.at(-1)?.certificate,
        ...mini.peerClaims,
      }
      // Asked again it gives the one it gave, as the whole server does.
      const key = JSON.stringify(claims)
      const peer = peerTokens.get(key) ?? (await authority.minter.mintAnnounce(claims))
      peerTokens.set(key, peer)
      json({
        infohash: torrent.metainfo.infoHash,
        metainfo: torrent.torrent.toString('base64'),
        announceUrl: `${url}/announce`,
        token: `token-${mini.grants.length}`,
        expiresAt: new Date(Date.now() + mini.tokenLifeMs).toISOString(),
        peerToken: peer.token,
        webseedUrl: `${url}/webseed/secret/${torrent.sha256}`,
        webseed: mini.webseed,
      })
      return
    }
    const manifest = /^\/v2\/(.+)\/manifests\/(.+)$/.exec(path)
    if (manifest) {
      const [, repository = '', reference = ''] = manifest
      const digest = reference.startsWith('sha256:') ? reference : mini.tags.get(`${repository}:${reference}`)
      const bytes = manifests.get(digest ?? '')
      if (!bytes || digest === undefined) refuse(404, 'MANIFEST_UNKNOWN')
      else
        response
          .writeHead(200, {
            'docker-content-digest': digest,
            'content-type': 'application/vnd.oci.image.manifest.v1+json',
          })
          .end(bytes)
      return
    }
    const digest = /(?:^\/v2\/.+\/blobs\/sha256:|^\/webseed\/secret\/)([0-9a-f]{64})$/.exec(path)?.[1]
    const bytes = blobs.get(`sha256:${digest ?? ''}`)
    if (!bytes) {
      refuse(404, 'BLOB_UNKNOWN')
      return
    }
    mini.blobReads.push(path)
    const range = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? '')
    if (!range) {
      response.writeHead(200, { 'content-length': bytes.length }).end(bytes)
      return
    }
    const [start, end] = [Number(range[1]), range[2] === '' ? bytes.length : Number(range[2]) + 1]
    response
      .writeHead(206, { 'content-range': `bytes ${start}-${end - 1}/${bytes.length}` })
      .end(bytes.subarray(start, end))
  }
  return mini
}
