import type { KeyObject } from 'node:crypto'
import { verify } from 'node:crypto'
import { promisify } from 'node:util'
import type { Algorithm } from './algorithms.ts'

interface Key {
  readonly publicKey: KeyObject
  readonly algorithm: Algorithm
}

const verifyLater = promisify(verify)

/** Checks the signature of a token in compact form, ASCII. A signature of a wrong form is a wrong one. */
export function signatureIsValid(token: string, key: Key): boolean {
  try {
    return verify(...argumentsOf(token, key))
  } catch {
    return false
  }
}

/** The same, on one of the threads that Node has anyway. */
export async function signatureIsValidLater(token: string, key: Key): Promise<boolean> {
  try {
    return await verifyLater(...argumentsOf(token, key))
  } catch {
    return false
  }
}

function argumentsOf(token: string, { publicKey, algorithm }: Key) {
  const dot = token.lastIndexOf('.')
  const signed = Buffer.from(token.slice(0, dot), 'latin1')
  const signature = Buffer.from(token.slice(dot + 1), 'base64url')
  const hash = { ES256: 'sha256', Ed25519: null, RS256: 'RSA-SHA256' }[algorithm]
  return [
    hash,
    signed,
    algorithm === 'ES256' ? { key: publicKey, dsaEncoding: 'ieee-p1363' as const } : publicKey,
    signature,
  ] as const
}
