import assert from 'node:assert/strict'
import { test } from 'node:test'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import { createWebseedPolicy } from '../../../server/registry/webseed-policy.ts'

const infoHash = infoHashFromHex('0'.repeat(40))
const other = infoHashFromHex('1'.repeat(40))
const leaseMs = 30_000

function start(hostsMax = 10) {
  const clock = { now: 1_000_000 }
  const policy = createWebseedPolicy({ leaseMs, hostsMax, now: () => clock.now })
  const ask = (
    host: string,
    {
      complete = 0,
      stalled,
      hash = infoHash,
    }: { complete?: number; stalled?: number; hash?: typeof other } = {},
  ) =>
    policy.mayUse({
      infoHash: hash,
      host,
      counts: { complete, incomplete: 1, downloaded: complete },
      stalledSeconds: stalled,
    })
  return { clock, ask }
}

test('the first host of a swarm without a seeder may use the webseed, and goes on while it renews', () => {
  const { clock, ask } = start()
  assert.ok(ask('a'))
  assert.ok(!ask('b'), 'the others find the first')
  assert.ok(ask('b', { hash: other }), 'each swarm has its own first')
  clock.now += leaseMs - 1
  assert.ok(ask('a'))
  clock.now += leaseMs - 1
  assert.ok(!ask('b'))
})

test('a first host that dies costs its swarm one lease', () => {
  const { clock, ask } = start()
  assert.ok(ask('a'))
  clock.now += leaseMs
  assert.ok(ask('b'))
  assert.ok(!ask('a'))
})

test('once a seeder is there, nobody needs the webseed but those who stand still', () => {
  const { ask } = start()
  assert.ok(ask('a'))
  assert.ok(!ask('a', { complete: 1 }))
  assert.ok(!ask('b', { complete: 1, stalled: 9 }))
  assert.ok(ask('b', { complete: 1, stalled: 10 }))
})

test('hosts with leases are bounded, for the stalled too', () => {
  const { ask } = start(2)
  assert.ok(ask('a', { stalled: 10 }))
  assert.ok(ask('b', { stalled: 10 }))
  assert.ok(!ask('c', { stalled: 10 }))
  assert.ok(ask('a', { stalled: 10 }), 'who has one keeps it')
})

test('a host with many builds to fetch is not held up by what it has fetched already', () => {
  const { ask } = start(1)
  for (let number = 0; number < 100; number++)
    assert.ok(ask('a', { hash: infoHashFromHex(number.toString(16).padStart(40, '0')) }), `build ${number}`)
  assert.ok(!ask('b', { hash: infoHashFromHex('f'.repeat(40)) }))
})
