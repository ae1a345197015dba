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
/** Who has fewer neighbours than that sends as many to afar as it fetches from there: there its pieces come from and go to. */
const neighboursFew = 2
/** Until one has come it is not known how long one takes. */
const usualFirstMs = 1_000
const usualWeight = 0.1

/**
 * The pieces that a host is sending, or those that it is being sent: a few at a time, and none to two hosts at once, since the second gets it
 * sooner from the first. What takes more than twice as long as usual holds no turn any more, so a slow host keeps no others waiting; nor does what
 * nobody goes on with for a quarter of that. Keeps no clock.
 */
export class Turns<Peer> {
  /** Of each turn, in no order: there are a few, so looking for one is quick. */
  readonly #pieces: number[] = []
  readonly #peers: Peer[] = []
  readonly #sinceMs: number[] = []
  readonly #bytes: number[] = []
  /** Since when nothing more of the piece is asked for; Infinity while more is. */
  readonly #restMs: number[] = []
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
    return this.#pieces.length
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
    if (this.#pieces.length < max) return true
    if (nowMs < this.#fullUntilMs) return false
    let count = 0
    let firstMs = Infinity
    for (let at = 0; at < this.#pieces.length; at++) {
      const untilMs = this.#untilMs(at)
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
    return this.#pieces.filter((_, at) => this.#untilMs(at) > nowMs)
  }

  /** Whether a piece is under way with somebody else. */
  isTaken(piece: number, peer: Peer, nowMs: number): boolean {
    const at = this.#pieces.indexOf(piece)
    return at >= 0 && this.#peers[at] !== peer && this.#untilMs(at) > nowMs
  }

  has(piece: number, peer: Peer): boolean {
    const at = this.#pieces.indexOf(piece)
    return at >= 0 && this.#peers[at] === peer
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
    if (this.has(piece, peer)) return
    const found = this.#pieces.indexOf(piece)
    const at = found < 0 ? this.#pieces.length : found
    this.#pieces[at] = piece
    this.#peers[at] = peer
    this.#sinceMs[at] = nowMs
    this.#bytes[at] = 0
    this.#restMs[at] = Infinity
  }

  /** So many bytes of it were moved; with all of them the turn is over. */
  moved(piece: number, peer: Peer, bytes: number, pieceSize: number, nowMs: number): void {
    const at = this.#pieces.indexOf(piece)
    if (at < 0 || this.#peers[at] !== peer) return
    const moved = (this.#bytes[at] ?? 0) + bytes
    this.#bytes[at] = moved
    if (moved >= pieceSize) this.end(piece, nowMs)
  }

  /** Nothing more of it is asked for, as yet. */
  rest(piece: number, nowMs: number): void {
    const at = this.#pieces.indexOf(piece)
    if (at >= 0) this.#restMs[at] = nowMs
    this.#fullUntilMs = 0
  }

  /** More of it is asked for. */
  goOn(piece: number): void {
    const at = this.#pieces.indexOf(piece)
    if (at >= 0) this.#restMs[at] = Infinity
  }

  /** The piece is there; of `peer` alone, where that is said. */
  end(piece: number, nowMs: number, peer?: Peer): void {
    const at = this.#pieces.indexOf(piece)
    if (at < 0 || (peer !== undefined && this.#peers[at] !== peer)) return
    const tookMs = nowMs - (this.#sinceMs[at] ?? nowMs)
    this.#dropAt(at)
    this.#usualMs += usualWeight * (Math.min(tookMs, 4 * this.#usualMs) - this.#usualMs)
  }

  /** It will not come, or not from there. */
  drop(piece: number): void {
    const at = this.#pieces.indexOf(piece)
    if (at >= 0) this.#dropAt(at)
  }

  /** The peer is gone. */
  leave(peer: Peer): void {
    this.#waiting.delete(peer)
    for (let at = this.#pieces.length - 1; at >= 0; at--) if (this.#peers[at] === peer) this.#dropAt(at)
  }

  #dropAt(at: number): void {
    removeAt(this.#pieces, at)
    removeAt(this.#peers, at)
    removeAt(this.#sinceMs, at)
    removeAt(this.#bytes, at)
    removeAt(this.#restMs, at)
    this.#fullUntilMs = 0
  }

  #untilMs(at: number): number {
    return Math.min(
      (this.#sinceMs[at] ?? 0) + 2 * this.#usualMs,
      (this.#restMs[at] ?? Infinity) + this.#usualMs / 4,
    )
  }
}

/** All turns of a host in one swarm: those with its own rack, and those with elsewhere, so that neither has to wait for the other. */
export class AllTurns<Peer> {
  /** Peers of the own rack that it is connected to. */
  neighbours = 0
  readonly #near = { coming: new Turns<Peer>(() => atOnceMax), going: new Turns<Peer>(() => atOnceMax) }
  readonly #far = {
    coming: new Turns<Peer>(() => (this.neighbours < neighboursFew ? this.#farShare() : farComingMax)),
    going: new Turns<Peer>(() =>
      Math.max(this.#farShare(), this.#near.going.size < nearGoingMany ? farGoingMax : 1),
    ),
  }

  /** Of what a host sends at once, in a rack of so many: one copy comes into the rack, and each of the others sends one on. */
  #farShare(): number {
    return Math.ceil(atOnceMax / (this.neighbours + 1))
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

/** The last takes its place. */
function removeAt(items: unknown[], at: number): void {
  const last = items.pop()
  if (last !== undefined && at < items.length) items[at] = last
}
