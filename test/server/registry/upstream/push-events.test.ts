import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { digestOf } from '../../../../lib/protocol/digest.ts'
import { isRepository, isTag } from '../../../../lib/protocol/reference.ts'
import { eventsMax, readPushEvents } from '../../../../server/registry/upstream/push-events.ts'
import { answersOrRefuses, fuzzRuns } from '../../../support/fuzz.ts'

const digest = digestOf(Buffer.from('manifest'))
const ociType = 'application/vnd.oci.image.manifest.v1+json'
const anywhere = () => true

test('readPushEvents() takes the manifests that distribution says were pushed, and says why not the rest', () => {
  const target = {
    mediaType: ociType,
    size: 7,
    digest,
    repository: 'team/app',
    url: 'http://10.0.0.1/x',
    tag: '1',
  }
  const body = {
    events: [
      { id: 'a', action: 'push', target: { ...target, mediaType: 'application/octet-stream' } },
      { id: 'b', action: 'push', target },
      { id: 'c', action: 'pull', target },
      { id: 'd', action: 'push', target: { ...target, tag: undefined } },
      { id: 'e', action: 'push', target: { ...target, repository: '../etc' } },
      { id: 'f', action: 'push', target: { ...target, digest: 'sha512:00' } },
      { id: 'g', action: 'push', target: { ...target, tag: 'a b' } },
      { id: 'h', action: 'push', target: { ...target, repository: 'elsewhere' } },
    ],
  }
  const { events, ignored } = readPushEvents(body, (repository) => repository !== 'elsewhere')
  assert.deepEqual(events, [
    { id: 'b', repository: 'team/app', digest, tag: '1' },
    { id: 'd', repository: 'team/app', digest, tag: undefined },
  ])
  assert.deepEqual(
    ignored.map(({ index }) => index),
    [0, 2, 4, 5, 6, 7],
  )
  assert.match(ignored[0]?.reason ?? '', /octet-stream/)
  assert.match(ignored[2]?.reason ?? '', /\.\.\/etc/)
})

test("readPushEvents() takes the envelope of Harbor's Kraken driver, whose keys are capitalised", () => {
  const body = {
    Events: [
      {
        Id: 'h1',
        TimeStamp: '2026-11-23T10:00:00Z',
        Action: 'push',
        Target: {
          MediaType: 'application/vnd.docker.distribution.manifest.v2+json',
          Digest: digest,
          Repository: 'library/web',
          Url: 'https://harbor/v2/library/web/manifests/1',
          Tag: '1',
        },
        Request: null,
        Actor: null,
      },
    ],
  }
  assert.deepEqual(readPushEvents(body, anywhere).events, [
    { id: 'h1', repository: 'library/web', digest, tag: '1' },
  ])
})

test('readPushEvents() refuses what is no envelope', () => {
  for (const body of [undefined, null, [], 'events', {}, { events: {} }, { events: null }])
    assert.throws(() => readPushEvents(body, anywhere), { code: 'BAD_REQUEST' })
  const many = { events: Array.from({ length: eventsMax + 1 }, () => ({})) }
  assert.throws(() => readPushEvents(many, anywhere), /1001 events/)
})

const key = (name: string) => fc.constantFrom(name, name.toLowerCase(), name.toUpperCase())
const value = fc.oneof(
  fc.jsonValue(),
  fc.constantFrom('push', ociType, digest, 'team/app', '1', '', '../..', 'A'.repeat(300)),
)
const object = (names: readonly string[], values: fc.Arbitrary<unknown>) =>
  fc
    .array(fc.tuple(fc.oneof(...names.map(key), fc.string()), values), { maxLength: 8 })
    .map((entries) => Object.fromEntries(entries))
const target = object(['MediaType', 'Digest', 'Repository', 'Tag', 'Url'], value)
const event = object(['Id', 'Action', 'Target'], fc.oneof(value, target))
const envelope = object(['Events'], fc.oneof(value, fc.array(fc.oneof(event, value), { maxLength: 5 })))

test('any JSON becomes events that can be pulled, or a clear refusal', () => {
  answersOrRefuses(fc.oneof(envelope, fc.jsonValue()), (body) => {
    const { events, ignored } = readPushEvents(body, anywhere)
    for (const { repository, tag, digest: its } of events) {
      assert.ok(isRepository(repository) && (tag === undefined || isTag(tag)))
      assert.match(its, /^sha256:[0-9a-f]{64}$/)
    }
    for (const { reason } of ignored) assert.ok(reason.length > 0 && reason.length < 400)
  })
})

test('every event of an envelope is taken or ignored, whatever the case of its keys', () => {
  const good = fc
    .record({ action: fc.constant('push'), repository: fc.constant('team/app') })
    .chain(() =>
      fc.tuple(
        key('Events'),
        key('Action'),
        key('Target'),
        key('MediaType'),
        key('Digest'),
        key('Repository'),
      ),
    )
  fc.assert(
    fc.property(good, ([events, action, target_, mediaType, digest_, repository]) => {
      const body = {
        [events]: [
          {
            [action]: 'push',
            [target_]: { [mediaType]: ociType, [digest_]: digest, [repository]: 'team/app' },
          },
        ],
      }
      assert.equal(readPushEvents(body, anywhere).events.length, 1)
    }),
    { numRuns: Math.min(fuzzRuns, 1000) },
  )
})
