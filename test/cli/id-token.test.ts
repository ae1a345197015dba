import assert from 'node:assert/strict'
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { Readable } from 'node:stream'
import { createContext } from '../../cli/context.ts'
import { createOutput } from '../../cli/output.ts'
import { until } from '../support/until.ts'

test('a token that was exchanged is exchanged again before it ends, and what is called then has the new one', async (t) => {
  const { url, exchanged, bearers } = await startServer(t)
  await using connection = await contextOf({
    DEPLOYCTL_SERVER: url,
    DEPLOYCTL_ID_TOKEN: 'id-token',
  }).connect()
  await connection.api.listTokens()
  await until('a second exchange', () => exchanged.length >= 2)
  await until('the new token is used', async () => {
    await connection.api.listTokens()
    return bearers.at(-1) !== 'Bearer token-1'
  })
  assert.deepEqual(new Set(exchanged), new Set(['id-token']))
  assert.equal(bearers[0], 'Bearer token-1')
})

test('a token that was given is used, whatever identity the platform gives', async (t) => {
  const { url, exchanged, bearers } = await startServer(t)
  const env = { DEPLOYCTL_SERVER: url, DEPLOYCTL_ID_TOKEN: 'id-token', DEPLOYCTL_TOKEN: 'given' }
  await using connection = await contextOf(env).connect()
  await connection.api.listTokens()
  assert.deepEqual([exchanged, bearers], [[], ['Bearer given']])
})

test('a file with an ID token wins over variables, needs a server, and excludes a file with a token', async (t) => {
  const { url } = await startServer(t)
  const file = { idTokenFile: '/not/there' }
  await assert.rejects(
    contextOf({ DEPLOYCTL_SERVER: url, DEPLOYCTL_TOKEN: 'x' }, file).connect(),
    /Cannot read ID token file/,
  )
  await assert.rejects(contextOf({}, file).connect(), /Cannot tell which server is meant/)
  await assert.rejects(
    contextOf({ DEPLOYCTL_SERVER: url }, { ...file, tokenFile: '/x' }).connect(),
    /leave one of them out/,
  )
})

/** Exchanges whatever it is given for tokens that live two seconds, and lists no tokens. */
async function startServer(t: TestContext) {
  const exchanged: (string | null)[] = []
  const bearers: (string | undefined)[] = []
  const server = createServer((request, response) => {
    let body = ''
    request.on('data', (part: Buffer) => (body += part.toString()))
    request.once('end', () => {
      if (request.url !== '/api/v1/token-exchange') {
        bearers.push(request.headers.authorization)
        response.end('{"tokens":[]}')
        return
      }
      assert.equal(request.headers.authorization, undefined)
      exchanged.push(new URLSearchParams(body).get('subject_token'))
      response.end(
        JSON.stringify({
          access_token: `token-${exchanged.length}`,
          issued_token_type: 'urn:ietf:params:oauth:token-type:access_token',
          token_type: 'Bearer',
          expires_in: 2,
          scope: 'admin',
        }),
      )
    })
  }).listen(0, '127.0.0.1')
  t.after(() => {
    server.closeAllConnections()
    server.close()
  })
  await once(server, 'listening')
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, exchanged, bearers }
}

function contextOf(env: NodeJS.ProcessEnv, options: { idTokenFile?: string; tokenFile?: string } = {}) {
  const sink = { write: () => true }
  const own = { ...env, XDG_CONFIG_HOME: '/not/there', XDG_STATE_HOME: '/not/there' }
  const out = createOutput({ stdout: sink, stderr: sink, env: own, json: false, quiet: true, colour: false })
  const base = {
    out,
    env: own,
    now: Date.now,
    signal: new AbortController().signal,
    stdin: Readable.from([]),
  }
  return createContext(base, options)
}
