import assert from 'node:assert/strict'
import { isIP } from 'node:net'
import { test } from 'node:test'
import fc from 'fast-check'
import { Netmask } from 'netmask'
import { formatIp, ipFromBytes, parseIp } from '../../../lib/protocol/address.ts'
import { cidrContains, parseCidr } from '../../../lib/protocol/cidr.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import { parsePlace } from '../../../lib/protocol/place.ts'
import { formatReference, parseReference } from '../../../lib/protocol/reference.ts'
import { answersOrRefuses, fuzzRuns, spoiltText } from '../../support/fuzz.ts'

test('parseIp() takes just what net.isIP takes, zones aside', () => {
  const texts = fc.oneof(
    fc.ipV4(),
    fc.ipV6(),
    spoiltText(['10.0.0.1', 'fd00::1', '::ffff:10.0.0.1', '1:2:3:4:5:6:7:8', '010.0.0.1']),
  )
  fc.assert(
    fc.property(texts, (text) => {
      fc.pre(!text.includes('%'))
      assert.equal(parseIp(text) !== undefined, isIP(text) !== 0, text)
    }),
    { numRuns: fuzzRuns },
  )
})

test('formatIp() writes what parseIp() reads back', () => {
  const bytes = fc.oneof(
    fc.uint8Array({ minLength: 4, maxLength: 4 }),
    fc.uint8Array({ minLength: 16, maxLength: 16 }),
  )
  fc.assert(
    fc.property(bytes, (raw) => {
      const ip = ipFromBytes(raw)
      assert.deepEqual(parseIp(formatIp(ip)), { ...ip, bytes: Uint8Array.from(ip.bytes) })
    }),
  )
  assert.equal(formatIp(parseIp('FD00:0:0:0:1:0:0:1') ?? assert.fail()), 'fd00::1:0:0:1')
})

test('a network contains just the addresses that netmask says', () => {
  fc.assert(
    fc.property(fc.ipV4(), fc.integer({ min: 1, max: 32 }), fc.ipV4(), (base, length, address) => {
      const block = new Netmask(base, String(length))
      const cidr = parseCidr(`${block.base}/${length}`)
      for (const candidate of [address, base, block.base, block.broadcast ?? block.base])
        assert.equal(cidrContains(cidr, parseIp(candidate) ?? assert.fail()), block.contains(candidate))
    }),
    { numRuns: 2000 },
  )
})

test('parseCidr() answers or throws ClientError, whatever the text; slips are named', () => {
  answersOrRefuses(spoiltText(['10.0.0.0/8', 'fd00::/16', '10.0.0.1']), parseCidr)
  for (const text of ['010.0.0.0/8', '10.1/16', '10.0.0.0/33', '10.0.0.0/', '10.0.0.0/8/8', 'rack', ''])
    assert.throws(() => parseCidr(text), ClientError, text)
  assert.throws(() => parseCidr('10.0.0.1/8'), /did you mean 10\.0\.0\.0\/8/)
})

test('references and places answer or throw ClientError; formatReference() is read back', () => {
  const texts = spoiltText(['web:1.2.3', 'a/b-c/d:latest', `web@sha256:${'a'.repeat(64)}`])
  answersOrRefuses(texts, (text) => {
    const reference = parseReference(text)
    assert.deepEqual(parseReference(formatReference(reference)), reference)
  })
  answersOrRefuses(texts, parsePlace)
  assert.deepEqual(parseReference('web'), { repository: 'web', tag: 'latest', digest: undefined })
})
