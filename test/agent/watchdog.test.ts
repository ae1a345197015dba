import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { createWatchdog } from '../../agent/watchdog.ts'

const numRuns = Number(process.env['RACKSWARM_FUZZ_RUNS'] ?? 1000)

test('a watchdog takes one step further for every stall time without a byte, round and round', () => {
  const watchdog = createWatchdog(10, 0)
  watchdog.progress(0, 0)
  const steps = []
  for (let now = 1; now <= 75; now++) {
    const step = watchdog.check(now)
    if (step !== undefined) steps.push([now, step])
  }
  assert.deepEqual(steps, [
    [10, 'ask'],
    [20, 'remake'],
    [30, 'fallback'],
    [40, 'ask'],
    [50, 'remake'],
    [60, 'fallback'],
    [70, 'ask'],
  ])
})

test('any byte brings a watchdog back to the start', () => {
  const watchdog = createWatchdog(10, 0)
  watchdog.progress(0, 0)
  assert.equal(watchdog.check(10), 'ask')
  watchdog.progress(1, 15)
  assert.equal(watchdog.check(24), undefined)
  assert.equal(watchdog.check(25), 'ask')
  assert.equal(watchdog.stalledMs(25), 10)
})

test('while what is on disk is checked no time passes, and the steps go on afterwards where they were', () => {
  const watchdog = createWatchdog(10, 0)
  watchdog.progress(7, 0)
  watchdog.checked(0, 0)
  assert.equal(watchdog.check(10), 'ask')
  assert.equal(watchdog.check(20), 'remake')
  for (let now = 21; now <= 60; now++) {
    watchdog.checked(now, now)
    assert.equal(watchdog.check(now), undefined)
  }
  assert.equal(watchdog.check(69), undefined)
  assert.equal(watchdog.check(70), 'fallback')
  assert.equal(watchdog.stalledMs(70), 70)
})

test('a watchdog never barks while bytes come in time, and always when they do not', () => {
  fc.assert(
    fc.property(fc.array(fc.integer({ min: 1, max: 30 }), { maxLength: 50 }), (gaps) => {
      const watchdog = createWatchdog(10, 0)
      watchdog.progress(0, 0)
      let now = 0
      for (const [i, gap] of gaps.entries()) {
        let barked = false
        for (let passed = 1; passed <= gap; passed++)
          barked = watchdog.check(now + passed) !== undefined || barked
        if (barked !== gap >= 10) return false
        now += gap
        watchdog.progress(i + 1, now)
      }
      return true
    }),
    { numRuns },
  )
})
