import Wire from 'bittorrent-protocol'

/** Requests that a peer may have open with us, told in the extended handshake (`reqq`): 4 MiB of blocks in flight. */
export const requestsMax = 256

/** A block of 128 KiB is the largest message that peers have use for; a bitfield of 2 million pieces is as long. */
const messageBytesMax = 256 * 1024
/** Blocks that were read for a peer and that it does not take. Honest ones stay within `requestsMax` blocks of 16 KiB. */
const unsentBytesMax = 8 * 1024 * 1024

let guarded = false

/** Connections whose requests are not answered yet. */
const held = new WeakSet<object>()

/** From now on the requests of a peer are not answered. */
export function holdBack(wire: object): void {
  held.add(wire)
}

export function letThrough(wire: object): void {
  held.delete(wire)
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
      if (held.has(this)) return
      // Twice as many: a peer may not have read yet how many it may have.
      if (this.peerRequests.length >= 2 * requestsMax || this._readableState.buffered > unsentBytesMax)
        throw new RangeError('Cannot take more requests: the peer does not read what it asked for')
      onRequest.call(this, index, offset, length)
    },
  })
}
