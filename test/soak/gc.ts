// Pushes, mounts, deletes and re-pushes of the same blobs by many clients while the server collects without a pause: nothing that a tag
// names is ever lost, and in the end all else is gone. `npm run soak -- gc [SECONDS]` (default 60).
import assert from 'node:assert/strict'
import { randomBytes, randomInt } from 'node:crypto'
import { mkdtemp, readFile, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { createHttpClient } from '../../lib/client/http.ts'
import { createServerClient } from '../../lib/client/server-client.ts'
import type { FleetServer } from '../support/fleet.ts'
import { startFleetServer } from '../support/fleet.ts'
import type { OciClient } from '../support/oci.ts'
import { layerOf, manifestType, ociClient, sha256Of } from '../support/oci.ts'

const repositories = ['web', 'team/app', 'team/deep/er'] as const
const pushers = 6
const tagsEach = 3
const graceMs = 1000
/** Blobs that are in use come and go: a window over all of them moves on, so that those it left are collected and later pushed again. */
const [blobsInAll, windowSize, windowStep, windowMs] = [60, 8, 6, 700]

interface Figures {
  manifests: number
  pushed: number
  pushedAgain: number
  found: number
  mounted: number
  deleted: number
  /** Manifests whose client took longer than the grace period from its first look to the manifest, and was told that a blob is gone. */
  late: number
  collections: number
  blobsCollected: number
  manifestsCollected: number
}

interface Release {
  readonly digest: string
  readonly blobs: readonly Uint8Array<ArrayBuffer>[]
}

/** @throws AssertionError when anything that a tag names is lost or broken, or when garbage stays */
export async function collectDuringPushes(seconds: number): Promise<Figures> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-soak-gc-'))
  const server = await startFleetServer(directory, {
    settings: `registry: { gc: { enabled: false, grace: ${graceMs}ms } }\n`,
  })
  try {
    const token = (await readFile(server.adminTokenFile, 'utf8')).trim()
    const client = ociClient(server.publicUrl, token)
    const figures: Figures = {
      manifests: 0,
      pushed: 0,
      pushedAgain: 0,
      found: 0,
      mounted: 0,
      deleted: 0,
      late: 0,
      collections: 0,
      blobsCollected: 0,
      manifestsCollected: 0,
    }
    // Some large enough for a torrent.
    const blobs = Array.from(
      { length: blobsInAll },
      (_, i) => new Uint8Array(randomBytes(i % 10 === 0 ? 300_000 : 500 + i)),
    )
    const everPushed = new Set<string>()
    /** What must be there, by repository and tag. */
    const there = new Map<string, Release>()
    const endsAt = performance.now() + seconds * 1000
    let over = false
    const collecting = collectUntil(server, token, () => over, figures)
    await Promise.all(
      Array.from({ length: pushers }, async (_, number) => {
        for (let round = 0; performance.now() < endsAt; round++)
          await pushOnce(client, { number, round, blobs, everPushed, there, figures })
      }),
    )
    over = true
    await collecting
    for (const [name, release] of there) await checkRelease(client, name, release)
    await checkNothingElse(server, token, there)
    return figures
  } finally {
    await server[Symbol.asyncDispose]()
    await rm(directory, { recursive: true, force: true })
  }
}

/** One release of a few blobs: found, mounted or pushed; then looked at, and now and then deleted. */
async function pushOnce(
  client: OciClient,
  {
    number,
    round,
    blobs,
    everPushed,
    there,
    figures,
  }: {
    number: number
    round: number
    blobs: readonly Uint8Array<ArrayBuffer>[]
    everPushed: Set<string>
    there: Map<string, Release>
    figures: Figures
  },
): Promise<void> {
  const repository = repositories[randomInt(repositories.length)] ?? 'web'
  const first = Math.floor(performance.now() / windowMs) * windowStep
  const chosen = [
    ...new Set([0, 1, 2].map(() => blobs[(first + randomInt(windowSize)) % blobs.length])),
  ].filter((bytes) => bytes !== undefined)
  const startedAt = performance.now()
  for (const bytes of chosen) {
    const digest = sha256Of(bytes)
    const status = await client.headBlob(repository, digest)
    if (status === 200) {
      figures.found++
      continue
    }
    assert.equal(status, 404)
    const from = repositories[randomInt(repositories.length)] ?? 'web'
    if (randomInt(2) === 0 && (await client.mountBlob(repository, bytes, from))) {
      figures.mounted++
      continue
    }
    await client.pushBlob(repository, bytes)
    if (everPushed.has(digest)) figures.pushedAgain++
    else figures.pushed++
    everPushed.add(digest)
  }
  const tag = `t${number}-${randomInt(tagsEach)}`
  const name = `${repository}:${tag}`
  const content = { layers: chosen.map(layerOf), annotations: { round: `${number} ${round}` } }
  const put = await client.putManifest(repository, content, tag)
  if (put.status !== 201) {
    const tookMs = performance.now() - startedAt
    assert.equal(put.code, 'MANIFEST_BLOB_UNKNOWN')
    assert.ok(tookMs >= graceMs, `a blob was lost ${tookMs} ms after it was there`)
    figures.late++
    return
  }
  figures.manifests++
  const release = { digest: put.digest, blobs: chosen }
  there.set(name, release)
  await checkRelease(client, name, release)
  if (randomInt(3) > 0) return
  there.delete(name)
  const status = await client.deleteManifest(repository, randomInt(2) === 0 ? tag : put.digest)
  assert.equal(status, 202)
  figures.deleted++
}

async function checkRelease(client: OciClient, name: string, { digest, blobs }: Release): Promise<void> {
  const colon = name.lastIndexOf(':')
  const [repository, tag] = [name.slice(0, colon), name.slice(colon + 1)]
  const response = await client.call(`/v2/${repository}/manifests/${tag}`, {
    headers: { accept: manifestType },
  })
  const bytes = Buffer.from(await response.arrayBuffer())
  assert.equal(response.status, 200, `${name} is lost`)
  assert.equal(sha256Of(bytes), digest)
  for (const blob of blobs)
    assert.ok((await client.pullBlob(repository, sha256Of(blob)))?.equals(blob), `a blob of ${name} is lost`)
}

async function collectUntil(
  server: FleetServer,
  token: string,
  isOver: () => boolean,
  figures: Figures,
): Promise<void> {
  await using http = createHttpClient({ baseUrl: server.publicUrl, credential: () => token })
  const api = createServerClient(http)
  while (!isOver()) {
    const { running, lastRun } = await api.collectGarbage({ dryRun: false })
    assert.equal(running, undefined)
    assert.ok(lastRun)
    assert.deepEqual(lastRun.faults, [])
    figures.collections++
    figures.blobsCollected += lastRun.gone.blobs
    figures.manifestsCollected += lastRun.gone.manifests
  }
}

/** When the last grace period is over a collection leaves what the tags name, and nothing else on the disk. */
async function checkNothingElse(
  server: FleetServer,
  token: string,
  there: ReadonlyMap<string, Release>,
): Promise<void> {
  await using http = createHttpClient({ baseUrl: server.publicUrl, credential: () => token })
  const api = createServerClient(http)
  const wanted = new Set([...there.values()].flatMap(({ blobs }) => blobs.map(sha256Of)))
  const found = async () =>
    (await readdir(join(server.dataDirectory, 'blobs', 'sha256'), { recursive: true }))
      .map((path) => /^..\/([0-9a-f]{64})$/.exec(path)?.[1])
      .filter((hex) => hex !== undefined)
      .map((hex) => `sha256:${hex}`)
  for (
    const deadline = Date.now() + 20 * graceMs;
    (await found()).length > wanted.size && Date.now() < deadline;
  ) {
    await sleep(graceMs / 10)
    await api.collectGarbage({ dryRun: false })
  }
  assert.deepEqual((await found()).sort(), [...wanted].sort())
  assert.deepEqual(await readdir(join(server.dataDirectory, 'trash')), [])
}

if (import.meta.main) {
  const seconds = Number(process.argv[2] ?? 60)
  const figures = await collectDuringPushes(seconds)
  process.stdout.write(`${seconds} s, nothing lost: ${JSON.stringify(figures)}\n`)
}
