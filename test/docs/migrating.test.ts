import assert from 'node:assert/strict'
import { createSign } from 'node:crypto'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'node:test'
import { formatEndpoint, parseCompactPeers } from '../../lib/protocol/address.ts'
import type { Bencoded } from '../../lib/protocol/bencode.ts'
import { parseUdpAnnounceReply, writeUdpAnnounce, writeUdpScrape } from '../../lib/protocol/udp.ts'
import { startChild } from '../../lib/runtime/child.ts'
import { bin } from '../support/fleet.ts'
import { keys, makeTestKey, startKeyServer } from '../support/key-server.ts'
import type { Address, Dictionary, UdpProbe } from '../support/tracker.ts'
import {
  announceFields,
  announceQuery,
  bencoded,
  failure,
  first,
  httpGet,
  startTracker,
  temporaryDirectory,
  testHash,
  text,
  udpError,
  udpProbe,
} from '../support/tracker.ts'

const root = join(import.meta.dirname, '..', '..')

test('from-chihaya.yaml starts, answers over HTTP and UDP as the guide says, and reloads at SIGUSR1', async (t) => {
  const directory = await temporaryDirectory(t)
  const example = await readFile(join(root, 'configs', 'examples', 'from-chihaya.yaml'), 'utf8')
  const config = join(directory, 'server.yaml')
  const onFreePorts = example.replaceAll(/0\.0\.0\.0:(6969|6880)$/gm, '127.0.0.1:0')
  await writeFile(config, `${onFreePorts}\ndata_dir: ${join(directory, 'data')}\n`)
  const logFile = join(directory, 'server.log')
  const child = await startChild({
    file: bin('rackswarm-server'),
    args: ['--config', config],
    readyMessage: 'server is listening',
    logFile,
  })
  t.after(() => child[Symbol.asyncDispose]())
  const http = child.ready['http'] as Address
  const udp = await udpProbe(t, first(child.ready['udp'] as Address[]))
  const announce = async (query: string, headers = {}) =>
    bencoded((await httpGet(http, `/announce?${query}`, { headers })).body)

  const alone = await announce(announceQuery({ port: 7001 }))
  assert.deepEqual([...alone.keys()], [...alone.keys()].sort(), 'keys are sorted')
  assert.equal(alone.get('complete'), 0)
  assert.equal(alone.get('incomplete'), 1, 'the announcer counts')
  assert.equal(text(alone.get('peers')), '', 'nobody is told of itself, and peers is there')
  assert.ok(between(alone.get('interval'), 15 * 60, 30 * 60))
  assert.equal(alone.get('min interval'), 15 * 60)

  const overUdp = await udpAnnounce(udp, { port: 7002, left: 0 })
  assert.equal(overUdp.complete, 1)
  assert.equal(overUdp.incomplete, 1)
  assert.deepEqual(
    overUdp.peers.map((peer) => formatEndpoint(peer.endpoint)),
    ['127.0.0.1:7001'],
  )
  assert.ok(between(overUdp.intervalSeconds, 15 * 60, 30 * 60))

  const again = await announce(announceQuery({ port: 7001 }))
  assert.equal(compact(again), '127.0.0.1:7002', 'compact, though it was not asked for')
  const named = await announce(announceQuery({ port: 7001 }, 'compact=0'))
  assert.ok(Array.isArray(named.get('peers')))
  const stopped = await announce(announceQuery({ port: 7001, event: 'stopped' }))
  assert.equal(text(stopped.get('peers')), '')
  assert.equal(stopped.get('incomplete'), 0)

  const real = await announce(announceQuery({ port: 7003 }), { 'x-real-ip': '192.0.2.7' })
  assert.deepEqual(real.get('external ip'), Buffer.from([192, 0, 2, 7]), 'of a proxy that is named')
  const spoofed = await announce(announceQuery({ port: 7004 }, 'ip=192.0.2.8'))
  assert.deepEqual(spoofed.get('external ip'), Buffer.from([127, 0, 0, 1]), 'ip= of nobody')

  const many = Array.from({ length: 51 }, (_, i) => testHash(i))
  const id = await udp.connectionId()
  assert.match(
    udpError(await udp.ask(writeUdpScrape({ connectionId: id, transactionId: 9 }, many))),
    /at most 50/,
  )

  child.process.kill('SIGUSR1')
  const deadline = performance.now() + 10_000
  while (!(await readFile(logFile, 'utf8')).includes('"msg":"reloaded"'))
    assert.ok(performance.now() < deadline, 'it did not reload')
  // Left to Node, the signal would open a debugger's port.
  assert.doesNotMatch(await readFile(logFile, 'utf8'), /needRestart|Debugger/)
  assert.equal((await announce(announceQuery({ port: 7001 }))).get('complete'), 1, 'the swarm is still there')
})

test('Quay’s tokens open the tracker of the guide, over HTTP and UDP', async (t) => {
  const guide = await readFile(join(root, 'docs', 'migrating-from-chihaya.md'), 'utf8')
  const settings =
    /^## Tokens and Quay$[^]*?^```yaml\nroles: \[tracker\]\n([^]*?)^```$/m.exec(guide)?.[1] ?? ''
  const key = makeTestKey('quay-1', 'RS256')
  const keyServer = await startKeyServer(t, keys(key))
  const tracker = await startTracker(
    t,
    settings
      .replace(/^http:\n(?: {2}.*\n)+/m, 'http: { addr: 127.0.0.1:0 }\n')
      .replace(/keys_url: .*/, `keys_url: ${keyServer.url}`),
  )
  const audience = 'https://tracker.example.com:6969/announce'
  const sign = (claims: object, kid = key.kid) => signRs256(key.privateKey, kid, claims)
  const claims = { iss: 'quay', aud: audience, infohash: 'aa'.repeat(20) }
  const good = sign(claims)
  const get = async (path: string, jwt: string) =>
    (await httpGet(first(tracker.http), `${path}?${announceQuery({}, jwt === '' ? '' : `jwt=${jwt}`)}`)).body
  assert.equal(bencoded(await get('/announce', good)).get('incomplete'), 1)
  assert.ok(bencoded(await get('/scrape', good)).has('files'))
  assert.equal(await get('/announce', ''), failure('unapproved request: missing jwt'))
  assert.equal(await get('/scrape', ''), failure('unapproved request: missing jwt'))
  const invalid = failure('unapproved request: invalid jwt')
  assert.equal(await get('/announce', sign({ ...claims, infohash: 'bb'.repeat(20) })), invalid)
  assert.equal(await get('/announce', sign({ ...claims, iss: 'tracker.example.com' })), invalid)
  assert.equal(
    await get('/announce', sign({ ...claims, exp: 1_500_000_000 })),
    invalid,
    'exp is checked, where it is',
  )
  assert.equal(
    await get('/announce', sign({ ...claims, infohash: 'AA'.repeat(20) })).then((body) => body[1]),
    '8',
  )

  const udp = await udpProbe(t, first(tracker.udp))
  const reply = await udpAnnounce(udp, { port: 7005 }, `/announce?jwt=${good}`)
  assert.equal(reply.incomplete, 2)
  const scrape = writeUdpScrape({ connectionId: await udp.connectionId(), transactionId: 5 }, [
    testHash(0xaa),
  ])
  assert.equal(udpError(await udp.ask(scrape)), 'unapproved request: missing jwt')
})

test('every metric that the docs name is one', async () => {
  const sources = await Promise.all(
    ['server/metrics.ts', 'agent/metrics.ts'].map((file) => readFile(join(root, file), 'utf8')),
  )
  for (const file of ['migrating-from-chihaya', 'operations', 'hooks', 'protocol', 'security']) {
    const words = await readFile(join(root, 'docs', `${file}.md`), 'utf8')
    for (const [name] of words.matchAll(/\brackswarm_[a-z]+_\w+/g)) {
      // The guide writes families of them as rackswarm_jwks_*.
      const metric = name.replace(/_(?:bucket|sum|count)$/, '')
      assert.ok(
        sources.some(
          (source) => source.includes(`'${metric}'`) || (name.endsWith('_') && source.includes(`'${name}`)),
        ),
        `docs/${file}.md: there is no metric ${name}`,
      )
    }
  }
})

function between(value: Bencoded | undefined, least: number, most: number): boolean {
  return typeof value === 'number' && value >= least && value <= most
}

function compact(reply: Dictionary): string {
  const peers = parseCompactPeers(Buffer.from(text(reply.get('peers')), 'latin1'), 4)
  return peers.map(formatEndpoint).join(' ')
}

async function udpAnnounce(udp: UdpProbe, over: Parameters<typeof announceFields>[0], urlData?: string) {
  const ids = { connectionId: await udp.connectionId(), transactionId: 7 }
  return parseUdpAnnounceReply(await udp.ask(writeUdpAnnounce(ids, announceFields(over), urlData)), 4)
}

/** As Quay signs: no `typ` but JWT, and no `exp` unless it is given. */
function signRs256(
  privateKey: ReturnType<typeof makeTestKey>['privateKey'],
  kid: string,
  claims: object,
): string {
  const part = (value: object) => Buffer.from(JSON.stringify(value)).toString('base64url')
  const input = `${part({ typ: 'JWT', alg: 'RS256', kid })}.${part(claims)}`
  return `${input}.${createSign('RSA-SHA256').update(input).sign(privateKey, 'base64url')}`
}
