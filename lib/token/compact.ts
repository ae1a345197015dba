import { TokenError } from './claims.ts'
import type { Payload } from './read-claims.ts'

/** What a token says of itself, all of it unproven. */
export interface Compact {
  readonly header: Payload
  readonly payload: Payload
}

/** Any other letter could stand for one of these in the bytes that are signed. */
const compactForm = /^[\w-]+\.[\w-]+\.[\w-]*$/

/** Reads a JWT in compact form (RFC 7515 section 3.1). @throws TokenError `malformed` */
export function readCompact(token: string): Compact {
  if (!compactForm.test(token)) throw new TokenError('malformed')
  const first = token.indexOf('.')
  const header = readPart(token.slice(0, first))
  // RFC 7515 section 4.1.11: what it names must be understood, and nothing is.
  if (header['crit'] !== undefined) throw new TokenError('malformed')
  return { header, payload: readPart(token.slice(first + 1, token.lastIndexOf('.'))) }
}

function readPart(part: string): Payload {
  try {
    const value: unknown = JSON.parse(Buffer.from(part, 'base64url').toString())
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Payload
  } catch (cause) {
    throw new TokenError('malformed', { cause })
  }
  throw new TokenError('malformed')
}
