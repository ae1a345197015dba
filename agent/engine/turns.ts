/**
 * Pieces under way at once between this host and others of the rack, and as many again from afar. With fewer, links stand idle between two;
 * with more, each is whole later, and others can pass it on later: docs/selection.md has the figures.
 */
export const atOnceMax = 8
/** Until one has come it is not known how long one takes. */
const usualFirstMs = 1_000
const usualWeight = 0.1

interface Turn<Peer> {
  readonly peer: Peer
  readonly sinceMs: number
  bytes: number
}

/**
 * The pieces that a host is sending, or those that it is being sent: a few at a time, and none to two hosts at once, since the second gets it
 * sooner from the first. What takes more than twice as long as usual holds no turn any more, so a slow host keeps no others waiting. Keeps no clock.
 */
export class Turns<Peer> {
  readonly #turns = new Map<number, Turn<Peer>>()
  #usualMs = usualFirstMs
  /** Until then there is no room, unless a turn ends. */
  #fullUntilMs = 0

  /** What a piece takes, ms. */
  get usualMs(): number {
    return this.#usualMs
  }

  hasRoom(nowMs: number): boolean {
    if (this.#turns.size < atOnceMax) return true
    if (nowMs < this.#fullUntilMs) return false
    let count = 0
    let firstMs = Infinity
    for (const { sinceMs } of this.#turns.values()) {
      if (!this.#isUsual(sinceMs, nowMs)) continue
      count++
      firstMs = Math.min(firstMs, sinceMs)
    }
    if (count < atOnceMax) return true
    this.#fullUntilMs = firstMs + 2 * this.#usualMs
    return false
  }

  /** Whether a piece is under way with somebody else. */
  isTaken(piece: number, peer: Peer, nowMs: number): boolean {
    const turn = this.#turns.get(piece)
    return turn !== undefined && turn.peer !== peer && this.#isUsual(turn.sinceMs, nowMs)
  }

  has(piece: number, peer: Peer): boolean {
    return this.#turns.get(piece)?.peer === peer
  }

  begin(piece: number, peer: Peer, nowMs: number): void {
    if (!this.has(piece, peer)) this.#turns.set(piece, { peer, sinceMs: nowMs, bytes: 0 })
  }

  /** So many bytes of it were moved; with all of them the turn is over. */
  moved(piece: number, peer: Peer, bytes: number, pieceSize: number, nowMs: number): void {
    const turn = this.#turns.get(piece)
    if (turn?.peer !== peer) return
    turn.bytes += bytes
    if (turn.bytes >= pieceSize) this.end(piece, nowMs)
  }

  /** The piece is there; of `peer` alone, where that is said. */
  end(piece: number, nowMs: number, peer?: Peer): void {
    const turn = this.#turns.get(piece)
    if (turn === undefined || (peer !== undefined && turn.peer !== peer)) return
    this.drop(piece)
    this.#usualMs += usualWeight * (Math.min(nowMs - turn.sinceMs, 4 * this.#usualMs) - this.#usualMs)
  }

  /** It will not come, or not from there. */
  drop(piece: number): void {
    if (this.#turns.delete(piece)) this.#fullUntilMs = 0
  }

  /** The peer is gone. */
  leave(peer: Peer): void {
    for (const [piece, turn] of this.#turns) if (turn.peer === peer) this.drop(piece)
  }

  #isUsual(sinceMs: number, nowMs: number): boolean {
    return nowMs - sinceMs < 2 * this.#usualMs
  }
}

/** All turns of a host in one swarm: those with its own rack, and those with elsewhere, so that neither has to wait for the other. */
export class AllTurns<Peer> {
  readonly #near = { coming: new Turns<Peer>(), going: new Turns<Peer>() }
  readonly #far = { coming: new Turns<Peer>(), going: new Turns<Peer>() }

  /** What comes from peers at a distance, and what goes to them. */
  at(distance: number): { readonly coming: Turns<Peer>; readonly going: Turns<Peer> } {
    return distance === 0 ? this.#near : this.#far
  }

  /** The piece has come, whoever sent it. */
  came(piece: number, nowMs: number): void {
    this.#near.coming.end(piece, nowMs)
    this.#far.coming.end(piece, nowMs)
  }

  /** The piece will not come. */
  drop(piece: number): void {
    this.#near.coming.drop(piece)
    this.#far.coming.drop(piece)
  }

  leave(peer: Peer): void {
    for (const { coming, going } of [this.#near, this.#far]) {
      coming.leave(peer)
      going.leave(peer)
    }
  }
}
