import assert from 'node:assert/strict'
import { test } from 'node:test'
import { SwarmModel } from '../support/swarm-model.ts'

const staleMs = 5000
const alive = { seeder: false, stopped: false, intervalSeconds: 10 }

function modelWith(ports: readonly number[]): SwarmModel {
  const model = new SwarmModel(staleMs)
  for (const port of ports) {
    model.asks(port, { ...alive, atMs: 0 })
    model.answered(port, { ...alive, atMs: 10 })
  }
  return model
}

test('the model of a swarm knows who must not be handed out', () => {
  const model = modelWith([1, 2, 3])
  assert.deepEqual(model.wrongIn(1, [2, 3], 1000), [])
  assert.deepEqual(model.wrongIn(1, [1, 2, 2, 9], 1000), ['self', 'twice', 'unknown'])

  model.asks(3, { ...alive, stopped: true, atMs: 20_000 })
  model.answered(3, { ...alive, stopped: true, atMs: 20_010 })
  assert.deepEqual(model.wrongIn(1, [3], 20_010 + staleMs), [])
  assert.deepEqual(model.wrongIn(1, [3], 20_020 + staleMs), ['stopped'])

  assert.deepEqual(model.wrongIn(1, [2], 30_000 + staleMs), [])
  assert.deepEqual(model.wrongIn(1, [2], 40_000 + staleMs), ['expired'])
})

test('the model of a swarm says how many there are, and no more than it knows', () => {
  const model = modelWith([1, 2, 3])
  assert.deepEqual(model.counts(1000), {
    complete: { least: 0, most: 0 },
    incomplete: { least: 3, most: 3 },
  })
  // It may be a seeder already, or not yet; one that asked and was not answered counts for nothing sure.
  model.asks(1, { ...alive, seeder: true, atMs: 2000 })
  assert.deepEqual(model.counts(2500), {
    complete: { least: 0, most: 1 },
    incomplete: { least: 2, most: 3 },
  })
  model.answered(1, { ...alive, seeder: true, atMs: 3000 })
  assert.deepEqual(model.counts(3500).complete, { least: 1, most: 1 })
  assert.deepEqual(model.counts(30_000).incomplete, { least: 0, most: 2 })
  assert.deepEqual(model.counts(60_000).incomplete, { least: 0, most: 0 })
})
