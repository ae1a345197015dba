import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { parseManifest, safeFileName } from '../../agent/manifest.ts'
import { ClientError } from '../../lib/protocol/errors.ts'

const numRuns = Number(process.env['RACKSWARM_FUZZ_RUNS'] ?? 1000)
const hex = 'ab'.repeat(32)

const layer = (title?: string) => ({
  digest: `sha256:${hex}`,
  size: 3,
  ...(title === undefined ? {} : { annotations: { 'org.opencontainers.image.title': title } }),
})
const nameOf = (title?: string) =>
  parseManifest(Buffer.from(JSON.stringify({ layers: [layer(title)] }))).blobs[0]?.name

test('a plain title names the file', () => {
  assert.equal(nameOf('build.tar'), 'build.tar')
  assert.equal(nameOf('Größe 2.tar.gz'), 'Größe 2.tar.gz')
})

test('a title that is no plain file name is not used', () => {
  for (const title of [
    '',
    '.',
    '..',
    '../x',
    '/etc/passwd',
    'a/b',
    'a\\b',
    'a\0b',
    'a\nb',
    '.hidden',
    '-rf',
    'x'.repeat(300),
  ])
    assert.equal(nameOf(title), hex, JSON.stringify(title))
  assert.equal(nameOf(), hex)
})

test('two blobs of one title get two names', () => {
  const other = { ...layer('a'), digest: `sha256:${'cd'.repeat(32)}` }
  const { blobs } = parseManifest(Buffer.from(JSON.stringify({ layers: [layer('a'), other] })))
  assert.deepEqual(
    blobs.map(({ name }) => name),
    ['a', 'cd'.repeat(32)],
  )
})

test('no title gets out of its directory', () => {
  fc.assert(
    fc.property(fc.string({ unit: 'binary' }), (title) => {
      const name = safeFileName(title)
      return name === undefined || (!/[/\\\0]/.test(name) && !name.startsWith('.') && name !== '')
    }),
    { numRuns },
  )
})

test('a manifest of any bytes is read or refused', () => {
  fc.assert(
    fc.property(fc.oneof(fc.json(), fc.string()), (text) => {
      try {
        parseManifest(Buffer.from(text))
      } catch (error) {
        assert.ok(error instanceof ClientError)
      }
    }),
    { numRuns },
  )
})
