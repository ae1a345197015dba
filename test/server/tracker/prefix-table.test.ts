import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { Netmask } from 'netmask'
import type { Ip } from '../../../lib/protocol/address.ts'
import { formatIp, ipFromBytes, parseIp } from '../../../lib/protocol/address.ts'
import { cidrContains, parseCidr } from '../../../lib/protocol/cidr.ts'
import { parsePlace } from '../../../lib/protocol/place.ts'
import {
  countRules,
  createPrefixTableBuilder,
  findRule,
  rulesAround,
  rulesOf,
} from '../../../server/tracker/prefix-table.ts'

// Few distinct bits, so that networks nest, touch and collide.
const address = fc
  .tuple(fc.constantFrom(10, 192), fc.constantFrom(0, 1, 128), fc.nat(3), fc.nat(255))
  .map((octets) => octets.join('.'))

test('the longest prefix wins, as a search through netmask blocks finds it', () => {
  const entries = fc.array(fc.tuple(address, fc.integer({ min: 1, max: 32 })), { maxLength: 40 })
  fc.assert(
    fc.property(entries, fc.array(address, { minLength: 1, maxLength: 20 }), (given, asked) => {
      const blocks = new Map(
        given.map(([base, length]) => [new Netmask(base, String(length)).toString(), length]),
      )
      const table = build([...blocks.keys()])
      for (const one of asked) {
        const best = [...blocks]
          .filter(([text]) => new Netmask(text).contains(one))
          .sort((a, b) => b[1] - a[1])[0]
        assert.equal(rulesAround(table, ip(one))[0]?.network, best?.[0])
      }
    }),
    { numRuns: 500 },
  )
})

const byte = fc.constantFrom(0, 1, 127, 128, 254, 255)
const bytes = fc.oneof(
  fc.array(byte, { minLength: 4, maxLength: 4 }),
  fc.array(byte, { minLength: 16, maxLength: 16 }),
)
/** Networks of every length, and the first and last address of each, with their neighbours. */
const network = fc.tuple(bytes, fc.nat()).map(([base, seed]) => {
  const found = ipFromBytes(Uint8Array.from(base))
  const bits = 8 * found.bytes.length
  const length = seed % (bits + 1)
  const size = 1n << BigInt(bits - length)
  const start = (numberOf(found) / size) * size
  const inFamily = (value: bigint) => ipOf((value + (1n << BigInt(bits))) % (1n << BigInt(bits)), bits)
  return {
    text: `${formatIp(inFamily(start))}/${length}`,
    asked: [start - 1n, start, start + size - 1n, start + size].map(inFamily),
  }
})

test('all networks around an address are found, longest first, at the edges of every network of both families', () => {
  fc.assert(
    fc.property(fc.array(network, { minLength: 1, maxLength: 30 }), fc.array(bytes), (given, others) => {
      // An IPv6 network within ::ffff:0:0/96 is one that cannot be written.
      const texts = [...new Set(given.map(({ text }) => text))].filter((text) => !text.startsWith('::ffff:'))
      const table = build(texts)
      const cidrs = texts.map((text) => ({ text, cidr: parseCidr(text) }))
      const asked = [
        ...given.flatMap((one) => one.asked),
        ...others.map((one) => ipFromBytes(Uint8Array.from(one))),
      ]
      for (const one of asked) {
        const expected = cidrs
          .filter(({ cidr }) => cidrContains(cidr, one))
          .sort((a, b) => b.cidr.length - a.cidr.length)
          .map(({ text }) => text)
        assert.deepEqual(
          rulesAround(table, one).map((rule) => rule.network),
          expected,
          formatIp(one),
        )
        assert.equal(findRule(table, one) >= 0, expected.length > 0)
      }
      assert.deepEqual([...rulesOf(table)].map((rule) => rule.network).sort(), texts.sort())
    }),
    { numRuns: 1000 },
  )
})

test('a table survives the way to another thread', () => {
  const table = structuredClone(build(['10.0.0.0/8', '10.1.0.0/16', 'fd00::/8']))
  assert.equal(rulesAround(table, ip('10.1.2.3')).length, 2)
  assert.deepEqual(countRules(table, 4), { networks: 2, nested: 1 })
  assert.deepEqual(countRules(table, 6), { networks: 1, nested: 0 })
})

test('the same network twice: nothing with one place, a conflict that knows both sources with two', () => {
  const builder = createPrefixTableBuilder()
  for (const [i, [cidr, place]] of (
    [
      ['10.1.0.0/16', 'r1'],
      ['10.2.0.0/16', 'r2'],
      ['10.2.0.0/16', 'r2'],
      ['10.1.0.0/16', 'r2'],
      ['fd00::/8', 'r1'],
      ['fd00::/8', 'r3'],
    ] as const
  ).entries())
    builder.add(parseCidr(cidr), parsePlace(place), i + 1)
  const { table, conflicts } = builder.build()
  assert.equal(conflicts.count, 2)
  assert.deepEqual(
    conflicts.examples.map(({ first, second }) =>
      [first, second].map(({ place, source }) => `${place} ${source}`),
    ),
    [
      ['r1 1', 'r2 4'],
      ['r1 5', 'r3 6'],
    ],
  )
  assert.deepEqual(countRules(table, 4), { networks: 2, nested: 0 })
  assert.equal(rulesAround(table, ip('10.1.0.0'))[0]?.place, 'r1')
})

function build(texts: readonly string[]) {
  const builder = createPrefixTableBuilder()
  for (const [i, text] of texts.entries()) builder.add(parseCidr(text), parsePlace(`rack${i % 7}`), i + 1)
  const { table, conflicts } = builder.build()
  assert.equal(conflicts.count, 0)
  return table
}

function ip(text: string): Ip {
  return parseIp(text) ?? assert.fail(text)
}

function numberOf(one: Ip): bigint {
  return BigInt(`0x${Buffer.from(one.bytes).toString('hex')}`)
}

function ipOf(value: bigint, bits: number): Ip {
  return {
    family: bits === 32 ? 4 : 6,
    bytes: Uint8Array.from(Buffer.from(value.toString(16).padStart(bits / 4, '0'), 'hex')),
  }
}
