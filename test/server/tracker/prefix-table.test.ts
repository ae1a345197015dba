import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { Netmask } from 'netmask'
import { parseIp } from '../../../lib/protocol/address.ts'
import { parseCidr } from '../../../lib/protocol/cidr.ts'
import { parsePlace } from '../../../lib/protocol/place.ts'
import { createPrefixTable } from '../../../server/tracker/prefix-table.ts'

// Few distinct bits, so that networks nest and collide.
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
      const table = createPrefixTable(
        [...blocks.keys()].map((text) => ({
          cidr: parseCidr(text),
          place: parsePlace(`p-${text.replaceAll('/', '-')}`),
        })),
      )
      for (const one of asked) {
        const best = [...blocks]
          .filter(([text]) => new Netmask(text).contains(one))
          .sort((a, b) => b[1] - a[1])[0]
        assert.equal(table.find(parseIp(one) ?? assert.fail()), best && `p-${best[0].replaceAll('/', '-')}`)
      }
    }),
    { numRuns: 500 },
  )
})

test('a network with two places is an error that names both', () => {
  const entry = (place: string) => ({ cidr: parseCidr('10.1.0.0/16'), place: parsePlace(place) })
  assert.throws(
    () => createPrefixTable([entry('r1'), entry('r2')]),
    /10\.1\.0\.0\/16 is given as r1 and as r2/,
  )
})
