// Verifies signatures in a worker thread. In: a batch. Out: one byte a token, 1 for valid, in the same order.
import type { KeyObject } from 'node:crypto'
import { parentPort } from 'node:worker_threads'
import type { Algorithm } from './algorithms.ts'
import { signatureIsValid } from './signature.ts'

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
