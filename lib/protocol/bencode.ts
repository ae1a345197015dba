import { ClientError } from './errors.ts'

/** What a bencoded value becomes: byte strings stay bytes, dictionary keys are latin1 text, integers are safe integers. */
export type Bencoded = number | Uint8Array | Bencoded[] | BencodedDictionary
export type BencodedDictionary = Map<string, Bencoded>

/** What `encode` takes: text is written as UTF-8, dictionary keys are sorted as raw bytes, `undefined` members are left out. */
export type Bencodable =
  | number
  | string
  | Uint8Array
  | readonly Bencodable[]
  | Map<string, Bencodable>
  | { readonly [key: string]: Bencodable | undefined }

export interface DecodeLimits {
  /** How deep lists and dictionaries may nest; a bomb of `l`s would otherwise exhaust the stack. */
  depthMax?: number
  /** How many values there may be; `le` repeated costs 2 bytes on the wire and some 50 in memory. */
  valuesMax?: number
}

/**
 * Reads one bencoded value (BEP 3) that must fill `bytes`. Strict: keys sorted and unique, no leading zeros,
 * no `-0`, integers within ±2^53. Byte strings are views into `bytes`, not copies.
 *
 * @throws ClientError `bad_bencode`, naming the offset
 */
export function decode(bytes: Uint8Array, limits: DecodeLimits = {}): Bencoded {
  const reader = new Reader(bytes, limits.depthMax ?? 32, limits.valuesMax ?? 100_000)
  const value = reader.value(0)
  if (reader.offset !== bytes.length) reader.fail(`${bytes.length - reader.offset} bytes follow the value`)
  return value
}

/** Like `decode`, for a top-level dictionary, and says where each member's bytes stand: `[start, end)`. */
export function decodeDictionary(
  bytes: Uint8Array,
  limits: DecodeLimits = {},
): { members: BencodedDictionary; spans: Map<string, readonly [number, number]> } {
  const reader = new Reader(bytes, limits.depthMax ?? 32, limits.valuesMax ?? 100_000)
  if (bytes[0] !== D) reader.fail('need a dictionary')
  const spans = new Map<string, readonly [number, number]>()
  const members = reader.dictionary(0, spans)
  if (reader.offset !== bytes.length) reader.fail(`${bytes.length - reader.offset} bytes follow the value`)
  return { members, spans }
}

/** Writes a value in canonical form. @throws TypeError for a number that is not a safe integer */
export function encode(value: Bencodable): Buffer {
  const parts: Uint8Array[] = []
  append(value, parts)
  return Buffer.concat(parts)
}

const [I, L, D, E, COLON, MINUS, ZERO, NINE] = [0x69, 0x6c, 0x64, 0x65, 0x3a, 0x2d, 0x30, 0x39] as const

class Reader {
  offset = 0
  readonly #bytes: Uint8Array
  readonly #depthMax: number
  #valuesLeft: number

  constructor(bytes: Uint8Array, depthMax: number, valuesMax: number) {
    this.#bytes = bytes
    this.#depthMax = depthMax
    this.#valuesLeft = valuesMax
  }

  fail(what: string): never {
    throw new ClientError('bad_bencode', `Cannot read bencode at byte ${this.offset}: ${what}`)
  }

  value(depth: number): Bencoded {
    if (--this.#valuesLeft < 0) this.fail('too many values')
    const first = this.#bytes[this.offset]
    if (first === undefined) this.fail('the value is missing')
    if (first === I) return this.#integer()
    if (first >= ZERO && first <= NINE) return this.#byteString()
    if (first !== L && first !== D) this.fail(`unexpected byte 0x${first.toString(16).padStart(2, '0')}`)
    if (depth >= this.#depthMax) this.fail(`nested deeper than ${this.#depthMax}`)
    return first === D ? this.dictionary(depth) : this.#list(depth)
  }

  dictionary(depth: number, spans?: Map<string, readonly [number, number]>): BencodedDictionary {
    this.offset++
    const members: BencodedDictionary = new Map()
    let previous: string | undefined
    while (this.#bytes[this.offset] !== E) {
      const first = this.#bytes[this.offset]
      if (first === undefined || first < ZERO || first > NINE) this.fail('need a dictionary key')
      const key = latin1(this.#byteString())
      if (previous !== undefined && key <= previous) {
        this.fail(key === previous ? 'the same key stands twice' : 'keys are not sorted')
      }
      previous = key
      const start = this.offset
      members.set(key, this.value(depth + 1))
      spans?.set(key, [start, this.offset])
    }
    this.offset++
    return members
  }

  #list(depth: number): Bencoded[] {
    this.offset++
    const items: Bencoded[] = []
    while (this.#bytes[this.offset] !== E) items.push(this.value(depth + 1))
    this.offset++
    return items
  }

  #integer(): number {
    this.offset++
    const negative = this.#bytes[this.offset] === MINUS
    if (negative) this.offset++
    const magnitude = this.#digits(E)
    if (negative && magnitude === 0) this.fail('-0 is not an integer')
    return negative ? -magnitude : magnitude
  }

  #byteString(): Uint8Array {
    const length = this.#digits(COLON)
    const end = this.offset + length
    if (end > this.#bytes.length) this.fail(`a string of ${length} bytes runs past the end`)
    const value = this.#bytes.subarray(this.offset, end)
    this.offset = end
    return value
  }

  /** Decimal digits up to `terminator`, which is consumed. */
  #digits(terminator: number): number {
    const start = this.offset
    let value = 0
    for (;;) {
      const byte = this.#bytes[this.offset]
      if (byte === terminator) break
      if (byte === undefined || byte < ZERO || byte > NINE) this.fail('need a decimal digit')
      value = value * 10 + (byte - ZERO)
      if (value > Number.MAX_SAFE_INTEGER) this.fail('the number is too large')
      this.offset++
    }
    const count = this.offset - start
    if (count === 0) this.fail('need a decimal digit')
    if (count > 1 && this.#bytes[start] === ZERO) this.fail('leading zeros')
    this.offset++
    return value
  }
}

function append(value: Bencodable, parts: Uint8Array[]): void {
  if (typeof value === 'number') {
    if (!Number.isSafeInteger(value)) throw new TypeError(`Cannot bencode ${value}: need a safe integer`)
    parts.push(Buffer.from(`i${value}e`))
  } else if (typeof value === 'string') {
    appendBytes(Buffer.from(value), parts)
  } else if (value instanceof Uint8Array) {
    appendBytes(value, parts)
  } else if (Array.isArray(value)) {
    parts.push(Buffer.from('l'))
    for (const item of value as readonly Bencodable[]) append(item, parts)
    parts.push(Buffer.from('e'))
  } else {
    const members = value instanceof Map ? [...value] : Object.entries(value)
    // Keys are latin1 text on both sides, so that code unit order is byte order.
    members.sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0))
    parts.push(Buffer.from('d'))
    for (const [key, member] of members) {
      if (member === undefined) continue
      appendBytes(Buffer.from(key, 'latin1'), parts)
      append(member, parts)
    }
    parts.push(Buffer.from('e'))
  }
}

function appendBytes(bytes: Uint8Array, parts: Uint8Array[]): void {
  parts.push(Buffer.from(`${bytes.length}:`), bytes)
}

function latin1(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('latin1')
}
