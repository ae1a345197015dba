import { createHash } from 'node:crypto'

/** What the first line of an audit log names as the one before it. */
export const chainStart = '0'.repeat(64)

/** SHA-256 of a line without its newline, hex: what the next one names as `prev`. */
export function hashOfLine(line: string): string {
  return createHash('sha256').update(line).digest('hex')
}

/** What chains a line to those before it. */
export interface ChainLink {
  /** From 1. */
  readonly seq: number
  readonly prev: string
}

/** Undefined for what is no line of an audit log. */
export function parseLink(line: string): ChainLink | undefined {
  try {
    const { seq, prev } = JSON.parse(line) as { seq?: unknown; prev?: unknown }
    const isLink =
      typeof seq === 'number' &&
      Number.isSafeInteger(seq) &&
      seq >= 1 &&
      typeof prev === 'string' &&
      /^[0-9a-f]{64}$/.test(prev)
    return isLink ? { seq, prev } : undefined
  } catch {
    return undefined
  }
}

export interface ChainCheck {
  /** Takes the next line, in order. @returns what is wrong with the chain before or at it, in words; undefined where it holds */
  follow(line: string): string | undefined
  /** The last line that was taken: noted elsewhere, it shows later whether lines were cut off the end. */
  readonly head: { readonly seq: number; readonly hash: string } | undefined
}

/** Checks that no line was changed, removed or put in between. What stands before the first line that it is given it cannot know. */
export function createChainCheck(): ChainCheck {
  let head: { seq: number; hash: string } | undefined
  return {
    follow: (line) => {
      const link = parseLink(line)
      const before = head
      if (!link) return `what follows line ${before?.seq ?? 0} is no line of an audit log`
      head = { seq: link.seq, hash: hashOfLine(line) }
      if (before && link.seq !== before.seq + 1) return `line ${link.seq} follows line ${before.seq}`
      const wanted = before?.hash ?? (link.seq === 1 ? chainStart : link.prev)
      return link.prev === wanted
        ? undefined
        : `line ${link.seq - 1} is not what line ${link.seq} says it was`
    },
    get head() {
      return head
    },
  }
}
