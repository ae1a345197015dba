// Verifies signatures in a worker thread. In: {id, token, jwk, algorithm}. Out: {id, valid}.
import { parentPort } from 'node:worker_threads'
import type { CryptoKey, JWK } from 'jose'
import { compactVerify, importJWK } from 'jose'
import { namesAlgorithm } from './algorithms.ts'
import type { Algorithm } from './algorithms.ts'

export interface VerifyRequest {
  readonly id: number
  readonly token: string
  readonly jwk: JWK
  readonly algorithm: Algorithm
}

/** Imported keys by all that they consist of: a foreign key set may give a new key an old name. */
const keys = new Map<string, CryptoKey | Uint8Array>()
const keysMax = 1000

parentPort?.on('message', (request: VerifyRequest) => {
  void verify(request).then((valid) => parentPort?.postMessage({ id: request.id, valid }))
})

async function verify({ token, jwk, algorithm }: VerifyRequest): Promise<boolean> {
  try {
    const name = `${algorithm} ${JSON.stringify(jwk)}`
    const key = keys.get(name) ?? (await importJWK(jwk, algorithm))
    if (keys.size >= keysMax) keys.clear()
    keys.set(name, key)
    const accepted = namesAlgorithm('EdDSA', algorithm) ? ['Ed25519', 'EdDSA'] : [algorithm]
    await compactVerify(token, key, { algorithms: accepted })
    return true
  } catch {
    return false
  }
}
