import { ClientError } from './errors.ts'

/**
 * A tracker query string, of characters up to U+00FF. Values are byte strings held as latin1 text: info_hash and peer_id are raw bytes (BEP 3),
 * which UTF-8 decoding would destroy.
 */
export interface Query {
  /** The last value of each key; keys are lower-cased. */
  readonly values: ReadonlyMap<string, string>
  /** Every `info_hash`, in order (scrape takes several, BEP 48). */
  readonly infoHashes: readonly string[]
}

/** A query has some 15 keys; a scrape repeats `info_hash`. More pairs than this are a bomb. */
const pairsMax = 256

/** Told of the pairs of a query in their order, both sides unescaped. */
export interface QueryVisitor {
  pair(key: string, value: string): void
}

/** @throws ClientError `bad_query` for a broken percent escape or too many pairs */
export function parseQuery(raw: string): Query {
  const values = new Map<string, string>()
  const infoHashes: string[] = []
  visitQuery(raw, {
    pair: (key, value) => {
      if (key === 'info_hash') infoHashes.push(value)
      else values.set(key.toLowerCase(), value)
    },
  })
  return { values, infoHashes }
}

/**
 * Splits `a=1&b=2`. `;` separates too, a key without `=` is empty, empty pairs are skipped, `+` is a space. Marks are searched
 * natively, and each only once: a token of 700 characters is not worth a step of ours for each.
 *
 * @throws ClientError `bad_query` for a broken percent escape or too many pairs
 */
export function visitQuery(raw: string, visitor: QueryVisitor): void {
  let pairs = 0
  let semicolon = find(raw, ';', 0)
  let percent = find(raw, '%', 0)
  let plus = find(raw, '+', 0)
  for (let start = 0; start < raw.length;) {
    let end = find(raw, '&', start)
    if (semicolon < start) semicolon = find(raw, ';', start)
    if (semicolon < end) end = semicolon
    if (end > start) {
      if (++pairs > pairsMax) throw new ClientError('bad_query', 'too many query parameters')
      if (percent < start) percent = find(raw, '%', start)
      if (plus < start) plus = find(raw, '+', start)
      const equals = find(raw, '=', start)
      const keyEnd = equals < end ? equals : end
      const key = raw.slice(start, keyEnd)
      const value = keyEnd < end ? raw.slice(keyEnd + 1, end) : ''
      if (percent < end || plus < end) visitor.pair(unescape(key), unescape(value))
      else visitor.pair(key, value)
    }
    start = end + 1
  }
}

/** Where `mark` is at or after `from`; the length of the text where it is not. */
function find(text: string, mark: string, from: number): number {
  const at = text.indexOf(mark, from)
  return at < 0 ? text.length : at
}

/** Percent-encodes raw bytes for a query value. */
export function escapeBytes(bytes: Uint8Array): string {
  let text = ''
  for (const byte of bytes) {
    const character = String.fromCharCode(byte)
    text += /[A-Za-z0-9._~-]/.test(character) ? character : `%${byte.toString(16).padStart(2, '0')}`
  }
  return text
}

/** Byte by byte, at a tenth of the cost of a regular expression with a replacer: it is a good part of an announce. */
function unescape(text: string): string {
  if (!text.includes('%') && !text.includes('+')) return text
  const bytes = text.length <= scratch.length ? scratch : Buffer.allocUnsafe(text.length)
  let length = 0
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i)
    if (code === 0x25) {
      const byte = (digitOf(text.charCodeAt(i + 1)) << 4) | digitOf(text.charCodeAt(i + 2))
      // The message is static on purpose: error texts label a metric.
      if (byte < 0) throw new ClientError('bad_query', 'invalid query escape')
      bytes[length++] = byte
      i += 2
    } else {
      bytes[length++] = code === 0x2b ? 0x20 : code
    }
  }
  return bytes.toString('latin1', 0, length)
}

const scratch = Buffer.alloc(8192)

/** The value of a hex digit; negative for anything else, past the end included. */
function digitOf(code: number): number {
  return digits[code] ?? -1
}

const digits = Int8Array.from({ length: 128 }, (_, code) => {
  const value = Number.parseInt(String.fromCharCode(code), 16)
  return Number.isNaN(value) ? -1 : value
})
