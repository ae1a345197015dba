import { AgentConfig } from '../agent/config.ts'
import type { EnginePeer } from '../agent/engine/engine.ts'
import type { Ask, PickerPeer, PickOptions } from '../agent/engine/picker.ts'
import { Picker } from '../agent/engine/picker.ts'
import { RateMeter } from '../agent/engine/rate-meter.ts'
import { ownPieces, pieceMemoryMax } from '../agent/engine/piece-store.ts'
import {
  claimAgainMs,
  dueInMs,
  hedgeInMs,
  isAskedEnough,
  isLate,
  Reach,
  redialAfterMs,
  redialMs,
  reserveStep,
  silentMs,
  uploadSlots,
  uselessMs,
  webseedAfterMs,
} from '../agent/engine/schedule.ts'
import { AllTurns, atOnceMax } from '../agent/engine/turns.ts'
import { shownAhead, SuperSeeder } from '../agent/engine/super-seeder.ts'
import { endsSoon, webseedRequestBytes, webseedRequestsMax } from '../agent/engine/webseed-source.ts'
import { distanceUnknown } from '../lib/protocol/announce.ts'
import { AskQueue } from './ask-queue.ts'
import type { LinkId, Network } from './network.ts'
import type { Blob, Host, WebseedSource, World } from './world.ts'

/** Agents run with the settings that they have by themselves. */
export const agentConfig = AgentConfig.parse({ server: 'http://localhost' })
/** Per torrent. */
const connectionsMax = agentConfig.limits.connections_max
/** A fetch is connected to fewer: those that it dials, and others up to twice as many in all. */
const slotsMax = 32 * Math.ceil((3 * connectionsMax) / 32)

/** What a fetch looks at of all its peers stands in one table, by the slot of the peer in the picker: to look through it touches no peer. */
const Seat = {
  /** The other one's number, and its slot for this one; -1 where it needs no news any more. */
  other: 0,
  theirSlot: 1,
  /** Bits of `SeatIs`. */
  is: 2,
  /** How many pieces are asked of it. */
  asked: 3,
} as const
const seatWords = 4
/** `goesFar`: the other one takes this one for far. */
const SeatIs = { near: 1, far: 2, interesting: 4, goesFar: 8 } as const

interface Candidate {
  readonly host: Host
  peer: Pick<EnginePeer, 'distance' | 'reserve'>
  nextMs: number
  failures: number
}

/** One host's part in one swarm. */
export class Fetch {
  readonly host: Host
  readonly blob: Blob
  readonly #world: World
  readonly have: Uint8Array
  count = 0
  isComplete = false
  isRunning = false
  /** Among all fetches. */
  readonly number: number
  readonly #hears: (slot: number, piece: number) => void
  #asksAsItHears = false
  /** Bytes come from the first pieces on; when the last piece came. */
  finishedMs: number | undefined
  /** A picker is large: who has everything needs none. */
  #picker: Picker | undefined
  #reach = new Reach()
  readonly sides = new Map<Fetch, Side>()
  /** By the slot of its peer in the picker, as are these. */
  readonly #sideAt: (Side | undefined)[] = []
  readonly #seats = new Int32Array(seatWords * slotsMax)
  /** A bit for each: whom to tell of a piece unless it has it, and whom in any case. */
  readonly #present = new Int32Array(slotsMax / 32)
  readonly #always = new Int32Array(slotsMax / 32)
  #slotsEnd = 0
  readonly #candidates = new Map<Host, Candidate>()
  readonly #begun = new Set<number>()
  readonly turns = new AllTurns<Side>()
  readonly #begunMax: number
  readonly #lanes: WebseedLane[] = []
  /** Those that only end what they have begun. */
  readonly #endingLanes = new Set<WebseedLane>()
  #webseedFromMs = 0
  #isFirst = false
  #webseed: WebseedSource | undefined
  /** Of a host that had everything before all others. */
  #superSeeder: SuperSeeder<Side> | undefined
  #dialled = 0
  serving = 0
  /** As in `Torrent`. */
  readonly #claims = new Map<number, number>()
  #claimedAtMs = 0
  #movedAtMs = 0
  #givenAtMs = 0
  #asksFar = true
  /** Since it last asked for more. */
  #hasCome = false
  #hasLate = false
  downloaded = 0

  constructor(host: Host, blob: Blob, world: World, whole: boolean) {
    this.host = host
    this.blob = blob
    this.#world = world
    this.number = world.enter(this)
    this.#hears = (slot, piece) => {
      if (this.#picker) this.#gained(this.#picker, slot, piece)
    }
    this.have = new Uint8Array(whole ? 0 : blob.pieceCount)
    this.#begunMax = Math.max(ownPieces, Math.floor(pieceMemoryMax / blob.pieceLength))
    this.isComplete = whole
    this.#superSeeder = whole ? new SuperSeeder(blob.pieceCount) : undefined
    this.count = whole ? blob.pieceCount : 0
  }

  get movedAtMs(): number {
    return this.#movedAtMs
  }

  get bytesLeft(): number {
    return this.isComplete ? 0 : Math.max(1, this.blob.length - this.count * this.blob.pieceLength)
  }

  has(piece: number): boolean {
    return this.isComplete || this.have[piece] === 1
  }

  /** Begins, or goes on with what it has. */
  start(): void {
    this.isRunning = true
    const now = this.#world.nowMs()
    this.#movedAtMs = this.#givenAtMs = now
    if (this.isComplete) return
    this.#reach = new Reach()
    const { pieceCount, pieceLength, length } = this.blob
    this.#picker = new Picker({ pieceCount, pieceLength, length, random: this.#world.random })
    for (let piece = 0; piece < pieceCount; piece++) if (this.have[piece] === 1) this.#picker.done(piece)
  }

  /** Goes away, with what it has. */
  stop(): void {
    this.isRunning = false
    this.#endWebseed()
    for (const side of [...this.sides.values()]) disconnect(side)
    this.#candidates.clear()
    this.#begun.clear()
    this.#picker = undefined
  }

  /** The tracker has named peers. */
  heard(
    peers: readonly { readonly host: Host; readonly distance: number; readonly reserve: boolean }[],
  ): void {
    const now = this.#world.nowMs()
    for (const { host, distance, reserve } of peers) {
      const peer = { distance, reserve }
      const farInMs = this.#reach.heard(peer, now)
      if (farInMs !== undefined)
        this.#world.after(farInMs, () => {
          this.#dialMore()
        })
      if (this.isComplete) continue
      const known = this.#candidates.get(host)
      if (known) known.peer = peer
      else this.#candidates.set(host, { host, peer, nextMs: 0, failures: 0 })
    }
    this.#dialMore()
  }

  /** A few times a second. */
  tick(): void {
    if (this.#superSeeder) for (const side of [...this.sides.values()]) this.#showMore(side)
    if (this.isComplete || !this.isRunning) return
    const now = this.#world.nowMs()
    this.#hearAll()
    this.#hasLate = false
    for (const side of [...this.sides.values()]) {
      this.#watch(side, now)
      side.meter.tick(now)
    }
    const isAwaited = this.#picker?.isAwaited(now) === true
    const isAskedForNothing = [...this.sides.values()].every(({ asks }) => asks.length === 0)
    const isIdle = isAskedForNothing && this.#lanes.every((lane) => lane.isIdle)
    const isOffered = () =>
      [...this.sides.values()].some(({ picking }) => picking && this.#picker?.interests(picking) === true)
    this.#reach.tick({ movedAtMs: this.#movedAtMs, isAwaited, isIdle, isOffered }, now)
    this.#claimAgain(now)
    const asksFar = this.#reach.mayAsk(distanceUnknown, now)
    if (asksFar !== this.#asksFar) {
      this.#asksFar = asksFar
      for (const side of this.sides.values()) if (side.distance > 0) this.#interest(side)
    }
    for (const side of [...this.sides.values()]) {
      const isUnderWay = side.asks.length > 0 || side.peer.asks.length > 0
      if (asksFar || side.distance === 0 || side.peer.isInteresting || isUnderWay || side.isMixed)
        side.usefulAtMs = now
      else if (now - side.usefulAtMs > uselessMs) disconnect(side)
    }
    this.#dialMore()
    for (const lane of this.#lanes) lane.goOn()
    this.fill()
  }

  setWebseed(source: WebseedSource | undefined): void {
    this.#webseed = source
    this.#isFirst ||= source !== undefined
    if (source === undefined) {
      for (const lane of this.#lanes.splice(0)) {
        if (lane.isIdle) lane.end()
        else this.#endingLanes.add(lane)
      }
      return
    }
    if (this.isComplete) return
    for (const lane of this.#lanes) lane.goOn()
    if (this.#lanes.length > 0) return
    for (let i = 0; i < webseedRequestsMax; i++)
      this.#lanes.push(new WebseedLane(this, source.way, this.#world))
    for (const lane of this.#lanes) lane.goOn()
  }

  /** The server is gone: what was asked of it is lost, and it is asked again from `retryAtMs` on. */
  cutWebseed(retryAtMs: number): void {
    this.#webseedFromMs = retryAtMs
    for (const lane of this.#lanes) lane.cut()
    for (const lane of this.#endingLanes) lane.end()
    this.#endingLanes.clear()
  }

  #endWebseed(): void {
    this.#webseed = undefined
    for (const lane of [...this.#lanes.splice(0), ...this.#endingLanes]) lane.end()
    this.#endingLanes.clear()
  }

  /** It was told once to use the webseed. */
  get isFirst(): boolean {
    return this.#isFirst
  }

  get isGateway(): boolean {
    return [...this.sides.values()].some(({ distance, meter }) => distance > 0 && meter.total > 0)
  }

  #watch(side: Side, now: number): void {
    if (side.asks.length === 0 || side.flow === undefined) return
    // Bytes of what is not whole yet count too.
    const left = this.#world.network.leftOfFirst(side.flow)
    if (left !== side.seenLeft) side.movedAtMs = this.#movedAtMs = now
    side.seenLeft = left
    side.meterFirst(left)
    const stillMs = now - side.movedAtMs
    if (stillMs > silentMs) {
      const candidate = this.#candidates.get(side.peer.fetch.host)
      if (candidate) candidate.nextMs = now + redialMs
      disconnect(side)
      return
    }
    for (const ask of side.asks) {
      const { usualMs } = side.coming
      if (
        ask.dueMs < Infinity &&
        !isLate(ask, { stillMs, usualMs, untouched: this.#picker?.untouched ?? 0, nowMs: now })
      )
        continue
      ask.dueMs = Infinity
      this.#hasLate = true
    }
  }

  #dialMore(): void {
    if (this.isComplete || !this.isRunning) return
    const now = this.#world.nowMs()
    let served = false
    for (const side of this.sides.values())
      if (side.distance === 0 && side.peer.fetch.isComplete) served = true
    let far = reserveStep
    for (const candidate of this.#candidates.values()) {
      if (this.#dialled >= connectionsMax) return
      const { host, peer } = candidate
      const other = host.fetches[this.blob.index]
      if (candidate.nextMs > now || other === undefined || this.sides.has(other)) continue
      if (!this.#reach.mayDial(peer, served, now)) continue
      if (peer.reserve && far-- <= 0) continue
      if (host.isAlive && other.isRunning && other.sides.size < 2 * connectionsMax) {
        candidate.failures = 0
        this.#connect(other, peer.distance)
      } else {
        candidate.nextMs = now + redialAfterMs(candidate.failures++)
      }
    }
  }

  #connect(other: Fetch, distance: number): void {
    const mine = new Side(this, other, this.host.isStandard ? 0 : distance, this.#world.network)
    // Whoever is dialled takes the distance from the place that the other one shows.
    const theirs = new Side(other, this, other.host.isStandard ? 0 : distance, this.#world.network)
    mine.peer = theirs
    theirs.peer = mine
    mine.isDialled = true
    this.#dialled++
    this.sides.set(other, mine)
    other.sides.set(this, theirs)
    this.joined(mine)
    other.joined(theirs)
  }

  joined(side: Side): void {
    side.movedAtMs = side.usefulAtMs = this.#world.nowMs()
    if (side.distance === 0) this.turns.neighbours++
    if (this.#picker === undefined || this.isComplete) return
    this.#seat(side, this.#picker.join(side.distance))
    const other = side.peer.fetch
    if (other.#superSeeder) {
      for (let piece = 0; piece < this.blob.pieceCount; piece++)
        if (this.have[piece] === 1) other.#superSeeder.gained(side.peer, piece)
      other.#superSeeder.join(side.peer)
      other.#showMore(side.peer)
      return
    }
    if (side.picking) {
      if (other.isComplete) this.#picker.gainsAll(side.picking)
      else
        for (let piece = 0; piece < this.blob.pieceCount; piece++)
          if (other.have[piece] === 1) this.#picker.gains(side.slot, piece)
    }
    this.#interest(side)
    this.pump(side)
  }

  #seat(side: Side, picking: PickerPeer): void {
    const { slot } = picking
    if (slot >= slotsMax) throw new Error(`More than ${slotsMax} peers are connected`)
    side.picking = picking
    side.slot = slot
    this.#slotsEnd = Math.max(this.#slotsEnd, slot + 1)
    this.#sideAt[slot] = side
    const { fetch: other, slot: theirSlot } = side.peer
    const seat = slot * seatWords
    this.#seats[seat + Seat.other] = other.number
    this.#seats[seat + Seat.theirSlot] = theirSlot
    this.#seats[seat + Seat.is] =
      (side.distance === 0 ? SeatIs.near : SeatIs.far) | (side.peer.distance === 0 ? 0 : SeatIs.goesFar)
    this.#seats[seat + Seat.asked] = 0
    if (theirSlot >= 0) other.#seats[theirSlot * seatWords + Seat.theirSlot] = slot
    const bit = 1 << (slot & 31)
    const word = slot >> 5
    this.#present[word] = (this.#present[word] ?? 0) | bit
    // The only seed counts what its peers have.
    if (side.isMixed || other.isOnlySeed) this.#always[word] = (this.#always[word] ?? 0) | bit
  }

  #unseat(side: Side, picking: PickerPeer): void {
    this.#hearAll()
    const { slot } = side
    const word = slot >> 5
    const bit = ~(1 << (slot & 31))
    this.#sideAt[slot] = undefined
    this.#seats[slot * seatWords + Seat.is] = 0
    const { fetch: other, slot: theirSlot } = side.peer
    if (theirSlot >= 0) other.#seats[theirSlot * seatWords + Seat.theirSlot] = -1
    this.#present[word] = (this.#present[word] ?? 0) & bit
    this.#always[word] = (this.#always[word] ?? 0) & bit
    this.#picker?.leave(picking)
    side.picking = undefined
    side.slot = -1
  }

  get isOnlySeed(): boolean {
    return this.#superSeeder !== undefined
  }

  /** `side` is this one's of the connection to who fetches. */
  #showMore(side: Side): void {
    const seeder = this.#superSeeder
    if (seeder === undefined) return
    const { peer } = side
    if (seeder.isOver) {
      this.#superSeeder = undefined
      for (const other of this.sides.values())
        for (const piece of seeder.hiddenFrom(other)) other.peer.fetch.gained(other.peer, piece)
      return
    }
    const nowMs = this.#world.nowMs()
    const pieces = seeder.next(side, {
      ahead: shownAhead(peer.meter, this.blob.pieceLength),
      stillForMs: nowMs - peer.movedAtMs,
      nowMs,
    })
    for (const piece of pieces) peer.fetch.gained(peer, piece)
  }

  /** Who fetches has a piece. */
  #sees(side: Side, piece: number): void {
    if (this.#superSeeder === undefined) return
    this.#superSeeder.gained(side, piece)
    this.#showMore(side)
  }

  parted(side: Side): void {
    this.sides.delete(side.peer.fetch)
    if (side.distance === 0) this.turns.neighbours--
    this.turns.leave(side)
    this.sent()
    this.#superSeeder?.leave(side)
    if (side.isDialled) this.#dialled--
    if (!side.peer.isChoked) this.#choke(side.peer)
    this.#forget(side)
  }

  #forget(side: Side): void {
    side.collect()
    const asks = [...side.asks]
    side.clear()
    for (const ask of asks) this.#giveBack(ask)
    this.asksChanged(side)
    side.requestedBytes = 0
    if (side.flow !== undefined) {
      this.#world.network.removeFlow(side.flow)
      side.flow = undefined
    }
    if (side.picking) this.#unseat(side, side.picking)
  }

  /** What was asked for will not come: another may be asked, the server too. */
  #giveBack(ask: Ask): void {
    this.#picker?.release(ask)
    if (this.isComplete || this.#picker?.isIdle(ask.piece) !== true) return
    this.#picker.forget(ask.piece)
    this.#begun.delete(ask.piece)
    this.turns.drop(ask.piece)
    const from = this.#claims.get(ask.piece)
    if (from === undefined) return
    this.#claims.delete(ask.piece)
    for (const { peer } of this.#toldOf(from))
      this.#world.later(1, () => {
        peer.fetch.unclaimed(peer, ask.piece)
      })
  }

  asksChanged({ slot, asks }: Side): void {
    if (slot >= 0) this.#seats[slot * seatWords + Seat.asked] = asks.length
  }

  /** Whether the other one has something that is missing, and may be asked for it. */
  #interest(side: Side): void {
    if (side.picking === undefined || this.#picker === undefined) return
    const now = this.#world.nowMs()
    if (this.#reach.mayAsk(side.distance, now) && this.#picker.interests(side.picking)) {
      this.#setInteresting(side, true)
      this.#review(side)
    } else {
      this.#disinterest(side)
    }
  }

  #setInteresting(side: Side, isInteresting: boolean): void {
    side.isInteresting = isInteresting
    if (side.slot < 0) return
    const at = side.slot * seatWords + Seat.is
    const is = this.#seats[at] ?? 0
    this.#seats[at] = isInteresting ? is | SeatIs.interesting : is & ~SeatIs.interesting
  }

  #disinterest(side: Side): void {
    this.#setInteresting(side, false)
    if (!side.isChoked) side.peer.fetch.#choke(side)
  }

  /** `side` is the other one's. */
  #choke(side: Side): void {
    side.isChoked = true
    if (!side.isMixed) return
    this.serving--
    this.#serveNext()
  }

  /** The other one serves us, a client without turns once it has a place for it. */
  #review(side: Side): void {
    if (!side.isInteresting || !side.isChoked) return
    if (side.isMixed) {
      const server = side.peer.fetch
      if (server.serving >= uploadSlots) return
      server.serving++
    }
    side.isChoked = false
  }

  #serveNext(): void {
    for (const { peer } of this.sides.values()) {
      if (!peer.isInteresting || !peer.isChoked || peer.fetch.isComplete) continue
      this.serving++
      peer.isChoked = false
      peer.fetch.pump(peer)
      return
    }
  }

  /** Tells who sits there of a piece more; it is heard at the end of the step. */
  #tell(slot: number, piece: number): void {
    const seat = slot * seatWords
    const other = this.#seats[seat + Seat.other] ?? 0
    const theirSlot = this.#seats[seat + Seat.theirSlot] ?? -1
    if (theirSlot < 0) {
      const side = this.#sideAt[slot]
      if (side) side.peer.fetch.#sees(side.peer, piece)
    } else if (!this.#world.isDelayed) this.#world.tell(other, theirSlot, piece)
    else {
      // Who has everything by then sits nowhere any more.
      const listener = this.#sideAt[slot]?.peer
      this.#world.later(1, () => {
        if (listener && listener.slot >= 0) this.#world.tell(other, listener.slot, piece)
      })
    }
  }

  /** Takes what it was told, and asks for it where that is said. */
  #hearAll(asks = false): void {
    this.#asksAsItHears = asks
    this.#world.news.takeAll(this.number, this.#hears)
  }

  /**
   * At the end of a step in which it was told something, or something came: so what one host needs is looked at together. Where there is no room
   * for more, what it was told waits until there is.
   */
  wake(): void {
    const now = this.#world.nowMs()
    const near = this.turns.at(0).coming
    const far = this.turns.at(distanceUnknown).coming
    if (
      !this.#hasCome &&
      !near.hasRoom(now) &&
      !(this.#reach.mayAsk(distanceUnknown, now) && far.hasRoom(now))
    )
      return
    this.#hearAll(true)
    if (!this.#hasCome) return
    this.#hasCome = false
    this.fill()
  }

  /** The other one has a piece more. */
  gained(side: Side, piece: number): void {
    this.#asksAsItHears = true
    if (side.slot >= 0 && this.#picker) this.#gained(this.#picker, side.slot, piece)
  }

  #gained(picker: Picker, slot: number, piece: number): void {
    const mayBegin = picker.gains(slot, piece)
    const isInteresting = ((this.#seats[slot * seatWords + Seat.is] ?? 0) & SeatIs.interesting) !== 0
    if (isInteresting && !(mayBegin && this.#asksAsItHears)) return
    const now = this.#world.nowMs()
    if (isInteresting && this.#isInVain(picker, slot, now)) return
    const side = this.#sideAt[slot]
    if (side === undefined) return
    if (!isInteresting) {
      if (this.have[piece] === 1 || !this.#reach.mayAsk(side.distance, now)) return
      this.#setInteresting(side, true)
      this.#review(side)
    }
    if (mayBegin && this.#asksAsItHears && side.coming.hasRoom(now)) this.pump(side)
  }

  /** The other one has everything now. */
  gainedAll(side: Side): void {
    if (side.picking === undefined || this.#picker === undefined) return
    this.#picker.gainsAll(side.picking)
    if (!side.isInteresting) this.#interest(side)
  }

  claimed(side: Side, piece: number): void {
    if (side.picking) this.#picker?.claimed(side.picking, piece, this.#world.nowMs())
  }

  unclaimed(side: Side, piece: number): void {
    if (side.picking) this.#picker?.unclaimed(side.picking, piece)
  }

  /** Asks for pieces while there is room, each of who is asked for the least. */
  fill(): void {
    const now = this.#world.nowMs()
    const picker = this.#picker
    if (this.isComplete || picker === undefined) return
    const count = this.#slotsEnd
    const near = this.turns.at(0).coming
    const far = this.turns.at(distanceUnknown).coming
    let nearRoom = near.hasRoom(now)
    let farRoom = far.hasRoom(now)
    for (let depth = 0; depth < atOnceMax; depth++) {
      let deeper = false
      const start = Math.floor(this.#world.random() * count)
      for (let i = 0; i < count; i++) {
        if (!nearRoom && !farRoom) return
        const slot = start + i < count ? start + i : start + i - count
        const is = this.#seats[slot * seatWords + Seat.is] ?? 0
        const asked = this.#seats[slot * seatWords + Seat.asked] ?? 0
        if (asked < depth || !((is & SeatIs.near) !== 0 ? nearRoom : (is & SeatIs.far) !== 0 && farRoom))
          continue
        if (asked > depth) {
          deeper = true
          continue
        }
        if ((is & SeatIs.interesting) === 0) continue
        if (this.#isInVain(picker, slot, now)) continue
        const side = this.#sideAt[slot]
        if (side === undefined || !this.pump(side)) continue
        deeper = true
        nearRoom = near.hasRoom(now)
        farRoom = far.hasRoom(now)
      }
      if (!deeper) return
    }
  }

  /** There may be room for another piece to send. */
  sent(): void {
    const { busyUntilMs } = this.#world
    busyUntilMs[2 * this.number] = busyUntilMs[2 * this.number + 1] = 0
  }

  /** Where `busyUntilMs` says whether the other one has room for this one. */
  #busyAt(slot: number): number {
    const seat = slot * seatWords
    return (
      2 * (this.#seats[seat + Seat.other] ?? 0) +
      (((this.#seats[seat + Seat.is] ?? 0) & SeatIs.goesFar) === 0 ? 0 : 1)
    )
  }

  /** Nothing can be begun with who sits there. */
  #isInVain(picker: Picker, slot: number, now: number): boolean {
    if (!this.#nothingBegun(picker)) return false
    if ((this.#world.busyUntilMs[this.#busyAt(slot)] ?? 0) > now) return true
    return picker.isBarren(slot) && !this.#reach.isStuck(now)
  }

  /** Then the picker would look at all that was begun, and find nothing. */
  #nothingBegun(picker: Picker): boolean {
    return !picker.hasFree && !this.#hasLate && picker.untouched > 0
  }

  /** Asks a peer for a piece: see `Torrent` in agent/engine. */
  pump(side: Side): boolean {
    const picker = this.#picker
    if (this.isComplete || picker === undefined || side.picking === undefined) return false
    if (side.isChoked || !side.isInteresting) return false
    const now = this.#world.nowMs()
    if (!this.#reach.mayAsk(side.distance, now)) return false
    if (side.requestedBytes > 0 && isAskedEnough(side.requestedBytes, side.meter.rate)) return false
    const nothingBegun = this.#nothingBegun(picker)
    if (nothingBegun && picker.isBarren(side.slot) && !this.#reach.isStuck(now)) return false
    const going = side.peer.going
    const coming = side.coming
    let mayBegin = this.#begun.size < this.#begunMax && coming.hasRoom(now)
    if (mayBegin && !going.hasRoom(now)) {
      mayBegin = false
      this.#world.busyUntilMs[this.#busyAt(side.slot)] = going.fullUntilMs
    }
    if (!mayBegin && nothingBegun) return false
    const options: PickOptions = {
      peer: side.picking,
      bytesMax: this.blob.pieceLength,
      mayBegin,
      anything: this.#reach.isStuck(now),
      refuses: (piece) => going.isTaken(piece, side.peer, now),
      nowMs: now,
    }
    const ask = picker.next(options) ?? this.#hedge(picker, options, side, now)
    if (ask === undefined) return false
    if (!this.#begun.has(ask.piece)) {
      this.#begun.add(ask.piece)
      this.#tellClaim(ask.piece, side.distance)
    }
    coming.begin(ask.piece, side, now)
    going.begin(ask.piece, side.peer, now)
    ask.askedMs = now
    ask.dueMs = now + dueInMs(side.requestedBytes + ask.length, side.meter.rate)
    this.#send(side, ask)
    return true
  }

  #hedge(picker: Picker, options: PickOptions, side: Side, now: number): Ask | undefined {
    const { rate } = side.meter
    // Nothing else is asked for twice, and looking for it at each turn would be most of the work.
    if (picker.untouched > 0 && !this.#hasLate) return undefined
    const readyMs = now + hedgeInMs(side.requestedBytes + options.bytesMax, rate, picker.untouched)
    return picker.hedge(options, readyMs)
  }

  #claimAgain(nowMs: number): void {
    if (nowMs - this.#claimedAtMs < claimAgainMs) return
    this.#claimedAtMs = nowMs
    for (const [piece, from] of this.#claims)
      if (this.#picker?.isAsked(piece) === true) this.#tellClaim(piece, from)
  }

  #tellClaim(piece: number, from: number): void {
    if (from === 0) return
    this.#claims.set(piece, from)
    for (const { peer } of this.#toldOf(from))
      this.#world.later(1, () => {
        peer.fetch.claimed(peer, piece)
      })
  }

  /** Agents that are nearer than where a piece comes from. */
  #toldOf(from: number): Side[] {
    return [...this.sides.values()].filter(
      ({ distance, peer }) => distance < from && !peer.fetch.isComplete && !peer.fetch.host.isStandard,
    )
  }

  #send(side: Side, ask: Ask): void {
    side.collect()
    if (side.asks.length === 0) side.movedAtMs = this.#world.nowMs()
    side.requestedBytes += ask.length
    side.flow ??= this.#world.addFlow(side, wayBetween(side.peer.fetch.host, this.host), this.host.rack)
    side.add(ask)
    this.asksChanged(side)
    if (side.isUnderWay) return
    // The request has a way to go, and then the bytes.
    this.#world.later(2, () => {
      if (side.asks[0] === ask) side.begin()
    })
  }

  /** What a side has brought. */
  received(side: Side, ask: Ask): void {
    const picker = this.#picker
    const now = this.#world.nowMs()
    side.movedAtMs = this.#movedAtMs = this.#givenAtMs = now
    side.requestedBytes -= ask.length
    side.meterAll(ask)
    this.downloaded += ask.length
    side.peer.going.end(ask.piece, now, side.peer)
    side.peer.fetch.sent()
    if (picker === undefined) return
    this.#take(picker, ask)
    this.#hasCome = true
    this.#world.wakeLater(this.number)
  }

  #take(picker: Picker, ask: Ask): void {
    const { whole, surplus } = picker.received(ask)
    for (const other of surplus) {
      picker.release(other)
      const slower = this.#sideAt[other.peer.slot]
      if (slower) withdraw(slower, other)
    }
    if (whole) this.#verified(picker, ask.piece)
  }

  #verified(picker: Picker, piece: number): void {
    this.#begun.delete(piece)
    this.#claims.delete(piece)
    this.turns.came(piece, this.#world.nowMs())
    picker.done(piece)
    if (this.have[piece] === 1) return
    this.have[piece] = 1
    this.count++
    // Agents do not tell each other of what they have both.
    this.#hearAll()
    for (let word = 0; 32 * word < this.#slotsEnd; word++) {
      let bits = (this.#present[word] ?? 0) & (~picker.holders(piece, word) | (this.#always[word] ?? 0))
      for (; bits !== 0; bits &= bits - 1) this.#tell(32 * word + 31 - Math.clz32(bits & -bits), piece)
    }
    if (this.count === this.blob.pieceCount) this.#finish()
  }

  #finish(): void {
    this.isComplete = true
    this.finishedMs = this.#world.nowMs()
    this.#endWebseed()
    this.#candidates.clear()
    this.#begun.clear()
    for (const side of [...this.sides.values()]) {
      this.#forget(side)
      this.#disinterest(side)
      if (side.peer.fetch.isComplete) disconnect(side)
      else
        this.#world.later(1, () => {
          side.peer.fetch.gainedAll(side.peer)
        })
    }
    this.#picker = undefined
    this.#world.finished(this)
  }

  /** A run of pieces for the webseed, and what to do with them. */
  claimRun(lane: WebseedLane): Ask[] | undefined {
    const picker = this.#picker
    if (this.#endingLanes.delete(lane)) {
      lane.end()
      return undefined
    }
    if (picker === undefined || this.isComplete) return undefined
    const nowMs = this.#world.nowMs()
    if (nowMs < this.#webseedFromMs || this.#lanes.some((other) => !other.endsSoon(nowMs))) return undefined
    this.#hearAll()
    const within = this.#webseed?.range
    const run = picker.untouchedRun({
      within,
      piecesMax: Math.max(1, Math.floor(webseedRequestBytes / this.blob.pieceLength)),
      anything: nowMs - this.#givenAtMs > webseedAfterMs,
      nowMs,
    })
    if (run === undefined) {
      if (within) this.#webseed?.rangeDone()
      return undefined
    }
    const asks = Array.from({ length: run.count }, (_, i) => picker.takeWhole(run.first + i, nowMs))
    for (const { piece } of asks) this.#tellClaim(piece, distanceUnknown)
    return asks
  }

  webseedGave(ask: Ask): void {
    this.#movedAtMs = this.#world.nowMs()
    this.downloaded += ask.length
    if (this.#picker && this.have[ask.piece] === 0) this.#take(this.#picker, ask)
  }

  giveBack(asks: readonly Ask[]): void {
    for (const ask of asks) this.#giveBack(ask)
  }
}

/** What a host gets from another, over their connection. */
export class Side extends AskQueue {
  readonly fetch: Fetch
  readonly distance: number
  /** What the other one gets. */
  declare peer: Side
  readonly meter: RateMeter
  readonly going
  readonly coming
  picking: PickerPeer | undefined
  /** Of the peer in the picker; -1 where there is none. */
  slot = -1
  requestedBytes = 0
  isDialled = false
  isInteresting = false
  isChoked = true
  movedAtMs = 0
  seenLeft = 0
  usefulAtMs = 0
  /** Of the request that comes first: what the meter has counted already. */
  #metered: Ask | undefined
  #meteredBytes = 0
  /** One of the two is a standard client. */
  readonly isMixed: boolean

  constructor(fetch: Fetch, other: Fetch, distance: number, network: Network) {
    super(network)
    this.fetch = fetch
    this.isMixed = fetch.host.isStandard || other.host.isStandard
    this.distance = distance
    this.meter = new RateMeter(0)
    const { going, coming } = fetch.turns.at(distance)
    this.going = going
    this.coming = coming
  }

  /** So many bytes are left of what comes first; what has come of it counts. */
  meterFirst(left: number): void {
    const [ask] = this.asks
    if (ask === undefined) return
    if (ask !== this.#metered) this.#meteredBytes = 0
    this.#metered = ask
    const bytes = Math.max(this.#meteredBytes, ask.length - left)
    this.meter.add(bytes - this.#meteredBytes)
    this.#meteredBytes = bytes
  }

  /** It is there. */
  meterAll(ask: Ask): void {
    this.meter.add(ask === this.#metered ? ask.length - this.#meteredBytes : ask.length)
    this.#metered = undefined
  }

  override collect(): void {
    const { length } = this.asks
    super.collect()
    if (this.asks.length !== length) this.fetch.asksChanged(this)
  }

  came(ask: Ask): void {
    this.fetch.received(this, ask)
  }
}

/** One of the requests that a host has open with the webseed. */
class WebseedLane extends AskQueue {
  readonly #fetch: Fetch
  readonly #world: World
  #bytes = 0
  #startedAtMs = 0

  constructor(fetch: Fetch, source: readonly LinkId[], world: World) {
    super(world.network)
    this.#fetch = fetch
    this.#world = world
    this.flow = world.addFlow(this, [...source, ...fetch.host.down], fetch.host.rack)
  }

  get isIdle(): boolean {
    return this.asks.length === 0
  }

  /** Whether there is nothing to wait for. */
  endsSoon(nowMs: number): boolean {
    if (this.isIdle || this.flow === undefined) return true
    const received = this.#bytes - this.#world.network.leftOf(this.flow)
    return endsSoon({ bytes: this.#bytes, startedAtMs: this.#startedAtMs, received }, nowMs)
  }

  goOn(): void {
    if (!this.isIdle) return
    const asks = this.#fetch.claimRun(this) ?? []
    for (const ask of asks) this.add(ask)
    this.#bytes = bytesOf(asks)
    this.#startedAtMs = this.#world.nowMs()
    this.begin()
  }

  override settle(): void {
    super.settle()
    if (!this.#fetch.isComplete) this.goOn()
  }

  came(ask: Ask): void {
    this.#fetch.webseedGave(ask)
  }

  cut(): void {
    this.#fetch.giveBack(this.asks)
    this.clear()
  }

  end(): void {
    this.cut()
    if (this.flow !== undefined) this.#world.network.removeFlow(this.flow)
    this.flow = undefined
  }
}

function bytesOf(asks: readonly Ask[]): number {
  return asks.reduce((sum, { length }) => sum + length, 0)
}

function disconnect(side: Side): void {
  side.fetch.parted(side)
  side.peer.fetch.parted(side.peer)
}

function withdraw(side: Side, ask: Ask): void {
  if (!side.drop(ask)) return
  side.fetch.asksChanged(side)
  side.requestedBytes -= ask.length
  if (!side.peer.going.has(ask.piece, side.peer)) return
  side.peer.going.drop(ask.piece)
  side.peer.fetch.sent()
}

function wayBetween(from: Host, to: Host): LinkId[] {
  // The first link is the host's own, then the rack's, then the row's: what both are below of is not passed.
  const up: LinkId[] = []
  const down: LinkId[] = []
  for (let i = 0; i < from.up.length; i++) {
    if (i > 0 && from.up[i] === to.up[i]) break
    const above = from.up[i]
    const below = to.down[i]
    if (above !== undefined) up.push(above)
    if (below !== undefined) down.push(below)
  }
  return [...up, ...down]
}
