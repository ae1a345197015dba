// kill -9 of the server at random points of collections: every release that has a tag is whole, no link and no manifest names what is not
// there, and what was being removed can be pushed again. `npm run soak -- crash-gc [ROUNDS]` (default 100).
import assert from 'node:assert/strict'
import { randomBytes, randomInt } from 'node:crypto'
import { mkdtemp, readFile, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { startFleetServer } from '../support/fleet.ts'
import { freePort } from '../support/foreign.ts'
import type { OciClient } from '../support/oci.ts'
import { layerOf, manifestType, ociClient, pushRelease, sha256Of } from '../support/oci.ts'

const orphansEach = 12
/** Where the collection is when it ends: at manifests, at links, at the bytes. */
const parts = ['repositories/web/_manifests', 'repositories/web/_blobs', 'blobs']

/** @returns collections that were cut off in the middle. @throws AssertionError when something is lost, broken or in the way */
export async function crashCollections(rounds: number): Promise<{ cut: number }> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-crash-gc-'))
  const options = {
    http: `addr: 127.0.0.1:${await freePort()}`,
    settings: 'registry: { gc: { enabled: false, grace: 50ms } }\n',
  }
  let server = await startFleetServer(directory, options)
  // With a torrent each: a blob is two files then.
  const blobs = Array.from({ length: orphansEach }, () => new Uint8Array(randomBytes(300_000)))
  let cut = 0
  try {
    const token = (await readFile(server.adminTokenFile, 'utf8')).trim()
    const client = ociClient(server.publicUrl, token)
    const kept = [
      await pushRelease(client, 'web', 'v1', 300_000),
      await pushRelease(client, 'team/app', 'v1'),
    ]
    for (let round = 0; round < rounds; round++) {
      // The same blobs again: what the crash before left of them must not be in the way.
      for (const bytes of blobs) await client.pushBlob('web', bytes)
      const unused = await pushUntagged(client, blobs, round)
      await sleep(100)
      const before = (await filesBelow(server.dataDirectory)).length
      const part = parts[round % parts.length] ?? ''
      const collecting = client
        .call('/api/v1/gc', { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{}' })
        .then(
          (response) => response.arrayBuffer(),
          () => undefined,
        )
      await fewer(server.dataDirectory, part, randomInt(1, orphansEach))
      server.process.kill('SIGKILL')
      await server.exited
      await collecting
      if (
        (await isSound(server.dataDirectory)) > 0 &&
        (await filesBelow(server.dataDirectory)).length < before
      )
        cut++
      server = await startFleetServer(directory, options)
      assert.deepEqual(await readdir(join(server.dataDirectory, 'trash')), [])
      for (const [i, { manifest, layer }] of kept.entries()) {
        const repository = i === 0 ? 'web' : 'team/app'
        assert.equal(sha256Of((await client.pullBlob(repository, layer)) ?? Buffer.alloc(0)), layer)
        assert.equal(await client.statusOf(`/v2/${repository}/manifests/${manifest}`), 200)
      }
      // An index that is still there has all its parts.
      for (const { index, parts } of unused) {
        if ((await client.statusOf(`/v2/web/manifests/${index}`)) !== 200) continue
        for (const part of parts) assert.equal(await client.statusOf(`/v2/web/manifests/${part}`), 200)
      }
    }
    return { cut }
  } finally {
    await server[Symbol.asyncDispose]()
    await rm(directory, { recursive: true, force: true })
  }
}

/** Indexes of manifests of the blobs, all of them without a tag. */
async function pushUntagged(client: OciClient, blobs: readonly Uint8Array<ArrayBuffer>[], round: number) {
  const pushed: { index: string; parts: string[] }[] = []
  for (let i = 0; i + 1 < blobs.length; i += 2) {
    const parts = []
    for (const bytes of blobs.slice(i, i + 2))
      parts.push(
        await client.putManifest('web', { layers: [layerOf(bytes)], annotations: { round: String(round) } }),
      )
    const manifests = parts.map(({ digest, size }) => ({ mediaType: manifestType, digest, size }))
    const index = await client.putManifest('web', { manifests })
    assert.equal(index.status, 201)
    pushed.push({ index: index.digest, parts: parts.map(({ digest }) => digest) })
  }
  return pushed
}

/** Looks at the disk of a server that does not run. @returns how much of what was to go is still there */
async function isSound(data: string): Promise<number> {
  const files = new Set(await filesBelow(data))
  const blobFile = (hex: string) => `blobs/sha256/${hex.slice(0, 2)}/${hex}/data`
  for (const file of files) {
    const link = /^repositories\/.+\/_blobs\/([0-9a-f]{64})$/.exec(file)?.[1]
    if (link !== undefined) assert.ok(files.has(blobFile(link)), `the link ${file} names a blob that is gone`)
    const info = /^blobs\/sha256\/..\/([0-9a-f]{64})\/info$/.exec(file)?.[1]
    if (info !== undefined)
      assert.ok(files.has(blobFile(info)), `of the blob ${info} only the torrent is there`)
    const [, repository, manifest] = /^repositories\/(.+)\/_manifests\/([0-9a-f]{64})$/.exec(file) ?? []
    if (repository === undefined || manifest === undefined) continue
    const text = await readFile(join(data, file), 'utf8')
    for (const [, hex = ''] of text.matchAll(/"sha256:([0-9a-f]{64})"/g))
      assert.ok(
        files.has(`repositories/${repository}/_blobs/${hex}`) ||
          files.has(`repositories/${repository}/_manifests/${hex}`),
        `manifest ${manifest} of ${repository} names ${hex}, which is gone`,
      )
  }
  return [...files].filter((file) => /^repositories\/web\/_(blobs|manifests)\//.test(file)).length - 2
}

/** Paths of all files of the store, while a server may be removing some. */
async function filesBelow(data: string, part = ''): Promise<string[]> {
  const roots = part === '' ? ['blobs', 'repositories'] : [part]
  const below = await Promise.all(
    roots.map(async (root) => {
      const entries = await readdir(join(data, root), { withFileTypes: true }).catch(() => [])
      const inner = entries.map(async (entry) =>
        entry.isDirectory() ? filesBelow(data, `${root}/${entry.name}`) : [`${root}/${entry.name}`],
      )
      return (await Promise.all(inner)).flat()
    }),
  )
  return below.flat()
}

/** Waits until so many files below `part` are gone, or as long as a collection may take. */
async function fewer(data: string, part: string, count: number): Promise<void> {
  const before = (await filesBelow(data, part)).length
  for (const deadline = Date.now() + 3000; Date.now() < deadline;) {
    if ((await filesBelow(data, part)).length <= before - count) return
    await sleep(1)
  }
}

if (import.meta.main) {
  const rounds = Number(process.argv[2] ?? 100)
  const { cut } = await crashCollections(rounds)
  process.stdout.write(
    `${rounds} collections ended by kill -9, ${cut} of them in the middle: nothing lost, nothing in the way\n`,
  )
}
