import { createHash } from 'node:crypto'
import type { FastifyInstance } from 'fastify'
import type { RevokedTorrentList } from '../../lib/client/api.ts'
import { RevokeTorrentRequest } from '../../lib/client/api.ts'
import type { InfoHash } from '../../lib/protocol/infohash.ts'
import { infoHashFromHex } from '../../lib/protocol/infohash.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import { follow } from '../state/follow.ts'
import type { StateStore } from '../state/state-store.ts'
import { requireAdmin, requireCredential } from './access-control.ts'
import type { AccessControl } from './access.ts'
import { ApiError } from './api-error.ts'
import type { Audit } from './audit.ts'
import { validate } from './validate.ts'

/** Torrents that must no longer be shared: in memory for the verifier and the tracker, in the state for the next start. */
export interface RevokedTorrents extends AsyncDisposable {
  has(infoHash: InfoHash): boolean
  /** Changes with each change of the list, and is the same on every server that has the same one. */
  readonly version: string
  list(): RevokedTorrentList['torrents']
  /** Takes effect at once, and is durable when it returns. */
  revoke(infoHash: InfoHash, reason: string | undefined): Promise<void>
  /** @returns whether it was revoked */
  unrevoke(infoHash: InfoHash): Promise<boolean>
}

interface RevokedRecord {
  readonly revokedAt: string
  readonly reason?: string | undefined
}

const prefix = 'revoked-torrents/'
/** Every host reads the list when it changes: some 100 bytes each. */
const torrentsMax = 10_000

/** Loads the list, and follows what others write to it. */
export async function loadRevokedTorrents({
  state,
  now,
  log,
}: {
  state: StateStore
  now: () => number
  log: Logger
}): Promise<RevokedTorrents> {
  const revoked = new Map<string, RevokedRecord>()
  /** Of all entries together, in whatever order they came: every server that has the same list names it so. */
  let sum = 0n
  const hashOf = (infoHash: string, { revokedAt }: RevokedRecord) =>
    createHash('sha256').update(`${infoHash} ${revokedAt}`).digest().readBigUInt64BE()
  const set = (infoHash: string, record: RevokedRecord | undefined) => {
    // What is done here comes back from the watch.
    if (revoked.get(infoHash)?.revokedAt === record?.revokedAt) return
    const before = revoked.get(infoHash)
    if (before) sum ^= hashOf(infoHash, before)
    if (record) sum ^= hashOf(infoHash, record)
    if (record) revoked.set(infoHash, record)
    else revoked.delete(infoHash)
  }
  const following = await follow({
    state,
    prefix,
    loaded: async (entries) => {
      const found = new Map(
        (await Array.fromAsync(entries)).map(({ key, value }) => [
          key.slice(prefix.length),
          value as RevokedRecord,
        ]),
      )
      for (const infoHash of [...revoked.keys()]) if (!found.has(infoHash)) set(infoHash, undefined)
      for (const [infoHash, record] of found) set(infoHash, record)
    },
    changed: (change) => {
      if (change.kind === 'put')
        set(change.entry.key.slice(prefix.length), change.entry.value as RevokedRecord)
      else set(change.key.slice(prefix.length), undefined)
    },
    log,
  })
  return {
    has: (infoHash) => revoked.size > 0 && revoked.has(infoHash),
    get version() {
      return revoked.size === 0 ? 'none' : sum.toString(16)
    },
    list: () => [...revoked].map(([infohash, record]) => ({ infohash, ...record })),
    revoke: async (infoHash, reason) => {
      const before = revoked.get(infoHash)
      if (!before && revoked.size >= torrentsMax)
        throw new ApiError(
          507,
          'TOO_MANY_TORRENTS',
          `Cannot revoke ${infoHash}: ${torrentsMax} torrents are revoked`,
          {
            hint: 'Take back some whose blobs are gone: deployctl torrent revoked, deployctl torrent unrevoke INFOHASH.',
          },
        )
      const record = { revokedAt: new Date(now()).toISOString(), reason }
      set(infoHash, record)
      await state.put(`${prefix}${infoHash}`, record)
    },
    unrevoke: async (infoHash) => {
      const was = await state.delete(`${prefix}${infoHash}`)
      set(infoHash, undefined)
      return was
    },
    [Symbol.asyncDispose]: async () => {
      await following[Symbol.asyncDispose]()
    },
  }
}

/** @throws ApiError `TORRENT_REVOKED` */
export function refuseRevoked(revoked: Pick<RevokedTorrents, 'has'>, infoHash: InfoHash, what: string): void {
  if (!revoked.has(infoHash)) return
  throw new ApiError(403, 'TORRENT_REVOKED', `Cannot share ${what}: its torrent ${infoHash} was revoked`, {
    hint: `If it may be shared again: deployctl torrent unrevoke ${infoHash}`,
  })
}

/** Revoking torrents is for administrators; what is revoked may be known to whoever has a credential: hosts stop those swarms. */
export function registerRevokedTorrentRoutes(
  app: FastifyInstance,
  {
    revokedTorrents,
    access,
    audit,
  }: { revokedTorrents: RevokedTorrents; access: AccessControl; audit: Audit },
): void {
  app.get('/api/v1/revoked-torrents', async (request): Promise<RevokedTorrentList> => {
    await requireCredential(access, request)
    return { version: revokedTorrents.version, torrents: revokedTorrents.list() }
  })
  app.put<{ Params: { infohash: string } }>('/api/v1/revoked-torrents/:infohash', async (request, reply) => {
    const caller = await requireAdmin(access, request)
    const infoHash = infoHashFromHex(request.params.infohash)
    const { reason } = validate(RevokeTorrentRequest, request.body)
    const act = { action: 'torrent.revoke', target: infoHash, details: { reason } } as const
    await audit(request, caller, act, () => revokedTorrents.revoke(infoHash, reason))
    return reply.code(204).send()
  })
  app.delete<{ Params: { infohash: string } }>(
    '/api/v1/revoked-torrents/:infohash',
    async (request, reply) => {
      const caller = await requireAdmin(access, request)
      const infoHash = infoHashFromHex(request.params.infohash)
      if (!revokedTorrents.has(infoHash))
        throw new ApiError(404, 'NOT_FOUND', `The torrent ${infoHash} is not revoked`, {
          hint: '`deployctl torrent revoked` shows those that are.',
        })
      const act = { action: 'torrent.unrevoke', target: infoHash } as const
      await audit(request, caller, act, () => revokedTorrents.unrevoke(infoHash))
      return reply.code(204).send()
    },
  )
}
