import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { chmod, mkdir, mkdtemp, readFile, rename, rm, stat, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { silentLog } from '../../../lib/runtime/log.ts'
import type { KeySetSource } from '../../../lib/token/key-set.ts'
import { openKeySet } from '../../../lib/token/key-set.ts'
import { refreshWaitMs } from '../../../lib/token/key-set-url.ts'
import type { Answer } from '../../support/key-server.ts'
import { body, keys, makeTestKey, startKeyServer } from '../../support/key-server.ts'
import { until } from '../../support/until.ts'

const [a, b] = [makeTestKey('a'), makeTestKey('b', 'Ed25519')]

test('a key set is fetched from a URL, and again at intervals', async (t) => {
  const { set, state } = await fromServer(t, keys(a), { refreshIntervalMs: 20 })
  assert.deepEqual([...set.keys.keys()], ['a'])
  const known = set.keys.get('a')
  state.answer = keys(a, b)
  await until('the second key is known', () => set.keys.size === 2)
  assert.equal(set.keys.get('a'), known, 'a key that stays is the same object')
  state.answer = keys(b)
  await until('the first key is gone', () => set.keys.size === 1)
  assert.deepEqual([...set.keys.keys()], ['b'])
})

test('whatever a URL answers, the last good set stays in force, and its status says why', async (t) => {
  const { set, state, clock } = await fromServer(t, keys(a))
  const elsewhere = await startKeyServer(t, keys(b))
  const bad: readonly (readonly [string, Answer, RegExp])[] = [
    ['500', body('{"keys": []}', 500), /it answered 500/],
    ['404', body('', 404), /it answered 404/],
    ['HTML', body('<!doctype html><p>Welcome'), /it is not JSON/],
    ['no keys', body('{"keys": []}'), /no ES256, Ed25519 or RS256 key/],
    ['no set', body('[]'), /need \{"keys"/],
    ['null', body('null'), /need \{"keys"/],
    ['foreign keys', body('{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}'), /no ES256/],
    ['too many keys', body(JSON.stringify({ keys: Array(1001).fill(a.jwk) })), /1001 keys, at most 1000/],
    ['too long', body(`{"keys": [${' '.repeat(1024 * 1024)}]}`), /more than 1048576 bytes/],
    [
      'cut off',
      (_, response) => response.writeHead(200, { 'content-length': 10 }).write('{', () => response.destroy()),
      /.+/,
    ],
    ['no answer', (request) => request.socket.destroy(), /.+/],
    ['another host', redirect(elsewhere.url.replace('127.0.0.1', 'localhost')), /another host, localhost/],
    ['nowhere', (_, response) => response.writeHead(302).end(), /redirects to nowhere|redirects/],
    ['a circle', redirect('/keys'), /more than 3 redirects/],
    ['a file', redirect('file:///etc/passwd'), /redirects/],
    ['unasked 304', body('', 304), /it answered 304/],
  ]
  for (const [name, answer, why] of bad) {
    state.answer = answer
    clock.now += 1000
    await assert.rejects(set.reload(), (error: Error) => why.test(error.message), name)
    assert.match(set.status().lastError ?? '', why, name)
    assert.deepEqual([...set.keys.keys()], ['a'], name)
  }
  assert.equal(elsewhere.state.requests, 0)
  assert.equal(set.status().ageSeconds, bad.length)
  state.answer = keys(a)
  await set.reload()
  assert.deepEqual(set.status(), { keys: 1, ageSeconds: 0, lastError: undefined })
})

test('a fetch ends with its time, head or body', async (t) => {
  const { set, state } = await fromServer(t, keys(a), { timeoutMs: 50 })
  state.answer = () => undefined
  await assert.rejects(set.reload(), /127\.0\.0\.1.*no answer within 50 ms/)
  state.answer = (_, response) => void response.writeHead(200).write('{"keys": [')
  await assert.rejects(set.reload(), /no answer within 50 ms/)
})

test('a set that is closed while it is fetched does not wait for the end of that', async (t) => {
  const { set, state } = await fromServer(t, keys(a), { timeoutMs: 60_000 })
  state.answer = () => undefined
  const outcome = assert.rejects(set.reload(), /closed/)
  await set[Symbol.asyncDispose]()
  await outcome
})

test('a redirect on the same host is followed', async (t) => {
  const { set, state } = await fromServer(t, (request, response) => {
    if (request.url === '/keys') redirect('/moved')(request, response)
    else keys(b)(request, response)
  })
  assert.deepEqual([...set.keys.keys()], ['b'])
  assert.equal(state.requests, 2)
})

test('a set that has not changed is not sent again, and is as good as new', async (t) => {
  let unchanged = 0
  const { set, clock, state } = await fromServer(t, (request, response) => {
    response.setHeader('etag', '"1"')
    if (request.headers['if-none-match'] !== '"1"') return keys(a)(request, response)
    unchanged++
    response.writeHead(304).end()
  })
  const before = set.keys
  clock.now += 60_000
  assert.equal(set.status().ageSeconds, 60)
  await set.reload()
  assert.deepEqual([unchanged, set.status().ageSeconds, set.keys], [1, 0, before])
  // The tag of a set that could not be used must not be taken for that of the good one.
  state.answer = (_, response) => response.setHeader('etag', '"2"').end('{"keys": []}')
  await assert.rejects(set.reload(), /no ES256/)
  state.answer = (request, response) => {
    assert.equal(request.headers['if-none-match'], '"1"')
    keys(b)(request, response)
  }
  await set.reload()
  assert.deepEqual([...set.keys.keys()], ['b'])
})

test('max-age moves the next fetch, within bounds', () => {
  const wait = (maxAgeSeconds: number | undefined, intervalMs = 300_000) =>
    refreshWaitMs({ maxAgeSeconds }, intervalMs)
  assert.deepEqual(
    [wait(undefined), wait(0), wait(60), wait(600), wait(86_400)],
    [300_000, 30_000, 60_000, 600_000, 900_000],
  )
  assert.deepEqual([wait(0, 5000), wait(86_400, 3_600_000)], [5000, 3_600_000])
})

test('a key that cannot be used is passed over alone', async (t) => {
  const spoilt = [
    { kty: 'EC', crv: 'P-256', x: 'AAAA', y: 'AAAA', kid: 'off the curve' },
    { kty: 'EC', crv: 'P-256', kid: 'without a point' },
    { kty: 'RSA', n: 'AQAB', e: 'AQAB', kid: 'short' },
    { kty: 'oct', k: 'c2VjcmV0', kid: 'a secret' },
    { ...makeTestKey('x').jwk, kid: 'for encryption', use: 'enc' },
    { ...makeTestKey('x').jwk, kid: 'for another algorithm', alg: 'ES384' },
  ]
  const text = JSON.stringify({ keys: [null, 7, 'x', [], ...spoilt, a.jwk, b.jwk] })
  const { set } = await fromServer(t, body(text))
  assert.deepEqual([...set.keys.keys()], ['a', 'b'])
})

test('a URL that is down at the start does not keep the set from opening, and is tried again', async (t) => {
  const reserved = await startKeyServer(t, keys(a))
  await reserved.stop()
  const { set } = await open(t, { url: reserved.url })
  assert.equal(set.status().keys, 0)
  assert.equal(set.status().ageSeconds, undefined)
  assert.match(set.status().lastError ?? '', /ECONNREFUSED/)
  await startKeyServer(t, keys(a), { port: reserved.port })
  await until('the keys came', () => set.keys.size === 1)
  assert.equal(set.status().lastError, undefined)
})

test('an unknown key is looked for once in ten seconds, for all that ask', async (t) => {
  const { set, state, clock } = await fromServer(t, keys(a))
  assert.equal(state.requests, 1)
  state.answer = keys(a, b)
  const looks = Array.from({ length: 100 }, () => set.lookAgain?.())
  assert.ok(looks.every((look) => look === looks[0] && look !== undefined))
  await looks[0]
  assert.deepEqual([state.requests, set.keys.size], [2, 2])
  assert.equal(set.lookAgain?.(), undefined)
  clock.now += 9999
  assert.equal(set.lookAgain?.(), undefined)
  clock.now += 1
  state.answer = body('', 500)
  await set.lookAgain?.()
  assert.deepEqual([state.requests, set.keys.size], [3, 2], 'a look that fails does not reject')
})

test('a restart while the URL is down goes on with the set that was saved', async (t) => {
  const cacheFile = join(await makeDirectory(t), 'keys.json')
  const { set, url, stop, clock } = await fromServer(t, keys(a, b), { cacheFile })
  assert.equal((await stat(cacheFile)).mode & 0o777, 0o600)
  await set[Symbol.asyncDispose]()
  await stop()
  const again = await open(t, { url, cacheFile }, clock.now + 5000)
  assert.deepEqual([...again.set.keys.keys()], ['a', 'b'])
  assert.equal(again.set.keys.get('b')?.thumbprint, set.keys.get('b')?.thumbprint)
  assert.equal(again.set.status().ageSeconds, 5, 'its age is that of the fetch')
  await until('why the URL was not read', () => /ECONNREFUSED/.test(again.set.status().lastError ?? ''))
  const other = await open(t, { url: `${url}/other`, cacheFile })
  assert.equal(other.set.keys.size, 0, 'another URL is another set')
  await chmod(cacheFile, 0o620)
  assert.equal((await open(t, { url, cacheFile })).set.keys.size, 0, 'anyone could have written it')
  await chmod(cacheFile, 0o600)
  await writeFile(cacheFile, '{')
  assert.equal((await open(t, { url, cacheFile })).set.keys.size, 0)
})

test('a set comes by HTTPS from a server whose authority is known, and from no other', async (t) => {
  const directory = await makeDirectory(t)
  const [cert, key] = [join(directory, 'cert.pem'), join(directory, 'key.pem')]
  const request = `req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -keyout ${key} -out ${cert}`
  execFileSync('openssl', request.split(' '), { stdio: 'pipe' })
  const tls = { cert: await readFile(cert, 'utf8'), key: await readFile(key, 'utf8') }
  const { url } = await startKeyServer(t, keys(a), { tls })
  assert.deepEqual([...(await open(t, { url, ca: tls.cert })).set.keys.keys()], ['a'])
  const { set } = await open(t, { url })
  assert.equal(set.keys.size, 0)
  assert.match(set.status().lastError ?? '', /certificate/)
})

test('what is no URL is refused at once, without being shown', async () => {
  for (const url of ['keys.json', 'ftp://host/keys', 'file:///etc/passwd', ''])
    await assert.rejects(openKeySet({ url }, deps()), /need https:\/\/HOST\/PATH/)
})

test('messages name the URL without what may be a secret', async (t) => {
  const { port } = await startKeyServer(t, body('', 503))
  const { set } = await open(t, { url: `http://user:secret@127.0.0.1:${port}/keys?key=secret` })
  await assert.rejects(set.reload(), (error: Error) => {
    assert.equal(error.message, `Cannot fetch key set http://127.0.0.1:${port}/keys: it answered 503`)
    return true
  })
})

test('a file is read again when it changes; bad content changes nothing', async (t) => {
  const file = join(await makeDirectory(t), 'jwks.json')
  const write = async (text: string) => {
    await writeFile(`${file}.new`, text)
    await rename(`${file}.new`, file)
  }
  await writeFile(file, JSON.stringify({ keys: [a.jwk] }))
  const { set } = await open(t, { file })
  assert.deepEqual([...set.keys.keys()], ['a'])
  await write(JSON.stringify({ keys: [a.jwk, b.jwk] }))
  await until('the second key is known', () => set.keys.size === 2)
  await write('{"keys": [')
  await until('the change was seen', () => set.status().lastError !== undefined)
  assert.equal(set.keys.size, 2)
  await assert.rejects(set.reload(), /Cannot read key set .*jwks\.json: /)
  await write(JSON.stringify({ keys: [b.jwk] }))
  await until('the good content is in force', () => set.keys.size === 1)
  assert.equal(set.status().lastError, undefined)
  await rm(file)
  await until('the loss was seen', () => set.status().lastError !== undefined)
  assert.deepEqual([...set.keys.keys()], ['b'])
})

test('a mounted file, which is a link into a directory that is replaced, is read again too', async (t) => {
  const directory = await makeDirectory(t)
  for (const [name, key] of [
    ['1', a],
    ['2', b],
  ] as const) {
    await mkdir(join(directory, name))
    await writeFile(join(directory, name, 'jwks.json'), JSON.stringify({ keys: [key.jwk] }))
  }
  await symlink('1', join(directory, '..data'))
  await symlink('..data/jwks.json', join(directory, 'jwks.json'))
  const { set } = await open(t, { file: join(directory, 'jwks.json') })
  assert.deepEqual([...set.keys.keys()], ['a'])
  await symlink('2', join(directory, '..new'))
  await rename(join(directory, '..new'), join(directory, '..data'))
  await until('the new content is in force', () => set.keys.has('b'))
})

test('a file that holds no key set is an error at the start', async (t) => {
  const file = join(await makeDirectory(t), 'jwks.json')
  await assert.rejects(openKeySet({ file }, deps()), /Cannot read key set .*ENOENT/)
  await writeFile(file, '{"keys": []}')
  await assert.rejects(openKeySet({ file }, deps()), /ES256, Ed25519 or RS256/)
  await writeFile(file, ' '.repeat(1024 * 1024 + 1))
  await assert.rejects(openKeySet({ file }, deps()), /at most 1048576/)
})

test('private parts that were published by mistake are not kept', async (t) => {
  const cacheFile = join(await makeDirectory(t), 'keys.json')
  const secret = { jwk: { ...a.privateKey.export({ format: 'jwk' }), kid: 'a' } }
  const { set } = await fromServer(t, keys(secret), { cacheFile })
  assert.equal(set.keys.get('a')?.publicKey.type, 'public')
  assert.ok(!(await readFile(cacheFile, 'utf8')).includes('"d"'))
})

function redirect(location: string): Answer {
  return (_, response) => response.writeHead(302, { location }).end()
}

async function fromServer(
  t: TestContext,
  answer: Answer,
  options: { refreshIntervalMs?: number; timeoutMs?: number; cacheFile?: string } = {},
) {
  const server = await startKeyServer(t, answer)
  return { ...server, ...(await open(t, { url: server.url, ...options })) }
}

async function open(t: TestContext, source: KeySetSource, nowMs = 1_800_000_000_000) {
  const clock = { now: nowMs }
  const set = await openKeySet(source, { ...deps(), now: () => clock.now })
  t.after(() => set[Symbol.asyncDispose]())
  return { set, clock }
}

function deps() {
  return { now: Date.now, random: Math.random, log: silentLog() }
}

async function makeDirectory(t: TestContext) {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-keys-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return directory
}
