import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { mkdtemp, readFile, readdir, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { promisify } from 'node:util'
import { crashServer } from '../soak/crash-server.ts'
import type { FleetServer } from '../support/fleet.ts'
import { deployctl, deployctlOk, startFleetServer, writeRandomFile } from '../support/fleet.ts'
import { until } from '../support/until.ts'
import { skopeoCopy, writeAuthFile, writeImage } from './oci-image.ts'

const run = promisify(execFile)

test('skopeo pushes an image and pulls the same one back', async (t) => {
  const { server, directory, admin } = await startedServer(t)
  const image = join(directory, 'image')
  const layer = await writeImage(image)
  const target = `docker://${new URL(server.publicUrl).host}/team/app:1`
  const authFile = join(directory, 'auth.json')
  await writeAuthFile(authFile, server.publicUrl, admin)
  const copied = join(directory, 'copied')
  await skopeoCopy(authFile, '--dest-tls-verify=false', `oci:${image}:1`, target)
  await skopeoCopy(authFile, '--src-tls-verify=false', target, `oci:${copied}:1`)
  const { stdout } = await run('skopeo', ['inspect', '--authfile', authFile, '--tls-verify=false', target])
  assert.match(stdout, new RegExp(layer))
  const bytes = await readFile(join(copied, 'blobs', 'sha256', layer))
  assert.equal(createHash('sha256').update(bytes).digest('hex'), layer)
})

test('a blob is pushed in chunks, in order only, and pulled whole, by HEAD and by range', async (t) => {
  const { server, headers } = await startedServer(t)
  const bytes = randomBytes(1_000_000)
  const digest = `sha256:${createHash('sha256').update(bytes).digest('hex')}`
  const call = (path: string, init: RequestInit = {}) =>
    fetch(new URL(path, server.publicUrl), {
      ...init,
      headers: { ...headers, ...(init.headers as Record<string, string>) },
    })
  const started = await call('/v2/web/blobs/uploads/', { method: 'POST' })
  assert.equal(started.status, 202)
  let location = started.headers.get('location') ?? ''
  const chunk = async (start: number, end: number) =>
    call(location, {
      method: 'PATCH',
      headers: { 'content-range': `${start}-${end - 1}`, 'content-type': 'application/octet-stream' },
      body: bytes.subarray(start, end),
    })
  const first = await chunk(0, 400_000)
  assert.equal(first.status, 202)
  assert.equal(first.headers.get('range'), '0-399999')
  location = first.headers.get('location') ?? location
  assert.equal((await chunk(500_000, 600_000)).status, 416)
  const second = await chunk(400_000, 1_000_000)
  assert.equal(second.status, 202)
  const end = new URL(second.headers.get('location') ?? location, server.publicUrl)
  end.searchParams.set('digest', digest)
  const finished = await call(end.href, { method: 'PUT' })
  assert.equal(finished.status, 201)
  assert.equal(finished.headers.get('docker-content-digest'), digest)
  const path = `/v2/web/blobs/${digest}`
  assert.equal((await call(path, { method: 'HEAD' })).headers.get('content-length'), '1000000')
  assert.ok(Buffer.from(await (await call(path)).arrayBuffer()).equals(bytes))
  const part = await call(path, { headers: { range: 'bytes=999990-' } })
  assert.equal(part.status, 206)
  assert.ok(Buffer.from(await part.arrayBuffer()).equals(bytes.subarray(999_990)))
  assert.equal((await call(path, { headers: { range: 'bytes=1000000-' } })).status, 416)
  assert.equal((await call('/v2/other/blobs/' + digest)).status, 404, 'readable only where it was pushed')
  assert.equal((await fetch(new URL(path, server.publicUrl))).status, 401)
})

test('kill -9 of the server in the middle of pushes loses nothing that was acknowledged', async () => {
  const { acknowledged, cut } = await crashServer(6)
  assert.equal(acknowledged + cut, 6)
})

for (const signal of ['SIGKILL', 'SIGTERM'] as const)
  test(`${signal} to the server in the middle of a publish: deployctl waits for it and goes on where it stopped`, async (t) => {
    const { server, directory } = await startedServer(t)
    const build = join(directory, 'build.tar')
    const sha256 = await writeRandomFile(build, 200 * 1024 * 1024)
    const publishing = deployctl(server, ['publish', build, 'web:1', '--json'])
    await uploadReaches(20 * 1024 * 1024, join(server.dataDirectory, 'uploads'))
    server.process.kill(signal)
    await server.exited
    const http = `addr: 127.0.0.1:${new URL(server.publicUrl).port}`
    await using again = await startFleetServer(directory, { http })
    const { code, stderr } = await publishing
    assert.equal(code, 0, stderr)
    const admin = (await readFile(again.adminTokenFile, 'utf8')).trim()
    const response = await fetch(`${again.publicUrl}/v2/web/blobs/sha256:${sha256}`, {
      headers: { authorization: `Bearer ${admin}` },
    })
    const bytes = Buffer.from(await response.arrayBuffer())
    assert.equal(createHash('sha256').update(bytes).digest('hex'), sha256)
  })

test('the end of an upload may be asked for again, where the answer was lost, and the answer is the same', async (t) => {
  const { server, headers } = await startedServer(t)
  const bytes = randomBytes(300_000)
  const digest = `sha256:${createHash('sha256').update(bytes).digest('hex')}`
  const started = await fetch(`${server.publicUrl}/v2/web/blobs/uploads/`, { method: 'POST', headers })
  const location = new URL(started.headers.get('location') ?? '', server.publicUrl)
  assert.equal((await fetch(location, { method: 'PATCH', headers, body: bytes })).status, 202)
  const finish = async (wanted: string) => {
    const response = await fetch(`${location.href}?digest=${wanted}`, { method: 'PUT', headers })
    return [response.status, response.headers.get('docker-content-digest'), response.headers.get('location')]
  }
  const first = await finish(digest)
  assert.deepEqual(first, [201, digest, `/v2/web/blobs/${digest}`])
  assert.deepEqual(await finish(digest), first)
  assert.equal((await finish(`sha256:${'0'.repeat(64)}`))[0], 404, 'a blob that never came is not there')
})

test('a manifest that is pushed and deleted at once leaves no tag that names nothing', async (t) => {
  const { server, directory, headers } = await startedServer(t)
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, 1000)
  await deployctlOk(server, ['publish', build, 'web:1'])
  const manifests = `${server.publicUrl}/v2/web/manifests`
  const published = await fetch(`${manifests}/1`, { headers })
  const type = published.headers.get('content-type') ?? ''
  const manifest = (await published.json()) as object
  const round = async (number: number) => {
    const body = JSON.stringify({ ...manifest, annotations: { round: String(number) } })
    const digest = `sha256:${createHash('sha256').update(body).digest('hex')}`
    let settled = false
    const pushing = fetch(`${manifests}/round-${number}`, {
      method: 'PUT',
      headers: { ...headers, 'content-type': type },
      body,
    }).finally(() => (settled = true))
    // One after another, so that some of them meet the push wherever it stands.
    while (!settled) {
      const { status } = await fetch(`${manifests}/${digest}`, { method: 'DELETE', headers })
      assert.ok([202, 404].includes(status), String(status))
    }
    assert.equal((await pushing).status, 201)
  }
  for (let first = 0; first < 200; first += 5)
    await Promise.all(Array.from({ length: 5 }, (_, i) => round(first + i)))
  const { tags } = (await (await fetch(`${server.publicUrl}/v2/web/tags/list`, { headers })).json()) as {
    tags: string[]
  }
  for (const tag of tags) assert.equal((await fetch(`${manifests}/${tag}`, { headers })).status, 200, tag)
})

async function startedServer(t: TestContext) {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-registry-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const server: FleetServer = await startFleetServer(directory)
  t.after(() => server[Symbol.asyncDispose]())
  const admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
  return { server, directory, admin, headers: { authorization: `Bearer ${admin}` } }
}

/** Waits until an upload has so many bytes on disk. */
async function uploadReaches(sizeBytes: number, uploads: string): Promise<void> {
  const sizeOf = async (name: string) =>
    stat(join(uploads, name)).then(
      (found) => (found.isFile() ? found.size : 0),
      () => 0,
    )
  await until(
    `an upload has ${sizeBytes} bytes`,
    async () => {
      const names = await readdir(uploads, { recursive: true }).catch(() => [])
      return Math.max(0, ...(await Promise.all(names.map(sizeOf)))) >= sizeBytes
    },
    { withinMs: 60_000, everyMs: 5 },
  )
}
