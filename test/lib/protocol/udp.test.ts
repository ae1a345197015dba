import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { Family } from '../../../lib/protocol/address.ts'
import { formatEndpoint, formatIp } from '../../../lib/protocol/address.ts'
import type { Announce } from '../../../lib/protocol/announce.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import { infoHashFromBytes, infoHashFromHex, infoHashToHex } from '../../../lib/protocol/infohash.ts'
import { parseQuery } from '../../../lib/protocol/query.ts'
import type { UdpAnnounceFields } from '../../../lib/protocol/udp.ts'
import {
  parseUdpAnnounce as parsePacket,
  parseUdpAnnounceReply,
  parseUdpConnectReply,
  parseUdpOptions,
  parseUdpScrape,
  parseUdpScrapeReply,
  readUdpAction,
  readUdpReplyTransactionId,
  readUdpTransactionId,
  udpActions,
  udpReplyMax,
  udpScrapeMax,
  writeUdpAnnounce,
  writeUdpAnnounceHeader,
  writeUdpConnect,
  writeUdpConnectReply,
  writeUdpError,
  writeUdpScrape,
  writeUdpScrapeReply,
} from '../../../lib/protocol/udp.ts'
import { answersOrRefuses, fuzzRuns, spoilt } from '../../support/fuzz.ts'

const families: readonly Family[] = [4, 6]
const connectionId = Buffer.from('c0c1c2c3c4c5c6c7', 'hex')
const transactionId = 0xd0d1d2d3
const hash = '0102030405060708090a0b0c0d0e0f1011121314'
const otherHash = 'f1f2f3f4f5f6f7f8f9fafbfcfdfeff0011223344'
const peerId = Buffer.from('-RS0001-abcdefghijkl')
const ids = { connectionId, transactionId }
const fields: UdpAnnounceFields = {
  infoHash: infoHashFromHex(hash),
  peerId,
  port: 6881,
  uploaded: 3,
  downloaded: 0x1_0000_0001,
  left: 2,
  event: 'started',
}
const parsed = {
  infoHash: fields.infoHash,
  peerId,
  port: 6881,
  uploaded: 3,
  downloaded: 0x1_0000_0001,
  left: 2,
  event: 'started',
  numwant: undefined,
  compact: true,
  ip: undefined,
  ipv4: undefined,
  ipv6: undefined,
  trackerId: undefined,
  jwt: undefined,
  rackswarm: false,
}
const announceHead = `c0c1c2c3c4c5c6c7 00000001 d0d1d2d3 ${hash} ${peerId.toString('hex')}
  0000000100000001 0000000000000002 0000000000000003 00000002`
const oldAnnounceHead = announceHead.replace('00000001 d0d1d2d3', '00000004 d0d1d2d3')
const plainAnnounce = bytes(`${announceHead} 00000000 00000000 ffffffff 1ae1`)
const oldAnnounce = bytes(`${oldAnnounceHead} ${'00'.repeat(16)} 00000000 ffffffff 1ae1`)

/** What an announce says, as plain fields. */
function parseUdpAnnounce(packet: Buffer, family: 4 | 6): Announce {
  const { infoHash, peerId, port, uploaded, downloaded, left, event, numwant, ...rest } = parsePacket(
    packet,
    family,
  )
  const { compact, ip, ipv4, ipv6, trackerId, jwt, rackswarm } = rest
  const ids = { infoHash, peerId, port, uploaded, downloaded, left, event, numwant }
  return { ...ids, compact, ip, ipv4, ipv6, trackerId, jwt, rackswarm }
}

test('a connect is 16 bytes with the protocol id, and its reply 16 with the connection id', () => {
  const request = bytes('0000041727101980 00000000 d0d1d2d3')
  assert.deepEqual(writeUdpConnect(transactionId), request)
  assert.equal(readUdpAction(request), udpActions.connect)
  assert.equal(readUdpTransactionId(request), transactionId)
  const reply = written((target) => writeUdpConnectReply(target, 0, transactionId, connectionId))
  assert.deepEqual(reply, bytes('00000000 d0d1d2d3 c0c1c2c3c4c5c6c7'))
  assert.equal(readUdpReplyTransactionId(reply), transactionId)
  assert.deepEqual(parseUdpConnectReply(reply), Uint8Array.from(connectionId))
})

test('what is too short for a request, or connects without the protocol id, has no action', () => {
  const request = writeUdpConnect(transactionId)
  for (let length = 0; length < 16; length++)
    assert.equal(readUdpAction(request.subarray(0, length)), undefined)
  for (let at = 0; at < 8; at++) {
    const changed = Buffer.from(request)
    changed[at] = (changed[at] ?? 0) ^ 0x80
    assert.equal(readUdpAction(changed), undefined, `byte ${at}`)
  }
  assert.equal(readUdpAction(bytes('0000000000000000 00000009 00000000')), 9)
  assert.equal(readUdpAction(Buffer.concat([request, Buffer.alloc(4)])), udpActions.connect, 'longer')
})

test('an announce has its fields where BEP 15 says, in packets of both families', () => {
  assert.deepEqual(writeUdpAnnounce(ids, fields), plainAnnounce)
  assert.equal(plainAnnounce.length, 98)
  for (const family of families) assert.deepEqual(parseUdpAnnounce(plainAnnounce, family), parsed)
  const all = bytes(`${announceHead.replace(/00000002$/, '00000003')} 0a010203 a0a1a2a3 00000007 ffff`)
  assert.deepEqual(
    writeUdpAnnounce(ids, {
      ...fields,
      event: 'stopped',
      ip: '10.1.2.3',
      key: 0xa0a1a2a3,
      numwant: 7,
      port: 65535,
    }),
    all,
  )
  assert.deepEqual(parseUdpAnnounce(all, 4), {
    ...parsed,
    event: 'stopped',
    ip: '10.1.2.3',
    numwant: 7,
    port: 65535,
  })
})

test('the old IPv6 announce has 16 bytes of address, in packets of both families', () => {
  assert.equal(oldAnnounce.length, 110)
  assert.equal(readUdpAction(oldAnnounce), udpActions.oldIpv6Announce)
  for (const family of families) assert.deepEqual(parseUdpAnnounce(oldAnnounce, family), parsed)
  const withOptions = Buffer.concat([oldAnnounce, bytes('0207'), Buffer.from('/?jwt=x')])
  assert.equal(parseUdpAnnounce(withOptions, 6).jwt, 'x')
  assert.throws(() => parseUdpAnnounce(oldAnnounce.subarray(0, 109), 6), /^ClientError: malformed packet$/)
})

test('a claimed address counts only in a packet of its family, so that peers of one size can answer it', () => {
  const claim = (address: string, family: Family) =>
    parseUdpAnnounce(
      address.length === 8
        ? bytes(`${announceHead} ${address} 00000000 ffffffff 1ae1`)
        : bytes(`${oldAnnounceHead} ${address} 00000000 ffffffff 1ae1`),
      family,
    ).ip
  assert.equal(claim('0a010203', 4), '10.1.2.3')
  assert.equal(claim('0a010203', 6), undefined)
  const v6 = '20010db8000000000000000000000007'
  assert.equal(claim(v6, 6), '2001:db8::7')
  assert.equal(claim(v6, 4), undefined)
  const tail = '00000000000000000000000000000001'
  assert.equal(claim(tail, 6), '::1')
  const mapped = '00000000000000000000ffff0a010203'
  assert.equal(claim(mapped, 4), '10.1.2.3')
  assert.equal(claim(mapped, 6), undefined)
})

test('events are 0 to 3, over all 32 bits', () => {
  const withEvent = (event: string) =>
    parseUdpAnnounce(bytes(`${announceHead.replace(/00000002$/, event)} 00000000 00000000 ffffffff 1ae1`), 4)
  assert.equal(withEvent('00000000').event, undefined)
  assert.equal(withEvent('00000001').event, 'completed')
  assert.equal(withEvent('00000002').event, 'started')
  assert.equal(withEvent('00000003').event, 'stopped')
  for (const event of ['00000004', '00000100', '01000001', 'ffffffff'])
    assert.throws(() => withEvent(event), { code: 'bad_parameter', message: 'malformed event ID' }, event)
})

test('each malformed announce is refused by name', () => {
  for (let length = 16; length < 98; length++)
    assert.throws(() => parseUdpAnnounce(plainAnnounce.subarray(0, length), 4), {
      code: 'bad_packet',
      message: 'malformed packet',
    })
  assert.throws(() => parseUdpAnnounce(writeUdpAnnounce(ids, { ...fields, port: 0 }), 4), {
    code: 'bad_parameter',
    message: 'invalid port',
  })
})

test('64-bit numbers of clients that do not know them are large, not negative', () => {
  const packet = Buffer.from(plainAnnounce)
  packet.fill(0xff, 64, 72)
  assert.equal(parseUdpAnnounce(packet, 4).left, 2 ** 64)
})

/** Options behind an announce, and the parameters they carry. */
const optionRows: readonly [string, Record<string, string> | 'malformed packet'][] = [
  [`0205${hex('/?a=b')}`, { a: 'b' }],
  ['0200', {}],
  ['0201', 'malformed packet'],
  ['02', 'malformed packet'],
  [`0208${hex('/c/d?a=b')}`, { a: 'b' }],
  [`0202${hex('/?')}0203${hex('a=b')}`, { a: 'b' }],
  [`0209${hex('/?a=b%20c')}`, { a: 'b c' }],
  ['', {}],
  ['00', {}],
  ['01', {}],
  [`0202${hex('/?')}01010203${hex('a=b')}01`, { a: 'b' }],
  [`0205${hex('/?a=b')}00`, { a: 'b' }],
  [`000205${hex('/?a=b')}`, {}],
  [`0202${hex('/?')}000203${hex('a=b')}`, {}],
  [`0205${hex('/?a=b')}0002ff`, { a: 'b' }],
  [`7f03aabbcc0205${hex('/?a=b')}`, { a: 'b' }],
  [`0202${hex('/?')}7f00ff020000 0203${hex('a=b')}`, { a: 'b' }],
  ['7f', 'malformed packet'],
  ['7f03aabb', 'malformed packet'],
  [`0205${hex('/?a=b')}7f01`, 'malformed packet'],
  [`0206${hex('/?a=b')}`, 'malformed packet'],
  [`0203${hex('a=b')}`, 'malformed packet'],
  [`0204${hex('?a=b')}`, 'malformed packet'],
  [`0200 0205${hex('/?a=b')}`, { a: 'b' }],
  [`0201${hex('/')}`, {}],
  [`0209${hex('/announce')}`, {}],
]

test('BEP 41 options are read: URLData in pieces, NOPs, the end, and unknown ones that are stepped over', () => {
  for (const [options, wanted] of optionRows) {
    for (const head of [plainAnnounce, oldAnnounce]) {
      const packet = Buffer.concat([head, bytes(options)])
      const read = () => Object.fromEntries(parseUdpOptions(packet, head.length) ?? [])
      if (wanted === 'malformed packet') {
        assert.throws(read, { code: 'bad_packet', message: wanted }, options)
        assert.throws(() => parseUdpAnnounce(packet, 4), { code: 'bad_packet', message: wanted }, options)
      } else {
        assert.deepEqual(read(), wanted, options)
        assert.deepEqual(parseUdpAnnounce(packet, 4), parsed, options)
      }
    }
  }
})

test('a token reaches UDP in options, a short one and one of 700 characters in three', () => {
  const announceOf = (urlData: string) => parseUdpAnnounce(writeUdpAnnounce(ids, fields, urlData), 4)
  assert.deepEqual(announceOf('/announce?jwt=a.b-c_d'), { ...parsed, jwt: 'a.b-c_d' })
  assert.deepEqual(announceOf('/?trackerid=a%26b&jwt=x'), { ...parsed, trackerId: 'a&b', jwt: 'x' })
  const token = 'eyJhbGciOi.'.repeat(70).slice(0, 700)
  const packet = writeUdpAnnounce(ids, fields, `/announce?jwt=${token}`)
  assert.equal(packet.length, 98 + 3 * 2 + '/announce?jwt='.length + 700)
  assert.deepEqual([...packet.subarray(98, 100)], [2, 255])
  assert.deepEqual([...packet.subarray(98 + 257, 98 + 259)], [2, 255])
  assert.deepEqual([...packet.subarray(98 + 514, 98 + 516)], [2, 714 - 510])
  assert.equal(parseUdpAnnounce(packet, 6).jwt, token)
  assert.throws(() => announceOf('/?jwt=%zz'), { code: 'bad_query', message: 'invalid query escape' })
})

test('the largest token fits, and beyond it options are bounded in bytes and in number', () => {
  const announceOf = (urlData: string) => parseUdpAnnounce(writeUdpAnnounce(ids, fields, urlData), 4)
  const token = 'x'.repeat(4096)
  assert.equal(announceOf(`/announce?trackerid=${'y'.repeat(900)}&jwt=${token}`).jwt, token)
  assert.equal(announceOf(`/?jwt=${'x'.repeat(5120 - 6)}`).jwt?.length, 5120 - 6)
  assert.throws(() => announceOf(`/?jwt=${'x'.repeat(5120 - 5)}`), {
    code: 'bad_packet',
    message: 'URLData is too long: at most 5120 bytes',
  })
  const pieces = (count: number) => Buffer.concat([plainAnnounce, Buffer.alloc(2 * count, bytes('0200'))])
  assert.deepEqual(parseUdpAnnounce(pieces(64), 4), parsed)
  assert.throws(() => parseUdpAnnounce(pieces(65), 4), {
    code: 'bad_packet',
    message: 'too many options: at most 64 in one announce',
  })
  // Padding is not counted: a whole datagram of it is read.
  assert.deepEqual(parseUdpAnnounce(Buffer.concat([plainAnnounce, Buffer.alloc(65_000, 1)]), 4), parsed)
})

test('an announce that is written is read back', () => {
  const announce = fc.record({
    infoHash: infoHashes(),
    peerId: fixed(20),
    port: fc.integer({ min: 1, max: 65535 }),
    uploaded: fc.maxSafeNat(),
    downloaded: fc.maxSafeNat(),
    left: fc.maxSafeNat(),
    event: fc.constantFrom(undefined, 'started' as const, 'stopped' as const, 'completed' as const),
    numwant: fc.option(fc.integer({ min: 0, max: 0xffff_fffe }), { nil: undefined }),
    ip: fc.option(
      fixed(4)
        .filter((address) => address.some((byte) => byte !== 0))
        .map((address) => formatIp({ family: 4, bytes: address })),
      { nil: undefined },
    ),
  })
  const token = fc.option(
    fc.string({ unit: fc.constantFrom('a', 'Z', '0', '-', '_', '.'), minLength: 1, maxLength: 900 }),
    {
      nil: undefined,
    },
  )
  fc.assert(
    fc.property(announce, token, fixed(8), fc.nat(), (wanted, jwt, id, tid) => {
      const requestIds = { connectionId: id, transactionId: tid }
      const urlData = jwt === undefined ? undefined : `/announce?jwt=${jwt}`
      const packet = writeUdpAnnounce(requestIds, wanted, urlData)
      assert.equal(readUdpAction(packet), udpActions.announce)
      assert.equal(readUdpTransactionId(packet), tid)
      assert.deepEqual(packet.subarray(0, 8), Buffer.from(id))
      const read = parseUdpAnnounce(packet, 4)
      assert.deepEqual(
        { ...read, peerId: Buffer.from(read.peerId) },
        {
          ...parsed,
          ...wanted,
          peerId: Buffer.from(wanted.peerId),
          jwt,
        },
      )
      // And what was read is written to the same bytes.
      assert.deepEqual(writeUdpAnnounce(requestIds, read, urlData), packet)
    }),
  )
})

test('an announce reply has its fields where BEP 15 says: 6 bytes a peer over IPv4, 18 over IPv6', () => {
  const head = { transactionId, intervalSeconds: 1800, leechers: 5, seeders: 0x01020304 }
  const reply = (action: number, peers: string) =>
    written((target) => {
      const at = writeUdpAnnounceHeader(target, 0, { ...head, action })
      return at + bytes(peers).copy(target, at)
    })
  const peers4 = '0a010203 1ae1 0a010204 0001'
  const peers6 = '20010db8000000000000000000000007 1ae1'
  const golden = (action: string, peers: string) =>
    bytes(`${action} d0d1d2d3 00000708 00000005 01020304 ${peers}`)
  assert.deepEqual(reply(udpActions.announce, peers4), golden('00000001', peers4))
  assert.deepEqual(reply(udpActions.oldIpv6Announce, peers4), golden('00000004', peers4))
  assert.deepEqual(reply(udpActions.announce, peers6), golden('00000001', peers6))
  assert.deepEqual(reply(udpActions.oldIpv6Announce, peers6), golden('00000004', peers6))
  const common = {
    complete: 0x01020304,
    incomplete: 5,
    intervalSeconds: 1800,
    minIntervalSeconds: 1800,
    trackerId: undefined,
    rackswarm: undefined,
  }
  for (const action of [udpActions.announce, udpActions.oldIpv6Announce]) {
    const { peers: over4, ...rest4 } = parseUdpAnnounceReply(reply(action, peers4), 4)
    assert.deepEqual(
      over4.map(({ endpoint }) => formatEndpoint(endpoint)),
      ['10.1.2.3:6881', '10.1.2.4:1'],
    )
    assert.deepEqual(rest4, common)
    const { peers: over6, ...rest6 } = parseUdpAnnounceReply(reply(action, peers6), 6)
    assert.deepEqual(
      over6.map(({ endpoint }) => formatEndpoint(endpoint)),
      ['[2001:db8::7]:6881'],
    )
    assert.deepEqual(
      over6.map(({ distance }) => distance),
      [255],
    )
    assert.deepEqual(rest6, common)
  }
  assert.deepEqual(parseUdpAnnounceReply(reply(udpActions.announce, ''), 6).peers, [])
})

test('a full reply of each family stays within one packet', () => {
  assert.equal(udpReplyMax[4] + 20 + 8, 1500)
  assert.equal(udpReplyMax[6] + 40 + 8, 1280)
  assert.ok(8 + 12 * udpScrapeMax <= udpReplyMax[6])
})

test('a scrape and its reply have their fields where BEP 15 says', () => {
  const asked = [infoHashFromHex(hash), infoHashFromHex(otherHash)]
  const request = bytes(`c0c1c2c3c4c5c6c7 00000002 d0d1d2d3 ${hash} ${otherHash}`)
  assert.deepEqual(writeUdpScrape(ids, asked), request)
  assert.equal(readUdpAction(request), udpActions.scrape)
  assert.deepEqual(parseUdpScrape(request, 2), { infoHashes: asked, jwt: undefined })
  const swarms = [
    { complete: 1, downloaded: 2, incomplete: 3 },
    { complete: 0x01020304, downloaded: 2 ** 40, incomplete: 0 },
  ]
  const reply = written((target) => writeUdpScrapeReply(target, 0, transactionId, swarms))
  assert.deepEqual(reply, bytes('00000002 d0d1d2d3 00000001 00000002 00000003 01020304 ffffffff 00000000'))
  assert.deepEqual(parseUdpScrapeReply(reply, 2), [swarms[0], { ...swarms[1], downloaded: 0xffffffff }])
  assert.deepEqual(parseUdpScrapeReply(reply.subarray(0, 20), 2), [swarms[0]], 'a tracker that cuts')
})

test('a scrape is refused that names no infohash, a part of one, or too many', () => {
  const scrape = (count: number) =>
    writeUdpScrape(ids, new Array<InfoHash>(count).fill(infoHashFromHex(hash)))
  for (const length of [16, 17, 35, 37, 55])
    assert.throws(() => parseUdpScrape(scrape(2).subarray(0, length), 74), {
      code: 'bad_packet',
      message: 'malformed packet',
    })
  assert.equal(parseUdpScrape(scrape(74), 74).infoHashes.length, 74)
  assert.throws(() => parseUdpScrape(scrape(75), 74), {
    code: 'bad_scrape',
    message: 'too many infohashes: at most 74 in one scrape',
  })
})

test('an error is its text and a zero byte, cut to what the caller allows', () => {
  const error = (text: string, max: number) =>
    written((target) => writeUdpError(target, 0, transactionId, text, max))
  const reply = error('bad connection ID', 1472)
  assert.deepEqual(reply, bytes(`00000003 d0d1d2d3 ${hex('bad connection ID')} 00`))
  for (const parse of [
    () => parseUdpConnectReply(reply),
    () => parseUdpAnnounceReply(reply, 4),
    () => parseUdpScrapeReply(reply, 1),
  ])
    assert.throws(parse, { code: 'tracker_failure', message: 'bad connection ID' })
  assert.deepEqual(error('bad connection ID', 16), bytes(`00000003 d0d1d2d3 ${hex('bad con')} 00`))
  assert.deepEqual(error('häßlich', 12), bytes(`00000003 d0d1d2d3 ${hex('hä')} 00`), 'between characters')
  assert.deepEqual(error('', 16), bytes('00000003 d0d1d2d3 00'))
  fc.assert(
    fc.property(
      fc.string({ unit: fc.constantFrom('a', 'ä', '€', '😀') }),
      fc.integer({ min: 9, max: 60 }),
      (text, max) => {
        assert.ok(error(text, max).length <= max)
      },
    ),
  )
  // Without the zero byte, as other trackers send it.
  const open = bytes(`00000003 d0d1d2d3 ${hex('no')}`)
  assert.throws(() => parseUdpConnectReply(open), { code: 'tracker_failure', message: 'no' })
  const long = Buffer.concat([bytes('00000003 d0d1d2d3'), Buffer.alloc(60_000, 'x')])
  assert.throws(() => parseUdpConnectReply(long), { message: 'x'.repeat(512) })
})

test('replies are written where the caller wants them', () => {
  const target = Buffer.alloc(100, 0xee)
  assert.equal(writeUdpConnectReply(target, 3, transactionId, connectionId), 19)
  assert.deepEqual(target.subarray(3, 19), bytes('00000000 d0d1d2d3 c0c1c2c3c4c5c6c7'))
  const header = { action: 1, transactionId, intervalSeconds: 1, leechers: 2, seeders: 3 }
  assert.equal(writeUdpAnnounceHeader(target, 19, header), 39)
  const swarm = { complete: 1, downloaded: 2, incomplete: 3 }
  assert.equal(writeUdpScrapeReply(target, 39, transactionId, [swarm]), 59)
  assert.equal(writeUdpError(target, 59, transactionId, 'no', 100), 70)
  assert.deepEqual(target.subarray(59, 70), bytes(`00000003 d0d1d2d3 ${hex('no')} 00`))
  assert.equal(target.toString('hex', 0, 3) + target.toString('hex', 70), 'ee'.repeat(33))
})

test('replies of the wrong kind or length are refused', () => {
  const connect = bytes('00000000 d0d1d2d3 c0c1c2c3c4c5c6c7')
  const announce = bytes('00000001 d0d1d2d3 00000708 00000005 00000004 0a0102031ae1')
  const scrape = bytes('00000002 d0d1d2d3 00000001 00000002 00000003')
  const bad = { name: 'ClientError', code: 'bad_reply' }
  for (const wrong of [announce, scrape, connect.subarray(0, 15), connect.subarray(0, 7)])
    assert.throws(() => parseUdpConnectReply(wrong), bad)
  for (const wrong of [connect, scrape, announce.subarray(0, 25), announce.subarray(0, 19), Buffer.alloc(0)])
    assert.throws(() => parseUdpAnnounceReply(wrong, 4), bad)
  assert.throws(() => parseUdpAnnounceReply(announce, 6), bad)
  for (const wrong of [connect, announce, scrape.subarray(0, 19), scrape.subarray(0, 7)])
    assert.throws(() => parseUdpScrapeReply(wrong, 1), bad)
  assert.throws(() => parseUdpScrapeReply(scrape, 0), bad, 'more than were asked for')
  assert.equal(readUdpReplyTransactionId(connect.subarray(0, 7)), undefined)
})

test('reply parsers answer or throw ClientError, whatever the bytes', () => {
  const good = [
    bytes('00000000 d0d1d2d3 c0c1c2c3c4c5c6c7'),
    bytes('00000001 d0d1d2d3 00000708 00000005 00000004 0a0102031ae1'),
    bytes('00000002 d0d1d2d3 00000001 00000002 00000003'),
    bytes('00000003 d0d1d2d3 6e6f00'),
  ]
  const parsers = [
    parseUdpConnectReply,
    (packet: Buffer) => parseUdpAnnounceReply(packet, 4),
    (packet: Buffer) => parseUdpAnnounceReply(packet, 6),
    (packet: Buffer) => parseUdpScrapeReply(packet, 3),
  ]
  answersOrRefuses(fc.tuple(spoilt(good), fc.constantFrom(...parsers)), ([packet, parse]) =>
    parse(Buffer.from(packet)),
  )
})

test('100,000 random and spoilt packets get the verdict of a second, plain parser', () => {
  const random = generator(Math.floor(Math.random() * 2 ** 32))
  const good = [
    plainAnnounce,
    oldAnnounce,
    writeUdpAnnounce(ids, { ...fields, ip: '10.1.2.3', numwant: 0 }, '/announce?jwt=a.b.c'),
    writeUdpAnnounce(ids, fields, `/?trackerid=x%20y&jwt=${'t'.repeat(700)}`),
    Buffer.concat([oldAnnounce, bytes(`7f02ffff01010202${hex('/?')}0205${hex('jwt=x')}00`)]),
    writeUdpScrape(ids, [infoHashFromHex(hash)]),
    writeUdpScrape(ids, [infoHashFromHex(hash), infoHashFromHex(otherHash)]),
    writeUdpConnect(transactionId),
  ]
  const verdicts = new Map<string, number>()
  // Fewer would not go everywhere.
  const runs = Math.max(fuzzRuns * 10, 20_000)
  for (let run = 0; run < runs; run++) {
    const packet = spoil(good[random(good.length)] ?? plainAnnounce, random)
    const family = families[random(2)] ?? 4
    const verdict = verdictOf(() => answer(packet, family))
    const wanted = verdictOf(() => plainAnswer(packet, family))
    if (!same(verdict, wanted))
      assert.deepEqual(verdict, wanted, `family ${family}, packet ${packet.toString('hex')}`)
    const kind = typeof verdict === 'string' ? verdict : 'answer'
    verdicts.set(kind, (verdicts.get(kind) ?? 0) + 1)
  }
  // Without each of these the agreement would mean little.
  for (const kind of [
    'answer',
    'malformed packet',
    'malformed event ID',
    'invalid port',
    'invalid query escape',
    'too many infohashes: at most 1 in one scrape',
  ])
    assert.ok((verdicts.get(kind) ?? 0) > 0, `${kind} in ${JSON.stringify([...verdicts])}`)
})

type Fields = Record<string, unknown>

function answer(packet: Buffer, family: Family): Fields {
  const action = readUdpAction(packet)
  if (action === undefined) return { silence: true }
  const head = { action, transactionId: readUdpTransactionId(packet) }
  switch (action) {
    case udpActions.announce:
    case udpActions.oldIpv6Announce:
      return { ...head, ...plain(parseUdpAnnounce(packet, family)) }
    case udpActions.scrape:
      return { ...head, infoHashes: parseUdpScrape(packet, 1).infoHashes.map(infoHashToHex).join() }
    default:
      return head
  }
}

function plain(announce: Announce): Fields {
  return {
    ...announce,
    infoHash: infoHashToHex(announce.infoHash),
    peerId: Buffer.from(announce.peerId).toString('hex'),
  }
}

/** The same, without any thought of speed. */
function plainAnswer(packet: Buffer, family: Family): Fields {
  if (packet.length < 16) return { silence: true }
  const action = packet.readUInt32BE(8)
  if (action === 0 && packet.toString('hex', 0, 8) !== '0000041727101980') return { silence: true }
  const head = { action, transactionId: packet.readUInt32BE(12) }
  if (action === 2) {
    const hashes = packet.toString('hex', 16)
    if (hashes === '' || hashes.length % 40 !== 0) throw new Error('malformed packet')
    if (hashes.length > 40) throw new Error('too many infohashes: at most 1 in one scrape')
    return { ...head, infoHashes: hashes }
  }
  if (action !== 1 && action !== 4) return head
  const ipBytes = action === 1 ? 4 : 16
  if (packet.length < 94 + ipBytes) throw new Error('malformed packet')
  const event = packet.readUInt32BE(80)
  if (event > 3) throw new Error('malformed event ID')
  const port = packet.readUInt16BE(92 + ipBytes)
  if (port === 0) throw new Error('invalid port')
  const parameters = parametersOf(packet.subarray(94 + ipBytes))
  const numwant = packet.readInt32BE(88 + ipBytes)
  return {
    ...head,
    infoHash: packet.toString('hex', 16, 36),
    peerId: packet.toString('hex', 36, 56),
    port,
    downloaded: Number(packet.readBigUInt64BE(56)),
    left: Number(packet.readBigUInt64BE(64)),
    uploaded: Number(packet.readBigUInt64BE(72)),
    event: [undefined, 'completed', 'started', 'stopped'][event],
    numwant: numwant === -1 ? undefined : numwant >>> 0,
    compact: true,
    ip: plainIp(packet.toString('hex', 84, 84 + ipBytes), family),
    ipv4: undefined,
    ipv6: undefined,
    trackerId: parameters['trackerid'],
    jwt: parameters['jwt'],
    rackswarm: false,
  }
}

function plainIp(field: string, family: Family): string | undefined {
  if (/^0*$/.test(field)) return undefined
  const v4 = field.length === 8 ? field : /^0{20}ffff(.{8})$/.exec(field)?.[1]
  if (v4 === undefined)
    return family === 6 ? formatIp({ family, bytes: Buffer.from(field, 'hex') }) : undefined
  return family === 4 ? Buffer.from(v4, 'hex').join('.') : undefined
}

/** BEP 41, one option after the other. */
function parametersOf(options: Buffer): Record<string, string> {
  let urlData = ''
  let rest = [...options]
  let count = 0
  while (rest.length > 0) {
    const [type, length, ...data] = rest
    if (type === 0) break
    if (type === 1) {
      rest = rest.slice(1)
      continue
    }
    if (++count > 64) throw new Error('too many options: at most 64 in one announce')
    if (length === undefined || data.length < length) throw new Error('malformed packet')
    if (type === 2) urlData += String.fromCharCode(...data.slice(0, length))
    rest = data.slice(length)
  }
  if (urlData.length > 5120) throw new Error('URLData is too long: at most 5120 bytes')
  if (!/^(\/|$)/.test(urlData)) throw new Error('malformed packet')
  return Object.fromEntries(parseQuery(/\?([^]*)$/.exec(urlData)?.[1] ?? '').values)
}

/** What was read, or the words of the refusal; anything but a refusal rises. */
function verdictOf(read: () => Fields): Fields | string {
  try {
    return read()
  } catch (error) {
    if (error instanceof ClientError || (error instanceof Error && error.constructor === Error))
      return error.message
    throw error
  }
}

function same(a: Fields | string, b: Fields | string): boolean {
  if (typeof a === 'string' || typeof b === 'string') return a === b
  const keys = Object.keys(a)
  return keys.length === Object.keys(b).length && keys.every((key) => key in b && Object.is(a[key], b[key]))
}

/** A few bytes set, cut out or put in; one in eight is noise altogether. */
function spoil(good: Buffer, random: (below: number) => number): Buffer {
  if (random(8) === 0) return Buffer.from(Array.from({ length: random(160) }, () => random(256)))
  let packet = Buffer.from(good)
  for (let edits = random(5); edits > 0; edits--) {
    const at = random(packet.length + 1)
    const kind = random(6)
    const byte = [0, 1, 2, 4, 0x25, 0xff, random(256), random(256)][random(8)] ?? 0
    if (kind < 3 && at < packet.length) packet[at] = byte
    else if (kind === 3) packet = Buffer.concat([packet.subarray(0, at), packet.subarray(at + 1 + random(3))])
    else if (kind === 4)
      packet = Buffer.concat([packet.subarray(0, at), Buffer.of(byte), packet.subarray(at)])
    else packet = Buffer.concat([packet, Buffer.of(byte, random(4), random(256))])
    // The fields that decide most.
    if (random(6) === 0 && packet.length >= 100)
      packet.writeUInt16BE(random(3), [10, 82, 96, 84][random(4)] ?? 0)
  }
  return packet
}

/** mulberry32: the same packets for the same seed. */
function generator(seed: number): (below: number) => number {
  let state = seed
  return (below) => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) % below
  }
}

function fixed(length: number): fc.Arbitrary<Uint8Array> {
  return fc.uint8Array({ minLength: length, maxLength: length })
}

function infoHashes(): fc.Arbitrary<InfoHash> {
  return fixed(20).map(infoHashFromBytes)
}

function bytes(text: string): Buffer {
  return Buffer.from(text.replace(/\s/g, ''), 'hex')
}

function hex(text: string): string {
  return Buffer.from(text).toString('hex')
}

function written(write: (target: Buffer) => number): Buffer {
  const target = Buffer.alloc(2048, 0xee)
  const end = write(target)
  assert.ok(target.subarray(end).every((byte) => byte === 0xee))
  return target.subarray(0, end)
}
