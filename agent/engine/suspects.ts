/** How long a peer that sent wrong bytes is not talked to. */
const banMs = 10 * 60_000
/** Pieces that failed with several senders before the peer that was in all of them is banned. */
const dropsMax = 3
/** Peers remembered at most; the oldest are forgotten first. */
const peersMax = 1000

interface Record {
  good: number
  drops: number
  bannedUntil: number
}

/**
 * Who sent the bytes of a piece whose SHA-1 does not match. A sole sender is banned. Of several, all but the one with the
 * best record are dropped for now, so that the next pieces come from one sender and show who lies.
 */
export interface Suspects {
  received(piece: number, sender: string): void
  verified(piece: number): void
  /** The senders to disconnect. */
  failed(piece: number): string[]
  isBanned(sender: string): boolean
}

/** @param banned is told of each peer that is banned: its `ip:port`, or the `ip` that it dialled from */
export function createSuspects(monotonic: () => number, banned: (address: string) => void): Suspects {
  const senders = new Map<number, Set<string>>()
  const records = new Map<string, Record>()
  const recordOf = (sender: string): Record => {
    const known = records.get(sender) ?? { good: 0, drops: 0, bannedUntil: 0 }
    records.delete(sender)
    records.set(sender, known)
    if (records.size > peersMax) records.delete(records.keys().next().value ?? '')
    return known
  }
  const ban = (sender: string) => {
    const record = recordOf(sender)
    const isNew = record.bannedUntil <= monotonic()
    record.bannedUntil = monotonic() + banMs
    if (!isNew) return
    // What follows is the peer id of one that dialled us: bytes of its own choice.
    banned(sender.split('|')[0] ?? sender)
  }
  return {
    received: (piece, sender) => {
      const set = senders.get(piece)
      if (set) set.add(sender)
      else senders.set(piece, new Set([sender]))
    },
    verified: (piece) => {
      const set = senders.get(piece)
      senders.delete(piece)
      if (set?.size === 1) for (const sender of set) recordOf(sender).good++
    },
    failed: (piece) => {
      const set = [...(senders.get(piece) ?? [])]
      senders.delete(piece)
      const [sole, ...others] = set
      if (sole === undefined) return []
      if (others.length === 0) {
        ban(sole)
        return [sole]
      }
      const best = Math.max(...set.map((sender) => recordOf(sender).good))
      const kept = set.find((sender) => recordOf(sender).good === best)
      const dropped = set.filter((sender) => sender !== kept)
      for (const sender of dropped) {
        const record = recordOf(sender)
        record.drops++
        if (record.drops >= dropsMax && record.good === 0) ban(sender)
      }
      return dropped
    },
    isBanned: (sender) => (records.get(sender)?.bannedUntil ?? 0) > monotonic(),
  }
}
