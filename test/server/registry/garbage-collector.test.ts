import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import type { GcReport } from '../../../lib/client/api.ts'
import type { ContentDigest, Digest } from '../../../lib/protocol/digest.ts'
import { digestHex, digestOf } from '../../../lib/protocol/digest.ts'
import { parseReference } from '../../../lib/protocol/reference.ts'
import { silentLog } from '../../../lib/runtime/log.ts'
import { createTurns } from '../../../lib/runtime/turn.ts'
import type { BlobStore } from '../../../server/registry/blob-store.ts'
import { startDiskBlobStore } from '../../../server/registry/disk-blob-store.ts'
import type { CollectionDeps } from '../../../server/registry/collection.ts'
import { collectGarbage } from '../../../server/registry/collection.ts'
import type { Deployed, HeardHost } from '../../../server/registry/fleet.ts'
import { createFleet, deployedOn } from '../../../server/registry/fleet.ts'
import { openAuditLog } from '../../../server/registry/audit-log.ts'
import { startGarbageCollector } from '../../../server/registry/garbage-collector.ts'
import { checkReferences, readManifest } from '../../../server/registry/oci-manifest.ts'
import { createPins } from '../../../server/registry/pins.ts'
import { removeManifest, removeTag } from '../../../server/registry/removal.ts'
import type { RetentionRule } from '../../../server/registry/retention.ts'
import { openSqliteStateStore } from '../../../server/state/sqlite-state-store.ts'
import { until } from '../../support/until.ts'
import { push } from './blob-store.contract.ts'

const graceMs = 24 * 3_600_000
const mediaType = 'application/vnd.oci.image.manifest.v1+json'

test('what a tag, a pin, a host or a kept manifest leads to stays, with its signatures; all else goes after the grace period, and not before', async (t) => {
  const registry = await startRegistry(t)
  const { store, collect } = registry
  const tagged = await registry.image('web', { tag: 'v1' })
  const [amd64, arm64] = [await registry.image('web'), await registry.image('web')]
  const index = await registry.manifest('web', { manifests: [amd64, arm64].map(descriptor) }, 'multi')
  const signature = await registry.image('web', { subject: amd64.digest })
  const pinned = await registry.image('team/app', { tag: 'moves' })
  await registry.pins.pin(parseReference('team/app:moves'), 'a test')
  await registry.image('team/app', { tag: 'moves' })
  const held = await registry.image('web')
  registry.deployed.set('web', { tags: new Set(), digests: new Set([held.digest]) })
  const dropped = await registry.image('web')
  const signatureOfDropped = await registry.image('web', { subject: dropped.digest })
  const alone = await push(store, 'only/blobs', randomBytes(300_000))
  const everything = (await registry.snapshot()).length

  assert.deepEqual((await collect()).gone, nothing)
  registry.advance(graceMs)
  assert.deepEqual((await collect()).gone, nothing, 'not before the grace period is over')
  assert.equal((await registry.snapshot()).length, everything)

  registry.advance(1000)
  const dry = await collect({ dryRun: true })
  assert.equal((await registry.snapshot()).length, everything, 'a dry run removes nothing')
  const report = await collect()
  assert.deepEqual(summary(report), summary(dry), 'and says what a run does')
  assert.deepEqual(report.gone, { tags: 0, manifests: 2, links: 5, blobs: 5, bytes: report.gone.bytes })
  assert.deepEqual(
    report.items
      .filter(({ kind }) => kind === 'manifest')
      .map(({ digest }) => digest)
      .sort(),
    [dropped.digest, signatureOfDropped.digest].sort(),
  )
  assert.ok(report.items.some(({ kind, digest }) => kind === 'blob' && digest === alone))
  for (const image of [tagged, amd64, arm64, signature, held]) await registry.isWhole('web', image.digest)
  await registry.isWhole('web', index.digest)
  await registry.isWhole('team/app', pinned.digest)
  await registry.isSound()
  assert.deepEqual((await collect()).gone, nothing)
})

test('a tag that is removed, moved or unpinned keeps what it named for a grace period from then on, and so does a manifest', async (t) => {
  const registry = await startRegistry(t)
  const { collect, advance } = registry
  const one = await registry.image('web', { tag: 'v1' })
  const two = await registry.image('web', { tag: 'v2' })
  const three = await registry.image('web', { tag: 'v3' })
  await registry.pins.pin(parseReference(`web@${three.digest}`), 'a test')
  await removeTag(registry, 'web', 'v3')
  advance(10 * graceMs)
  await registry.image('web', { tag: 'v1' })
  await removeTag(registry, 'web', 'v2')
  await registry.pins.unpin(parseReference(`web@${three.digest}`))
  advance(graceMs)
  assert.deepEqual((await collect()).gone, nothing)
  for (const { digest } of [one, two, three]) await registry.isWhole('web', digest)
  await removeManifest(registry, 'web', two.digest)
  advance(1)
  assert.deepEqual((await collect()).gone, { ...nothing, manifests: 2, links: 4, blobs: 4, bytes: 4000 })
  advance(graceMs)
  assert.deepEqual((await collect()).gone, { ...nothing, links: 2, blobs: 2, bytes: 2000 })
  await registry.isSound()
})

test('a blob that two repositories have goes with the last of them', async (t) => {
  const registry = await startRegistry(t)
  const { store, collect, advance } = registry
  const bytes = randomBytes(1000)
  const digest = await push(store, 'a', bytes)
  await store.mountBlob('b', digest, 'a')
  await registry.manifest('b', { layers: [{ digest, size: 1000 }] }, 'v1')
  advance(graceMs + 1)
  assert.deepEqual((await collect()).gone, { ...nothing, links: 1 })
  assert.equal(await store.statBlob('a', digest), undefined)
  assert.ok(await store.statBlob('b', digest))
})

test('retention removes tags, and a grace period later what only they led to; a report says how much that will be', async (t) => {
  const registry = await startRegistry(t, {
    retention: [
      { repositories: ['web'], tags: undefined, keepLast: 2, keepNewerThanMs: undefined, keepDeployed: true },
    ],
  })
  const { store, collect, advance } = registry
  const images = []
  for (const tag of ['v1', 'v2', 'v3', 'v4', 'v5']) {
    images.push(await registry.image('web', { tag }))
    advance(1000)
  }
  await registry.manifest('web', images[4]?.content ?? {}, 'latest')
  registry.deployed.set('web', { tags: new Set(['v1']), digests: new Set() })
  await registry.image('other', { tag: 'v1' })
  advance(graceMs + 1)
  const dry = await collect({ dryRun: true })
  assert.deepEqual(
    dry.items.map(({ kind, tag }) => [kind, tag]),
    [
      ['tag', 'v3'],
      ['tag', 'v2'],
    ],
  )
  assert.deepEqual(dry.waiting, { blobs: 4, bytes: 4000 })
  const report = await collect()
  assert.deepEqual(report.gone, { ...nothing, tags: 2 })
  assert.deepEqual(report.waiting, { blobs: 4, bytes: 4000 })
  assert.deepEqual(registry.moved, ['web:v3', 'web:v2'])
  assert.deepEqual(
    (await store.listTags('web')).map(({ tag }) => tag),
    ['latest', 'v1', 'v4', 'v5'],
  )
  advance(graceMs + 1)
  assert.deepEqual((await collect()).gone, { ...nothing, manifests: 2, links: 4, blobs: 4, bytes: 4000 })
  await registry.isSound()
})

test('a repository with a manifest that cannot be read is left alone, and its blobs stay', async (t) => {
  const registry = await startRegistry(t)
  const { store, collect, advance } = registry
  const image = await registry.image('web')
  const elsewhere = await push(store, 'other', randomBytes(10))
  await store.putManifest('web', { digest: digestOf(Buffer.from('x')), mediaType, bytes: Buffer.from('{') })
  advance(graceMs + 1)
  const report = await collect()
  assert.deepEqual(report.gone, { ...nothing, links: 1, blobs: 1, bytes: 10 })
  assert.equal(report.faults[0]?.repository, 'web')
  assert.equal(report.items.at(-1)?.digest, elsewhere)
  await registry.isWhole('web', image.digest)
})

test('what a host has not reported for a grace period, or a restarted server has not heard of yet, has a grace period too', async (t) => {
  const registry = await startRegistry(t)
  const { collect, advance } = registry
  const held = await registry.image('web')
  advance(10 * graceMs)
  registry.deployed.set('web', { tags: new Set(), digests: new Set([held.digest]) })
  assert.deepEqual((await collect()).gone, nothing)
  registry.deployed.clear()
  advance(graceMs)
  assert.deepEqual((await collect()).gone, nothing)
  advance(1)
  assert.equal((await collect()).gone.manifests, 1)
})

test('what hosts say is put together by repository, and forgotten in time', () => {
  let nowMs = 0
  const fleet = createFleet({ hostsMax: 10, now: () => nowMs })
  const [one, two] = [digestOf(Buffer.from('1')), digestOf(Buffer.from('2'))]
  const hear = (host: string, follow: string[], held: { reference: string; digest: Digest }[]) => {
    const report = { follow, held } as unknown as HeardHost['report']
    fleet.hear({ host, place: 'r', address: '127.0.0.1', atMs: nowMs, report })
  }
  hear('a', ['web', `web@${two}`], [{ reference: 'web:latest', digest: one }])
  nowMs = 100_000
  hear('b', ['web', 'team/app:v1'], [{ reference: 'web:v1', digest: one }])
  const show = (sinceMs: number) =>
    [...deployedOn(fleet.heardSince(sinceMs))].map(([repository, { tags, digests }]) => [
      repository,
      [...tags],
      [...digests],
    ])
  assert.deepEqual(show(0), [
    ['web', ['latest'], [two, one]],
    ['team/app', ['v1'], []],
  ])
  const fromB = [
    ['web', ['latest'], [one]],
    ['team/app', ['v1'], []],
  ]
  assert.deepEqual(show(1), fromB)
  assert.deepEqual(show(nowMs + 1), fromB, 'who was heard within a minute is there')
  nowMs += 60_001
  assert.deepEqual(show(nowMs), [])
})

test('one run at a time, none before hosts were heard, and the last report is there after a restart', async (t) => {
  const registry = await startRegistry(t)
  const running = registry.collector.run({ dryRun: false })
  await assert.rejects(registry.collector.run({ dryRun: true }), { code: 'GC_RUNNING', status: 409 })
  assert.equal(registry.collector.status().running?.dryRun, false)
  const report = await running
  assert.equal(registry.collector.status().running, undefined)
  await registry.collector[Symbol.asyncDispose]()
  const again = await registry.startCollector({ readyInMs: () => Promise.resolve(2500) })
  assert.deepEqual(again.status().lastRun, report)
  await assert.rejects(again.run({ dryRun: false }), {
    code: 'NOT_READY',
    status: 503,
    headers: { 'retry-after': '3' },
  })
})

test('a run is due an interval after the last one, whenever the server was started, and when the clock was put back', async (t) => {
  const registry = await startRegistry(t)
  const { collector, advance, startCollector } = registry
  await collector.run({ dryRun: false })
  const first = collector.status().lastRun?.startedAt
  await collector[Symbol.asyncDispose]()
  t.mock.timers.enable({ apis: ['setInterval'] })
  const again = await startCollector({ intervalMs: 3_600_000 })
  const lookAgain = async () => {
    t.mock.timers.tick(60_000)
    await until('the run has ended', () => again.status().running === undefined)
    return again.status().lastRun?.startedAt
  }
  advance(3_599_999)
  assert.equal(await lookAgain(), first)
  advance(1)
  const second = await lookAgain()
  assert.notEqual(second, first)
  assert.equal(await lookAgain(), second)
  advance(-1000)
  assert.notEqual(await lookAgain(), second)
})

test('pushes that meet a collection anywhere in it lose nothing that they were told is there', async (t) => {
  // No grace at all: only what is claimed while the collection runs is safe, which is what a turn is for.
  const registry = await startRegistry(t, { graceMs: 0 })
  const { store } = registry
  // Twice as many as the pushers name at once, however they keep step.
  const contents = Array.from({ length: 12 }, () => randomBytes(400))
  const outcomes = { stored: 0, refused: 0 }
  let over = false
  let gone = 0
  const pusher = async (number: number) => {
    for (let round = 0; round < 60; round++) {
      const chosen = [0, 1, 2].map((i) => contents[(number + round + i) % contents.length] ?? Buffer.alloc(0))
      const layers = chosen.map((bytes) => ({
        mediaType: 'a/b',
        digest: digestOf(bytes),
        size: bytes.length,
      }))
      const tag = `t${number}`
      try {
        for (const bytes of chosen)
          if (!(await store.claimBlob('web', digestOf(bytes)))) await push(store, 'web', bytes)
        const { digest } = await registry.put(
          'web',
          { layers, annotations: { round: `${number} ${round}` } },
          tag,
        )
        await registry.isWhole('web', digest)
        outcomes.stored++
      } catch (error) {
        // A blob went between the claim and the manifest, since there is no grace: it was told, and nothing is half there.
        if ((error as { code?: string }).code !== 'MANIFEST_BLOB_UNKNOWN') throw error
        outcomes.refused++
      }
      if (round % 3 === 0) await removeTag(registry, 'web', tag)
    }
  }
  const collecting = (async () => {
    while (!over) {
      registry.advance(1)
      gone += (await registry.collect()).gone.blobs
    }
  })()
  await Promise.all([0, 1, 2, 3].map(pusher)).finally(() => (over = true))
  await collecting
  assert.ok(gone > 0, 'blobs were removed beside the pushes')
  assert.ok(outcomes.stored > 50, JSON.stringify(outcomes))
  await registry.isSound()
})

test('whatever somebody does at whatever step of a collection: what was told to be there is there, and nothing is half there', async (t) => {
  const registry = await startRegistry(t)
  const { store, collect, advance } = registry
  const bytes = randomBytes(300)
  const layer = { digest: digestOf(bytes), size: bytes.length }
  const tag = 'kept'
  interface Unused {
    readonly index: Stored
    readonly part: Stored
    readonly signature: Stored
  }
  /** Each says whether it was told that what it needs is there, and what to do with that when the collection is over. */
  const deeds: Record<string, (unused: Unused) => Promise<false | (() => Promise<unknown>)>> = {
    'a HEAD of the blob': async () =>
      (await store.claimBlob('web', layer.digest)) !== undefined &&
      (() => registry.manifest('web', { layers: [layer] }, tag)),
    'a HEAD of a part of the index': async ({ part }) =>
      (await registry.inTurn('web', () => store.claimManifest('web', part.digest))) &&
      (() =>
        registry.manifest('web', { manifests: [descriptor(part)], annotations: { another: 'index' } }, tag)),
    'a HEAD of the index': async ({ index }) =>
      (await registry.inTurn('web', () => store.claimManifest('web', index.digest))) &&
      (() => registry.isWhole('web', index.digest)),
    'a manifest of the blob': async () => {
      const put = await registry.manifest('web', { layers: [layer] }, tag).catch(unknownBlob)
      return put !== undefined && (() => registry.isWhole('web', put.digest))
    },
    'an index of the part': async ({ part }) => {
      const put = await registry
        .manifest('web', { manifests: [descriptor(part)], annotations: { another: 'index' } }, tag)
        .catch(unknownBlob)
      return put !== undefined && (() => registry.isWhole('web', put.digest))
    },
    'a tag on the part': async ({ part }) => {
      const put = await registry.put('web', part.content, tag).catch(unknownBlob)
      return put !== undefined && (() => registry.isWhole('web', put.digest))
    },
    'a pin': async ({ part, signature }) => {
      const pin = await registry.pins
        .pin(parseReference(`web@${part.digest}`), 'a test')
        .catch((error: unknown) => {
          assert.equal((error as { code?: string }).code, 'NOT_FOUND')
          return undefined
        })
      return (
        pin !== undefined &&
        (async () => {
          await registry.isWhole('web', part.digest)
          await registry.isWhole('web', signature.digest)
        })
      )
    },
    'a mount': async () =>
      (await store.mountBlob('other', layer.digest, 'web')) &&
      (() => registry.manifest('other', { layers: [layer] }, tag)),
    'a push of the blob': async () => {
      await push(store, 'web', bytes)
      return () => registry.manifest('web', { layers: [layer] }, tag)
    },
  }
  for (const [name, deed] of Object.entries(deeds)) {
    const outcomes = { there: 0, gone: 0 }
    for (let at = 0; ; at++) {
      await push(store, 'web', bytes)
      const part = await registry.manifest('web', { layers: [layer] })
      const index = await registry.manifest('web', { manifests: [descriptor(part)] })
      const signature = await registry.manifest('web', {
        subject: descriptor(part),
        annotations: { is: 'a signature' },
      })
      advance(graceMs + 1)
      let done: ReturnType<typeof deed> | undefined
      const steps = await collectStepwise(registry, async (step) => {
        if (step !== at) return
        done = deed({ index, part, signature })
        // Where the collection has the turn it must wait, and so must we not.
        await Promise.race([done, sleep(10)])
      })
      const andThen = await done
      if (andThen) await andThen()
      if (done) outcomes[andThen ? 'there' : 'gone']++
      await registry.isSound()
      // For the next one.
      await removeTag(registry, 'web', tag)
      await removeTag(registry, 'other', tag)
      await registry.pins.unpin(parseReference(`web@${part.digest}`))
      advance(graceMs + 1)
      await collect()
      assert.deepEqual(await registry.snapshot(), [], name)
      if (at >= steps) break
    }
    assert.ok(
      outcomes.there > 0 && (outcomes.gone > 0 || name === 'a push of the blob'),
      `${name}: ${JSON.stringify(outcomes)}`,
    )
  }
})

function unknownBlob(error: unknown): undefined {
  assert.equal((error as { code?: string }).code, 'MANIFEST_BLOB_UNKNOWN')
}

/** Collects, with `before` done before each call that the collection makes of the store. @returns how many there were */
async function collectStepwise(
  { store, collection }: { store: BlobStore; collection: Omit<CollectionDeps, 'store'> },
  before: (step: number) => Promise<void>,
): Promise<number> {
  let steps = 0
  const stepwise = new Proxy(store, {
    get: (target, name) => {
      const method: unknown = Reflect.get(target, name)
      if (typeof method !== 'function') return method
      const call = method as (...args: unknown[]) => unknown
      if (String(name).startsWith('scan'))
        return async function* (...args: unknown[]) {
          await before(steps++)
          yield* call(...args) as AsyncIterable<unknown>
        }
      return async (...args: unknown[]) => {
        await before(steps++)
        return call(...args)
      }
    },
  })
  await collectGarbage(
    { ...collection, store: stepwise },
    { dryRun: false, signal: new AbortController().signal },
  )
  return steps
}

const nothing = { tags: 0, manifests: 0, links: 0, blobs: 0, bytes: 0 }

type Content = Record<string, unknown>

interface Stored {
  readonly digest: Digest
  readonly size: number
  readonly content: Content
}

/** A registry without its ports, and a clock that a test moves. */
async function startRegistry(
  t: TestContext,
  options: { retention?: readonly RetentionRule[]; graceMs?: number } = {},
) {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-gc-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  let nowMs = Date.now()
  const now = () => nowMs
  const log = silentLog()
  const state = await openSqliteStateStore({ file: join(directory, 'state.sqlite') })
  t.after(() => state[Symbol.asyncDispose]())
  const store = await startDiskBlobStore({
    directory,
    blobMaxBytes: 2 ** 40,
    uploadsMax: 100,
    uploadTtlMs: 1000 * graceMs,
    diskReserveBytes: 0,
    now,
    log,
  })
  t.after(() => store[Symbol.asyncDispose]())
  const auditLog = await openAuditLog({ directory, fileMaxBytes: 2 ** 30, filesMax: 2, now, log })
  t.after(() => auditLog[Symbol.asyncDispose]())
  const inTurn = createTurns()
  const deployed = new Map<string, Deployed>()
  const moved: string[] = []
  const pins = createPins({ state, store, inTurn, now })
  const onTag = (repository: string, tag: string) => {
    moved.push(`${repository}:${tag}`)
  }
  const collection = {
    auditLog,
    inTurn,
    pins,
    onTag,
    deployed: () => deployed,
    retention: options.retention ?? [],
    graceMs: options.graceMs ?? graceMs,
    now,
  }
  const startCollector = async ({
    readyInMs = () => Promise.resolve(0),
    intervalMs,
  }: { readyInMs?: () => Promise<number>; intervalMs?: number } = {}) => {
    const collector = await startGarbageCollector({
      ...collection,
      store,
      state,
      intervalMs,
      readyInMs,
      exclusively: (work) => work(new AbortController().signal),
      sweepState: () => Promise.resolve(0),
      log,
    })
    t.after(() => collector[Symbol.asyncDispose]())
    return collector
  }
  const collector = await startCollector()
  /** As the PUT of a manifest does it. */
  const put = async (repository: string, content: Content, tag?: string): Promise<Stored> => {
    const bytes = Buffer.from(JSON.stringify({ schemaVersion: 2, ...content }))
    const digest = digestOf(bytes)
    await inTurn(repository, async () => {
      await checkReferences(repository, readManifest(mediaType, bytes).content, store)
      await store.putManifest(repository, { digest, mediaType, bytes })
      if (tag === undefined) return
      const before = await store.getTag(repository, tag)
      if (before) await store.claimManifest(repository, before.digest)
      await store.putTag(repository, tag, digest)
    })
    return { digest, size: bytes.length, content }
  }
  const manifest = async (repository: string, content: Content, tag?: string) =>
    put(
      repository,
      Object.fromEntries(
        Object.entries(content).map(([key, value]) => [
          key,
          key === 'layers' ? (value as object[]).map((layer) => ({ mediaType: 'a/b', ...layer })) : value,
        ]),
      ),
      tag,
    )
  /** Two blobs of a thousand bytes and a manifest that names them. */
  const image = async (repository: string, { tag, subject }: { tag?: string; subject?: Digest } = {}) => {
    const [config, layer] = [
      await push(store, repository, randomBytes(1000)),
      await push(store, repository, randomBytes(1000)),
    ]
    return manifest(
      repository,
      {
        config: { mediaType: 'a/b', digest: config, size: 1000 },
        layers: [{ digest: layer, size: 1000 }],
        ...(subject === undefined ? {} : { subject: { mediaType, digest: subject, size: 1 } }),
      },
      tag,
    )
  }
  const isWhole = async (repository: string, digest: ContentDigest): Promise<void> => {
    const found = await store.getManifest(repository, digest)
    assert.ok(found, `${repository}@${digest} is lost`)
    const {
      config,
      layers = [],
      manifests = [],
    } = JSON.parse(found.bytes.toString()) as {
      config?: { digest: Digest }
      layers?: { digest: Digest }[]
      manifests?: { digest: Digest }[]
    }
    for (const { digest: named } of manifests) await isWhole(repository, named)
    for (const { digest: named } of [...(config ? [config] : []), ...layers]) {
      const stat = await store.statBlob(repository, named)
      assert.ok(stat, `${named}, which ${repository}@${digest} needs, is lost`)
      const hash = createHash('sha256')
      const range = { start: 0, end: stat.sizeBytes }
      for await (const part of store.readBlob(named, range, new AbortController().signal)) hash.update(part)
      assert.equal(hash.digest('hex'), digestHex(named))
    }
  }
  return {
    store,
    inTurn,
    onTag,
    pins,
    deployed,
    moved,
    collection,
    collector,
    startCollector,
    collect: ({ dryRun = false } = {}) => collector.run({ dryRun }),
    advance: (ms: number) => (nowMs += ms),
    put,
    manifest,
    image,
    isWhole,
    /** All that there is. */
    snapshot: () => snapshotOf(store),
    /** Every tag leads to a whole manifest, every manifest is whole, every link to bytes. */
    isSound: async () => {
      for await (const repository of store.scanRepositories()) {
        for (const { digest } of await store.listTags(repository)) await isWhole(repository, digest)
        for (const digest of await store.listManifests(repository)) await isWhole(repository, digest)
        for await (const { digest } of store.scanLinks(repository))
          assert.ok(await store.statBlob(repository, digest))
      }
    },
  }
}

async function snapshotOf(store: BlobStore): Promise<string[]> {
  const found: string[] = []
  for await (const { digest } of store.scanBlobs()) found.push(digest)
  for await (const repository of store.scanRepositories()) {
    for await (const { digest } of store.scanLinks(repository)) found.push(`${repository} link ${digest}`)
    for await (const { digest } of store.scanManifests(repository))
      found.push(`${repository} manifest ${digest}`)
    for (const { tag } of await store.listTags(repository)) found.push(`${repository} tag ${tag}`)
  }
  return found
}

function descriptor({ digest, size }: Stored) {
  return { mediaType, digest, size }
}

function summary({ gone, kept, waiting, items }: GcReport) {
  return { gone, kept, waiting, items: items.map(({ kind, digest }) => `${kind} ${digest}`).sort() }
}
