import type { JWK } from 'jose'

/** The only algorithms that sign or verify; a token's header chooses a key, never an algorithm. */
export const algorithms = ['ES256', 'Ed25519', 'RS256'] as const
export type Algorithm = (typeof algorithms)[number]

/** The algorithm that a key is for; undefined for keys of any other kind. */
export function algorithmOf({ kty, crv, alg }: JWK): Algorithm | undefined {
  if (kty === 'EC' && crv === 'P-256' && (alg === undefined || alg === 'ES256')) return 'ES256'
  if (kty === 'OKP' && crv === 'Ed25519' && (alg === undefined || alg === 'Ed25519' || alg === 'EdDSA'))
    return 'Ed25519'
  if (kty === 'RSA' && (alg === undefined || alg === 'RS256')) return 'RS256'
  return undefined
}

/** Whether a header's `alg` names the algorithm; Ed25519 is also spelt EdDSA (RFC 8037, RFC 9864). */
export function namesAlgorithm(header: unknown, algorithm: Algorithm): boolean {
  return header === algorithm || (algorithm === 'Ed25519' && header === 'EdDSA')
}
