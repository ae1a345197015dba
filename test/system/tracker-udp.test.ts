import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { createHash, randomBytes, randomInt } from 'node:crypto'
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { before, test } from 'node:test'
import type { UdpTrackerOptions } from '../../lib/client/udp-tracker.ts'
import { createUdpTracker } from '../../lib/client/udp-tracker.ts'
import { formatEndpoint, parseCompactPeers } from '../../lib/protocol/address.ts'
import { encode } from '../../lib/protocol/bencode.ts'
import type { InfoHash } from '../../lib/protocol/infohash.ts'
import { writeTorrent } from '../../lib/protocol/metainfo.ts'
import type { UdpAnnounceFields } from '../../lib/protocol/udp.ts'
import {
  parseUdpAnnounceReply,
  parseUdpScrapeReply,
  udpReplyMax,
  writeUdpAnnounce,
  writeUdpConnect,
  writeUdpScrape,
} from '../../lib/protocol/udp.ts'
import { mintOffline } from '../../lib/token/offline.ts'
import { aria2Options, fetchWithLibtorrent, freePort } from '../support/foreign.ts'
import { makeTestKey } from '../support/key-server.ts'
import type { Address, TrackerProcess, UdpProbe } from '../support/tracker.ts'
import {
  announceFields,
  announceQuery,
  fileOwner,
  first,
  httpGet,
  startTracker,
  temporaryDirectory,
  testHash,
  udpError,
  udpProbe,
} from '../support/tracker.ts'
import { until } from '../support/until.ts'

// One server for all cases that leave each other alone: each has infohashes of its own.
const owner = fileOwner()
let server: TrackerProcess
let nextHash = 1
const newHash = () => testHash(nextHash++)
const families = [4, 6] as const

before(async () => {
  server = await startTracker(
    owner,
    `udp: { addr: ['127.0.0.1:0', '[::1]:0'] }
tracker: { approval: none, numwant_max: 1000, scrape_max: 500 }
`,
  )
})

const addressOf = (family: 4 | 6): Address => {
  const address = server.udp[family === 4 ? 0 : 1]
  assert.ok(address)
  return address
}
const transactionId = 0x0a0b0c0d
const announcePacket = (connectionId: Uint8Array, over: Partial<UdpAnnounceFields> = {}, urlData = '') =>
  writeUdpAnnounce({ connectionId, transactionId }, announceFields(over), urlData)
const scrapePacket = (connectionId: Uint8Array, infoHashes: readonly InfoHash[]) =>
  writeUdpScrape({ connectionId, transactionId }, infoHashes)
const url = ({ host, port }: Address) => `udp://${host.includes(':') ? `[${host}]` : host}:${port}`

function client(t: TestContext, address: Address, options: Partial<UdpTrackerOptions> = {}) {
  const tracker = createUdpTracker({ url: url(address), firstTimeoutMs: 5000, triesMax: 1, ...options })
  t.after(() => tracker[Symbol.asyncDispose]())
  return tracker
}

for (const family of families) {
  test(`our client connects, announces and scrapes over IPv${family}, and finds the others of its family`, async (t) => {
    const infoHash = newHash()
    const tracker = client(t, addressOf(family))
    const seeded = await tracker.announce(announceFields({ infoHash, port: 7001, left: 0, event: 'started' }))
    assert.deepEqual([seeded.complete, seeded.incomplete, seeded.peers.length], [1, 0, 0])
    const found = await tracker.announce(announceFields({ infoHash, port: 7002, event: 'started' }))
    assert.deepEqual([found.complete, found.incomplete], [1, 1])
    assert.deepEqual(
      found.peers.map(({ endpoint }) => formatEndpoint(endpoint)),
      [family === 4 ? '127.0.0.1:7001' : '[::1]:7001'],
    )
    assert.ok(found.intervalSeconds >= 5)
    await tracker.announce(announceFields({ infoHash, port: 7002, left: 0, event: 'completed' }))
    const unknown = newHash()
    const counts = await tracker.scrape([unknown, infoHash])
    assert.deepEqual(counts.get(infoHash), { complete: 2, downloaded: 1, incomplete: 0 })
    assert.deepEqual(counts.get(unknown), { complete: 0, downloaded: 0, incomplete: 0 })
    const gone = await tracker.announce(announceFields({ infoHash, port: 7001, left: 0, event: 'stopped' }))
    assert.deepEqual([gone.complete, gone.peers.length], [1, 0])
  })

  test(`replies over IPv${family} have the bytes of BEP 15`, async (t) => {
    const probe = await udpProbe(t, addressOf(family))
    const connected = await probe.ask(writeUdpConnect(0x01020304))
    assert.equal(connected.length, 16)
    assert.equal(connected.toString('hex', 0, 8), '0000000001020304')
    const id = connected.subarray(8)
    const infoHash = newHash()
    await probe.ask(announcePacket(id, { infoHash, port: 7001, left: 0 }))
    const reply = await probe.ask(announcePacket(id, { infoHash, port: 7002 }))
    assert.equal(reply.toString('hex', 0, 8), '000000010a0b0c0d')
    assert.deepEqual([reply.readUInt32BE(12), reply.readUInt32BE(16)], [1, 1], 'leechers, then seeders')
    assert.equal(
      reply.toString('hex', 20),
      family === 4 ? '7f0000011b59' : `${'00'.repeat(15)}011b59`,
      'the peer, in the family of the packet',
    )
    const scrape = await probe.ask(scrapePacket(id, [infoHash]))
    assert.equal(scrape.toString('hex'), '000000020a0b0c0d000000010000000000000001')
  })

  test(`the old IPv6 announce, action 4, is answered over IPv${family} with action 4 and peers of that family`, async (t) => {
    const probe = await udpProbe(t, addressOf(family))
    const id = await probe.connectionId()
    const infoHash = newHash()
    await probe.ask(announcePacket(id, { infoHash, port: 7001, left: 0 }))
    const reply = await probe.ask(oldAnnounce(announcePacket(id, { infoHash, port: 7002 })))
    assert.equal(reply.readUInt32BE(0), 4)
    assert.equal(reply.length, 20 + (family === 4 ? 6 : 18))
    const { peers } = parseUdpAnnounceReply(reply, family)
    assert.deepEqual(
      peers.map(({ endpoint }) => formatEndpoint(endpoint)),
      [family === 4 ? '127.0.0.1:7001' : '[::1]:7001'],
    )
  })

  test(`numwant over IPv${family}: -1 means 50, 0 none; no reply is larger than ${udpReplyMax[family]} bytes, and a peer that stops gets none`, async (t) => {
    const probe = await udpProbe(t, addressOf(family))
    const id = await probe.connectionId()
    const infoHash = newHash()
    for (let i = 0; i < 300; i++)
      await probe.ask(announcePacket(id, { infoHash, port: 8000 + i, left: i % 3, numwant: 0 }))
    const size = family === 4 ? 6 : 18
    const peersOf = async (over: Partial<UdpAnnounceFields>) => {
      const reply = await probe.ask(announcePacket(id, { infoHash, port: 7002, ...over }))
      assert.ok(reply.length <= udpReplyMax[family], `${reply.length} bytes`)
      assert.deepEqual([reply.readUInt32BE(0), reply.readUInt32BE(16)], [1, 100])
      const peers = parseCompactPeers(reply.subarray(20), family).map(formatEndpoint)
      assert.equal(new Set(peers).size, peers.length, 'no peer is there twice')
      assert.ok(!peers.some((peer) => peer.endsWith(':7002')), 'nor the announcer')
      return peers.length
    }
    const fits = Math.floor((udpReplyMax[family] - 20) / size)
    assert.equal(await peersOf({}), 50)
    assert.equal(await peersOf({ numwant: 0 }), 0)
    assert.equal(await peersOf({ numwant: 7 }), 7)
    assert.equal(await peersOf({ numwant: fits }), fits)
    assert.equal(await peersOf({ numwant: 300 }), fits)
    assert.equal(await peersOf({ numwant: 0xfffffffe }), fits)
    assert.equal(await peersOf({ event: 'stopped', numwant: 300 }), 0)
  })

  test(`a scrape over IPv${family} has no larger reply either, whatever tracker.scrape_max allows over HTTP`, async (t) => {
    const probe = await udpProbe(t, addressOf(family))
    const id = await probe.connectionId()
    const hashes = Array.from({ length: 500 }, () => testHash(randomInt(256)))
    const reply = await probe.ask(scrapePacket(id, hashes.slice(0, 74)))
    assert.equal(parseUdpScrapeReply(reply, 74).length, 74)
    for (const count of [75, 122, 123, 500]) {
      const refused = await probe.ask(scrapePacket(id, hashes.slice(0, count)))
      assert.equal(udpError(refused), 'too many infohashes: at most 74 in one scrape')
    }
    const many = await httpGet(
      first(server.http),
      `/scrape?${hashes
        .slice(0, 100)
        .map((hash) => `info_hash=${hash.replace(/../g, '%$&')}`)
        .join('&')}`,
    )
    assert.match(many.body, /^d5:filesd20:/)
  })

  test(`a sender without a connection id never gets more bytes than it sent, over IPv${family}`, async (t) => {
    const probe = await udpProbe(t, addressOf(family))
    const stranger = family === 4 ? await udpProbe(t, addressOf(4), { from: '127.0.0.2' }) : undefined
    let replies = 0
    const check = async (packet: Buffer) => {
      const answers = await probe.replies(packet)
      const bytes = answers.reduce((sum, { length }) => sum + length, 0)
      assert.ok(bytes <= packet.length, `${bytes} bytes for ${packet.length}: ${packet.toString('hex')}`)
      replies += answers.length
    }
    const connect = writeUdpConnect(1)
    assert.deepEqual(
      (await probe.replies(connect)).map(({ length }) => length),
      [16],
      '16 bytes for 16',
    )
    for (let length = 0; length <= 300; length++) {
      for (const action of [0, 1, 2, 3, 4, 5, randomInt(2 ** 32)]) {
        const packet = randomBytes(length)
        if (length >= 12) packet.writeUInt32BE(action, 8)
        await check(packet)
      }
      const padded = Buffer.alloc(length)
      connect.copy(padded)
      await check(padded)
      // One that was good, for somebody else.
      if (stranger && length % 10 === 0) {
        const announce = announcePacket(await stranger.connectionId())
        await check(announce.subarray(0, length))
      }
    }
    for (const length of [1400, 9000, 60_000]) {
      const packet = randomBytes(length)
      packet.writeUInt32BE(2, 8)
      await check(packet)
    }
    assert.ok(replies > 1000, 'most of them are told that their id is bad')
  })
}

/** The same with an IP field of 16 bytes. */
function oldAnnounce(packet: Buffer): Buffer {
  const old = Buffer.concat([packet.subarray(0, 84), Buffer.alloc(16), packet.subarray(88)])
  old.writeUInt32BE(4, 8)
  return old
}

test('packets that are no requests get no answer, and requests that cannot be read the words for it', async (t) => {
  const probe = await udpProbe(t, addressOf(4))
  const id = await probe.connectionId()
  for (const silent of [Buffer.alloc(0), Buffer.alloc(15), writeUdpConnect(7).fill(0, 0, 1).fill(1, 7, 8)])
    assert.deepEqual(await probe.replies(silent), [], silent.toString('hex'))
  const good = announcePacket(id)
  const withByte = (at: number, value: number) => {
    const packet = Buffer.from(good)
    packet.writeUInt32BE(value, at)
    return packet
  }
  const scrape = scrapePacket(id, [newHash()])
  const urlData = (...bytes: number[]) => Buffer.concat([good, Buffer.from(bytes)])
  const cases: readonly (readonly [string, Buffer, string])[] = [
    ['an announce that is cut', good.subarray(0, 97), 'malformed packet'],
    ['an old announce that is cut', oldAnnounce(good).subarray(0, 109), 'malformed packet'],
    ['an announce that ends behind its head', good.subarray(0, 16), 'malformed packet'],
    ['a scrape of nothing', scrape.subarray(0, 16), 'malformed packet'],
    ['a scrape of an infohash and a half', Buffer.concat([scrape, Buffer.alloc(10)]), 'malformed packet'],
    ['port 0', announcePacket(id, { port: 0 }), 'invalid port'],
    ['event 4', withByte(80, 4), 'malformed event ID'],
    ['event 2^32 - 1', withByte(80, 0xffffffff), 'malformed event ID'],
    ['an option without a length', urlData(2), 'malformed packet'],
    ['an option longer than the packet', urlData(2, 9, 0x2f), 'malformed packet'],
    ['URLData that is no path', urlData(2, 1, 0x78), 'malformed packet'],
    [
      'too many options',
      urlData(...Array.from({ length: 65 }, () => [2, 0]).flat()),
      'too many options: at most 64 in one announce',
    ],
    [
      'too long URLData',
      announcePacket(id, {}, `/${'a'.repeat(5200)}`),
      'URLData is too long: at most 5120 bytes',
    ],
    ['a broken escape', announcePacket(id, {}, '/?jwt=%0g'), 'invalid query escape'],
    ...[3, 5, 255, 0xffffffff].map(
      (action) => [`action ${action}`, withByte(8, action), 'unknown action ID'] as const,
    ),
  ]
  for (const [what, packet, words] of cases) {
    const [reply, ...more] = await probe.replies(packet)
    assert.equal(udpError(reply), words, what)
    assert.equal(reply?.readUInt32BE(4), transactionId, what)
    assert.deepEqual(more, [], what)
  }
  // What is not a fault: options of later times, padding, an end before rubbish.
  for (const packet of [urlData(1, 1, 1), urlData(0, 2, 255), urlData(0x7f, 3, 1, 2, 3), urlData(2, 0)])
    assert.equal((await probe.ask(packet)).readUInt32BE(0), 1, packet.toString('hex', 98))
})

test('a connection id is for its address, its server and its time', async (t) => {
  const address = addressOf(4)
  const owner = await udpProbe(t, address)
  const other = await udpProbe(t, address, { from: '127.0.0.2' })
  const id = await owner.connectionId()
  const infoHash = newHash()
  const verdict = async (probe: UdpProbe, connectionId: Uint8Array) => {
    const reply = await probe.ask(announcePacket(connectionId, { infoHash }))
    return reply.readUInt32BE(0) === 1 ? 'ok' : udpError(reply)
  }
  assert.equal(await verdict(owner, id), 'ok')
  assert.equal(await verdict(other, id), 'bad connection ID')
  assert.equal(await verdict(owner, await other.connectionId()), 'bad connection ID')
  for (const bad of [Buffer.alloc(8), randomBytes(8), Buffer.from(id).fill(id[7] === 0 ? 1 : 0, 7)])
    assert.equal(await verdict(owner, bad), 'bad connection ID')

  // Servers with the same secret take each other's ids, and no others.
  const shared =
    'udp: { addr: 127.0.0.1:0, private_key: a-secret-that-two-servers-share, connection_id_lifetime: 1s }'
  const [one, two] = await Promise.all(
    [1, 2].map(async () => startTracker(t, `${shared}\ntracker: { approval: none }\n`)),
  )
  assert.ok(one && two)
  const [atOne, atTwo] = [await udpProbe(t, first(one.udp)), await udpProbe(t, first(two.udp))]
  const sharedId = await atOne.connectionId()
  assert.equal(await verdict(atTwo, sharedId), 'ok')
  assert.equal(await verdict(owner, sharedId), 'bad connection ID')
  assert.equal(await verdict(atOne, id), 'bad connection ID')
  await until(
    'the shared id is refused',
    async () => (await verdict(atTwo, sharedId)) === 'bad connection ID',
  )
  assert.equal(await verdict(atTwo, await atTwo.connectionId()), 'ok', 'a new one is good')
  assert.ok(((await two.stats()).udp.dropped['bad_connection_id'] ?? 0) >= 1)
})

test('connection ids outlive a restart of the server', async (t) => {
  const directory = await temporaryDirectory(t)
  const yaml = 'tracker: { approval: none }\n'
  const before = await startTracker(t, yaml, { directory })
  const id = await (await udpProbe(t, first(before.udp))).connectionId()
  await before[Symbol.asyncDispose]()
  const again = await startTracker(t, yaml, { directory })
  const reply = await (await udpProbe(t, first(again.udp))).ask(announcePacket(id))
  assert.equal(reply.readUInt32BE(0), 1)
})

test('HTTP and UDP, IPv4 and IPv6 are one swarm; UDP hands out its own family', async (t) => {
  const infoHash = newHash()
  const [v4, v6] = [await udpProbe(t, addressOf(4)), await udpProbe(t, addressOf(6))]
  const path = `/announce?${announceQuery({ infoHash, port: 7001, left: 0 })}`
  assert.equal((await httpGet(first(server.http), path)).status, 200)
  const [id4, id6] = [await v4.connectionId(), await v6.connectionId()]
  await v6.ask(announcePacket(id6, { infoHash, port: 7006, left: 0 }))
  const reply4 = parseUdpAnnounceReply(await v4.ask(announcePacket(id4, { infoHash, port: 7002 })), 4)
  assert.deepEqual([reply4.complete, reply4.incomplete], [2, 1])
  assert.deepEqual(
    reply4.peers.map(({ endpoint }) => formatEndpoint(endpoint)),
    ['127.0.0.1:7001'],
  )
  const reply6 = parseUdpAnnounceReply(await v6.ask(announcePacket(id6, { infoHash, port: 7007 })), 6)
  assert.deepEqual(
    reply6.peers.map(({ endpoint }) => formatEndpoint(endpoint)),
    ['[::1]:7006'],
  )
})

test('the IP field counts from trusted announcers alone', async (t) => {
  const trusting = await startTracker(t, 'tracker: { approval: none, trusted_announcers: [127.0.0.2/32] }\n')
  const address = first(trusting.udp)
  const [trusted, stranger] = [
    await udpProbe(t, address, { from: '127.0.0.2' }),
    await udpProbe(t, address, { from: '127.0.0.3' }),
  ]
  const infoHash = newHash()
  for (const probe of [trusted, stranger]) {
    const packet = announcePacket(await probe.connectionId(), { infoHash, left: 0, ip: '10.1.2.3' })
    assert.equal((await probe.ask(packet)).readUInt32BE(0), 1)
  }
  const asking = announcePacket(await stranger.connectionId(), { infoHash, port: 7000 })
  const { peers } = parseUdpAnnounceReply(await stranger.ask(asking), 4)
  assert.deepEqual(peers.map(({ endpoint }) => formatEndpoint(endpoint)).sort(), [
    '10.1.2.3:6881',
    '127.0.0.3:6881',
  ])
})

test('several threads are one tracker: the same ports, connection ids and swarms', async (t) => {
  const threaded = await startTracker(t, 'workers: 3\ntracker: { approval: none }\n')
  const infoHash = newHash()
  const probes = await Promise.all(Array.from({ length: 24 }, () => udpProbe(t, first(threaded.udp))))
  const id = await first(probes).connectionId()
  // The kernel gives each socket one of the threads.
  for (const [i, probe] of probes.entries()) {
    const reply = await probe.ask(announcePacket(id, { infoHash, port: 7000 + i }))
    assert.deepEqual([reply.readUInt32BE(0), reply.readUInt32BE(12)], [1, i + 1])
  }
  const { leechers, udp } = await threaded.stats()
  assert.deepEqual([leechers, udp.connects, udp.dropped], [24, 1, {}])
})

const issuer = 'https://registry.example.com'

async function startTokenTracker(t: TestContext, more = '') {
  const directory = await temporaryDirectory(t)
  const key = makeTestKey('the-key')
  const [keyFile, keysFile] = [join(directory, 'key.pem'), join(directory, 'keys.json')]
  await writeFile(keyFile, key.privateKey.export({ format: 'pem', type: 'pkcs8' }))
  await writeFile(keysFile, JSON.stringify({ keys: [key.jwk] }))
  const tracker = await startTracker(
    t,
    `tokens: { issuer: ${issuer}, audience: ${issuer}, keys_file: ${keysFile} }
tracker: { scrape_networks: [127.0.0.2/32] }
${more}`,
    { directory },
  )
  const mint = async (infoHash: InfoHash, subject = 'a-host') =>
    (
      await mintOffline({
        keyFile,
        kid: 'the-key',
        issuer,
        audience: issuer,
        infoHash,
        subject,
        scopes: ['announce', 'scrape', 'webseed', 'peer'],
        rack: 'r17',
        cidr: '127.0.0.0/8',
        ttlMs: 600_000,
        now: Date.now,
      })
    ).token
  return { tracker, mint }
}

test('a token of 700 characters travels in three URLData options; a wrong one, or none, is refused in words', async (t) => {
  const { tracker, mint } = await startTokenTracker(t)
  const [infoHash, otherHash] = [newHash(), newHash()]
  const token = await mint(infoHash, `a-host-with-a-long-name.${'x'.repeat(70)}`)
  assert.ok(token.length > 650 && token.length < 750, `${token.length} characters`)
  const probe = await udpProbe(t, first(tracker.udp))
  const id = await probe.connectionId()
  const packet = announcePacket(id, { infoHash }, `/announce?jwt=${token}`)
  assert.equal(packet.length, 98 + 3 * 2 + '/announce?jwt='.length + token.length, 'three options')
  assert.equal((await probe.ask(packet)).readUInt32BE(0), 1)
  // However it is cut, and whatever stands between.
  const pieces = `/a?x=1&jwt=${token}`.match(/.{1,90}/g) ?? []
  const cut = Buffer.concat([
    announcePacket(id, { infoHash, port: 7002 }),
    ...pieces.map((piece) => Buffer.concat([Buffer.from([1, 2, piece.length]), Buffer.from(piece)])),
    Buffer.from([0, 255, 255]),
  ])
  assert.equal((await probe.ask(cut)).readUInt32BE(0), 1)

  const udp = client(t, first(tracker.udp))
  const ours = await udp.announce({ ...announceFields({ infoHash, port: 7003 }), jwt: token })
  assert.equal(ours.incomplete, 3)
  const [head = '', claims = '', signature = ''] = token.split('.')
  const wrong = {
    'another signature': `${head}.${claims}.${signature.startsWith('A') ? 'B' : 'A'}${signature.slice(1)}`,
    'a cut token': token.slice(0, -10),
    'no token': 'nonsense',
  }
  for (const [what, jwt] of Object.entries(wrong))
    await assert.rejects(
      udp.announce({ ...announceFields({ infoHash }), jwt }),
      { code: 'tracker_failure', message: 'unapproved request: invalid jwt' },
      what,
    )
  await assert.rejects(udp.announce({ ...announceFields({ infoHash: otherHash }), jwt: token }), {
    message: 'unapproved request: invalid jwt',
  })
  await assert.rejects(udp.announce(announceFields({ infoHash })), {
    message: 'unapproved request: missing jwt',
  })
  const { tokensRefused, leechers } = await tracker.stats()
  assert.equal(leechers, 3)
  assert.deepEqual(tokensRefused, { missing: 1, malformed: 1, bad_signature: 2, wrong_infohash: 1 })
})

test('a scrape over UDP cannot carry a token, so it is for the networks of tracker.scrape_networks alone', async (t) => {
  const { tracker, mint } = await startTokenTracker(t)
  const infoHash = newHash()
  const address = first(tracker.udp)
  const stranger = client(t, address)
  await stranger.announce({ ...announceFields({ infoHash }), jwt: await mint(infoHash) })
  await assert.rejects(stranger.scrape([infoHash]), { message: 'unapproved request: missing jwt' })
  const monitor = client(t, address, { localAddress: '127.0.0.2' })
  const counts = await monitor.scrape([infoHash])
  assert.deepEqual(counts.get(infoHash), { complete: 0, downloaded: 0, incomplete: 1 })
  await assert.rejects(monitor.announce(announceFields({ infoHash })), {
    message: 'unapproved request: missing jwt',
  })
})

test('aria2 and libtorrent find each other through a UDP tracker', async (t) => {
  const tracker = await startTracker(t, 'tracker: { approval: none }\nmin_announce_interval: 1s\n')
  const directory = await temporaryDirectory(t)
  const [seed, fetched] = [join(directory, 'seed'), join(directory, 'fetched')]
  await mkdir(seed)
  await mkdir(fetched)
  const bytes = randomBytes(600_000)
  const name = 'build.tar'
  await writeFile(join(seed, name), bytes)
  const pieceLength = 256 * 1024
  const pieces = Buffer.concat(
    Array.from({ length: Math.ceil(bytes.length / pieceLength) }, (_, i) =>
      createHash('sha1')
        .update(bytes.subarray(i * pieceLength, (i + 1) * pieceLength))
        .digest(),
    ),
  )
  const info = encode({ length: bytes.length, name, 'piece length': pieceLength, pieces, private: 1 })
  const torrent = join(directory, 'build.torrent')
  await writeFile(torrent, writeTorrent(info, { announce: `${url(first(tracker.udp))}/announce` }))
  // aria2 asks UDP trackers on the socket of its DHT, which it must have for that; a private torrent does not use it otherwise.
  const dht = [
    '--enable-dht=true',
    `--dht-listen-port=${await freePort()}`,
    `--dht-file-path=${join(directory, 'dht')}`,
  ]
  const seeding = [
    `--listen-port=${await freePort()}`,
    `--dir=${seed}`,
    '--seed-ratio=0.0',
    '--check-integrity=true',
  ]
  const seeder = spawn('aria2c', [...aria2Options, ...dht, ...seeding, torrent], { stdio: 'ignore' })
  t.after(() => void seeder.kill('SIGKILL'))
  await until('the seeder is counted', async () => (await tracker.stats()).seeders === 1)
  const { child, done } = await fetchWithLibtorrent(fetched, torrent)
  t.after(() => void child.kill('SIGKILL'))
  await done
  assert.ok((await readFile(join(fetched, name))).equals(bytes))
  const { udp } = await tracker.stats()
  assert.ok(udp.connects >= 2)
  assert.deepEqual(udp.dropped, {})
})
