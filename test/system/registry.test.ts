import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { mkdir, mkdtemp, readFile, readdir, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { crashServer } from '../soak/crash-server.ts'
import type { FleetServer } from '../support/fleet.ts'
import { deployctl, startFleetServer, writeRandomFile } from '../support/fleet.ts'

const run = promisify(execFile)

test('skopeo pushes an image and pulls the same one back', async (t) => {
  const { server, directory, admin } = await startedServer(t)
  const image = join(directory, 'image')
  const layer = await writeImage(image)
  const host = new URL(server.publicUrl).host
  const target = `docker://${host}/team/app:1`
  const authFile = join(directory, 'auth.json')
  const basic = Buffer.from(`token:${admin}`).toString('base64')
  await writeFile(authFile, JSON.stringify({ auths: { [host]: { auth: basic } } }), { mode: 0o600 })
  const copied = join(directory, 'copied')
  const copy = (...args: string[]) =>
    run('skopeo', ['--insecure-policy', 'copy', '--preserve-digests', '--authfile', authFile, ...args])
  await copy('--dest-tls-verify=false', `oci:${image}:1`, target)
  await copy('--src-tls-verify=false', target, `oci:${copied}:1`)
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

test('kill -9 of the server in the middle of a publish: deployctl waits for it and goes on where it stopped', async (t) => {
  const { server, directory } = await startedServer(t)
  const build = join(directory, 'build.tar')
  const sha256 = await writeRandomFile(build, 200 * 1024 * 1024)
  const publishing = deployctl(server, ['publish', build, 'web:1', '--json'])
  const uploads = join(server.dataDirectory, 'uploads')
  const sizeOfUpload = async () => {
    const names = await readdir(uploads, { recursive: true }).catch(() => [])
    const sizes = await Promise.all(
      names.map(async (name) =>
        stat(join(uploads, name)).then(
          (found) => (found.isFile() ? found.size : 0),
          () => 0,
        ),
      ),
    )
    return Math.max(0, ...sizes)
  }
  while ((await sizeOfUpload()) < 20 * 1024 * 1024) await sleep(5)
  server.process.kill('SIGKILL')
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

async function startedServer(t: TestContext) {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-registry-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const server: FleetServer = await startFleetServer(directory)
  t.after(() => server[Symbol.asyncDispose]())
  const admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
  return { server, directory, admin, headers: { authorization: `Bearer ${admin}` } }
}

/** An OCI image layout with one random layer. @returns the layer's SHA-256 in hex */
async function writeImage(directory: string): Promise<string> {
  const blobs = join(directory, 'blobs', 'sha256')
  await mkdir(blobs, { recursive: true })
  const put = async (mediaType: string, bytes: Buffer) => {
    const hex = createHash('sha256').update(bytes).digest('hex')
    await writeFile(join(blobs, hex), bytes)
    return { mediaType, digest: `sha256:${hex}`, size: bytes.length }
  }
  const json = (value: object) => Buffer.from(JSON.stringify(value))
  const layer = await put('application/vnd.oci.image.layer.v1.tar', randomBytes(700_000))
  const config = await put(
    'application/vnd.oci.image.config.v1+json',
    json({
      architecture: 'amd64',
      os: 'linux',
      config: {},
      rootfs: { type: 'layers', diff_ids: [layer.digest] },
    }),
  )
  const manifest = await put(
    'application/vnd.oci.image.manifest.v1+json',
    json({
      schemaVersion: 2,
      mediaType: 'application/vnd.oci.image.manifest.v1+json',
      config,
      layers: [layer],
    }),
  )
  await writeFile(join(directory, 'oci-layout'), json({ imageLayoutVersion: '1.0.0' }))
  await writeFile(
    join(directory, 'index.json'),
    json({
      schemaVersion: 2,
      manifests: [{ ...manifest, annotations: { 'org.opencontainers.image.ref.name': '1' } }],
    }),
  )
  return layer.digest.slice(7)
}
