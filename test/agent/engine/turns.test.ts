import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { AllTurns, atOnceMax, Turns } from '../../../agent/engine/turns.ts'

const runs = Math.ceil(Number(process.env['RACKSWARM_FUZZ_RUNS'] ?? 100_000) / 100)

test('eight pieces at once, and none for two', () => {
  const turns = new Turns<string>(() => 8)
  for (let piece = 0; piece < 8; piece++) {
    assert.ok(turns.hasRoom(0))
    turns.begin(piece, 'one', 0)
  }
  assert.equal(turns.hasRoom(10), false)
  assert.equal(turns.isTaken(3, 'two', 10), true)
  assert.equal(turns.isTaken(3, 'one', 10), false, 'its own turn')
  turns.moved(3, 'one', 100, 256, 20)
  assert.ok(turns.has(3, 'one'))
  turns.moved(3, 'one', 156, 256, 30)
  assert.equal(turns.has(3, 'one'), false, 'all of it was sent')
  assert.ok(turns.hasRoom(30))
  turns.begin(8, 'two', 30)
  turns.leave('one')
  assert.ok(turns.hasRoom(30))
  assert.ok(turns.has(8, 'two'))
})

test('what takes twice as long as usual keeps nobody waiting', () => {
  const turns = new Turns<string>(() => 8)
  for (let i = 0; i < 100; i++) {
    turns.begin(i, 'quick', 100 * i)
    turns.end(i, 100 * i + 100)
  }
  assert.ok(turns.usualMs > 99 && turns.usualMs < 110, `${turns.usualMs} ms`)
  for (let piece = 0; piece < 8; piece++) turns.begin(piece, 'slow', 20_000)
  assert.equal(turns.hasRoom(20_190), false)
  assert.equal(turns.hasRoom(20_250), true)
  assert.equal(turns.isTaken(0, 'quick', 20_250), false)
  turns.begin(0, 'quick', 20_250)
  turns.end(0, 20_260, 'slow')
  assert.ok(turns.has(0, 'quick'), 'what the slow one has at last is not its turn')
})

function atOnce(of: Turns<string>): number {
  let pieces = 0
  while (pieces < 100 && of.hasRoom(0)) of.begin(pieces++, 'one', 0)
  return pieces
}

test('eight pieces at once from afar, and no more than two to afar; five each way within the rack', () => {
  const turns = new AllTurns<string>()
  turns.neighbours = 7
  assert.equal(atOnce(turns.at(1).coming), 8)
  assert.equal(atOnce(turns.at(255).going), 2)
  assert.equal(atOnce(turns.at(0).coming), atOnceMax)
  assert.equal(atOnce(turns.at(0).going), atOnceMax)
})

test('who has no neighbour, or few, sends as many to afar as it fetches there', () => {
  for (const [neighbours, coming, going] of [
    [0, 5, 5],
    [1, 3, 3],
    [2, 8, 2],
    [3, 8, 2],
  ] as const) {
    const turns = new AllTurns<string>()
    turns.neighbours = neighbours
    assert.equal(atOnce(turns.at(1).coming), coming, `from afar, with ${neighbours}`)
    assert.equal(atOnce(turns.at(0).going), atOnceMax)
    assert.equal(atOnce(turns.at(1).going), going, `to afar, with ${neighbours}`)
  }
})

test('who sends much within its rack sends less to afar', () => {
  const turns = new AllTurns<string>()
  turns.neighbours = 7
  const near = turns.at(0).going
  const far = turns.at(1).going
  for (let piece = 0; piece < 4; piece++) near.begin(piece, 'one', 0)
  assert.ok(far.hasRoom(0))
  far.begin(10, 'two', 0)
  assert.equal(far.hasRoom(0), false)
  near.end(0, 1)
  assert.ok(far.hasRoom(1))
})

test('who found no room is named once there is some, longest ago first, unless it has got a turn or has left', () => {
  const turns = new Turns<string>(() => 1)
  turns.begin(0, 'one', 0)
  for (const peer of ['two', 'three', 'four', 'five', 'two']) turns.wait(peer)
  assert.equal(turns.nextWaiting(1), undefined)
  turns.leave('three')
  turns.end(0, 2)
  assert.equal(turns.nextWaiting(3), 'two')
  turns.begin(1, 'four', 4)
  turns.end(1, 5)
  assert.equal(turns.nextWaiting(6), 'five')
  assert.equal(turns.nextWaiting(7), undefined)
})

const step = fc.record({
  act: fc.constantFrom('begin', 'begin', 'begin', 'end', 'drop', 'leave', 'pass'),
  piece: fc.nat(20),
  peer: fc.nat(3),
  ms: fc.nat(1500),
})

test('there is room where fewer than may be at once have taken no longer than twice the usual, whatever happened before', () => {
  fc.assert(
    fc.property(
      fc.integer({ min: 1, max: 8 }),
      fc.array(step, { maxLength: 100, size: 'max' }),
      (max, steps) => {
        const turns = new Turns<number>(() => max)
        const model = new Map<number, { peer: number; sinceMs: number }>()
        let nowMs = 0
        for (const { act, piece, peer, ms } of steps) {
          if (act === 'pass') nowMs += ms
          else if (act === 'begin') {
            turns.begin(piece, peer, nowMs)
            if (model.get(piece)?.peer !== peer) model.set(piece, { peer, sinceMs: nowMs })
          } else if (act === 'end') {
            turns.end(piece, nowMs)
            model.delete(piece)
          } else if (act === 'drop') {
            turns.drop(piece)
            model.delete(piece)
          } else {
            turns.leave(peer)
            for (const [each, turn] of model) if (turn.peer === peer) model.delete(each)
          }
          const usual = [...model.values()].filter(({ sinceMs }) => nowMs - sinceMs < 2 * turns.usualMs)
          assert.equal(turns.hasRoom(nowMs), usual.length < max)
          const turn = model.get(piece)
          const isTaken = turn !== undefined && turn.peer !== peer && usual.includes(turn)
          assert.equal(turns.isTaken(piece, peer, nowMs), isTaken)
        }
      },
    ),
    { numRuns: runs },
  )
})
