import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { Network } from '../../simulator/network.ts'

const many = 1e12

/** Moves a step, and returns what each flow was given. */
function shares(capacities: readonly number[], ways: readonly (readonly number[])[]): number[] {
  const network = new Network()
  for (const capacity of capacities) network.addLink(capacity)
  const flows = ways.map((way) => network.addFlow(way))
  // A link of its own for each tells what it has brought.
  const own = ways.map(() => network.addLink(many))
  const told = ways.map((way, i) => network.addFlow([...way, own[i] ?? 0]))
  for (const flow of flows) network.removeFlow(flow)
  for (const flow of told) network.add(flow, many)
  network.step(1, () => undefined)
  return own.map((link) => network.sentOver(link))
}

test('no link carries more than it can, and no flow waits while all its links have room', () => {
  const networks = fc
    .record({
      capacities: fc.array(fc.integer({ min: 1, max: 1000 }), { minLength: 1, maxLength: 8 }),
      seeds: fc.array(fc.array(fc.nat(7), { minLength: 1, maxLength: 4 }), { minLength: 1, maxLength: 30 }),
    })
    .map(({ capacities, seeds }) => ({
      capacities,
      ways: seeds.map((way) => [...new Set(way.map((link) => link % capacities.length))]),
    }))
  fc.assert(
    fc.property(networks, ({ capacities, ways }) => {
      const given = shares(capacities, ways)
      const carried = capacities.map((_, link) =>
        ways.reduce((sum, way, i) => sum + (way.includes(link) ? (given[i] ?? 0) : 0), 0),
      )
      for (const [link, bytes] of carried.entries())
        assert.ok(bytes <= (capacities[link] ?? 0) * (1 + 1e-9), `${bytes} over link ${link}`)
      for (const [i, way] of ways.entries()) assert.ok((given[i] ?? 0) > 0, `flow ${i} over ${way.join()}`)
    }),
    { numRuns: 500 },
  )
})

test('flows of one link have the same; what one of them cannot use the others have', () => {
  assert.deepEqual(shares([90], [[0], [0], [0]]), [30, 30, 30])
  const [slow = 0, one = 0, other = 0] = shares([100, 10], [[0, 1], [0], [0]])
  assert.equal(slow, 10)
  assert.ok(Math.abs(one - 45) < 0.5 && one === other, `${one} and ${other}`)
})

test('a flow that has brought its bytes goes on with the next, and a link counts no more than came', () => {
  const network = new Network()
  const link = network.addLink(100)
  const flow = network.addFlow([link])
  for (const bytes of [40, 50, 30]) network.add(flow, bytes)
  let told = 0
  const here = () => {
    told++
  }
  const take = (nexts: readonly number[]) => {
    for (const bytes of nexts) {
      assert.ok(network.isFirstHere(flow))
      network.next(flow, bytes)
    }
  }
  network.step(1, here)
  assert.equal(told, 1)
  assert.equal(network.sentOver(link), 100)
  take([50, 30])
  assert.equal(network.leftOfFirst(flow), 20)
  assert.ok(!network.isFirstHere(flow))
  network.step(1, here)
  assert.equal(told, 2)
  assert.equal(network.sentOver(link), 120)
  assert.equal(network.activeFlows, 0)
})

test('what is not to be brought any more is not, and what is behind it comes sooner', () => {
  const network = new Network()
  const link = network.addLink(100)
  const flow = network.addFlow([link])
  for (const bytes of [40, 500, 30]) network.add(flow, bytes)
  network.drop(flow, 500)
  network.dropFirst(flow, 30)
  assert.equal(network.leftOfFirst(flow), 30)
  assert.equal(network.leftOf(flow), 30)
  network.dropFirst(flow, 0)
  assert.equal(network.activeFlows, 0)
})
