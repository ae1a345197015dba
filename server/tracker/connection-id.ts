import { createHash } from 'node:crypto'
import type { Ip } from '../../lib/protocol/address.ts'
import { sipHash24 } from '../../lib/protocol/siphash.ts'

export interface ConnectionIdOptions {
  /** Every instance with the same text accepts the ids of the others. */
  readonly privateKey: string
  /** How long an id is good for: 1 s to 8 h. BEP 15 has trackers accept two minutes; some clients reuse ids for an hour. */
  readonly lifetimeMs?: number
  /** How far ahead the clock of the instance that made an id may be: 0 to 8 h. */
  readonly maxClockSkewMs?: number
}

/**
 * BEP 15 connection ids: proof that a sender receives what is sent to its address. They are computed, not kept: 16 bits
 * of time in seconds, then 48 bits of a keyed MAC (SipHash-2-4) over the whole time and the address. The time that was
 * cut off is guessed back from the clock, so an id does not become good again when its 16 bits come round after 18 hours.
 * A forged id is good in one of 2^48 tries, each of which is a packet.
 */
export interface ConnectionIds {
  /** Writes the id, 8 bytes, at `at`. */
  write(target: Uint8Array, at: number, ip: Ip, nowMs: number): void
  /** Whether the 8 bytes at `at` are an id that was made for this address, and is neither too old nor of the future. */
  isValid(packet: Uint8Array, at: number, ip: Ip, nowMs: number): boolean
}

/** Both together must stay below the 18 hours after which 16 bits of seconds come round. */
const spanMaxMs = 8 * 60 * 60 * 1000
/**
 * Ids that were made or found good lately, each in the slot that its MAC names: seeing one again costs a comparison
 * instead of a MAC. A slot is eight words: address (4), family, time, id (2); 512 KiB in all.
 */
const slotsMax = 1 << 14
const slotWords = 8

/** @throws RangeError for a lifetime or skew out of range */
export function createConnectionIds(options: ConnectionIdOptions): ConnectionIds {
  const lifetimeSeconds = seconds('lifetimeMs', options.lifetimeMs ?? 120_000, 1000)
  const skewSeconds = seconds('maxClockSkewMs', options.maxClockSkewMs ?? 10_000, 0)
  const key = keyOf(options.privateKey)
  const known = new Int32Array(slotsMax * slotWords)
  /** What is signed: the time and the address, as words. The length tells the families apart. */
  const message = new Int32Array(6)
  const mac = new Int32Array(2)

  const load = ({ family, bytes }: Ip, time: number) => {
    message[0] = time
    message[1] = word(bytes, 0)
    if (family === 6) {
      message[2] = word(bytes, 4)
      message[3] = word(bytes, 8)
      message[4] = word(bytes, 12)
    } else {
      message[2] = message[3] = message[4] = 0
    }
  }
  const sign = (family: 4 | 6) => sipHash24(key, message, family === 4 ? 8 : 20, mac)
  const slotOf = (low: number) => (low & (slotsMax - 1)) * slotWords
  const remember = (family: 4 | 6, head: number, low: number) => {
    const slot = slotOf(low)
    known[slot] = message[1] ?? 0
    known[slot + 1] = message[2] ?? 0
    known[slot + 2] = message[3] ?? 0
    known[slot + 3] = message[4] ?? 0
    known[slot + 4] = family
    known[slot + 5] = message[0] ?? 0
    known[slot + 6] = head
    known[slot + 7] = low
  }
  /** Like the check of the MAC it has no early exit: the time it takes must not tell how much of a guess was right. */
  const remembers = (family: 4 | 6, head: number, low: number): boolean => {
    const slot = slotOf(low)
    const difference =
      ((known[slot] ?? 0) ^ (message[1] ?? 0)) |
      ((known[slot + 1] ?? 0) ^ (message[2] ?? 0)) |
      ((known[slot + 2] ?? 0) ^ (message[3] ?? 0)) |
      ((known[slot + 3] ?? 0) ^ (message[4] ?? 0)) |
      ((known[slot + 4] ?? 0) ^ family) |
      ((known[slot + 5] ?? 0) ^ (message[0] ?? 0)) |
      ((known[slot + 6] ?? 0) ^ head) |
      ((known[slot + 7] ?? 0) ^ low)
    return difference === 0
  }

  return {
    write: (target, at, ip, nowMs) => {
      const time = Math.floor(nowMs / 1000)
      load(ip, time)
      sign(ip.family)
      const head = (time << 16) | ((mac[1] ?? 0) & 0xffff)
      const low = mac[0] ?? 0
      putWord(target, at, head)
      putWord(target, at + 4, low)
      remember(ip.family, head, low)
    },
    isValid: (packet, at, ip, nowMs) => {
      const now = Math.floor(nowMs / 1000)
      const head = word(packet, at)
      const low = word(packet, at + 4)
      // The age modulo 2^16, with its sign: 32,767 s old to 32,768 s of the future.
      const age = ((now - (head >>> 16)) << 16) >> 16
      if (age > lifetimeSeconds || age < -skewSeconds) return false
      load(ip, now - age)
      if (remembers(ip.family, head, low)) return true
      sign(ip.family)
      if (((((mac[1] ?? 0) ^ head) & 0xffff) | ((mac[0] ?? 0) ^ low)) !== 0) return false
      remember(ip.family, head, low)
      return true
    },
  }
}

/** Whole seconds, rounded up: an id lives no shorter than was asked for. */
function seconds(name: string, ms: number, minMs: number): number {
  if (!(ms >= minMs && ms <= spanMaxMs))
    throw new RangeError(`Cannot use ${name} ${ms}: need ${minMs} to ${spanMaxMs}`)
  return Math.ceil(ms / 1000)
}

/** The first 128 bits of SHA-256, after a label that keeps them apart from other uses of the same secret. */
function keyOf(privateKey: string): Int32Array {
  const digest = createHash('sha256').update(`rackswarm connection id\0${privateKey}`).digest()
  return Int32Array.from({ length: 4 }, (_, i) => digest.readInt32LE(4 * i))
}

function word(bytes: Uint8Array, at: number): number {
  return (
    ((bytes[at] ?? 0) << 24) |
    ((bytes[at + 1] ?? 0) << 16) |
    ((bytes[at + 2] ?? 0) << 8) |
    (bytes[at + 3] ?? 0)
  )
}

function putWord(target: Uint8Array, at: number, value: number): void {
  target[at] = value >>> 24
  target[at + 1] = value >>> 16
  target[at + 2] = value >>> 8
  target[at + 3] = value
}
