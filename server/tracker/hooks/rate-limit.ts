import { randomBytes } from 'node:crypto'
import { z } from 'zod'
import type { Ip } from '../../../lib/protocol/address.ts'
import { parseCidr } from '../../../lib/protocol/cidr.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import { sipHash24 } from '../../../lib/protocol/siphash.ts'
import { parsed } from '../../../lib/runtime/config.ts'
import type { HookDeps, PreHook, PreHookDefinition } from '../hooks.ts'
import { createNetworkSet } from './network-set.ts'
import { createTokenBuckets } from './token-buckets.ts'

const name = 'rate limit'
const rate = z.number().positive().max(1_000_000)
const burst = z.int().positive().max(10_000_000)

const options = z
  .strictObject({
    per_address: z
      .strictObject({
        rate: rate.default(10).describe('Requests a second.'),
        burst: burst.default(50).describe('Requests at once, after a pause.'),
      })
      .optional()
      .describe('What one IPv4 address may ask, or one IPv6 /64, which is what a host has at its disposal.'),
    per_prefix: z
      .strictObject({
        ipv4_prefix_length: z.int().min(1).max(32).default(24).describe('Which IPv4 addresses share.'),
        ipv6_prefix_length: z.int().min(1).max(64).default(48).describe('Which IPv6 addresses share.'),
        rate: rate.default(1000).describe('Requests a second.'),
        burst: burst.default(5000).describe('Requests at once, after a pause.'),
      })
      .optional()
      .describe('What all addresses of a network may ask together.'),
    exempt: z
      .array(parsed(parseCidr))
      .max(1000)
      .default([])
      .describe('Networks that may ask as much as they like.'),
    table_size: z
      .int()
      .positive()
      .max(2 ** 22)
      .default(65_536)
      .describe(
        'Sets of four addresses, or networks, whose requests are counted: 48 bytes a set. What you trade is memory against how many addresses at once it takes until the least busy ones are forgotten.',
      ),
  })
  .refine(({ per_address, per_prefix }) => per_address !== undefined || per_prefix !== undefined, {
    message: 'need per_address, per_prefix or both',
  })

/** Refuses announces and scrapes of addresses, or networks, that ask too often. A refused request costs no token. */
export const rateLimit = {
  name,
  options,
  create(
    { per_address: perAddress, per_prefix: perPrefix, exempt, table_size: sets },
    deps: HookDeps,
  ): PreHook {
    const exempted = createNetworkSet(exempt.length)
    for (const cidr of exempt) exempted.add(cidr)
    const elapsedMs = createStopwatch(deps.now)
    const addressBuckets = perAddress && createBuckets({ ...perAddress, sets, bits4: 32, bits6: 64 })
    const prefixBuckets =
      perPrefix &&
      createBuckets({
        ...perPrefix,
        sets,
        bits4: perPrefix.ipv4_prefix_length,
        bits6: perPrefix.ipv6_prefix_length,
      })
    const check = ({ source }: { readonly source: Ip }) => {
      if (exempt.length > 0 && exempted.has(source)) return
      const elapsed = elapsedMs()
      if (addressBuckets && !addressBuckets.ready(source, elapsed)) throw limited
      if (prefixBuckets && !prefixBuckets.ready(source, elapsed)) throw limited
      addressBuckets?.take()
      prefixBuckets?.take()
    }
    return { name, announce: check, scrape: check }
  },
} satisfies PreHookDefinition<typeof options>

/** One for all: under a flood, the stack trace of a new one would cost more than the answer. */
const limited = new ClientError('rate_limited', 'rate limit exceeded, retry later', { retryInMinutes: 1 })

interface AddressBuckets {
  ready(source: Ip, elapsedMs: number): boolean
  take(): void
}

/** Buckets by the first bits of addresses: at most 32 of IPv4, 64 of IPv6. */
function createBuckets(options: {
  readonly rate: number
  readonly burst: number
  readonly sets: number
  readonly bits4: number
  readonly bits6: number
}): AddressBuckets {
  const { bits4, bits6 } = options
  const buckets = createTokenBuckets(options)
  // Nobody outside can tell which addresses share a set, nor make ones that do.
  const key = new Int32Array(new Uint8Array(randomBytes(16)).buffer)
  const mask4 = maskOf(bits4)
  const mask6 = [maskOf(Math.min(bits6, 32)), maskOf(Math.max(bits6 - 32, 0))] as const
  const message = new Int32Array(2)
  const hash = new Int32Array(2)
  return {
    ready: ({ family, bytes }, elapsedMs) => {
      if (family === 4) {
        message[0] = word(bytes, 0) & mask4
        sipHash24(key, message, 4, hash)
      } else {
        message[0] = word(bytes, 0) & mask6[0]
        message[1] = word(bytes, 4) & mask6[1]
        sipHash24(key, message, 8, hash)
      }
      return buckets.ready(hash[1] ?? 0, hash[0] ?? 0, elapsedMs)
    },
    take: () => {
      buckets.take()
    },
  }
}

/** Milliseconds since it was made. When the wall clock is set back, it goes on from where it was. */
function createStopwatch(now: () => number): () => number {
  let lastMs = now()
  let elapsedMs = 0
  return () => {
    const nowMs = now()
    if (nowMs > lastMs) elapsedMs += nowMs - lastMs
    lastMs = nowMs
    return elapsedMs
  }
}

/** The first `bits` of 32. */
function maskOf(bits: number): number {
  return bits === 0 ? 0 : -1 << (32 - bits)
}

function word(bytes: Uint8Array, at: number): number {
  return (
    ((bytes[at] ?? 0) << 24) |
    ((bytes[at + 1] ?? 0) << 16) |
    ((bytes[at + 2] ?? 0) << 8) |
    (bytes[at + 3] ?? 0)
  )
}
