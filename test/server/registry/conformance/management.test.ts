// OCI distribution-spec 1.1, "Content Management", "Error Codes", "Warnings": each test says what the spec says. Deletion of blobs
// is tested with the collection of garbage.
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { test } from 'node:test'
import { deployctlOk } from '../../../support/fleet.ts'
import { emptyJson, imageManifest, refusal, sha256, useRegistry } from './registry.ts'

const registry = useRegistry()

test('deleting tags: 202, and then a GET of the tag is 404, while the manifest stays', async () => {
  const { image, call } = registry()
  const { digest } = await image('delete/tag', 'v1')
  assert.equal((await call('DELETE', '/v2/delete/tag/manifests/v1')).status, 202)
  assert.deepEqual(refusal(await call('GET', '/v2/delete/tag/manifests/v1')), [404, 'MANIFEST_UNKNOWN'])
  assert.equal((await call('GET', `/v2/delete/tag/manifests/${digest}`)).status, 200)
  const { tags } = (await call('GET', '/v2/delete/tag/tags/list')).json() as { tags: string[] }
  assert.deepEqual(tags, [])
  assert.deepEqual(refusal(await call('DELETE', '/v2/delete/tag/manifests/v1')), [404, 'MANIFEST_UNKNOWN'])
})

test('deleting manifests: 202, and then a GET of it and of any tag that points to it is 404', async () => {
  const { image, put, call } = registry()
  const { digest, bytes } = await image('delete/manifest', 'v1')
  await put('delete/manifest', 'v2', JSON.parse(bytes.toString()) as object)
  const other = await image('delete/manifest', 'other')
  assert.equal((await call('GET', `/v2/delete/manifest/manifests/${digest}`)).status, 200)
  assert.equal((await call('DELETE', `/v2/delete/manifest/manifests/${digest}`)).status, 202)
  for (const reference of [digest, 'v1', 'v2'])
    assert.deepEqual(refusal(await call('GET', `/v2/delete/manifest/manifests/${reference}`)), [
      404,
      'MANIFEST_UNKNOWN',
    ])
  assert.equal((await call('GET', `/v2/delete/manifest/manifests/${other.digest}`)).status, 200)
  assert.deepEqual(refusal(await call('DELETE', `/v2/delete/manifest/manifests/${digest}`)), [
    404,
    'MANIFEST_UNKNOWN',
  ])
})

test('deleting: if the repository does not exist, the response must be 404', async () => {
  const { call } = registry()
  const digest = sha256(randomBytes(8))
  assert.equal((await call('DELETE', `/v2/delete/nothing/manifests/${digest}`)).status, 404)
})

test('error codes: each has the form and the code of the spec', async () => {
  const { call, push } = registry()
  await push('errors/one', emptyJson)
  const cases = [
    ['GET', 'UPPER/manifests/v1', 400, 'NAME_INVALID'],
    ['GET', 'a..b/manifests/v1', 400, 'NAME_INVALID'],
    ['GET', 'a/-b/tags/list', 400, 'NAME_INVALID'],
    ['GET', `${'a'.repeat(256)}/tags/list`, 400, 'NAME_INVALID'],
    ['GET', 'errors/one/unknown', 404, 'UNSUPPORTED'],
    ['GET', 'errors/%zz/manifests/v1', 400, 'NAME_INVALID'],
    ['GET', 'errors/%ff/manifests/v1', 400, 'NAME_INVALID'],
    ['OPTIONS', 'errors/one/manifests/v1', 404, 'UNSUPPORTED'],
    ['POST', 'errors/one/manifests/v1', 405, 'UNSUPPORTED'],
    ['PUT', 'errors/one/tags/list', 405, 'UNSUPPORTED'],
    ['PATCH', 'errors/one/blobs/uploads/', 405, 'UNSUPPORTED'],
    ['PUT', `errors/one/blobs/${sha256(emptyJson)}`, 405, 'UNSUPPORTED'],
    ['GET', 'errors/one/blobs/uploads/11111111-1111-1111-1111-111111111111', 404, 'BLOB_UPLOAD_UNKNOWN'],
    ['POST', 'errors/one/blobs/uploads/?length=many', 400, 'SIZE_INVALID'],
    ['POST', 'errors/one/blobs/uploads/?mount=sha256:1', 400, 'DIGEST_INVALID'],
  ] as const
  for (const [method, path, status, code] of cases)
    assert.deepEqual(refusal(await call(method, `/v2/${path}`)), [status, code], `${method} ${path}`)
})

test('error codes: who shows nothing is UNAUTHORIZED and told where to get a token, who may not is DENIED', async () => {
  const { server, call } = registry()
  const anonymous = await call('GET', '/v2/errors/one/tags/list', { authorization: undefined })
  assert.deepEqual(refusal(anonymous), [401, 'UNAUTHORIZED'])
  assert.match(
    anonymous.headers.get('www-authenticate') ?? '',
    /^Bearer realm="[^"]+",service="[^"]+",scope="repository:errors\/one:pull"$/,
  )
  const created = await deployctlOk(server, [
    'token',
    'create',
    '--name',
    'reader',
    '--scope',
    'pull:errors/*',
    '--json',
  ])
  const { token } = JSON.parse(created) as { token: string }
  const asReader = { authorization: `Bearer ${token}` }
  const write = await call('POST', '/v2/errors/one/blobs/uploads/', asReader)
  assert.deepEqual(refusal(write), [403, 'DENIED'])
  assert.deepEqual(refusal(await call('GET', '/v2/another/tags/list', asReader)), [403, 'DENIED'])
})

test('warnings: code 299, agent -, no date: here where the token of a push ends within days', async () => {
  const { server, push, call } = registry()
  const token = async (name: string, ttl: string) => {
    const created = await deployctlOk(server, [
      'token',
      'create',
      '--name',
      name,
      '--scope',
      'publish:warn',
      '--ttl',
      ttl,
      '--json',
    ])
    return (JSON.parse(created) as { token: string }).token
  }
  const config = await push('warn', emptyJson)
  const body = JSON.stringify({ schemaVersion: 2, mediaType: imageManifest, config, layers: [] })
  const warningFor = async (secret: string) => {
    const answer = await call('PUT', '/v2/warn/manifests/v1', {
      body,
      headers: { 'content-type': imageManifest },
      authorization: `Bearer ${secret}`,
    })
    assert.equal(answer.status, 201)
    return answer.headers.get('warning')
  }
  assert.match((await warningFor(await token('short', '2d'))) ?? '', /^299 - "[^"]{1,200}"$/)
  assert.equal(await warningFor(await token('long', '60d')), null)
})
