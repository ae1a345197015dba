import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import type { GcReport } from '../../lib/client/api.ts'
import { createHttpClient } from '../../lib/client/http.ts'
import { createServerClient } from '../../lib/client/server-client.ts'
import { crashCollections } from '../soak/crash-gc.ts'
import { collectDuringPushes } from '../soak/gc.ts'
import type { FleetServer } from '../support/fleet.ts'
import { deployctl, deployctlOk, startFleetServer, writeRandomFile } from '../support/fleet.ts'
import { layerOf, ociClient, pushRelease, sha256Of } from '../support/oci.ts'
import { until } from '../support/until.ts'

test('deployctl shows what would go and why, removes it, and keeps what has a tag', async (t) => {
  const { server, directory, client } = await startedServer(t, { grace: '200ms' })
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, 600_000)
  await deployctlOk(server, ['publish', build, 'web:1'])
  const layer = await client.pushBlob('web', new Uint8Array(randomBytes(400_000)))
  const dry = await until('there is something to collect', async () => {
    const report = JSON.parse(
      await deployctlOk(server, ['registry', 'gc', '--dry-run', '--json']),
    ) as GcReport
    return report.gone.blobs > 0 ? report : undefined
  })
  assert.deepEqual(dry.gone, { tags: 0, manifests: 0, links: 1, blobs: 1, bytes: 400_000 })
  assert.equal(await client.headBlob('web', layer), 200)
  const waited = await until('the first collection', async () => {
    const { stdout, stderr } = await deployctl(server, ['registry', 'gc'])
    return stdout === '' ? undefined : { stdout, stderr }
  })
  assert.match(waited.stdout, new RegExp(`^link\\tweb@${layer}\\t\\tno manifest`, 'm'))
  assert.match(waited.stdout, new RegExp(`^blob\\t${layer}\\t391 KiB\\tno repository has it`, 'm'))
  assert.match(
    await deployctlOk(server, ['audit', '--json']),
    /"garbage collection".*"action":"gc\.removed".*"manifests":0,"links":1,"blobs":1,"bytes":400000/,
  )
  assert.match(waited.stderr, /Removed 0 tags, 0 manifests and 1 blobs, 391 KiB/)
  assert.equal(await client.headBlob('web', layer), 404)
  assert.equal(await client.statusOf('/v2/web/manifests/1'), 200)

  const metrics = await (await fetch(`${server.metricsUrl}/metrics`)).text()
  assert.match(metrics, /^rackswarm_registry_gc_freed_bytes_total 400000$/m)
  assert.match(metrics, /^rackswarm_registry_gc_blobs_deleted_total 1$/m)
  assert.ok(Number(/^rackswarm_registry_gc_last_run_timestamp_seconds (.*)$/m.exec(metrics)?.[1]) > 1.7e9)
  const status = await (await client.call('/api/v1/gc')).json()
  assert.equal((status as { lastRun: GcReport }).lastRun.gone.bytes >= 0, true)
  const stranger = await deployctl(server, ['registry', 'gc'], {
    env: { DEPLOYCTL_TOKEN_FILE: '', DEPLOYCTL_TOKEN: 'x' },
  })
  assert.equal(stranger.code, 4)
})

test('who may push and finds a blob there by HEAD need only push the manifest; a HEAD of a reader keeps nothing', async (t) => {
  const { server, client, collect } = await startedServer(t, { grace: '1s' })
  const created = await deployctlOk(server, [
    'token',
    'create',
    '--name',
    'ci',
    '--scope',
    'publish:web',
    '--json',
  ])
  const reading = await deployctlOk(server, [
    'token',
    'create',
    '--name',
    'reader',
    '--scope',
    'pull:web',
    '--json',
  ])
  const pusher = ociClient(server.publicUrl, (JSON.parse(created) as { token: string }).token)
  const reader = ociClient(server.publicUrl, (JSON.parse(reading) as { token: string }).token)
  const bytes = new Uint8Array(randomBytes(300_000))
  const digest = await client.pushBlob('web', bytes)
  // As good as gone: nothing but the next collection is between it and the end.
  await until('the link is no longer used', async () => (await collect({ dryRun: true })).gone.links === 1)
  assert.equal(await pusher.headBlob('web', digest), 200)
  assert.equal((await collect()).gone.links, 0)
  const put = await pusher.putManifest('web', { layers: [layerOf(bytes)] }, 'v1')
  assert.equal(put.status, 201)
  assert.equal(sha256Of((await reader.pullBlob('web', digest)) ?? Buffer.alloc(0)), digest)

  const another = new Uint8Array(randomBytes(1000))
  const lost = await client.pushBlob('web', another)
  await until('the blob is gone', async () => {
    const status = await reader.headBlob('web', lost)
    await collect()
    return status === 404
  })
  const late = await pusher.putManifest('web', { layers: [layerOf(another)] }, 'v2')
  assert.deepEqual([late.status, late.code], [404, 'MANIFEST_BLOB_UNKNOWN'])
})

test('a HEAD and a collection at the same moment: who is told that a blob is there has it', async (t) => {
  const { client, collect } = await startedServer(t, { grace: '1s' })
  const contents = Array.from({ length: 40 }, () => new Uint8Array(randomBytes(500)))
  for (const bytes of contents) await client.pushBlob('web', bytes)
  await until(
    'the links are no longer used',
    async () => (await collect({ dryRun: true })).gone.links === contents.length,
  )
  const collecting = collect()
  const answers = await Promise.all(
    contents.map(async (bytes, i) => {
      const status = await client.headBlob('web', sha256Of(bytes))
      if (status === 404) return 'gone'
      const put = await client.putManifest('web', { layers: [layerOf(bytes)] }, `v${i}`)
      assert.equal(put.status, 201)
      return 'kept'
    }),
  )
  const { gone } = await collecting
  assert.equal(gone.links, answers.filter((answer) => answer === 'gone').length)
  for (const [i, bytes] of contents.entries())
    assert.equal((await client.pullBlob('web', sha256Of(bytes))) !== undefined, answers[i] === 'kept')
})

test('retention removes old tags by itself, but not latest, pins, and what a host follows or holds', async (t) => {
  const { server, client } = await startedServer(t, {
    grace: '500ms',
    registry: 'retention: [{ repositories: [web], keep_last: 1 }], ',
    gc: 'enabled: true, interval: 1s',
  })
  const held = await pushRelease(client, 'web', 'held')
  await reportAsHost(server, ['web:followed'], [{ reference: 'web:held', digest: held.manifest }])
  const pinned = await pushRelease(client, 'web', 'pinned')
  assert.match(
    await deployctlOk(server, ['registry', 'pin', 'web:pinned', '--json']),
    new RegExp(pinned.manifest),
  )
  assert.match(await deployctlOk(server, ['registry', 'pins']), /^web:pinned\tsha256:/)
  assert.equal((await deployctl(server, ['registry', 'pin', 'web:nobody'])).code, 5)
  const followed = await pushRelease(client, 'web', 'followed')
  const old = await pushRelease(client, 'web', 'old')
  const [latest, newest] = [
    await pushRelease(client, 'web', 'latest'),
    await pushRelease(client, 'web', 'new'),
  ]
  const tagsOf = async () => {
    const { tags } = (await (await client.call('/v2/web/tags/list')).json()) as { tags: string[] }
    return tags
  }
  await until('the old tag is gone', async () => !(await tagsOf()).includes('old'))
  assert.deepEqual(await tagsOf(), ['followed', 'held', 'latest', 'new', 'pinned'])
  const isThere = async (manifest: string) => (await client.statusOf(`/v2/web/manifests/${manifest}`)) === 200
  await until('its manifest is gone', async () => !(await isThere(old.manifest)))
  await deployctlOk(server, ['registry', 'unpin', 'web:pinned'])
  await until('the pinned tag is gone', async () => !(await tagsOf()).includes('pinned'))
  assert.equal((await deployctl(server, ['registry', 'unpin', 'web:pinned'])).code, 5)
  for (const { manifest, layer } of [held, followed, latest, newest]) {
    assert.ok(await isThere(manifest))
    assert.ok(await client.pullBlob('web', layer))
  }
})

test('a blob is deleted by hand once no manifest of its repository names it, and other repositories keep it', async (t) => {
  const { client } = await startedServer(t, { grace: '1h' })
  const bytes = new Uint8Array(randomBytes(300_000))
  const digest = await client.pushBlob('web', bytes)
  assert.equal(await client.mountBlob('other', bytes, 'web'), true)
  const { digest: manifest } = await client.putManifest('web', { layers: [layerOf(bytes)] }, 'v1')
  const refused = await client.call(`/v2/web/blobs/${digest}`, { method: 'DELETE' })
  const { errors } = (await refused.json()) as { errors: { code: string; message: string }[] }
  assert.deepEqual([refused.status, errors[0]?.code], [405, 'UNSUPPORTED'])
  assert.match(errors[0]?.message ?? '', new RegExp(`manifest ${manifest} of web needs it`))
  assert.equal(await client.deleteManifest('web', manifest), 202)
  assert.equal(await client.deleteBlob('web', digest), 202)
  assert.equal(await client.headBlob('web', digest), 404)
  assert.equal(await client.deleteBlob('web', digest), 404)
  assert.equal(await client.headBlob('other', digest), 200)
  assert.deepEqual(
    await client.putManifest('web', { layers: [layerOf(bytes)] }, 'v1').then(({ code }) => code),
    'MANIFEST_BLOB_UNKNOWN',
  )
})

test('clients push, mount, delete and push again what is collected beside them, and nothing is lost', async () => {
  const figures = await collectDuringPushes(10)
  assert.ok(figures.manifests > 50 && figures.collections > 5, JSON.stringify(figures))
  assert.ok(
    figures.blobsCollected > 0 && figures.pushedAgain > 0 && figures.manifestsCollected > 0,
    JSON.stringify(figures),
  )
})

test('kill -9 of the server in the middle of a collection leaves a registry that is whole', async () => {
  const { cut } = await crashCollections(6)
  assert.ok(cut > 0, 'none of them was cut off in the middle')
})

async function startedServer(
  t: TestContext,
  { grace, registry = '', gc = 'enabled: false' }: { grace: string; registry?: string; gc?: string },
) {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-gc-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const server: FleetServer = await startFleetServer(directory, {
    settings: `registry: { ${registry}gc: { grace: ${grace}, ${gc} } }\n`,
  })
  t.after(() => server[Symbol.asyncDispose]())
  const token = (await readFile(server.adminTokenFile, 'utf8')).trim()
  const http = createHttpClient({ baseUrl: server.publicUrl, credential: () => token })
  t.after(() => http[Symbol.asyncDispose]())
  const api = createServerClient(http)
  return {
    server,
    directory,
    client: ociClient(server.publicUrl, token),
    collect: async ({ dryRun = false } = {}): Promise<GcReport> => {
      const { lastRun, lastDryRun } = await api.collectGarbage({ dryRun })
      const report = dryRun ? lastDryRun : lastRun
      assert.ok(report)
      return report
    },
  }
}

/** Enrols a host and reports for it, once: it is taken to be there for a minute. */
async function reportAsHost(
  server: FleetServer,
  follow: string[],
  held: { reference: string; digest: string }[],
): Promise<void> {
  const bootstrapToken = (await readFile(join(server.dataDirectory, 'bootstrap-token'), 'utf8')).trim()
  await using enrolling = createHttpClient({ baseUrl: server.publicUrl })
  const { credential } = await createServerClient(enrolling).enroll({ bootstrapToken, host: 'h1' })
  await using http = createHttpClient({ baseUrl: server.publicUrl, credential: () => credential })
  await createServerClient(http).report({
    agentVersion: '1',
    follow,
    held: held.map((one) => ({
      ...one,
      state: 'held',
      bytesDone: 1000,
      bytesTotal: 1000,
      bytes: { ownRack: 0, otherRacks: 0, webseed: 1000 },
      tookMs: 1,
    })),
    diskUsedBytes: 1000,
    diskQuotaBytes: 10_000,
  })
}
