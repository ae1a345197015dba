import assert from 'node:assert/strict'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import fc from 'fast-check'
import type { z } from 'zod'
import { ClientError } from '../../../../lib/protocol/errors.ts'
import { rateLimit } from '../../../../server/tracker/hooks/rate-limit.ts'
import { createTokenBuckets } from '../../../../server/tracker/hooks/token-buckets.ts'
import { announceOf, answer, createHook, deps, scrapeOf } from './support.ts'

const refused = 'rate limit exceeded, retry later'

test('an address has its burst, then its rate; scrapes count as well', async (t) => {
  const { clock, hook } = await start(t, { per_address: { rate: 2, burst: 3 } })
  const announce = (source: string) => answer(() => hook.announce?.(announceOf({ source })))
  const scrape = (source: string) => answer(() => hook.scrape?.(scrapeOf({ source })))
  assert.deepEqual([announce('10.0.0.1'), scrape('10.0.0.1'), announce('10.0.0.1')], ['ok', 'ok', 'ok'])
  assert.equal(announce('10.0.0.1'), refused)
  assert.equal(scrape('10.0.0.1'), refused)
  assert.equal(announce('10.0.0.2'), 'ok')
  clock.ms += 499
  assert.equal(announce('10.0.0.1'), refused)
  clock.ms += 1
  assert.equal(announce('10.0.0.1'), 'ok')
  assert.equal(announce('10.0.0.1'), refused)
  clock.ms += 3_600_000
  assert.deepEqual(
    Array.from({ length: 4 }, () => announce('10.0.0.1')),
    ['ok', 'ok', 'ok', refused],
  )
})

test('a refusal says when to come back', async (t) => {
  const { hook } = await start(t, { per_address: { rate: 1, burst: 1 } })
  void hook.announce?.(announceOf({}))
  assert.throws(
    () => hook.announce?.(announceOf({})),
    (error) => error instanceof ClientError && error.code === 'rate_limited' && error.retryInMinutes === 1,
  )
})

test('an IPv6 host is its /64', async (t) => {
  const { hook } = await start(t, { per_address: { rate: 1, burst: 1 } })
  const announce = (source: string) => answer(() => hook.announce?.(announceOf({ source })))
  assert.equal(announce('2001:db8:0:1::1'), 'ok')
  assert.equal(announce('2001:db8:0:1:ffff::2'), refused)
  assert.equal(announce('2001:db8:0:2::1'), 'ok')
  // An IPv4 address and a network of IPv6 that starts with the same bytes are two.
  assert.equal(announce('32.1.13.184'), 'ok')
})

test('addresses of a network share what the network may ask', async (t) => {
  const { hook } = await start(t, {
    per_prefix: { ipv4_prefix_length: 24, ipv6_prefix_length: 48, rate: 1, burst: 2 },
  })
  const announce = (source: string) => answer(() => hook.announce?.(announceOf({ source })))
  assert.deepEqual(['10.0.0.1', '10.0.0.200', '10.0.0.77'].map(announce), ['ok', 'ok', refused])
  assert.equal(announce('10.0.1.1'), 'ok')
  assert.deepEqual(['2001:db8:7:1::1', '2001:db8:7:ffff::1', '2001:db8:7:8::1'].map(announce), [
    'ok',
    'ok',
    refused,
  ])
  assert.equal(announce('2001:db8:8:1::1'), 'ok')
})

test('a request that the network may not make costs the address nothing', async (t) => {
  const { hook, clock } = await start(t, {
    per_address: { rate: 0.001, burst: 2 },
    per_prefix: { rate: 1, burst: 1 },
  })
  const announce = (source: string) => answer(() => hook.announce?.(announceOf({ source })))
  assert.equal(announce('10.0.0.1'), 'ok')
  for (let i = 0; i < 5; i++) assert.equal(announce('10.0.0.2'), refused)
  clock.ms += 1000
  assert.equal(announce('10.0.0.2'), 'ok')
  clock.ms += 1000
  assert.equal(announce('10.0.0.2'), 'ok')
  clock.ms += 1000
  assert.equal(announce('10.0.0.2'), refused)
})

test('exempt networks ask as much as they like', async (t) => {
  const { hook } = await start(t, {
    per_address: { rate: 1, burst: 1 },
    exempt: ['10.9.0.0/16', 'fd00::/8'],
  })
  for (let i = 0; i < 10; i++) {
    assert.equal(
      answer(() => hook.announce?.(announceOf({ source: '10.9.1.2' }))),
      'ok',
    )
    assert.equal(
      answer(() => hook.scrape?.(scrapeOf({ source: 'fd00::1' }))),
      'ok',
    )
  }
})

test('a clock that is set back neither refuses those who asked before nor gives them more', async (t) => {
  const { hook, clock } = await start(t, { per_address: { rate: 1, burst: 2 } })
  const announce = () => answer(() => hook.announce?.(announceOf({})))
  assert.deepEqual([announce(), announce(), announce()], ['ok', 'ok', refused])
  clock.ms -= 3_600_000
  assert.equal(announce(), refused)
  clock.ms += 1000
  assert.deepEqual([announce(), announce()], ['ok', refused])
})

test('a flood of addresses does not make the limiter forget one that it refuses', async (t) => {
  const { hook } = await start(t, { per_address: { rate: 1, burst: 20 }, table_size: 8 })
  const announce = (source: string) => answer(() => hook.announce?.(announceOf({ source })))
  for (let i = 0; i < 20; i++) announce('192.0.2.1')
  assert.equal(announce('192.0.2.1'), refused)
  for (let i = 0; i < 20_000; i++) announce(`10.${i >> 16}.${(i >> 8) & 255}.${i & 255}`)
  assert.equal(announce('192.0.2.1'), refused)
})

test('with room for it, no address is counted as another', async (t) => {
  const { hook } = await start(t, { per_address: { rate: 1, burst: 1 } })
  const sources = Array.from({ length: 20_000 }, (_, i) => `10.${i & 3}.${i >> 10}.${(i >> 2) & 255}`)
  for (const source of sources)
    assert.equal(
      answer(() => hook.announce?.(announceOf({ source }))),
      'ok',
    )
  const again = sources.filter((source) => answer(() => hook.announce?.(announceOf({ source }))) === refused)
  // Five of one set may be among them: then the fifth took the place of one.
  assert.ok(again.length > sources.length * 0.99, String(again.length))
})

test('a bucket is as full as a simple model says', () => {
  const step = fc.oneof(
    fc.record({ kind: fc.constant('wait' as const), ms: fc.nat(2500) }),
    fc.constant({ kind: 'ask' as const, ms: 0 }),
  )
  fc.assert(
    fc.property(
      fc.integer({ min: 1, max: 50 }),
      fc.integer({ min: 1, max: 20 }),
      fc.array(step, { maxLength: 200 }),
      (rate, burst, steps) => {
        const buckets = createTokenBuckets({ rate, burst, sets: 1 })
        let elapsedMs = 0
        let thousandths = 1000 * burst
        for (const { kind, ms } of steps) {
          elapsedMs += ms
          thousandths = Math.min(1000 * burst, thousandths + ms * rate)
          if (kind === 'wait') continue
          const ready = buckets.ready(7, 9, elapsedMs)
          assert.equal(ready, thousandths >= 1000)
          if (!ready) continue
          buckets.take()
          thousandths -= 1000
        }
      },
    ),
    { numRuns: 1000 },
  )
})

test('options: one of the two limits is needed, and numbers stay in their ranges', () => {
  const faults = (options: unknown) =>
    rateLimit.options
      .safeParse(options)
      .error?.issues.map(({ path, message }) => `${path.join('.')}: ${message}`) ?? []
  assert.deepEqual(faults({}), [': need per_address, per_prefix or both'])
  assert.deepEqual(faults({ per_address: {} }), [])
  assert.match(faults({ per_address: { rate: 0 } }).join(), /^per_address\.rate: /)
  assert.match(faults({ per_prefix: { ipv6_prefix_length: 65 } }).join(), /^per_prefix\.ipv6_prefix_length: /)
  assert.match(
    faults({ per_address: {}, exempt: ['10.0.0.1/8'] }).join(),
    /^exempt\.0: .*did you mean 10\.0\.0\.0\/8/,
  )
})

async function start(t: TestContext, options: z.input<typeof rateLimit.options>) {
  const clock = { ms: 1_700_000_000_000 }
  const hook = await createHook(t, rateLimit, options, { ...deps, now: () => clock.ms })
  return { clock, hook }
}
