import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { generateKeyPairSync } from 'node:crypto'
import { test } from 'node:test'
import fc from 'fast-check'
import { readPrivateKey } from '../../../lib/token/private-key.ts'
import { fuzzRuns, spoiltText } from '../../support/fuzz.ts'

const ec = generateKeyPairSync('ec', { namedCurve: 'P-256' }).privateKey
const ed = generateKeyPairSync('ed25519').privateKey
const rsa = generateKeyPairSync('rsa', { modulusLength: 2048 }).privateKey
const pem = { format: 'pem' } as const

test('a private key is read from every usual form, as the same key', () => {
  const forms: [name: string, text: string, algorithm: string][] = [
    ['PKCS #8, EC', ec.export({ ...pem, type: 'pkcs8' }), 'ES256'],
    ['SEC 1', ec.export({ ...pem, type: 'sec1' }), 'ES256'],
    ['JWK, EC', JSON.stringify(ec.export({ format: 'jwk' })), 'ES256'],
    ['PKCS #8, Ed25519', ed.export({ ...pem, type: 'pkcs8' }), 'Ed25519'],
    ['JWK, Ed25519', JSON.stringify(ed.export({ format: 'jwk' })), 'Ed25519'],
    ['PKCS #8, RSA', rsa.export({ ...pem, type: 'pkcs8' }), 'RS256'],
    ['PKCS #1', rsa.export({ ...pem, type: 'pkcs1' }), 'RS256'],
    ['JWK, RSA', JSON.stringify(rsa.export({ format: 'jwk' })), 'RS256'],
  ]
  for (const [name, text, algorithm] of forms) {
    const read = readPrivateKey(text)
    assert.equal(read.algorithm, algorithm, name)
    const original = { ES256: ec, Ed25519: ed, RS256: rsa }[read.algorithm].export({ format: 'jwk' })
    assert.equal(read.jwk.d, original.d, name)
  }
})

test('what openssl writes is read, parameters of the curve before the key included', () => {
  const openssl = (...args: string[]) => execFileSync('openssl', args, { encoding: 'utf8', stdio: 'pipe' })
  assert.equal(readPrivateKey(openssl('ecparam', '-name', 'prime256v1', '-genkey')).algorithm, 'ES256')
  assert.equal(readPrivateKey(openssl('genrsa', '-traditional', '2048')).algorithm, 'RS256')
  assert.equal(readPrivateKey(openssl('genpkey', '-algorithm', 'ed25519')).algorithm, 'Ed25519')
})

test('a JWK keeps its name, alone or in a key file', () => {
  const jwk = { ...ec.export({ format: 'jwk' }), kid: 'quay' }
  assert.equal(readPrivateKey(JSON.stringify(jwk)).kid, 'quay')
  assert.equal(readPrivateKey(JSON.stringify({ algorithm: 'ES256', jwk })).kid, 'quay')
})

test('what cannot be used is refused in words that say why, and nothing of the key', () => {
  const jwk = ec.export({ format: 'jwk' })
  const other = generateKeyPairSync('ec', { namedCurve: 'P-256' }).privateKey.export({ format: 'jwk' })
  const bad: [text: string, why: RegExp][] = [
    ['', /neither PEM nor a JWK/],
    ['[]', /neither PEM nor a JWK/],
    [JSON.stringify({ ...jwk, d: undefined }), /no private part/],
    [JSON.stringify({ ...jwk, d: other.d }), /damaged|does not belong/],
    [JSON.stringify({ kty: 'oct', k: 'c2VjcmV0', d: 'x' }), /damaged|kind/],
    [
      generateKeyPairSync('ec', { namedCurve: 'P-384' }).privateKey.export({ ...pem, type: 'pkcs8' }),
      /P-384/,
    ],
    [
      generateKeyPairSync('rsa', { modulusLength: 1024 }).privateKey.export({ ...pem, type: 'pkcs1' }),
      /1024 bits/,
    ],
    [generateKeyPairSync('x25519').privateKey.export({ ...pem, type: 'pkcs8' }), /x25519/],
    [
      ec.export({ ...pem, type: 'pkcs8', cipher: 'aes-256-cbc', passphrase: 'x' }),
      /encrypted: decrypt it first/,
    ],
    [generateKeyPairSync('ed25519').publicKey.export({ ...pem, type: 'spki' }), /no private key/],
    ['-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n', /damaged/],
    ['x'.repeat(40_000), /more than/],
  ]
  for (const [text, why] of bad)
    assert.throws(
      () => readPrivateKey(text),
      (error: Error) => {
        assert.match(error.message, why)
        assert.ok(jwk.d === undefined || !error.message.includes(jwk.d))
        return true
      },
    )
})

test('any text is a key or an Error', () => {
  const good = [ec.export({ ...pem, type: 'sec1' }), JSON.stringify(ed.export({ format: 'jwk' }))]
  fc.assert(
    fc.property(spoiltText(good), (text) => {
      try {
        readPrivateKey(text)
      } catch (error) {
        assert.ok(error instanceof Error && !(error instanceof TypeError), String(error))
      }
    }),
    { numRuns: Math.min(fuzzRuns, 2000) },
  )
})
