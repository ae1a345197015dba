import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { digestFromHex } from '../../../lib/protocol/digest.ts'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import type { Statement } from '../../../lib/protocol/statement.ts'
import {
  checkRelease,
  parseStatement,
  provenanceOf,
  releaseStatement,
  tagsOf,
  writeStatement,
} from '../../../lib/protocol/statement.ts'
import { answersOrRefuses, spoilt } from '../../support/fuzz.ts'

const digest = digestFromHex('a'.repeat(64))
const layer = digestFromHex('b'.repeat(64))
const statement = releaseStatement({
  repository: 'team/web',
  tags: ['1.2.3', 'latest'],
  digest,
  files: [{ name: 'build.tar', digest: layer, infoHash: infoHashFromHex('c'.repeat(40)) }],
  provenance: {
    buildType: 'urn:rackswarm:publish:v1',
    builderId: 'https://ci.example/runner',
    invocationId: 'https://ci.example/run/1',
    resolvedDependencies: [{ uri: 'git+https://git.example/web', digest: { gitCommit: 'd'.repeat(40) } }],
  },
})

test('a release is signed by its manifest, and by each file with its SHA-256 and its infohash', () => {
  assert.deepEqual(JSON.parse(writeStatement(statement).toString()), {
    _type: 'https://in-toto.io/Statement/v1',
    subject: [
      { name: 'team/web', digest: { sha256: 'a'.repeat(64) } },
      { name: 'build.tar', digest: { sha256: 'b'.repeat(64), btih: 'c'.repeat(40) } },
    ],
    predicateType: 'https://slsa.dev/provenance/v1',
    predicate: {
      buildDefinition: {
        buildType: 'urn:rackswarm:publish:v1',
        externalParameters: { repository: 'team/web', tags: ['1.2.3', 'latest'] },
        resolvedDependencies: [{ uri: 'git+https://git.example/web', digest: { gitCommit: 'd'.repeat(40) } }],
      },
      runDetails: {
        builder: { id: 'https://ci.example/runner' },
        metadata: { invocationId: 'https://ci.example/run/1' },
      },
    },
  })
  assert.deepEqual(tagsOf(statement), ['1.2.3', 'latest'])
  assert.deepEqual(provenanceOf(statement), {
    builderId: 'https://ci.example/runner',
    invocationId: 'https://ci.example/run/1',
    source: 'git+https://git.example/web',
    commit: 'd'.repeat(40),
  })
})

test('a statement counts for its own digest, repository and tags, and for nothing else', () => {
  const release = { repository: 'team/web', tag: '1.2.3', digest }
  checkRelease(statement, release)
  checkRelease(statement, { ...release, tag: 'latest' })
  checkRelease(statement, { ...release, tag: undefined })
  checkRelease(statement, { ...release, tag: 'stable' }, { anyTag: true })
  const refused = (wrong: Partial<typeof release>, code: string, why: RegExp) => {
    assert.throws(
      () => {
        checkRelease(statement, { ...release, ...wrong })
      },
      (error: Error & { code?: string }) => error.code === code && why.test(error.message),
      JSON.stringify(wrong),
    )
  }
  refused({ tag: 'stable' }, 'other_tag', /for the tag 1\.2\.3, latest/)
  refused({ repository: 'team/db' }, 'other_release', /for team\/web, sha256:a/)
  refused({ digest: digestFromHex('e'.repeat(64)) }, 'other_release', /for team\/web/)
  // The digest of a file is not that of a release, whatever the file is called.
  refused({ digest: layer }, 'other_release', /for team\/web/)
  const scan: Statement = { ...statement, predicateType: 'https://in-toto.io/attestation/vulns/v0.1' }
  assert.throws(() => {
    checkRelease(scan, release)
  }, /not https:\/\/slsa\.dev\/provenance\/v1/)
  const untagged: Statement = { ...statement, predicate: {} }
  assert.throws(() => {
    checkRelease(untagged, release)
  }, /names no tag/)
})

test('a statement is read as it was written', () => {
  const digests = fc.dictionary(fc.string({ minLength: 1 }), fc.string(), { minKeys: 1 })
  const statements: fc.Arbitrary<Statement> = fc.record({
    subject: fc.array(fc.record({ name: fc.string(), digest: digests }, { requiredKeys: ['digest'] }), {
      minLength: 1,
    }),
    predicateType: fc.string(),
    predicate: fc.dictionary(fc.string(), fc.string()),
  })
  fc.assert(
    fc.property(statements, (one) => {
      // JSON knows no objects without a prototype.
      assert.deepEqual(
        JSON.stringify(parseStatement(writeStatement(one))),
        JSON.stringify(JSON.parse(JSON.stringify(one))),
      )
    }),
  )
})

test('parseStatement() answers or throws ClientError, and what it answers can be looked at', () => {
  const look = (bytes: Uint8Array) => {
    const read = parseStatement(bytes)
    tagsOf(read)
    provenanceOf(read)
    checkRelease(read, { repository: 'team/web', tag: 'latest', digest })
  }
  answersOrRefuses(spoilt([writeStatement(statement)]), look)
  answersOrRefuses(
    fc.json({ maxDepth: 5 }).map((text) => Buffer.from(text)),
    look,
  )
  const { subject, predicateType, predicate } = statement
  const members = { _type: 'https://in-toto.io/Statement/v1', subject, predicateType, predicate }
  answersOrRefuses(
    fc
      .tuple(fc.constantFrom('_type', 'subject', 'predicateType', 'predicate'), fc.jsonValue({ maxDepth: 4 }))
      .map(([name, value]) => Buffer.from(JSON.stringify({ ...members, [name]: value }))),
    look,
  )
})
