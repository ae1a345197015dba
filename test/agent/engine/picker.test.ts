import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { Ask, PickerPeer } from '../../../agent/engine/picker.ts'
import { Picker } from '../../../agent/engine/picker.ts'

const pieceLength = 64 * 1024
const unit = 16 * 1024

function createPicker(pieceCount: number, seed = 1, lastBytes = pieceLength) {
  let state = seed
  const random = () => {
    state = (Math.imul(state, 1_103_515_245) + 12_345) & 0x7fffffff
    return state / 0x80000000
  }
  return new Picker({
    pieceCount,
    pieceLength,
    length: (pieceCount - 1) * pieceLength + lastBytes,
    random,
  })
}

function joinWith(picker: Picker, pieces: Iterable<number>, near = true): PickerPeer {
  const peer = picker.join(near)
  for (const piece of pieces) picker.gains(peer, piece)
  return peer
}

const all = (count: number) => Array.from({ length: count }, (_, piece) => piece)
const free = { bytesMax: unit, mayBegin: true, anything: false, nowMs: 0 }

const step = fc.record({
  act: fc.constantFrom('ask', 'ask', 'ask', 'hedge', 'answer', 'answer', 'release', 'gain', 'leave'),
  who: fc.nat(3),
  which: fc.nat(1000),
  blocks: fc.constantFrom(1, 2, 16),
  mayBegin: fc.boolean(),
})

test('whatever peers do, each block is asked of who has it, and not twice but where it is late', () => {
  fc.assert(
    fc.property(
      fc.integer({ min: 1, max: 12 }),
      fc.nat(),
      fc.array(step, { maxLength: 120 }),
      (count, seed, steps) => {
        const picker = createPicker(count, seed, 5000)
        const peers: PickerPeer[] = [0, 1, 2, 3].map((i) => picker.join(i < 3))
        const asks = new Set<Ask>()
        const done = new Set<number>()
        const here = new Map<number, Set<number>>()
        const unitsOf = ({ offset, length }: Ask) => {
          const units: number[] = []
          for (let at = offset; at < offset + length; at += unit) units.push(at / unit)
          return units
        }
        const check = (ask: Ask, peer: PickerPeer, hedged: boolean) => {
          assert.equal(peer.has[ask.piece], 1, 'the peer has it')
          assert.ok(!done.has(ask.piece), 'it is missing')
          assert.ok(ask.offset + ask.length <= picker.pieceSize(ask.piece))
          for (const number of unitsOf(ask)) {
            const askers = [...asks].filter(
              (other) => other.piece === ask.piece && unitsOf(other).includes(number),
            )
            assert.ok(askers.length <= (hedged ? 1 : 0), 'nobody else was asked, or one who is late')
            assert.ok(askers.every((other) => other.peer !== peer))
            if (!hedged) assert.equal(here.get(ask.piece)?.has(number) ?? false, false)
          }
          asks.add(ask)
        }
        const answer = (ask: Ask) => {
          asks.delete(ask)
          const { whole, surplus } = picker.received(ask)
          const units = here.get(ask.piece) ?? new Set()
          here.set(ask.piece, units)
          for (const number of unitsOf(ask)) units.add(number)
          for (const other of surplus) {
            picker.release(other)
            asks.delete(other)
          }
          const size = Math.ceil(picker.pieceSize(ask.piece) / unit)
          assert.equal(whole, units.size === size && !done.has(ask.piece))
          if (!whole) return
          done.add(ask.piece)
          picker.done(ask.piece)
        }
        for (const { act, who, which, blocks, mayBegin } of steps) {
          const peer = peers[who] ?? picker.join(true)
          const options = { ...free, peer, bytesMax: blocks * unit, mayBegin, anything: true }
          const [any] = [...asks].slice(asks.size === 0 ? 0 : which % asks.size)
          if (act === 'ask') {
            const ask = picker.next(options)
            if (ask) check(ask, peer, false)
          } else if (act === 'hedge') {
            const ask = picker.hedge(options, 0)
            if (ask) check(ask, peer, true)
          } else if (act === 'gain') {
            picker.gains(peer, which % count)
          } else if (act === 'leave') {
            for (const ask of asks) {
              if (ask.peer !== peer) continue
              picker.release(ask)
              asks.delete(ask)
            }
            picker.leave(peer)
            peers[who] = picker.join(who < 3)
          } else if (any && act === 'answer') {
            answer(any)
          } else if (any && act === 'release') {
            picker.release(any)
            asks.delete(any)
          }
        }
        // A seed that answers makes it whole.
        const seeder = joinWith(picker, all(count))
        for (const ask of asks) picker.release(ask)
        asks.clear()
        for (
          let ask = picker.next({ ...free, peer: seeder });
          ask;
          ask = picker.next({ ...free, peer: seeder })
        )
          answer(ask)
        assert.equal(done.size, count)
        assert.equal(picker.untouched, 0)
        assert.equal(picker.interests(seeder), false)
      },
    ),
    { numRuns: 2000 },
  )
})

test('the rarest piece comes first, and among equals each is as likely', () => {
  const count = 8
  const first = new Map<number, number>()
  for (let seed = 1; seed <= 400; seed++) {
    const picker = createPicker(count, seed * 7919)
    const seeder = joinWith(picker, all(count))
    joinWith(picker, [0, 1, 2, 3])
    const piece = picker.next({ ...free, peer: seeder })?.piece ?? -1
    first.set(piece, (first.get(piece) ?? 0) + 1)
  }
  assert.deepEqual([...first.keys()].sort(), [4, 5, 6, 7])
  for (const [piece, times] of first) assert.ok(times > 50, `piece ${piece} came first ${times} times`)
})

test('with seeds alone it goes from front to back', () => {
  const picker = createPicker(4)
  const seeder = joinWith(picker, all(4))
  const asked: number[] = []
  for (let ask = picker.next({ ...free, peer: seeder, bytesMax: pieceLength }); ask;) {
    asked.push(ask.piece)
    ask = picker.next({ ...free, peer: seeder, bytesMax: pieceLength })
  }
  assert.deepEqual(asked, [0, 1, 2, 3])
})

test('a far peer gives what no near one has, nor has claimed, unless the rack stands still', () => {
  const picker = createPicker(4)
  joinWith(picker, [0, 1])
  picker.claimed(2, 0)
  const far = joinWith(picker, all(4), false)
  const asked = (options: { anything?: boolean; nowMs?: number }) => {
    const pieces = new Set<number>()
    const asks: Ask[] = []
    for (;;) {
      const ask = picker.next({ ...free, ...options, peer: far, bytesMax: pieceLength })
      if (!ask) break
      asks.push(ask)
      pieces.add(ask.piece)
    }
    for (const ask of asks) {
      picker.release(ask)
      picker.forget(ask.piece)
    }
    return [...pieces].sort()
  }
  assert.deepEqual(asked({}), [3])
  assert.deepEqual(asked({ nowMs: 60_000 }), [2, 3], 'a claim does not count for ever')
  assert.deepEqual(asked({ anything: true }), [0, 1, 2, 3])
})

test('without memory for another piece only those begun are gone on with', () => {
  const picker = createPicker(2)
  const [one, two] = [joinWith(picker, all(2)), joinWith(picker, all(2))]
  const first = picker.next({ ...free, peer: one })
  const second = picker.next({ ...free, peer: two, mayBegin: false })
  assert.equal(second?.piece, first?.piece)
  assert.notEqual(second?.offset, first?.offset)
})
