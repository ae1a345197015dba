import { formatEndpoint } from '../lib/protocol/address.ts'
import type { EnginePeer } from './engine/engine.ts'

/** Peers remembered for a torrent; the longest unseen are forgotten first. */
const knownMax = 300
/** Peers that wait for one reader. */
const waitingMax = 500

/** What announces bring, for any number of readers; each gets the peers known so far first. */
export class PeerStream implements AsyncIterable<EnginePeer> {
  readonly #known = new Map<string, EnginePeer>()
  readonly #readers = new Set<{ waiting: EnginePeer[]; wake: () => void }>()
  #ended = false

  push(peers: readonly EnginePeer[]): void {
    for (const peer of peers) {
      const key = formatEndpoint(peer.endpoint)
      this.#known.delete(key)
      this.#known.set(key, peer)
      if (this.#known.size > knownMax) this.#known.delete(this.#known.keys().next().value ?? '')
    }
    for (const reader of this.#readers) {
      reader.waiting.push(...peers.slice(0, waitingMax - reader.waiting.length))
      reader.wake()
    }
  }

  /** Ends every reader. */
  end(): void {
    this.#ended = true
    for (const reader of this.#readers) reader.wake()
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<EnginePeer> {
    let wake = Promise.withResolvers<undefined>()
    const reader = {
      waiting: [...this.#known.values()],
      wake: () => {
        wake.resolve(undefined)
      },
    }
    this.#readers.add(reader)
    try {
      while (!this.#ended) {
        const peer = reader.waiting.shift()
        if (peer) {
          yield peer
        } else {
          await wake.promise
          wake = Promise.withResolvers()
        }
      }
    } finally {
      this.#readers.delete(reader)
    }
  }
}
