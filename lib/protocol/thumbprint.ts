import { createHash } from 'node:crypto'

/** SHA-256 of a certificate in DER, base64url, as tokens name it (`x5t#S256`, RFC 8705 section 3.1). */
export function thumbprintOf(der: Uint8Array): string {
  return createHash('sha256').update(der).digest('base64url')
}
