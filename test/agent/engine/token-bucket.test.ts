import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { TokenBucket } from '../../../agent/engine/token-bucket.ts'

function createBucket(rate: number | undefined) {
  const clock = { ms: 1_000_000 }
  return { clock, bucket: new TokenBucket(rate, () => clock.ms) }
}

/** Takes blocks of a size as soon as it may, for so long. @returns bytes taken */
function takeFor(
  { clock, bucket }: ReturnType<typeof createBucket>,
  milliseconds: number,
  blockBytes: number,
): number {
  const end = clock.ms + milliseconds
  let taken = 0
  for (let turn = 0; clock.ms < end; turn++) {
    assert.ok(turn < 100_000, 'time goes on')
    if (bucket.ready) {
      bucket.take(blockBytes)
      taken += blockBytes
    } else clock.ms = Math.min(end, clock.ms + bucket.waitMs)
  }
  return taken
}

const rates = fc.integer({ min: 1000, max: 2_000_000_000 })
const blocks = fc.integer({ min: 1, max: 300_000 })

test('without a rate it is always ready', () => {
  const { bucket } = createBucket(undefined)
  for (let i = 0; i < 100; i++) {
    bucket.take(1e12)
    assert.ok(bucket.ready)
    assert.equal(bucket.waitMs, 0)
  }
  assert.equal(bucket.rate, undefined)
})

test('who takes whenever it is ready moves the rate, no less and, but for a tenth of a second and a block, no more', () => {
  fc.assert(
    fc.property(rates, blocks, (rate, block) => {
      // A thousand blocks, and a second at least.
      const milliseconds = Math.max(1000, (block * 1_000_000) / rate)
      const bytes = takeFor(createBucket(rate), milliseconds, Math.max(block, rate / 10_000))
      const due = (milliseconds * rate) / 1000
      assert.ok(bytes <= due * 1.1 + block + 1, `${bytes} of ${due}`)
      assert.ok(bytes >= due * 0.9, `${bytes} of ${due}`)
    }),
    { numRuns: 50 },
  )
})

const step = fc.oneof(
  fc.record({ act: fc.constant('take' as const), bytes: blocks }),
  fc.record({ act: fc.constant('give' as const), bytes: blocks }),
  fc.record({
    act: fc.constant('wait' as const),
    ms: fc.oneof(fc.nat(300), fc.double({ min: 0, max: 3, noNaN: true })),
  }),
  fc.record({ act: fc.constant('rate' as const), rate: fc.option(rates, { nil: undefined }) }),
)

test('whatever is taken, given and set, it is ready when it said it would be, and not before', () => {
  fc.assert(
    fc.property(
      fc.option(rates, { nil: undefined }),
      fc.array(step, { maxLength: 60, size: 'max' }),
      (rate, steps) => {
        const { clock, bucket } = createBucket(rate)
        for (const each of steps) {
          if (each.act === 'take') bucket.take(each.bytes)
          else if (each.act === 'give') bucket.give(each.bytes)
          else if (each.act === 'wait') clock.ms += each.ms
          else {
            bucket.rate = each.rate
            assert.equal(bucket.rate, each.rate)
          }
          const wait = bucket.waitMs
          assert.equal(wait === 0, bucket.ready)
          assert.ok(Number.isFinite(wait) && wait >= 0)
          if (wait === 0) continue
          const now = clock.ms
          if (wait > 2 && bucket.rate !== undefined) {
            // The first token is there a millisecond or a token's time before.
            clock.ms = now + wait - Math.max(1, 1000 / bucket.rate) - 0.5
            if (clock.ms > now) assert.ok(!bucket.ready)
          }
          clock.ms = now + wait
          assert.ok(bucket.ready, `${wait} ms later`)
        }
      },
    ),
    { numRuns: 2000 },
  )
})

test('in any stretch of time no more is taken than the rate, a tenth of a second and a block', () => {
  const steps = fc.array(fc.tuple(blocks, fc.nat(200)), { minLength: 1, maxLength: 40, size: 'max' })
  fc.assert(
    fc.property(rates, steps, (rate, all) => {
      const { clock, bucket } = createBucket(rate)
      const taken: { ms: number; bytes: number }[] = []
      for (const [bytes, ms] of all) {
        if (bucket.ready) {
          bucket.take(bytes)
          taken.push({ ms: clock.ms, bytes })
        }
        clock.ms += ms
      }
      for (const [i, first] of taken.entries()) {
        let sum = 0
        for (const { ms, bytes } of taken.slice(i)) {
          // The last block may exceed what is there.
          assert.ok(sum <= ((ms - first.ms) * rate) / 1000 + rate / 10 + 1)
          sum += bytes
        }
      }
    }),
    { numRuns: 2000 },
  )
})

test('what was taken and not moved is given back, but never more than a tenth of a second is there', () => {
  const { clock, bucket } = createBucket(100_000)
  clock.ms += 10_000
  assert.ok(bucket.ready)
  bucket.take(10_000)
  assert.ok(!bucket.ready, 'a tenth of a second was there')
  bucket.take(50_000)
  bucket.give(50_001)
  assert.ok(bucket.ready)
  bucket.give(1_000_000)
  bucket.take(10_000)
  assert.ok(!bucket.ready)
})

test('a debt is paid at the rate that is set meanwhile', () => {
  const { clock, bucket } = createBucket(1000)
  clock.ms += 1000
  assert.ok(bucket.ready)
  bucket.take(1100)
  assert.ok(Math.abs(bucket.waitMs - 1000) <= 2, `${bucket.waitMs}`)
  bucket.rate = 10_000
  assert.ok(Math.abs(bucket.waitMs - 100) <= 2, `${bucket.waitMs}`)
  clock.ms += 50
  bucket.rate = 1000
  assert.ok(Math.abs(bucket.waitMs - 500) <= 2, `${bucket.waitMs}`)
  bucket.rate = undefined
  assert.equal(bucket.waitMs, 0)
})

test('a rate that is set anew gives nothing away', () => {
  const { clock, bucket } = createBucket(1000)
  clock.ms += 1000
  for (let i = 0; i < 1000; i++) bucket.rate = 1000 + (i % 2)
  bucket.take(101)
  assert.ok(!bucket.ready)
  bucket.rate = undefined
  clock.ms += 1_000_000
  bucket.rate = 1_000_000_000
  assert.ok(!bucket.ready, 'time without a rate fills nothing')
})
