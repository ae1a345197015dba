/**
 * Pieces that a host sends at once within its rack, and as many that it fetches there: where one may be more than the other, the others'
 * links stand idle. With fewer, news and refusals take longer than pieces; with more, each is whole later, and others can pass it on later:
 * docs/selection.md has the figures.
 */
export const atOnceMax = 5
/** Pieces from afar, each of which takes longer. */
const farComingMax = 8
/** …and to afar: a rack whose hosts had pieces first is asked for them by all others, and would have no links left for itself. */
const farGoingMax = 2
/** …of which one has to do where this many go near: racks that had pieces first would be done last, since all others fetch from them. */
const nearGoingMany = 4
/** Until one has come it is not known how long one takes. */
const usualFirstMs = 1_000
const usualWeight = 0.1

interface Turn<Peer> {
  readonly peer: Peer
  readonly sinceMs: number
  bytes: number
  /** Since when nothing more of the piece is asked for. */
  restMs: number | undefined
}

/**
 * The pieces that a host is sending, or those that it is being sent: a few at a time, and none to two hosts at once, since the second gets it
 * sooner from the first. What takes more than twice as long as usual holds no turn any more, so a slow host keeps no others waiting; nor does what
 * nobody goes on with for a quarter of that. Keeps no clock.
 */
export class Turns<Peer> {
  readonly #turns = new Map<number, Turn<Peer>>()
  /** Who was told that there is no room, longest ago first. */
  readonly #waiting = new Set<Peer>()
  #usualMs = usualFirstMs
  /** Until then there is no room, unless a turn ends. */
  #fullUntilMs = 0
  readonly #max: () => number

  /** @param max turns at once, as things are */
  constructor(max: () => number) {
    this.#max = max
  }

  /** How many are under way, those that hold no turn any more included. */
  get size(): number {
    return this.#turns.size
  }

  /** What a piece takes, ms. */
  get usualMs(): number {
    return this.#usualMs
  }

  /** Where there was no room: until when that is so, unless a turn ends. */
  get fullUntilMs(): number {
    return this.#fullUntilMs
  }

  hasRoom(nowMs: number): boolean {
    const max = this.#max()
    if (this.#turns.size < max) return true
    if (nowMs < this.#fullUntilMs) return false
    let count = 0
    let firstMs = Infinity
    for (const turn of this.#turns.values()) {
      const untilMs = this.#untilMs(turn)
      if (untilMs <= nowMs) continue
      count++
      firstMs = Math.min(firstMs, untilMs)
    }
    if (count < max) return true
    this.#fullUntilMs = firstMs
    return false
  }

  /** Pieces that are under way. */
  piecesAt(nowMs: number): number[] {
    return [...this.#turns].filter(([, turn]) => this.#untilMs(turn) > nowMs).map(([piece]) => piece)
  }

  /** Whether a piece is under way with somebody else. */
  isTaken(piece: number, peer: Peer, nowMs: number): boolean {
    const turn = this.#turns.get(piece)
    return turn !== undefined && turn.peer !== peer && this.#untilMs(turn) > nowMs
  }

  has(piece: number, peer: Peer): boolean {
    return this.#turns.get(piece)?.peer === peer
  }

  /** There was no room for the peer. */
  wait(peer: Peer): void {
    this.#waiting.add(peer)
  }

  /** Whoever has waited longest, where there is room; it waits no more. */
  nextWaiting(nowMs: number): Peer | undefined {
    if (this.#waiting.size === 0 || !this.hasRoom(nowMs)) return undefined
    const [peer] = this.#waiting
    if (peer !== undefined) this.#waiting.delete(peer)
    return peer
  }

  begin(piece: number, peer: Peer, nowMs: number): void {
    this.#waiting.delete(peer)
    if (!this.has(piece, peer)) this.#turns.set(piece, { peer, sinceMs: nowMs, bytes: 0, restMs: undefined })
  }

  /** So many bytes of it were moved; with all of them the turn is over. */
  moved(piece: number, peer: Peer, bytes: number, pieceSize: number, nowMs: number): void {
    const turn = this.#turns.get(piece)
    if (turn?.peer !== peer) return
    turn.bytes += bytes
    if (turn.bytes >= pieceSize) this.end(piece, nowMs)
  }

  /** Nothing more of it is asked for, as yet. */
  rest(piece: number, nowMs: number): void {
    const turn = this.#turns.get(piece)
    if (turn) turn.restMs = nowMs
    this.#fullUntilMs = 0
  }

  /** More of it is asked for. */
  goOn(piece: number): void {
    const turn = this.#turns.get(piece)
    if (turn) turn.restMs = undefined
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
    this.#waiting.delete(peer)
    for (const [piece, turn] of this.#turns) if (turn.peer === peer) this.drop(piece)
  }

  #untilMs({ sinceMs, restMs = Infinity }: Turn<Peer>): number {
    return Math.min(sinceMs + 2 * this.#usualMs, restMs + this.#usualMs / 4)
  }
}

/** All turns of a host in one swarm: those with its own rack, and those with elsewhere, so that neither has to wait for the other. */
export class AllTurns<Peer> {
  readonly #near = { coming: new Turns<Peer>(() => atOnceMax), going: new Turns<Peer>(() => atOnceMax) }
  readonly #far = {
    coming: new Turns<Peer>(() => farComingMax),
    going: new Turns<Peer>(() => (this.#near.going.size < nearGoingMany ? farGoingMax : 1)),
  }

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

  /** What goes near, and what goes far. */
  get going(): readonly Turns<Peer>[] {
    return [this.#near.going, this.#far.going]
  }

  leave(peer: Peer): void {
    for (const { coming, going } of [this.#near, this.#far]) {
      coming.leave(peer)
      going.leave(peer)
    }
  }
}
