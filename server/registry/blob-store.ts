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
  /**
   * Appends a stream; resolves when it has ended and all of it is written. A failed stream leaves `offset` at what was written.
   *
   * @param written is called whenever `offset` has moved
   */
  append(bytes: AsyncIterable<Uint8Array>, signal: AbortSignal, written?: () => void): Promise<void>
  /**
   * Checks the digest, syncs and makes the blob visible, atomically; the session is gone then.
   *
   * @throws ClientError `DIGEST_INVALID` when the bytes have another digest; the session and its bytes are dropped
   */
  commit(expected: ContentDigest): Promise<BlobStat>
  /** Bytes `[start, end)` of what was received so far, while more come; each chunk is good until the next is asked for. Once it is committed or cancelled rejects with ENOENT. */
  read(range: { start: number; end: number }, signal: AbortSignal): AsyncIterable<Uint8Array>
  /** Forgets the session and its bytes. */
  cancel(): Promise<void>
}

export interface Manifest<Name extends ContentDigest = ContentDigest> {
  readonly digest: Name
  readonly mediaType: string
  readonly bytes: Buffer
}

/** What collection sees of a stored thing: when somebody last put it there, mounted it, or claimed it. Milliseconds since 1970. */
export interface Stored {
  readonly digest: ContentDigest
  readonly usedAtMs: number
}

export interface Tag {
  readonly tag: string
  readonly digest: Digest
  readonly updatedAt: Date
}

/** Whether nobody has put the tag in between. */
export function isSameTag(a: Tag, b: Tag): boolean {
  return a.digest === b.digest && a.updatedAt.getTime() === b.updatedAt.getTime()
}

/**
 * Blobs, manifests and tags. Content-addressed; every implementation promises, and one contract suite checks:
 *
 * - what has been acknowledged (commit, putManifest, putTag returned) is whole after a crash at any moment, power
 *   loss included; what has not been acknowledged is absent or whole;
 * - concurrent uploads of the same blob end as one; the same bytes named by another algorithm are another blob, and only
 *   those named by SHA-256 have a torrent;
 * - a blob is readable through a repository only where it was pushed or mounted there;
 * - what makes a blob readable (commit, mountBlob), `claimBlob`, `unlinkBlob` and `deleteBlob` of one digest happen one after the
 *   other: a claim that has returned is seen by the next removal, and a removal that has returned by the next claim. With
 *   conditional writes (If-Match on the object that is the link) an S3-compatible store can give the same;
 * - a link is gone durably before `unlinkBlob` returns, and with it before its blob can go: no crash leaves a link that names nothing;
 * - several servers may have one store. All of the above holds between them, but that a claim counts for `claimHoldsMs` only; and what one
 *   has changed the others see within `settleMs`;
 * - nothing in it needs locks across processes, or more of a rename than that one of several succeeds, so that an S3-compatible store can
 *   follow: there the same steps are conditional writes (If-None-Match, If-Match) of an object that stands for the thing.
 */
export interface BlobStore extends AsyncDisposable {
  /** Whoever names later than this what was claimed claims it again afterwards, and acknowledges nothing where that fails. Milliseconds. */
  readonly claimHoldsMs: number
  /** After so long every server sees what one has changed, and a claim has become what it was for. Undefined: there is one server. Milliseconds. */
  readonly settleMs: number | undefined
  /** Puts back what a removal has taken away that was ended in the middle. */
  recover(): Promise<void>
  /** Uploads that hold an open file; bounded. */
  readonly uploadsOpen: number
  /** @param lengthHint the length the client declared, so that pieces can be hashed as they arrive */
  startUpload(repository: string, lengthHint: number | undefined): Promise<BlobUpload>
  /** The session of an earlier request; after a restart its bytes are read again first. Undefined if there is none. */
  resumeUpload(repository: string, id: string): Promise<BlobUpload | undefined>

  /** Where a session stands, without going on with it. */
  statUpload(repository: string, id: string): Promise<Pick<BlobUpload, 'id' | 'offset'> | undefined>

  statBlob(repository: string, digest: ContentDigest): Promise<BlobStat | undefined>
  /**
   * Like `statBlob`, for whoever is about to name the blob: it counts as used now. Not synced: after power loss it may count as
   * used when it was used before.
   */
  claimBlob(repository: string, digest: ContentDigest): Promise<BlobStat | undefined>
  /** Bytes `[start, end)`; each chunk is good until the next is asked for. @throws if the blob is gone */
  readBlob(
    digest: ContentDigest,
    range: { start: number; end: number },
    signal: AbortSignal,
  ): AsyncIterable<Uint8Array>
  /** Makes a blob that another repository holds visible in this one; false if `from` does not hold it. */
  mountBlob(repository: string, digest: ContentDigest, from: string): Promise<boolean>
  /**
   * Takes the blob away from this repository, unless it was used at `unusedSinceMs` or later. @returns whether it did
   *
   * @param isNeeded asked by a store of several servers, once all of them see that the blob is going: true lets it stay
   */
  unlinkBlob(
    repository: string,
    digest: ContentDigest,
    unusedSinceMs: number,
    isNeeded?: () => Promise<boolean>,
  ): Promise<boolean>
  /**
   * Removes the bytes and the torrent, unless the blob was pushed or mounted anywhere at `unusedSinceMs` or later. The caller knows
   * that no repository had it then. @returns whether it did
   */
  deleteBlob(digest: ContentDigest, unusedSinceMs: number): Promise<boolean>
  /** All blobs, those that no repository has too; in no order, as they are read. */
  scanBlobs(): AsyncIterable<Stored & BlobStat>
  /** The blobs of a repository; in no order, as they are read. */
  scanLinks(repository: string): AsyncIterable<Stored>
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
  /**
   * Removes manifests that belong together, in the order in which they are given: all, or none where one was used at `unusedSinceMs` or
   * later. `isNeeded` as with `unlinkBlob`. @returns whether it did
   */
  deleteManifests(
    repository: string,
    digests: readonly ContentDigest[],
    options?: { unusedSinceMs?: number; isNeeded?: (() => Promise<boolean>) | undefined },
  ): Promise<boolean>
  /** The manifest counts as used now, as by `putManifest`. @returns whether there is one */
  claimManifest(repository: string, digest: ContentDigest): Promise<boolean>
  /** Undefined if there is no such manifest. */
  manifestUsedAtMs(repository: string, digest: ContentDigest): Promise<number | undefined>
  /** In no order, as they are read. */
  scanManifests(repository: string): AsyncIterable<Stored>
  putTag(repository: string, tag: string, digest: Digest): Promise<void>
  getTag(repository: string, tag: string): Promise<Tag | undefined>
  /** @param unchanged only if it still is what it was then. @returns whether it did */
  deleteTag(repository: string, tag: string, unchanged?: Tag): Promise<boolean>
  /** Sorted by code unit, as the spec's `last` wants. */
  listTags(repository: string): Promise<Tag[]>
  /** Whether anything was ever pushed there. */
  hasRepository(repository: string): Promise<boolean>
  /** Those that ever had a manifest; sorted. */
  listRepositories(): Promise<string[]>
  /** Those with blobs alone too; in no order, as they are read. */
  scanRepositories(): AsyncIterable<string>
}
