import assert from 'node:assert/strict'
import { once } from 'node:events'
import { readFile, readdir, rename, writeFile } from 'node:fs/promises'
import { connect as connectTcp } from 'node:net'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { before, test } from 'node:test'
import { connect as connectTls } from 'node:tls'
import { formatEndpoint, formatIp, ipFromBytes, parseCompactPeers } from '../../lib/protocol/address.ts'
import type { InfoHash } from '../../lib/protocol/infohash.ts'
import { infoHashFromBytes, infoHashToBytes } from '../../lib/protocol/infohash.ts'
import { escapeBytes } from '../../lib/protocol/query.ts'
import type { UdpAnnounceFields } from '../../lib/protocol/udp.ts'
import {
  parseUdpAnnounceReply,
  parseUdpScrapeReply,
  writeUdpAnnounce,
  writeUdpScrape,
} from '../../lib/protocol/udp.ts'
import { mintOffline } from '../../lib/token/offline.ts'
import { createAuthority } from '../support/certificates.ts'
import { rawClientOn } from '../support/http-client.ts'
import type { Address, Dictionary, TrackerProcess } from '../support/tracker.ts'
import {
  announceFields,
  announceQuery,
  bencoded,
  checkConfig,
  configHead,
  failure,
  fileOwner,
  first,
  httpGet,
  startTracker,
  temporaryDirectory,
  testHash,
  text,
  udpError,
  udpProbe,
} from '../support/tracker.ts'
import { until } from '../support/until.ts'

const open = 'tracker: { approval: none }\n'
const escaped = (infoHash: InfoHash) => escapeBytes(infoHashToBytes(infoHash))
const [aa, bb, cc] = [testHash(0xaa), testHash(0xbb), testHash(0xcc)]

/** How the ClientError of the copy that a hook was written for is named in it. */
const errorsModule = JSON.stringify(import.meta.resolve('../../lib/protocol/errors.ts'))

/** Somebody else's pre-hook: refuses one port in words, breaks at another, and puts a marked peer last. */
const oddHook = `import { ClientError } from ${errorsModule}
export default ({ refusedPort }, { log }) => {
  log.info({ refusedPort }, 'odd hook made')
  return {
    name: 'odd',
    announce: ({ announce }) => {
      if (announce.port === refusedPort) throw new ClientError('odd', 'come back on Monday')
      if (announce.port === 9998) throw new TypeError('a fault of the hook')
      if (announce.port === 9997) return Promise.reject(new ClientError('odd', 'come back on Tuesday'))
    },
  }
}
`

// --- one table through every frontend ---

type FrontendName = 'main port' | 'own listener' | 'udp'

/** What a client is told, whatever it came through. */
type Verdict =
  | { failure: string }
  | { complete: number; incomplete: number; peers: readonly string[] }
  | { counts: readonly (readonly [complete: number, downloaded: number, incomplete: number])[] }

interface FrontendClient {
  readonly name: FrontendName
  announce(fields: UdpAnnounceFields, options: { from?: string; jwt?: string }): Promise<Verdict>
  scrape(infoHashes: readonly InfoHash[], options: { from?: string; jwt?: string }): Promise<Verdict>
}

function httpFrontend(name: FrontendName, address: Address): FrontendClient {
  const ask = async (path: string, from: string | undefined) => {
    const { status, body } = await httpGet(address, path, from === undefined ? {} : { from })
    assert.equal(status, 200)
    return bencoded(body)
  }
  const tokenOf = (jwt: string | undefined) => (jwt === undefined ? '' : `jwt=${jwt}`)
  return {
    name,
    announce: async (fields, { from, jwt }) => {
      const reply = await ask(`/announce?${announceQuery(fields, tokenOf(jwt))}`, from)
      if (reply.has('failure reason')) return { failure: text(reply.get('failure reason')) }
      return {
        complete: Number(reply.get('complete')),
        incomplete: Number(reply.get('incomplete')),
        peers: peersOf(reply),
      }
    },
    scrape: async (infoHashes, { from, jwt }) => {
      const pairs = infoHashes.map((infoHash) => `info_hash=${escaped(infoHash)}`)
      const reply = await ask(`/scrape?${[...pairs, tokenOf(jwt)].join('&')}`, from)
      if (reply.has('failure reason')) return { failure: text(reply.get('failure reason')) }
      const files = reply.get('files') as Map<string, Map<string, number>>
      return {
        counts: infoHashes.map((infoHash) => {
          const counts = files.get(Buffer.from(infoHashToBytes(infoHash)).toString('latin1'))
          const [complete = NaN, downloaded = NaN, incomplete = NaN] = [
            counts?.get('complete'),
            counts?.get('downloaded'),
            counts?.get('incomplete'),
          ]
          return [complete, downloaded, incomplete] as const
        }),
      }
    },
  }
}

function udpFrontend(t: TestContext, address: Address): FrontendClient {
  const ask = async (write: (connectionId: Uint8Array) => Buffer, from: string | undefined) => {
    const probe = await udpProbe(t, address, from === undefined ? {} : { from })
    return probe.ask(write(await probe.connectionId()))
  }
  const transactionId = 0x11223344
  return {
    name: 'udp',
    announce: async (fields, { from, jwt }) => {
      const urlData = jwt === undefined ? '' : `/announce?jwt=${jwt}`
      const reply = await ask(
        (connectionId) => writeUdpAnnounce({ connectionId, transactionId }, fields, urlData),
        from,
      )
      if (reply.readUInt32BE(0) === 3) return { failure: udpError(reply) }
      const { complete, incomplete, peers } = parseUdpAnnounceReply(reply, 4)
      return { complete, incomplete, peers: peers.map(({ endpoint }) => formatEndpoint(endpoint)).sort() }
    },
    scrape: async (infoHashes, { from }) => {
      const reply = await ask(
        (connectionId) => writeUdpScrape({ connectionId, transactionId }, infoHashes),
        from,
      )
      if (reply.readUInt32BE(0) === 3) return { failure: udpError(reply) }
      return {
        counts: parseUdpScrapeReply(reply, infoHashes.length).map(
          ({ complete, downloaded, incomplete }) => [complete, downloaded, incomplete] as const,
        ),
      }
    },
  }
}

function frontendsOf(t: TestContext, server: TrackerProcess): FrontendClient[] {
  return [
    httpFrontend('main port', server.main),
    httpFrontend('own listener', first(server.http)),
    udpFrontend(t, first(server.udp)),
  ]
}

/** Of a compact reply, in order of their text. */
function peersOf(reply: Dictionary): string[] {
  const peers = (['peers', 'peers6'] as const).flatMap((key) => {
    const bytes = reply.get(key)
    return bytes instanceof Uint8Array ? parseCompactPeers(bytes, key === 'peers' ? 4 : 6) : []
  })
  return peers.map(formatEndpoint).sort()
}

const owner = fileOwner()
/** Both roles, so the main port is the registry's; a listener of the tracker's own; UDP. */
let both: TrackerProcess

before(async () => {
  const directory = await temporaryDirectory(owner)
  await writeFile(join(directory, 'odd.mjs'), oddHook)
  both = await startTracker(
    owner,
    `http:
  addr: 127.0.0.1:0
  tracker_addr: ['127.0.0.1:0']
  announce_routes: [/announce, '/:passkey/announce', '/any/*rest']
  scrape_routes: [/scrape, '/:passkey/scrape']
  trusted_proxies: [127.0.0.5/32]
tracker: { approval: none, full_scrape_networks: [127.0.0.6/32], trusted_announcers: [127.0.0.7/32] }
prehooks:
  - { name: client approval, options: { blacklist: [XX0001] } }
  - { name: torrent approval, options: { blacklist: [${bb}] } }
  - { name: network approval, options: { blacklist: [127.0.0.9/32] } }
  - { name: ./odd.mjs, options: { refusedPort: 9999 } }
`,
    { directory, roles: '[tracker, registry]' },
  )
})

test('one table of announces and scrapes gets the same verdicts through every frontend', async (t) => {
  const at = (port: number) => `127.0.0.1:${port}`
  const announces: readonly (readonly [string, Partial<UdpAnnounceFields>, Verdict, { from?: string }?])[] = [
    ['a seeder starts', { port: 7001, left: 0, event: 'started' }, { complete: 1, incomplete: 0, peers: [] }],
    ['a leecher starts', { port: 7002, event: 'started' }, { complete: 1, incomplete: 1, peers: [at(7001)] }],
    ['another one', { port: 7003 }, { complete: 1, incomplete: 2, peers: [at(7001), at(7002)] }],
    ['no peers wanted', { port: 7003, numwant: 0 }, { complete: 1, incomplete: 2, peers: [] }],
    [
      'one peer wanted',
      { port: 7001, left: 0, numwant: 1, event: 'stopped' },
      { complete: 0, incomplete: 2, peers: [] },
    ],
    [
      'a seeder hears of leechers',
      { port: 7001, left: 0 },
      { complete: 1, incomplete: 2, peers: [at(7002), at(7003)] },
    ],
    [
      'a leecher completes',
      { port: 7002, left: 0, event: 'completed' },
      { complete: 2, incomplete: 1, peers: [at(7003)] },
    ],
    ['a leecher stops', { port: 7003, event: 'stopped' }, { complete: 2, incomplete: 0, peers: [] }],
    [
      'one that is not there stops',
      { port: 7009, event: 'stopped' },
      { complete: 2, incomplete: 0, peers: [] },
    ],
    [
      'a number of 64 bits',
      { port: 7003, left: 2 ** 60, uploaded: 2 ** 60 },
      { complete: 2, incomplete: 1, peers: [at(7001), at(7002)] },
    ],
    ['port 0', { port: 0 }, { failure: 'invalid port' }],
    [
      'a client that is not approved',
      { peerId: Buffer.from('-XX0001-abcdefghijkl') },
      { failure: 'unapproved client' },
    ],
    ['a torrent that is not approved', { infoHash: bb }, { failure: 'unapproved torrent' }],
    ['a network that is not approved', {}, { failure: 'unapproved network' }, { from: '127.0.0.9' }],
    ['a hook of somebody else’s refuses', { port: 9999 }, { failure: 'come back on Monday' }],
    ['and refuses late', { port: 9997 }, { failure: 'come back on Tuesday' }],
    ['and breaks', { port: 9998 }, { failure: 'internal server error' }],
  ]
  const scrapes: readonly (readonly [string, (own: InfoHash) => InfoHash[], Verdict, { from?: string }?])[] =
    [
      [
        'a swarm and one that is not known',
        (own) => [cc, own],
        {
          counts: [
            [0, 0, 0],
            [2, 1, 1],
          ],
        },
      ],
      ['a torrent that is not approved', (own) => [own, bb], { failure: 'unapproved torrent' }],
      [
        'from a network that is not approved',
        (own) => [own],
        { failure: 'unapproved network' },
        { from: '127.0.0.9' },
      ],
      [
        'too many',
        (own) => new Array<InfoHash>(51).fill(own),
        { failure: 'too many infohashes: at most 50 in one scrape' },
      ],
    ]
  for (const [i, frontend] of frontendsOf(t, both).entries()) {
    const own = testHash(0x10 + i)
    for (const [what, fields, verdict, options = {}] of announces)
      assert.deepEqual(
        await frontend.announce(announceFields({ infoHash: own, ...fields }), options),
        verdict,
        `${frontend.name}: ${what}`,
      )
    for (const [what, hashes, verdict, options = {}] of scrapes)
      assert.deepEqual(await frontend.scrape(hashes(own), options), verdict, `${frontend.name}: ${what}`)
  }
  const { refused } = await both.stats()
  const { bad_parameter, unapproved_client, unapproved_torrent, unapproved_network, other } = refused
  assert.deepEqual(
    { bad_parameter, unapproved_client, unapproved_torrent, unapproved_network, other },
    { bad_parameter: 3, unapproved_client: 3, unapproved_torrent: 6, unapproved_network: 6, other: 6 },
  )
  const log = await both.log()
  assert.match(log, /odd hook made/)
  assert.equal(
    log.match(/"message":"a fault of the hook"/g)?.length,
    3,
    'the log says what the client is not told',
  )
})

test('tokens get the same verdicts through every frontend', async (t) => {
  const [issuer, audience] = ['https://registry.example.com', 'https://tracker.example.com']
  const server = await startTracker(
    t,
    `http: { addr: 127.0.0.1:0, tracker_addr: 127.0.0.1:0 }
tokens: { issuer: '${issuer}', audience: '${audience}' }
`,
    { roles: '[tracker, registry]' },
  )
  const keys = join(server.directory, 'data', 'keys')
  const keyFile = join(keys, first((await readdir(keys)).filter((name) => name.endsWith('.json'))))
  const mint = async (
    more: { infoHash?: InfoHash; audience?: string; cidr?: string; now?: () => number } = {},
  ) =>
    (
      await mintOffline({
        keyFile,
        issuer,
        audience,
        infoHash: aa,
        subject: 'h1',
        ttlMs: 60_000,
        now: Date.now,
        ...more,
      })
    ).token
  const good = await mint()
  const invalid = { failure: 'unapproved request: invalid jwt' }
  const cases: readonly (readonly [string, string | undefined, Verdict])[] = [
    ['none', undefined, { failure: 'unapproved request: missing jwt' }],
    ['an empty one', '', { failure: 'unapproved request: missing jwt' }],
    ['one for another swarm', await mint({ infoHash: cc }), invalid],
    ['one for another tracker', await mint({ audience: 'https://other.example.com' }), invalid],
    ['one of last week', await mint({ now: () => Date.now() - 7 * 86_400_000 }), invalid],
    ['one of next week', await mint({ now: () => Date.now() + 7 * 86_400_000 }), invalid],
    ['one for another address', await mint({ cidr: '10.0.0.0/8' }), invalid],
    ['a cut one', good.slice(0, -2), invalid],
    ['words', 'open-sesame', invalid],
    ['a right one', good, { complete: 0, incomplete: 1, peers: [] }],
    ['the same again', good, { complete: 0, incomplete: 1, peers: [] }],
  ]
  for (const frontend of frontendsOf(t, server)) {
    for (const [what, jwt, verdict] of cases)
      assert.deepEqual(
        await frontend.announce(announceFields({ infoHash: aa }), jwt === undefined ? {} : { jwt }),
        verdict,
        `${frontend.name}: ${what}`,
      )
    assert.deepEqual(await frontend.scrape([aa], {}), { failure: 'unapproved request: missing jwt' })
    if (frontend.name === 'udp') continue
    assert.deepEqual(await frontend.scrape([aa], { jwt: good }), { counts: [[0, 0, 1]] })
    assert.deepEqual(await frontend.scrape([aa, cc], { jwt: good }), invalid)
  }
})

test('each malformed query gets chihaya’s words through both HTTP frontends, to the byte', async () => {
  const good = announceQuery({ infoHash: aa })
  const without = (key: string) => good.replace(new RegExp(`(^|&)${key}=[^&]*`), '')
  const withValue = (key: string, value: string) =>
    good.replace(new RegExp(`((^|&)${key}=)[^&]*`), `$1${value}`)
  const cases: readonly (readonly [string, string, from?: string])[] = [
    ['', 'no info_hash parameter supplied'],
    [without('info_hash'), 'no info_hash parameter supplied'],
    [`${good}&info_hash=${escaped(cc)}`, 'multiple info_hash parameters supplied'],
    [withValue('info_hash', 'short'), 'provided invalid infohash'],
    [withValue('info_hash', '%0%a'), 'invalid query escape'],
    [`${good}&x=%`, 'invalid query escape'],
    [`${good}&event=notAnEvent`, 'failed to provide valid client event'],
    [without('peer_id'), 'failed to parse parameter: peer_id'],
    [withValue('peer_id', 'short'), 'failed to provide valid peer_id'],
    [without('left'), 'failed to parse parameter: left'],
    [withValue('left', '-1'), 'failed to parse parameter: left'],
    [without('downloaded'), 'failed to parse parameter: downloaded'],
    [withValue('downloaded', '1e3'), 'failed to parse parameter: downloaded'],
    [without('uploaded'), 'failed to parse parameter: uploaded'],
    [withValue('uploaded', '99999999999999999999'), 'failed to parse parameter: uploaded'],
    [`${good}&numwant=many`, 'failed to parse parameter: numwant'],
    [without('port'), 'failed to parse parameter: port'],
    [withValue('port', '65536'), 'failed to parse parameter: port'],
    [withValue('port', '0'), 'invalid port'],
    [`${good}&ip=nowhere`, 'failed to parse peer IP address', '127.0.0.7'],
    [withValue('peer_id', '-XX0001-abcdefghijkl'), 'unapproved client'],
    [withValue('info_hash', escaped(bb)), 'unapproved torrent'],
    [withValue('port', '9998'), 'internal server error'],
    [`${good}${'&a=b'.repeat(300)}`, 'too many query parameters'],
    [`${good}&x=${'y'.repeat(8192)}`, 'query too long'],
  ]
  for (const address of [both.main, first(both.http)]) {
    for (const [query, words, from] of cases) {
      const answer = await httpGet(address, `/announce?${query}`, from === undefined ? {} : { from })
      assert.deepEqual(answer, { status: 200, body: failure(words) }, query.slice(0, 300))
    }
    // What is no fault: chihaya's `event=none` in any case, a key without value, an empty pair, a parameter twice.
    for (const more of ['event=NONE', 'event=', 'a', '&&', '=b?', 'left=7', 'no_peer_id=1&supportcrypto=1'])
      assert.match((await httpGet(address, `/announce?${good}&${more}`)).body, /^d8:completei/, more)
    assert.equal((await httpGet(address, '/scrape')).body, failure('no info_hash parameter supplied'))
    assert.equal((await httpGet(address, '/announces')).status, 404)
  }
})

// --- the HTTP frontends ---

test('routes with parameters reach the tracker through both HTTP frontends', async () => {
  for (const [i, address] of [both.main, first(both.http)].entries()) {
    const infoHash = testHash(0x20 + i)
    const query = announceQuery({ infoHash })
    for (const path of ['/announce', '/f00f00/announce', '/any/of/them'])
      assert.match((await httpGet(address, `${path}?${query}`)).body, /^d8:completei/, path)
    for (const path of ['/scrape', '/f00f00/scrape'])
      assert.match(
        (await httpGet(address, `${path}?info_hash=${escaped(infoHash)}`)).body,
        /10:incompletei1e/,
      )
    assert.equal((await httpGet(address, `/a/b/announce?${query}`)).status, 404)
  }
})

/** The address under which an announce is taken, and what it answered. */
async function seenAs(address: Address, options: { from?: string; headers?: Record<string, string> } = {}) {
  const { status, body } = await httpGet(
    address,
    `/announce?${announceQuery({ infoHash: testHash(0x30) })}`,
    options,
  )
  if (status !== 200) return status
  const ip = bencoded(body).get('external ip')
  assert.ok(ip instanceof Uint8Array, body)
  return formatIp(ipFromBytes(ip))
}

test('X-Forwarded-For counts from trusted proxies, through both HTTP frontends', async () => {
  for (const address of [both.main, first(both.http)]) {
    const headers = { 'x-forwarded-for': '1.2.3.4, 10.9.8.7, 127.0.0.5', 'x-real-ip': '6.6.6.6' }
    assert.equal(await seenAs(address, { headers, from: '127.0.0.5' }), '10.9.8.7')
    assert.equal(await seenAs(address, { headers }), '127.0.0.1')
    assert.equal(
      await seenAs(address, { headers: { 'x-forwarded-for': 'fd00::7' }, from: '127.0.0.5' }),
      'fd00::7',
    )
    assert.equal(await seenAs(address, { from: '127.0.0.5' }), '127.0.0.5')
    assert.equal(await seenAs(address, { headers: { 'x-forwarded-for': 'me' }, from: '127.0.0.5' }), 400)
  }
})

test('X-Real-IP instead, where real_ip_header says so', async (t) => {
  const server = await startTracker(
    t,
    `http: { addr: 127.0.0.1:0, trusted_proxies: [127.0.0.5/32], real_ip_header: x-real-ip }\n${open}`,
  )
  const headers = { 'x-forwarded-for': '10.9.8.7', 'x-real-ip': '6.6.6.6' }
  assert.equal(await seenAs(first(server.http), { headers, from: '127.0.0.5' }), '6.6.6.6')
  assert.equal(await seenAs(first(server.http), { headers }), '127.0.0.1')
})

test('the PROXY protocol, version 1 and 2, where proxy_protocol says so', async (t) => {
  const server = await startTracker(
    t,
    `http: { addr: 127.0.0.1:0, proxy_protocol: true, trusted_proxies: [127.0.0.5/32] }\n${open}`,
  )
  const { host, port } = first(server.http)
  const request = `GET /announce?${announceQuery({ infoHash: aa })} HTTP/1.1\r\nHost: t\r\n\r\n`
  const ask = async (header: Buffer, from: string) => {
    const socket = connectTcp({ host, port, localAddress: from })
    t.after(() => socket.destroy())
    const client = rawClientOn(socket)
    client.send(Buffer.concat([header, Buffer.from(request)]))
    const ip = bencoded((await client.reply()).body).get('external ip')
    assert.ok(ip instanceof Uint8Array)
    return formatIp(ipFromBytes(ip))
  }
  assert.equal(await ask(Buffer.from('PROXY TCP4 10.1.2.3 10.0.0.1 5555 80\r\n'), '127.0.0.5'), '10.1.2.3')
  // Signature, version 2 and PROXY, TCP over IPv4, 12 bytes: source and destination, their ports.
  const second = Buffer.from(
    '0d0a0d0a000d0a515549540a 21 11 000c 0a040506 0a000001 15b3 0050'.replaceAll(' ', ''),
    'hex',
  )
  assert.equal(await ask(second, '127.0.0.5'), '10.4.5.6')
  assert.equal(await ask(Buffer.alloc(0), '127.0.0.8'), '127.0.0.8')
  await assert.rejects(ask(Buffer.alloc(0), '127.0.0.5'), /The connection ended/)
})

test('several addresses, of both families, are one tracker', async (t) => {
  const server = await startTracker(
    t,
    `http: { addr: 127.0.0.1:0, tracker_addr: ['127.0.0.1:0', '[::1]:0'] }\n${open}`,
  )
  assert.equal(server.http.length, 3)
  assert.equal(new Set(server.http.map(({ port }) => port)).size, 3)
  const replies: Dictionary[] = []
  for (const [i, address] of server.http.entries()) {
    const { body } = await httpGet(
      address,
      `/announce?${announceQuery({ port: 7000 + i, left: i === 0 ? 0 : 1 })}`,
    )
    replies.push(bencoded(body))
  }
  const last = replies.at(-1)
  assert.ok(last)
  assert.deepEqual([last.get('complete'), last.get('incomplete')], [1, 2])
  assert.deepEqual(peersOf(last), ['127.0.0.1:7000', '127.0.0.1:7001'])
  const again = bencoded(
    (await httpGet(first(server.http), `/announce?${announceQuery({ port: 7000, left: 1 })}`)).body,
  )
  assert.deepEqual(peersOf(again), ['127.0.0.1:7001', '[::1]:7002'], 'BEP 7: over IPv4, too')
})

test('tls_addr speaks TLS 1.2 and 1.3 and nothing older, beside plaintext', async (t) => {
  const authority = createAuthority('tracker-ca')
  const pair = authority.issue('tracker')
  const directory = await temporaryDirectory(t)
  const [cert, key] = [join(directory, 'cert.pem'), join(directory, 'key.pem')]
  await writeFile(cert, pair.cert)
  await writeFile(key, pair.key)
  const server = await startTracker(
    t,
    `http: { addr: 127.0.0.1:0, tls_addr: 127.0.0.1:0, tls: { cert: ${cert}, key: ${key}, main_port: false } }\n${open}`,
    { directory },
  )
  const [plain, secure] = server.http
  assert.ok(plain && secure)
  const ask = async (options: object) => {
    const socket = connectTls({ ...secure, ca: authority.cert, ...options })
    t.after(() => socket.destroy())
    await once(socket, 'secureConnect')
    const client = rawClientOn(socket)
    client.send(`GET /announce?${announceQuery()} HTTP/1.1\r\nHost: t\r\n\r\n`)
    return [socket.getProtocol(), (await client.reply()).status]
  }
  for (const version of ['TLSv1.2', 'TLSv1.3'])
    assert.deepEqual(await ask({ minVersion: version, maxVersion: version }), [version, 200])
  await assert.rejects(ask({ minVersion: 'TLSv1', maxVersion: 'TLSv1.1', ciphers: 'DEFAULT@SECLEVEL=0' }), {
    code: 'ERR_SSL_TLSV1_ALERT_PROTOCOL_VERSION',
  })
  assert.equal((await httpGet(plain, `/announce?${announceQuery()}`)).status, 200)
  await assert.rejects(httpGet(secure, `/announce?${announceQuery()}`), 'plaintext on the TLS port')
})

test('a scrape of everything is for full_scrape_networks alone, through both HTTP frontends', async () => {
  const infoHash = testHash(0x40)
  await httpGet(both.main, `/announce?${announceQuery({ infoHash, left: 0 })}`)
  for (const address of [both.main, first(both.http)]) {
    const files = bencoded((await httpGet(address, '/scrape', { from: '127.0.0.6' })).body).get('files')
    assert.ok(files instanceof Map)
    const counts = files.get(Buffer.from(infoHashToBytes(infoHash)).toString('latin1'))
    assert.deepEqual(
      counts,
      new Map([
        ['complete', 1],
        ['downloaded', 0],
        ['incomplete', 0],
      ]),
    )
    assert.equal((await httpGet(address, '/scrape')).body, failure('no info_hash parameter supplied'))
  }
})

test('compact=0 gets dictionaries, and a paused partial seed is a leecher (BEP 21)', async () => {
  for (const [i, address] of [both.main, first(both.http)].entries()) {
    const infoHash = testHash(0x50 + i)
    const announce = async (port: number, more: string, left = 1) =>
      bencoded((await httpGet(address, `/announce?${announceQuery({ infoHash, port, left }, more)}`)).body)
    await announce(7001, '', 0)
    const paused = await announce(7002, 'event=paused', 500)
    assert.deepEqual([paused.get('complete'), paused.get('incomplete')], [1, 1])
    const [peer, ...others] = (await announce(7003, 'compact=0')).get('peers') as Map<
      string,
      Uint8Array | number
    >[]
    assert.equal(others.length, 1)
    assert.deepEqual([...(peer?.keys() ?? [])], ['ip', 'peer id', 'port'])
    assert.equal(text(peer?.get('ip')), '127.0.0.1')
    assert.equal(text(peer?.get('peer id')), '-RS0001-abcdefghijkl')
    assert.equal((await announce(7003, 'compact=1')).get('peers') instanceof Uint8Array, true)
  }
})

// --- hooks through the configuration ---

test('rate limit: a refusal says when to come back (BEP 31), and other networks are not held back', async (t) => {
  const server = await startTracker(
    t,
    `${open}prehooks:
  - { name: rate limit, options: { per_address: { rate: 0.001, burst: 3 }, exempt: [127.0.0.8/32] } }
`,
  )
  const ask = async (from: string) =>
    (await httpGet(first(server.http), `/announce?${announceQuery()}`, { from })).body
  for (let i = 0; i < 3; i++) assert.match(await ask('127.0.0.1'), /^d8:completei/)
  assert.equal(await ask('127.0.0.1'), 'd14:failure reason32:rate limit exceeded, retry later8:retry ini1ee')
  const udp = await udpFrontend(t, first(server.udp)).announce(announceFields(), {})
  assert.deepEqual(udp, { failure: 'rate limit exceeded, retry later' }, 'one budget for all frontends')
  for (let i = 0; i < 10; i++) assert.match(await ask('127.0.0.8'), /^d8:completei/)
  assert.match(await ask('127.0.0.2'), /^d8:completei/)
})

test('client approval: a whitelist with ranges of versions', async (t) => {
  const server = await startTracker(
    t,
    `${open}prehooks:
  - { name: client approval, options: { whitelist: [RS, { client: TR, from: '3.0.0', to: '4.0.5' }] } }
`,
  )
  for (const [id, approved] of [
    ['-RS0001-abcdefghijkl', true],
    ['-TR3000-abcdefghijkl', true],
    ['-TR4060-abcdefghijkl', false],
    ['-XL0012-abcdefghijkl', false],
  ] as const) {
    const query = announceQuery({ peerId: Buffer.from(id) })
    const { body } = await httpGet(first(server.http), `/announce?${query}`)
    if (approved) assert.match(body, /^d8:completei/, id)
    else assert.equal(body, failure('unapproved client'), id)
  }
})

test('torrent approval: a file that is swapped while the server runs counts; a bad one does not', async (t) => {
  const directory = await temporaryDirectory(t)
  const list = join(directory, 'torrents.txt')
  const write = async (lines: readonly string[]) => {
    await writeFile(`${list}.new`, lines.join('\n'))
    await rename(`${list}.new`, list)
  }
  await write([aa])
  const server = await startTracker(
    t,
    `${open}prehooks: [{ name: torrent approval, options: { whitelist_file: ${list} } }]\n`,
    { directory },
  )
  const approved = async (infoHash: InfoHash) => {
    const { body } = await httpGet(first(server.http), `/announce?${announceQuery({ infoHash })}`)
    if (body === failure('unapproved torrent')) return false
    assert.match(body, /^d8:completei/)
    return true
  }
  assert.deepEqual([await approved(aa), await approved(cc)], [true, false])
  await write(['# only the other one', cc.toUpperCase()])
  await until('the new one is approved', () => approved(cc))
  assert.equal(await approved(aa), false)
  await write([aa, 'this is no infohash'])
  await until('the broken list is seen', async () => (await server.log()).includes('list not loaded'))
  assert.match(await server.log(), /torrents\.txt:2: /)
  assert.deepEqual([await approved(aa), await approved(cc)], [false, true])
  await write([aa])
  await until('the first one is approved again', () => approved(aa))
})

test('network approval: a whitelist', async (t) => {
  const server = await startTracker(
    t,
    `${open}prehooks: [{ name: network approval, options: { whitelist: [127.0.1.0/24, '::1'] } }]\n`,
  )
  const ask = async (from: string) =>
    (await httpGet(first(server.http), `/announce?${announceQuery()}`, { from })).body
  assert.match(await ask('127.0.1.7'), /^d8:completei/)
  assert.equal(await ask('127.0.2.7'), failure('unapproved network'))
})

test('interval variation: the peer that chihaya puts off by 57 s is put off by 57 s, over UDP, too', async (t) => {
  const server = await startTracker(
    t,
    `${open}announce_interval: 10s
min_announce_interval: 10s
prehooks:
  - name: interval variation
    options: { modify_response_probability: 0.95, max_increase_delta: 60, modify_min_interval: true }
`,
  )
  const late = {
    infoHash: infoHashFromBytes(Buffer.from('00000000000000000001')),
    peerId: Buffer.from('-TR0960-6ep6svaa61r4'),
  }
  const { body } = await httpGet(first(server.http), `/announce?${announceQuery(late)}`)
  const reply = bencoded(body)
  assert.deepEqual([reply.get('interval'), reply.get('min interval')], [67, 67])
  const probe = await udpProbe(t, first(server.udp))
  const ids = { connectionId: await probe.connectionId(), transactionId: 1 }
  const packet = await probe.ask(writeUdpAnnounce(ids, announceFields(late)))
  assert.equal(parseUdpAnnounceReply(packet, 4).intervalSeconds, 67)
})

test('a post-hook of somebody else’s is told of each announce, of those before the end, too', async (t) => {
  const directory = await temporaryDirectory(t)
  const told = join(directory, 'told.jsonl')
  await writeFile(
    join(directory, 'tell.mjs'),
    `import { appendFile } from 'node:fs/promises'
export default async ({ file }) => ({
  name: 'tell',
  announced: async ({ announce, endpoint, counts }) => {
    await appendFile(file, JSON.stringify({ hash: announce.infoHash, port: announce.port, family: endpoint.family, counts }) + '\\n')
    if (announce.port === 7000) throw new Error('a fault of the post-hook')
  },
  [Symbol.asyncDispose]: () => appendFile(file, '"ended"\\n'),
})
`,
  )
  const server = await startTracker(
    t,
    `${open}posthooks: [{ name: ./tell.mjs, options: { file: ${told} } }]\n`,
    {
      directory,
    },
  )
  const count = 50
  for (let i = 0; i < count; i++)
    await httpGet(first(server.http), `/announce?${announceQuery({ port: 7000 + i, left: i % 2 })}`)
  await httpGet(first(server.http), `/announce?${announceQuery({ port: 0 })}`)
  await server[Symbol.asyncDispose]()
  const lines = (await readFile(told, 'utf8'))
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as unknown)
  assert.equal(lines.length, count + 1)
  assert.deepEqual(lines[3], {
    hash: aa,
    port: 7003,
    family: 4,
    counts: { complete: 2, incomplete: 2, downloaded: 0 },
  })
  assert.equal(lines.at(-1), 'ended')
  assert.match(await server.log(), /post-hook failed/)
})

test('hooks that cannot be used are faults of the configuration, all at once and each with its place', async (t) => {
  const { code, stderr } = await checkConfig(
    t,
    `tracker: { approval: none }
prehooks:
  - name: client approval
    options: { whitelist: [AZ3034], blacklist: [TR] }
  - name: interval variation
    options:
      modify_response_probability: 1.1
      max_increase_delta: 60
  - name: torrent approval
    options:
      blacklist: [${aa}, nonsense]
  - name: network aproval
  - name: rate limit
    options: { per_adress: { rate: 1 } }
posthooks:
  - name: statistics
`,
  )
  assert.equal(code, 78)
  const at = (line: number, column: number) => `server.yaml:${line + configHead}:${column} `
  for (const fault of [
    `${at(4, 5)}prehooks.0.options: using both whitelist and blacklist is invalid`,
    `${at(7, 7)}prehooks.1.options.modify_response_probability: invalid modify_response_probability`,
    `${at(11, 61)}prehooks.2.options.blacklist.1: Cannot read infohash "nonsense": need 40 hex digits`,
    `${at(12, 5)}prehooks.3.name: there is no such hook: need client approval, torrent approval`,
    `${at(14, 16)}prehooks.4.options.per_adress: there is no such setting`,
    `${at(16, 5)}posthooks.0.name: none ship with the tracker`,
  ])
    assert.ok(stderr.includes(fault), `${fault}\nis not in\n${stderr}`)
})

test('a module that is missing, or makes no hook, keeps the server from starting and is named', async (t) => {
  const directory = await temporaryDirectory(t)
  await writeFile(join(directory, 'nothing.mjs'), 'export const hook = 1\n')
  for (const [name, words] of [
    ['./missing.mjs', /Cannot load module .*missing\.mjs/],
    ['./nothing.mjs', /Cannot use module .*nothing\.mjs.*default export must be a function/],
  ] as const) {
    await assert.rejects(
      startTracker(t, `${open}prehooks: [{ name: ${name} }]\n`, { directory }),
      /ended with code 1/,
    )
    assert.match(await readFile(join(directory, 'server.log'), 'utf8'), words)
  }
})
