import assert from 'node:assert/strict'
import { test } from 'node:test'
import { createRandom } from '../../../lib/runtime/random.ts'
import { HashIndex, none } from '../../../server/tracker/memory/hash-index.ts'
import { createSharedArrays } from '../../../server/tracker/memory/shared-arrays.ts'

const handlesMax = 40_000

/** Finds a handle as the store does: by hash, then by looking whether it is the one. */
function find(index: HashIndex, hash: number, handle: number): boolean {
  for (let found = index.first(hash); found !== none; found = index.next(hash))
    if (found === handle) return true
  return false
}

for (const { name, bits } of [
  { name: 'hashes of 32 bits', bits: 32 },
  { name: 'hashes that often fall together', bits: 12 },
]) {
  test(`an index is a set of handles while it grows, shrinks and grows again (${name})`, () => {
    const random = createRandom(Math.random)
    const hashes = Uint32Array.from({ length: handlesMax }, () => {
      const few = Math.floor(random() * 2 ** bits)
      return bits === 32 ? few : (few << (32 - bits)) >>> 0
    })
    const index = new HashIndex(createSharedArrays(), 'test', handlesMax, (handle) => hashes[handle] ?? 0)
    const there = new Set<number>()
    const free = Array.from({ length: handlesMax }, (_, handle) => handle)
    const insert = () => {
      const [handle] = free.splice(Math.floor(random() * Math.min(free.length, 50)), 1)
      if (handle === undefined) return
      index.insert(hashes[handle] ?? 0, handle)
      there.add(handle)
    }
    const remove = () => {
      const [handle] = there
      if (handle === undefined) return
      index.remove(hashes[handle] ?? 0, handle)
      there.delete(handle)
      free.push(handle)
    }
    const check = (all: boolean) => {
      const step = all ? 1 : 97
      for (let handle = 0; handle < handlesMax; handle += step)
        assert.equal(find(index, hashes[handle] ?? 0, handle), there.has(handle), `handle ${handle}`)
    }
    // With hashes that fall together runs are long, so there are fewer of them.
    const most = bits === 32 ? handlesMax : 3000
    for (const size of [Math.floor(most / 3), 10, most, Math.floor(most / 5), most, 0]) {
      let steps = 0
      while (there.size !== size) {
        const growing = there.size < size
        if (random() < (growing ? 0.8 : 0.2)) insert()
        else remove()
        if (++steps % 20_000 === 0) check(false)
      }
      check(bits === 32)
    }
  })
}

test('two threads that share the memory see one index', () => {
  const arrays = createSharedArrays()
  const hashOf = (handle: number) => Math.imul(handle, 0x9e3779b1) >>> 0
  const one = new HashIndex(arrays, 'test', handlesMax, hashOf)
  const other = new HashIndex(createSharedArrays(arrays.buffers), 'test', handlesMax, hashOf)
  for (let handle = 0; handle < 30_000; handle++)
    (handle % 2 === 0 ? one : other).insert(hashOf(handle), handle)
  for (let handle = 0; handle < 30_000; handle++) {
    assert.ok(find(one, hashOf(handle), handle))
    assert.ok(find(other, hashOf(handle), handle))
  }
})
