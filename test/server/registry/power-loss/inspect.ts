import { createHash } from 'node:crypto'
import { mkdtemp, readFile, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ContentDigest, Digest } from '../../../../lib/protocol/digest.ts'
import {
  contentDigestFromHex,
  contentDigestOf,
  digestHex,
  isSha256,
  parseContentDigest,
} from '../../../../lib/protocol/digest.ts'
import { ClientError } from '../../../../lib/protocol/errors.ts'
import { infoHashOf, infoHashToHex } from '../../../../lib/protocol/infohash.ts'
import { pieceLengthFor, swarmLengthMin, writeBlobInfo } from '../../../../lib/protocol/metainfo.ts'
import { silentLog } from '../../../../lib/runtime/log.ts'
import type { BlobStore } from '../../../../server/registry/blob-store.ts'
import { startDiskBlobStore } from '../../../../server/registry/disk-blob-store.ts'
import { blobsOf, parseManifest, subjectIn } from '../../../../server/registry/oci-manifest.ts'
import type { CrashState } from './crash-states.ts'
import { writeState } from './crash-states.ts'

/** What a client was told, and may count on. */
export type Fact =
  | { readonly kind: 'blob'; readonly repository: string; readonly digest: ContentDigest }
  | { readonly kind: 'manifest' | 'no manifest'; readonly repository: string; readonly digest: ContentDigest }
  | { readonly kind: 'tag'; readonly repository: string; readonly tag: string; readonly digest: Digest }
  | { readonly kind: 'no tag'; readonly repository: string; readonly tag: string }
  | {
      readonly kind: 'referrer'
      readonly repository: string
      readonly subject: ContentDigest
      readonly digest: ContentDigest
    }

/** Starts the store on a state and looks at all of it. @returns what is wrong, in words */
export async function inspect(state: CrashState, facts: readonly Fact[]): Promise<string[]> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-power-loss-'))
  try {
    await writeState(state, directory)
    const faults: string[] = []
    await using store = await startStore(directory)
    for (const fact of facts) if (!(await holds(fact, store))) faults.push(`lost: ${describeFact(fact)}`)
    await inspectBlobs(directory, store, faults)
    for (const repository of await repositoriesIn(join(directory, 'repositories')))
      await inspectRepository(directory, repository, store, faults)
    return faults
  } catch (error) {
    return [`the store failed: ${String(error)}`]
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
}

/**
 * Whether uploads that were under way go on, or are refused, and a blob can be pushed to what is left, whatever that is.
 *
 * @returns what is wrong
 */
export async function pushOnto(state: CrashState, bytes: Buffer, digest: ContentDigest): Promise<string[]> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-power-loss-'))
  try {
    await writeState(state, directory)
    await using store = await startStore(directory)
    for (const id of await names(join(directory, 'uploads'))) await finishAnyhow(id, directory, store, digest)
    const upload = await store.startUpload('afterwards', bytes.length)
    await upload.append(once(bytes), new AbortController().signal)
    await upload.commit(digest)
    const faults: string[] = []
    if (!(await holds({ kind: 'blob', repository: 'afterwards', digest }, store)))
      faults.push(`${digest} was pushed after the failure, and is not there`)
    await inspectBlobs(directory, store, faults)
    return faults
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
}

/** A client that comes back to its session, of which some is lost. */
async function finishAnyhow(
  id: string,
  directory: string,
  store: BlobStore,
  digest: ContentDigest,
): Promise<void> {
  const text = await readFile(join(directory, 'uploads', id, 'session'), 'utf8').catch(() => '')
  const repository = /"repository":"([^"]+)"/.exec(text)?.[1] ?? 'web'
  const upload = await store.resumeUpload(repository, id)
  await upload?.commit(digest).catch((error: unknown) => {
    if (!(error instanceof ClientError && error.code === 'DIGEST_INVALID')) throw error
  })
}

export function startStore(directory: string): Promise<BlobStore> {
  return startDiskBlobStore({
    directory,
    blobMaxBytes: 2 ** 40,
    uploadsMax: 10,
    uploadTtlMs: 24 * 3_600_000,
    diskReserveBytes: 0,
    now: Date.now,
    log: silentLog(),
  })
}

function describeFact(fact: Fact): string {
  return `${fact.kind} ${fact.repository} ${'tag' in fact ? fact.tag : ''} ${'digest' in fact ? fact.digest : ''}`
}

async function holds(fact: Fact, store: BlobStore): Promise<boolean> {
  switch (fact.kind) {
    case 'blob':
      return (await store.statBlob(fact.repository, fact.digest)) !== undefined
    case 'manifest':
      return (await store.getManifest(fact.repository, fact.digest)) !== undefined
    case 'no manifest':
      return (await store.getManifest(fact.repository, fact.digest)) === undefined
    case 'tag':
      return (await store.getTag(fact.repository, fact.tag))?.digest === fact.digest
    case 'no tag':
      return (await store.getTag(fact.repository, fact.tag)) === undefined
    case 'referrer':
      return (await store.listReferrers(fact.repository, fact.subject)).includes(fact.digest)
  }
}

/** Every blob that can be seen is whole, has its torrent, and is found by it. */
async function inspectBlobs(directory: string, store: BlobStore, faults: string[]): Promise<void> {
  const blobs = join(directory, 'blobs')
  for (const algorithm of await names(blobs))
    for (const shelf of await names(join(blobs, algorithm)))
      for (const hex of await names(join(blobs, algorithm, shelf))) {
        const digest = contentDigestFromHex(hex)
        const bytes = await readFile(join(blobs, algorithm, shelf, hex, 'data')).catch(() => undefined)
        if (!digest || !bytes || contentDigestOf(bytes, digest) !== digest) {
          faults.push(`blob ${hex} is not whole`)
          continue
        }
        if (!isSha256(digest) || bytes.length <= swarmLengthMin) continue
        const info = writeBlobInfo({ sha256Hex: hex, length: bytes.length, pieces: piecesOf(bytes) })
        const infoHash = infoHashToHex(infoHashOf(info))
        const torrent = await store.torrentOf(digest)
        if (!torrent?.info.equals(info)) faults.push(`blob ${hex} has not the torrent of its bytes`)
        if ((await store.blobOfInfoHash(infoHash))?.digest !== digest)
          faults.push(`blob ${hex} is not found by its infohash`)
      }
}

/** Nothing names what is not there. */
async function inspectRepository(
  directory: string,
  repository: string,
  store: BlobStore,
  faults: string[],
): Promise<void> {
  for (const hex of await names(join(directory, 'repositories', repository, '_blobs'))) {
    const digest = contentDigestFromHex(hex)
    if (digest && !(await store.statBlob(repository, digest)))
      faults.push(`${repository} has a link to blob ${hex}, which is not there`)
  }
  for (const { tag, digest } of await store.listTags(repository))
    if (!(await store.getManifest(repository, digest)))
      faults.push(`${repository}:${tag} names manifest ${digest}, which is not there`)
  for (const digest of await store.listManifests(repository)) {
    const manifest = await store.getManifest(repository, digest)
    if (!manifest || contentDigestOf(manifest.bytes, digest) !== digest) {
      faults.push(`manifest ${repository}@${digest} is not whole`)
      continue
    }
    for (const { digest: blob } of blobsOf(parseManifest(manifest.bytes)))
      if (!(await store.statBlob(repository, parseContentDigest(blob))))
        faults.push(`manifest ${repository}@${digest} names blob ${blob}, which is not there`)
    const subject = subjectIn(manifest.bytes)
    if (subject && !(await store.listReferrers(repository, subject)).includes(digest))
      faults.push(`manifest ${repository}@${digest} is not among the referrers of ${digestHex(subject)}`)
  }
}

function piecesOf(bytes: Buffer): Buffer {
  const pieceLength = pieceLengthFor(bytes.length)
  return Buffer.concat(
    Array.from({ length: Math.ceil(bytes.length / pieceLength) }, (_, i) =>
      createHash('sha1')
        .update(bytes.subarray(i * pieceLength, (i + 1) * pieceLength))
        .digest(),
    ),
  )
}

/** One level of names is enough for what the tests push to. */
async function repositoriesIn(directory: string): Promise<string[]> {
  return (await names(directory)).filter((name) => !name.startsWith('_'))
}

async function names(directory: string): Promise<string[]> {
  const entries = await readdir(directory).catch(() => [])
  return entries.filter((name) => !name.startsWith('.')).sort()
}

async function* once(bytes: Buffer): AsyncGenerator<Uint8Array> {
  yield await Promise.resolve(bytes)
}
