import { createHmac, sign } from 'node:crypto'
import type { TestContext } from 'node:test'
import type { Answer, TestKey } from './key-server.ts'
import { keys, makeTestKey, startKeyServer } from './key-server.ts'

/** An OpenID Connect issuer over real HTTP(S): its configuration, its keys, and whatever token a test wants of it. */
export async function startIssuer(t: TestContext, options: { tls?: { cert: string; key: string } } = {}) {
  const first = makeTestKey('issuer-1', 'RS256')
  const state = { keys: [first], keyRequests: 0, isDown: false, configuration: {} as Record<string, unknown> }
  const answer: Answer = (request, response) => {
    if (state.isDown) {
      response.writeHead(503).end()
      return
    }
    if (request.url === '/.well-known/openid-configuration') {
      response.end(JSON.stringify({ issuer: url, jwks_uri: `${url}/jwks`, ...state.configuration }))
      return
    }
    state.keyRequests++
    keys(...state.keys)(request, response)
  }
  const server = await startKeyServer(t, answer, options)
  const url = server.url.replace(/\/keys$/, '')
  return {
    url,
    state,
    key: first,
    stop: server.stop,
    /** A token with what an issuer says at least; undefined takes a claim away. */
    token: (
      claims: Record<string, unknown> = {},
      key: TestKey = first,
      header: Record<string, unknown> = {},
    ) => {
      const nowSeconds = Math.floor(Date.now() / 1000)
      const usual = { iss: url, sub: 'job', aud: 'rackswarm', iat: nowSeconds, exp: nowSeconds + 300 }
      return signToken({ ...usual, ...claims }, key, header)
    },
  }
}

export function signToken(
  claims: Record<string, unknown>,
  { kid, alg, privateKey }: TestKey,
  header: Record<string, unknown> = {},
): string {
  const signed = [{ alg, kid, typ: 'JWT', ...header }, claims].map(encode).join('.')
  const key = alg === 'ES256' ? { key: privateKey, dsaEncoding: 'ieee-p1363' as const } : privateKey
  return `${signed}.${sign(alg === 'Ed25519' ? null : 'sha256', Buffer.from(signed), key).toString('base64url')}`
}

/** Signed with HMAC under the public key, as who hopes that the algorithm is taken from the header. */
export function confusedToken(claims: Record<string, unknown>, { kid, publicKey }: TestKey): string {
  const signed = [{ alg: 'HS256', kid, typ: 'JWT' }, claims].map(encode).join('.')
  const secret = publicKey.export({ type: 'spki', format: 'pem' })
  return `${signed}.${createHmac('sha256', secret).update(signed).digest('base64url')}`
}

export function encode(part: unknown): string {
  return Buffer.from(JSON.stringify(part)).toString('base64url')
}
