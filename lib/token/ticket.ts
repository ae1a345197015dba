import { createHmac, createSecretKey, timingSafeEqual } from 'node:crypto'
import type { VerificationKey } from './verification-key.ts'

/**
 * A ticket says "this server, or a sibling with the same secret, has found the signature of this token right, by this
 * key". It spares a restarted server the signature, and nothing else: the claims are read and checked as ever. It is
 * worth nothing without its token, so it needs no protection of its own.
 */
export interface Tickets {
  issue(token: string, key: VerificationKey): string
  /** The ticket, if `presented` is it; compared in constant time. */
  check(token: string, key: VerificationKey, presented: string): string | undefined
}

/** In base64url, 132 bits of the MAC: forging one takes 2^131 announces, and the reply stays small. */
const ticketCharacters = 22
/** 32 random bytes have 43 characters in base64url; a shorter secret was thought up by a person. */
const secretCharactersMin = 32
const secretCharactersMax = 4096

export function createTickets(secret: string): Tickets {
  const length = secret.trim().length
  if (length < secretCharactersMin || length > secretCharactersMax)
    throw new Error(
      `Cannot use the ticket secret: it has ${length} characters, need ${secretCharactersMin} to ${secretCharactersMax}; make one with: openssl rand -base64 32`,
    )
  const key = createSecretKey(Buffer.from(secret.trim()))
  // The key is part of what is vouched for: a key set may give a new key the `kid` of one that was given up.
  const issue = (token: string, { thumbprint }: VerificationKey) =>
    createHmac('sha256', key).update(`${thumbprint}.${token}`).digest('base64url').slice(0, ticketCharacters)
  return {
    issue,
    check: (token, by, presented) => {
      if (presented.length !== ticketCharacters) return undefined
      const ticket = issue(token, by)
      return timingSafeEqual(Buffer.from(ticket, 'latin1'), Buffer.from(presented, 'latin1'))
        ? ticket
        : undefined
    },
  }
}
