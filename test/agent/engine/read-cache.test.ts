import assert from 'node:assert/strict'
import { open, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import fc from 'fast-check'
import type { Lease, SeedFile } from '../../../agent/engine/read-cache.ts'
import { ReadCache } from '../../../agent/engine/read-cache.ts'
import { temporaryDirectory } from './fixtures.ts'

const mebibyte = 1024 * 1024
/** What the cache may hold. */
const memoryMax = 24 * mebibyte

test('the bytes are those of the file, wherever they begin', async (t) => {
  const { cache, path, bytes } = await startCache(t, 2 * mebibyte + 12_345)
  const file = openIn(t, cache, path)
  const near = (at: number) => fc.integer({ min: Math.max(0, at - 3), max: at + 3 })
  const position = fc.oneof(
    fc.nat(bytes.length - 1),
    near(0),
    near(mebibyte),
    near(2 * mebibyte),
    near(bytes.length).map((at) => Math.min(at, bytes.length - 1)),
  )
  await fc.assert(
    fc.asyncProperty(
      position,
      fc.oneof(fc.integer({ min: 1, max: 3 * mebibyte }), near(8)),
      async (at, length) => {
        const wanted = Math.max(1, length)
        const lease = await read(file, at, wanted)
        assert.ok(lease.bytes.length >= 1 && lease.bytes.length <= wanted)
        assert.ok(lease.bytes.equals(bytes.subarray(at, at + lease.bytes.length)))
        lease.release()
      },
    ),
    { numRuns: 300 },
  )
  const parts: Buffer[] = []
  for (let at = 0; at < bytes.length; at += parts.at(-1)?.length ?? 0) {
    const lease = await read(file, at, 700_000)
    parts.push(Buffer.from(lease.bytes))
    lease.release()
  }
  assert.ok(Buffer.concat(parts).equals(bytes), 'piece by piece it is the whole file')
})

test('who reads the same place shares the memory, and what is in memory comes at once', async (t) => {
  const { cache, path, bytes } = await startCache(t, mebibyte)
  const file = openIn(t, cache, path)
  const leases = await Promise.all(Array.from({ length: 50 }, (_, i) => read(file, 1000 * i, 1000)))
  assert.equal(new Set(leases.map((lease) => lease.bytes.buffer)).size, 1)
  for (const [i, lease] of leases.entries()) {
    assert.ok(lease.bytes.equals(bytes.subarray(1000 * i, 1000 * i + 1000)))
    lease.release()
  }
  await writeFile(path, Buffer.alloc(mebibyte, 1))
  assert.ok(comesAtOnce(file, 5))
  assert.ok((await readOnce(file, 5, 10)).equals(bytes.subarray(5, 15)), 'it is not read again')
})

test('two files are kept apart, and so is one that is opened twice', async (t) => {
  const { cache, path, bytes, directory } = await startCache(t, 5000)
  const other = join(directory, 'other')
  await writeFile(other, Buffer.alloc(5000, 7))
  const [one, two, again] = [openIn(t, cache, path), openIn(t, cache, other), openIn(t, cache, path)]
  assert.ok((await readOnce(one, 0, 5000)).equals(bytes))
  assert.ok((await readOnce(two, 0, 5000)).equals(Buffer.alloc(5000, 7)))
  await one.close()
  assert.ok((await readOnce(again, 0, 5000)).equals(bytes))
  const fresh = new ReadCache(() => 0)
  const many = Array.from({ length: 20 }, () => openIn(t, fresh, path))
  for (const each of many) await readOnce(each, 0, 1)
  for (const [i, each] of many.entries()) {
    assert.ok(comesAtOnce(each, 0), 'the others are still in memory')
    await each.close()
    assert.ok(many.slice(i + 1).every((next) => comesAtOnce(next, 0)))
  }
})

test('what has changed is read again, and who has the old bytes keeps them', async (t) => {
  const { cache, path, bytes } = await startCache(t, 3 * mebibyte)
  const file = openIn(t, cache, path)
  const old = await read(file, mebibyte, 100)
  const elsewhere = await readOnce(file, 0, 100)
  await writeInPlace(path, Buffer.alloc(3 * mebibyte, 9))
  file.forget(2 * mebibyte - 1, 2)
  assert.ok((await readOnce(file, mebibyte, 100)).equals(Buffer.alloc(100, 9)))
  assert.ok((await readOnce(file, 0, 100)).equals(elsewhere), 'what was not said to have changed is not')
  assert.ok(old.bytes.equals(bytes.subarray(mebibyte, mebibyte + 100)))
  old.release()
})

test('bytes that were being read when they changed are given to nobody who asks later', async (t) => {
  const { cache, path } = await startCache(t, 1000)
  const file = openIn(t, cache, path)
  const early = read(file, 0, 1000)
  file.forget(0, 1)
  await writeInPlace(path, Buffer.alloc(1000, 9))
  const late = await readOnce(file, 0, 1000)
  assert.ok(late.equals(Buffer.alloc(1000, 9)))
  const lease = await early
  lease.release()
})

test('beyond the end, and of a file that is not there, comes an error, once', async (t) => {
  const { cache, path, directory } = await startCache(t, mebibyte + 10)
  const file = openIn(t, cache, path)
  assert.equal((await readOnce(file, mebibyte + 9, 100)).length, 1)
  await assert.rejects(read(file, mebibyte + 10, 1), /ends at byte 1048586/)
  await assert.rejects(read(file, 7 * mebibyte, 1), /ends at byte/)
  const missing = openIn(t, cache, join(directory, 'later'))
  const both = [read(missing, 0, 10), read(missing, 5, 10)]
  for (const each of both) await assert.rejects(each, { code: 'ENOENT' })
  await assert.rejects(missing.hold(), { code: 'ENOENT' })
  await writeFile(join(directory, 'later'), 'here now')
  assert.equal((await readOnce(missing, 0, 10)).toString(), 'here now')
})

test('a file that is held may be renamed or removed', async (t) => {
  const { cache, path, bytes } = await startCache(t, 1000)
  const file = openIn(t, cache, path)
  await file.hold()
  await rename(path, `${path}.moved`)
  assert.ok((await readOnce(file, 0, 1000)).equals(bytes))
  await rm(`${path}.moved`)
  file.forget(0, 1000)
  assert.ok((await readOnce(file, 0, 1000)).equals(bytes))
})

test('memory stays within 24 MiB, however much is read, and is given up when nobody asks any more', async (t) => {
  const { cache, path, bytes, clock } = await startCache(t, 60 * mebibyte)
  const file = openIn(t, cache, path)
  const before = await arrayBytes()
  for (let turn = 0; turn < 2; turn++) await assertReads(file, bytes)
  const held = (await arrayBytes()) - before
  assert.ok(held <= memoryMax + mebibyte, `${held} bytes`)
  clock.ms += 5000
  await readOnce(file, bytes.length - 1, 1)
  clock.ms += 6000
  cache.sweep()
  const left = (await arrayBytes()) - before
  assert.ok(left <= 1.5 * mebibyte, `${left} bytes are left, of one chunk`)
  assert.ok(comesAtOnce(file, bytes.length - 1), 'what was asked for lately is kept')
  clock.ms += 11_000
  cache.sweep()
  assert.ok((await arrayBytes()) - before <= mebibyte / 2)
  await assertReads(file, bytes)
  file.forget(0, bytes.length)
  cache.sweep()
  assert.ok((await arrayBytes()) - before <= mebibyte / 2, 'also what was kept for the next read')
})

test('bytes on their way to a socket stay as they are, however much is read meanwhile', async (t) => {
  const { cache, path, bytes, clock } = await startCache(t, 60 * mebibyte)
  const file = openIn(t, cache, path)
  const leases: (readonly [number, Lease])[] = []
  for (let at = 0; at < bytes.length; at += mebibyte) leases.push([at, await read(file, at + 7, 1000)])
  clock.ms += 60_000
  cache.sweep()
  for (let at = 0; at < bytes.length; at += mebibyte) await readOnce(file, at, 10)
  for (const [at, lease] of leases) {
    assert.ok(lease.bytes.equals(bytes.subarray(at + 7, at + 1007)))
    lease.release()
  }
  leases.length = 0
  const before = await arrayBytes()
  clock.ms += 60_000
  cache.sweep()
  assert.ok(before - (await arrayBytes()) >= 50 * mebibyte, 'memory is given up once they are sent')
})

test('whatever is read, forgotten and closed, no lease changes until it is released', async (t) => {
  const length = 40 * mebibyte
  const { path, bytes } = await startCache(t, length)
  const step = fc.record({
    act: fc.constantFrom('read', 'read', 'read', 'burst', 'release', 'release', 'forget', 'sweep', 'reopen'),
    at: fc.nat(length - 1),
    which: fc.nat(100),
  })
  await fc.assert(
    fc.asyncProperty(fc.array(step, { minLength: 20, maxLength: 80, size: 'max' }), async (steps) => {
      const clock = { ms: 0 }
      const cache = new ReadCache(() => clock.ms)
      let file = cache.open(path)
      const out: { at: number; lease: Lease }[] = []
      const release = (which: number) => {
        const [each] = out.splice(which % Math.max(1, out.length), 1)
        if (each === undefined) return
        const { at, lease } = each
        assert.ok(lease.bytes.equals(bytes.subarray(at, at + lease.bytes.length)))
        lease.release()
      }
      for (const { act, at, which } of steps) {
        clock.ms += 50 * which
        if (act === 'read') out.push({ at, lease: await read(file, at, 4096) })
        else if (act === 'release') release(which)
        else if (act === 'forget') file.forget(at, which * 50_000)
        else if (act === 'sweep') cache.sweep()
        else if (act === 'reopen') {
          const under = read(file, at, 4096).then(
            (lease) => out.push({ at, lease }),
            () => undefined,
          )
          await file.close()
          await under
          file = cache.open(path)
        } else {
          const places = Array.from({ length: 8 }, (_, i) => (at + i * 3 * mebibyte) % length)
          const leases = await Promise.all(places.map((place) => read(file, place, 4096)))
          for (const [i, lease] of leases.entries()) out.push({ at: places[i] ?? 0, lease })
        }
      }
      while (out.length > 0) release(0)
      await file.close()
    }),
    { numRuns: 30 },
  )
})

test('close() lets go of the file: reads under way are answered, later ones are refused, leases stay good', async (t) => {
  const { cache, path, bytes, directory } = await startCache(t, 3 * mebibyte)
  const file = cache.open(path)
  const other = openIn(t, cache, await copyOf(directory, bytes))
  const lease = await read(file, 0, 1000)
  const under = Promise.allSettled([
    read(file, mebibyte, 10),
    read(file, mebibyte + 5, 10),
    read(file, 2 * mebibyte, 10),
  ])
  await file.close()
  for (const each of await under) if (each.status === 'fulfilled') each.value.release()
  await assert.rejects(read(file, 0, 10))
  await assert.rejects(read(file, 2 * mebibyte + 100, 10))
  assert.ok(lease.bytes.equals(bytes.subarray(0, 1000)))
  lease.release()
  assert.ok((await readOnce(other, 0, 1000)).equals(bytes.subarray(0, 1000)))
  await cache.open(path).close()
  await file.close()
})

async function startCache(t: TestContext, length: number) {
  const directory = await temporaryDirectory(t)
  const bytes = Buffer.from(
    Uint32Array.from({ length: Math.ceil(length / 4) }, (_, i) => i * 2_654_435_761).buffer,
  )
  const clock = { ms: 1000 }
  const cache = new ReadCache(() => clock.ms)
  const path = await copyOf(directory, bytes.subarray(0, length))
  return { directory, path, clock, cache, bytes: bytes.subarray(0, length) }
}

async function copyOf(directory: string, bytes: Buffer): Promise<string> {
  const path = join(directory, `blob-${performance.now()}`)
  await writeFile(path, bytes)
  return path
}

/** Unlike a file that is written anew, it is never shorter meanwhile. */
async function writeInPlace(path: string, bytes: Buffer): Promise<void> {
  const file = await open(path, 'r+')
  await file.write(bytes, 0, bytes.length, 0)
  await file.close()
}

function openIn(t: TestContext, cache: ReadCache, path: string): SeedFile {
  const file = cache.open(path)
  t.after(() => file.close())
  return file
}

function read(file: SeedFile, position: number, length: number): Promise<Lease> {
  const { promise, resolve, reject } = Promise.withResolvers<Lease>()
  let calls = 0
  file.read(position, length, (lease, error) => {
    assert.equal(++calls, 1, 'it calls back once')
    if (lease) resolve(lease)
    else reject(error ?? new Error('neither bytes nor an error'))
  })
  return promise
}

function comesAtOnce(file: SeedFile, position: number): boolean {
  let came = false
  file.read(position, 1, (lease) => {
    came = true
    lease?.release()
  })
  return came
}

async function assertReads(file: SeedFile, bytes: Buffer): Promise<void> {
  for (let at = 0; at < bytes.length; at += mebibyte / 2) {
    const lease = await read(file, at, mebibyte / 2)
    assert.ok(lease.bytes.equals(bytes.subarray(at, at + mebibyte / 2)))
    lease.release()
  }
}

/** A copy of the bytes. */
async function readOnce(file: SeedFile, position: number, length: number): Promise<Buffer> {
  const lease = await read(file, position, length)
  const bytes = Buffer.from(lease.bytes)
  lease.release()
  return bytes
}

/** Bytes of all buffers that something still refers to. */
async function arrayBytes(): Promise<number> {
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc') as () => void
  // Nothing is left on the stack.
  await new Promise(setImmediate)
  collect()
  collect()
  return process.memoryUsage().arrayBuffers
}
