import type { Digest } from '../protocol/digest.ts'
import { digestOf } from '../protocol/digest.ts'
import type { AttachedBundle } from '../protocol/dsse.ts'
import { attachingMaxBytes, bundleMaxBytes, bundleType, parseAttaching } from '../protocol/dsse.ts'
import { ClientError } from '../protocol/errors.ts'
import { provenanceType } from '../protocol/statement.ts'
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
/**
 * Each costs two requests, and whoever may push may attach any number. A good one is found by the server among all of them; these are looked at to say what is
 * wrong where there is none, and with a server that does not look.
 */
const signaturesMax = 100

const manifestType = 'application/vnd.oci.image.manifest.v1+json'
const emptyType = 'application/vnd.oci.empty.v1+json'
const emptyBytes = Buffer.from('{}')

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
 * The signatures that are attached to a manifest: first the one that the registry finds good for each key, then those that say they are by one of `keys`, then the
 * others, up to a bound. One that is damaged, too large or gone comes with what is wrong with it. Nothing here is believed: each is to be checked.
 * Rejects with RequestError or UnreachableError where the registry gives nothing.
 *
 * @param keys each with its SubjectPublicKeyInfo in DER, base64url
 * @param tag what it has to be signed for; undefined: any
 */
export async function* attachedBundles(
  registry: Pick<RegistryClient, 'findSignature' | 'referrers' | 'pullManifest' | 'pullBlob'>,
  {
    repository,
    digest,
    tag,
    keys,
  }: {
    repository: string
    digest: Digest
    tag: string | undefined
    keys: readonly { readonly id: string; readonly spki: string }[]
  },
  signal?: AbortSignal,
): AsyncGenerator<AttachedBundle> {
  const pull = async (referrer: Referrer) => ({
    digest: referrer.digest,
    ...(await pullBundle(registry, repository, referrer, signal)),
  })
  const found = new Set<Digest>()
  for (const { spki } of keys) {
    const query = { artifactType: bundleType, signedBy: spki, tag }
    const referrer = await orNone(registry.findSignature(repository, digest, query, signal), undefined)
    if (!referrer || found.has(referrer.digest)) continue
    found.add(referrer.digest)
    yield await pull(referrer)
  }
  const all = await orNone(registry.referrers(repository, digest, bundleType, signal), [])
  const rest = all.filter((referrer) => !found.has(referrer.digest))
  const keyIds = new Set(keys.map(({ id }) => id))
  const isOurs = ({ annotations }: Referrer) => keyIds.has(annotations[keyAnnotation] ?? '')
  const inTurn = [...rest.filter(isOurs), ...rest.filter((referrer) => !isOurs(referrer))]
  for (const referrer of inTurn.slice(0, signaturesMax)) yield await pull(referrer)
  const [passedOver] = inTurn.slice(signaturesMax)
  if (passedOver)
    yield {
      digest: passedOver.digest,
      fault: 'too_many',
      reason: `${all.length} signatures are attached to it, the server finds no good one, and only ${signaturesMax} are looked at`,
    }
}

/** A registry that knows no referrers has none. */
async function orNone<Value>(asked: Promise<Value>, none: Value): Promise<Value> {
  try {
    return await asked
  } catch (error) {
    if (error instanceof RequestError && error.status === 404) return none
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
    return unreadable(
      `Cannot read signature: its manifest has ${referrer.sizeBytes} bytes, at most ${attachingMaxBytes} are read`,
    )
  try {
    const manifest = await registry.pullManifest(repository, referrer.digest, signal)
    const { digest } = parseAttaching(manifest.bytes)
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
