import { z } from 'zod'
import { infoHashToBytes } from '../../../lib/protocol/infohash.ts'
import type { PreHook, PreHookDefinition } from '../hooks.ts'

const name = 'interval variation'
/** Longest that an announce may be put off: beyond it, peers would be forgotten in between. */
const deltaMaxSeconds = 86_400

const options = z.strictObject({
  modify_response_probability: z
    .number('invalid modify_response_probability')
    .gt(0, 'invalid modify_response_probability')
    .max(1, 'invalid modify_response_probability')
    .describe('Share of peers and swarms whose interval is made longer: more than 0, at most 1.'),
  max_increase_delta: z
    .int('invalid max_increase_delta')
    .positive('invalid max_increase_delta')
    .max(deltaMaxSeconds, 'invalid max_increase_delta')
    .describe('Seconds that are added, at most; from one second on, each number is as likely.'),
  modify_min_interval: z.boolean().default(false).describe('Adds them to `min interval` as well.'),
})

/** Spreads announces that would come together. A peer of a swarm gets the same delta each time, so it keeps its distance. */
export const intervalVariation = {
  name,
  options,
  create(options): PreHook {
    // chihaya holds the probability in 32 bits; the same requests are to be changed.
    const probability = Math.fround(options.modify_response_probability)
    return {
      name,
      announce: (request) => {
        const { announce } = request
        const { chance, deltaSeconds } = variation(
          infoHashToBytes(announce.infoHash),
          announce.peerId,
          options.max_increase_delta,
        )
        if (probability < 1 && chance >= probability) return
        request.extraIntervalSeconds += deltaSeconds
        if (options.modify_min_interval) request.extraMinIntervalSeconds += deltaSeconds
      },
    }
  },
} satisfies PreHookDefinition<typeof options>

/**
 * What chihaya draws for a peer of a swarm: 0 ≤ chance < 1 in steps of 2^-24, and 1 ≤ deltaSeconds ≤ maxSeconds. They are
 * the first two numbers of xorshift128+ (shifts 23, 18, 5), whose state is, for infohash and peer id each, the sum of
 * bytes 0–7 and 8–15 as big-endian numbers; a number is read as signed, and its magnitude counts. On 32-bit halves,
 * since a BigInt costs an allocation for each step.
 */
export function variation(
  infoHash: Uint8Array,
  peerId: Uint8Array,
  maxSeconds: number,
): { readonly chance: number; readonly deltaSeconds: number } {
  const xLow = (word(infoHash, 4) + word(infoHash, 12)) | 0
  const xHigh = (word(infoHash, 0) + word(infoHash, 8) + carry(xLow, word(infoHash, 12))) | 0
  const yLow = (word(peerId, 4) + word(peerId, 12)) | 0
  const yHigh = (word(peerId, 0) + word(peerId, 8) + carry(yLow, word(peerId, 12))) | 0

  const firstLow = (xLow + yLow) | 0
  const firstHigh = (xHigh + yHigh + carry(firstLow, yLow)) | 0
  const chance = magnitudeModulo(firstHigh, firstLow, 2 ** 24) / 2 ** 24

  const turnedLow = xLow ^ (xLow << 23)
  const turnedHigh = xHigh ^ ((xHigh << 23) | (xLow >>> 9))
  const zLow = turnedLow ^ yLow ^ ((turnedLow >>> 18) | (turnedHigh << 14)) ^ ((yLow >>> 5) | (yHigh << 27))
  const zHigh = turnedHigh ^ yHigh ^ (turnedHigh >>> 18) ^ (yHigh >>> 5)
  const secondLow = (yLow + zLow) | 0
  const secondHigh = (yHigh + zHigh + carry(secondLow, zLow)) | 0
  return { chance, deltaSeconds: magnitudeModulo(secondHigh, secondLow, maxSeconds) + 1 }
}

/** The 32 bits from `at` on, big-endian, as a signed number. */
function word(bytes: Uint8Array, at: number): number {
  return (
    ((bytes[at] ?? 0) << 24) |
    ((bytes[at + 1] ?? 0) << 16) |
    ((bytes[at + 2] ?? 0) << 8) |
    (bytes[at + 3] ?? 0)
  )
}

/** What goes to the higher half when `addend` was added to make `sum`. */
function carry(sum: number, addend: number): number {
  return sum >>> 0 < addend >>> 0 ? 1 : 0
}

/** |x| mod `modulus` of a signed 64-bit number. Exact while modulus² < 2^53. */
function magnitudeModulo(high: number, low: number, modulus: number): number {
  const negative = high < 0
  const magnitudeLow = negative ? -low >>> 0 : low >>> 0
  const magnitudeHigh = negative ? (~high + (low === 0 ? 1 : 0)) >>> 0 : high
  return ((magnitudeHigh % modulus) * (2 ** 32 % modulus) + (magnitudeLow % modulus)) % modulus
}
