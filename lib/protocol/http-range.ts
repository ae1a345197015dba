/** Bytes `[start, end)`. */
export interface ByteRange {
  readonly start: number
  readonly end: number
}

/** The headers by which a client says what it has, and what it wants. */
export interface Conditions {
  readonly 'if-none-match'?: string | undefined
  readonly 'if-range'?: string | undefined
  readonly range?: string | undefined
}

/** What a GET or HEAD of bytes is answered with. `end` is exclusive, as everywhere. */
export type RangeAnswer =
  { readonly status: 304 } | { readonly status: 416 } | ({ readonly status: 200 | 206 } & ByteRange)

/** The ETag of bytes that their digest names: strong, since no others can have it. */
export function etagOf(digest: string): string {
  return `"${digest}"`
}

/** Whether the client has it already (RFC 9110 section 13.1.2, which compares weakly). */
export function isUnchanged({ 'if-none-match': header }: Conditions, etag: string): boolean {
  if (header === undefined) return false
  return header.split(',').some((each) => ['*', etag].includes(each.trim().replace(/^W\//, '')))
}

/** Reads the conditions of a request against what there is: `length` bytes with a strong ETag (RFC 9110 sections 13.2.2 and 14). */
export function answerRange(conditions: Conditions, etag: string, length: number): RangeAnswer {
  if (isUnchanged(conditions, etag)) return { status: 304 }
  const { 'if-range': ifRange, range: header } = conditions
  // Whoever has another version in part gets this one whole.
  const range = ifRange === undefined || ifRange.trim() === etag ? parseRange(header, length) : undefined
  if (range === 'unsatisfiable') return { status: 416 }
  return range ? { status: 206, ...range } : { status: 200, start: 0, end: length }
}

/** `Content-Range` of a 206, or of a 416 where there is no range. */
export function contentRange(range: ByteRange | undefined, length: number): string {
  return range ? `bytes ${range.start}-${range.end - 1}/${length}` : `bytes */${length}`
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
