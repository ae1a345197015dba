import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { isRepository } from '../../../lib/protocol/reference.ts'
import { ApiError } from '../../../server/registry/api-error.ts'
import { blobsOf, readManifest, subjectIn } from '../../../server/registry/oci-manifest.ts'
import { parseOciPath } from '../../../server/registry/oci-path.ts'
import { torrentAccepted } from '../../../server/registry/torrents.ts'

/** Runs a parser that may refuse what it is given, in words, and do nothing else. */
function refuses<Result>(work: () => Result): Result | undefined {
  try {
    return work()
  } catch (error) {
    assert.ok(error instanceof ApiError && error.status >= 400 && error.status < 500, String(error))
    return undefined
  }
}

test('any bytes under any type are a manifest or refused in words, and looking for a subject never fails', () => {
  const descriptor = fc.record({ mediaType: fc.string(), digest: fc.string(), size: fc.nat() })
  const manifest = fc.record(
    {
      schemaVersion: fc.oneof(fc.constant(2), fc.anything()),
      mediaType: fc.oneof(fc.constant('a/b'), fc.anything()),
      config: fc.oneof(descriptor, fc.anything()),
      layers: fc.oneof(fc.array(descriptor), fc.anything()),
      blobs: fc.array(descriptor),
      subject: fc.oneof(descriptor, fc.anything()),
    },
    { requiredKeys: [] },
  )
  const bytes = fc.oneof(
    fc.uint8Array().map((raw) => Buffer.from(raw)),
    fc.jsonValue().map((value) => Buffer.from(JSON.stringify(value))),
    manifest.map((value) =>
      Buffer.from(JSON.stringify(value, (_, each: unknown) => (typeof each === 'bigint' ? 1 : each))),
    ),
  )
  fc.assert(
    fc.property(
      bytes,
      fc.option(fc.oneof(fc.string(), fc.constant('a/b; c=d')), { nil: undefined }),
      (raw, type) => {
        subjectIn(raw)
        const read = refuses(() => readManifest(type, raw))
        if (!read) return
        assert.match(read.mediaType, /^[^\s;]+\/[^\s;]+$/)
        assert.ok(Array.isArray(blobsOf(read.content)))
      },
    ),
  )
})

test('any path below /v2/ names something of a repository or is refused in words', () => {
  const word = fc.oneof(
    fc.constantFrom(
      'blobs',
      'uploads',
      'manifests',
      'tags',
      'list',
      'referrers',
      'a',
      'sha256:0',
      '',
      '..',
      '%2f',
      '%zz',
    ),
    fc.string(),
  )
  fc.assert(
    fc.property(fc.array(word, { maxLength: 7 }), (words) => {
      const target = refuses(() => parseOciPath(words.join('/')))
      if (target && 'repository' in target) assert.ok(isRepository(target.repository), target.repository)
    }),
  )
})

test('any Accept header takes a torrent, bytes, both or neither', () => {
  fc.assert(
    fc.property(fc.string(), (accept) => {
      torrentAccepted(accept)
    }),
  )
  const torrent = 'application/x-bittorrent'
  for (const [accept, expected] of [
    [undefined, { torrent: false, bytes: true }],
    ['*/*', { torrent: false, bytes: true }],
    [torrent, { torrent: true, bytes: false }],
    [`text/html, ${torrent.toUpperCase()};q=0.5`, { torrent: true, bytes: false }],
    [`${torrent}, */*;q=0.1`, { torrent: true, bytes: true }],
    [`${torrent};q=0, application/*`, { torrent: false, bytes: true }],
    [`${torrent}, application/octet-stream; q=0.000`, { torrent: true, bytes: false }],
  ] as const)
    assert.deepEqual(torrentAccepted(accept), expected, accept ?? 'none')
})
