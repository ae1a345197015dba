/**
 * The peer wire protocol (BEP 3) with the fast extension (BEP 6) and extension messages (BEP 10), over TCP. `WireReader`
 * takes the bytes of a connection as they come and tells its handler what they mean; whatever is not as it should be
 * throws a WireError, and then the connection must be closed.
 */
export interface WireHandler {
  choke(): void
  unchoke(): void
  interested(): void
  notInterested(): void
  have(piece: number): void
  /** May come at any time, and again: aria2 says so what it has got. `bits` is valid during the call only; its spare bits are 0. */
  bitfield(bits: Uint8Array): void
  haveAll(): void
  haveNone(): void
  request(block: Block): void
  cancel(block: Block): void
  reject(block: Block): void
  suggest(piece: number): void
  allowedFast(piece: number): void
  /** A block begins to come: where its bytes go, exactly `length` of them. Undefined: they are dropped. */
  blockStart(block: Block): Uint8Array | undefined
  /** Bytes of the block under way that have come, dropped ones too. */
  blockBytes(bytes: number): void
  blockEnd(): void
  /** `payload` is valid during the call only. */
  extended(id: number, payload: Uint8Array): void
}

/** A range of one piece, in bytes. */
export interface Block {
  readonly piece: number
  readonly offset: number
  readonly length: number
}

export class WireError extends Error {
  override readonly name = 'WireError'
}

export const handshakeBytes = 68
/** What every client takes in one block; more closes the connection with most of them. */
export const blockBytes = 16 * 1024
/** What our own agents take in one block. */
export const ownBlockBytes = 256 * 1024
/** A client that is not ours has no use for a larger message, but for a long bitfield. */
const extendedBytesMax = 16 * 1024
/** Messages with an id that we do not know are skipped up to here. */
const unknownBytesMax = 64 * 1024

const protocol = Buffer.from('\x13BitTorrent protocol', 'latin1')

export interface Handshake {
  readonly infoHash: Uint8Array
  readonly peerId: Uint8Array
  readonly fast: boolean
  readonly extended: boolean
}

export function writeHandshake(infoHash: Uint8Array, peerId: Uint8Array): Buffer {
  const bytes = Buffer.alloc(handshakeBytes)
  protocol.copy(bytes)
  bytes[25] = 0x10
  bytes[27] = 0x04
  bytes.set(infoHash, 28)
  bytes.set(peerId, 48)
  return bytes
}

/** Whether the bytes can still become a handshake: a stranger is known by its first byte. */
export function isHandshakeStart(bytes: Uint8Array): boolean {
  return protocol.subarray(0, bytes.length).equals(bytes.subarray(0, protocol.length))
}

/** Reads `handshakeBytes` bytes. @throws WireError where they are something else */
export function readHandshake(bytes: Uint8Array): Handshake {
  if (bytes.length !== handshakeBytes || !isHandshakeStart(bytes)) throw new WireError('not a handshake')
  return {
    infoHash: Uint8Array.from(bytes.subarray(28, 48)),
    peerId: Uint8Array.from(bytes.subarray(48, 68)),
    fast: ((bytes[27] ?? 0) & 0x04) !== 0,
    extended: ((bytes[25] ?? 0) & 0x10) !== 0,
  }
}

export const messages = {
  choke: 0,
  unchoke: 1,
  interested: 2,
  notInterested: 3,
  have: 4,
  bitfield: 5,
  request: 6,
  piece: 7,
  cancel: 8,
  suggest: 13,
  haveAll: 14,
  haveNone: 15,
  reject: 16,
  allowedFast: 17,
  extended: 20,
} as const

/** The exact length of each message of a fixed length, its id included. */
const fixedLengths: Readonly<Record<number, number>> = {
  [messages.choke]: 1,
  [messages.unchoke]: 1,
  [messages.interested]: 1,
  [messages.notInterested]: 1,
  [messages.have]: 5,
  [messages.request]: 13,
  [messages.cancel]: 13,
  [messages.suggest]: 5,
  [messages.haveAll]: 1,
  [messages.haveNone]: 1,
  [messages.reject]: 13,
  [messages.allowedFast]: 5,
}

/** Reads what follows the handshake. What is held between two calls is at most the largest message that is not a block. */
export class WireReader {
  readonly #handler: WireHandler
  readonly #pieces: number
  readonly #bitfieldBytes: number
  readonly #blockBytesMax: number
  /** The start of a message that has not come whole. */
  #held = Buffer.allocUnsafeSlow(64)
  #heldBytes = 0
  /** Bytes of the block under way still to come. */
  #blockLeft = 0
  #blockTarget: Uint8Array | undefined
  #blockAt = 0
  #skip = 0
  readonly #lentBytesMin: number
  #lent = false

  /** `blockBytesMax`: the longest block that is taken; of less than `lentBytesMin` bytes of it nothing is lent. */
  constructor(handler: WireHandler, pieces: number, blockBytesMax: number, lentBytesMin = 32 * 1024) {
    this.#lentBytesMin = lentBytesMin
    this.#handler = handler
    this.#pieces = pieces
    this.#bitfieldBytes = Math.ceil(pieces / 8)
    this.#blockBytesMax = blockBytesMax
  }

  /**
   * Where the next bytes may be read to at once: what is left of the block under way, if that is much. It is lent until the next `push`: the
   * bytes that come first are written there, whatever happens meanwhile.
   */
  lend(): Uint8Array | undefined {
    if (this.#blockTarget === undefined || this.#blockLeft < this.#lentBytesMin) return undefined
    this.#lent = true
    return this.#blockTarget.subarray(this.#blockAt, this.#blockAt + this.#blockLeft)
  }

  get isLending(): boolean {
    return this.#lent
  }

  /** What is left of the block under way is dropped. What is lent cannot be taken back. */
  drop(): void {
    this.#blockTarget = undefined
  }

  /** @throws WireError; and whatever the handler throws */
  push(chunk: Uint8Array): void {
    const lent = this.#lent
    this.#lent = false
    if (lent && this.#blockTarget?.buffer === chunk.buffer) {
      this.#count(chunk.length)
      return
    }
    let at = 0
    while (at < chunk.length) {
      if (this.#blockLeft > 0) at = this.#readBlock(chunk, at)
      else if (this.#skip > 0) {
        const skipped = Math.min(this.#skip, chunk.length - at)
        this.#skip -= skipped
        at += skipped
      } else if (this.#heldBytes > 0) at = this.#readHeld(chunk, at)
      else {
        const next = this.#readMessage(chunk, at, chunk.length)
        if (next < 0) {
          this.#hold(chunk, at, chunk.length)
          return
        }
        at = next
      }
    }
  }

  #hold(chunk: Uint8Array, start: number, end: number): void {
    const bytes = end - start
    if (this.#heldBytes + bytes > this.#held.length) {
      const larger = Buffer.allocUnsafeSlow(Math.max(2 * this.#held.length, this.#heldBytes + bytes))
      this.#held.copy(larger, 0, 0, this.#heldBytes)
      this.#held = larger
    }
    this.#held.set(chunk.subarray(start, end), this.#heldBytes)
    this.#heldBytes += bytes
  }

  /** Completes the message that has begun in an earlier chunk. */
  #readHeld(chunk: Uint8Array, at: number): number {
    const wanted = wantedBytes(this.#held, this.#heldBytes) - this.#heldBytes
    const end = Math.min(at + wanted, chunk.length)
    this.#hold(chunk, at, end)
    const read = this.#readMessage(this.#held, 0, this.#heldBytes)
    if (read >= 0) {
      this.#heldBytes = 0
      if (this.#held.length > 4096) this.#held = Buffer.allocUnsafeSlow(64)
    }
    return end
  }

  #readBlock(chunk: Uint8Array, at: number): number {
    const bytes = Math.min(this.#blockLeft, chunk.length - at)
    if (this.#blockTarget) {
      this.#blockTarget.set(bytes === chunk.length ? chunk : chunk.subarray(at, at + bytes), this.#blockAt)
    }
    this.#count(bytes)
    return at + bytes
  }

  /** Bytes of the block under way are where they belong. */
  #count(bytes: number): void {
    this.#blockAt += bytes
    this.#blockLeft -= bytes
    this.#handler.blockBytes(bytes)
    if (this.#blockLeft > 0) return
    this.#blockTarget = undefined
    this.#handler.blockEnd()
  }

  /** @returns where the message ends, or where the bytes of its block begin; -1 where more bytes are needed */
  #readMessage(bytes: Uint8Array, at: number, end: number): number {
    if (end - at < 4) return -1
    const length = uint32(bytes, at)
    if (length === 0) return at + 4
    if (end - at < 5) {
      // No message that we take is as long: not waited for.
      if (length > Math.max(this.#blockBytesMax + 9, this.#bitfieldBytes + 1, unknownBytesMax))
        throw new WireError(`a message of ${length} bytes`)
      return -1
    }
    const id = bytes[at + 4] ?? 0
    const fixed = fixedLengths[id]
    if (fixed === undefined) {
      if (id === messages.piece) return this.#startBlock(bytes, at, end, length)
      if (id !== messages.bitfield && id !== messages.extended) {
        if (length > unknownBytesMax) throw new WireError(`a message ${id} of ${length} bytes`)
        this.#skip = length - 1
        return at + 5
      }
      const max = id === messages.bitfield ? this.#bitfieldBytes + 1 : extendedBytesMax
      if (length > max) throw new WireError(`a message ${id} of ${length} bytes`)
    } else if (length !== fixed) {
      throw new WireError(`a message ${id} of ${length} bytes`)
    }
    if (end - at < 4 + length) return -1
    this.#tell(id, bytes, at + 5, at + 4 + length)
    return at + 4 + length
  }

  #startBlock(bytes: Uint8Array, at: number, end: number, length: number): number {
    if (length < 10 || length > this.#blockBytesMax + 9)
      throw new WireError(`a block message of ${length} bytes`)
    if (end - at < 13) return -1
    const block = {
      piece: this.#piece(bytes, at + 5),
      offset: uint32(bytes, at + 9),
      length: length - 9,
    }
    this.#blockTarget = this.#handler.blockStart(block)
    this.#blockLeft = block.length
    this.#blockAt = 0
    return at + 13
  }

  #tell(id: number, bytes: Uint8Array, at: number, end: number): void {
    const handler = this.#handler
    switch (id) {
      case messages.choke:
        handler.choke()
        break
      case messages.unchoke:
        handler.unchoke()
        break
      case messages.interested:
        handler.interested()
        break
      case messages.notInterested:
        handler.notInterested()
        break
      case messages.have:
        handler.have(this.#piece(bytes, at))
        break
      case messages.bitfield:
        this.#bitfield(bytes.subarray(at, end))
        break
      case messages.haveAll:
        handler.haveAll()
        break
      case messages.haveNone:
        handler.haveNone()
        break
      case messages.request:
        handler.request(this.#block(bytes, at))
        break
      case messages.cancel:
        handler.cancel(this.#block(bytes, at))
        break
      case messages.reject:
        handler.reject(this.#block(bytes, at))
        break
      case messages.suggest:
        handler.suggest(this.#piece(bytes, at))
        break
      case messages.allowedFast:
        handler.allowedFast(this.#piece(bytes, at))
        break
      case messages.extended:
        if (at === end) throw new WireError('an extended message without an id')
        handler.extended(bytes[at] ?? 0, bytes.subarray(at + 1, end))
        break
    }
  }

  #bitfield(bits: Uint8Array): void {
    if (bits.length !== this.#bitfieldBytes) throw new WireError(`a bitfield of ${bits.length} bytes`)
    const spare = 8 * this.#bitfieldBytes - this.#pieces
    if (((bits.at(-1) ?? 0) & ((1 << spare) - 1)) !== 0)
      throw new WireError('a bitfield with more pieces than there are')
    this.#handler.bitfield(bits)
  }

  #piece(bytes: Uint8Array, at: number): number {
    const piece = uint32(bytes, at)
    if (piece >= this.#pieces) throw new WireError(`piece ${piece} of ${this.#pieces}`)
    return piece
  }

  #block(bytes: Uint8Array, at: number): Block {
    return { piece: this.#piece(bytes, at), offset: uint32(bytes, at + 4), length: uint32(bytes, at + 8) }
  }
}

/** How many bytes are to be gathered before another look makes sense. */
function wantedBytes(held: Uint8Array, heldBytes: number): number {
  if (heldBytes < 4) return 4
  if (heldBytes < 5) return 5
  return held[4] === messages.piece ? 13 : 4 + uint32(held, 0)
}

function uint32(bytes: Uint8Array, at: number): number {
  return (
    (((bytes[at] ?? 0) << 24) |
      ((bytes[at + 1] ?? 0) << 16) |
      ((bytes[at + 2] ?? 0) << 8) |
      (bytes[at + 3] ?? 0)) >>>
    0
  )
}

/** A message of an id and nothing else. */
export function writeSimple(id: number): Buffer {
  return Buffer.from([0, 0, 0, 1, id])
}

/** `have`, `suggest` and `allowedFast`. */
export function writePiece(id: number, piece: number): Buffer {
  const bytes = Buffer.alloc(9)
  bytes[3] = 5
  bytes[4] = id
  bytes.writeUInt32BE(piece, 5)
  return bytes
}

/** `request`, `cancel` and `reject`. */
export function writeBlock(id: number, block: Block): Buffer {
  const bytes = Buffer.allocUnsafe(17)
  bytes.writeUInt32BE(13, 0)
  bytes[4] = id
  bytes.writeUInt32BE(block.piece, 5)
  bytes.writeUInt32BE(block.offset, 9)
  bytes.writeUInt32BE(block.length, 13)
  return bytes
}

/** What stands before the bytes of a block. */
export function writeBlockHead(block: Block): Buffer {
  const bytes = Buffer.allocUnsafe(13)
  bytes.writeUInt32BE(9 + block.length, 0)
  bytes[4] = messages.piece
  bytes.writeUInt32BE(block.piece, 5)
  bytes.writeUInt32BE(block.offset, 9)
  return bytes
}

export function writeBitfield(bits: Uint8Array): Buffer {
  return writeMessage(messages.bitfield, bits)
}

export function writeExtended(id: number, payload: Uint8Array): Buffer {
  const body = Buffer.allocUnsafe(1 + payload.length)
  body[0] = id
  body.set(payload, 1)
  return writeMessage(messages.extended, body)
}

function writeMessage(id: number, body: Uint8Array): Buffer {
  const bytes = Buffer.allocUnsafe(5 + body.length)
  bytes.writeUInt32BE(1 + body.length, 0)
  bytes[4] = id
  bytes.set(body, 5)
  return bytes
}
