import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { test } from 'node:test'
import fc from 'fast-check'
import { intervalVariation, variation } from '../../../../server/tracker/hooks/interval-variation.ts'
import { announceOf, createHook } from './support.ts'

const infoHash = Buffer.from('00000000000000000001')
const peerId = Buffer.from('-TR0960-6ep6svaa61r4')

test('a peer of a swarm gets what chihaya gives it', () => {
  const { chance, deltaSeconds } = variation(infoHash, peerId, 60)
  assert.ok(Math.abs(chance - 0.949433445930481) < 1e-15, String(chance))
  assert.equal(deltaSeconds, 57)
})

test('arithmetic on halves gives what BigInts give', () => {
  const bytes = fc.oneof(
    fc.uint8Array({ minLength: 20, maxLength: 20 }),
    fc
      .array(fc.constantFrom(0, 1, 0x7f, 0x80, 0xff), { minLength: 20, maxLength: 20 })
      .map((some) => Uint8Array.from(some)),
  )
  fc.assert(
    fc.property(bytes, bytes, fc.integer({ min: 1, max: 86_400 }), (hash, id, maxSeconds) => {
      assert.deepEqual(variation(hash, id, maxSeconds), withBigInts(hash, id, maxSeconds))
    }),
    { numRuns: 5000 },
  )
})

test('options outside their range have chihaya’s words', () => {
  const faults = (probability: number, delta: number) =>
    intervalVariation.options
      .safeParse({ modify_response_probability: probability, max_increase_delta: delta })
      .error?.issues.map(({ message }) => message)
  assert.equal(faults(0.5, 60), undefined)
  assert.equal(faults(1, 60), undefined)
  assert.deepEqual(faults(0, 60), ['invalid modify_response_probability'])
  assert.deepEqual(faults(1.1, 60), ['invalid modify_response_probability'])
  assert.deepEqual(faults(0.5, 0), ['invalid max_increase_delta'])
  assert.deepEqual(faults(0.5, -10), ['invalid max_increase_delta'])
  assert.deepEqual(faults(0.5, 1.5), ['invalid max_increase_delta'])
})

test('with a probability of one every interval grows, the least one too where that is asked for', async (t) => {
  const options = { modify_response_probability: 1, max_increase_delta: 10 }
  const hook = await createHook(t, intervalVariation, { ...options, modify_min_interval: true })
  const intervalOnly = await createHook(t, intervalVariation, options)
  for (let i = 0; i < 200; i++) {
    const request = announceOf({ infoHash: i.toString(16).padStart(40, '0') })
    await hook.announce?.(request)
    assert.ok(request.extraIntervalSeconds >= 1 && request.extraIntervalSeconds <= 10)
    assert.equal(request.extraMinIntervalSeconds, request.extraIntervalSeconds)
    await intervalOnly.announce?.(request)
    assert.equal(request.extraIntervalSeconds, 2 * request.extraMinIntervalSeconds)
  }
})

test('with a lower probability that share of the peers is put off, each always by the same', async (t) => {
  const hook = await createHook(t, intervalVariation, {
    modify_response_probability: 0.25,
    max_increase_delta: 10,
  })
  const extra = async (i: number) => {
    const request = announceOf({ infoHash: createHash('sha1').update(String(i)).digest('hex') })
    await hook.announce?.(request)
    return request.extraIntervalSeconds
  }
  const first = await Promise.all(Array.from({ length: 4000 }, (_, i) => extra(i)))
  assert.deepEqual(await Promise.all(first.map((_, i) => extra(i))), first)
  const share = first.filter((seconds) => seconds > 0).length / first.length
  assert.ok(share > 0.2 && share < 0.3, String(share))
  assert.deepEqual(
    [...new Set(first)].sort((a, b) => a - b),
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
  )
})

test('the vector decides at its own probability: p < probability', async (t) => {
  const request = () => announceOf({ infoHash: infoHash.toString('hex'), peerId: peerId.toString('latin1') })
  for (const [probability, wanted] of [
    [0.9494, 0],
    [0.9495, 57],
  ] as const) {
    const hook = await createHook(t, intervalVariation, {
      modify_response_probability: probability,
      max_increase_delta: 60,
    })
    const one = request()
    await hook.announce?.(one)
    assert.equal(one.extraIntervalSeconds, wanted)
  }
})

function withBigInts(hash: Uint8Array, id: Uint8Array, maxSeconds: number) {
  const bits = (1n << 64n) - 1n
  const state = (bytes: Uint8Array) => {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
    return (view.getBigUint64(0) + view.getBigUint64(8)) & bits
  }
  const magnitude = (value: bigint) => {
    const signed = BigInt.asIntN(64, value)
    return signed < 0n ? -signed : signed
  }
  let x = state(hash)
  const y = state(id)
  const first = (x + y) & bits
  x = (x ^ (x << 23n)) & bits
  const z = x ^ y ^ (x >> 18n) ^ (y >> 5n)
  const second = (y + z) & bits
  return {
    chance: Number(magnitude(first) % (1n << 24n)) / 2 ** 24,
    deltaSeconds: Number(magnitude(second) % BigInt(maxSeconds)) + 1,
  }
}
