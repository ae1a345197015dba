import { LRUCache } from 'lru-cache'
import { z } from 'zod'
import type { ContentDigest, Digest } from '../../lib/protocol/digest.ts'
import { digestHex, digestOf, isSha256, isSha512 } from '../../lib/protocol/digest.ts'
import { infoHashToHex } from '../../lib/protocol/infohash.ts'
import { writeTorrent } from '../../lib/protocol/metainfo.ts'
import { entriesOf, removeUnchanged } from '../state/entries.ts'
import type { StateEntry, StateStore } from '../state/state-store.ts'
import type { BlobStore, Manifest } from './blob-store.ts'
import { blobsOf, imageManifestType, parseManifest } from './oci-manifest.ts'
import { announceUrl, torrentType } from './torrents.ts'

export const torrentArtifactType = 'application/vnd.deployctl.torrent.v1'

/**
 * Each manifest whose layers have torrents has one referrer that nobody pushed: an artifact with these torrents, unsigned. It is
 * made when it is asked for, of nothing but the manifest, the pieces of its layers and the announce URL, so its digest is the
 * same each time. It is there while its subject is.
 */
export interface TorrentReferrers {
  /** The artifact of a manifest; undefined where there is no such manifest, or no torrent of any of its layers. */
  of(repository: string, subject: ContentDigest): Promise<Manifest | undefined>
  /** The artifact by its own digest, once `of` has shown it to somebody. */
  manifest(repository: string, digest: ContentDigest): Promise<Manifest | undefined>
  /** What such an artifact names: a torrent, or the empty config. */
  blob(repository: string, digest: ContentDigest): Promise<Buffer | undefined>
  /** Forgets what was written down about blobs and manifests that no repository has any more. @returns how many notes went */
  sweep(signal: AbortSignal): Promise<number>
}

export interface TorrentReferrerDeps {
  readonly store: BlobStore
  readonly state: StateStore
  readonly publicUrl: string
}

const emptyType = 'application/vnd.oci.empty.v1+json'
const emptyBytes = Buffer.from('{}')
const emptyDigest = digestOf(emptyBytes)
/** Of a manifest with more layers than any image has, the first have torrents here. */
const torrentsMax = 200
/** Artifacts known to be written down; 400 bytes a layer. */
const artifactsCached = 1000

const contentDigest = z.custom<ContentDigest>(
  (value) => typeof value === 'string' && (isSha256(value) || isSha512(value)),
)
/**
 * A digest does not say what it is of, so that is written down under it when a list of referrers first shows it: the next
 * request may come after a restart, or to another server.
 */
const Origin = z.discriminatedUnion('kind', [
  z.object({ kind: z.literal('artifact'), subject: contentDigest }),
  z.object({ kind: z.literal('torrent'), blob: contentDigest }),
])
type Origin = z.output<typeof Origin>

export function createTorrentReferrers({ store, state, publicUrl }: TorrentReferrerDeps): TorrentReferrers {
  const artifacts = new LRUCache<string, Manifest>({ max: artifactsCached })
  const announce = announceUrl(publicUrl).href

  const torrentOf = async (blob: ContentDigest): Promise<Torrent | undefined> => {
    const torrent = await store.torrentOf(blob)
    if (!torrent) return undefined
    const bytes = writeTorrent(torrent.info, { announce, createdBy: 'Rackswarm' })
    return {
      blob,
      name: torrent.name,
      infoHash: infoHashToHex(torrent.infoHash),
      digest: digestOf(bytes),
      bytes,
    }
  }

  const torrentsOf = async (manifest: Manifest): Promise<Torrent[]> => {
    const digests = blobsOf(parseManifest(manifest.bytes)).map(({ digest }) => digest)
    const torrents: Torrent[] = []
    for (const digest of new Set(digests)) {
      if (torrents.length === torrentsMax) break
      const torrent = isSha256(digest) ? await torrentOf(digest) : undefined
      if (torrent) torrents.push(torrent)
    }
    return torrents
  }

  const make = async (repository: string, subject: Manifest): Promise<Manifest | undefined> => {
    const torrents = await torrentsOf(subject)
    if (torrents.length === 0) return undefined
    const artifact = composeArtifact(subject, torrents)
    for (const { digest, blob } of torrents) await writeDown(originKey(digest), { kind: 'torrent', blob })
    await writeDown(originKey(artifact.digest), { kind: 'artifact', subject: subject.digest })
    await writeDown(emptyKey(repository), { kind: 'config' })
    return artifact
  }

  const writeDown = async (key: string, origin: Origin | { kind: 'config' }) => {
    if (!(await state.get(key))) await state.put(key, origin)
  }

  const originOf = async (digest: ContentDigest): Promise<Origin | undefined> => {
    const entry = await state.get(originKey(digest))
    return entry && Origin.safeParse(entry.value).data
  }

  const of = async (repository: string, subject: ContentDigest): Promise<Manifest | undefined> => {
    const manifest = await store.getManifest(repository, subject)
    if (!manifest) return undefined
    const key = `${repository}@${subject}`
    const known = artifacts.get(key)
    if (known) return known
    const artifact = await make(repository, manifest)
    if (artifact) artifacts.set(key, artifact)
    return artifact
  }

  return {
    of,
    manifest: async (repository, digest) => {
      const origin = await originOf(digest)
      if (origin?.kind !== 'artifact') return undefined
      const artifact = await of(repository, origin.subject)
      return artifact?.digest === digest ? artifact : undefined
    },
    blob: async (repository, digest) => {
      if (digest === emptyDigest) return (await state.get(emptyKey(repository))) && emptyBytes
      const origin = await originOf(digest)
      if (origin?.kind !== 'torrent' || !(await store.statBlob(repository, origin.blob))) return undefined
      const torrent = await torrentOf(origin.blob)
      return torrent?.digest === digest ? torrent.bytes : undefined
    },
    sweep: async (signal) => {
      const over: StateEntry[] = []
      /** Notes of artifacts, by their subjects. */
      const artifactsOf = new Map<ContentDigest, StateEntry[]>()
      for await (const entry of entriesOf(state, originPrefix, signal)) {
        const origin = Origin.safeParse(entry.value).data
        if (origin?.kind === 'artifact')
          artifactsOf.set(origin.subject, [...(artifactsOf.get(origin.subject) ?? []), entry])
        else if (origin?.kind === 'torrent' && !(await store.torrentOf(origin.blob))) over.push(entry)
      }
      for await (const repository of store.scanRepositories()) {
        signal.throwIfAborted()
        for (const digest of await store.listManifests(repository)) artifactsOf.delete(digest)
      }
      // Pushed again it is made again, and its note with it.
      for (const key of artifacts.keys())
        if (artifactsOf.has(key.slice(key.indexOf('@') + 1) as ContentDigest)) artifacts.delete(key)
      let removed = 0
      for (const entry of [...over, ...[...artifactsOf.values()].flat()])
        if (await removeUnchanged(state, entry)) removed++
      return removed
    },
  }
}

interface Torrent {
  readonly blob: ContentDigest
  readonly name: string
  readonly infoHash: string
  /** Of `bytes`. */
  readonly digest: Digest
  readonly bytes: Buffer
}

function composeArtifact(subject: Manifest, torrents: readonly Torrent[]): Manifest {
  const bytes = Buffer.from(
    JSON.stringify({
      schemaVersion: 2,
      mediaType: imageManifestType,
      artifactType: torrentArtifactType,
      config: {
        mediaType: emptyType,
        digest: emptyDigest,
        size: emptyBytes.length,
        data: emptyBytes.toString('base64'),
      },
      layers: torrents.map(({ blob, name, infoHash, digest, bytes: { length } }) => ({
        mediaType: torrentType,
        digest,
        size: length,
        annotations: {
          'org.opencontainers.image.title': `${name}.torrent`,
          'vnd.deployctl.torrent.blob': blob,
          'vnd.deployctl.torrent.infohash': infoHash,
        },
      })),
      subject: { mediaType: subject.mediaType, digest: subject.digest, size: subject.bytes.length },
    }),
  )
  return { digest: digestOf(bytes), mediaType: imageManifestType, bytes }
}

const originPrefix = 'torrent-referrers/'

function originKey(digest: ContentDigest): string {
  return `${originPrefix}${digestHex(digest)}`
}

/** The empty config is there only for repositories that have such an artifact: elsewhere nobody pushed it. */
function emptyKey(repository: string): string {
  return `torrent-referrer-configs/${repository}`
}
