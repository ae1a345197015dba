import assert from 'node:assert/strict'
import { test } from 'node:test'
import { createReadCache } from '../../../server/registry/read-cache.ts'

test('what is asked for at once and shortly after is read once, and again when it is old', async () => {
  const { cache, read, reads, pass } = start()
  const answers = await Promise.all([1, 2, 3].map(() => cache.get('a', read('one'))))
  pass(999)
  assert.equal(await cache.get('a', read('two')), 'one')
  assert.deepEqual([answers, reads()], [['one', 'one', 'one'], 1])
  pass(1)
  assert.equal(await cache.get('a', read('two')), 'two')
})

test('what was read while it changed is not remembered', async () => {
  const { cache, read } = start()
  const gate = Promise.withResolvers<string>()
  const early = cache.get('a', () => gate.promise)
  cache.forget('a')
  gate.resolve('old')
  assert.equal(await early, 'old')
  assert.equal(await cache.get('a', read('new')), 'new')
})

test('what is not there, too large, or could not be read is asked for again', async () => {
  const { cache, read } = start()
  assert.equal(await cache.get('a', read(undefined)), undefined)
  assert.equal(await cache.get('a', read('large')), 'large')
  await assert.rejects(
    cache.get('a', () => Promise.reject(new Error('disk'))),
    /disk/,
  )
  assert.equal(await cache.get('a', read('one')), 'one')
})

function start() {
  let nowMs = 0
  let count = 0
  const cache = createReadCache<string>({
    entriesMax: 10,
    freshMs: 1000,
    keeps: (value) => value.length < 5,
    now: () => nowMs,
  })
  return {
    cache,
    read: (value: string | undefined) => () => {
      count++
      return Promise.resolve(value)
    },
    reads: () => count,
    pass: (ms: number) => {
      nowMs += ms
    },
  }
}
