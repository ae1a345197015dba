import type { Digest } from './digest.ts'
import { parseDigest } from './digest.ts'
import { ClientError } from './errors.ts'

/** `keyid` is a hint for the reader: nothing is decided by it. */
export interface EnvelopeSignature {
  readonly keyid: string
  readonly sig: Uint8Array
}

/** A DSSE envelope, version 1 (secure-systems-lab/dsse, envelope.md): bytes of a type, and signatures over both. */
export interface Envelope {
  readonly payloadType: string
  readonly payload: Uint8Array
  readonly signatures: readonly EnvelopeSignature[]
}

/**
 * A bundle that was found beside a release, or why it cannot be had; `too_many`: this one and all after it are not looked at. `digest` names the manifest that
 * attaches it.
 */
export type AttachedBundle = { readonly digest: string } & (
  { readonly bytes: Uint8Array } | { readonly fault: 'unreadable' | 'too_many'; readonly reason: string }
)

/** Media type of a sigstore bundle, version 0.3 (sigstore/protobuf-specs, sigstore_bundle.proto). */
export const bundleType = 'application/vnd.dev.sigstore.bundle.v0.3+json'
/** A statement of two thousand files has some 500 KiB; what is larger is there to cost memory. */
export const bundleMaxBytes = 1024 * 1024

/** What attaches a bundle is a manifest of one layer, and has 1 KiB. */
export const attachingMaxBytes = 64 * 1024

/** Each may cost a verification for every key. */
const signaturesMax = 8
/** What is read here is the same in all versions up to 0.3. */
const bundleTypes = /^application\/vnd\.dev\.sigstore\.bundle(\.v0\.3\+json|\+json;version=0\.[123])$/

/**
 * What is signed (dsse, protocol.md, "PAE"):
 *
 *     "DSSEv1" SP LEN(type) SP type SP LEN(payload) SP payload
 *
 * LEN is a count of bytes, in decimal.
 */
export function preAuthEncoding(payloadType: string, payload: Uint8Array): Buffer {
  const type = Buffer.from(payloadType)
  return Buffer.concat([
    Buffer.from(`DSSEv1 ${type.length} `),
    type,
    Buffer.from(` ${payload.length} `),
    payload,
  ])
}

/** An envelope as a sigstore bundle signed with a bare key. `keyHint` says which one, in the words of whoever reads it. */
export function writeBundle({ payloadType, payload, signatures }: Envelope, keyHint: string): Buffer {
  return Buffer.from(
    JSON.stringify({
      mediaType: bundleType,
      verificationMaterial: {
        publicKey: { hint: keyHint },
        tlogEntries: [],
        timestampVerificationData: { rfc3161Timestamps: [] },
      },
      dsseEnvelope: {
        payload: Buffer.from(payload).toString('base64'),
        payloadType,
        signatures: signatures.map(({ keyid, sig }) => ({
          sig: Buffer.from(sig).toString('base64'),
          keyid,
        })),
      },
    }),
  )
}

/**
 * The envelope of a sigstore bundle. Certificates and log entries in it are passed over: it is up to the caller with which keys an envelope is checked.
 *
 * @throws ClientError `bad_bundle` naming the member that is wrong
 */
export function parseBundle(bytes: Uint8Array): Envelope {
  if (bytes.length > bundleMaxBytes)
    wrong('bundle', `it has ${bytes.length} bytes, at most ${bundleMaxBytes} are read`)
  const { mediaType, dsseEnvelope } = objectOf(parseJson(bytes, 'bundle'), 'bundle')
  if (typeof mediaType !== 'string' || !bundleTypes.test(mediaType)) wrong('mediaType', `need ${bundleType}`)
  return parseEnvelope(dsseEnvelope)
}

/**
 * Which bundle a manifest attaches: its one layer. Whoever looks for signatures reads them here, so that one passes over nothing that another finds.
 *
 * @throws ClientError `bad_bundle` or `DIGEST_INVALID`, also where manifest or bundle are larger than what is read
 */
export function parseAttaching(bytes: Uint8Array): { digest: Digest; sizeBytes: number } {
  if (bytes.length > attachingMaxBytes)
    wrong('manifest', `it has ${bytes.length} bytes, at most ${attachingMaxBytes} are read`)
  const { layers } = objectOf(parseJson(bytes, 'manifest'), 'manifest')
  if (!Array.isArray(layers) || layers.length !== 1) return wrong('layers', 'need a list of 1')
  const { digest, size } = objectOf(layers[0], 'layers.0')
  if (typeof digest !== 'string' || typeof size !== 'number')
    return wrong('layers.0', 'need a digest and a size')
  if (size > bundleMaxBytes) wrong('bundle', `it has ${size} bytes, at most ${bundleMaxBytes} are read`)
  return { digest: parseDigest(digest), sizeBytes: size }
}

/** @throws ClientError `bad_bundle` naming the member that is wrong */
export function parseEnvelope(json: unknown): Envelope {
  const { payload, payloadType, signatures } = objectOf(json, 'dsseEnvelope')
  // A lone surrogate is replaced when it is encoded, so that two types would be signed as one.
  if (typeof payloadType !== 'string' || payloadType === '' || !payloadType.isWellFormed())
    return wrong('dsseEnvelope.payloadType', 'need text')
  if (!Array.isArray(signatures) || signatures.length === 0 || signatures.length > signaturesMax)
    return wrong('dsseEnvelope.signatures', `need a list of 1 to ${signaturesMax}`)
  return {
    payloadType,
    payload: base64Of(payload, 'dsseEnvelope.payload'),
    signatures: signatures.map((signature: unknown, i) => {
      const path = `dsseEnvelope.signatures.${i}`
      const { sig, keyid = '' } = objectOf(signature, path)
      if (typeof keyid !== 'string') return wrong(`${path}.keyid`, 'need text')
      return { keyid, sig: base64Of(sig, `${path}.sig`) }
    }),
  }
}

/** Standard or URL-safe, as the specification allows both. */
function base64Of(value: unknown, path: string): Buffer {
  if (typeof value !== 'string' || value === '' || !/^[\w+/-]+={0,2}$/.test(value))
    return wrong(path, 'need base64')
  return Buffer.from(value, 'base64')
}

function parseJson(bytes: Uint8Array, path: string): unknown {
  try {
    return JSON.parse(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString())
  } catch {
    return wrong(path, 'it is not JSON')
  }
}

function objectOf(value: unknown, path: string): Record<string, unknown> {
  if (typeof value === 'object' && value !== null && !Array.isArray(value))
    return value as Record<string, unknown>
  return wrong(path, 'need an object')
}

function wrong(member: string, what: string): never {
  throw new ClientError('bad_bundle', `Cannot read signature: ${member}: ${what}`)
}
