import assert from 'node:assert/strict'
import { test } from 'node:test'
import { keepTrying } from '../../../../server/registry/upstream/keep-trying.ts'
import { createSlots } from '../../../../server/registry/upstream/slots.ts'
import type { UpstreamFault } from '../../../../server/registry/upstream/upstream-error.ts'
import { UpstreamError } from '../../../../server/registry/upstream/upstream-error.ts'

/** Tries what always fails so, on a clock of its own. @returns how often, for how long, and the first waits */
async function tries(fault: UpstreamFault, patient: boolean) {
  let nowMs = 0
  let count = 0
  const waits: number[] = []
  const failing = keepTrying(
    () => {
      count++
      throw new UpstreamError(fault, 'no')
    },
    { sinceMs: 0, patient, signal: new AbortController().signal },
    {
      now: () => nowMs,
      random: () => 1,
      wait: (ms) => {
        waits.push(ms)
        nowMs += ms
        return Promise.resolve()
      },
    },
  )
  await assert.rejects(failing, { fault })
  return { count, hours: nowMs / 3_600_000, minutes: nowMs / 60_000, waits }
}

test('what the upstream does not have is tried twelve times in two minutes or so, the first times at once', async () => {
  for (const fault of ['missing', 'broken'] as const) {
    const { count, minutes, waits } = await tries(fault, true)
    assert.equal(count, 12)
    assert.ok(minutes > 1 && minutes < 4, String(minutes))
    assert.deepEqual(waits.slice(0, 5), [100, 200, 400, 800, 1600])
  }
})

test('an upstream that is down or refuses is waited for a day by events, and not by jobs', async () => {
  for (const fault of ['down', 'refused'] as const) {
    const { hours } = await tries(fault, true)
    assert.ok(hours >= 24 && hours < 24.1, String(hours))
  }
  assert.equal((await tries('down', false)).count, 12)
  assert.equal((await tries('refused', false)).count, 1)
})

test('slots let so many run at once, so many more wait, and refuse the rest', async () => {
  const slots = createSlots('a test', { max: 2, waitingMax: 3 })
  const gate = Promise.withResolvers<undefined>()
  let running = 0
  let most = 0
  const work = () =>
    slots.run(async () => {
      most = Math.max(most, ++running)
      await gate.promise
      running--
    })
  const taken = Array.from({ length: 5 }, work)
  await assert.rejects(work(), { fault: 'down' })
  gate.resolve(undefined)
  await Promise.all(taken)
  await assert.rejects(
    slots.run(() => Promise.reject(new Error('its own'))),
    /its own/,
  )
  await Promise.all([work(), work()])
  assert.equal(most, 2)
})
