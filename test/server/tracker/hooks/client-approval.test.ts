import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { z } from 'zod'
import { clientApproval } from '../../../../server/tracker/hooks/client-approval.ts'
import { clientId, parseClientEntry, parseVersion } from '../../../../server/tracker/hooks/client-set.ts'
import { announceOf, answer, createHook } from './support.ts'

test('the client ID of a peer id is the one that chihaya sees', () => {
  const rows: Record<string, string> = {
    '-AZ3034-6wfG2wk6wWLc': 'AZ3034',
    '-TR0960-6ep6svaa61r4': 'TR0960',
    '-A~0010-a9mn9DFkj39J': 'A~0010',
    'T03A0----f089kjsdf6e': 'T03A0-',
    'S58B-----nKl34GoNb75': 'S58B--',
    'M4-4-0--9aa757Efd5Bl': 'M4-4-0',
    AZ2500BTeYUzyabAfo6U: 'AZ2500',
    exbc0JdSklm834kj9Udf: 'exbc0J',
    'XBT054d-8602Jn83NnF9': 'XBT054',
    OP1011affbecbfabeefb: 'OP1011',
    '-ML2.7.2-kgjjfkd9762': 'ML2.7.',
    '-BOWA0C-SDLFJWEIORNM': 'BOWA0C',
    'Q1-10-0-Yoiumn39BDfO': 'Q1-10-',
    '346------SDFknl33408': '346---',
    QVOD0054ABFFEDCCDEDB: 'QVOD00',
    '': '',
    '-': '',
    '12345': '',
    '-12345': '',
    '123456': '123456',
    '-123456': '123456',
  }
  for (const [peerId, wanted] of Object.entries(rows)) assert.equal(clientId(peerId), wanted, peerId)
})

const bytes = (hex: string) => Buffer.from(hex, 'hex').toString('latin1')
const rows: readonly {
  name: string
  options: z.input<typeof clientApproval.options>
  approved?: readonly string[]
  refused?: readonly string[]
}[] = [
  {
    name: 'a whitelist of chihaya approves the client IDs on it',
    options: { whitelist: ['010203'] },
    approved: ['01020304050607080900'],
    refused: ['10203040506070809000'],
  },
  {
    name: 'a blacklist of chihaya approves what is not on it',
    options: { blacklist: ['010203'] },
    approved: ['00000000001234567890'],
  },
  {
    name: 'a blacklist of chihaya refuses what is on it',
    options: { blacklist: ['123456'] },
    refused: ['12345678900000000000'],
  },
  {
    name: 'six characters are a whole client ID, with and without the dash in the peer id',
    options: { whitelist: ['AZ3034'] },
    approved: ['-AZ3034-6wfG2wk6wWLc', 'AZ3034BTeYUzyabAfo6U'],
    refused: ['-AZ3035-6wfG2wk6wWLc', 'xAZ3034-6wfG2wk6wWLc'],
  },
  {
    name: 'fewer characters are the start of client IDs',
    options: { whitelist: ['AZ', 'M4'] },
    approved: ['-AZ3034-6wfG2wk6wWLc', 'AZ2500BTeYUzyabAfo6U', 'M4-4-0--9aa757Efd5Bl'],
    refused: ['-BZ3034-6wfG2wk6wWLc'],
  },
  {
    name: 'a dash or more than six characters is the start of peer ids',
    options: { whitelist: ['-AZ', '-qB465', 'M4-4-0--9'] },
    approved: ['-AZ3034-6wfG2wk6wWLc', '-qB4651-6wfG2wk6wWLc', 'M4-4-0--9aa757Efd5Bl'],
    refused: ['AZ2500BTeYUzyabAfo6U', '-qB4660-6wfG2wk6wWLc', 'M4-4-0--8aa757Efd5Bl'],
  },
  {
    name: 'a range of versions has both its ends in it',
    options: { whitelist: [{ client: 'TR', from: '3.00', to: '4.0.5' }] },
    approved: ['-TR3000-6ep6svaa61r4', '-TR300Z-6ep6svaa61r4', '-TR4050-6ep6svaa61r4'],
    refused: [
      '-TR2940-6ep6svaa61r4',
      '-TR4051-6ep6svaa61r4',
      '-AZ3034-6wfG2wk6wWLc',
      'TR3000--6ep6svaa61r4',
      // No Azureus-style ids: no dash after the version, and a version with something else in it.
      '-TR3000x6ep6svaa61r4',
      '-TR3.00-6ep6svaa61r4',
    ],
  },
  {
    name: 'versions are written as texts too',
    options: { blacklist: ['TR < 3.0.0', 'qB 4.2.0..4.2.A', 'DE >= 2110', 'lt > 1.0', 'AZ <= 0300'] },
    refused: [
      '-TR2940-6ep6svaa61r4',
      '-qB4200-6ep6svaa61r4',
      '-qB42A0-6ep6svaa61r4',
      '-DE211s-6ep6svaa61r4',
      '-lt1001-6ep6svaa61r4',
      '-AZ0300-6ep6svaa61r4',
    ],
    approved: [
      '-TR3000-6ep6svaa61r4',
      '-qB42A1-6ep6svaa61r4',
      '-qB41z0-6ep6svaa61r4',
      '-DE210s-6ep6svaa61r4',
      '-lt1000-6ep6svaa61r4',
      '-AZ0301-6ep6svaa61r4',
    ],
  },
  {
    name: 'any bytes may stand in a peer id',
    options: { blacklist: ['-AZ', 'TR >= 1.0'] },
    approved: [bytes('ff'.repeat(20)), bytes(`2d5452${'00'.repeat(4)}2d${'80'.repeat(12)}`)],
  },
]

for (const { name, options, approved = [], refused = [] } of rows) {
  test(name, async (t) => {
    const hook = await createHook(t, clientApproval, options)
    for (const peerId of approved)
      assert.equal(
        answer(() => hook.announce?.(announceOf({ peerId }))),
        'ok',
        peerId,
      )
    for (const peerId of refused)
      assert.equal(
        answer(() => hook.announce?.(announceOf({ peerId }))),
        'unapproved client',
        peerId,
      )
  })
}

test('scrapes have no client, so they are not asked', async (t) => {
  const hook = await createHook(t, clientApproval, { whitelist: ['AZ3034'] })
  assert.ok(!('scrape' in hook))
})

test('options that cannot be used say what is wrong', () => {
  const faults = (options: unknown) =>
    clientApproval.options.safeParse(options).error?.issues.map(({ message }) => message) ?? []
  assert.deepEqual(faults({ whitelist: ['AZ3034'], blacklist: ['AZ3035'] }), [
    'using both whitelist and blacklist is invalid',
  ])
  assert.deepEqual(faults({ whitelist_file: 'a', blacklist_file: 'b' }), [
    'using both whitelist and blacklist is invalid',
  ])
  assert.deepEqual(faults({ whitelist: ['AZ3034'], whitelist_file: 'a' }), [
    'using both whitelist and whitelist_file is invalid',
  ])
  assert.match(faults({}).join(), /need one of/)
  assert.match(faults({ whitelist: [] }).join(), /an empty list/)
  assert.match(faults({ whitelist: ['TR >= 4.2.10'] }).join(), /version "4\.2\.10".*10 is written A/)
  assert.match(
    faults({ whitelist: [{ client: 'TR', from: '4.0.0', to: '3.00' }] }).join(),
    /none in that range/,
  )
  assert.match(faults({ whitelist: [{ client: 'TR' }] }).join(), /need from, to or both/)
  assert.match(faults({ whitelist: [{ client: 'TRX', from: '3000' }] }).join(), /need its two characters/)
  assert.match(faults({ whitelist: [{ client: 'TR', from: 3 }] }).join(), /versions in quotes/)
  assert.match(faults({ whitelist: ['AZ3034\u00e9'] }).join(), /need a client ID/)
})

const version = fc.stringMatching(/^[0-9A-Za-z]{4}$/)

test('versions compare character by character, in the order of ASCII', async (t) => {
  await fc.assert(
    fc.asyncProperty(version, version, version, async (one, other, asked) => {
      const [from, to] = one <= other ? [one, other] : [other, one]
      const peerId = `-TR${asked}-abcdefghijkl`
      const wanted = from <= asked && asked <= to ? 'ok' : 'unapproved client'
      for (const entry of [{ client: 'TR', from, to }, `TR ${from}..${to}`]) {
        const hook = await createHook(t, clientApproval, { whitelist: [entry] })
        assert.equal(
          answer(() => hook.announce?.(announceOf({ peerId }))),
          wanted,
        )
      }
    }),
    { numRuns: 300 },
  )
})

test('a version means the same with and without its dots and its last zeros', () => {
  fc.assert(
    fc.property(version, (text) => {
      const dotted = text.replace(/(?<=.)(?=.)/g, '.')
      assert.equal(parseVersion(dotted), parseVersion(text))
      assert.equal(parseVersion(dotted.replace(/(\.0)+$/, '')), parseVersion(text))
    }),
  )
})

test('parseClientEntry() reads any text, or says what is wrong with it', () => {
  const text = fc.oneof(
    fc.string(),
    fc.string({ unit: fc.constantFrom('T', 'R', ' ', '.', '>', '<', '=', '3', '-', 'é') }),
  )
  fc.assert(
    fc.property(text, (given) => {
      try {
        assert.ok(parseClientEntry(given).kind)
      } catch (error) {
        assert.match(String(error), /^Error: Cannot read (client|versions?) /)
      }
    }),
    { numRuns: 2000 },
  )
})
