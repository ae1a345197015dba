import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { parseMirrorPath } from '../../../agent/mirror/mirror-target.ts'
import { isRepository, isTag } from '../../../lib/protocol/reference.ts'
import { fuzzRuns, spoiltText } from '../../support/fuzz.ts'

const digest = `sha256:${'0123456789abcdef'.repeat(4)}`
const good = [
  '/v2/',
  `/v2/team/app/manifests/1.2.3`,
  `/v2/a/blobs/${digest}`,
  `/v2/manifests/blobs/${digest}`,
]

test('a path of the mirror names what a pull needs', () => {
  assert.deepEqual(parseMirrorPath('/v2'), { kind: 'base' })
  assert.deepEqual(parseMirrorPath('/v2/team/app/manifests/1.2.3'), {
    kind: 'manifest',
    repository: 'team/app',
    reference: { tag: '1.2.3' },
  })
  const manifest = { kind: 'manifest', repository: 'a', reference: digest }
  assert.deepEqual(parseMirrorPath(`/v2/a/manifests/${digest}`), manifest)
  assert.deepEqual(parseMirrorPath(`/v2/a/manifests/${digest.replace(':', '%3A')}`), manifest)
  assert.deepEqual(parseMirrorPath(`/v2/manifests/blobs/blobs/${digest}`), {
    kind: 'blob',
    repository: 'manifests/blobs',
    digest,
  })
  for (const other of [
    '/',
    '/v2/_catalog',
    '/v2/a/tags/list',
    `/v2/a/referrers/${digest}`,
    '/v2/a/blobs/uploads/',
    `/v2/../blobs/${digest}`,
    `/v2/A/blobs/${digest}`,
    '/v2/a/blobs/sha256:abc',
    `/v2/a/blobs/${digest}/`,
    `/v2//blobs/${digest}`,
  ])
    assert.equal(parseMirrorPath(other), undefined, other)
})

test('whatever a path is, it names something that is well formed, or nothing', () => {
  fc.assert(
    fc.property(spoiltText(good), (path) => {
      const target = parseMirrorPath(path)
      if (target === undefined || target.kind === 'base') return
      assert.ok(isRepository(target.repository))
      const last = target.kind === 'blob' ? target.digest : target.reference
      if (typeof last === 'object') assert.ok(isTag(last.tag))
      else assert.match(last, /^sha256:[0-9a-f]{64}$/)
    }),
    { numRuns: fuzzRuns },
  )
})
