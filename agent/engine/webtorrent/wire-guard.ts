import Wire from 'bittorrent-protocol'

/** Requests that a peer may have open with us, told in the extended handshake (`reqq`): 4 MiB of blocks in flight. */
export const requestsMax = 256

/** A block of 128 KiB is the largest message that peers have use for; a bitfield of 2 million pieces is as long. */
const messageBytesMax = 256 * 1024
/** Blocks that were read for a peer and that it does not take. Honest ones stay within `requestsMax` blocks of 16 KiB. */
const unsentBytesMax = 8 * 1024 * 1024

let guarded = false

/** What is asked over connections that may not have it yet. */
const held = new WeakMap<object, (() => void)[]>()

/** From now on the requests of a peer wait. */
export function holdBack(wire: object): void {
  held.set(wire, [])
}

/** They are answered, those that waited first. */
export function letThrough(wire: { destroy(): void }): void {
  const waiting = held.get(wire) ?? []
  held.delete(wire)
  try {
    for (const answer of waiting) answer()
  } catch {
    wire.destroy()
  }
}

/**
 * Makes bittorrent-protocol fit for hostile peers: whatever a peer sends, at worst its own connection ends. An exception in its
 * parser, or in a handler of what it parsed, would otherwise end the process, and that from before the infohash is
 * looked at; a message length is taken on trust and gathered chunk by chunk; requests are answered without a bound.
 */
export function guardWires(): void {
  if (guarded) return
  guarded = true
  const { _write: write, _onMessageLength: onMessageLength, _onRequest: onRequest } = Wire.prototype
  Object.assign(Wire.prototype, {
    _write(this: Wire, data: Uint8Array, done: (error: Error | null) => void) {
      try {
        write.call(this, data, done)
      } catch {
        this.destroy()
        done(null)
      }
    },
    _onMessageLength(this: Wire, bytes: Uint8Array) {
      const length = Buffer.from(bytes.buffer, bytes.byteOffset, 4).readUInt32BE(0)
      if (length > messageBytesMax) throw new RangeError(`Cannot read a message of ${length} bytes`)
      onMessageLength.call(this, bytes)
    },
    _onRequest(this: Wire, index: number, offset: number, length: number) {
      if (length > messageBytesMax) throw new RangeError(`Cannot send a block of ${length} bytes`)
      // Twice as many: a peer may not have read yet how many it may have.
      if (this.peerRequests.length >= 2 * requestsMax || this._readableState.buffered > unsentBytesMax)
        throw new RangeError('Cannot take more requests: the peer does not read what it asked for')
      const answer = () => {
        onRequest.call(this, index, offset, length)
      }
      const waiting = held.get(this)
      if (waiting === undefined) answer()
      else if (waiting.length < 2 * requestsMax) waiting.push(answer)
      else throw new RangeError('Cannot take more requests: the peer has not shown yet that it may ask')
    },
  })
}
