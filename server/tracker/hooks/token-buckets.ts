/**
 * Token buckets for ever more keys in memory that is fixed: `sets` of four buckets each, so 48 bytes a set. A key is a
 * keyed hash of 64 bits; half of it chooses the set, the other half tells the keys in it apart. A key that finds no
 * bucket takes the fullest one of its set, so it is those that hardly spent anything that are forgotten, not those that
 * are being refused: to have one of these forgotten takes four others, in the same set, that spent more.
 */
export interface TokenBuckets {
  /** Whether the key has a token left. `elapsedMs` never goes back. */
  ready(setHash: number, tagHash: number, elapsedMs: number): boolean
  /** Takes the token that `ready` has just found. */
  take(): void
}

const ways = 4
/** A token, in the unit that buckets count in: with a whole rate, a millisecond brings a whole number of them. */
const token = 1000

export function createTokenBuckets(options: {
  /** Tokens that a second brings. */
  readonly rate: number
  /** Tokens in a full bucket. */
  readonly burst: number
  readonly sets: number
}): TokenBuckets {
  const { rate, burst, sets } = options
  const tags = new Uint32Array(sets * ways)
  // When each bucket will be full again, on the clock `elapsedMs * rate`. All are full at first.
  const fullAt = new Float64Array(sets * ways)
  let found = 0
  let foundTag = 0
  let afterwards = 0
  return {
    ready: (setHash, tagHash, elapsedMs) => {
      const now = elapsedMs * rate
      const first = Math.floor(((setHash >>> 0) / 2 ** 32) * sets) * ways
      foundTag = tagHash >>> 0
      found = first
      let soonest = Infinity
      let from = now
      for (let at = first; at < first + ways; at++) {
        const full = fullAt[at] ?? 0
        if (tags[at] === foundTag) {
          found = at
          from = Math.max(full, now)
          break
        }
        if (full < soonest) {
          found = at
          soonest = full
        }
      }
      afterwards = from + token
      return afterwards - now <= burst * token
    },
    take: () => {
      tags[found] = foundTag
      fullAt[found] = afterwards
    },
  }
}
