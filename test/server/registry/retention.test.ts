import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { Digest } from '../../../lib/protocol/digest.ts'
import { digestHex, digestOf } from '../../../lib/protocol/digest.ts'
import type { Tag } from '../../../server/registry/blob-store.ts'
import type { RepositoryUse, RetentionRule } from '../../../server/registry/retention.ts'
import { globMatches, tagsToGo } from '../../../server/registry/retention.ts'

const dayMs = 86_400_000
const nowMs = Date.UTC(2026, 10, 29)

test('the newest so many stay, whatever else was said about the rest', () => {
  const tags = [1, 2, 3, 4, 5].map((days) => tagOf(`v${days}`, days))
  assert.deepEqual(going(tags, [rule({ keepLast: 2 })]), ['v3', 'v4', 'v5'])
  assert.deepEqual(going(tags, [rule({ keepNewerThanMs: 3.5 * dayMs })]), ['v4', 'v5'])
  assert.deepEqual(going(tags, [rule({ keepLast: 1, keepNewerThanMs: 2.5 * dayMs })]), ['v3', 'v4', 'v5'])
  assert.deepEqual(going(tags, []), [])
  assert.deepEqual(going(tags, [rule({ repositories: ['other', 'team/*'], keepLast: 1 })]), [])
})

test('the first rule that covers a tag decides, and counts its own tags alone', () => {
  const tags = [tagOf('pr-1', 1), tagOf('v1', 2), tagOf('pr-2', 3), tagOf('v2', 4)]
  const rules = [rule({ tags: 'pr-*', keepLast: 1 }), rule({ keepLast: 1 })]
  assert.deepEqual(going(tags, rules), ['pr-2', 'v2'])
  assert.deepEqual(going(tags, rules.slice(0, 1)), ['pr-2'])
})

test('latest, pins, and what hosts follow or hold stay', () => {
  const tags = ['latest', 'pinned', 'followed', 'held', 'old', 'new'].map((tag, i) => tagOf(tag, 10 - i))
  const use = {
    pinnedTags: new Set(['pinned']),
    deployedTags: new Set(['followed']),
    deployedDigests: new Set([tagOf('held', 0).digest]),
  }
  assert.deepEqual(going(tags, [rule({ keepLast: 1 })], use), ['old'])
  assert.deepEqual(
    going(tags, [rule({ keepLast: 1, keepDeployed: false })], use),
    ['held', 'followed', 'old'].sort(),
  )
})

test('a tag that names the signatures of a manifest stays as long as that manifest, and counts for nothing', () => {
  const [there, gone] = [digestOf(Buffer.from('there')), digestOf(Buffer.from('gone'))]
  const tags = [
    tagOf(`sha256-${digestHex(there)}.sig`, 0),
    tagOf(`sha256-${digestHex(there)}`, 0),
    tagOf(`sha256-${digestHex(gone)}.sig`, 0),
    tagOf('v1', 1),
  ]
  assert.deepEqual(going(tags, [rule({ keepLast: 1 })], { has: (digest) => digest === there }), [
    `sha256-${digestHex(gone)}.sig`,
  ])
})

const rules = fc.array(
  fc.record({
    repositories: fc.constantFrom(['*'], ['web'], ['other'], ['team/*', 'web']),
    tags: fc.constantFrom(undefined, 'v*', '*-rc', 'latest', 'v1'),
    keepLast: fc.option(fc.integer({ min: 1, max: 5 }), { nil: undefined }),
    keepNewerThanMs: fc.option(fc.integer({ min: 1, max: 20 * dayMs }), { nil: undefined }),
    keepDeployed: fc.boolean(),
  }),
  { maxLength: 4 },
)
const names = fc.constantFrom('latest', 'v1', 'v2', 'v3', 'v4', 'v1-rc', 'v2-rc', 'nightly', 'pr-1', 'pr-2')
const tagLists = fc.uniqueArray(
  fc.record({ tag: names, days: fc.integer({ min: 0, max: 30 }), content: fc.integer({ min: 0, max: 4 }) }),
  { selector: ({ tag }) => tag },
)
const uses = fc.record({
  pinned: fc.uniqueArray(names),
  followed: fc.uniqueArray(names),
  held: fc.uniqueArray(fc.integer({ min: 0, max: 4 })),
})
const cases = fc.record({ rules, tags: tagLists, use: uses }).map(({ tags, use, ...rest }) => ({
  ...rest,
  tags: tags.map(({ tag, days, content }) => ({ ...tagOf(tag, days), digest: contentOf(content) })),
  use: {
    pinnedTags: new Set<string>(use.pinned),
    deployedTags: new Set<string>(use.followed),
    deployedDigests: new Set(use.held.map(contentOf)),
  },
}))

test('whatever the rules: latest and pins stay, so do the last so many and the new, and what is deployed', () => {
  fc.assert(
    fc.property(cases, ({ rules: all, tags, use }) => {
      const gone = new Set(going(tags, all, use))
      const ruleOf = (tag: Tag) =>
        all.find(
          ({ repositories, tags: pattern }) =>
            repositories.some((name) => name === '*' || name === 'web') &&
            (pattern === undefined || globMatches(pattern, tag.tag)),
        )
      for (const tag of tags.filter(({ tag: name }) => gone.has(name))) {
        const its = ruleOf(tag)
        assert.ok(its && tag.tag !== 'latest' && !use.pinnedTags.has(tag.tag))
        assert.ok(
          !its.keepDeployed || !(use.deployedTags.has(tag.tag) || use.deployedDigests.has(tag.digest)),
        )
        assert.ok(its.keepNewerThanMs === undefined || nowMs - tag.updatedAt.getTime() >= its.keepNewerThanMs)
        const newer = tags.filter(
          (other) =>
            other.tag !== 'latest' &&
            ruleOf(other) === its &&
            other.updatedAt >= tag.updatedAt &&
            other !== tag,
        )
        assert.ok(newer.length >= (its.keepLast ?? 0))
      }
    }),
  )
})

test('whatever the rules: what stays would stay again, and the order of tags does not matter', () => {
  fc.assert(
    fc.property(cases, ({ rules: all, tags, use }) => {
      const gone = new Set(going(tags, all, use))
      assert.deepEqual(going(tags.toReversed(), all, use), [...gone].sort())
      assert.deepEqual(
        going(
          tags.filter(({ tag }) => !gone.has(tag)),
          all,
          use,
        ),
        [],
      )
    }),
  )
})

test('whatever the rules: to keep more never removes more', () => {
  fc.assert(
    fc.property(cases, fc.integer({ min: 1, max: 3 }), ({ rules: all, tags, use }, more) => {
      const gone = new Set(going(tags, all, use))
      const kinder = all.map((its) => ({
        ...its,
        keepLast: its.keepLast === undefined ? undefined : its.keepLast + more,
        keepNewerThanMs: its.keepNewerThanMs === undefined ? undefined : its.keepNewerThanMs + more * dayMs,
        keepDeployed: true,
      }))
      for (const tag of going(tags, kinder, use)) assert.ok(gone.has(tag), tag)
    }),
  )
})

test('a pattern matches as the regular expression that it stands for', () => {
  const letters = fc.string({ unit: fc.constantFrom('a', 'b', '.', '*'), maxLength: 8 })
  fc.assert(
    fc.property(letters, letters, (pattern, text) => {
      const expression = new RegExp(`^${pattern.replaceAll('.', '\\.').replaceAll('*', '.*')}$`)
      assert.equal(globMatches(pattern, text), expression.test(text), `${pattern} ${text}`)
    }),
    { numRuns: 2000 },
  )
})

function going(
  tags: readonly Tag[],
  all: readonly RetentionRule[],
  use: Partial<RepositoryUse> = {},
): string[] {
  const none = {
    pinnedTags: new Set<string>(),
    deployedTags: new Set<string>(),
    deployedDigests: new Set<string>(),
    has: () => false,
  }
  return tagsToGo(all, { repository: 'web', tags, use: { ...none, ...use }, nowMs })
    .map(({ tag }) => tag.tag)
    .sort()
}

function rule(its: Partial<RetentionRule>): RetentionRule {
  return {
    repositories: ['*'],
    tags: undefined,
    keepLast: undefined,
    keepNewerThanMs: undefined,
    keepDeployed: true,
    ...its,
  }
}

function tagOf(tag: string, days: number): Tag {
  return { tag, digest: digestOf(Buffer.from(tag)), updatedAt: new Date(nowMs - days * dayMs) }
}

function contentOf(number: number): Digest {
  return digestOf(Buffer.from(`content ${number}`))
}
