// Verifies signatures in a worker thread. In: a batch. Out: one byte a token, 1 for valid, in the same order.
import type { KeyObject } from 'node:crypto'
import { verify } from 'node:crypto'
import { parentPort } from 'node:worker_threads'
import type { Algorithm } from './algorithms.ts'

export interface VerifyBatch {
  /** The keys of the batch; what is cloned is a reference, not the key. */
  readonly keys: readonly { readonly publicKey: KeyObject; readonly algorithm: Algorithm }[]
  /** In compact form, ASCII. */
  readonly tokens: readonly string[]
  /** For each token, which of the keys. */
  readonly keyOf: readonly number[]
}

parentPort?.on('message', (batch: VerifyBatch) => {
  parentPort?.postMessage(verifyBatch(batch))
})

function verifyBatch({ keys, tokens, keyOf }: VerifyBatch): Uint8Array {
  const verdicts = new Uint8Array(tokens.length)
  for (const [i, token] of tokens.entries()) {
    const key = keys[keyOf[i] ?? -1]
    if (key && signatureIsValid(token, key)) verdicts[i] = 1
  }
  return verdicts
}

function signatureIsValid(token: string, { publicKey, algorithm }: VerifyBatch['keys'][number]): boolean {
  const dot = token.lastIndexOf('.')
  const signed = Buffer.from(token.slice(0, dot), 'latin1')
  const signature = Buffer.from(token.slice(dot + 1), 'base64url')
  try {
    switch (algorithm) {
      case 'ES256':
        return verify('sha256', signed, { key: publicKey, dsaEncoding: 'ieee-p1363' }, signature)
      case 'Ed25519':
        return verify(null, signed, publicKey, signature)
      case 'RS256':
        return verify('RSA-SHA256', signed, publicKey, signature)
    }
  } catch {
    return false
  }
}
