import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { Cidr } from '../../../lib/protocol/cidr.ts'
import { parseCidr, readCidr } from '../../../lib/protocol/cidr.ts'

const octet = fc.oneof(fc.nat(255), fc.constantFrom(0, 1, 128, 256, '010', '', '-1'))
const ipv4 = fc.array(octet, { minLength: 3, maxLength: 5 }).map((octets) => octets.join('.'))
const quad = fc
  .array(fc.constantFrom(0, 10, 128, 255), { minLength: 4, maxLength: 4 })
  .map((o) => o.join('.'))
const group = fc.constantFrom('', '0', 'fd00', '8000', 'FFFF', '00001', 'g', '1')
const ipv6 = fc.oneof(
  fc.ipV6(),
  fc.array(group, { minLength: 2, maxLength: 9 }).map((groups) => groups.join(':')),
  fc.constantFrom('::', '::1', 'fd00::', '::ffff:10.0.0.0', '::ffff:0:0', 'fe80::1%eth0'),
)
const length = fc.oneof(
  fc.nat(130).map((bits) => `/${bits}`),
  fc.constantFrom('', '/', '/08', '/+8', '/8/8', '/ 8', '/0', '/255.0.0.0', '/1e1', '/0x8'),
)
/** Mostly right ones. */
const network = fc.oneof(
  fc
    .nat(32)
    .map(
      (bits) => `${[10, 128, 255, 0].map((octet, i) => (bits >= 8 * i + 8 ? octet : 0)).join('.')}/${bits}`,
    ),
  fc.tuple(fc.ipV6(), fc.constantFrom('', '/128')).map((parts) => parts.join('')),
  fc.nat(128).map((bits) => `${bits >= 16 ? 'fd00' : '0'}:${bits >= 32 ? '8000' : '0'}::/${bits}`),
)
const text = fc.oneof(
  network,
  fc.tuple(fc.oneof(quad, ipv4, ipv6), length).map((parts) => parts.join('')),
  fc.string({ maxLength: 20 }),
)

test('readCidr() takes what parseCidr() takes, as netmask reads it, and nothing else', () => {
  let taken = 0
  fc.assert(
    fc.property(text, (given) => {
      const expected = attempt(given)
      if (expected) taken++
      assert.deepEqual(plain(readCidr(given)), plain(expected), given)
    }),
    { numRuns: 20_000 },
  )
  assert.ok(taken > 1000, `only ${taken} of them were networks`)
})

function attempt(given: string): Cidr | undefined {
  try {
    return parseCidr(given)
  } catch {
    return undefined
  }
}

function plain(cidr: Cidr | undefined) {
  return cidr && { ...cidr, bytes: [...cidr.bytes] }
}
