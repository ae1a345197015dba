import type { Family } from '../../../lib/protocol/address.ts'
import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import { infoHashFromBytes } from '../../../lib/protocol/infohash.ts'
import { FreeList } from './free-list.ts'
import { HashIndex, finish, mix, none } from './hash-index.ts'
import type { SharedArrays } from './shared-arrays.ts'

const wordsOfHash = 5
const emptyFirst = 0
const emptyLast = 1

/**
 * Infohashes as small numbers, and what is known of a swarm besides its peers. Swarms without peers are remembered for their
 * `downloaded` count, in a list that begins with the one that has been empty for longest.
 */
export class SwarmTable {
  readonly infoHashes: Uint32Array
  readonly roots: Readonly<Record<Family, Uint32Array>>
  readonly #downloaded: Uint32Array
  readonly #emptyNext: Uint32Array
  readonly #emptyPrevious: Uint32Array
  readonly #emptyEnds: Uint32Array
  readonly #index: HashIndex
  readonly #records: FreeList
  readonly #seed: number
  readonly #words = new Uint32Array(wordsOfHash)

  constructor(arrays: SharedArrays, options: { swarmsMax: number; seed: number }) {
    const { swarmsMax } = options
    this.infoHashes = arrays.u32('swarms.infoHashes', swarmsMax * wordsOfHash)
    this.roots = { 4: arrays.u32('swarms.roots4', swarmsMax), 6: arrays.u32('swarms.roots6', swarmsMax) }
    this.#downloaded = arrays.u32('swarms.downloaded', swarmsMax)
    this.#emptyNext = arrays.u32('swarms.emptyNext', swarmsMax)
    this.#emptyPrevious = arrays.u32('swarms.emptyPrevious', swarmsMax)
    this.#emptyEnds = arrays.u32('swarms.emptyEnds', 2)
    this.#index = new HashIndex(arrays, 'swarms.index', swarmsMax, (swarm) =>
      this.#hash(this.infoHashes, swarm * wordsOfHash),
    )
    this.#records = new FreeList(arrays, 'swarms.records', this.#emptyNext)
    this.#seed = options.seed
  }

  get used(): number {
    return this.#records.used
  }

  get touched(): number {
    return this.#records.touched
  }

  /** The number of a swarm, or -1. */
  find(infoHash: InfoHash): number {
    return this.#find(readWords(infoHash, this.#words))
  }

  /** The same by the 20 bytes at `at`. */
  findAt(bytes: Uint8Array, at: number): number {
    const words = this.#words
    for (let i = 0; i < wordsOfHash; i++)
      words[i] =
        ((bytes[at + 4 * i] ?? 0) << 24) |
        ((bytes[at + 4 * i + 1] ?? 0) << 16) |
        ((bytes[at + 4 * i + 2] ?? 0) << 8) |
        (bytes[at + 4 * i + 3] ?? 0)
    return this.#find(words)
  }

  #find(words: Uint32Array): number {
    const hash = this.#hash(words, 0)
    const index = this.#index
    for (let found = index.first(hash); found !== none; found = index.next(hash))
      if (this.#isAt(found, words)) return found
    return -1
  }

  /** Adds a swarm that is not there; the one that has been empty for longest makes room. @returns -1 when all have peers */
  add(infoHash: InfoHash): number {
    if (!this.#records.has(1)) {
      const oldest = (this.#emptyEnds[emptyFirst] ?? 0) - 1
      if (oldest < 0) return -1
      this.remove(oldest)
    }
    const swarm = this.#records.take()
    const words = readWords(infoHash, this.#words)
    this.infoHashes.set(words, swarm * wordsOfHash)
    this.roots[4][swarm] = 0
    this.roots[6][swarm] = 0
    this.#downloaded[swarm] = 0
    this.#emptyNext[swarm] = 0
    this.#emptyPrevious[swarm] = 0
    this.#index.insert(this.#hash(words, 0), swarm)
    return swarm
  }

  remove(swarm: number): void {
    this.leaveEmpty(swarm)
    this.#index.remove(this.#hash(this.infoHashes, swarm * wordsOfHash), swarm)
    // What tells a free record from one in use, for those who walk them.
    this.#downloaded[swarm] = 0
    this.#records.give(swarm)
  }

  infoHashOf(swarm: number): InfoHash {
    const bytes = Buffer.alloc(wordsOfHash * 4)
    for (let i = 0; i < wordsOfHash; i++)
      bytes.writeUInt32BE(this.infoHashes[swarm * wordsOfHash + i] ?? 0, i * 4)
    return infoHashFromBytes(bytes)
  }

  downloaded(swarm: number): number {
    return this.#downloaded[swarm] ?? 0
  }

  setDownloaded(swarm: number, count: number): void {
    this.#downloaded[swarm] = count
  }

  isUsed(swarm: number): boolean {
    return this.hasPeers(swarm) || this.downloaded(swarm) > 0
  }

  hasPeers(swarm: number): boolean {
    return (this.roots[4][swarm] ?? 0) > 0 || (this.roots[6][swarm] ?? 0) > 0
  }

  /** The last peer has gone: the swarm goes too, or waits among the empty ones. */
  becameEmpty(swarm: number): void {
    if (this.downloaded(swarm) === 0) {
      this.remove(swarm)
      return
    }
    const last = this.#emptyEnds[emptyLast] ?? 0
    this.#emptyPrevious[swarm] = last
    this.#emptyNext[swarm] = 0
    if (last > 0) this.#emptyNext[last - 1] = swarm + 1
    else this.#emptyEnds[emptyFirst] = swarm + 1
    this.#emptyEnds[emptyLast] = swarm + 1
  }

  /** Takes a swarm out of the empty ones, if it is among them. */
  leaveEmpty(swarm: number): void {
    const [previous, next] = [this.#emptyPrevious[swarm] ?? 0, this.#emptyNext[swarm] ?? 0]
    if (previous === 0 && next === 0 && this.#emptyEnds[emptyFirst] !== swarm + 1) return
    if (previous > 0) this.#emptyNext[previous - 1] = next
    else this.#emptyEnds[emptyFirst] = next
    if (next > 0) this.#emptyPrevious[next - 1] = previous
    else this.#emptyEnds[emptyLast] = previous
    this.#emptyNext[swarm] = 0
    this.#emptyPrevious[swarm] = 0
  }

  #hash(words: Uint32Array, at: number): number {
    let hash = this.#seed
    for (let i = 0; i < wordsOfHash; i++) hash = mix(hash, words[at + i] ?? 0)
    return finish(hash)
  }

  #isAt(swarm: number, words: Uint32Array): boolean {
    const at = swarm * wordsOfHash
    for (let i = 0; i < wordsOfHash; i++) if (this.infoHashes[at + i] !== words[i]) return false
    return true
  }
}

/** Forty lower-case hex digits as five words. */
function readWords(infoHash: InfoHash, words: Uint32Array): Uint32Array {
  for (let i = 0; i < wordsOfHash; i++) {
    let word = 0
    for (let digit = 8 * i; digit < 8 * i + 8; digit++) {
      const code = infoHash.charCodeAt(digit)
      word = (word << 4) | ((code & 15) + 9 * (code >>> 6))
    }
    words[i] = word
  }
  return words
}
