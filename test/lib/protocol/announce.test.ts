import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { Ip } from '../../../lib/protocol/address.ts'
import { endpoint, parseCompactPeers } from '../../../lib/protocol/address.ts'
import {
  parseAnnounce,
  parseAnnounceReply,
  writeAnnounceReply,
  writeFailure,
} from '../../../lib/protocol/announce.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import { escapeBytes, parseQuery } from '../../../lib/protocol/query.ts'
import { parseScrape } from '../../../lib/protocol/scrape.ts'
import { answersOrRefuses, spoilt, spoiltText } from '../../support/fuzz.ts'

const hash = '%01%02%03%04%05%06%07%08%09%0a%0b%0c%0d%0e%0f%10%11%12%13%14'
const good = `info_hash=${hash}&peer_id=-RS0001-abcdefghijkl&port=6881&uploaded=0&downloaded=0&left=1&compact=1&numwant=3&event=started`

test('a query keeps raw bytes, takes & and ; and keeps the last of a key', () => {
  fc.assert(
    fc.property(fc.uint8Array({ minLength: 20, maxLength: 20 }), (bytes) => {
      const query = parseQuery(`a=1&info_hash=${escapeBytes(bytes)};A=2&&b`)
      assert.deepEqual(Buffer.from(query.infoHashes[0] ?? '', 'latin1'), Buffer.from(bytes))
      assert.equal(query.values.get('a'), '2')
      assert.equal(query.values.get('b'), '')
    }),
  )
})

test('parseQuery() answers or throws ClientError, whatever the text', () => {
  answersOrRefuses(spoiltText([good, '%', 'a=%zz']), parseQuery)
})

test('parseAnnounce() answers or throws ClientError, whatever the text', () => {
  answersOrRefuses(spoiltText([good]), parseAnnounce)
})

test('parseScrape() answers or throws ClientError, whatever the text', () => {
  answersOrRefuses(spoiltText([`info_hash=${hash}&info_hash=${hash}`]), parseScrape)
})

test('each malformed announce is refused by name', () => {
  const changed = (key: string, value: string | undefined) => {
    const pairs = good.split('&').filter((pair) => !pair.startsWith(`${key}=`))
    return [...pairs, ...(value === undefined ? [] : [`${key}=${value}`])].join('&')
  }
  const wrong: [string, string | undefined][] = [
    ['info_hash', undefined],
    ['info_hash', 'short'],
    ['info_hash', `${hash}%15`],
    ['peer_id', undefined],
    ['peer_id', 'short'],
    ['port', undefined],
    ['port', '65536'],
    ['port', '-1'],
    ['port', '68x1'],
    ['left', undefined],
    ['left', '-5'],
    ['left', '18446744073709551616'],
    ['uploaded', 'many'],
    ['downloaded', '1e3'],
    ['event', 'begun'],
    ['numwant', '-2'],
  ]
  for (const [key, value] of wrong)
    assert.throws(() => parseAnnounce(changed(key, value)), ClientError, `${key}=${String(value)}`)
  assert.throws(() => parseAnnounce(`${good}&info_hash=${hash}`), ClientError, 'two infohashes')
})

const ip: fc.Arbitrary<Ip> = fc.oneof(
  fc.uint8Array({ minLength: 4, maxLength: 4 }).map((bytes) => ({ family: 4 as const, bytes })),
  fc
    .uint8Array({ minLength: 16, maxLength: 16 })
    .map((bytes) => ({ family: 6 as const, bytes: Uint8Array.of(0x20, ...bytes.subarray(1)) })),
)

test('a reply that is written is read back: peers of both families with their distances, epoch, gateway', () => {
  const peer = fc
    .record({ ip, port: fc.integer({ min: 1, max: 65535 }), distance: fc.nat(255) })
    .map(({ ip: address, port, distance }) => ({
      endpoint: endpoint(address, port),
      peerId: new Uint8Array(20),
      distance,
    }))
  fc.assert(
    fc.property(fc.array(peer, { maxLength: 60 }), fc.boolean(), (peers, gateway) => {
      const read = parseAnnounceReply(
        writeAnnounceReply(
          {
            complete: 1,
            incomplete: 2,
            downloaded: 3,
            intervalSeconds: 30,
            minIntervalSeconds: 5,
            peers,
            externalIp: undefined,
            trackerId: 'id',
            rackswarm: { epoch: 'e1', gateway },
          },
          true,
        ),
      )
      const byFamily = [...peers].sort((a, b) => a.endpoint.family - b.endpoint.family)
      assert.deepEqual(
        read.peers.map(({ endpoint: { compact }, distance }) => [
          Buffer.from(compact).toString('hex'),
          distance,
        ]),
        byFamily.map(({ endpoint: { compact }, distance }) => [
          Buffer.from(compact).toString('hex'),
          distance,
        ]),
      )
      assert.deepEqual(read.rackswarm, { epoch: 'e1', gateway })
      assert.equal(read.trackerId, 'id')
    }),
  )
})

test('parseAnnounceReply() answers or throws ClientError, whatever the bytes', () => {
  answersOrRefuses(
    spoilt([
      Buffer.from('d8:completei1e10:incompletei0e8:intervali30e12:min intervali5e5:peers6:abcdefe'),
      Buffer.from('d8:intervali30e5:peers6:abcdef9:rackswarmd1:d1:05:epoch1:e7:gatewayi1e1:vi1eee'),
      writeFailure('no'),
    ]),
    parseAnnounceReply,
  )
})

test('compact peers are read for every length that fits and refused for every other', () => {
  fc.assert(
    fc.property(
      fc.uint8Array({ maxLength: 120 }),
      fc.constantFrom(4 as const, 6 as const),
      (bytes, family) => {
        const size = family === 4 ? 6 : 18
        if (bytes.length % size !== 0)
          return assert.throws(() => parseCompactPeers(bytes, family), ClientError)
        const peers = parseCompactPeers(bytes, family)
        assert.deepEqual(Buffer.concat(peers.map(({ compact }) => compact)), Buffer.from(bytes))
      },
    ),
  )
})
