import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { Envelope } from '../../../lib/protocol/dsse.ts'
import {
  attachingMaxBytes,
  bundleMaxBytes,
  parseAttaching,
  parseBundle,
  parseEnvelope,
  preAuthEncoding,
  writeBundle,
} from '../../../lib/protocol/dsse.ts'
import { answersOrRefuses, spoilt } from '../../support/fuzz.ts'

const bytes = fc.uint8Array({ minLength: 1, maxLength: 300 })
const envelopes: fc.Arbitrary<Envelope> = fc.record({
  payloadType: fc.string({ minLength: 1, unit: 'grapheme' }),
  payload: bytes,
  signatures: fc.array(fc.record({ keyid: fc.string(), sig: bytes }, { noNullPrototype: true }), {
    minLength: 1,
    maxLength: 8,
  }),
})
const good = writeBundle(
  {
    payloadType: 'application/vnd.in-toto+json',
    payload: Buffer.from('{"_type":"https://in-toto.io/Statement/v1"}'),
    signatures: [{ keyid: 'k', sig: Buffer.from('signature') }],
  },
  'k',
)

test('what is signed is as the specification shows it', () => {
  assert.equal(
    preAuthEncoding('http://example.com/HelloWorld', Buffer.from('hello world')).toString(),
    'DSSEv1 29 http://example.com/HelloWorld 11 hello world',
  )
  assert.equal(preAuthEncoding('é', Buffer.alloc(0)).toString(), 'DSSEv1 2 é 0 ')
})

test('no two envelopes are signed as the same bytes', () => {
  const parts = fc.tuple(fc.string({ unit: 'grapheme', maxLength: 12 }), fc.string({ maxLength: 12 }))
  fc.assert(
    fc.property(parts, parts, ([type, payload], [otherType, otherPayload]) => {
      const same = type === otherType && payload === otherPayload
      const encoded = preAuthEncoding(type, Buffer.from(payload))
      assert.equal(encoded.equals(preAuthEncoding(otherType, Buffer.from(otherPayload))), same)
    }),
    { numRuns: 2000 },
  )
})

test('a bundle is read as it was written', () => {
  fc.assert(
    fc.property(envelopes, fc.string(), (envelope, hint) => {
      const { payloadType, payload, signatures } = parseBundle(writeBundle(envelope, hint))
      assert.equal(payloadType, envelope.payloadType)
      assert.deepEqual(Uint8Array.from(payload), envelope.payload)
      assert.deepEqual(
        signatures.map(({ keyid, sig }) => ({ keyid, sig: Uint8Array.from(sig) })),
        envelope.signatures,
      )
    }),
  )
})

test('parseBundle() and parseEnvelope() answer or throw ClientError, whatever they are given', () => {
  answersOrRefuses(spoilt([good]), parseBundle)
  answersOrRefuses(
    fc.json({ maxDepth: 5 }).map((text) => Buffer.from(text)),
    parseBundle,
  )
  answersOrRefuses(fc.jsonValue({ maxDepth: 4 }), parseEnvelope)
  const { dsseEnvelope } = JSON.parse(good.toString()) as { dsseEnvelope: object }
  const spoiltMember = fc.tuple(
    fc.constantFrom('payload', 'payloadType', 'signatures'),
    fc.jsonValue({ maxDepth: 3 }),
  )
  answersOrRefuses(
    spoiltMember.map(([name, value]) => ({ ...dsseEnvelope, [name]: value })),
    parseEnvelope,
  )
})

test('parseAttaching() answers with the one layer or throws ClientError, whatever it is given', () => {
  const digest = `sha256:${'a'.repeat(64)}`
  const attaching = Buffer.from(JSON.stringify({ layers: [{ digest, size: bundleMaxBytes }] }))
  assert.deepEqual(parseAttaching(attaching), { digest, sizeBytes: bundleMaxBytes })
  answersOrRefuses(spoilt([attaching]), parseAttaching)
  const padded = Buffer.concat([attaching, Buffer.alloc(attachingMaxBytes, 0x20)])
  assert.throws(() => parseAttaching(padded), /manifest: it has \d+ bytes, at most 65536 are read/)
})

test('what is no bundle of a version that is known, or is too large, is refused in words', () => {
  const json = JSON.parse(good.toString()) as Record<string, unknown>
  const envelope = json['dsseEnvelope'] as Record<string, unknown>
  const cases: readonly (readonly [unknown, RegExp])[] = [
    [{ ...json, mediaType: 'application/vnd.dev.sigstore.bundle.v0.4+json' }, /mediaType: need/],
    [{ ...json, dsseEnvelope: undefined, messageSignature: {} }, /dsseEnvelope: need an object/],
    [{ ...json, dsseEnvelope: { ...envelope, payload: 'not base64!' } }, /payload: need base64/],
    [{ ...json, dsseEnvelope: { ...envelope, payloadType: '\ud800' } }, /payloadType: need text/],
    [{ ...json, dsseEnvelope: { ...envelope, signatures: [] } }, /signatures: need a list of 1 to 8/],
    [
      { ...json, dsseEnvelope: { ...envelope, signatures: Array(9).fill({ sig: 'AAAA' }) } },
      /signatures: need a list of 1 to 8/,
    ],
    [{ ...json, dsseEnvelope: { ...envelope, signatures: [{ sig: '' }] } }, /signatures\.0\.sig/],
  ]
  for (const [value, why] of cases) assert.throws(() => parseBundle(Buffer.from(JSON.stringify(value))), why)
  assert.throws(() => parseBundle(Buffer.from('{')), /it is not JSON/)
  assert.throws(() => parseBundle(Buffer.alloc(bundleMaxBytes + 1, 0x20)), /1048577 bytes, at most 1048576/)
  for (const older of ['0.1', '0.2', '0.3'])
    parseBundle(
      Buffer.from(
        JSON.stringify({ ...json, mediaType: `application/vnd.dev.sigstore.bundle+json;version=${older}` }),
      ),
    )
})
