// Verifies signatures in a worker thread. In: {id, token, jwk, algorithm}. Out: {id, valid}.
import { parentPort } from 'node:worker_threads'
import type { CryptoKey, JWK } from 'jose'
import { compactVerify, importJWK } from 'jose'
import { namesAlgorithm } from './algorithms.ts'
import type { Algorithm } from './algorithms.ts'

export interface VerifyRequest {
  readonly id: number
  readonly token: string
  readonly kid: string
  readonly jwk: JWK
  readonly algorithm: Algorithm
}

/** Imported keys by thumbprint; as many as the key set has, and the main thread bounds that. */
const keys = new Map<string, CryptoKey | Uint8Array>()

parentPort?.on('message', (request: VerifyRequest) => {
  void verify(request).then((valid) => parentPort?.postMessage({ id: request.id, valid }))
})

async function verify({ token, kid, jwk, algorithm }: VerifyRequest): Promise<boolean> {
  try {
    const name = `${kid} ${algorithm}`
    const key = keys.get(name) ?? (await importJWK(jwk, algorithm))
    keys.set(name, key)
    const accepted = namesAlgorithm('EdDSA', algorithm) ? ['Ed25519', 'EdDSA'] : [algorithm]
    await compactVerify(token, key, { algorithms: accepted })
    return true
  } catch {
    return false
  }
}
