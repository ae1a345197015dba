import assert from 'node:assert/strict'
import { X509Certificate } from 'node:crypto'
import { once } from 'node:events'
import { readFile, rename, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import type { TLSSocket } from 'node:tls'
import { connect as connectTls } from 'node:tls'
import { spawn } from 'node:child_process'
import { parseAnnounceReply } from '../../lib/protocol/announce.ts'
import { writeUdpAnnounce } from '../../lib/protocol/udp.ts'
import { parseConfig } from '../../lib/runtime/config.ts'
import { silentLog } from '../../lib/runtime/log.ts'
import { mintOffline } from '../../lib/token/offline.ts'
import { ServerConfig } from '../../server/config.ts'
import { startServer } from '../../server/server.ts'
import type { Pair } from '../support/certificates.ts'
import { createAuthority } from '../support/certificates.ts'
import { bin } from '../support/fleet.ts'
import type { RawClient } from '../support/http-client.ts'
import { rawClient, rawClientOn } from '../support/http-client.ts'
import { makeTestKey } from '../support/key-server.ts'
import type { TrackerProcess } from '../support/tracker.ts'
import {
  announceFields,
  announceQuery,
  first,
  httpGet,
  startTracker,
  temporaryDirectory,
  testHash,
  udpError,
  udpProbe,
} from '../support/tracker.ts'
import { until } from '../support/until.ts'

const open = 'tracker: { approval: none }\n'
const [aa, bb] = [testHash(0xaa), testHash(0xbb)]

test('hooks and lists are exchanged between two requests: no connection is closed, no connection id and no swarm is lost', async (t) => {
  const directory = await temporaryDirectory(t)
  const list = join(directory, 'torrents')
  await writeFile(list, `${aa}\n`)
  const server = await startTracker(t, open, { directory })
  const client = await rawClient(t, first(server.http).port)
  const probe = await udpProbe(t, first(server.udp))
  const connectionId = await probe.connectionId()
  let transactionId = 0
  const overUdp = async (infoHash: typeof aa) =>
    probe.ask(
      writeUdpAnnounce(
        { connectionId, transactionId: ++transactionId },
        announceFields({ infoHash, port: 7002 }),
      ),
    )
  assert.match(await ask(client, announceQuery({ infoHash: bb, port: 7001 })), /10:incompletei1e/)
  assert.equal((await overUdp(bb)).readUInt32BE(0), 1)
  const hooks = (text: string) =>
    reload(server, (before) => `${before.replace(/^prehooks:.*\n/m, '')}prehooks: [${text}]\n`)

  assert.deepEqual(await hooks(`{ name: torrent approval, options: { whitelist_file: ${list} } }`), {
    msg: 'reloaded',
  })
  const refused = 'unapproved torrent'
  assert.match(await ask(client, announceQuery({ infoHash: bb, port: 7001 })), new RegExp(refused))
  assert.equal(udpError(await overUdp(bb)), refused)
  assert.match(await ask(client, announceQuery({ infoHash: aa, port: 7001 })), /10:incompletei1e/)
  const { swarms, leechers } = await server.stats()
  assert.deepEqual({ swarms, leechers }, { swarms: 2, leechers: 3 })

  // The list is read again, too, whether or not somebody has noticed that it changed.
  await writeFile(list, `${aa}\n${bb}\n`)
  await reload(server)
  assert.match(await ask(client, announceQuery({ infoHash: bb, port: 7001 })), /10:incompletei2e/)
  await hooks(`{ name: client approval, options: { blacklist: [RS0001] } }`)
  assert.match(await ask(client, announceQuery({ infoHash: aa, port: 7001 })), /unapproved client/)
  await hooks('')
  assert.match(await ask(client, announceQuery({ infoHash: aa, port: 7001 })), /10:incompletei1e/)
  assert.equal((await overUdp(bb)).readUInt32BE(0), 1)
})

test('a rack that is moved to another row is there at its next announce', async (t) => {
  const rows = (rowOfB: string) => `topology:
  levels: [rack, row]
  places: { a: { parents: [one] }, b: { parents: [${rowOfB}] } }
  prefixes: [{ cidr: 127.0.1.0/24, place: a }, { cidr: 127.0.2.0/24, place: b }]
`
  const server = await startTracker(t, `${open}${rows('one')}`)
  const distances = async (from: string) => {
    const { body } = await httpGet(first(server.http), `/announce?${announceQuery({}, 'rackswarm=1')}`, {
      from,
    })
    return parseAnnounceReply(Buffer.from(body, 'latin1')).peers.map(({ distance }) => distance)
  }
  await distances('127.0.1.1')
  assert.deepEqual(await distances('127.0.2.1'), [1])
  assert.deepEqual(await distances('127.0.1.1'), [1])
  await reload(server, (text) => text.replace(rows('one'), rows('two')))
  assert.equal((await server.stats()).leechers, 2)
  assert.deepEqual(await distances('127.0.2.1'), [2])
  assert.deepEqual(await distances('127.0.1.1'), [2])
  assert.equal((await server.stats()).leechers, 2)
})

test('limits, intervals, routes and trust are exchanged', async (t) => {
  const server = await startTracker(t, `tracker: { approval: none, numwant_max: 100 }\n`)
  const client = await rawClient(t, first(server.http).port)
  for (let port = 1; port <= 5; port++) await ask(client, announceQuery({ port }))
  const peersOf = (body: string) => parseAnnounceReply(Buffer.from(body, 'latin1')).peers.length
  assert.equal(peersOf(await ask(client, announceQuery({ port: 6 }))), 5)
  const last = await reload(server, (text) =>
    text
      .replace('numwant_max: 100', 'numwant_max: 2, scrape_max: 1, trusted_announcers: [127.0.0.0/8]')
      .replace(/^http: .*$/m, 'http: { addr: 127.0.0.1:0, announce_routes: [/a/:key/b], idle_timeout: 1s }')
      .concat('announce_interval: 7s\nmin_announce_interval: 6s\n'),
  )
  assert.deepEqual(last, { msg: 'reloaded' })
  assert.equal((await get(client, `/announce?${announceQuery()}`)).status, 404)
  const { status, body } = await get(client, `/a/k/b?${announceQuery({ port: 7 }, 'ip=10.1.1.1')}`)
  assert.equal(status, 200)
  assert.equal(peersOf(body), 2)
  assert.match(body, /11:external ip4:\x0a\x01\x01\x01/)
  assert.match(body, /8:intervali[67]e12:min intervali6e/)
  const hash = `info_hash=${'%aa'.repeat(20)}`
  assert.match((await get(client, `/scrape?${hash}&${hash}`)).body, /too many infohashes: at most 1/)
  const silent = performance.now()
  await client.ended()
  assert.ok(performance.now() - silent < 10_000, 'the idle timeout of before was a minute')
})

test('a server with a registry takes a new certificate and limits on its main port, and says what it does not take', async (t) => {
  const directory = await temporaryDirectory(t)
  const authority = createAuthority('Acme')
  await install(directory, authority.issue('first'))
  const server = await startTracker(t, `http: { addr: 127.0.0.1:0, tls: { ${tlsOf(directory)} } }\n`, {
    directory,
    roles: '[tracker, registry]',
  })
  const { port } = server.main
  const old = await secured(t, port, authority.cert)
  assert.equal(old.name, 'first')
  const fresh = await install(directory, authority.issue('second'))
  const needRestart = await reload(server, (text) =>
    text.replace('addr: 127.0.0.1:0,', 'addr: 127.0.0.1:0, announce_routes: [/a], connections_max: 100,'),
  )
  assert.deepEqual(needRestart, { msg: 'reloaded', needRestart: ['http.announce_routes'] })
  assert.equal((await get(old.client, `/announce?${announceQuery()}`)).status, 200)
  assert.equal((await secured(t, port, authority.cert)).name, 'second')
  assert.equal(fresh, 'second')
})

test('new connections see the new certificate, those that are there go on; what cannot be used changes nothing', async (t) => {
  const directory = await temporaryDirectory(t)
  const authority = createAuthority('Acme')
  await install(directory, authority.issue('first'))
  const server = await startTracker(
    t,
    `${open}http: { addr: 127.0.0.1:0, tls_addr: 127.0.0.1:0, tls: { main_port: false, ${tlsOf(directory)} } }\n`,
    { directory },
  )
  const port = server.http[1]?.port ?? 0
  const old = await secured(t, port, authority.cert)
  assert.match(await ask(old.client, announceQuery({ port: 1 })), /incompletei1e/)
  await install(directory, authority.issue('second'))
  await reload(server)
  assert.equal((await secured(t, port, authority.cert)).name, 'second')
  assert.match(await ask(old.client, announceQuery({ port: 2 })), /incompletei2e/)

  const third = authority.issue('third')
  await writeFile(join(directory, 'cert.pem'), third.cert)
  for (const [name, spoil, words] of [
    [
      'a key of another certificate',
      undefined,
      /http\.tls: cannot use .*cert\.pem and .*key\.pem: .*key values mismatch/,
    ],
    ['no certificate at all', 'nonsense', /http\.tls: cannot use .*cert\.pem/],
  ] as const) {
    if (spoil !== undefined) await writeFile(join(directory, 'cert.pem'), spoil)
    assert.match(await failedReload(server), words, name)
    assert.equal((await secured(t, port, authority.cert)).name, 'second', name)
  }
  await reload(
    server,
    (text) => text.replace('cert.pem', 'gone.pem'),
    /http\.tls\.cert: cannot read .*gone\.pem: ENOENT/,
  )
  assert.equal((await secured(t, port, authority.cert)).name, 'second')
  await reload(server, (text) => text.replace('gone.pem', 'cert.pem'), /cannot use/)
  await install(directory, third)
  await reload(server)
  assert.equal((await secured(t, port, authority.cert)).name, 'third')
  assert.match(await ask(old.client, announceQuery({ port: 3 })), /incompletei3e/)
})

test('certificate files that change are read again without being asked', async (t) => {
  const directory = await temporaryDirectory(t)
  const authority = createAuthority('Acme')
  await install(directory, authority.issue('first'))
  for (const roles of ['[tracker]', '[tracker, registry]']) {
    await install(directory, authority.issue('first'))
    const yaml = `roles: ${roles}
data_dir: ${join(directory, roles)}
metrics_addr: none
udp: { addr: [] }
http: { addr: 127.0.0.1:0, tls_addr: 127.0.0.1:0, tls: { ${tlsOf(directory)} } }
`
    const tokens = roles === '[tracker]' ? open : ''
    await using server = await startServer(parseConfig(ServerConfig, yaml + tokens, 'server.yaml'), {
      log: silentLog(),
      now: Date.now,
      random: Math.random,
      certificatePollMs: 10,
    })
    const ports = [server.addresses.http, ...server.addresses.tracker].map(({ port }) => port)
    const names = async () =>
      Promise.all(ports.map(async (port) => (await secured(t, port, authority.cert)).name))
    assert.deepEqual(new Set(await names()), new Set(['first']))
    const next = authority.issue('second')
    // The certificate alone does not suit the key that is there: nothing changes until both are new.
    await writeFile(join(directory, 'cert.pem'), next.cert)
    await pause(50)
    assert.deepEqual(new Set(await names()), new Set(['first']))
    await writeFile(join(directory, 'key.pem'), next.key)
    await until('all threads have the second hook', async () =>
      (await names()).every((name) => name === 'second'),
    )
  }
})

test('keys of a file are exchanged without a connection closed; tokens of the old ones are refused from then on', async (t) => {
  const directory = await temporaryDirectory(t)
  const [old, young] = [makeTestKey('old'), makeTestKey('young')]
  const file = join(directory, 'keys.json')
  const publish = async (...keys: readonly { jwk: Record<string, unknown> }[]) => {
    await writeFile(`${file}.new`, JSON.stringify({ keys: keys.map(({ jwk }) => jwk) }))
    await rename(`${file}.new`, file)
  }
  const mint = async ({ kid, privateKey }: typeof old) => {
    const keyFile = join(directory, `${kid}.pem`)
    await writeFile(keyFile, privateKey.export({ type: 'pkcs8', format: 'pem' }), { mode: 0o600 })
    const trust = { issuer: 'https://r.example.com', audience: 'https://t.example.com' }
    const minted = { ...trust, keyFile, kid, infoHash: aa, subject: 'h1', ttlMs: 60_000, now: Date.now }
    return `jwt=${(await mintOffline(minted)).token}`
  }
  await publish(old)
  const server = await startTracker(
    t,
    `tokens: { keys_file: ${file}, issuer: 'https://r.example.com', audience: 'https://t.example.com' }\n`,
    { directory },
  )
  const client = await rawClient(t, first(server.http).port)
  const probe = await udpProbe(t, first(server.udp))
  const connectionId = await probe.connectionId()
  const [oldToken, youngToken] = [await mint(old), await mint(young)]
  const invalid = /unapproved request: invalid jwt/
  assert.match(await ask(client, announceQuery({ port: 1 }, oldToken)), /incompletei1e/)
  assert.match(await ask(client, announceQuery({ port: 2 }, youngToken)), invalid)
  await publish(young)
  await reload(server)
  assert.match(await ask(client, announceQuery({ port: 1 }, oldToken)), invalid)
  assert.match(await ask(client, announceQuery({ port: 2 }, youngToken)), /incompletei2e/)
  const packet = writeUdpAnnounce(
    { connectionId, transactionId: 9 },
    announceFields({ port: 3 }),
    `/announce?${youngToken}`,
  )
  assert.equal((await probe.ask(packet)).readUInt32BE(0), 1)

  await writeFile(file, '{')
  assert.match(await failedReload(server), /Cannot read key set .*keys\.json/)
  assert.match(await ask(client, announceQuery({ port: 2 }, youngToken)), /incompletei3e/)
})

test('what counts only after a restart is named, and what is in force goes on', async (t) => {
  const server = await startTracker(t, open)
  const client = await rawClient(t, first(server.http).port)
  const outcome = await reload(server, (text) =>
    text
      .replace('roles: [tracker]', 'roles: [tracker]\nworkers: 2')
      .replace('approval: none', 'approval: none, numwant_max: 7')
      .replace(
        'http: { addr: 127.0.0.1:0',
        'http: { addr: 127.0.0.1:1, tracker_addr: 127.0.0.1:2, proxy_protocol: true',
      )
      .replace('udp: { addr: 127.0.0.1:0', 'udp: { addr: 127.0.0.1:3, connection_id_lifetime: 5m')
      .replace(/^data_dir: .*$/m, 'data_dir: /elsewhere')
      .concat(
        'storage: { config: { peers_max: 10 } }\ntokens: { issuer: x }\nposthooks: [{ name: ./none.js }]\n',
      ),
  )
  assert.deepEqual(
    [outcome.msg, outcome.needRestart?.toSorted()],
    [
      'reloaded',
      [
        'data_dir',
        'http.addr.port',
        'http.proxy_protocol',
        'http.tracker_addr',
        'posthooks',
        'storage.config.peers_max',
        'tokens.issuer',
        'udp.addr',
        'udp.connection_id_lifetime',
        'workers',
      ],
    ],
  )
  assert.match(await ask(client, announceQuery()), /incompletei1e/)
})

test('a file that cannot be used changes nothing, and the log says why and where', async (t) => {
  const directory = await temporaryDirectory(t)
  const list = join(directory, 'torrents')
  await writeFile(list, `${aa}\nnonsense\n`)
  const server = await startTracker(
    t,
    `${open}topology: { levels: [rack, row], prefixes: [{ cidr: 127.0.0.0/8, place: here }] }\n`,
    { directory },
  )
  const file = join(directory, 'server.yaml')
  const good = await readFile(file, 'utf8')
  const lines = good.split('\n').length
  const client = await rawClient(t, first(server.http).port)
  const cases: Record<string, readonly [(text: string) => string, RegExp]> = {
    'no YAML': [(text) => `${text}"\n`, new RegExp(`server\\.yaml:${lines}:\\d+ `)],
    'an unknown key': [
      (text) => `${text}announce_intervall: 1m\n`,
      new RegExp(`server\\.yaml:${lines}:1 announce_intervall: there is no such setting`),
    ],
    'a value that is none': [
      (text) => `${text}announce_interval: soon\n`,
      new RegExp(`server\\.yaml:${lines}:1 announce_interval: need a duration`),
    ],
    'a bad entry of a list': [
      (text) => `${text}prehooks:\n  - name: torrent approval\n    options: { whitelist: [xyz] }\n`,
      new RegExp(`server\\.yaml:${lines + 2}:\\d+ prehooks\\.0\\.options\\.whitelist\\.0: `),
    ],
    'a bad line of a list file': [
      (text) => `${text}prehooks: [{ name: torrent approval, options: { whitelist_file: ${list} } }]\n`,
      /torrents:2: /,
    ],
    'a list file that is not there': [
      (text) => `${text}prehooks: [{ name: torrent approval, options: { whitelist_file: ${list}-gone } }]\n`,
      /Cannot make hook torrent approval: .*torrents-gone.*ENOENT/,
    ],
    'a hook that is not there': [
      (text) => `${text}prehooks: [{ name: ./gone.js }]\n`,
      /Cannot load module .*gone\.js/,
    ],
    'a second hook that cannot be made': [
      (text) =>
        `${text}prehooks: [{ name: torrent approval, options: { whitelist: [${bb}] } }, { name: ./gone.js }]\n`,
      /Cannot load module .*gone\.js/,
    ],
    'another number of levels': [
      (text) => text.replace('[rack, row]', '[rack, row, datacentre]'),
      /topology\.levels: another number of levels needs a restart/,
    ],
    'a place without its parents': [
      (text) => text.replace('levels: [rack, row]', 'levels: [rack, row], places: { a: { parents: [] } }'),
      /topology\.places\.a: got 0 parents, need 1 \(row\)/,
    ],
    'a route twice': [
      (text) => text.replace('addr: 127.0.0.1:0 }', 'addr: 127.0.0.1:0, announce_routes: [/:a, /:b] }'),
      /Cannot use route \/:b: another route takes the same paths/,
    ],
    'tokens that were not asked for at the start': [
      (text) => `${text.replace('approval: none', 'approval: token')}tokens: { keys_file: ${list} }\n`,
      /tracker\.approval: token needs a restart/,
    ],
  }
  for (const [name, [change, words]] of Object.entries(cases)) {
    // Something else that is good changes, too.
    await writeFile(file, change(good.replace('approval: none', 'approval: none, numwant_max: 1')))
    assert.match(await failedReload(server), words, name)
    assert.match(await ask(client, announceQuery({ port: 1 })), /incompletei\de/, name)
    await ask(client, announceQuery({ port: 2 }))
    const reply = parseAnnounceReply(Buffer.from(await ask(client, announceQuery({ port: 3 })), 'latin1'))
    assert.equal(reply.peers.length, 2, name)
  }
  await writeFile(file, good)
  assert.deepEqual(await reload(server), { msg: 'reloaded' })
})

test('who asks for a reload while the server starts, or many times at once, gets what is in the file at last', async (t) => {
  const directory = await temporaryDirectory(t)
  const file = join(directory, 'server.yaml')
  // A hook that takes its time until it is let go.
  const [made, go] = [join(directory, 'made'), join(directory, 'go')]
  await writeFile(
    join(directory, 'slow.mjs'),
    `import { existsSync, writeFileSync } from 'node:fs'
export default async () => {
  writeFileSync(${JSON.stringify(made)}, '')
  while (!existsSync(${JSON.stringify(go)})) await new Promise((resolve) => setTimeout(resolve, 5))
  return { name: 'slow' }
}
`,
  )
  const config = (interval: string) =>
    `roles: [tracker]\ndata_dir: ${directory}/data\nmetrics_addr: none\nhttp: { addr: 127.0.0.1:0 }\n${open}min_announce_interval: ${interval}\nprehooks: [{ name: ./slow.mjs }]\n`
  await writeFile(file, config('11s'))
  const child = spawn(process.execPath, [bin('rackswarm-server'), '--config', file], {
    stdio: ['ignore', 'ignore', 'pipe'],
  })
  t.after(async () => {
    if (child.exitCode !== null || child.signalCode !== null) return
    child.kill('SIGKILL')
    await once(child, 'exit')
  })
  let log = ''
  child.stderr.on('data', (chunk: Buffer) => (log += chunk.toString()))
  const isThere = async (path: string) =>
    readFile(path).then(
      () => true,
      () => false,
    )
  await until('the hook is being made', async () => isThere(made))
  await writeFile(file, config('12s'))
  child.kill('SIGHUP')
  await writeFile(go, '')
  await until('it is reloaded', () => log.includes('"msg":"reloaded"'))
  const ready = linesOf(log).find(({ msg }) => msg === 'server is listening') as unknown as {
    http: { port: number }
  }
  const client = await rawClient(t, ready.http.port)
  assert.match(await ask(client, announceQuery()), /min intervali12e/)
  for (let seconds = 13; seconds < 30; seconds++) {
    await writeFile(file, config(`${seconds}s`))
    child.kill('SIGHUP')
  }
  await until('the last interval is in force', async () =>
    (await ask(client, announceQuery())).includes('min intervali29e'),
  )
  child.kill('SIGHUP')
  child.kill('SIGTERM')
  const [code] = (await once(child, 'exit')) as [number | null]
  assert.equal(code, 0)
})

interface Outcome {
  readonly msg: string
  readonly needRestart?: string[]
}

/** Changes the configuration file, sends SIGHUP, and waits for what the log says of it: that it failed with `words`, if they are given. */
async function reload(
  server: TrackerProcess,
  change: (text: string) => string = (text) => text,
  words?: RegExp,
): Promise<Outcome> {
  const file = join(server.directory, 'server.yaml')
  const before = await readFile(file, 'utf8')
  await writeFile(file, change(before))
  const line = await outcomeOf(server)
  const fault = line.err?.message
  if (words) assert.match(fault ?? line.msg, words)
  else assert.equal(line.msg, 'reloaded', fault ?? '')
  return { msg: line.msg, ...(line.needRestart && { needRestart: line.needRestart }) }
}

/** SIGHUP, which must fail. @returns why */
async function failedReload(server: TrackerProcess): Promise<string> {
  const { msg, err } = await outcomeOf(server)
  assert.equal(msg, 'reload failed; what was in force stays')
  return err?.message ?? ''
}

async function outcomeOf(server: TrackerProcess): Promise<Line> {
  const outcomes = async () =>
    linesOf(await server.log()).filter(({ msg }) => msg === 'reloaded' || msg.startsWith('reload failed'))
  const seen = (await outcomes()).length
  server.process.kill('SIGHUP')
  await until('the reload has ended', async () => (await outcomes()).length > seen)
  return (await outcomes())[seen] ?? assert.fail('no outcome')
}

interface Line extends Outcome {
  readonly err?: { readonly message: string }
}

function linesOf(log: string): Line[] {
  return log
    .split('\n')
    .filter((line) => line.endsWith('}'))
    .map((line) => JSON.parse(line) as Line)
}

async function get(client: RawClient, path: string): Promise<{ status: number; body: string }> {
  client.send(`GET ${path} HTTP/1.1\r\nhost: x\r\n\r\n`)
  return client.reply()
}

async function ask(client: RawClient, query: string): Promise<string> {
  return (await get(client, `/announce?${query}`)).body
}

function tlsOf(directory: string): string {
  return `cert: ${join(directory, 'cert.pem')}, key: ${join(directory, 'key.pem')}`
}

/** Puts certificate and key where the server looks for them. @returns whose they are */
async function install(directory: string, { cert, key }: Pair): Promise<string> {
  await writeFile(join(directory, 'cert.pem'), cert)
  await writeFile(join(directory, 'key.pem'), key)
  return commonName(new X509Certificate(cert).subject)
}

/** A new TLS connection, and the name in the certificate it was shown. */
async function secured(
  t: TestContext,
  port: number,
  ca: Buffer,
): Promise<{ client: RawClient; name: string }> {
  const socket: TLSSocket = connectTls({ host: '127.0.0.1', port, ca, checkServerIdentity: () => undefined })
  t.after(() => socket.destroy())
  await once(socket, 'secureConnect')
  const name = commonName(socket.getPeerX509Certificate()?.subject ?? '')
  return { client: rawClientOn(socket), name }
}

function commonName(subject: string): string {
  return /CN=(.*)/.exec(subject)?.[1] ?? ''
}
