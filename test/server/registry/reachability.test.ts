import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { ContentDigest } from '../../../lib/protocol/digest.ts'
import { digestOf } from '../../../lib/protocol/digest.ts'
import { referencesOf } from '../../../server/registry/oci-manifest.ts'
import type { ManifestNode } from '../../../server/registry/reachability.ts'
import { componentsOf, reachable } from '../../../server/registry/reachability.ts'

test('an index keeps its manifests, and everything keeps its signatures, and theirs', () => {
  const graph = graphOf({
    index: { names: ['amd64', 'arm64'] },
    amd64: { names: ['layer'] },
    arm64: {},
    signature: { subject: 'amd64' },
    'signature of the signature': { subject: 'signature' },
    orphan: { subject: 'never there' },
    other: {},
    'signature of the other': { subject: 'other' },
  })
  assert.deepEqual(named(reachable(graph, [id('index')])), [
    'amd64',
    'arm64',
    'index',
    'signature',
    'signature of the signature',
  ])
  assert.deepEqual(named(reachable(graph, [id('signature')])), ['signature', 'signature of the signature'])
  assert.deepEqual(named(reachable(graph, [id('layer'), id('never there')])), [])
})

const graphs = fc
  .array(
    fc.record({
      names: fc.array(fc.nat(30), { maxLength: 4 }),
      subject: fc.option(fc.nat(30), { nil: undefined }),
    }),
    { maxLength: 20 },
  )
  .map((nodes) =>
    graphOf(
      Object.fromEntries(
        nodes.map(({ names, subject }, i) => [
          String(i),
          // Bytes name what was there before them.
          {
            names: names.filter((name) => name < i).map(String),
            ...(subject !== undefined && subject < i ? { subject: String(subject) } : {}),
          },
        ]),
      ),
    ),
  )

test('what is kept needs nothing that is not, and is no more than the roots and what they lead to', () => {
  fc.assert(
    fc.property(graphs, fc.array(fc.nat(20)), (graph, chosen) => {
      const roots = chosen.map((number) => id(String(number)))
      const kept = reachable(graph, roots)
      for (const root of roots) assert.equal(kept.has(root), graph.has(root))
      for (const { digest, names, subject } of graph.values()) {
        if (kept.has(digest)) for (const name of names) assert.ok(kept.has(name))
        if (subject !== undefined && kept.has(subject)) assert.ok(kept.has(digest))
        if (!kept.has(digest) || roots.includes(digest)) continue
        const led = [...graph.values()].some(
          (other) => kept.has(other.digest) && other.names.includes(digest),
        )
        assert.ok(led || (subject !== undefined && kept.has(subject)))
      }
    }),
  )
})

test('groups have nothing to do with each other, and in each what names goes before what is named', () => {
  fc.assert(
    fc.property(graphs, fc.array(fc.nat(20)), (graph, chosen) => {
      const kept = reachable(
        graph,
        chosen.map((number) => id(String(number))),
      )
      const doomed = new Set([...graph.keys()].filter((digest) => !kept.has(digest)))
      const groups = componentsOf(graph, doomed)
      assert.deepEqual(groups.flat().sort(), [...doomed].sort())
      const groupOf = new Map(groups.flatMap((group, i) => group.map((digest) => [digest, i])))
      for (const group of groups)
        for (const [at, digest] of group.entries()) {
          const { names = [], subject } = graph.get(digest) ?? {}
          for (const name of names) assert.ok(!doomed.has(name) || group.indexOf(name) > at)
          if (subject !== undefined && doomed.has(subject))
            assert.equal(groupOf.get(subject), groupOf.get(digest))
        }
    }),
  )
})

test('every descriptor of a manifest counts, wherever it stands, and its subject apart', () => {
  const descriptor = (text: string) => ({ mediaType: 'a/b', digest: id(text), size: 1 })
  const manifest = {
    config: descriptor('config'),
    layers: [descriptor('layer'), { ...descriptor('foreign'), urls: ['https://elsewhere.example'] }],
    blobs: [descriptor('blob of an artifact manifest')],
    manifests: [descriptor('child')],
    subject: descriptor('subject'),
    later: { things: [[descriptor('deep')]] },
    digest: 'sha256:short',
  }
  const found = referencesOf(Buffer.from(JSON.stringify(manifest)))
  assert.deepEqual(named(new Set(found?.names)), [
    'blob of an artifact manifest',
    'child',
    'config',
    'deep',
    'foreign',
    'layer',
  ])
  assert.equal(found?.subject, id('subject'))
})

test('references are read from any bytes: found, or told that there are none to be read', () => {
  fc.assert(
    fc.property(fc.json(), (text) => {
      const found = referencesOf(Buffer.from(text))
      assert.ok(found)
      for (const name of found.names) assert.ok(text.includes(name))
    }),
  )
  fc.assert(fc.property(fc.uint8Array(), (bytes) => assert.doesNotThrow(() => referencesOf(bytes))))
  assert.equal(referencesOf(Buffer.from('{')), undefined)
  const deep = 200_000
  assert.deepEqual(referencesOf(Buffer.from(`${'['.repeat(deep)}${']'.repeat(deep)}`))?.names, [])
})

const texts = new Map<ContentDigest, string>()

function id(text: string): ContentDigest {
  const digest = digestOf(Buffer.from(text))
  texts.set(digest, text)
  return digest
}

function named(digests: ReadonlySet<ContentDigest>): string[] {
  return [...digests].map((digest) => texts.get(digest) ?? '').sort()
}

function graphOf(
  nodes: Record<string, { names?: readonly string[]; subject?: string }>,
): Map<ContentDigest, ManifestNode> {
  return new Map(
    Object.entries(nodes).map(([text, { names = [], subject }]) => {
      const digest = id(text)
      return [
        digest,
        {
          digest,
          usedAtMs: 0,
          names: names.map(id),
          subject: subject === undefined ? undefined : id(subject),
        },
      ]
    }),
  )
}
