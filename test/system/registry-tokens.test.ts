import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { promisify } from 'node:util'
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

test('the token flow tells push and delete apart, and a manifest is deleted only with delete', async (t) => {
  const { server, call, admin, registryToken } = await startedServer(t)
  const make = async (...scopes: string[]) =>
    (
      await deployctlOk(server, ['token', 'create', '--name', 'x', ...scopes.flatMap((s) => ['--scope', s])])
    ).trim()
  const actionsOf = async (scope: string, token: string) => {
    const [, payload = ''] = (await registryToken(scope, token)).split('.')
    const { access } = JSON.parse(Buffer.from(payload, 'base64url').toString()) as {
      access: { actions: string[] }[]
    }
    return access.flatMap(({ actions }) => actions)
  }
  const [publisher, cleaner] = [await make('publish:web'), await make('delete:web')]
  for (const scope of ['repository:web:*', 'repository:web:pull,push,delete']) {
    assert.deepEqual(await actionsOf(scope, publisher), ['pull', 'push'])
    assert.deepEqual(await actionsOf(scope, cleaner), ['delete'])
    assert.deepEqual(await actionsOf(scope, admin), ['pull', 'push', 'delete'])
  }
  assert.deepEqual(await actionsOf('repository:db:*', cleaner), [])
  // With the tokens themselves, as deployctl sends them.
  const statusOf = async (path: string, method: string, token: string) =>
    (await call(path, { method, token })).status
  for (const path of ['/v2/web/manifests/1', `/v2/web/blobs/sha256:${'0'.repeat(64)}`])
    assert.equal(await statusOf(path, 'DELETE', publisher), 403, path)
  assert.equal(await statusOf('/v2/web/manifests/1', 'GET', cleaner), 403)
  assert.equal(await statusOf('/v2/web/blobs/uploads/', 'POST', cleaner), 403)
  assert.equal(await statusOf('/v2/web/manifests/latest', 'DELETE', cleaner), 202)
  const anonymous = await call('/v2/web/manifests/1', { method: 'DELETE' })
  assert.match(anonymous.headers.get('www-authenticate') ?? '', /scope="repository:web:pull,delete"$/)
  const digest = (await call('/v2/web/manifests/1', { token: admin })).headers.get('docker-content-digest')
  const path = `/v2/web/manifests/${digest ?? ''}`
  const pullOnly = await registryToken('repository:web:pull', admin)
  assert.equal((await call(path, { method: 'DELETE', token: pullOnly })).status, 401)
  const token = await registryToken('repository:web:pull,delete', admin)
  assert.equal((await call(path, { method: 'DELETE', token })).status, 202)
  assert.equal((await call(path, { token })).status, 404)
})

test('skopeo deletes an image with a token that may, and not with one that may only publish', async (t) => {
  const { server, directory, admin, call } = await startedServer(t)
  const image = join(directory, 'image')
  await writeImage(image)
  const authFile = join(directory, 'auth.json')
  const reference = `docker://${new URL(server.publicUrl).host}/team/app:1`
  await writeAuthFile(authFile, server.publicUrl, admin)
  await skopeoCopy(authFile, '--dest-tls-verify=false', `oci:${image}:1`, reference)
  const scoped = async (...scopes: string[]) => {
    const args = ['token', 'create', '--name', 'x', ...scopes.flatMap((scope) => ['--scope', scope])]
    await writeAuthFile(authFile, server.publicUrl, (await deployctlOk(server, args)).trim())
  }
  const remove = () =>
    promisify(execFile)('skopeo', ['delete', '--tls-verify=false', '--authfile', authFile, reference])
  await scoped('publish:team/*')
  await assert.rejects(remove())
  assert.equal((await call('/v2/team/app/manifests/1', { token: admin })).status, 200)
  await scoped('pull:team/*', 'delete:team/*')
  await remove()
  assert.equal((await call('/v2/team/app/manifests/1', { token: admin })).status, 404)
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
