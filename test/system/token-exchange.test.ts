import assert from 'node:assert/strict'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { once } from 'node:events'
import { mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { inspectToken } from '../../lib/token/offline.ts'
import type { FleetServer } from '../support/fleet.ts'
import { deployctl, deployctlOk, startFleetServer, writeRandomFile } from '../support/fleet.ts'
import { startIssuer } from '../support/issuer.ts'
import { makeTestKey } from '../support/key-server.ts'
import { checkConfig } from '../support/tracker.ts'

const claims = { repository_id: '123', ref: 'refs/heads/main' }

test('a token of a CI job is exchanged for a short one with the scopes of the entries that fit it', async (t) => {
  const { issuer, exchange, call } = await setUp(t)
  const { status, body } = await exchange(issuer.token(claims))
  assert.equal(status, 200)
  assert.deepEqual(
    [body['token_type'], body['expires_in'], body['scope']],
    ['Bearer', 300, 'publish:web pull:*'],
  )
  const token = String(body['access_token'])
  const { header, claims: own } = inspectToken(token)
  assert.deepEqual(
    [header['typ'], own['sub'], own['scopes']],
    ['api+jwt', 'main+any-branch', ['publish:web', 'pull:*']],
  )
  const caller = (await (await call('/api/v1/server', token)).json()) as { caller: { name: string } }
  assert.equal(caller.caller.name, 'main+any-branch')
  assert.equal((await call('/api/v1/tokens', token)).status, 403)
  const branch = await exchange(issuer.token({ ...claims, ref: 'refs/heads/feature' }))
  assert.deepEqual([branch.body['scope'], branch.body['expires_in']], ['pull:*', 600])
})

test('what does not fit is refused in words that say why, and gets nothing', async (t) => {
  const { issuer, exchange, server } = await setUp(t)
  const other = await startIssuer(t)
  const refused: [
    what: string,
    answer: Awaited<ReturnType<typeof exchange>>,
    status: number,
    words: RegExp,
  ][] = [
    [
      'another repository',
      await exchange(issuer.token({ ...claims, repository_id: '1234' })),
      403,
      /no entry/,
    ],
    ['no repository', await exchange(issuer.token({ ref: claims.ref })), 403, /no entry/],
    [
      'another audience',
      await exchange(issuer.token({ ...claims, aud: 'https://pypi.org' })),
      403,
      /no entry/,
    ],
    ['another issuer', await exchange(other.token(claims)), 401, /wrong issuer/],
    ['expired', await exchange(issuer.token({ ...claims, exp: 1 })), 401, /expired/],
    [
      'a stranger’s key',
      await exchange(issuer.token(claims, makeTestKey('issuer-1', 'RS256'))),
      401,
      /bad signature/,
    ],
    [
      'a token of this server',
      await exchange((await readFile(server.adminTokenFile, 'utf8')).trim()),
      401,
      /wrong issuer/,
    ],
    ['no token', await exchange(''), 400, /need subject_token/],
    ['another grant', await exchange('x', { grant_type: 'client_credentials' }), 400, /need grant_type/],
    ['another kind', await exchange('x', { subject_token_type: 'saml2' }), 400, /need subject_token_type/],
    ['too long', await exchange('x'.repeat(70_000)), 413, /too large/],
  ]
  for (const [what, { status, body }, wanted, words] of refused) {
    assert.equal(status, wanted, `${what}: ${JSON.stringify(body)}`)
    assert.match(JSON.stringify(body), words, what)
    assert.equal(body['access_token'], undefined, what)
  }
})

test('deployctl publishes with the identity that the platform gives its jobs, and never shows it', async (t) => {
  const { issuer, server, directory } = await setUp(t)
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, 1000)
  const asked: { audience: string | null; authorization: string | undefined }[] = []
  const github = createServer((request, response) => {
    const url = new URL(request.url ?? '/', 'http://github')
    asked.push({ audience: url.searchParams.get('audience'), authorization: request.headers.authorization })
    response.end(
      JSON.stringify({ value: issuer.token({ ...claims, aud: url.searchParams.get('audience') }) }),
    )
  }).listen(0, '127.0.0.1')
  t.after(() => github.close())
  await once(github, 'listening')
  const file = join(directory, 'projected-token')
  await writeFile(file, issuer.token(claims), { mode: 0o600 })
  const none = { DEPLOYCTL_TOKEN_FILE: '', DEPLOYCTL_TOKEN: '' }
  const gitHub = {
    ACTIONS_ID_TOKEN_REQUEST_URL: `http://127.0.0.1:${(github.address() as AddressInfo).port}/token?api-version=2.0`,
    ACTIONS_ID_TOKEN_REQUEST_TOKEN: 'runner-secret',
    DEPLOYCTL_ID_TOKEN_AUDIENCE: 'rackswarm',
  }
  const ways: [name: string, args: string[], env: Record<string, string>][] = [
    ['GitHub', [], gitHub],
    ['GitLab', [], { DEPLOYCTL_ID_TOKEN: issuer.token(claims) }],
    ['Kubernetes', ['--id-token-file', file], { DEPLOYCTL_TOKEN: 'not this one' }],
  ]
  for (const [name, args, env] of ways) {
    const { code, stdout, stderr } = await deployctl(
      server,
      [...args, 'publish', build, `web:${name.toLowerCase()}`, '--debug'],
      { env: { ...none, ...env } },
    )
    assert.equal(code, 0, `${name}: ${stderr}`)
    assert.ok(!/eyJ|runner-secret/.test(stdout + stderr), name)
  }
  assert.deepEqual(asked, [{ audience: 'rackswarm', authorization: 'Bearer runner-secret' }])
  const denied = await deployctl(server, ['publish', build, 'db:1'], {
    env: { ...none, DEPLOYCTL_ID_TOKEN: issuer.token(claims) },
  })
  assert.equal(denied.code, 4, denied.stderr)
  const wrong = await deployctl(server, ['list'], { env: { ...none, DEPLOYCTL_ID_TOKEN: issuer.token() } })
  assert.deepEqual([wrong.code, /no entry of registry\.trust fits/.test(wrong.stderr)], [4, true])
  const audit = await deployctlOk(server, ['audit', '--json'])
  const lines = audit
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as { action: string; details?: { sub?: string; claims?: object } })
  const exchanges = lines.filter(({ action }) => action === 'token.exchange')
  assert.equal(exchanges.length, 4)
  assert.deepEqual(exchanges[0]?.details?.claims, claims)
  assert.ok(!audit.includes('eyJ'))
})

test('login --oidc stores the short token, and says what a job without an identity lacks', async (t) => {
  const { issuer, server, directory } = await setUp(t)
  const home = { XDG_CONFIG_HOME: join(directory, 'home'), DEPLOYCTL_TOKEN_FILE: '', DEPLOYCTL_SERVER: '' }
  const login = await deployctl(server, ['login', '--oidc', server.publicUrl], {
    env: { ...home, DEPLOYCTL_ID_TOKEN: issuer.token(claims) },
  })
  assert.equal(login.code, 0, login.stderr)
  assert.match(login.stderr, /as main\+any-branch \(publish:web, pull:\*\)/)
  const stored = join(directory, 'home', 'deployctl', 'credentials.json')
  assert.equal((await stat(stored)).mode & 0o777, 0o600)
  assert.equal((await deployctl(server, ['list'], { env: home })).code, 0)
  const without = await deployctl(server, ['login', '--oidc', server.publicUrl], { env: home })
  assert.deepEqual([without.code, /id-token: write/.test(without.stderr)], [4, true])
})

test('while an issuer is down a server starts, and says so to who asks', async (t) => {
  const issuer = await startIssuer(t)
  issuer.state.isDown = true
  const { exchange } = await setUp(t, issuer)
  const { status, body } = await exchange(issuer.token(claims))
  assert.equal(status, 503)
  assert.match(JSON.stringify(body), /ISSUER_UNAVAILABLE.*503/)
})

test('an entry that trusts too much, or cannot be, is an error of the configuration', async (t) => {
  const github = 'https://token.actions.githubusercontent.com'
  const entry = (more: string) =>
    `registry: { trust: [{ name: a, issuer: '${github}', grants: ['publish:web'], ${more} }] }\n`
  for (const [more, words] of [
    ['claims: {}', /need at least one/],
    [`claims: { sub: 'repo:a/b:ref:refs/heads/main' }`, /need repository_id/],
    [`claims: { repository_id: { prefix: '1' } }`, /need repository_id/],
    ['claims: { repository_id: 123 }', /put numbers in quotes/],
    [`claims: { repository_id: '1' }, ttl: 2h`, /need 1m to 1h/],
    [`claims: { repository_id: '1' }, jwks_url: 'https://a/b', jwks_file: c`, /leave one of them out/],
    [`claims: { repository_id: '1' }, algorithms: [none]`, /no such setting/],
  ] as const) {
    const { code, stderr } = await checkConfig(t, entry(more))
    assert.notEqual(code, 0, more)
    assert.match(stderr, words, more)
  }
})

async function setUp(t: TestContext, given?: Awaited<ReturnType<typeof startIssuer>>) {
  const issuer = given ?? (await startIssuer(t))
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-exchange-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const settings = `registry:
  trust:
    - name: main
      issuer: ${issuer.url}
      audience: rackswarm
      claims: { repository_id: '123', ref: [refs/heads/main, refs/heads/trunk] }
      grants: ['publish:web']
      ttl: 5m
    - name: any-branch
      issuer: ${issuer.url}
      audience: rackswarm
      claims: { repository_id: '123', ref: { glob: 'refs/heads/**' } }
      grants: ['pull:*']
`
  const server: FleetServer = await startFleetServer(directory, { settings })
  t.after(() => server[Symbol.asyncDispose]())
  const exchange = async (token: string, fields: Record<string, string> = {}) => {
    const response = await fetch(`${server.publicUrl}/api/v1/token-exchange`, {
      method: 'POST',
      body: new URLSearchParams({
        grant_type: 'urn:ietf:params:oauth:grant-type:token-exchange',
        subject_token_type: 'urn:ietf:params:oauth:token-type:jwt',
        subject_token: token,
        ...fields,
      }),
    })
    return { status: response.status, body: (await response.json()) as Record<string, unknown> }
  }
  const call = async (path: string, token: string) =>
    fetch(`${server.publicUrl}${path}`, { headers: { authorization: `Bearer ${token}` } })
  return { issuer, server, directory, exchange, call }
}
