import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { Ip } from '../../../lib/protocol/address.ts'
import { formatIp, ipFromBytes, parseIp } from '../../../lib/protocol/address.ts'
import { cidrContains, parseCidr } from '../../../lib/protocol/cidr.ts'
import type { Place } from '../../../lib/protocol/place.ts'
import { parsePlace } from '../../../lib/protocol/place.ts'
import type { Level, Topology, TopologyConfig } from '../../../server/tracker/topology.ts'
import { createTopology, isLeafPlace, rootPlace, sourceOf } from '../../../server/tracker/topology.ts'

const levels = ['rack', 'row', 'datacentre']

test('a place has its parents, nearest first, and the root above them; each level is one further', () => {
  const topology = open({
    places: { a1: ['r1', 'ams'], a2: ['r1', 'ams'], b1: ['r2', 'ams'], f1: ['r1', 'fra'] },
  })
  assert.equal(topology.levels, 3)
  const ancestors = ancestorsIn(topology, 'a1')
  assert.deepEqual(
    ancestors.map(({ distance }) => distance),
    [1, 2, 3],
  )
  assert.equal(ancestors.at(-1)?.node, rootPlace)
  assert.equal(distanceIn(topology, 'a1', 'a1'), 0)
  assert.equal(distanceIn(topology, 'a1', 'a2'), 1)
  assert.equal(distanceIn(topology, 'a1', 'b1'), 2)
  assert.equal(distanceIn(topology, 'a1', 'f1'), 3)
})

test('a place that is not listed is a rack of its own under the root, and so is the place of a foreign address', () => {
  const topology = open({ places: { a1: ['r1', 'ams'] } })
  assert.deepEqual(ancestorsIn(topology, 'stranger'), [{ node: rootPlace, distance: 3 }])
  assert.equal(distanceIn(topology, 'stranger', 'a1'), 3)
  const id = topology.placeOfAddress(ip('192.0.2.77'))
  assert.deepEqual(topology.ancestorsOf(id), [{ node: rootPlace, distance: 3 }])
  assert.equal(id, topology.idOf(parsePlace('192.0.2.0/24')))
  assert.equal(topology.nameOfAddress(ip('192.0.2.77')), '192.0.2.0/24')
})

test('rows of the same name in two datacentres are two, whatever their racks are called', () => {
  const topology = open({ places: { a1: ['row1', 'ams'], f1: ['row1', 'fra'] } })
  const [a, f] = [ancestorsIn(topology, 'a1'), ancestorsIn(topology, 'f1')]
  assert.notEqual(a[0]?.node, f[0]?.node)
  assert.notEqual(a[1]?.node, f[1]?.node)
  assert.equal(a[2]?.node, f[2]?.node)
})

test('a rack that is moved is another place; those that stay keep their numbers, and so do they after a restart', () => {
  const before = open({ places: { a1: ['r1', 'ams'], a2: ['r1', 'ams'] } })
  const after = open({ places: { a1: ['r2', 'ams'], a2: ['r1', 'ams'] } })
  assert.notEqual(after.idOf(parsePlace('a1')), before.idOf(parsePlace('a1')))
  assert.equal(after.idOf(parsePlace('a2')), before.idOf(parsePlace('a2')))
  assert.deepEqual(ancestorsIn(after, 'a2'), ancestorsIn(before, 'a2'))
  // What was stored under the old number is under the root alone: nobody is taken for a neighbour in the wrong row.
  assert.deepEqual(after.ancestorsOf(before.idOf(parsePlace('a1'))), [{ node: rootPlace, distance: 3 }])
  const datacentreMoved = open({ places: { a1: ['r1', 'fra'], a2: ['r1', 'fra'] } })
  assert.notEqual(datacentreMoved.idOf(parsePlace('a1')), before.idOf(parsePlace('a1')))
})

test('no place is the number of a node above places, whatever it is called', () => {
  const topology = open({ places: { r1: ['r1', 'r1'], ams: ['r1', 'ams'] } })
  fc.assert(
    fc.property(fc.stringMatching(/^[a-z0-9][a-z0-9./-]{0,40}$/), (name) => {
      const id = topology.idOf(parsePlace(name))
      assert.ok(isLeafPlace(id))
      for (const { node } of topology.ancestorsOf(id)) assert.ok(!isLeafPlace(node))
    }),
  )
})

test('faults name every place and what it lacks', () => {
  assert.throws(
    () => open({ places: { a1: ['r1'], a2: [], a3: ['r1', 'ams'] } }),
    /topology\.places\.a1: got 1 parents, need 2 \(row, datacentre\)\ntopology\.places\.a2: got 0 parents/,
  )
})

test('with one level a place has the root above it and nothing else', () => {
  const topology = createTopology({ ...base, levels: ['rack'], places: { a1: { parents: [] } } })
  assert.deepEqual(ancestorsIn(topology, 'a1'), [{ node: rootPlace, distance: 1 }])
})

// Few distinct bytes, so that prefixes nest and addresses fall into them.
const byte = fc.constantFrom(0, 1, 127, 128, 192, 255)
const address = fc.oneof(
  fc.array(byte, { minLength: 4, maxLength: 4 }),
  fc.array(byte, { minLength: 16, maxLength: 16 }),
)
const prefix = fc.tuple(address, fc.nat()).map(([bytes, length]) => {
  const found = ipFromBytes(Uint8Array.from(bytes))
  return network(`${formatIp(found)}/${length % (found.bytes.length * 8 + 1)}`)
})
const prefixes = fc.uniqueArray(prefix, { maxLength: 12 })

test('an address is where the longest prefix says, and its number is that of the name', () => {
  fc.assert(
    fc.property(
      prefixes,
      fc.integer({ min: 0, max: 32 }),
      fc.integer({ min: 0, max: 128 }),
      fc.array(address, { minLength: 1, maxLength: 40 }),
      (texts, ipv4PrefixLength, ipv6PrefixLength, addresses) => {
        const entries = texts.map((text, i) => ({ cidr: parseCidr(text), place: parsePlace(`rack${i}`) }))
        const topology = createTopology({ ...base, prefixes: entries, ipv4PrefixLength, ipv6PrefixLength })
        const ips = addresses.map((bytes) => ipFromBytes(Uint8Array.from(bytes)))
        for (const asked of ips) {
          const [longest] = entries
            .filter(({ cidr }) => cidrContains(cidr, asked))
            .sort((a, b) => b.cidr.length - a.cidr.length)
          const name =
            longest?.place ??
            network(`${formatIp(asked)}/${asked.family === 4 ? ipv4PrefixLength : ipv6PrefixLength}`)
          assert.equal(topology.nameOfAddress(asked), name)
          assert.equal(topology.placeOfAddress(asked), topology.idOf(name as Place), formatIp(asked))
        }
      },
    ),
    { numRuns: 2000 },
  )
})

test('many addresses of many networks are placed rightly', () => {
  const topology = open({ prefixes: { '10.0.0.0/8': 'ten', '10.200.0.0/32': 'one' } })
  for (let i = 0; i < 150_000; i++) {
    const asked = ipFromBytes(Uint8Array.of(i % 3 === 0 ? 10 : 11, (i >> 16) & 255, (i >> 8) & 255, i & 255))
    const expected = i % 3 === 0 ? 'ten' : `11.${(i >> 16) & 255}.${(i >> 8) & 255}.0/24`
    assert.equal(topology.placeOfAddress(asked), topology.idOf(parsePlace(expected)))
  }
  assert.equal(topology.placeOfAddress(ip('10.200.0.0')), topology.idOf(parsePlace('one')))
})

test('a place that is called like the network of an address has the parents that it was given', () => {
  const topology = open({
    places: { '10.1.2.0/24': ['r1', 'ams'], 'fd00::/64': ['r1', 'ams'], a1: ['r1', 'ams'] },
  })
  for (const address of ['10.1.2.3', 'fd00::3']) {
    const id = topology.placeOfAddress(ip(address))
    assert.equal(id, topology.idOf(topology.nameOfAddress(ip(address)) as Place))
    assert.deepEqual(topology.ancestorsOf(id), ancestorsIn(topology, 'a1'))
  }
  assert.deepEqual(topology.ancestorsOf(topology.placeOfAddress(ip('10.1.3.3'))), [
    { node: rootPlace, distance: 3 },
  ])
})

test('explain() names what decided, what it beat, and the parents with their levels', () => {
  const topology = open({
    places: { a1: ['r1', 'ams'] },
    prefixes: { '10.0.0.0/8': 'b1', '10.1.0.0/16': 'c1', '10.1.2.0/24': 'a1' },
  })
  const { lost, rule, ...said } = topology.explain(ip('10.1.2.3'))
  assert.deepEqual(said, {
    place: 'a1',
    network: '10.1.2.0/24',
    listed: true,
    parents: [
      { level: 'row', name: 'r1' },
      { level: 'datacentre', name: 'ams' },
    ],
  })
  assert.deepEqual(rule && sourceOf(rule), { kind: 'prefixes', index: 2 })
  assert.deepEqual(
    lost.map(({ network: text, place }) => `${text} ${place}`),
    ['10.1.0.0/16 c1', '10.0.0.0/8 b1'],
  )
  assert.deepEqual(topology.explain(ip('192.0.2.1')), {
    place: '192.0.2.0/24',
    network: '192.0.2.0/24',
    rule: undefined,
    listed: false,
    parents: [],
    lost: [],
  })
})

test('a network that is given two places is an error at each of the two', () => {
  const entry = (cidr: string, place: string) => ({ cidr: parseCidr(cidr), place: parsePlace(place) })
  assert.throws(
    () =>
      createTopology({
        ...base,
        prefixes: [entry('10.1.0.0/16', 'r1'), entry('fd00::/8', 'r1'), entry('10.1.0.0/16', 'r2')],
      }),
    {
      message:
        'topology.prefixes.0: 10.1.0.0/16 is given as r1 here, and as r2 in topology.prefixes.2: keep one of the two\n' +
        'topology.prefixes.2: 10.1.0.0/16 is given as r2 here, and as r1 in topology.prefixes.0: keep one of the two',
    },
  )
})

test('far places are shared by capacity ÷ cost of the way; without either, each distance has half of what is left', () => {
  const sharesOf = (...given: readonly Level[]) => createTopology({ ...base, levels: given }).shares
  assert.deepEqual(sharesOf('rack', 'row', 'datacentre'), [0, 1 / 2, 1 / 2, 1])
  assert.deepEqual(sharesOf('rack'), [0, 1])
  assert.deepEqual(sharesOf(), [0, 1])
  // Out of the rack for 1; out of the zone for 1 + 19.
  assert.deepEqual(sharesOf('rack', { name: 'zone', cost: 19 }), [0, 20 / 21, 1])
  // As wide as the rack's uplink, then as the zone's; and twice as far.
  assert.deepEqual(sharesOf({ name: 'rack', capacity: 40 }, { name: 'zone', capacity: 10 }), [0, 40 / 45, 1])
  // A row that is wider than its racks makes no way wider.
  assert.deepEqual(
    sharesOf({ name: 'rack', capacity: 10, cost: 1 }, { name: 'row', capacity: 400, cost: 1 }, 'datacentre'),
    [0, 10 / (10 + 5 + 10 / 3), 5 / (5 + 10 / 3), 1],
  )
  // The way to the row has no capacity: it is as wide as the widest.
  assert.deepEqual(sharesOf('rack', { name: 'zone', capacity: 0.5 }), [0, 2 / 3, 1])
})

const base: TopologyConfig = { levels, places: {}, prefixes: [], ipv4PrefixLength: 24, ipv6PrefixLength: 64 }

function open({
  places = {},
  prefixes: table = {},
}: {
  places?: Record<string, readonly string[]>
  prefixes?: Record<string, string>
}): Topology {
  return createTopology({
    ...base,
    places: Object.fromEntries(Object.entries(places).map(([name, parents]) => [name, { parents }])),
    prefixes: Object.entries(table).map(([cidr, place]) => ({
      cidr: parseCidr(cidr),
      place: parsePlace(place),
    })),
  })
}

function ancestorsIn(topology: Topology, name: string) {
  return topology.ancestorsOf(topology.idOf(parsePlace(name)))
}

/** As a store finds it: the nearest node that both are under. */
function distanceIn(topology: Topology, a: string, b: string): number | undefined {
  if (a === b) return 0
  const above = new Set(ancestorsIn(topology, b).map(({ node }) => node))
  return ancestorsIn(topology, a).find(({ node }) => above.has(node))?.distance
}

function ip(text: string): Ip {
  const parsed = parseIp(text)
  if (!parsed) throw new Error(`No address: ${text}`)
  return parsed
}

/** `10.1.2.3/8` → `10.0.0.0/8`, by arithmetic on one big number. */
function network(text: string): string {
  const [address_ = '', length = ''] = text.split('/')
  const { bytes } = ip(address_)
  const bits = BigInt(bytes.length * 8)
  const host = bits - BigInt(length)
  const masked = (BigInt(`0x${Buffer.from(bytes).toString('hex')}`) >> host) << host
  const hex = masked.toString(16).padStart(bytes.length * 2, '0')
  const maskedIp: Ip = { family: bytes.length === 4 ? 4 : 6, bytes: Uint8Array.from(Buffer.from(hex, 'hex')) }
  return `${formatIp(maskedIp)}/${length}`
}
