// How the public conformance suite and real clients get at the registry: a user name with a token as the password, through the
// token flow, with registry tokens that are used again.
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { test } from 'node:test'
import { deployctlOk } from '../../../support/fleet.ts'
import type { Answer, CallOptions } from './registry.ts'
import { sha256, useRegistry } from './registry.ts'

const registry = useRegistry()

/** Asks without a credential, gets a token for what the challenge says, and asks again; keeps it for the same repository and kind of request. */
function flowClient(secret: string) {
  const kept = new Map<string, string>()
  let tokens = 0
  const fetchToken = async (answer: Answer): Promise<string> => {
    const challenge = answer.headers.get('www-authenticate') ?? ''
    const part = (name: string) => new RegExp(`${name}="(.+?)"`).exec(challenge)?.[1] ?? ''
    const url = new URL(part('realm'))
    url.searchParams.set('service', part('service'))
    if (part('scope') !== '') url.searchParams.set('scope', part('scope'))
    const basic = `Basic ${Buffer.from(`anyone:${secret}`).toString('base64')}`
    const reply = await registry().call('GET', url.href, { authorization: basic })
    assert.equal(reply.status, 200)
    tokens++
    return (reply.json() as { access_token: string }).access_token
  }
  return {
    tokens: () => tokens,
    call: async (method: string, path: string, options: CallOptions = {}): Promise<Answer> => {
      const repository = /^\/v2\/(.+?)\/(blobs|manifests|tags|referrers)\//.exec(path)?.[1] ?? ''
      const key = `${repository} ${method === 'GET' || method === 'HEAD' ? 'pull' : method === 'DELETE' ? 'delete' : 'push'}`
      const token = kept.get(key)
      const authorization = token === undefined ? undefined : `Bearer ${token}`
      const answer = await registry().call(method, path, { ...options, authorization })
      if (answer.status !== 401) return answer
      const fresh = await fetchToken(answer)
      kept.set(key, fresh)
      return registry().call(method, path, { ...options, authorization: `Bearer ${fresh}` })
    },
  }
}

test('ping, push, pull and delete through the token flow', async () => {
  const { admin } = registry()
  const client = flowClient(admin)
  assert.equal((await client.call('GET', '/v2/')).status, 200)
  const bytes = randomBytes(1000)
  const digest = sha256(bytes)
  assert.equal((await client.call('HEAD', `/v2/flow/one/blobs/${digest}`)).status, 404)
  const pushed = await client.call('POST', `/v2/flow/one/blobs/uploads/?digest=${digest}`, { body: bytes })
  assert.equal(pushed.status, 201)
  assert.ok((await client.call('GET', `/v2/flow/one/blobs/${digest}`)).body.equals(bytes))
  assert.equal((await client.call('DELETE', '/v2/flow/one/manifests/never')).status, 404)
})

test('a mount is granted its source as well: by the challenge, also to a client that has a token for the target alone', async () => {
  const { admin, push } = registry()
  const { digest } = await push('flow/source', randomBytes(1000))
  const client = flowClient(admin)
  assert.equal((await client.call('POST', '/v2/flow/target/blobs/uploads/')).status, 202)
  assert.equal(client.tokens(), 1)
  const mounted = await client.call('POST', `/v2/flow/target/blobs/uploads/?mount=${digest}&from=flow/source`)
  assert.equal(mounted.status, 201)
  assert.equal(client.tokens(), 2)
})

test('who may not pull from the source of a mount is not sent round in circles: it uploads', async () => {
  const { server, push } = registry()
  const { digest } = await push('flow/secret', randomBytes(1000))
  const created = await deployctlOk(server, [
    'token',
    'create',
    '--name',
    'ci',
    '--scope',
    'publish:flow/mine',
    '--json',
  ])
  const client = flowClient((JSON.parse(created) as { token: string }).token)
  const started = await client.call('POST', `/v2/flow/mine/blobs/uploads/?mount=${digest}&from=flow/secret`)
  assert.equal(started.status, 202)
  assert.equal(client.tokens(), 1)
  const anywhere = await client.call('POST', `/v2/flow/mine/blobs/uploads/?mount=${digest}`)
  assert.equal(anywhere.status, 202, 'and does not learn that the blob is there')
})

test('Basic with a token as the password is taken as it is', async () => {
  const { admin, call, image } = registry()
  await image('flow/basic', 'v1')
  const authorization = `Basic ${Buffer.from(`anyone:${admin}`).toString('base64')}`
  assert.equal((await call('GET', '/v2/flow/basic/manifests/v1', { authorization })).status, 200)
})
