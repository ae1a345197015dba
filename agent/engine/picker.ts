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
/** How long a claim of a neighbour counts, unless it is said again: by then the piece is there, or its host is stuck. */
const claimMs = 15_000
/** What takes longer than so many times what claims usually take cannot be claimed again: its host is on a slow link. */
const claimPatience = 2
const claimPatienceMinMs = 2_000
/** …of which nothing is known before the first of them has ended. */
const usualClaimFirstMs = 15_000
const usualClaimWeight = 0.1
/** So many claims that are over are kept until they are dropped together. */
const claimsDroppedMax = 64
/** Distances that are told apart; what is farther counts as this far. */
const distanceMax = 3
/**
 * Pieces are sorted by how rare they are: first those that nobody of the rack has, by how many peers have them, then the others by how many of the
 * rack do. What more have than this counts as equally common.
 */
const farCopiesMax = 15
const nearCopiesMax = 48
const raritiesMax = farCopiesMax + nearCopiesMax

/** What is known of a piece stands side by side, so that news of it touches little memory: words of its record. */
const Word = {
  /** Where it stands in the list of the missing. */
  position: 0,
  /** How many peers have it; -1 once it is here: then nobody counts any more. */
  copies: 1,
  /** For each distance how many of the peers there have it, and, times `claimUnit`, how many say that they are fetching it. */
  there: 2,
  /** Who has it: a bit for each peer, in as many words as that takes. */
  holders: 2 + distanceMax + 1,
} as const
const claimUnit = 0x1_0000
const copiesMask = claimUnit - 1

/** …and of a peer, by its slot. */
const SlotWord = {
  /** How far it is. */
  distance: 0,
  /** How many pieces it has. */
  count: 1,
  /** At which of the picker's changes it had nothing that could be begun with it; -1 since it gained something. */
  barrenAt: 2,
} as const
const slotWords = 4

const Unit = { free: 0, asked: 1, here: 2 } as const

/** Stands for a peer; made with `join`. */
export interface PickerPeer {
  /** Its bit among those who have a piece: small numbers, used again; -1 once it is gone. */
  slot: number
  /** 0 the own rack, 1 the next level …, `distanceMax` at most. */
  readonly distance: number
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
  piece: number
  /** As many are used as the piece has. */
  readonly units: Uint8Array
  /** Requests for each unit that are under way. */
  readonly askers: Uint8Array
  unitCount: number
  readonly asks: Ask[]
  free: number
  left: number
  /** Who was asked first: a piece of one sender shows who lies, and is whole soon. */
  owner: PickerPeer | undefined
}

interface Claimed {
  readonly peer: PickerPeer
  readonly piece: number
  /** When it was said first. */
  readonly sinceMs: number
  readonly untilMs: number
}

export interface PickOptions {
  readonly peer: PickerPeer
  /** The longest block that the peer gives. */
  readonly bytesMax: number
  /** Whether another piece may be begun: there is memory for it. */
  readonly mayBegin: boolean
  /** Only what was begun with the peer. */
  readonly begunOnly?: boolean
  /** The peer sends whole pieces: while there are others, it is not asked for a part of what another was asked for first. */
  readonly whole?: boolean
  /** A far peer is asked for whatever is missing, also for what near ones have: this rack stands still. */
  readonly anything: boolean
  /** Pieces that the peer would not give now; what was begun with it is asked of it all the same. */
  readonly refuses?: ((piece: number) => boolean) | undefined
  readonly nowMs: number
}

/**
 * Which block to ask a peer for. Pure: its clock and its chance come from outside.
 *
 * A piece that was begun with the peer, else one that nobody goes on with, else the rarest that it has (BEP 3), ties at random, else one that
 * another peer was asked first. A far peer is asked only for what no near peer has, or has claimed to be fetching. Where nothing is free any more,
 * a block that its peer is late with is asked for a second time.
 */
export class Picker {
  readonly #pieceLength: number
  readonly #length: number
  readonly #random: () => number
  /** First the pieces that are neither here nor begun, sorted by rarity, then all others. */
  readonly #missing: Int32Array
  /** Where in the list those of each rarity end. */
  readonly #ends: Int32Array = new Int32Array(raritiesMax + 1)
  /** Of each piece one after the other: see `Word`. */
  #records: Int32Array
  #recordWords = Word.holders + 2
  readonly #freeSlots: number[] = []
  #slotCount = 0
  /** A bit for each peer that has everything. */
  #full = new Int32Array(2)
  /** Of each slot one after the other: see `SlotWord`. */
  #slots = new Int32Array(slotWords * 64)
  /** By slot: what the peer has said that it is fetching, and does not have yet. */
  readonly #claimsAt: (Map<number, Claimed> | undefined)[] = []
  /** …and what it takes too long for, which does not count. */
  readonly #tooSlowAt: (Set<number> | undefined)[] = []
  /** Claims that count, those that are over first in front, from `#claimAt` on, and some that were said again or ended. */
  #claims: Claimed[] = []
  #claimAt = 0
  /** When the first may be over. */
  #claimsFromMs = Infinity
  #usualClaimMs = usualClaimFirstMs
  /** The latest that it was told. */
  #nowMs = 0
  /** How many claims peers of the rack have. */
  #nearClaims = 0
  readonly #begun = new Map<number, Begun>()
  /** Those of them of which something is asked of nobody. */
  readonly #open = new Set<Begun>()
  /** Tables of pieces that were begun once, to be used again. */
  readonly #spare: Begun[] = []
  readonly #peers = new Set<PickerPeer>()
  /** Peers that lack something. */
  #partial = 0
  /** How often pieces became free for peers that could not be asked for them before. */
  #changes = 0
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
    this.#ends.fill(pieceCount)
    this.#origin = { slot: -1, distance: 0 }
    this.#records = new Int32Array(pieceCount * this.#recordWords)
    this.#pieceCount = pieceCount
    for (const [position, piece] of this.#missing.entries())
      this.#records[piece * this.#recordWords + Word.position] = position
  }

  /** Pieces that are neither here nor begun. */
  get untouched(): number {
    return this.#ends[raritiesMax] ?? 0
  }

  /** Something of a piece that was begun is asked of nobody. */
  get hasFree(): boolean {
    return this.#open.size > 0
  }

  /** @param distance as the tracker counts: 0 the own rack, 255 unknown */
  join(distance: number): PickerPeer {
    const peer = { slot: this.#takeSlot(), distance: Math.min(distance, distanceMax) }
    const at = peer.slot * slotWords
    this.#slots[at + SlotWord.distance] = peer.distance
    this.#slots[at + SlotWord.count] = 0
    this.#slots[at + SlotWord.barrenAt] = -1
    this.#peers.add(peer)
    this.#partial++
    return peer
  }

  leave(peer: PickerPeer): void {
    if (!this.#peers.delete(peer)) return
    const { slot, distance } = peer
    if (this.countOf(peer) < this.#pieceCount) this.#partial--
    this.#changes++
    const claims = this.#claimsAt[slot]
    if (claims) for (const piece of claims.keys()) this.#unclaim(slot, piece)
    this.#tooSlowAt[slot] = undefined
    const bit = 1 << (slot & 31)
    const word = slot >> 5
    for (let piece = 0; piece < this.#pieceCount; piece++) {
      const at = piece * this.#recordWords
      const holders = this.#records[at + Word.holders + word] ?? 0
      if ((holders & bit) === 0) continue
      this.#records[at + Word.holders + word] = holders & ~bit
      this.#count(distance, piece, -1)
    }
    this.#full[word] = (this.#full[word] ?? 0) & ~bit
    this.#freeSlots.push(slot)
    peer.slot = -1
    for (const begun of this.#begun.values()) if (begun.owner === peer) begun.owner = undefined
  }

  /** How many pieces the peer has. */
  countOf({ slot }: PickerPeer): number {
    return this.#slots[slot * slotWords + SlotWord.count] ?? 0
  }

  has({ slot }: PickerPeer, piece: number): boolean {
    return slot >= 0 && (this.holders(piece, slot >> 5) & (1 << (slot & 31))) !== 0
  }

  /** Of slots 32 × `word` and on, who has the piece: a bit for each. */
  holders(piece: number, word: number): number {
    return (this.#records[piece * this.#recordWords + Word.holders + word] ?? 0) | (this.#full[word] ?? 0)
  }

  piecesOf(peer: PickerPeer): number[] {
    const pieces: number[] = []
    for (let piece = 0; piece < this.#pieceCount; piece++) if (this.has(peer, piece)) pieces.push(piece)
    return pieces
  }

  #takeSlot(): number {
    const slot = this.#freeSlots.pop() ?? this.#slotCount++
    if (slot * slotWords >= this.#slots.length) this.#addSlots()
    return slot
  }

  #addSlots(): void {
    const slots = (2 * this.#slots.length) / slotWords
    const [words, before] = [this.#recordWords, this.#records]
    this.#recordWords = Word.holders + slots / 32
    this.#records = new Int32Array(this.#pieceCount * this.#recordWords)
    for (let piece = 0; piece < this.#pieceCount; piece++)
      this.#records.set(before.subarray(piece * words, (piece + 1) * words), piece * this.#recordWords)
    this.#full = enlarged(this.#full, slots / 32)
    this.#slots = enlarged(this.#slots, slots * slotWords)
  }

  #isHeld(piece: number): boolean {
    for (let word = 0; 32 * word < this.#slotCount; word++) if (this.holders(piece, word) !== 0) return true
    return false
  }

  /** The peer in a slot has a piece; once more does nothing. @returns whether that can be begun with it */
  gains(slot: number, piece: number): boolean {
    if (slot < 0) return false
    const peer = slot * slotWords
    const distance = this.#slots[peer + SlotWord.distance] ?? 0
    const at = piece * this.#recordWords + Word.holders + (slot >> 5)
    const holders = this.#records[at] ?? 0
    const bit = 1 << (slot & 31)
    const count = this.#slots[peer + SlotWord.count] ?? 0
    if ((holders & bit) === 0 && count < this.#pieceCount) {
      this.#records[at] = holders | bit
      this.#slots[peer + SlotWord.count] = count + 1
      if (count + 1 === this.#pieceCount) this.#isFull(slot)
      const claim = this.#unclaim(slot, piece)
      if (claim) this.#noteTook(claim)
      this.#count(distance, piece, 1)
    }
    if (!this.#isMissing(piece) || !this.#isFor(distance, piece)) return false
    this.#slots[peer + SlotWord.barrenAt] = -1
    return true
  }

  /** The peer has everything. */
  gainsAll({ slot, distance }: PickerPeer): void {
    const peer = slot * slotWords
    if (slot < 0 || this.#slots[peer + SlotWord.count] === this.#pieceCount) return
    const claims = this.#claimsAt[slot]
    if (claims) for (const piece of claims.keys()) this.#unclaim(slot, piece)
    const bit = 1 << (slot & 31)
    for (let piece = 0; piece < this.#pieceCount; piece++) {
      const record = piece * this.#recordWords
      const at = record + Word.holders + (slot >> 5)
      const holders = this.#records[at] ?? 0
      if ((holders & bit) !== 0 || (this.#records[record + Word.copies] ?? 0) < 0) continue
      this.#records[at] = holders | bit
      this.#count(distance, piece, 1)
    }
    this.#slots[peer + SlotWord.count] = this.#pieceCount
    this.#slots[peer + SlotWord.barrenAt] = -1
    this.#isFull(slot)
  }

  #isFull(slot: number): void {
    this.#partial--
    this.#full[slot >> 5] = (this.#full[slot >> 5] ?? 0) | (1 << (slot & 31))
  }

  /** A peer says that it is fetching a piece; again where it takes long. */
  claimed(peer: PickerPeer, piece: number, nowMs: number): void {
    this.#passTime(nowMs)
    if (peer.slot < 0 || this.has(peer, piece)) return
    if (this.#tooSlowAt[peer.slot]?.has(piece) === true) return
    const claims = (this.#claimsAt[peer.slot] ??= new Map<number, Claimed>())
    const known = claims.get(piece)
    if (known && this.#takesTooLong(known)) return
    const claim = { peer, piece, sinceMs: known?.sinceMs ?? nowMs, untilMs: nowMs + claimMs }
    claims.set(piece, claim)
    if (known === undefined) this.#countClaim(peer.distance, piece, 1)
    this.#dropEnded()
    this.#claims.push(claim)
    this.#claimsFromMs = Math.min(this.#claimsFromMs, claim.untilMs)
  }

  /** A peer does not fetch a piece after all. */
  unclaimed(peer: PickerPeer, piece: number): void {
    this.#tooSlowAt[peer.slot]?.delete(piece)
    if (this.#unclaim(peer.slot, piece)) this.#changes++
  }

  /** Whether somebody of the rack says that it is fetching something from elsewhere. */
  isAwaited(nowMs: number): boolean {
    this.#passTime(nowMs)
    return this.#nearClaims > 0
  }

  /** Nothing can be begun with the peer, whatever it would refuse, until it gains a piece or others go away. */
  isBarren(slot: number): boolean {
    return this.#slots[slot * slotWords + SlotWord.barrenAt] === this.#changes
  }

  /** @returns the claim, where there was one */
  #unclaim(slot: number, piece: number): Claimed | undefined {
    const distance = this.#slots[slot * slotWords + SlotWord.distance] ?? 0
    if ((this.#records[piece * this.#recordWords + Word.there + distance] ?? 0) < claimUnit) return undefined
    const claims = this.#claimsAt[slot]
    const claim = claims?.get(piece)
    if (claims === undefined || claim === undefined) return undefined
    claims.delete(piece)
    this.#countClaim(distance, piece, -1)
    if (claims.size === 0) this.#claimsAt[slot] = undefined
    return claim
  }

  #takesTooLong({ sinceMs }: Claimed): boolean {
    return this.#nowMs - sinceMs > Math.max(claimPatienceMinMs, claimPatience * this.#usualClaimMs)
  }

  /** What was claimed is there, or took too long. */
  #noteTook({ sinceMs }: Claimed): void {
    const tookMs = Math.min(this.#nowMs - sinceMs, claimPatience * this.#usualClaimMs)
    this.#usualClaimMs += usualClaimWeight * (tookMs - this.#usualClaimMs)
  }

  #countClaim(distance: number, piece: number, by: 1 | -1): void {
    const at = piece * this.#recordWords + Word.there + distance
    this.#records[at] = (this.#records[at] ?? 0) + by * claimUnit
    if (distance === 0) this.#nearClaims += by
  }

  /** Forgets claims that are too old. */
  #passTime(nowMs: number): void {
    this.#nowMs = nowMs
    if (nowMs < this.#claimsFromMs) return
    for (;;) {
      this.#dropEnded()
      const oldest = this.#claims[this.#claimAt]
      this.#claimsFromMs = oldest?.untilMs ?? Infinity
      if (oldest === undefined || oldest.untilMs > nowMs) return
      this.#claimAt++
      this.unclaimed(oldest.peer, oldest.piece)
      if (!this.#takesTooLong(oldest)) continue
      ;(this.#tooSlowAt[oldest.peer.slot] ??= new Set<number>()).add(oldest.piece)
      // Where all links are slow, it is what claims take.
      this.#noteTook(oldest)
    }
  }

  /** Most claims end long before their time is over: their piece comes. */
  #dropEnded(): void {
    for (let oldest = this.#claims[this.#claimAt]; oldest; oldest = this.#claims[this.#claimAt]) {
      if (this.#claimsAt[oldest.peer.slot]?.get(oldest.piece) === oldest) break
      this.#claimAt++
    }
    if (this.#claimAt < claimsDroppedMax) return
    this.#claims = this.#claims.slice(this.#claimAt)
    this.#claimAt = 0
  }

  /** A peer at that distance may be asked for a piece: nobody nearer has it or is fetching it. */
  #isFor(distance: number, piece: number): boolean {
    for (let nearer = 0; nearer < distance; nearer++) if (this.#isAt(nearer, piece)) return false
    return true
  }

  /** Somebody at that distance has the piece or is fetching it. */
  #isAt(distance: number, piece: number): boolean {
    return this.#records[piece * this.#recordWords + Word.there + distance] !== 0
  }

  #isNearer(distance: number, piece: number): boolean {
    const at = piece * this.#recordWords + Word.there
    for (let nearer = 0; nearer < distance; nearer++)
      if (((this.#records[at + nearer] ?? 0) & copiesMask) > 0) return true
    return false
  }

  /** Whether a piece was begun with the peer that is not here yet. */
  isBegunWith(peer: PickerPeer): boolean {
    for (const { owner } of this.#begun.values()) if (owner === peer) return true
    return false
  }

  /** Whether the peer has a piece that is not here. */
  interests(peer: PickerPeer): boolean {
    if (this.countOf(peer) === 0) return false
    for (const { piece } of this.#begun.values()) if (this.has(peer, piece)) return true
    const count = this.untouched
    for (let i = 0; i < count; i++) if (this.has(peer, this.#missing[i] ?? 0)) return true
    return false
  }

  pieceSize(piece: number): number {
    return Math.min(this.#pieceLength, this.#length - piece * this.#pieceLength)
  }

  /** The block to ask for next; undefined where the peer has nothing that may be asked of it now. */
  next(options: PickOptions): Ask | undefined {
    const { peer } = options
    this.#passTime(options.nowMs)
    let other: Begun | undefined
    for (const begun of this.#open) {
      if (!this.has(peer, begun.piece)) continue
      if (begun.owner === peer) return this.#ask(begun, options)
      if (options.begunOnly) continue
      if (begun.owner !== undefined && options.whole && this.untouched > 0) continue
      if (options.refuses?.(begun.piece) === true) continue
      if (!options.anything && this.#isNearer(peer.distance, begun.piece)) continue
      if (begun.owner === undefined || other === undefined) other = begun
    }
    if (other && (other.owner === undefined || !options.mayBegin)) {
      other.owner ??= peer
      return this.#ask(other, options)
    }
    if (options.mayBegin && !options.begunOnly) {
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
      if (!this.has(peer, begun.piece) || options.refuses?.(begun.piece) === true) continue
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
    const begun = this.#spare.pop() ?? this.#newBegun()
    begun.piece = piece
    begun.units.fill(Unit.free)
    begun.askers.fill(0)
    begun.unitCount = begun.free = begun.left = units
    begun.owner = owner
    this.#begun.set(piece, begun)
    this.#open.add(begun)
    return begun
  }

  #newBegun(): Begun {
    const units = Math.ceil(Math.min(this.#pieceLength, this.#length) / unitBytes)
    return {
      piece: -1,
      units: new Uint8Array(units),
      askers: new Uint8Array(units),
      unitCount: 0,
      asks: [],
      free: 0,
      left: 0,
      owner: undefined,
    }
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
   * and no neighbour has claimed, or with `anything` of all where there are no such.
   */
  untouchedRun(options: {
    /** Of these alone, from the first on. Default: of all. */
    readonly within?: PieceRange | undefined
    readonly piecesMax: number
    readonly anything: boolean
    readonly nowMs: number
  }): { readonly first: number; readonly count: number } | undefined {
    const { piecesMax, anything, nowMs, within } = options
    this.#passTime(nowMs)
    const begin = within?.firstPiece ?? 0
    const end = Math.min(this.#pieceCount, begin + (within?.pieceCount ?? this.#pieceCount))
    const isFree = (piece: number) => piece < end && this.#isMissing(piece)
    const isNobodys = (piece: number) => isFree(piece) && this.#isFor(distanceMax + 1, piece)
    const isUnheld = (piece: number) => isFree(piece) && !this.#isHeld(piece)
    // What no peer has comes first, also where anything will do: nobody else can bring it. A range is this host's, though one that had it before, and
    // is slow, has claimed what is in it.
    const wishes = [isNobodys, ...(within ? [isUnheld] : []), ...(anything ? [isFree] : [])]
    for (const isWanted of wishes) {
      const first = this.#findUntouched(isWanted, within && { begin, end })
      if (first === undefined) continue
      let count = 1
      while (count < piecesMax && isWanted(first + count)) count++
      return { first, count }
    }
    return undefined
  }

  /** The first within a range, where nobody else was given that; else from a random start. */
  #findUntouched(
    isWanted: (piece: number) => boolean,
    within: { readonly begin: number; readonly end: number } | undefined,
  ): number | undefined {
    if (within) {
      for (let piece = within.begin; piece < within.end; piece++) if (isWanted(piece)) return piece
      return undefined
    }
    const missing = this.untouched
    const start = Math.floor(this.#random() * missing)
    for (let i = 0; i < missing; i++) {
      const piece = this.#missing[(start + i) % missing] ?? 0
      if (isWanted(piece)) return piece
    }
    return undefined
  }

  /** A block has come. @returns the requests for it that others were asked for too, and whether the piece is whole */
  received(ask: Ask): { readonly whole: boolean; readonly surplus: readonly Ask[] } {
    const begun = this.#begun.get(ask.piece)
    if (!begun) return { whole: false, surplus: [] }
    const wasAsked = removeFrom(begun.asks, ask)
    let fresh = 0
    for (let unit = firstUnit(ask); unit < endUnit(ask); unit++) {
      if (wasAsked) begun.askers[unit] = (begun.askers[unit] ?? 1) - 1
      if (begun.units[unit] === Unit.here) continue
      if (begun.units[unit] === Unit.free) begun.free--
      begun.units[unit] = Unit.here
      fresh++
    }
    if (begun.free === 0) this.#open.delete(begun)
    begun.left -= fresh
    const surplus =
      begun.asks.length === 0
        ? noAsks
        : begun.asks.filter((other) => overlaps(other, ask) && this.#isHere(begun, other))
    return { whole: fresh > 0 && begun.left === 0, surplus }
  }

  /** Whether all of a block is here already. */
  isHere(ask: Ask): boolean {
    const begun = this.#begun.get(ask.piece)
    return begun === undefined || this.#isHere(begun, ask)
  }

  /** The piece was begun, and somebody is asked for a block of it. */
  isAsked(piece: number): boolean {
    return (this.#begun.get(piece)?.asks.length ?? 0) > 0
  }

  /** The piece was begun, and nothing of it is here or asked for. */
  isIdle(piece: number): boolean {
    const begun = this.#begun.get(piece)
    return begun !== undefined && begun.asks.length === 0 && begun.left === begun.unitCount
  }

  /** Pieces of which something is missing, and that nobody is asked for or has. */
  stranded(): number[] {
    return [...this.#begun.values()].flatMap(({ asks, left, piece }) =>
      left > 0 && asks.length === 0 && !this.#isHeld(piece) ? piece : [],
    )
  }

  /** A block will not come: others may be asked for it, and for its piece if nothing else of that is asked of the same peer. */
  release(ask: Ask): void {
    const begun = this.#begun.get(ask.piece)
    if (begun === undefined || !this.#withdraw(begun, ask) || begun.owner !== ask.peer) return
    for (const { peer } of begun.asks) if (peer === ask.peer) return
    begun.owner = undefined
  }

  /** The piece is verified and on disk. */
  done(piece: number): void {
    if (this.#isMissing(piece)) this.#removeMissing(piece)
    this.#end(piece)
    this.#records[piece * this.#recordWords + Word.copies] = -1
  }

  /** The piece was wrong, or was given back: it is missing again. */
  forget(piece: number): void {
    if (this.#end(piece)) this.#addMissing(piece)
  }

  #end(piece: number): boolean {
    const begun = this.#begun.get(piece)
    if (begun === undefined) return false
    this.#open.delete(begun)
    this.#begun.delete(piece)
    begun.asks.length = 0
    begun.owner = undefined
    this.#spare.push(begun)
    return true
  }

  /** One at that distance has a piece more, or less. */
  #count(distance: number, piece: number, by: 1 | -1): void {
    const at = piece * this.#recordWords
    const copies = this.#records[at + Word.copies] ?? 0
    if (copies < 0) return
    let rarity = this.#rarity(piece)
    const there = at + Word.there + distance
    this.#records[there] = (this.#records[there] ?? 0) + by
    this.#records[at + Word.copies] = copies + by
    if (!this.#isMissing(piece)) return
    const after = this.#rarity(piece)
    while (rarity < after) this.#swapTo(piece, this.#shrink(rarity++))
    while (rarity > after) this.#swapTo(piece, this.#extend(--rarity))
  }

  /** Of the untouched pieces that the peer has and may be asked for, one of the rarest; -1 where there is none. */
  #rarest({ peer, anything, refuses }: PickOptions): number {
    const { distance } = peer
    if (this.isBarren(peer.slot) && !anything) return -1
    // Nobody is there who lacks anything: what order is best for others does not matter.
    if (this.#partial === 0) return this.#nextInOrder(peer, anything, refuses)
    let refused = false
    const chance = this.#random()
    const missing = this.#missing
    // What a near peer has somebody near has; what somebody near has is not asked of far ones.
    const from = distance === 0 ? farCopiesMax : 0
    const to = distance === 0 || anything ? raritiesMax : farCopiesMax
    let begin = this.#ends[from] ?? 0
    for (let rarity = from + 1; rarity <= to; rarity++) {
      const end = this.#ends[rarity] ?? 0
      if (end === begin) continue
      // Each look begins elsewhere: ties fall at random, another way on each host.
      let i = begin + Math.floor(chance * (end - begin))
      for (let looks = end - begin; looks > 0; looks--) {
        const piece = missing[i++] ?? 0
        if (i === end) i = begin
        if (!this.has(peer, piece) || !(anything || this.#isFor(distance, piece))) continue
        if (refuses?.(piece) !== true) return piece
        refused = true
      }
      begin = end
    }
    if (!refused && !anything) this.#slots[peer.slot * slotWords + SlotWord.barrenAt] = this.#changes
    return -1
  }

  #nextInOrder(peer: PickerPeer, anything: boolean, refuses: PickOptions['refuses']): number {
    const missing = this.untouched
    let lowest = -1
    for (let i = 0; i < missing; i++) {
      const piece = this.#missing[i] ?? 0
      if (lowest >= 0 && piece > lowest) continue
      if (this.has(peer, piece) && (anything || this.#isFor(peer.distance, piece)) && !refuses?.(piece))
        lowest = piece
    }
    return lowest
  }

  #ask(begun: Begun, { peer, bytesMax }: PickOptions): Ask {
    begun.owner ??= peer
    const unitsMax = Math.max(1, Math.floor(bytesMax / unitBytes))
    const first = begun.units.indexOf(Unit.free)
    let end = first + 1
    while (end < begun.unitCount && end - first < unitsMax && begun.units[end] === Unit.free) end++
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
    const end = endUnit(ask)
    for (let unit = firstUnit(ask); unit < end; unit++) {
      if (begun.units[unit] === Unit.free) {
        begun.units[unit] = Unit.asked
        begun.free--
      }
      begun.askers[unit] = (begun.askers[unit] ?? 0) + 1
    }
    if (begun.free === 0) this.#open.delete(begun)
    begun.asks.push(ask)
    return ask
  }

  #withdraw(begun: Begun, ask: Ask): boolean {
    if (!removeFrom(begun.asks, ask)) return false
    for (let unit = firstUnit(ask); unit < endUnit(ask); unit++) {
      const askers = (begun.askers[unit] ?? 0) - 1
      begun.askers[unit] = askers
      if (askers === 0 && begun.units[unit] === Unit.asked) {
        begun.units[unit] = Unit.free
        begun.free++
      }
    }
    if (begun.free > 0) this.#open.add(begun)
    return true
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
    return this.#positionOf(piece) < this.untouched
  }

  #positionOf(piece: number): number {
    return this.#records[piece * this.#recordWords + Word.position] ?? Infinity
  }

  #removeMissing(piece: number): void {
    for (let rarity = this.#rarity(piece); rarity <= raritiesMax; rarity++)
      this.#swapTo(piece, this.#shrink(rarity))
  }

  #addMissing(piece: number): void {
    this.#changes++
    for (let rarity = raritiesMax; rarity >= this.#rarity(piece); rarity--)
      this.#swapTo(piece, this.#extend(rarity))
  }

  #rarity(piece: number): number {
    const at = piece * this.#recordWords
    const near = (this.#records[at + Word.there] ?? 0) & copiesMask
    if (near > 0) return farCopiesMax + Math.min(near, nearCopiesMax)
    return Math.min(this.#records[at + Word.copies] ?? 0, farCopiesMax)
  }

  /** The last of a rarity leaves it. @returns where it stood */
  #shrink(rarity: number): number {
    const end = (this.#ends[rarity] ?? 0) - 1
    this.#ends[rarity] = end
    return end
  }

  /** One more of a rarity. @returns where it is to stand */
  #extend(rarity: number): number {
    const end = this.#ends[rarity] ?? 0
    this.#ends[rarity] = end + 1
    return end
  }

  #swapTo(piece: number, position: number): void {
    const from = this.#positionOf(piece)
    if (from === position) return
    const other = this.#missing[position] ?? 0
    this.#missing[from] = other
    this.#records[other * this.#recordWords + Word.position] = from
    this.#missing[position] = piece
    this.#records[piece * this.#recordWords + Word.position] = position
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

const noAsks: readonly Ask[] = []

function removeFrom(asks: Ask[], ask: Ask): boolean {
  const at = asks.indexOf(ask)
  if (at < 0) return false
  asks.splice(at, 1)
  return true
}

function enlarged(from: Int32Array, length: number): Int32Array<ArrayBuffer> {
  const to = new Int32Array(length)
  to.set(from)
  return to
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
