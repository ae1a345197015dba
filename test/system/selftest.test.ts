import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFile, writeFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { test } from 'node:test'
import { createAuthority } from '../support/certificates.ts'
import { bin } from '../support/fleet.ts'
import { freePort } from '../support/foreign.ts'
import { first, startTracker, temporaryDirectory } from '../support/tracker.ts'

const paired = /two peers found each other, the first as/

test('selftest: every frontend of a server with a registry is asked, with a token it gets itself, and nothing stays', async (t) => {
  const directory = await temporaryDirectory(t)
  const { cert, key } = createAuthority('Acme').issue('tracker.example.com')
  await writeFile(join(directory, 'cert.pem'), cert)
  await writeFile(join(directory, 'key.pem'), key)
  const [main, plain, tls, udp] = await ports(4)
  const server = await startTracker(
    t,
    `http:
  addr: 127.0.0.1:${main}
  tracker_addr: 127.0.0.1:${plain}
  tls_addr: 127.0.0.1:${tls}
  tls: { cert: ${directory}/cert.pem, key: ${directory}/key.pem }
  proxy_protocol: true
  trusted_proxies: [127.0.0.0/8]
  announce_routes: ['/t/:name/announce', /announce]
udp: { addr: ['0.0.0.0:${udp}', '[::1]:${udp}'], insecure_plaintext: true }
public_url: https://tracker.example.com:${main}
`,
    { directory, roles: '[tracker, registry]' },
  )
  const { code, stdout, stderr } = await selftest('--config', configOf(directory))
  assert.equal(code, 0, stdout + stderr)
  assert.deepEqual(
    stdout
      .trim()
      .split('\n')
      .map((line) => line.split(/ +/).slice(0, 2).join(' ')),
    [
      `ok https://127.0.0.1:${main}/t/selftest/announce`,
      `ok http://127.0.0.1:${plain}/t/selftest/announce`,
      `ok https://127.0.0.1:${tls}/t/selftest/announce`,
      `ok udp://127.0.0.1:${udp}`,
      `ok udp://[::1]:${udp}`,
    ],
  )
  for (const line of stdout.trim().split('\n')) assert.match(line, paired)
  const { swarms, leechers } = await server.stats()
  assert.deepEqual({ swarms, leechers }, { swarms: 0, leechers: 0 })
  const admin = (await readFile(join(directory, 'data', 'admin-token'), 'utf8')).trim()
  const json = await selftest('--config', configOf(directory), '--json')
  const { ok, findings } = JSON.parse(json.stdout) as { ok: boolean; findings: { verdict: string }[] }
  assert.deepEqual(
    { ok, verdicts: findings.map(({ verdict }) => verdict) },
    { ok: true, verdicts: Array(5).fill('ok') },
  )
  for (const text of [stdout, stderr, json.stdout, await server.log()]) {
    assert.ok(!text.includes(admin))
    assert.doesNotMatch(text, /eyJ/)
  }
})

test('selftest: without a token it says that the right refusal is all it could check; with one of either kind it checks all', async (t) => {
  const directory = await temporaryDirectory(t)
  const port = await freePort()
  const server = await startTracker(
    t,
    `http: { addr: 127.0.0.1:${port} }
public_url: http://127.0.0.1:${port}
`,
    { directory, roles: '[tracker, registry]' },
  )
  const { url, urls } = urlsOf(server)
  const stranger = await selftest(...urls)
  assert.equal(stranger.code, 0)
  assert.match(
    stranger.stdout,
    /^partial .*refused without a token, as it should be; without one, this is all/,
  )
  assert.match(stranger.stdout, /--token FILE/)
  const admin = join(directory, 'data', 'admin-token')
  const asAdmin = await selftest(...urls, '--token', admin)
  assert.equal(asAdmin.code, 0, asAdmin.stdout)
  assert.equal(asAdmin.stdout.match(new RegExp(paired, 'g'))?.length, 2)

  const infohash = 'ab'.repeat(20)
  const made = await fetch(`${url}/api/v1/announce-tokens`, {
    method: 'POST',
    headers: {
      authorization: `Bearer ${(await readFile(admin, 'utf8')).trim()}`,
      'content-type': 'application/json',
    },
    body: JSON.stringify({ infohash }),
  })
  const { token } = (await made.json()) as { token: string }
  await writeFile(join(directory, 'token'), token)
  const announcing = await selftest(...urls, '--token', join(directory, 'token'))
  assert.equal(announcing.code, 0, announcing.stdout)
  assert.equal(announcing.stdout.match(new RegExp(paired, 'g'))?.length, 2)
  assert.ok(!announcing.stdout.includes(token))

  const tampered = `${token.slice(0, -8)}AAAAAAAA`
  await writeFile(join(directory, 'tampered'), tampered)
  const refused = await selftest(...urls, '--token', join(directory, 'tampered'))
  assert.equal(refused.code, 1)
  assert.match(
    refused.stdout,
    /^fail .*refused: "unapproved request: invalid jwt"\n +The token does not suit/,
  )
  const missing = await selftest(...urls, '--token', join(directory, 'not-there'))
  assert.equal(missing.code, 1)
  assert.match(missing.stderr, /not-there/)
  assert.equal((await server.stats()).leechers, 0)
})

test('selftest: a server that is not there, or has another configuration, is said to be so', async (t) => {
  const directory = await temporaryDirectory(t)
  const port = await freePort()
  await startTracker(t, `http: { addr: 127.0.0.1:${port} }\ntracker: { approval: none }\n`, { directory })
  const config = join(directory, 'other.yaml')
  const other = async (text: string) => {
    await writeFile(config, `roles: [tracker]\ndata_dir: ${directory}/data\n${text}`)
    return selftest('--config', config, '--timeout', '300ms')
  }
  const open = await other(
    `http: { addr: 127.0.0.1:${port} }\nudp: { addr: [] }\ntokens: { keys_file: ${directory}/keys }\n`,
  )
  assert.equal(open.code, 1)
  assert.match(open.stdout, /fail .*an announce without a token was accepted, and tracker\.approval is token/)

  const [nobody] = await ports(1)
  const down = await other(`http: { addr: 127.0.0.1:${nobody} }\ntracker: { approval: none }\n`)
  assert.equal(down.code, 1)
  assert.match(
    down.stdout,
    /^fail +http:\S+ +nothing listens there \(connection refused\)\n +Is the server running\?/,
  )
  assert.match(down.stdout, /fail +udp:.*nothing listens there/)

  const unknown = await other('http: { addr: 127.0.0.1:0 }\ntracker: { approval: none }\n')
  assert.equal(unknown.code, 1)
  assert.match(unknown.stdout, /its port is chosen when the server starts\n.*--http URL/)
  assert.match(unknown.stdout, /its port is chosen when the server starts\n.*--udp URL/)
  const routes = await other(
    `http: { addr: 127.0.0.1:${port}, announce_routes: [/other] }\nudp: { addr: [] }\ntracker: { approval: none }\n`,
  )
  assert.match(routes.stdout, /HTTP status 404\n.*http\.announce_routes/)
  await writeFile(config, 'roles: [registry]\n')
  const registry = await selftest('--config', config)
  assert.equal(registry.code, 1)
  assert.match(registry.stdout, /it has no frontend of a tracker/)
})

test('selftest: a tracker that hands out nobody, somebody else, or nothing in time fails', async (t) => {
  const state = { reply: 'd8:completei0e10:incompletei1e8:intervali60e5:peers0:e' }
  const fake = createServer((_request, response) => {
    if (state.reply !== '') response.end(Buffer.from(state.reply, 'latin1'))
  })
  t.after(() => fake.close())
  fake.listen(0, '127.0.0.1')
  await once(fake, 'listening')
  const url = `http://127.0.0.1:${(fake.address() as AddressInfo).port}`
  const nobody = await selftest('--http', url)
  assert.equal(nobody.code, 1)
  assert.match(nobody.stdout, /the second was told of 0 \(\), and that 1 are there/)
  state.reply = 'd8:completei0e10:incompletei2e8:intervali60e5:peers6:\x7f\0\0\x01\0\x09e'
  const other = await selftest('--http', url)
  assert.equal(other.code, 1)
  assert.match(other.stdout, /told of 1 \(127\.0\.0\.1:9\)/)
  state.reply = 'nonsense'
  assert.equal((await selftest('--http', url)).code, 1)
  state.reply = ''
  const late = await selftest('--http', url, '--timeout', '200ms')
  assert.equal(late.code, 1)
  assert.match(late.stdout, /no answer within 0\.2 s/)
  fake.closeAllConnections()
})

test('selftest: certificates are looked at, and shown where they are asked for', async (t) => {
  const directory = await temporaryDirectory(t)
  const [authority, clients] = [createAuthority('Acme'), createAuthority('Clients')]
  const pem = async (name: string, bytes: Buffer) => {
    await writeFile(join(directory, name), bytes)
    return join(directory, name)
  }
  const server = authority.issue('tracker')
  const client = clients.issue('agent')
  const [cert, key, ca] = [
    await pem('cert.pem', server.cert),
    await pem('key.pem', server.key),
    await pem('ca.pem', authority.cert),
  ]
  const own = [
    '--cert',
    await pem('client.pem', client.cert),
    '--key',
    await pem('client-key.pem', client.key),
  ]
  const clientCa = await pem('clients.pem', clients.cert)
  const { http } = await startTracker(
    t,
    `http: { addr: 127.0.0.1:0, tls: { cert: ${cert}, key: ${key}, client_ca: ${clientCa}, client_certificates: required } }
tracker: { approval: none }
`,
  )
  const url = `https://127.0.0.1:${first(http).port}/announce`
  const ask = async (...args: string[]) => selftest('--http', url, ...args)
  const unknown = await ask(...own)
  assert.equal(unknown.code, 1)
  assert.match(
    unknown.stdout,
    /certificate.*\n +If the certificate is right, name its authority with --ca FILE/,
  )
  const trusted = await ask(...own, '--ca', ca)
  assert.equal(trusted.code, 0, trusted.stdout)
  assert.equal((await ask(...own, '--insecure')).code, 0)
  const nobody = await ask('--ca', ca)
  assert.equal(nobody.code, 1)
  assert.match(nobody.stdout, /It wants the certificate of a client: --cert FILE --key FILE/)
})

test('selftest: what a hook refuses, as configured, is no fault', async (t) => {
  const directory = await temporaryDirectory(t)
  const port = await freePort()
  await startTracker(
    t,
    `http: { addr: 127.0.0.1:${port} }
udp: { addr: 127.0.0.1:${port} }
tracker: { approval: none }
prehooks: [{ name: torrent approval, options: { whitelist: ['${'ab'.repeat(20)}'] } }]
`,
    { directory },
  )
  const { code, stdout } = await selftest('--config', configOf(directory))
  assert.equal(code, 0, stdout)
  assert.equal(stdout.match(/^partial .*refused by the hook "torrent approval", as configured/gm)?.length, 2)
})

test('selftest: wrong arguments and configurations have their exit codes', async (t) => {
  const directory = await temporaryDirectory(t)
  const bad = join(directory, 'bad.yaml')
  await writeFile(bad, 'tracker:\n  aproval: none\n')
  const config = await selftest('--config', bad)
  assert.equal(config.code, 78)
  assert.match(config.stderr, /bad\.yaml:2:3 tracker\.aproval: there is no such setting/)
  for (const args of [
    ['--http', 'udp://x:1'],
    ['--udp', 'udp://x'],
    ['--timeout', 'soon'],
    ['--cert', 'x'],
    ['--what'],
  ]) {
    const { code, stderr } = await selftest(...args)
    assert.equal(code, 2, args.join(' '))
    assert.match(stderr, /^rackswarm-server selftest: .*\nUsage: /)
  }
  const help = await selftest('--help')
  assert.equal(help.code, 0)
  assert.match(help.stdout, /^Usage: rackswarm-server selftest/)
})

async function selftest(...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  const child = spawn(process.execPath, [bin('rackswarm-server'), 'selftest', ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  const output = { stdout: '', stderr: '' }
  child.stdout.on('data', (chunk: Buffer) => (output.stdout += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => (output.stderr += chunk.toString()))
  const [code] = (await once(child, 'close')) as [number]
  return { code, ...output }
}

function configOf(directory: string): string {
  return join(directory, 'server.yaml')
}

function urlsOf({ publicUrl, udp }: Awaited<ReturnType<typeof startTracker>>): {
  url: string
  urls: string[]
} {
  const { host, port } = first(udp)
  return { url: publicUrl, urls: ['--http', publicUrl, '--udp', `udp://${host}:${port}`] }
}

async function ports(count: number): Promise<number[]> {
  return Promise.all(Array.from({ length: count }, async () => freePort()))
}
