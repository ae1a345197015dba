import assert from 'node:assert/strict'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Lease } from '../../../server/state/lease.ts'
import { holdLease, LeaseBusy, withLease } from '../../../server/state/lease.ts'
import type { StateChange, StateStore } from '../../../server/state/state-store.ts'
import { VersionConflict } from '../../../server/state/state-store.ts'

/** What every StateStore promises. `open` gives an empty store; its `reopen` closes it and opens the same data again. */
export function stateStoreContract(
  name: string,
  open: () => Promise<{ store: StateStore; reopen: () => Promise<StateStore> }>,
): void {
  test(`${name}: a value comes back as it was put, with a version that grows by one`, async () => {
    const { store } = await open()
    assert.equal(await store.get('a'), undefined)
    assert.equal(await store.put('a', { list: [1, 'ü', null] }), 1)
    assert.equal(await store.put('a', 'two'), 2)
    assert.deepEqual(await store.get('a'), { key: 'a', value: 'two', version: 2 })
    await store[Symbol.asyncDispose]()
  })

  test(`${name}: a conditional write happens at its version only, and one of many at once wins`, async () => {
    const { store } = await open()
    await assert.rejects(store.put('a', 1, { ifVersion: 1 }), VersionConflict)
    assert.equal(await store.put('a', 1, { ifVersion: 0 }), 1)
    await assert.rejects(store.put('a', 2, { ifVersion: 0 }), VersionConflict)
    const tries = await Promise.allSettled(
      Array.from({ length: 20 }, (_, i) => store.put('a', i, { ifVersion: 1 })),
    )
    assert.equal(tries.filter(({ status }) => status === 'fulfilled').length, 1)
    await assert.rejects(store.delete('a', { ifVersion: 1 }), VersionConflict)
    assert.equal(await store.delete('a', { ifVersion: 2 }), true)
    assert.equal(await store.delete('a'), false)
    await store[Symbol.asyncDispose]()
  })

  test(`${name}: list is sorted by key, keeps to its prefix, and pages`, async () => {
    const { store } = await open()
    for (const key of ['hosts/b', 'hosts/a', 'host', 'hosts0', 'hosts/ü', 'tokens/x'])
      await store.put(key, key)
    const keys = async (options?: { after?: string; limit?: number }) =>
      (await store.list('hosts/', options)).map(({ key }) => key)
    assert.deepEqual(await keys(), ['hosts/a', 'hosts/b', 'hosts/ü'])
    assert.deepEqual(await keys({ limit: 2 }), ['hosts/a', 'hosts/b'])
    assert.deepEqual(await keys({ after: 'hosts/b' }), ['hosts/ü'])
    await store[Symbol.asyncDispose]()
  })

  test(`${name}: a watcher sees every change under its prefix, in order, until it is aborted`, async () => {
    const { store } = await open()
    const abort = new AbortController()
    const changes = store.watch('hosts/', abort.signal)
    await store.put('hosts/a', 1)
    await store.put('tokens/a', 1)
    await store.put('hosts/a', 2)
    await store.delete('hosts/a')
    const seen: StateChange[] = []
    for await (const change of changes) {
      seen.push(change)
      if (seen.length === 3) abort.abort()
    }
    assert.deepEqual(seen, [
      { kind: 'put', entry: { key: 'hosts/a', value: 1, version: 1 } },
      { kind: 'put', entry: { key: 'hosts/a', value: 2, version: 2 } },
      { kind: 'delete', key: 'hosts/a' },
    ])
    await store[Symbol.asyncDispose]()
  })

  test(`${name}: what was put is there after it was opened again`, async () => {
    const { store, reopen } = await open()
    await Promise.all(Array.from({ length: 100 }, (_, i) => store.put(`k/${String(i).padStart(3, '0')}`, i)))
    const again = await reopen()
    const values = (await again.list('k/')).map(({ value }) => value)
    assert.deepEqual(
      values,
      Array.from({ length: 100 }, (_, i) => i),
    )
    await again[Symbol.asyncDispose]()
  })

  const lease = (holder: string, ttlMs = 600) => ({ holder, ttlMs, random: Math.random })

  test(`${name}: short work under one name is done by one at a time, each with a greater token`, async () => {
    const { store } = await open()
    let working = 0
    const tokens: number[] = []
    await Promise.all(
      Array.from({ length: 8 }, (_, i) =>
        withLease(store, 'turn', { ...lease(`server-${i}`), waitMs: 20_000 }, async ({ token }) => {
          assert.equal(++working, 1)
          tokens.push(token)
          await sleep(5)
          working--
        }),
      ),
    )
    assert.deepEqual(
      tokens,
      [...tokens].sort((a, b) => a - b),
    )
    assert.equal(new Set(tokens).size, 8)
    await store[Symbol.asyncDispose]()
  })

  test(`${name}: a lease outlives its time by being renewed, and who waits too long is told who has it`, async () => {
    const { store } = await open()
    await withLease(store, 'long', { ...lease('one', 300), waitMs: 0 }, async ({ signal }) => {
      await assert.rejects(
        withLease(store, 'long', { ...lease('two', 300), waitMs: 900 }, async () => undefined),
        (error) => error instanceof LeaseBusy && error.message.includes('one'),
      )
      assert.equal(signal.aborted, false)
    })
    assert.equal(await withLease(store, 'long', { ...lease('two'), waitMs: 0 }, async () => 'free'), 'free')
    await assert.rejects(
      withLease(store, 'long', { ...lease('two'), waitMs: 0 }, () =>
        Promise.reject(new Error('of the work')),
      ),
      /of the work/,
    )
    await store[Symbol.asyncDispose]()
  })

  test(`${name}: the lease of a server that died passes on after its time, and its work is told`, async () => {
    const { store } = await open()
    // A server that can no longer write: to the others it is dead.
    let dead = false
    const ofTheDead: StateStore = {
      ...store,
      get: (key) => (dead ? Promise.reject(new Error('cut off')) : store.get(key)),
      put: (...args) => (dead ? Promise.reject(new Error('cut off')) : store.put(...args)),
    }
    const ending = new AbortController()
    const leases: { lease: Lease; atMs: number }[] = []
    const started = Promise.withResolvers<undefined>()
    const first = holdLease(ofTheDead, 'job', { ...lease('one'), signal: ending.signal }, async (lease) => {
      leases.push({ lease, atMs: performance.now() })
      started.resolve(undefined)
      await new Promise((resolve) => {
        lease.signal.addEventListener('abort', resolve)
      })
    })
    await started.promise
    dead = true
    const diedAtMs = performance.now()
    let isToldInTime = false
    await holdLease(store, 'job', { ...lease('two'), signal: ending.signal }, async (lease) => {
      leases.push({ lease, atMs: performance.now() })
      isToldInTime = leases[0]?.lease.signal.aborted === true
      await Promise.resolve()
    })
    const [before, after] = leases
    assert.ok(before && after)
    assert.ok(after.lease.token > before.lease.token)
    assert.ok(after.atMs - before.atMs >= 600, 'not before its time is over')
    assert.ok(after.atMs - diedAtMs < 3000)
    assert.ok(isToldInTime)
    ending.abort()
    await first
    await store[Symbol.asyncDispose]()
  })
}
