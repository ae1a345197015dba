import { formatAddress, formatIp } from '../../lib/protocol/address.ts'
import type { Admitted } from './engine.ts'
import type { Busy, ExtendedHandshake } from './extended.ts'
import {
  busyExtensionId,
  claimExtensionId,
  extendedHandshakeId,
  readBusy,
  readClaim,
  readExtendedHandshake,
  unclaimExtensionId,
  writeBusy,
  writeClaim,
} from './extended.ts'
import type { Limiter } from './limiter.ts'
import type { Link } from './link.ts'
import { readBuffer } from './link.ts'
import type { Ask, PickerPeer } from './picker.ts'
import { RateMeter } from './rate-meter.ts'
import type { Lease } from './read-cache.ts'
import type { Block, Handshake, WireHandler } from './wire.ts'
import {
  blockBytes,
  messages,
  ownBlockBytes,
  WireError,
  WireReader,
  writeBlock,
  writeBlockHead,
  writeExtended,
  writePiece,
  writeSimple,
} from './wire.ts'

/** Requests that a peer may have open with us, told in the extended handshake (`reqq`). */
export const requestsMax = 512
/** Not every client looks at `reqq`, and an entry here is no more than three numbers. */
const owedMax = 16 * requestsMax
/**
 * Bytes that lie in a socket and in blocks that were read for it: what the peer takes in this long, within bounds. Enough to keep the socket busy
 * while the event loop is away, and no more, since what we have to say to the peer waits behind them.
 */
const sendingMs = 100
const sendingBytesMin = 64 * 1024
const sendingBytesMax = 1024 * 1024

/** Answers wait for a peer that does not read them; more than this is an attack. */
const unreadBytesMax = 4 * 1024 * 1024

/** Of a peer that sends large blocks little is read but their heads: the rest goes where it belongs. */
const headBuffer = readBuffer.subarray(0, 16 * 1024)

/** What a connection tells its torrent, and asks of it. */
export interface PeerHost {
  readonly pieceCount: number
  pieceSize(piece: number): number
  /** The peer has said something about itself that may change what is asked of it, or given to it. */
  changed(peer: Peer): void
  gained(peer: Peer, piece: number): void
  /** All that the peer has, as a bitfield of the wire. */
  gainedThese(peer: Peer, bits: Uint8Array): void
  introduced(peer: Peer, handshake: ExtendedHandshake): void
  claimed(peer: Peer, pieces: readonly number[]): void
  unclaimed(peer: Peer, pieces: readonly number[]): void
  /** The peer has no turn for what it was asked, and says why. */
  busy(peer: Peer, busy: Busy): void
  /** Where the bytes of a block go; undefined: they are dropped. */
  targetOf(ask: Ask): Uint8Array | undefined
  received(peer: Peer, ask: Ask): void
  /** The peer will not send these blocks. */
  refused(peer: Peer, asks: readonly Ask[]): void
  /** A piece that may be given away. */
  offers(piece: number): boolean
  /** Whether a peer has, or gets, its turn for a piece. */
  mayGive(peer: Peer, block: Block): boolean
  gave(peer: Peer, block: Block): void
  /** The peer wants nothing more of a piece. */
  tookBack(peer: Peer, piece: number): void
  read(block: Block, done: (lease: Lease | undefined, error?: Error) => void): void
  closed(peer: Peer): void
}

/** One connection of a torrent: its state, what was asked over it, and what it has to be given. */
export class Peer implements WireHandler {
  readonly link: Link
  /** `ip:port`; the port of an incoming connection is the one it came from. */
  readonly source: string
  readonly handshake: Handshake
  readonly openedAtMs: number
  readonly download: RateMeter
  readonly upload: RateMeter
  /** Set once it takes part. */
  picking: PickerPeer | undefined
  /** 0 same rack … 255 unknown. */
  distance: number
  introduction: ExtendedHandshake | undefined
  /** Its token is being looked at. */
  checking = false
  /** What its token says of it. */
  proven: Admitted | undefined
  /** Until when it may take part, milliseconds since 1970. */
  admittedUntilMs = Infinity
  choked = true
  choking = true
  interestedInUs = false
  interesting = false
  /** What was asked of it and is not here, oldest first. */
  readonly asks = new Set<Ask>()
  requestedBytes = 0
  owedBytes = 0
  /** When the last bytes of a block came, or the first of the blocks under way was asked for. */
  movedAtMs: number
  /** When it last took a byte of a block, or joined. */
  sentAtMs: number
  /** When one of the two last wanted something of the other. */
  usefulAtMs: number
  /** Refusals since it last gave a block, of which piece the last one was, and until when it is not asked again. */
  refusals = 0
  refusedPiece: number | undefined
  askAgainMs = 0
  /** It has no turn for us, and says when it has one. */
  willCall = false
  /** When it was last told what is being sent to others. */
  toldBusyAtMs = -Infinity
  /** Pieces that it is sending to others, and until when it is not asked for them. */
  readonly busyWith = new Map<number, number>()
  timer: NodeJS.Timeout | undefined
  closedWhy: string | undefined
  readonly #host: PeerHost
  readonly #limiter: Limiter
  readonly #now: () => number
  readonly #reader: WireReader
  readonly #owed: Block[] = []
  #sendingBytes = 0
  #reading = false
  #serveTimer: NodeJS.Timeout | undefined
  #out: Uint8Array[] = []
  #flushing = false
  #coming: Ask | undefined
  #bitfieldPending: Uint8Array | undefined

  constructor(
    link: Link,
    handshake: Handshake,
    options: {
      readonly host: PeerHost
      readonly limiter: Limiter
      readonly distance: number
      readonly now: () => number
    },
  ) {
    this.link = link
    this.handshake = handshake
    this.distance = options.distance
    this.#host = options.host
    this.#limiter = options.limiter
    this.#now = options.now
    const now = options.now()
    this.openedAtMs = this.movedAtMs = this.sentAtMs = this.usefulAtMs = now
    this.download = new RateMeter(now)
    this.upload = new RateMeter(now)
    this.source = formatAddress(link.ip, link.port)
    this.#reader = new WireReader(this, options.host.pieceCount, ownBlockBytes)
    link.socket.once('close', () => {
      this.close('it closed the connection')
    })
  }

  /** Takes what comes from now on, and what came already. */
  start(rest: Uint8Array): void {
    this.link.receive = (bytes) => {
      this.#push(bytes)
    }
    this.link.buffer = () =>
      this.#reader.lend() ?? (this.blockBytesMax > blockBytes ? headBuffer : readBuffer)
    if (rest.length > 0) this.#push(rest)
  }

  get blockBytesMax(): number {
    return this.introduction?.own?.blockBytesMax ?? blockBytes
  }

  get peerRequestsMax(): number {
    return this.introduction?.requestsMax ?? 250
  }

  get hostName(): string | undefined {
    return this.proven?.host ?? this.introduction?.own?.host
  }

  /** It is an agent that looks for pieces, and so does not have to hear of what it has. */
  get knowsOwnPieces(): boolean {
    const own = this.introduction?.own
    return own !== undefined && !own.isSeed
  }

  get placeName(): string | undefined {
    return this.proven?.place ?? this.introduction?.own?.place
  }

  /** What bans and statistics know it by: for an incoming connection, whose port means nothing, address and peer id. */
  get sender(): string {
    return this.link.incoming
      ? `${formatIp(this.link.ip)}|${Buffer.from(this.handshake.peerId).toString('latin1')}`
      : this.source
  }

  // What we say.

  send(message: Uint8Array): void {
    if (this.closedWhy !== undefined) return
    this.#out.push(message)
    if (this.#flushing) return
    this.#flushing = true
    process.nextTick(() => {
      this.#flush()
    })
  }

  ask(ask: Ask): void {
    if (this.asks.size === 0) this.movedAtMs = this.#now()
    this.asks.add(ask)
    this.requestedBytes += ask.length
    this.send(writeBlock(messages.request, ask))
  }

  /** Which pieces it is sending to others, of those that are not begun. */
  isBusyWith(nowMs: number): (piece: number) => boolean {
    for (const [piece, untilMs] of this.busyWith) if (untilMs <= nowMs) this.busyWith.delete(piece)
    return (piece) => this.busyWith.has(piece)
  }

  /** Takes a request back that another peer has answered. */
  withdraw(ask: Ask): void {
    if (!this.#forgetAsk(ask)) return
    if (ask === this.#coming) this.#dropComing()
    this.send(writeBlock(messages.cancel, ask))
  }

  setInteresting(interesting: boolean): void {
    if (interesting === this.interesting) return
    this.interesting = interesting
    this.send(writeSimple(interesting ? messages.interested : messages.notInterested))
  }

  setChoking(choking: boolean): void {
    if (choking === this.choking) return
    this.choking = choking
    this.send(writeSimple(choking ? messages.choke : messages.unchoke))
    if (choking) this.#dropOwed()
  }

  tellHave(piece: number): void {
    this.send(writePiece(messages.have, piece))
  }

  claim(pieces: readonly number[]): void {
    this.#extend(this.introduction?.claimId, writeClaim(pieces))
  }

  unclaim(pieces: readonly number[]): void {
    this.#extend(this.introduction?.unclaimId, writeClaim(pieces))
  }

  tellBusy(busy: Busy): void {
    this.#extend(this.introduction?.busyId, writeBusy(busy))
  }

  /** @param id under which the peer takes it; undefined where it does not */
  #extend(id: number | undefined, payload: Uint8Array): void {
    if (id !== undefined) this.send(writeExtended(id, payload))
  }

  tick(nowMs: number): void {
    this.download.tick(nowMs)
    this.upload.tick(nowMs)
  }

  close(why: string): void {
    if (this.closedWhy !== undefined) return
    this.closedWhy = why
    this.link.receive = () => undefined
    clearTimeout(this.timer)
    clearTimeout(this.#serveTimer)
    this.#out = []
    this.#owed.length = 0
    this.owedBytes = 0
    this.link.socket.destroy()
    this.#host.closed(this)
  }

  // What it says.

  choke(): void {
    this.choked = true
    // With the fast extension each request is refused by itself.
    if (!this.handshake.fast) this.#refusedAll()
    this.#host.changed(this)
  }

  unchoke(): void {
    this.choked = false
    this.#host.changed(this)
  }

  interested(): void {
    this.interestedInUs = true
    this.#host.changed(this)
  }

  notInterested(): void {
    this.interestedInUs = false
    this.#host.changed(this)
  }

  have(piece: number): void {
    if (this.picking !== undefined) {
      this.#host.gained(this, piece)
      return
    }
    const bits = (this.#bitfieldPending ??= new Uint8Array(Math.ceil(this.#host.pieceCount / 8)))
    bits[piece >> 3] = (bits[piece >> 3] ?? 0) | (0x80 >> (piece & 7))
  }

  bitfield(bits: Uint8Array): void {
    if (this.picking === undefined) {
      // Not admitted yet: looked at then.
      this.#bitfieldPending = Uint8Array.from(bits)
      return
    }
    this.#host.gainedThese(this, bits)
    this.#host.changed(this)
  }

  /** Once it takes part: what it said before that it has. */
  admitted(): void {
    const bits = this.#bitfieldPending
    this.#bitfieldPending = undefined
    if (bits) this.bitfield(bits)
  }

  haveAll(): void {
    this.bitfield(new Uint8Array(Math.ceil(this.#host.pieceCount / 8)).fill(0xff))
  }

  haveNone(): void {
    // It is what we think of any peer.
  }

  request(block: Block): void {
    const { piece, offset, length } = block
    if (length === 0 || length > ownBlockBytes || offset + length > this.#host.pieceSize(piece))
      throw new WireError(`a request for ${length} bytes at ${offset} of piece ${piece}`)
    if (
      this.choking ||
      this.picking === undefined ||
      !this.#host.offers(piece) ||
      !this.#host.mayGive(this, block)
    ) {
      this.#reject(block)
      return
    }
    if (this.#owed.length >= owedMax) throw new WireError(`more than ${owedMax} requests`)
    this.#owed.push(block)
    this.owedBytes += length
    this.serve()
  }

  cancel(block: Block): void {
    const at = this.#owed.findIndex((owed) => isSame(owed, block))
    if (at < 0) return
    this.#owed.splice(at, 1)
    this.owedBytes -= block.length
    if (!this.isOwed(block.piece)) this.#host.tookBack(this, block.piece)
    this.#reject(block)
  }

  /** Whether it waits for a block of a piece. */
  isOwed(piece: number): boolean {
    return this.#owed.some((block) => block.piece === piece)
  }

  reject(block: Block): void {
    for (const ask of this.asks) {
      if (!isSame(ask, block)) continue
      this.#forgetAsk(ask)
      if (ask === this.#coming) this.#dropComing()
      this.#host.refused(this, [ask])
      return
    }
  }

  suggest(): void {
    // Which piece to ask for is decided by what the swarm needs.
  }

  allowedFast(): void {
    // Hosts that let each other wait gain nothing here.
  }

  blockStart(block: Block): Uint8Array | undefined {
    this.#coming = undefined
    // Peers answer in the order they were asked.
    for (const ask of this.asks) {
      if (!isSame(ask, block)) continue
      this.#coming = ask
      ask.isArriving = true
      return this.#host.targetOf(ask)
    }
    if (block.offset + block.length > this.#host.pieceSize(block.piece))
      throw new WireError(`${block.length} bytes at ${block.offset} of piece ${block.piece}`)
    return undefined
  }

  blockBytes(bytes: number): void {
    this.download.add(bytes)
    // What was not asked for keeps nobody from being late.
    if (this.#coming) this.movedAtMs = this.#now()
  }

  blockEnd(): void {
    const ask = this.#coming
    this.#coming = undefined
    if (ask === undefined || !this.#forgetAsk(ask)) return
    this.#host.received(this, ask)
  }

  extended(id: number, payload: Uint8Array): void {
    if (id === extendedHandshakeId) {
      this.introduction = readExtendedHandshake(payload)
      this.#host.introduced(this, this.introduction)
    } else if (id === claimExtensionId) {
      this.#host.claimed(this, readClaim(payload, this.#host.pieceCount))
    } else if (id === unclaimExtensionId) {
      this.#host.unclaimed(this, readClaim(payload, this.#host.pieceCount))
    } else if (id === busyExtensionId) {
      this.#host.busy(this, readBusy(payload, this.#host.pieceCount))
    }
  }

  // What it is given.

  /** Sends blocks that it has asked for, as far as its socket and the limits take them. */
  serve(): void {
    if (this.#reading || this.#serveTimer !== undefined) return
    const { socket } = this.link
    const { total, rate } = this.upload
    const room =
      total < sendingBytesMax || rate === 0
        ? sendingBytesMax
        : Math.min(sendingBytesMax, Math.max(sendingBytesMin, (rate * sendingMs) / 1000))
    while (this.#owed.length > 0 && this.#sendingBytes < room && this.closedWhy === undefined) {
      const waitMs = this.#limiter.waitMs('upload', this.distance)
      if (waitMs > 0) {
        this.#serveTimer = setTimeout(() => {
          this.#serveTimer = undefined
          this.serve()
        }, waitMs)
        return
      }
      const block = this.#owed.shift()
      if (block === undefined) return
      this.#limiter.take('upload', this.distance, block.length)
      this.owedBytes -= block.length
      this.#reading = true
      let late = false
      this.#host.read(block, (lease, error) => {
        this.#reading = false
        if (this.closedWhy !== undefined) {
          lease?.release()
          return
        }
        if (lease?.bytes.length !== block.length) {
          lease?.release()
          this.close(error === undefined ? 'the file is shorter than its torrent' : error.message)
          return
        }
        this.#sendBlock(block, lease)
        if (late) this.serve()
      })
      late = true
      // Goes on when the bytes are there.
      if (this.#isReading()) return
    }
    if (socket.writableCorked > 0) socket.uncork()
  }

  #isReading(): boolean {
    return this.#reading
  }

  #sendBlock(block: Block, lease: Lease): void {
    const { socket } = this.link
    this.#flush()
    if (socket.writableCorked === 0) {
      socket.cork()
      process.nextTick(() => {
        socket.uncork()
      })
    }
    this.#sendingBytes += block.length
    this.upload.add(block.length)
    socket.write(writeBlockHead(block))
    socket.write(lease.bytes, () => {
      lease.release()
      this.#sendingBytes -= block.length
      this.#host.gave(this, block)
      this.sentAtMs = this.#now()
      this.serve()
    })
  }

  #push(bytes: Uint8Array): void {
    try {
      this.#reader.push(bytes)
    } catch (error) {
      this.close(error instanceof WireError ? `it sent ${error.message}` : `failed: ${String(error)}`)
    }
  }

  #flush(): void {
    this.#flushing = false
    if (this.#out.length === 0) return
    const [first] = this.#out
    const bytes = this.#out.length === 1 && first ? first : Buffer.concat(this.#out)
    this.#out = []
    this.link.socket.write(bytes)
    if (this.link.socket.writableLength > unreadBytesMax) this.close('it does not read')
  }

  #forgetAsk(ask: Ask): boolean {
    if (!this.asks.delete(ask)) return false
    this.requestedBytes -= ask.length
    return true
  }

  /** What is still to come of a block belongs nowhere any more. */
  #dropComing(): void {
    this.#coming = undefined
    // Its memory is about to hold what another has sent, and this connection would go on writing there.
    if (this.#reader.isLending) this.close('it stopped in the middle of a block')
    else this.#reader.drop()
  }

  #refusedAll(): void {
    const asks = [...this.asks]
    this.asks.clear()
    this.requestedBytes = 0
    this.#dropComing()
    if (asks.length > 0) this.#host.refused(this, asks)
  }

  #reject(block: Block): void {
    if (this.handshake.fast) this.send(writeBlock(messages.reject, block))
  }

  #dropOwed(): void {
    const owed = this.#owed.splice(0)
    this.owedBytes = 0
    for (const block of owed) {
      this.#host.tookBack(this, block.piece)
      this.#reject(block)
    }
  }
}

function isSame(one: Block, other: Block): boolean {
  return one.piece === other.piece && one.offset === other.offset && one.length === other.length
}
