import type { Digest } from '../protocol/digest.ts'
import { digestOf, parseDigest } from '../protocol/digest.ts'
import type { AttachedBundle } from '../protocol/dsse.ts'
import { bundleMaxBytes, bundleType } from '../protocol/dsse.ts'
import { ClientError } from '../protocol/errors.ts'
import { provenanceType } from '../protocol/statement.ts'
import { z } from 'zod'
import { RequestError } from './http.ts'
import type { Referrer, RegistryClient } from './registry-client.ts'
import { bytesSource } from './registry-client.ts'

/** What a signature is attached to. */
export interface SignedManifest {
  readonly mediaType: string
  readonly digest: Digest
  readonly sizeBytes: number
}

/** By whose key, so that a reader finds its own among many. Anyone can write it there: it only says where to look first. */
const keyAnnotation = 'vnd.rackswarm.signature.key'
/** Each costs two requests. Whoever may push may attach any number; those that name a key of ours come first. */
const signaturesMax = 100
/** A manifest of one layer has 1 KiB. */
const attachingMaxBytes = 64 * 1024

const manifestType = 'application/vnd.oci.image.manifest.v1+json'
const emptyType = 'application/vnd.oci.empty.v1+json'
const emptyBytes = Buffer.from('{}')
const Attaching = z.object({ layers: z.array(z.object({ digest: z.string(), size: z.int().nonnegative() })) })

/**
 * Stores a signature as a referrer of what it signs, in the layout of cosign's BUNDLE_SPEC. It is found as soon as this resolves.
 *
 * @returns the digest of the manifest that attaches it
 */
export async function attachBundle(
  registry: RegistryClient,
  {
    repository,
    subject,
    bundle,
    keyId,
    createdAt,
  }: {
    repository: string
    subject: SignedManifest
    bundle: Buffer
    keyId: string
    createdAt: Date
  },
  signal?: AbortSignal,
): Promise<Digest> {
  const digest = await registry.pushBlob(repository, bytesSource(bundle), signal)
  await registry.pushBlob(repository, bytesSource(emptyBytes), signal)
  const manifest = Buffer.from(
    JSON.stringify({
      schemaVersion: 2,
      mediaType: manifestType,
      artifactType: bundleType,
      config: { mediaType: emptyType, digest: digestOf(emptyBytes), size: emptyBytes.length },
      layers: [
        {
          mediaType: bundleType,
          digest,
          size: bundle.length,
          annotations: { 'org.opencontainers.image.title': `${digest.replace(':', '-')}.sigstore.json` },
        },
      ],
      subject: { mediaType: subject.mediaType, digest: subject.digest, size: subject.sizeBytes },
      annotations: {
        'dev.sigstore.bundle.content': 'dsse-envelope',
        'dev.sigstore.bundle.predicateType': provenanceType,
        'org.opencontainers.image.created': createdAt.toISOString(),
        [keyAnnotation]: keyId,
      },
    }),
  )
  return registry.pushManifest(repository, digestOf(manifest), manifestType, manifest, signal)
}

/**
 * The signatures that are attached to a manifest, those first that say they are by one of `keyIds`. One that is damaged, too large or gone comes with what is wrong with it.
 * Rejects with RequestError or UnreachableError where the registry gives nothing.
 */
export async function* attachedBundles(
  registry: Pick<RegistryClient, 'referrers' | 'pullManifest' | 'pullBlob'>,
  { repository, digest, keyIds }: { repository: string; digest: Digest; keyIds: readonly string[] },
  signal?: AbortSignal,
): AsyncGenerator<AttachedBundle> {
  const all = await referrersOf(registry, repository, digest, signal)
  const isOurs = ({ annotations }: Referrer) => keyIds.includes(annotations[keyAnnotation] ?? '')
  const inTurn = [...all.filter(isOurs), ...all.filter((referrer) => !isOurs(referrer))]
  for (const referrer of inTurn.slice(0, signaturesMax))
    yield { digest: referrer.digest, ...(await pullBundle(registry, repository, referrer, signal)) }
  const [passedOver] = inTurn.slice(signaturesMax)
  if (passedOver)
    yield {
      digest: passedOver.digest,
      fault: 'too_many',
      reason: `${inTurn.length} signatures are attached to it, and only ${signaturesMax} are looked at`,
    }
}

/** A registry that knows no referrers has none. */
async function referrersOf(
  registry: Pick<RegistryClient, 'referrers'>,
  repository: string,
  digest: Digest,
  signal: AbortSignal | undefined,
): Promise<Referrer[]> {
  try {
    return await registry.referrers(repository, digest, bundleType, signal)
  } catch (error) {
    if (error instanceof RequestError && error.status === 404) return []
    throw error
  }
}

async function pullBundle(
  registry: Pick<RegistryClient, 'pullManifest' | 'pullBlob'>,
  repository: string,
  referrer: Referrer,
  signal: AbortSignal | undefined,
): Promise<{ bytes: Buffer } | Unreadable> {
  if (referrer.sizeBytes > attachingMaxBytes)
    return unreadable(`a manifest that attaches a signature has ${referrer.sizeBytes} bytes`)
  try {
    const manifest = await registry.pullManifest(repository, referrer.digest, signal)
    const layer = parseAttaching(manifest.bytes)
    if (layer.size > bundleMaxBytes)
      return unreadable(`a signature has ${layer.size} bytes, at most ${bundleMaxBytes} are read`)
    const digest = parseDigest(layer.digest)
    const answer = await registry.pullBlob(repository, digest, { start: 0 }, signal)
    const bytes = await answer.bytes(bundleMaxBytes)
    return digestOf(bytes) === digest ? { bytes } : unreadable(`a signature is not what ${digest} names`)
  } catch (error) {
    // Deleted in the meantime, or what is there is nothing that can be read; anything else may pass.
    if (error instanceof ClientError) return unreadable(error.message)
    if (error instanceof RequestError && error.status === 404)
      return unreadable('a signature is listed and cannot be had')
    throw error
  }
}

interface Unreadable {
  readonly fault: 'unreadable'
  readonly reason: string
}

function unreadable(reason: string): Unreadable {
  return { fault: 'unreadable', reason }
}

/** The one layer. @throws ClientError `bad_bundle` */
function parseAttaching(bytes: Buffer): { digest: string; size: number } {
  let layers: { digest: string; size: number }[]
  try {
    layers = Attaching.parse(JSON.parse(bytes.toString())).layers
  } catch (cause) {
    throw new ClientError('bad_bundle', 'a manifest that attaches a signature cannot be read', { cause })
  }
  const [layer] = layers
  if (!layer || layers.length > 1)
    throw new ClientError(
      'bad_bundle',
      `a manifest that attaches a signature has ${layers.length} layers, need 1`,
    )
  return layer
}
