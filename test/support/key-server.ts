import { generateKeyPairSync } from 'node:crypto'
import type { KeyObject } from 'node:crypto'
import { once } from 'node:events'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { createServer } from 'node:http'
import { createServer as createTlsServer } from 'node:https'
import type { AddressInfo } from 'node:net'
import type { TestContext } from 'node:test'

export type Answer = (request: IncomingMessage, response: ServerResponse) => void

/** A real HTTP server of a JWK Set, whose answer a test can change at any time. */
export async function startKeyServer(
  t: TestContext,
  answer: Answer,
  { port = 0, tls }: { port?: number; tls?: { cert: string; key: string } } = {},
) {
  const state = { answer, requests: 0 }
  const handle = (request: IncomingMessage, response: ServerResponse) => {
    state.requests++
    state.answer(request, response)
  }
  const server = tls ? createTlsServer(tls, handle) : createServer(handle)
  server.listen(port, '127.0.0.1')
  await once(server, 'listening')
  const stop = async () => {
    if (!server.listening) return
    server.close()
    server.closeAllConnections()
    await once(server, 'close')
  }
  t.after(stop)
  const { port: bound } = server.address() as AddressInfo
  return { state, port: bound, url: `${tls ? 'https' : 'http'}://127.0.0.1:${bound}/keys`, stop }
}

export interface TestKey {
  readonly kid: string
  readonly alg: string
  readonly privateKey: KeyObject
  readonly publicKey: KeyObject
  readonly jwk: Record<string, unknown>
}

export function makeTestKey(kid: string, alg: 'ES256' | 'Ed25519' | 'RS256' = 'ES256'): TestKey {
  const { privateKey, publicKey } =
    alg === 'ES256'
      ? generateKeyPairSync('ec', { namedCurve: 'P-256' })
      : alg === 'RS256'
        ? generateKeyPairSync('rsa', { modulusLength: 2048 })
        : generateKeyPairSync('ed25519')
  return { kid, alg, privateKey, publicKey, jwk: { ...publicKey.export({ format: 'jwk' }), kid } }
}

/** Answers with these keys. */
export function keys(...list: readonly { jwk: Record<string, unknown> }[]): Answer {
  return (_, response) => {
    response.setHeader('content-type', 'application/jwk-set+json')
    response.end(JSON.stringify({ keys: list.map(({ jwk }) => jwk) }))
  }
}

export function body(text: string, status = 200): Answer {
  return (_, response) => {
    response.writeHead(status).end(text)
  }
}
