import { createHash } from 'node:crypto'
import { ClientError } from './errors.ts'

declare const brand: unique symbol

/** `sha256:` and 64 lower-case hex digits (OCI image-spec descriptor.md, "Digests"). */
export type Digest = string & { readonly [brand]: 'Digest' }

/** `sha512:` and 128 lower-case hex digits. */
export type Sha512Digest = string & { readonly [brand]: 'Sha512Digest' }

/** What a client may name content by: both algorithms that the image-spec registers. Swarms, tags and agents know SHA-256 alone. */
export type ContentDigest = Digest | Sha512Digest

/** @throws ClientError `DIGEST_INVALID` for another algorithm or shape */
export function parseDigest(text: string): Digest {
  if (!isSha256(text)) {
    throw new ClientError(
      'DIGEST_INVALID',
      `Cannot read digest ${JSON.stringify(text.slice(0, 100))}: need sha256: and 64 lower-case hex digits`,
    )
  }
  return text
}

/** @throws ClientError `DIGEST_INVALID` for another algorithm or shape */
export function parseContentDigest(text: string): ContentDigest {
  if (!isSha256(text) && !isSha512(text)) {
    throw new ClientError(
      'DIGEST_INVALID',
      `Cannot read digest ${JSON.stringify(text.slice(0, 100))}: need sha256: and 64 lower-case hex digits, or sha512: and 128`,
    )
  }
  return text
}

export function isSha256(text: string): text is Digest {
  return /^sha256:[0-9a-f]{64}$/.test(text)
}

export function isSha512(text: string): text is Sha512Digest {
  return /^sha512:[0-9a-f]{128}$/.test(text)
}

/** @throws ClientError `DIGEST_INVALID` unless `hex` is 64 lower-case hex digits */
export function digestFromHex(hex: string): Digest {
  return parseDigest(`sha256:${hex}`)
}

/** The digest whose hex digits these are, its algorithm told by their number; undefined if they are no such digits. */
export function contentDigestFromHex(hex: string): ContentDigest | undefined {
  const text = `${hex.length === 64 ? 'sha256' : 'sha512'}:${hex}`
  return isSha256(text) || isSha512(text) ? text : undefined
}

export function digestOf(bytes: Uint8Array): Digest {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}` as Digest
}

/** The digest of `bytes` by the algorithm of `like`. */
export function contentDigestOf(bytes: Uint8Array, like: ContentDigest): ContentDigest {
  if (isSha256(like)) return digestOf(bytes)
  return `sha512:${createHash('sha512').update(bytes).digest('hex')}` as Sha512Digest
}

/** The 64 hex digits, or the 128 of SHA-512. */
export function digestHex(digest: ContentDigest): string {
  return digest.slice('sha256:'.length)
}
