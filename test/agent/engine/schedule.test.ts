import assert from 'node:assert/strict'
import { test } from 'node:test'
import { isLate, Reach } from '../../../agent/engine/schedule.ts'

const nowMs = 100_000
/** Of a peer that is still: when its block should come does not matter yet. */
const notDue = { askedMs: nowMs - 10, dueMs: nowMs + 10_000 }

test('a peer is late that sends nothing for a second, or for twice as long as a piece usually takes', () => {
  const isStillLate = (stillMs: number, usualMs: number) =>
    isLate(notDue, { stillMs, usualMs, untouched: 5, nowMs })
  assert.equal(isStillLate(900, 100), false)
  assert.equal(isStillLate(1100, 100), true)
  assert.equal(isStillLate(3000, 4000), false, 'slow links bring news late')
  assert.equal(isStillLate(8100, 4000), true)
})

test('a peer that sends nothing for ten seconds is late, however long a piece takes', () => {
  for (const usualMs of [100, 4000, 60_000])
    assert.equal(isLate(notDue, { stillMs: 10_100, usualMs, untouched: 5, nowMs }), true, `${usualMs} ms`)
})

test('once nothing else is left a block is late that takes twice as long as it should, but is given as long as a peer that is still', () => {
  const isBlockLate = (shouldTakeMs: number, tookMs: number, usualMs: number, untouched = 0) =>
    isLate(
      { askedMs: nowMs - tookMs, dueMs: nowMs - tookMs + shouldTakeMs },
      { stillMs: 0, usualMs, untouched, nowMs },
    )
  assert.equal(isBlockLate(3000, 5900, 100), false)
  assert.equal(isBlockLate(3000, 6100, 100), true)
  assert.equal(isBlockLate(100, 1000, 100), false)
  assert.equal(isBlockLate(100, 1200, 100), true)
  assert.equal(isBlockLate(100, 1200, 4000), false, 'where a piece takes long, so may its blocks')
  assert.equal(isBlockLate(3000, 60_000, 100, 1), false, 'while there is another piece to ask for')
})

test('a gateway dials far peers once those of its rack had time to say what they have, and is told when that is', () => {
  const reach = new Reach()
  const far = { distance: 1, reserve: false }
  assert.equal(reach.heard({ distance: 0, reserve: false }, 5_000), undefined)
  const inMs = reach.heard(far, 5_000)
  assert.ok(inMs !== undefined && inMs > 0)
  assert.equal(reach.heard(far, 5_010), undefined, 'it is said once')
  assert.equal(reach.mayDial(far, false, 5_000 + inMs - 1), false)
  assert.equal(reach.mayDial(far, false, 5_000 + inMs), true)
  assert.equal(reach.mayDial(far, true, 5_000 + inMs), false, 'one of the rack has everything')
})

test('a host of which nobody near has anything asks far peers after three seconds, but not while a neighbour fetches for it', () => {
  const reach = new Reach()
  reach.heard({ distance: 0, reserve: false }, 0)
  reach.heard({ distance: 1, reserve: true }, 0)
  const tick = (atMs: number, isAwaited: boolean) => {
    reach.tick({ movedAtMs: 0, isAwaited, isIdle: false, isOffered: () => true }, atMs)
    return reach.mayAsk(1, atMs)
  }
  assert.equal(tick(2_900, false), false)
  for (let atMs = 3_000; atMs <= 60_000; atMs += 250)
    assert.equal(tick(atMs, true), false, `after ${atMs} ms`)
  assert.equal(tick(62_900, false), false)
  assert.equal(tick(63_100, false), true)
})

test('a host that gets nothing does without its neighbours after ten seconds in which a peer had something for it', () => {
  const reach = new Reach()
  const tick = (atMs: number, isOffered: boolean) => {
    reach.tick({ movedAtMs: 0, isAwaited: false, isIdle: true, isOffered: () => isOffered }, atMs)
    return reach.isStuck(atMs)
  }
  for (let atMs = 0; atMs <= 60_000; atMs += 250)
    assert.equal(tick(atMs, false), false, `nobody has anything, after ${atMs} ms`)
  for (let atMs = 60_250; atMs < 70_000; atMs += 250)
    assert.equal(tick(atMs, true), false, `offered, after ${atMs} ms`)
  assert.equal(tick(70_000, true), true)
})

test('a host that has had nothing to fetch for most of the last seconds asks far peers, although a neighbour fetches for it', () => {
  const reach = new Reach()
  reach.heard({ distance: 0, reserve: false }, 0)
  reach.heard({ distance: 1, reserve: true }, 0)
  const mayAskAt = (fromMs: number, untilMs: number, isIdle: (atMs: number) => boolean) => {
    for (let atMs = fromMs; atMs <= untilMs; atMs += 250)
      reach.tick({ movedAtMs: atMs, isAwaited: true, isIdle: isIdle(atMs), isOffered: () => true }, atMs)
    return reach.mayAsk(1, untilMs)
  }
  assert.equal(
    mayAskAt(0, 30_000, (atMs) => atMs % 1_000 === 0),
    false,
    'idle for a quarter of the time',
  )
  assert.equal(
    mayAskAt(30_250, 60_000, (atMs) => atMs % 1_000 !== 0),
    true,
    '…for three quarters',
  )
  assert.equal(reach.isStuck(60_000), false, 'what near ones have or fetch is left to them')
  assert.equal(
    mayAskAt(60_250, 90_000, () => false),
    false,
  )
})
