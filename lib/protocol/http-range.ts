/** Bytes `[start, end)`. */
export interface ByteRange {
  readonly start: number
  readonly end: number
}

/**
 * Reads a `Range` header against a length (RFC 9110 section 14): one range is served, `unsatisfiable` answers 416, as does one
 * that ends before it begins, and what is malformed or asks for several ranges is ignored: the whole is served. The RFC
 * allows either.
 */
export function parseRange(
  header: string | undefined,
  length: number,
): ByteRange | 'unsatisfiable' | undefined {
  const match = /^bytes=(\d*)-(\d*)$/.exec(header?.trim() ?? '')
  if (!match || (match[1] === '' && match[2] === '')) return undefined
  if (match[1] === '') {
    const suffix = Number(match[2])
    return suffix === 0 || length === 0
      ? 'unsatisfiable'
      : { start: Math.max(0, length - suffix), end: length }
  }
  const start = Number(match[1])
  const last = match[2] === '' ? length - 1 : Number(match[2])
  return start >= length || last < start ? 'unsatisfiable' : { start, end: Math.min(length, last + 1) }
}
