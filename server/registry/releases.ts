import type { FastifyInstance } from 'fastify'
import { LRUCache } from 'lru-cache'
import type { Release, ReleaseList } from '../../lib/client/api.ts'
import { parseContentDigest } from '../../lib/protocol/digest.ts'
import type { AccessControl } from './access.ts'
import type { BlobStore, Tag } from './blob-store.ts'
import { blobsOf, parseManifest } from './oci-manifest.ts'

export interface ReleaseDeps {
  readonly store: BlobStore
  readonly access: AccessControl
}

/** Manifests never change, so neither does what is read from them. */
const blobsCached = 10_000

/** `GET /api/v1/releases`: every tag that the caller may pull, newest first. */
export function registerReleaseRoutes(app: FastifyInstance, { store, access }: ReleaseDeps): void {
  const cache = new LRUCache<string, Release['blobs']>({ max: blobsCached })
  const blobs = async (repository: string, { digest }: Tag): Promise<Release['blobs']> => {
    const key = `${repository}@${digest}`
    const known = cache.get(key)
    if (known) return known
    const manifest = await store.getManifest(repository, digest)
    if (!manifest) return []
    const read = await describeBlobs(store, manifest.bytes)
    cache.set(key, read)
    return read
  }
  app.get<{ Querystring: { repository?: string } }>(
    '/api/v1/releases',
    async (request): Promise<ReleaseList> => {
      const caller = await access.callerOf(request.headers)
      const { repository } = request.query
      const visible = (await store.listRepositories()).filter(
        (name) => (repository === undefined || name === repository) && caller.may('pull', name),
      )
      const releases: Release[] = []
      for (const name of visible) {
        for (const tag of await store.listTags(name)) {
          const its = await blobs(name, tag)
          releases.push({
            repository: name,
            tag: tag.tag,
            digest: tag.digest,
            publishedAt: tag.updatedAt.toISOString(),
            sizeBytes: its.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0),
            blobs: its,
          })
        }
      }
      releases.sort((a, b) => (a.publishedAt < b.publishedAt ? 1 : -1))
      return { releases }
    },
  )
}

/** What an artifact without a configuration has in its place (image-spec, "Guidance for an Empty Descriptor"). */
const emptyType = 'application/vnd.oci.empty.v1+json'

async function describeBlobs(store: BlobStore, manifest: Buffer): Promise<Release['blobs']> {
  const blobs = blobsOf(parseManifest(manifest)).filter(({ mediaType }) => mediaType !== emptyType)
  return Promise.all(
    blobs.map(async ({ digest, size, annotations }) => {
      const title = annotations?.['org.opencontainers.image.title']
      const torrent = await store.torrentOf(parseContentDigest(digest))
      return {
        digest,
        sizeBytes: size,
        ...(title === undefined ? {} : { title }),
        ...(torrent === undefined ? {} : { infohash: torrent.infoHash }),
      }
    }),
  )
}
