import { ClientError } from './errors.ts'

/**
 * A tracker query string. Values are byte strings held as latin1 text: info_hash and peer_id are raw bytes (BEP 3),
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

/**
 * Splits `a=1&b=2`. `;` separates too, a key without `=` is empty, empty pairs are skipped, `+` is a space.
 *
 * @throws ClientError `bad_query` for a broken percent escape or too many pairs
 */
export function parseQuery(raw: string): Query {
  const values = new Map<string, string>()
  const infoHashes: string[] = []
  let pairs = 0
  // Searched natively: a token of 700 characters is not worth a step of ours for each.
  const alternative = raw.includes(';')
  for (let start = 0; start < raw.length;) {
    let end = raw.indexOf('&', start)
    if (end < 0) end = raw.length
    if (alternative) {
      const semicolon = raw.indexOf(';', start)
      if (semicolon >= 0 && semicolon < end) end = semicolon
    }
    const found = raw.indexOf('=', start)
    const equals = found < end ? found : -1
    if (end > start) {
      if (++pairs > pairsMax) throw new ClientError('bad_query', 'too many query parameters')
      const key = unescape(raw.slice(start, equals < 0 ? end : equals))
      const value = equals < 0 ? '' : unescape(raw.slice(equals + 1, end))
      if (key === 'info_hash') infoHashes.push(value)
      else values.set(key.toLowerCase(), value)
    }
    start = end + 1
  }
  return { values, infoHashes }
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

function unescape(text: string): string {
  if (!/[%+]/.test(text)) return text
  // The message is static on purpose: error texts label a metric.
  if (/%(?![0-9a-fA-F]{2})/.test(text)) throw new ClientError('bad_query', 'invalid query escape')
  return text
    .replaceAll('+', ' ')
    .replace(/%([0-9a-fA-F]{2})/g, (_, hex: string) => String.fromCharCode(Number.parseInt(hex, 16)))
}
