import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'node:test'
import { createPrefixHasher } from '../../agent/prefix-hasher.ts'
import { temporaryDirectory } from './engine/fixtures.ts'

test('a hash follows a file that grows, and is right', async (t) => {
  const directory = await temporaryDirectory(t)
  const bytes = randomBytes(5 * 1024 * 1024 + 3)
  const file = join(directory, 'blob')
  await using handle = await open(file, 'w')
  await using hasher = createPrefixHasher()
  using hash = hasher.open(file, bytes.length)
  for (let at = 0; at < bytes.length; at += 1_000_000) {
    const part = bytes.subarray(at, at + 1_000_000)
    await handle.write(part, 0, part.length, at)
    hash.advance(at + part.length)
  }
  assert.equal(await hash.digest, createHash('sha256').update(bytes).digest('hex'))
})

test('a file that ends early is an error, not a digest', async (t) => {
  const directory = await temporaryDirectory(t)
  const file = join(directory, 'blob')
  await using handle = await open(file, 'w')
  await handle.write('abc')
  await using hasher = createPrefixHasher()
  using hash = hasher.open(file, 5)
  hash.advance(5)
  await assert.rejects(hash.digest, /it ends at byte 3, need 5/)
})

test('a hash that is closed rejects, and others go on', async (t) => {
  const directory = await temporaryDirectory(t)
  const file = join(directory, 'blob')
  await using handle = await open(file, 'w')
  await handle.write('abc')
  await using hasher = createPrefixHasher()
  const closed = hasher.open(file, 3)
  closed[Symbol.dispose]()
  await assert.rejects(closed.digest, /closed/)
  using other = hasher.open(file, 3)
  other.advance(3)
  assert.equal(await other.digest, createHash('sha256').update('abc').digest('hex'))
})
