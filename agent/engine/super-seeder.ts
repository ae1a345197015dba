/** A peer that has been told nothing more to ask for, and has nothing left, for this long may be told of what others are being sent. */
const idleMs = 2_000
/** A peer that takes nothing for this long has let go of what it was told of: others are told of it. */
const stillMs = 2_000

interface Shown {
  /** By piece: 1 where the peer was told of it. */
  readonly pieces: Uint8Array
  /** Those of them that it has not got yet. */
  readonly open: Set<number>
  /** Since when it has had nothing to ask for. */
  idleSinceMs: number | undefined
  isStill: boolean
}

/** Bytes of pieces that a peer is told of before it has them: at least, while it is not known how fast it takes them, and at most. */
const aheadFirst = 4 * 1024 * 1024
const aheadMax = 16 * 1024 * 1024
const piecesMin = 2

/** How many pieces a peer is to have before it, that has taken `total` bytes until now and takes `rate` bytes a second. */
export function shownAhead(
  { total, rate }: { readonly total: number; readonly rate: number },
  pieceLength: number,
): number {
  const bytes = rate > 0 ? rate / 2 : Math.max(aheadFirst, total)
  return Math.max(piecesMin, Math.ceil(Math.min(aheadMax, bytes) / pieceLength))
}

/**
 * What the only seed of a swarm says that it has (after BEP 16): another few pieces to each peer, so that it sends each piece once, and the
 * peers give each other the rest. In order, so that whoever hashes what comes need not wait. It is over once all pieces are
 * somewhere else too. Keeps no clock and sends nothing.
 */
export class SuperSeeder<Peer> {
  readonly #pieceCount: number
  /** 1: some peer was told of it, or has it. */
  readonly #given: Uint8Array
  /** 1: some peer has, or had, it. */
  readonly #outside: Uint8Array
  #outsideCount = 0
  #next = 0
  /** Those that were given to peers that went away or stand still. */
  readonly #returned = new Set<number>()
  readonly #peers = new Map<Peer, Shown>()

  constructor(pieceCount: number) {
    this.#pieceCount = pieceCount
    this.#given = new Uint8Array(pieceCount)
    this.#outside = new Uint8Array(pieceCount)
  }

  /** Each piece is, or was, somewhere else too. */
  get isOver(): boolean {
    return this.#outsideCount === this.#pieceCount
  }

  join(peer: Peer): void {
    this.#peers.set(peer, {
      pieces: new Uint8Array(this.#pieceCount),
      open: new Set(),
      idleSinceMs: undefined,
      isStill: false,
    })
  }

  leave(peer: Peer): void {
    const shown = this.#peers.get(peer)
    if (shown === undefined) return
    this.#peers.delete(peer)
    this.#giveBack(shown)
  }

  /** The peer, or one that is told everything, has a piece. */
  gained(peer: Peer, piece: number): void {
    this.#given[piece] = 1
    this.#returned.delete(piece)
    if (this.#outside[piece] === 0) {
      this.#outside[piece] = 1
      this.#outsideCount++
    }
    const shown = this.#peers.get(peer)
    if (shown === undefined) return
    shown.pieces[piece] = 1
    shown.open.delete(piece)
  }

  /** The pieces that a peer is to be told of now. `ahead`: how many it is to have before it; `stillForMs`: since it last took a byte, or joined. */
  next(
    peer: Peer,
    {
      ahead,
      stillForMs,
      nowMs,
    }: { readonly ahead: number; readonly stillForMs: number; readonly nowMs: number },
  ): number[] {
    const shown = this.#peers.get(peer)
    if (shown === undefined) return []
    if (shown.open.size > 0 && stillForMs > stillMs) {
      if (!shown.isStill) this.#giveBack(shown)
      shown.isStill = true
      return []
    }
    shown.isStill = false
    const pieces: number[] = []
    while (shown.open.size < ahead) {
      const piece = this.#take(shown)
      if (piece === undefined) break
      pieces.push(piece)
    }
    if (shown.open.size > 0) shown.idleSinceMs = undefined
    else if (nowMs - (shown.idleSinceMs ??= nowMs) >= idleMs) {
      for (let piece = 0; piece < this.#pieceCount && shown.open.size < ahead; piece++) {
        if (this.#outside[piece] === 1 || shown.pieces[piece] === 1) continue
        this.#show(shown, piece)
        pieces.push(piece)
      }
    }
    return pieces
  }

  /** What a peer has not been told of yet. */
  hiddenFrom(peer: Peer): number[] {
    const shown = this.#peers.get(peer)
    if (shown === undefined) return []
    return Array.from(shown.pieces.keys()).filter((piece) => shown.pieces[piece] === 0)
  }

  /** One that nobody else was told of. */
  #take(shown: Shown): number | undefined {
    for (const piece of this.#returned) {
      if (shown.pieces[piece] === 1) continue
      this.#returned.delete(piece)
      this.#show(shown, piece)
      return piece
    }
    while (this.#next < this.#pieceCount && this.#given[this.#next] === 1) this.#next++
    if (this.#next === this.#pieceCount) return undefined
    this.#show(shown, this.#next)
    return this.#next++
  }

  #show(shown: Shown, piece: number): void {
    this.#given[piece] = 1
    shown.pieces[piece] = 1
    shown.open.add(piece)
  }

  #giveBack(shown: Shown): void {
    for (const piece of shown.open) if (this.#outside[piece] === 0) this.#returned.add(piece)
  }
}
