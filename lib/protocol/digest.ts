import { createHash } from 'node:crypto'
import { ClientError } from './errors.ts'

declare const brand: unique symbol

/** `sha256:` and 64 lower-case hex digits (OCI image-spec descriptor.md, "Digests"). */
export type Digest = string & { readonly [brand]: 'Digest' }

/** @throws ClientError `DIGEST_INVALID` for another algorithm or shape */
export function parseDigest(text: string): Digest {
  if (!/^sha256:[0-9a-f]{64}$/.test(text)) {
    throw new ClientError(
      'DIGEST_INVALID',
      `Cannot read digest ${JSON.stringify(text.slice(0, 100))}: need sha256: and 64 lower-case hex digits`,
    )
  }
  return text as Digest
}

/** @throws ClientError `DIGEST_INVALID` unless `hex` is 64 lower-case hex digits */
export function digestFromHex(hex: string): Digest {
  return parseDigest(`sha256:${hex}`)
}

export function digestOf(bytes: Uint8Array): Digest {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}` as Digest
}

/** The 64 hex digits. */
export function digestHex(digest: Digest): string {
  return digest.slice('sha256:'.length)
}
