import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { Ask, PickOptions, PickerPeer } from '../../../agent/engine/picker.ts'
import { Picker } from '../../../agent/engine/picker.ts'

const runs = Math.ceil(Number(process.env['RACKSWARM_FUZZ_RUNS'] ?? 100_000) / 25)

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

function joinWith(picker: Picker, pieces: Iterable<number>, distance = 0): PickerPeer {
  const peer = picker.join(distance)
  for (const piece of pieces) picker.gains(peer.slot, piece)
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
      fc.array(step, { maxLength: 120, size: 'max' }),
      (count, seed, steps) => {
        const picker = createPicker(count, seed, 5000)
        const peers: PickerPeer[] = [0, 0, 0, 1].map((distance) => picker.join(distance))
        const asks = new Set<Ask>()
        const done = new Set<number>()
        const here = new Map<number, Set<number>>()
        const unitsOf = ({ offset, length }: Ask) => {
          const units: number[] = []
          for (let at = offset; at < offset + length; at += unit) units.push(at / unit)
          return units
        }
        const check = (ask: Ask, peer: PickerPeer, hedged: boolean) => {
          assert.ok(picker.has(peer, ask.piece), 'the peer has it')
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
          const peer = peers[who] ?? picker.join(0)
          const options = { ...free, peer, bytesMax: blocks * unit, mayBegin, anything: true }
          const [any] = [...asks].slice(asks.size === 0 ? 0 : which % asks.size)
          if (act === 'ask') {
            const ask = picker.next(options)
            if (ask) check(ask, peer, false)
          } else if (act === 'hedge') {
            const ask = picker.hedge(options, 0)
            if (ask) check(ask, peer, true)
          } else if (act === 'gain') {
            picker.gains(peer.slot, which % count)
          } else if (act === 'leave') {
            for (const ask of asks) {
              if (ask.peer !== peer) continue
              picker.release(ask)
              asks.delete(ask)
            }
            picker.leave(peer)
            peers[who] = picker.join(who < 3 ? 0 : 1)
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

test('of a hundred peers it knows what each has, also where others went and came between', () => {
  const count = 10
  const picker = createPicker(count)
  const has = (i: number) => all(count).filter((piece) => (i * 7 + piece * 3) % 5 < 2)
  const peers = all(100).map((i) => joinWith(picker, has(i)))
  for (let i = 0; i < 100; i += 3) {
    const gone = peers[i]
    assert.ok(gone)
    picker.leave(gone)
    assert.deepEqual(picker.piecesOf(gone), [])
    peers[i] = joinWith(picker, has(i + 1))
  }
  for (const [i, peer] of peers.entries())
    assert.deepEqual(picker.piecesOf(peer), has(i % 3 === 0 ? i + 1 : i))
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

test('where others have nothing yet, each host fetches another part first', () => {
  const firsts = new Set<number>()
  for (let seed = 1; seed <= 40; seed++) {
    const picker = createPicker(64, seed * 7919)
    const seeder = joinWith(picker, all(64))
    picker.join(0)
    firsts.add(picker.next({ ...free, peer: seeder })?.piece ?? -1)
  }
  assert.ok(firsts.size > 20, `${firsts.size} different pieces of 40`)
})

test('a far peer gives what no near one has, nor has claimed, unless the rack stands still', () => {
  const picker = createPicker(4)
  joinWith(picker, [0, 1])
  const near = joinWith(picker, [])
  picker.claimed(near, 2, 0)
  const far = joinWith(picker, all(4), 1)
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
  picker.claimed(near, 3, 0)
  picker.unclaimed(near, 3)
  assert.deepEqual(asked({}), [3], 'it is not fetching it after all')
  picker.claimed(near, 2, 10_000)
  assert.equal(picker.isAwaited(20_000), true)
  assert.equal(picker.isAwaited(30_000), false)
  picker.claimed(near, 2, 10_000)
  assert.deepEqual(asked({ nowMs: 20_000 }), [3], 'what takes long is claimed again')
  assert.deepEqual(asked({ nowMs: 60_000 }), [2, 3], 'a claim does not count for ever')
  assert.deepEqual(asked({ anything: true }), [0, 1, 2, 3])
})

test('who takes far longer than others for what it claims cannot claim it again', () => {
  const picker = createPicker(42)
  const [quick, slow] = [joinWith(picker, []), joinWith(picker, [])]
  const far = joinWith(picker, [0], 1)
  const isLeftTo = (nowMs: number) => {
    const ask = picker.next({ ...free, peer: far, nowMs })
    if (ask) {
      picker.release(ask)
      picker.forget(ask.piece)
    }
    return ask === undefined
  }
  picker.claimed(slow, 0, 0)
  // Others take a second for each.
  for (let piece = 1; piece < 40; piece++) {
    picker.claimed(quick, piece, 500 * piece)
    if (piece % 8 === 0) picker.claimed(slow, 0, 500 * piece)
    if (piece > 2) picker.gains(quick.slot, piece - 2)
  }
  assert.equal(isLeftTo(20_000), true, 'it was said again at first')
  picker.claimed(slow, 0, 22_000)
  assert.equal(isLeftTo(40_000), false)
  picker.claimed(slow, 0, 40_000)
  assert.equal(isLeftTo(40_000), false)
  picker.unclaimed(slow, 0)
  picker.claimed(slow, 0, 41_000)
  assert.equal(isLeftTo(41_000), true, 'it has begun anew')
})

test('of a peer that is to give no more there is asked what was begun with it, and nothing else', () => {
  const picker = createPicker(2, 2, 4 * unit)
  const [peer, other] = [joinWith(picker, [0, 1]), joinWith(picker, [0, 1])]
  const options = { ...free, bytesMax: unit }
  assert.equal(picker.next({ ...options, peer, begunOnly: true }), undefined)
  const begun = picker.next({ ...options, peer })
  assert.ok(begun)
  assert.equal(picker.isBegunWith(peer), true)
  assert.equal(picker.isBegunWith(other), false)
  assert.equal(picker.next({ ...options, peer: other, begunOnly: true }), undefined)
  const pieces = [1, 2, 3].map(() => picker.next({ ...options, peer, begunOnly: true })?.piece)
  assert.deepEqual(pieces, [begun.piece, begun.piece, begun.piece])
  assert.equal(picker.next({ ...options, peer, begunOnly: true }), undefined)
})

test('what a peer had begun to send before it went is stranded, unless another has it or all of it is here', () => {
  const picker = createPicker(3)
  const [peer, other] = [joinWith(picker, [0, 1, 2]), joinWith(picker, [1])]
  const asks = Array.from({ length: (3 * pieceLength) / unit }, () =>
    picker.next({ ...free, bytesMax: unit, peer }),
  ).flatMap((ask) => ask ?? [])
  const ofPiece = (piece: number) => asks.filter((ask) => ask.piece === piece)
  for (const ask of [...ofPiece(0).slice(0, 1), ...ofPiece(1).slice(0, 1), ...ofPiece(2)])
    picker.received(ask)
  assert.deepEqual(picker.stranded(), [])
  for (const piece of [0, 1]) for (const ask of ofPiece(piece).slice(1)) picker.release(ask)
  assert.deepEqual(picker.stranded(), [], 'it is still there')
  picker.leave(peer)
  assert.deepEqual(picker.stranded(), [0])
  picker.leave(other)
  assert.deepEqual(picker.stranded().sort(), [0, 1])
})

test('where everybody takes long for what is claimed, claims count as long', () => {
  const picker = createPicker(9)
  const slow = joinWith(picker, [])
  const far = joinWith(picker, [8], 1)
  const say = (pieces: readonly number[], fromMs: number, untilMs: number) => {
    for (let nowMs = fromMs; nowMs <= untilMs; nowMs += 5_000)
      for (const piece of pieces) picker.claimed(slow, piece, nowMs)
  }
  say([0, 1, 2, 3, 4, 5, 6, 7], 0, 45_000)
  say([8], 50_000, 100_000)
  assert.equal(picker.next({ ...free, peer: far, nowMs: 100_000 }), undefined)
})

test('of a range of the webseed what others have claimed and nobody has comes last, and elsewhere not at all', () => {
  const picker = createPicker(4)
  joinWith(picker, [0])
  const slow = joinWith(picker, [])
  for (const piece of [1, 2]) picker.claimed(slow, piece, 0)
  const run = (within: boolean) =>
    picker.untouchedRun({
      within: within ? { firstPiece: 0, pieceCount: 4 } : undefined,
      piecesMax: 4,
      anything: false,
      nowMs: 0,
    })
  assert.deepEqual(run(true), { first: 3, count: 1 })
  picker.takeWhole(3, 0)
  assert.equal(run(false), undefined)
  assert.deepEqual(run(true), { first: 1, count: 2 })
})

test('two peers that are given up keep no third from being asked', () => {
  const picker = createPicker(1, 1, unit)
  const [one, two, three, four] = [1, 2, 3, 4].map(() => joinWith(picker, [0]))
  assert.ok(one && two && three && four)
  const first = picker.next({ ...free, peer: one })
  const second = picker.hedge({ ...free, peer: two }, 0)
  assert.ok(first && second)
  assert.equal(picker.hedge({ ...free, peer: three }, 0), undefined, 'two may still answer')
  first.dueMs = second.dueMs = Infinity
  const third = picker.hedge({ ...free, peer: three }, 0)
  assert.ok(third)
  third.dueMs = 1000
  assert.ok(picker.hedge({ ...free, peer: four }, 0), 'one may still answer')
})

test('without memory for another piece only those begun are gone on with', () => {
  const picker = createPicker(2)
  const [one, two] = [joinWith(picker, all(2)), joinWith(picker, all(2))]
  const first = picker.next({ ...free, peer: one })
  const second = picker.next({ ...free, peer: two, mayBegin: false })
  assert.equal(second?.piece, first?.piece)
  assert.notEqual(second?.offset, first?.offset)
})

/** How often each comes. */
const acts = {
  ...{ next: 12, hedge: 6, receive: 5, release: 2, late: 3, takeWhole: 1, forget: 1, wrong: 2, done: 1 },
  ...{ gain: 4, gainAll: 2, join: 1, leave: 1, claim: 2, unclaim: 1, pass: 1 },
}

const modelStep = fc.record({
  act: fc.constantFrom(
    ...Object.entries(acts).flatMap(([act, times]) => Array.from({ length: times }, () => act)),
  ),
  who: fc.nat(100),
  which: fc.nat(1000),
  blocks: fc.constantFrom(1, 2, 3, 16),
  mayBegin: fc.boolean(),
  anything: fc.boolean(),
})

test('it decides as a simple model does, whatever happens', () => {
  fc.assert(
    fc.property(
      fc.record({
        lastBytes: fc.integer({ min: 1, max: pieceLength }),
        seed: fc.nat(),
        // Which of the first four peers have each piece.
        had: fc.array(fc.nat(15), { minLength: 1, maxLength: 10 }),
      }),
      fc.array(modelStep, { maxLength: 150, size: 'max' }),
      ({ lastBytes, seed, had }, steps) => {
        const count = had.length
        const model = new Model(count, lastBytes, seed)
        for (const [i, distance] of [0, 0, 1, 2].entries()) {
          const peer = model.join(distance)
          for (const [piece, bits] of had.entries()) if ((bits & (1 << i)) > 0) model.gain(peer, piece)
        }
        for (const { act, who, which, blocks, mayBegin, anything } of steps) {
          const peer = at(model.peers, who)
          const ask = at(model.asks, which)
          const piece = which % count
          if (act === 'join') model.join(who % 3)
          else if (act === 'pass') model.nowMs += 7500 * (which % 3)
          else if (act === 'done') model.done(piece)
          else if (act === 'wrong' || act === 'forget') model.forget(piece, act === 'wrong')
          else if (ask && act === 'receive') model.receive(ask, mayBegin)
          else if (ask && act === 'release') model.release(ask)
          else if (ask && act === 'late') ask.dueMs = which % 3 === 0 ? Infinity : 10 * who
          else if (peer === undefined) continue
          else if (act === 'gain') model.gain(peer, piece)
          else if (act === 'claim') model.claim(peer, piece)
          else if (act === 'unclaim') model.unclaim(peer, piece)
          else if (act === 'gainAll') model.gainAll(peer, all(count))
          else if (act === 'leave') model.leave(peer)
          else if (act === 'takeWhole') model.takeWhole(1 + (which % 4), anything)
          else {
            const options = {
              peer,
              bytesMax: blocks * unit + (which % 2) * 5000,
              mayBegin,
              anything,
              whole: which % 2 === 0,
              refuses: which % 5 === 0 ? (other: number) => other % 2 === 0 : undefined,
              nowMs: model.nowMs,
            }
            if (act === 'next') model.next(options)
            else model.hedge(options, 5 * which)
          }
          model.agrees()
        }
        model.finish()
      },
    ),
    { numRuns: runs },
  )
})

interface ModelPiece {
  state: 'untouched' | 'begun' | 'done'
  here: Set<number>
  owner: PickerPeer | undefined
}

/** What the picker promises, told with lists that are searched from end to end. */
class Model {
  readonly picker: Picker
  readonly peers: PickerPeer[] = []
  asks: Ask[] = []
  nowMs = 0
  readonly #pieces: ModelPiece[]
  readonly #has = new Map<PickerPeer, Set<number>>()
  /** By peer and piece: when it was said first, and until when it counts. */
  readonly #claims = new Map<
    PickerPeer,
    Map<number, { readonly sinceMs: number; readonly untilMs: number }>
  >()
  /** What each takes too long for. */
  readonly #tooSlow = new Map<PickerPeer, Set<number>>()
  #usualClaimMs = 15_000
  /** The latest that the picker was told. */
  #toldMs = 0

  constructor(count: number, lastBytes: number, seed: number) {
    this.picker = createPicker(count, seed, lastBytes)
    this.#pieces = Array.from({ length: count }, () => untouchedPiece())
  }

  join(distance: number): PickerPeer {
    const peer = this.picker.join(distance)
    this.peers.push(peer)
    this.#has.set(peer, new Set())
    return peer
  }

  leave(peer: PickerPeer): void {
    for (const ask of this.asks.filter((each) => each.peer === peer)) this.release(ask)
    this.picker.leave(peer)
    this.picker.leave(peer)
    this.peers.splice(this.peers.indexOf(peer), 1)
    this.#has.delete(peer)
    this.#claims.delete(peer)
    this.#tooSlow.delete(peer)
    for (const each of this.#pieces) if (each.owner === peer) each.owner = undefined
  }

  gain(peer: PickerPeer, piece: number): void {
    const claim = this.#claims.get(peer)?.get(piece)
    this.picker.gains(peer.slot, piece)
    this.#has.get(peer)?.add(piece)
    this.#claims.get(peer)?.delete(piece)
    if (claim === undefined) return
    const tookMs = Math.min(this.#toldMs - claim.sinceMs, 2 * this.#usualClaimMs)
    this.#usualClaimMs += 0.1 * (tookMs - this.#usualClaimMs)
  }

  gainAll(peer: PickerPeer, pieces: readonly number[]): void {
    this.picker.gainsAll(peer)
    for (const piece of pieces) this.#has.get(peer)?.add(piece)
    this.#claims.get(peer)?.clear()
  }

  claim(peer: PickerPeer, piece: number): void {
    this.picker.claimed(peer, piece, this.nowMs)
    this.#told()
    if (this.#hasPiece(peer, piece) || this.#tooSlow.get(peer)?.has(piece) === true) return
    const claims = this.#claims.get(peer) ?? new Map<number, { sinceMs: number; untilMs: number }>()
    this.#claims.set(peer, claims)
    const known = claims.get(piece)
    if (known && this.#takesTooLong(known)) return
    claims.set(piece, { sinceMs: known?.sinceMs ?? this.nowMs, untilMs: this.nowMs + 15_000 })
  }

  unclaim(peer: PickerPeer, piece: number): void {
    this.picker.unclaimed(peer, piece)
    this.#claims.get(peer)?.delete(piece)
    this.#tooSlow.get(peer)?.delete(piece)
  }

  /** The picker was told how late it is. */
  #told(): void {
    this.#toldMs = this.nowMs
    for (const [peer, claims] of this.#claims) {
      for (const [piece, claim] of claims) {
        if (claim.untilMs > this.nowMs) continue
        claims.delete(piece)
        if (!this.#takesTooLong(claim)) continue
        const tooSlow = this.#tooSlow.get(peer) ?? new Set()
        this.#tooSlow.set(peer, tooSlow.add(piece))
      }
    }
  }

  #takesTooLong({ sinceMs }: { readonly sinceMs: number }): boolean {
    return this.#toldMs - sinceMs > Math.max(2_000, 2 * this.#usualClaimMs)
  }

  next(options: PickOptions): Ask | undefined {
    const { peer, bytesMax, mayBegin } = options
    const begun = this.#numbers('begun').filter(
      (piece) =>
        this.#hasPiece(peer, piece) &&
        this.#freeUnits(piece).length > 0 &&
        (this.#piece(piece).owner === peer || this.#mayJoin(piece, options)),
    )
    const ownersOf = (owner: PickerPeer | undefined) =>
      begun.filter((piece) => this.#piece(piece).owner === owner)
    const toBegin = mayBegin ? this.#mayBegin(options) : []
    // What comes first is asked first.
    const wanted = [ownersOf(peer), ownersOf(undefined), toBegin, begun].find((pieces) => pieces.length > 0)
    const ask = this.picker.next(options)
    this.#told()
    if (wanted === undefined || ask === undefined) {
      assert.equal(ask, undefined, 'there is nothing that may be asked')
      assert.equal(wanted, undefined, 'there is something to ask for')
      return undefined
    }
    assert.ok(wanted.includes(ask.piece), `piece ${ask.piece}, not of ${wanted.join(' ')}`)
    const free = this.#freeUnits(ask.piece)
    const first = free[0] ?? -1
    let units = 1
    while ((units + 1) * unit <= bytesMax && free.includes(first + units)) units++
    assert.equal(ask.offset, first * unit)
    assert.equal(ask.length, Math.min(units * unit, this.picker.pieceSize(ask.piece) - ask.offset))
    const piece = this.#piece(ask.piece)
    piece.state = 'begun'
    piece.owner ??= peer
    this.#enter(ask, peer)
    return ask
  }

  /** Whether a peer may be asked for a part of what was begun with another. */
  #mayJoin(piece: number, { peer, anything, whole, refuses }: PickOptions): boolean {
    if (whole && this.#piece(piece).owner !== undefined && this.#numbers('untouched').length > 0) return false
    return refuses?.(piece) !== true && (anything || this.#copiesNearerThan(peer, piece) === 0)
  }

  hedge(options: PickOptions, readyMs: number): void {
    const { peer, bytesMax } = options
    const late = this.asks.filter(
      (ask) =>
        this.#hasPiece(peer, ask.piece) &&
        options.refuses?.(ask.piece) !== true &&
        this.#piece(ask.piece).state === 'begun' &&
        ask.length <= bytesMax &&
        ask.dueMs > readyMs &&
        unitsOf(ask).every((number) => {
          const askers = this.#askers(ask.piece, number)
          return askers.length < 8 && askers.every((other) => other.peer !== peer)
        }) &&
        this.#hopeful(ask) < 2 &&
        !unitsOf(ask).every((number) => this.#piece(ask.piece).here.has(number)),
    )
    const ask = this.picker.hedge(options, readyMs)
    assert.equal(ask === undefined, late.length === 0)
    if (ask === undefined) return
    const latest = Math.max(...late.map(({ dueMs }) => dueMs))
    assert.ok(late.some((other) => other.dueMs === latest && isSame(other, ask)))
    assert.ok(!this.asks.includes(ask))
    this.#enter(ask, peer)
  }

  takeWhole(piecesMax: number, anything: boolean): void {
    const untouched = this.#numbers('untouched')
    const nobodys = untouched.filter(
      (piece) => this.#copies(piece) === 0 && !this.#isClaimed(piece, Infinity, this.nowMs),
    )
    const wanted = anything && nobodys.length === 0 ? untouched : nobodys
    const run = this.picker.untouchedRun({ piecesMax, anything, nowMs: this.nowMs })
    this.#told()
    assert.equal(run === undefined, wanted.length === 0)
    if (run === undefined) return
    assert.ok(run.count >= 1 && run.count <= piecesMax)
    assert.ok(run.count === piecesMax || !wanted.includes(run.first + run.count))
    for (let piece = run.first; piece < run.first + run.count; piece++) {
      assert.ok(wanted.includes(piece))
      const ask = this.picker.takeWhole(piece, this.nowMs)
      assert.deepEqual([ask.piece, ask.offset, ask.length], [piece, 0, this.picker.pieceSize(piece)])
      this.#pieces[piece] = { state: 'begun', here: new Set(), owner: ask.peer }
      this.#enter(ask, ask.peer)
    }
  }

  /** Others that were asked too are withdrawn, or answer later. */
  receive(ask: Ask, withdraw: boolean): void {
    this.#drop(ask)
    const piece = this.#piece(ask.piece)
    const before = piece.here.size
    const { whole, surplus } = this.picker.received(ask)
    if (piece.state === 'done') {
      assert.deepEqual([whole, surplus], [false, []])
      return
    }
    for (const number of unitsOf(ask)) piece.here.add(number)
    assert.equal(whole, piece.here.size > before && piece.here.size === this.#unitCount(ask.piece))
    const needless = this.asks.filter(
      (other) => other.piece === ask.piece && unitsOf(other).some((number) => unitsOf(ask).includes(number)),
    )
    assert.deepEqual(new Set(surplus), new Set(needless))
    assert.ok(this.picker.isHere(ask))
    if (withdraw) for (const other of surplus) this.release(other)
  }

  release(ask: Ask): void {
    this.picker.release(ask)
    // Once more does nothing.
    this.picker.release(ask)
    const isKnown = this.asks.includes(ask)
    this.#drop(ask)
    const piece = this.#piece(ask.piece)
    const isLast = !this.asks.some((other) => other.piece === ask.piece && other.peer === ask.peer)
    if (isKnown && isLast && piece.owner === ask.peer) piece.owner = undefined
  }

  done(number: number): void {
    const piece = this.#piece(number)
    // What is checked on disk is untouched; what came is whole.
    if (piece.state === 'begun' && piece.here.size < this.#unitCount(number)) return
    this.picker.done(number)
    piece.state = 'done'
  }

  /** A piece that came wrong, or one that its only source gives back. */
  forget(number: number, wrong: boolean): void {
    const piece = this.#piece(number)
    if (piece.state === 'begun') {
      if (wrong && piece.here.size < this.#unitCount(number)) return
      for (const ask of this.asks.filter((each) => each.piece === number)) this.release(ask)
      this.#pieces[number] = untouchedPiece()
    }
    this.picker.forget(number)
  }

  /** What can be asked of the picker is as it should be. */
  agrees(): void {
    assert.equal(this.picker.untouched, this.#numbers('untouched').length)
    for (const peer of this.peers) {
      const has = this.#has.get(peer) ?? new Set()
      assert.equal(this.picker.countOf(peer), has.size)
      assert.equal(
        this.picker.interests(peer),
        [...has].some((piece) => this.#piece(piece).state !== 'done'),
      )
    }
    for (const ask of this.asks) {
      const { state, here } = this.#piece(ask.piece)
      assert.equal(this.picker.isHere(ask), state === 'done' || unitsOf(ask).every((each) => here.has(each)))
    }
  }

  /** Once somebody has everything and all that is asked is answered, every piece becomes whole, and none twice. */
  finish(): void {
    const seeder = this.join(0)
    for (const piece of all(this.#pieces.length)) this.gain(seeder, piece)
    const options = { peer: seeder, bytesMax: 2 * unit, mayBegin: true, anything: false, nowMs: this.nowMs }
    const asksMax = this.asks.length + this.#pieces.length * 4
    for (let asked = 0; this.next(options); asked++) assert.ok(asked < asksMax)
    for (let ask = this.asks[0]; ask; ask = this.asks[0]) this.receive(ask, false)
    for (const [number, { state, here }] of this.#pieces.entries()) {
      if (state !== 'done') assert.equal(here.size, this.#unitCount(number))
      this.done(number)
    }
    this.agrees()
    assert.equal(this.picker.interests(seeder), false)
    assert.equal(this.picker.next(options), undefined)
  }

  #mayBegin({ peer, anything, refuses, nowMs }: PickOptions): number[] {
    const allowed = this.#numbers('untouched').filter((piece) => {
      if (!this.#hasPiece(peer, piece) || refuses?.(piece) === true) return false
      const served = this.#copiesNearerThan(peer, piece) > 0 || this.#isClaimed(piece, peer.distance, nowMs)
      return anything || !served
    })
    const counts = this.peers.map((each) => this.#has.get(each)?.size ?? 0)
    // With seeds alone the order is that of the file.
    if (counts.every((each) => each === this.#pieces.length)) return allowed.slice(0, 1)
    const rarest = Math.min(...allowed.map((piece) => this.#rarity(piece)))
    return allowed.filter((piece) => this.#rarity(piece) === rarest)
  }

  /** What nobody of the rack has comes first, by how many have it, then the others, by how many of the rack have them. */
  #rarity(piece: number): number {
    const near = this.peers.filter((peer) => peer.distance === 0 && this.#hasPiece(peer, piece)).length
    return near > 0 ? 1000 + near : this.#copies(piece)
  }

  #isClaimed(piece: number, nearerThan: number, nowMs: number): boolean {
    return [...this.#claims].some(
      ([{ distance }, claims]) => distance < nearerThan && nowMs < (claims.get(piece)?.untilMs ?? -Infinity),
    )
  }

  #enter(ask: Ask, peer: PickerPeer): void {
    assert.equal(ask.peer, peer)
    assert.ok(this.#hasPiece(peer, ask.piece) || ask.length === this.picker.pieceSize(ask.piece))
    this.asks.push(ask)
    for (const number of unitsOf(ask)) assert.ok(this.#askers(ask.piece, number).length <= 8)
  }

  #drop(ask: Ask): void {
    this.asks = this.asks.filter((other) => other !== ask)
  }

  #piece(number: number): ModelPiece {
    const piece = this.#pieces[number]
    assert.ok(piece)
    return piece
  }

  #numbers(state: ModelPiece['state']): number[] {
    return all(this.#pieces.length).filter((piece) => this.#piece(piece).state === state)
  }

  #hasPiece(peer: PickerPeer, piece: number): boolean {
    return this.#has.get(peer)?.has(piece) ?? false
  }

  #copies(piece: number): number {
    return this.peers.filter((peer) => this.#hasPiece(peer, piece)).length
  }

  #copiesNearerThan({ distance }: PickerPeer, piece: number): number {
    return this.peers.filter((other) => other.distance < distance && this.#hasPiece(other, piece)).length
  }

  #hopeful(ask: Ask): number {
    return this.asks.filter(
      (other) =>
        other.piece === ask.piece &&
        other.dueMs < Infinity &&
        unitsOf(other).some((number) => unitsOf(ask).includes(number)),
    ).length
  }

  #askers(piece: number, number: number): Ask[] {
    return this.asks.filter((ask) => ask.piece === piece && unitsOf(ask).includes(number))
  }

  #unitCount(piece: number): number {
    return Math.ceil(this.picker.pieceSize(piece) / unit)
  }

  #freeUnits(piece: number): number[] {
    return all(this.#unitCount(piece)).filter(
      (number) => !this.#piece(piece).here.has(number) && this.#askers(piece, number).length === 0,
    )
  }
}

function untouchedPiece(): ModelPiece {
  return { state: 'untouched', here: new Set(), owner: undefined }
}

function unitsOf({ offset, length }: Ask): number[] {
  return all(Math.ceil(length / unit)).map((i) => offset / unit + i)
}

function isSame(one: Ask, other: Ask): boolean {
  return one.piece === other.piece && one.offset === other.offset && one.length === other.length
}

function at<Item>(items: readonly Item[], number: number): Item | undefined {
  return items.length === 0 ? undefined : items[number % items.length]
}
