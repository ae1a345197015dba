import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import {
  contentDigestFromHex,
  contentDigestOf,
  digestHex,
  digestOf,
  parseContentDigest,
  parseDigest,
} from '../../../lib/protocol/digest.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'

test('digests of any bytes are read back, by either algorithm, and told apart by their hex digits', () => {
  fc.assert(
    fc.property(fc.uint8Array(), fc.boolean(), (bytes, long) => {
      const like = long ? parseContentDigest(`sha512:${'0'.repeat(128)}`) : digestOf(bytes)
      const digest = contentDigestOf(bytes, like)
      assert.equal(parseContentDigest(digest), digest)
      assert.equal(contentDigestFromHex(digestHex(digest)), digest)
      if (long) assert.throws(() => parseDigest(digest), ClientError)
    }),
  )
})

test('any other text is a ClientError', () => {
  const hex = fc.string({ unit: fc.constantFrom('0', '7', 'a', 'f', 'A', 'F', 'g'), maxLength: 130 })
  const texts = fc.oneof(
    fc.string(),
    fc.tuple(fc.constantFrom('sha256', 'sha512', 'md5', ''), hex).map(([name, text]) => `${name}:${text}`),
  )
  fc.assert(
    fc.property(texts, (text) => {
      fc.pre(!/^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$/.test(text))
      for (const parse of [parseDigest, parseContentDigest])
        assert.throws(
          () => parse(text),
          (error) => error instanceof ClientError && error.code === 'DIGEST_INVALID',
        )
    }),
  )
})
