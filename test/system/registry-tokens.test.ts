import assert from 'node:assert/strict'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { deployctlOk, startFleetServer, writeRandomFile } from '../support/fleet.ts'
import { skopeoCopy, writeAuthFile, writeImage } from './oci-image.ts'

test('a registry token cannot be used to get another, by GET or by POST', async (t) => {
  const { call, admin, registryToken } = await startedServer(t)
  const token = await registryToken('repository:web:pull,push', admin)
  assert.equal((await call('/v2/web/manifests/1', { token })).status, 200, 'it is good for pulls')
  assert.equal((await call('/v2/token?scope=repository:web:pull', { token })).status, 401)
  for (const field of ['password', 'refresh_token']) {
    const body = new URLSearchParams({ [field]: token, scope: 'repository:web:pull', service: 'x' })
    assert.equal((await call('/v2/token', { method: 'POST', body })).status, 401, field)
  }
})

test('a registry token ends with the API token it was made with', async (t) => {
  const { server, call, registryToken } = await startedServer(t)
  const created = await deployctlOk(server, [
    'token',
    'create',
    '--name',
    'ci',
    '--scope',
    'pull:web',
    '--json',
  ])
  const { id, token } = JSON.parse(created) as { id: string; token: string }
  const registry = await registryToken('repository:web:pull', token)
  const pull = async () => (await call('/v2/web/manifests/1', { token: registry })).status
  assert.equal(await pull(), 200)
  await deployctlOk(server, ['token', 'revoke', id])
  assert.equal(await pull(), 401)
  assert.equal((await call('/v2/token?scope=repository:web:pull', { token })).status, 401)
})

test('the token flow grants pull,delete to who may publish, and a manifest is deleted with it', async (t) => {
  const { call, admin, registryToken } = await startedServer(t)
  const digest = (await call('/v2/web/manifests/1', { token: admin })).headers.get('docker-content-digest')
  const path = `/v2/web/manifests/${digest ?? ''}`
  const pullOnly = await registryToken('repository:web:pull', admin)
  assert.equal((await call(path, { method: 'DELETE', token: pullOnly })).status, 401)
  const token = await registryToken('repository:web:pull,delete', admin)
  assert.equal((await call(path, { method: 'DELETE', token })).status, 202)
  assert.equal((await call(path, { token })).status, 404)
})

test('anonymous_pull opens pulls to anyone, and nothing else', async (t) => {
  const { call, layer } = await startedServer(t, 'registry: { anonymous_pull: true }\n')
  assert.equal((await call(`/v2/web/blobs/${layer}`)).status, 200)
  assert.equal((await call('/v2/web/manifests/1')).status, 200)
  const challenge = async (path: string, method = 'GET') => {
    const response = await call(path, { method })
    assert.equal(response.status, 401, `${method} ${path}`)
    return response.headers.get('www-authenticate') ?? ''
  }
  assert.match(await challenge('/v2/'), /^Bearer realm="http:[^"]+\/v2\/token",service="[^"]+"$/)
  assert.match(
    await challenge('/v2/web/blobs/uploads/', 'POST'),
    /^Bearer realm=.*,scope="repository:web:pull,push"/,
  )
  for (const path of ['/api/v1/releases/status?reference=web:1', '/api/v1/server'])
    assert.equal((await call(path)).status, 401, path)
  const headers = { 'content-type': 'application/json' }
  const body = JSON.stringify({ repository: 'web', digest: layer })
  assert.equal((await call('/api/v1/announce-tokens', { method: 'POST', headers, body })).status, 401)
})

test('where pulls are open to anyone, skopeo still logs in to push', async (t) => {
  const { server, directory, admin, call } = await startedServer(t, 'registry: { anonymous_pull: true }\n')
  const image = join(directory, 'image')
  const layer = await writeImage(image)
  const authFile = join(directory, 'auth.json')
  await writeAuthFile(authFile, server.publicUrl, admin)
  const target = `docker://${new URL(server.publicUrl).host}/team/app:1`
  await skopeoCopy(authFile, '--dest-tls-verify=false', `oci:${image}:1`, target)
  assert.equal((await call(`/v2/team/app/blobs/sha256:${layer}`, { method: 'HEAD' })).status, 200)
})

/** A server with the release web:1. */
async function startedServer(t: TestContext, settings = '') {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-registry-tokens-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const server = await startFleetServer(directory, { settings })
  t.after(() => server[Symbol.asyncDispose]())
  const build = join(directory, 'build.tar')
  const layer = `sha256:${await writeRandomFile(build, 512 * 1024)}`
  await deployctlOk(server, ['publish', build, 'web:1'])
  const admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
  const call = async (path: string, { token, ...init }: RequestInit & { token?: string } = {}) => {
    const headers = new Headers(init.headers)
    if (token !== undefined) headers.set('authorization', `Bearer ${token}`)
    return fetch(`${server.publicUrl}${path}`, { ...init, headers })
  }
  const registryToken = async (scope: string, token: string) => {
    const response = await call(`/v2/token?scope=${scope}`, { token })
    assert.equal(response.status, 200)
    return ((await response.json()) as { token: string }).token
  }
  return { server, directory, layer, admin, call, registryToken }
}
