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
      // Too few for a second part.
      pieceCount = 7,
      rangeDone = false,
    }: {
      complete?: number
      stalled?: number
      hash?: typeof other
      pieceCount?: number
      rangeDone?: number | boolean
    } = {},
  ) =>
    policy.mayUse({
      infoHash: hash,
      pieceCount,
      host,
      rangeDone,
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
  assert.ok(!ask('b', { complete: 1, stalled: 2 }))
  assert.ok(ask('b', { complete: 1, stalled: 3 }))
})

test('hosts with leases are bounded, for the stalled too', () => {
  const { ask } = start(2)
  assert.ok(ask('a', { complete: 1, stalled: 10 }))
  assert.ok(ask('b', { complete: 1, stalled: 10 }))
  assert.ok(!ask('c', { complete: 1, stalled: 10 }))
  assert.ok(ask('a', { complete: 1, stalled: 10 }), 'who has one keeps it')
})

test('a host with many builds to fetch is not held up by what it has fetched already', () => {
  const { ask } = start(1)
  for (let number = 0; number < 100; number++)
    assert.ok(ask('a', { hash: infoHashFromHex(number.toString(16).padStart(40, '0')) }), `build ${number}`)
  assert.ok(!ask('b', { hash: infoHashFromHex('f'.repeat(40)) }))
})

test('the first hosts of a large build get a part each, and further ones until all are leased once', () => {
  const { ask } = start(100)
  const pieceCount = 1000
  const leased = new Uint8Array(pieceCount)
  const take = (host: string, rangeDone = false) => {
    const lease = ask(host, { pieceCount, rangeDone })
    if (lease === undefined) return false
    for (let piece = lease.firstPiece; piece < lease.firstPiece + lease.pieceCount; piece++)
      leased[piece] = (leased[piece] ?? 0) + 1
    return true
  }
  const hosts = Array.from({ length: 20 }, (_, i) => `host-${i}`)
  const first = hosts.filter((host) => take(host))
  assert.deepEqual(first, hosts.slice(0, 8), 'so many hosts at once')
  assert.ok(ask('host-0', { pieceCount }), 'who asks again keeps its part')
  for (let turn = 0; first.length > 0; turn++) {
    const host = first[turn % first.length] ?? ''
    if (!take(host, true)) first.splice(first.indexOf(host), 1)
  }
  assert.ok(
    leased.every((times) => times === 1),
    'each piece leaves the server once',
  )
})

test('the part of a host that went away is leased again, and all are when nobody has the build some time after', () => {
  const { clock, ask } = start(100)
  const pieceCount = 8
  const one = ask('a', { pieceCount })
  assert.deepEqual(one, { firstPiece: 0, pieceCount: 4 })
  assert.deepEqual(ask('b', { pieceCount }), { firstPiece: 4, pieceCount: 4 })
  clock.now += leaseMs - 1
  assert.ok(ask('b', { pieceCount }))
  clock.now += 1
  assert.deepEqual(ask('c', { pieceCount }), one)
  assert.equal(ask('c', { pieceCount, rangeDone: true }), undefined)
  assert.equal(ask('b', { pieceCount, rangeDone: true }), undefined)
  clock.now += 9_999
  assert.equal(ask('d', { pieceCount }), undefined)
  clock.now += 1
  assert.deepEqual(ask('d', { pieceCount }), one)
})

test('what nobody was leased yet goes out before what somebody was, and who comes late keeps its part until then', () => {
  const { clock, ask } = start(100)
  const pieceCount = 12
  const [first, second, third] = [0, 4, 8].map((firstPiece) => ({ firstPiece, pieceCount: 4 }))
  assert.deepEqual(ask('a', { pieceCount }), first)
  clock.now += 2 * leaseMs
  assert.deepEqual(ask('b', { pieceCount }), second)
  assert.deepEqual(ask('a', { pieceCount }), first, 'late, but nobody has taken it')
  clock.now += 2 * leaseMs
  assert.deepEqual(ask('c', { pieceCount }), third)
  assert.deepEqual(ask('d', { pieceCount }), first, 'there is no other any more')
  assert.deepEqual(ask('a', { pieceCount }), second, 'nor for whoever had it')
  assert.equal(ask('b', { pieceCount }), undefined)
})

test('a host that says twice that it is done with a range is not taken to be done with the next', () => {
  const { ask } = start(100)
  const pieceCount = 12
  assert.deepEqual(ask('a', { pieceCount }), { firstPiece: 0, pieceCount: 4 })
  const next = { firstPiece: 4, pieceCount: 4 }
  assert.deepEqual(ask('a', { pieceCount, rangeDone: 0 }), next)
  assert.deepEqual(ask('a', { pieceCount, rangeDone: 0 }), next)
  assert.deepEqual(ask('a', { pieceCount, rangeDone: 4 }), { firstPiece: 8, pieceCount: 4 })
  assert.equal(ask('a', { pieceCount, rangeDone: true }), undefined, 'older agents do not say which')
})

test('once no part is left, who is done goes on with that of a host that takes much longer than others did', () => {
  const { clock, ask } = start()
  const parts = { pieceCount: 20 }
  const slow = ask('slow', parts)
  const fetchPart = (host: string, tookMs: number) => {
    clock.now += tookMs
    return ask(host, { ...parts, rangeDone: true })
  }
  assert.ok(ask('quick', parts))
  assert.ok(fetchPart('quick', 2_000))
  assert.ok(fetchPart('quick', 2_000))
  const last = fetchPart('quick', 2_000)
  assert.ok(last && last.firstPiece !== slow?.firstPiece)
  assert.deepEqual(ask('slow', parts), slow, 'it keeps its own while others have theirs')
  assert.deepEqual(fetchPart('quick', 2_000), slow)
  assert.notDeepEqual(ask('slow', parts), slow, 'it ends what it has begun')
})

test('who had nothing to go on with takes the part of a host that went away as soon as that is slow', () => {
  const { clock, ask } = start()
  const parts = { pieceCount: 20 }
  const gone = ask('gone', parts)
  assert.ok(ask('first', parts))
  for (let i = 0; i < 3; i++) {
    clock.now += 400
    assert.ok(ask('first', { ...parts, rangeDone: true }))
  }
  clock.now = clock.now - 1_200 + 1_000
  assert.equal(ask('first', { ...parts, rangeDone: true }), undefined, 'not yet')
  clock.now += 1_000
  assert.deepEqual(ask('first', parts), gone)
})

test('what was fetched is leased again once the swarm is known for twice as long, at the earliest after a second', () => {
  const { clock, ask } = start(100)
  const pieceCount = 4
  const all = { firstPiece: 0, pieceCount }
  for (const [tookMs, againMs] of [
    [100, 1_000],
    [4_000, 4_000],
    [60_000, 10_000],
  ] as const) {
    const hash = infoHashFromHex(String(tookMs).padStart(40, '2'))
    const turn = { pieceCount, hash }
    assert.deepEqual(ask('a', turn), all)
    for (let ms = 0; ms < tookMs; ms += leaseMs / 3) {
      clock.now += Math.min(leaseMs / 3, tookMs - ms)
      assert.deepEqual(ask('a', turn), all)
    }
    assert.equal(ask('a', { ...turn, rangeDone: true }), undefined)
    clock.now += againMs - 1
    assert.equal(ask('b', turn), undefined, `after ${tookMs} ms`)
    clock.now += 1
    assert.deepEqual(ask('b', turn), all)
  }
})

test('a host that takes hardly longer than others keeps its part', () => {
  const { clock, ask } = start()
  const parts = { pieceCount: 20 }
  ask('a', parts)
  for (let i = 0; i < 3; i++) {
    clock.now += 2_000
    assert.ok(ask('a', { ...parts, rangeDone: true }))
  }
  const part = ask('b', parts)
  assert.ok(part)
  clock.now += 3_900
  assert.notDeepEqual(ask('a', { ...parts, rangeDone: true }), part)
})

test('a host without a lease in one swarm keeps those that it has in others', () => {
  const { ask } = start(1)
  assert.ok(ask('a'))
  assert.ok(!ask('a', { hash: other, complete: 1 }))
  assert.ok(!ask('b', { hash: other }), 'the one that may use the webseed is still there')
})

test('while parts are leased, who stands still gets one, waits for the others, and in the end may have all', () => {
  const { clock, ask } = start(100)
  const pieceCount = 8
  const whole = { firstPiece: 0, pieceCount }
  assert.deepEqual(ask('a', { pieceCount, stalled: 30 }), { firstPiece: 0, pieceCount: 4 })
  assert.deepEqual(ask('b', { pieceCount, stalled: 30 }), { firstPiece: 4, pieceCount: 4 })
  assert.equal(ask('c', { pieceCount, stalled: 30 }), undefined, 'the server has just come back, say')
  clock.now += 20_000
  assert.equal(ask('c', { pieceCount, stalled: 19 }), undefined)
  assert.deepEqual(ask('c', { pieceCount, stalled: 20 }), whole)
  clock.now += leaseMs - 1
  assert.deepEqual(ask('c', { pieceCount }), whole, 'while nobody else has it')
  assert.equal(ask('c', { pieceCount, complete: 1 }), undefined)
})
