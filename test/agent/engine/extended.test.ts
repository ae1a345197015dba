import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { ExtendedHandshake } from '../../../agent/engine/extended.ts'
import {
  busyExtensionId,
  claimExtensionId,
  unclaimExtensionId,
  readBusy,
  readClaim,
  readExtendedHandshake,
  writeBusy,
  writeClaim,
  writeExtendedHandshake,
} from '../../../agent/engine/extended.ts'
import { blockBytes, ownBlockBytes, WireError } from '../../../agent/engine/wire.ts'
import type { Bencodable } from '../../../lib/protocol/bencode.ts'
import { encode } from '../../../lib/protocol/bencode.ts'
import { spoilt } from '../../support/fuzz.ts'

const runs = Math.ceil(Number(process.env['RACKSWARM_FUZZ_RUNS'] ?? 100_000) / 10)
const own = {
  host: 'web-17.example',
  place: 'dc1/rack-3',
  token: 'eyJh.eyJz.c2ln',
  load: 0.25,
  isSeed: false,
}
const letters = ['a', 'b', 'z', 'A', 'Z', '0', '9']

function wordOf(more: string, lengthMax: number): fc.Arbitrary<string> {
  const unit = fc.constantFrom(...letters, ...Array.from(more))
  return fc
    .tuple(fc.constantFrom(...letters), fc.string({ unit, maxLength: lengthMax - 1 }))
    .map(([first, rest]) => first + rest)
}

test('an extended handshake written is read back', () => {
  const handshakes = fc.record({
    requestsMax: fc.integer({ min: 1, max: 100_000 }),
    port: fc.integer({ min: 1, max: 65_535 }),
    client: fc.string({ unit: 'grapheme-ascii', maxLength: 64 }),
    own: fc.option(
      fc.record({
        host: wordOf('._-', 128),
        place: fc.option(wordOf('._:/-', 64), { nil: undefined }),
        token: fc.option(wordOf('_.-', 4096), { nil: undefined }),
        load: fc.double({ min: 0, max: 1, noNaN: true }),
        isSeed: fc.boolean(),
      }),
      { nil: undefined },
    ),
  })
  fc.assert(
    fc.property(handshakes, (said) => {
      assert.deepEqual(readExtendedHandshake(writeExtendedHandshake(said)), {
        requestsMax: said.requestsMax,
        port: said.port,
        client: said.client,
        claimId: said.own && claimExtensionId,
        unclaimId: said.own && unclaimExtensionId,
        busyId: said.own && busyExtensionId,
        own: said.own && {
          ...said.own,
          blockBytesMax: ownBlockBytes,
          load: Math.round(said.own.load * 100) / 100,
        },
      })
    }),
    { numRuns: 1000 },
  )
})

test('a stranger is told nothing but what every client says', () => {
  const bytes = writeExtendedHandshake({ requestsMax: 512, port: 7, client: 'Rackswarm', own: undefined })
  assert.equal(bytes.toString('latin1'), 'd1:mde1:pi7e4:reqqi512e1:v9:Rackswarme')
})

test('a handshake that says nothing is read with what every client can do', () => {
  const nothing = {
    requestsMax: 250,
    port: undefined,
    client: undefined,
    claimId: undefined,
    unclaimId: undefined,
    busyId: undefined,
    own: undefined,
  }
  assert.deepEqual(readExtendedHandshake(Buffer.from('de')), nothing)
  assert.deepEqual(readExtendedHandshake(encode({ rs: {} })).own, {
    host: undefined,
    place: undefined,
    token: undefined,
    blockBytesMax: blockBytes,
    load: undefined,
    isSeed: false,
  })
})

test('members of a wrong type or out of all bounds count as missing, or as the nearest that is sane', () => {
  const wrong: readonly Bencodable[] = [
    -1,
    [],
    {},
    [1],
    { a: 1 },
    Buffer.of(0),
    Buffer.of(0xff, 0xfe),
    'a\nb',
  ]
  for (const value of wrong) {
    const members = { m: value, p: value, reqq: value, rs: value, v: value }
    const seen = readExtendedHandshake(encode(members))
    assert.deepEqual([seen.port, seen.requestsMax, seen.client], [undefined, 250, undefined])
    assert.equal(seen.claimId, undefined)
    const inside = { block: value, host: value, load: value, place: value, token: value }
    const other = readExtendedHandshake(encode({ m: { rs_claim: value }, rs: inside }))
    assert.equal(other.claimId, undefined)
    assert.deepEqual(other.own, {
      host: undefined,
      place: undefined,
      token: undefined,
      blockBytesMax: blockBytes,
      load: undefined,
      isSeed: false,
    })
  }
  const huge = Number.MAX_SAFE_INTEGER
  const seen = readExtendedHandshake(
    encode({ m: { rs_claim: 0 }, p: 0, reqq: huge, rs: { block: huge, load: huge } }),
  )
  assert.deepEqual(
    [seen.claimId, seen.port, seen.requestsMax, seen.own?.blockBytesMax, seen.own?.load],
    [undefined, undefined, 100_000, ownBlockBytes, 1],
  )
})

test('text that is too long, or would break a log or a path, counts as missing', () => {
  const read = (rs: Bencodable, v: Bencodable = 'x') => readExtendedHandshake(encode({ rs, v }))
  for (const bad of ['', '-a', '.', '../x', 'a b', 'a\u0000', 'a\n', 'é', 'a'.repeat(5000)]) {
    assert.equal(read({ host: bad }).own?.host, undefined, bad)
    assert.equal(read({ place: bad }).own?.place, undefined, bad)
  }
  for (const bad of ['', 'a b', 'a\n', 'a\u0000', 'a/b', 'a'.repeat(4097)])
    assert.equal(read({ token: bad }).own?.token, undefined, bad)
  for (const bad of ['a\n', '\u001b[31m', 'é', 'a'.repeat(65)])
    assert.equal(read({}, bad).client, undefined, bad)
})

test('readExtendedHandshake() gives sane values or throws WireError, whatever the bytes', () => {
  const good = [
    writeExtendedHandshake({ requestsMax: 512, port: 6881, client: 'Rackswarm', own }),
    writeExtendedHandshake({ requestsMax: 512, port: 6881, client: 'Rackswarm', own: undefined }),
    encode({
      m: { ut_metadata: 3, rs_claim: 255 },
      metadata_size: 31_235,
      p: 1,
      reqq: 1,
      v: 'qBittorrent/4',
    }),
    encode({ m: { rs_claim: 9 }, rs: { block: 16_384, load: 100 }, yourip: Buffer.of(127, 0, 0, 1) }),
  ]
  fc.assert(
    fc.property(spoilt(good), (bytes) => {
      const seen = answerOf(() => readExtendedHandshake(bytes))
      if (seen) assertSane(seen)
    }),
    { numRuns: runs },
  )
  for (const bomb of [
    'd1:a'.repeat(20_000),
    `d1:al${'le'.repeat(200_000)}ee`,
    'd1:a4294967296:',
    'le',
    'i1e',
    '',
  ])
    assert.throws(() => readExtendedHandshake(Buffer.from(bomb)), WireError)
})

test('a claim written is read back, and one of a piece that there is not is a WireError', () => {
  fc.assert(
    fc.property(
      fc.array(fc.nat(99_999), { maxLength: 50 }),
      fc.integer({ min: 1, max: 100_000 }),
      (pieces, count) => {
        const bytes = writeClaim(pieces)
        if (pieces.every((piece) => piece < count)) assert.deepEqual(readClaim(bytes, count), pieces)
        else assert.throws(() => readClaim(bytes, count), WireError)
      },
    ),
    { numRuns: 1000 },
  )
  assert.throws(() => readClaim(writeClaim([5]), 5), WireError)
  assert.deepEqual(readClaim(writeClaim([0xffffffff]), 2 ** 32), [0xffffffff])
})

test('readClaim() gives pieces that there are or throws WireError, whatever the bytes', () => {
  fc.assert(
    fc.property(spoilt([writeClaim([0, 1, 2, 299]), writeClaim([7])]), (bytes) => {
      // A payload is a part of a chunk.
      const chunk = Buffer.concat([Buffer.of(9, 9, 9), bytes, Buffer.of(9)])
      const pieces = answerOf(() => readClaim(chunk.subarray(3, -1), 300))
      assert.equal(pieces !== undefined, bytes.length % 4 === 0 && (pieces?.length ?? 0) === bytes.length / 4)
      for (const piece of pieces ?? []) assert.ok(piece >= 0 && piece < 300)
    }),
    { numRuns: runs },
  )
})

test('what a host is sending is read back, and never more of it than a host sends', () => {
  fc.assert(
    fc.property(fc.boolean(), fc.array(fc.nat(299), { maxLength: 80 }), (isFull, pieces) => {
      const said = answerOf(() => readBusy(writeBusy({ isFull, pieces }), 300))
      assert.deepEqual(said, pieces.length > 64 ? undefined : { isFull, pieces })
    }),
    { numRuns: 1000 },
  )
  const written = [
    { isFull: false, pieces: [1, 2] },
    { isFull: true, pieces: [299] },
  ].map(writeBusy)
  fc.assert(
    fc.property(spoilt(written), (bytes) => {
      const said = answerOf(() => readBusy(bytes, 300))
      assert.equal(said?.isFull, said && bytes[0] === 1)
      for (const piece of said?.pieces ?? []) assert.ok(piece >= 0 && piece < 300)
    }),
    { numRuns: runs },
  )
})

/** Undefined where it throws a WireError; any other error fails the test. */
function answerOf<Value>(read: () => Value): Value | undefined {
  try {
    return read()
  } catch (error) {
    if (!(error instanceof WireError)) throw error
    return undefined
  }
}

function assertSane({ requestsMax, port, client, claimId, own: said }: ExtendedHandshake): void {
  assertWhole(requestsMax, 1, 100_000)
  if (port !== undefined) assertWhole(port, 1, 65_535)
  if (claimId !== undefined) assertWhole(claimId, 1, 255)
  if (client !== undefined) assert.match(client, /^[ -~]{0,64}$/)
  if (said === undefined) return
  assertWhole(said.blockBytesMax, blockBytes, ownBlockBytes)
  if (said.load !== undefined) assertWhole(Math.round(said.load * 100), 0, 100)
  if (said.host !== undefined) assert.match(said.host, /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/)
  if (said.place !== undefined) assert.match(said.place, /^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$/)
  if (said.token !== undefined) assert.match(said.token, /^[A-Za-z0-9_.-]{1,4096}$/)
}

function assertWhole(value: number, min: number, max: number): void {
  assert.ok(Number.isInteger(value) && value >= min && value <= max, `${value} of ${min} to ${max}`)
}
