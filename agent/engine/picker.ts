import type { PieceRange } from './engine.ts'
import type { Block } from './wire.ts'

/** Blocks are counted in these: what every client takes in one request. */
const unitBytes = 16 * 1024
/** So many peers that may still answer in time may be asked for one unit at once. */
const askersMax = 2
/** …and so many with those that are given up: peers that only take requests must not keep an honest one from being asked. */
const allAskersMax = 8
/** What a source that gives whole pieces may take for one. */
const wholeMs = 10_000
/** Until whoever asks says when it is due. */
const dueUnknown = Number.MAX_VALUE
/** How long a claim of a neighbour counts: by then the piece is there, or its host is stuck. */
const claimMs = 5_000

const Unit = { free: 0, asked: 1, here: 2 } as const

/** What the picker knows of a peer; made with `join`. */
export interface PickerPeer {
  /** 1 for each piece that it has. */
  readonly has: Uint8Array
  /** How many that are. */
  count: number
  /** Of the own rack. */
  readonly near: boolean
}

/** A request under way. */
export interface Ask extends Block {
  peer: PickerPeer
  askedMs: number
  /** When its last byte should be here, on the picker's clock; Infinity once it is given up. */
  dueMs: number
  /** Its first bytes have come. */
  isArriving?: boolean
}

interface Begun {
  readonly piece: number
  readonly units: Uint8Array
  /** Requests for each unit that are under way. */
  readonly askers: Uint8Array
  readonly asks: Set<Ask>
  free: number
  left: number
  /** Who was asked first: a piece of one sender shows who lies, and is whole soon. */
  owner: PickerPeer | undefined
}

export interface PickOptions {
  readonly peer: PickerPeer
  /** The longest block that the peer gives. */
  readonly bytesMax: number
  /** Whether another piece may be begun: there is memory for it. */
  readonly mayBegin: boolean
  /** A far peer is asked for whatever is missing, also for what near ones have: this rack stands still. */
  readonly anything: boolean
  readonly nowMs: number
}

/**
 * Which block to ask a peer for. Pure: its clock and its chance come from outside.
 *
 * A piece that was begun with the peer, else the rarest that it has (BEP 3), ties at random, else one that another peer was
 * asked first. A far peer is asked only for what no near peer has, or has claimed to be fetching. Where nothing is free any more,
 * a block that its peer is late with is asked for a second time.
 */
export class Picker {
  readonly #pieceLength: number
  readonly #length: number
  readonly #random: () => number
  /** Pieces that are neither here nor begun, in no order, and where each stands in the list. */
  readonly #missing: Int32Array
  readonly #positions: Int32Array
  #missingCount: number
  /** How many peers have each piece; how many of the own rack. */
  readonly #copies: Uint16Array
  readonly #nearCopies: Uint16Array
  readonly #claimedUntil: Float64Array
  readonly #begun = new Map<number, Begun>()
  readonly #peers = new Set<PickerPeer>()
  /** Stands for the source that gives whole pieces; nobody waits for what it lacks. */
  readonly #origin: PickerPeer
  readonly #pieceCount: number

  constructor(options: {
    readonly pieceCount: number
    readonly pieceLength: number
    readonly length: number
    readonly random: () => number
  }) {
    const { pieceCount } = options
    this.#pieceLength = options.pieceLength
    this.#length = options.length
    this.#random = options.random
    this.#missing = shuffled(pieceCount, options.random)
    this.#positions = new Int32Array(pieceCount)
    for (const [position, piece] of this.#missing.entries()) this.#positions[piece] = position
    this.#missingCount = pieceCount
    this.#origin = { has: new Uint8Array(0), count: 0, near: true }
    this.#copies = new Uint16Array(pieceCount)
    this.#nearCopies = new Uint16Array(pieceCount)
    this.#claimedUntil = new Float64Array(pieceCount)
    this.#pieceCount = pieceCount
  }

  /** Pieces that are neither here nor begun. */
  get untouched(): number {
    return this.#missingCount
  }

  /** Neither here nor begun. */
  isUntouched(piece: number): boolean {
    return this.#isMissing(piece)
  }

  join(near: boolean): PickerPeer {
    const peer = { has: new Uint8Array(this.#pieceCount), count: 0, near }
    this.#peers.add(peer)
    return peer
  }

  leave(peer: PickerPeer): void {
    if (!this.#peers.delete(peer)) return
    for (let piece = 0; piece < peer.has.length; piece++)
      if (peer.has[piece] === 1) this.#count(peer, piece, -1)
    for (const begun of this.#begun.values()) if (begun.owner === peer) begun.owner = undefined
  }

  /** The peer has a piece; once more does nothing. */
  gains(peer: PickerPeer, piece: number): void {
    if (peer.has[piece] === 1) return
    peer.has[piece] = 1
    peer.count++
    this.#count(peer, piece, 1)
  }

  /** A peer of the own rack fetches a piece from afar. */
  claimed(piece: number, nowMs: number): void {
    this.#claimedUntil[piece] = nowMs + claimMs
  }

  /** Whether the peer has a piece that is not here. */
  interests(peer: PickerPeer): boolean {
    if (peer.count === 0) return false
    for (const { piece } of this.#begun.values()) if (peer.has[piece] === 1) return true
    for (let i = 0; i < this.#missingCount; i++) if (peer.has[this.#missing[i] ?? 0] === 1) return true
    return false
  }

  pieceSize(piece: number): number {
    return Math.min(this.#pieceLength, this.#length - piece * this.#pieceLength)
  }

  /** The block to ask for next; undefined where the peer has nothing that may be asked of it now. */
  next(options: PickOptions): Ask | undefined {
    const { peer } = options
    const choosy = !peer.near && !options.anything
    let other: Begun | undefined
    for (const begun of this.#begun.values()) {
      if (begun.free === 0 || peer.has[begun.piece] !== 1) continue
      if (begun.owner === peer) return this.#ask(begun, options)
      if (choosy && (this.#nearCopies[begun.piece] ?? 0) > 0) continue
      if (begun.owner === undefined || other === undefined) other = begun
    }
    if (other && (other.owner === undefined || !options.mayBegin)) return this.#ask(other, options)
    if (options.mayBegin) {
      const piece = this.#rarest(options)
      if (piece >= 0) return this.#ask(this.#begin(piece, peer), options)
    }
    return other && this.#ask(other, options)
  }

  /**
   * A block that is late with its peer, from a peer that would bring it sooner: `readyMs` is when.
   * Undefined where there is none.
   */
  hedge(options: PickOptions, readyMs: number): Ask | undefined {
    const { peer } = options
    let latest: Ask | undefined
    for (const begun of this.#begun.values()) {
      if (peer.has[begun.piece] !== 1) continue
      for (const ask of begun.asks) {
        if (ask.peer === peer || ask.length > options.bytesMax || ask.dueMs <= readyMs) continue
        if (latest !== undefined && ask.dueMs <= latest.dueMs) continue
        // The rest of it will be here before another could send all of it, unless it has stopped.
        if (ask.isArriving === true && ask.dueMs < Infinity) continue
        if (this.#mayHedge(begun, ask, peer)) latest = ask
      }
    }
    const begun = latest && this.#begun.get(latest.piece)
    return begun && latest && this.#enter(begun, { ...latest, peer, dueMs: dueUnknown, isArriving: false })
  }

  #begin(piece: number, owner: PickerPeer): Begun {
    this.#removeMissing(piece)
    const units = Math.ceil(this.pieceSize(piece) / unitBytes)
    const begun = {
      piece,
      units: new Uint8Array(units),
      askers: new Uint8Array(units),
      asks: new Set<Ask>(),
      free: units,
      left: units,
      owner,
    }
    this.#begun.set(piece, begun)
    return begun
  }

  /** Begins a piece with a source that is asked for all of it. */
  takeWhole(piece: number, nowMs: number): Ask {
    const length = this.pieceSize(piece)
    return this.#enter(this.#begin(piece, this.#origin), {
      piece,
      offset: 0,
      length,
      peer: this.#origin,
      askedMs: nowMs,
      dueMs: nowMs + wholeMs,
    })
  }

  /**
   * A run of untouched pieces for a source that is asked for many bytes at once, from a random start: of those that no peer has
   * and no neighbour has claimed, or with `anything` of all.
   */
  untouchedRun(options: {
    /** Of these alone, from the first on. Default: of all. */
    readonly within?: PieceRange | undefined
    readonly piecesMax: number
    readonly anything: boolean
    readonly nowMs: number
  }): { readonly first: number; readonly count: number } | undefined {
    const { piecesMax, anything, nowMs, within } = options
    const begin = within?.firstPiece ?? 0
    const end = Math.min(this.#pieceCount, begin + (within?.pieceCount ?? this.#pieceCount))
    const isWanted = (piece: number) =>
      piece < end &&
      this.#isMissing(piece) &&
      (anything || (this.#copies[piece] === 0 && (this.#claimedUntil[piece] ?? 0) <= nowMs))
    const runFrom = (first: number) => {
      let count = 1
      while (count < piecesMax && isWanted(first + count)) count++
      return { first, count }
    }
    if (within) {
      // Nobody else was given these: no need for chance.
      for (let piece = begin; piece < end; piece++) if (isWanted(piece)) return runFrom(piece)
      return undefined
    }
    const start = Math.floor(this.#random() * this.#missingCount)
    for (let i = 0; i < this.#missingCount; i++) {
      const piece = this.#missing[(start + i) % this.#missingCount] ?? 0
      if (isWanted(piece)) return runFrom(piece)
    }
    return undefined
  }

  /** A block has come. @returns the requests for it that others were asked for too, and whether the piece is whole */
  received(ask: Ask): { readonly whole: boolean; readonly surplus: readonly Ask[] } {
    const begun = this.#begun.get(ask.piece)
    if (!begun) return { whole: false, surplus: [] }
    this.#withdraw(begun, ask)
    let fresh = 0
    for (let unit = firstUnit(ask); unit < endUnit(ask); unit++) {
      if (begun.units[unit] === Unit.here) continue
      if (begun.units[unit] === Unit.free) begun.free--
      begun.units[unit] = Unit.here
      fresh++
    }
    begun.left -= fresh
    const surplus = [...begun.asks].filter((other) => overlaps(other, ask) && this.#isHere(begun, other))
    return { whole: fresh > 0 && begun.left === 0, surplus }
  }

  /** Whether all of a block is here already. */
  isHere(ask: Ask): boolean {
    const begun = this.#begun.get(ask.piece)
    return begun === undefined || this.#isHere(begun, ask)
  }

  /** A block will not come: others may be asked for it. */
  release(ask: Ask): void {
    const begun = this.#begun.get(ask.piece)
    if (begun) this.#withdraw(begun, ask)
  }

  /** The piece is verified and on disk. */
  done(piece: number): void {
    if (this.#isMissing(piece)) this.#removeMissing(piece)
    this.#begun.delete(piece)
  }

  /** The piece was wrong, or was given back: it is missing again. */
  forget(piece: number): void {
    if (!this.#begun.delete(piece)) return
    this.#missing[this.#missingCount] = piece
    this.#positions[piece] = this.#missingCount++
  }

  #count(peer: PickerPeer, piece: number, by: number): void {
    this.#copies[piece] = (this.#copies[piece] ?? 0) + by
    if (peer.near) this.#nearCopies[piece] = (this.#nearCopies[piece] ?? 0) + by
  }

  /** Of the untouched pieces that the peer has and may be asked for, one that the fewest peers have; -1 where there is none. */
  #rarest({ peer, anything, nowMs }: PickOptions): number {
    const choosy = !peer.near && !anything
    if (this.#isAlone()) return this.#nextInOrder(peer, choosy, nowMs)
    let rarest = -1
    let copies = Infinity
    // The list is in no order, and each look begins elsewhere: ties fall at random, another way on each host.
    const start = Math.floor(this.#random() * this.#missingCount)
    for (let i = 0; i < this.#missingCount && copies > 1; i++) {
      const piece = this.#missing[(start + i) % this.#missingCount] ?? 0
      if (peer.has[piece] !== 1) continue
      const known = this.#copies[piece] ?? 0
      if (known >= copies || (choosy && !this.#isForFar(piece, nowMs))) continue
      rarest = piece
      copies = known
    }
    return rarest
  }

  /** Nobody is there who lacks anything: what order is best for others does not matter. */
  #isAlone(): boolean {
    for (const peer of this.#peers) if (peer.count < peer.has.length) return false
    return true
  }

  #nextInOrder(peer: PickerPeer, choosy: boolean, nowMs: number): number {
    let lowest = -1
    for (let i = 0; i < this.#missingCount; i++) {
      const piece = this.#missing[i] ?? 0
      if (lowest >= 0 && piece > lowest) continue
      if (peer.has[piece] === 1 && (!choosy || this.#isForFar(piece, nowMs))) lowest = piece
    }
    return lowest
  }

  #isForFar(piece: number, nowMs: number): boolean {
    return this.#nearCopies[piece] === 0 && (this.#claimedUntil[piece] ?? 0) <= nowMs
  }

  #ask(begun: Begun, { peer, bytesMax }: PickOptions): Ask {
    begun.owner ??= peer
    const first = begun.units.indexOf(Unit.free)
    let end = first + 1
    const unitsMax = Math.max(1, Math.floor(bytesMax / unitBytes))
    while (end < begun.units.length && end - first < unitsMax && begun.units[end] === Unit.free) end++
    const offset = first * unitBytes
    return this.#enter(begun, {
      piece: begun.piece,
      offset,
      length: Math.min(end * unitBytes, this.pieceSize(begun.piece)) - offset,
      peer,
      askedMs: 0,
      dueMs: dueUnknown,
    })
  }

  #enter(begun: Begun, ask: Ask): Ask {
    for (let unit = firstUnit(ask); unit < endUnit(ask); unit++) {
      if (begun.units[unit] === Unit.free) {
        begun.units[unit] = Unit.asked
        begun.free--
      }
      begun.askers[unit] = (begun.askers[unit] ?? 0) + 1
    }
    begun.asks.add(ask)
    return ask
  }

  #withdraw(begun: Begun, ask: Ask): void {
    if (!begun.asks.delete(ask)) return
    for (let unit = firstUnit(ask); unit < endUnit(ask); unit++) {
      const askers = (begun.askers[unit] ?? 0) - 1
      begun.askers[unit] = askers
      if (askers === 0 && begun.units[unit] === Unit.asked) {
        begun.units[unit] = Unit.free
        begun.free++
      }
    }
  }

  #mayHedge(begun: Begun, ask: Ask, peer: PickerPeer): boolean {
    let hopeful = 0
    for (const other of begun.asks) {
      if (!overlaps(other, ask)) continue
      if (other.peer === peer) return false
      if (other.dueMs < Infinity) hopeful++
    }
    if (hopeful >= askersMax) return false
    for (let unit = firstUnit(ask); unit < endUnit(ask); unit++)
      if ((begun.askers[unit] ?? 0) >= allAskersMax) return false
    return !this.#isHere(begun, ask)
  }

  #isHere(begun: Begun, ask: Ask): boolean {
    for (let unit = firstUnit(ask); unit < endUnit(ask); unit++)
      if (begun.units[unit] !== Unit.here) return false
    return true
  }

  #isMissing(piece: number): boolean {
    const position = this.#positions[piece]
    return position !== undefined && position < this.#missingCount && this.#missing[position] === piece
  }

  #removeMissing(piece: number): void {
    const position = this.#positions[piece] ?? 0
    const last = this.#missing[--this.#missingCount] ?? 0
    this.#missing[position] = last
    this.#positions[last] = position
    this.#missing[this.#missingCount] = piece
    this.#positions[piece] = this.#missingCount
  }
}

/** 0 … count - 1 in a random order (Fisher and Yates). */
export function shuffled(count: number, random: () => number): Int32Array {
  const pieces = Int32Array.from({ length: count }, (_, piece) => piece)
  for (let i = count - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1))
    const piece = pieces[i] ?? 0
    pieces[i] = pieces[j] ?? 0
    pieces[j] = piece
  }
  return pieces
}

function firstUnit({ offset }: Block): number {
  return offset / unitBytes
}

function endUnit({ offset, length }: Block): number {
  return Math.ceil((offset + length) / unitBytes)
}

function overlaps(one: Block, other: Block): boolean {
  return one.offset < other.offset + other.length && other.offset < one.offset + one.length
}
