import type { ContentDigest, Digest } from '../../lib/protocol/digest.ts'
import type { Metainfo } from '../../lib/protocol/metainfo.ts'

/** One stored blob. */
export interface BlobStat {
  readonly digest: ContentDigest
  readonly sizeBytes: number
}

/** A blob on its way in. One writer at a time; bytes are hashed (SHA-256, and SHA-1 per piece) while they arrive, off the event loop. */
export interface BlobUpload extends AsyncDisposable {
  readonly id: string
  /** Bytes received and written so far: the offset of the next chunk. */
  readonly offset: number
  /** Appends a stream; resolves when it has ended and all of it is written. A failed stream leaves `offset` at what was written. */
  append(bytes: AsyncIterable<Uint8Array>, signal: AbortSignal): Promise<void>
  /**
   * Checks the digest, syncs and makes the blob visible, atomically; the session is gone then.
   *
   * @throws ClientError `DIGEST_INVALID` when the bytes have another digest; the session and its bytes are dropped
   */
  commit(expected: ContentDigest): Promise<BlobStat>
  /** Bytes `[start, end)` of what was received so far, while more come. Once it is committed or cancelled rejects with ENOENT. */
  read(range: { start: number; end: number }, signal: AbortSignal): AsyncIterable<Uint8Array>
  /** Forgets the session and its bytes. */
  cancel(): Promise<void>
}

export interface Manifest<Name extends ContentDigest = ContentDigest> {
  readonly digest: Name
  readonly mediaType: string
  readonly bytes: Buffer
}

export interface Tag {
  readonly tag: string
  readonly digest: Digest
  readonly updatedAt: Date
}

/**
 * Blobs, manifests and tags. Content-addressed; every implementation promises, and one contract suite checks:
 *
 * - what has been acknowledged (commit, putManifest, putTag returned) is whole after a crash at any moment, power
 *   loss included; what has not been acknowledged is absent or whole;
 * - concurrent uploads of the same blob end as one; the same bytes named by another algorithm are another blob, and only
 *   those named by SHA-256 have a torrent;
 * - a blob is readable through a repository only where it was pushed or mounted there;
 * - nothing in it needs rename or locks across processes to be more than a POSIX directory gives, so that an
 *   S3-compatible store can follow.
 */
export interface BlobStore extends AsyncDisposable {
  /** Uploads that hold an open file; bounded. */
  readonly uploadsOpen: number
  /** @param lengthHint the length the client declared, so that pieces can be hashed as they arrive */
  startUpload(repository: string, lengthHint: number | undefined): Promise<BlobUpload>
  /** The session of an earlier request; after a restart its bytes are read again first. Undefined if there is none. */
  resumeUpload(repository: string, id: string): Promise<BlobUpload | undefined>

  statBlob(repository: string, digest: ContentDigest): Promise<BlobStat | undefined>
  /** Bytes `[start, end)`. @throws if the blob is gone */
  readBlob(
    digest: ContentDigest,
    range: { start: number; end: number },
    signal: AbortSignal,
  ): AsyncIterable<Uint8Array>
  /** Makes a blob that another repository holds visible in this one; false if `from` does not hold it. */
  mountBlob(repository: string, digest: ContentDigest, from: string): Promise<boolean>
  /** Repositories that hold a blob, in no order. Looks through all of them. */
  repositoriesWith(digest: ContentDigest): Promise<string[]>
  /** The torrent of a blob of any repository; undefined for blobs too small to have one or unknown. */
  torrentOf(digest: ContentDigest): Promise<(Metainfo & { readonly info: Buffer }) | undefined>
  /** The blob that an infohash names. */
  blobOfInfoHash(infoHash: string): Promise<BlobStat | undefined>

  putManifest(repository: string, manifest: Manifest): Promise<void>
  getManifest<Name extends ContentDigest>(
    repository: string,
    digest: Name,
  ): Promise<Manifest<Name> | undefined>
  /** Digests of all manifests of a repository, in no order. */
  listManifests(repository: string): Promise<ContentDigest[]>
  /** Digests of the manifests whose `subject` it is, sorted; whether there is such a subject or not. */
  listReferrers(repository: string, subject: ContentDigest): Promise<ContentDigest[]>
  deleteManifest(repository: string, digest: ContentDigest): Promise<boolean>
  putTag(repository: string, tag: string, digest: Digest): Promise<void>
  getTag(repository: string, tag: string): Promise<Tag | undefined>
  deleteTag(repository: string, tag: string): Promise<boolean>
  /** Sorted by code unit, as the spec's `last` wants. */
  listTags(repository: string): Promise<Tag[]>
  /** Whether anything was ever pushed there. */
  hasRepository(repository: string): Promise<boolean>
  /** Those that manifests were pushed to, sorted. */
  listRepositories(): Promise<string[]>
}
