import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { test } from 'node:test'
import fc from 'fast-check'
import type { Ip } from '../../../lib/protocol/address.ts'
import { parseIp } from '../../../lib/protocol/address.ts'
import { sipHash24 } from '../../../lib/protocol/siphash.ts'
import type { ConnectionIdOptions, ConnectionIds } from '../../../server/tracker/connection-id.ts'
import { createConnectionIds } from '../../../server/tracker/connection-id.ts'

const second = 1000
const noon = Date.UTC(2026, 10, 25, 12)

// The reference implementation's vectors: key 00..0f, message 00..(n-1), result as it lies in memory.
const vectors = new Map([
  [0, '310e0edd47db6f72'],
  [1, 'fd67dc93c539f874'],
  [2, '5a4fa9d909806c0d'],
  [3, '2d7efbd796666785'],
  [4, 'b7877127e09427cf'],
  [5, '8da699cd64557618'],
  [6, 'cee3fe586e46c9cb'],
  [7, '37d1018bf50002ab'],
  [8, '6224939a79f5f593'],
  [9, 'b0e4a90bdf82009e'],
  [10, 'f3b9dd94c5bb5d7a'],
  [11, 'a7ad6b22462fb3f4'],
  [12, 'fbe50e86bc8f1e75'],
  [13, '903d84c02756ea14'],
  [14, 'eef27a8e90ca23f7'],
  [15, 'e545be4961ca29a1'],
  [16, 'db9bc2577fcc2a3f'],
  [63, '724506eb4c328a95'],
])

test('sipHash24() gives the published results', () => {
  const key = Uint8Array.from({ length: 16 }, (_, i) => i)
  for (const [length, wanted] of vectors) {
    const message = Uint8Array.from({ length }, (_, i) => i)
    assert.equal(sipHashHex(key, message), wanted, `${length} bytes`)
  }
})

test('sipHash24() agrees with 64-bit arithmetic for any key and message', () => {
  const bytes = (size: number) => fc.uint8Array({ minLength: size, maxLength: size })
  fc.assert(
    fc.property(bytes(16), fc.uint8Array({ maxLength: 70 }), (key, message) => {
      assert.equal(sipHashHex(key, message), bigSipHash(key, message).toString('hex'))
    }),
    { numRuns: 2000 },
  )
})

test('an id is 16 bits of the time and 48 of a MAC over all of the time and the address', () => {
  const key = createHash('sha256').update('rackswarm connection id\0secret').digest().subarray(0, 16)
  for (const text of ['10.1.2.3', '2001:db8::7']) {
    const address = ip(text)
    const time = Buffer.alloc(4)
    time.writeUInt32LE(noon / second)
    // Words of the address are taken big-endian, words of the message little-endian.
    const mac = bigSipHash(key, Buffer.concat([time, Buffer.from(address.bytes).swap32()]))
    const wanted = Buffer.alloc(8)
    wanted.writeUInt16BE((noon / second) % 65_536)
    wanted.writeUInt16BE(mac.readUInt16LE(4), 2)
    wanted.writeUInt32BE(mac.readUInt32LE(0), 4)
    assert.deepEqual(idOf(idsOf({ privateKey: 'secret' }), address, noon), wanted, text)
  }
})

test('an id is good for its address while it lives, and for no other', () => {
  const [issuer, checker] = [idsOf(), idsOf()]
  for (const text of ['10.1.2.3', '2001:db8::7', '0.0.0.0', '::']) {
    const id = idOf(issuer, ip(text), noon)
    // The issuer remembers it; the checker computes it, then remembers it.
    for (const ids of [issuer, checker, checker]) {
      assert.ok(ids.isValid(id, 0, ip(text), noon), text)
      assert.ok(ids.isValid(id, 0, ip(text), noon + 119 * second), text)
      assert.ok(!ids.isValid(id, 0, ip(text), noon + 121 * second), `${text}: expired`)
    }
  }
  const id = idOf(issuer, ip('10.1.2.3'), noon)
  for (const other of ['10.1.2.4', '11.1.2.3', '10.1.3.3', '0a01:0203::', '::10.1.2.3', '::a01:203:0:0'])
    for (const ids of [issuer, checker]) assert.ok(!ids.isValid(id, 0, ip(other), noon), other)
  const id6 = idOf(issuer, ip('a01:203::'), noon)
  for (const other of ['10.1.2.3', 'a01:203::1', 'a01:203:0:0:1::', 'a01:203:0:1::', 'a01:202::'])
    for (const ids of [issuer, checker]) assert.ok(!ids.isValid(id6, 0, ip(other), noon), other)
})

test('an id of the future is good within the clock skew that is allowed', () => {
  const ids = idsOf({ maxClockSkewMs: 5 * second })
  const address = ip('10.1.2.3')
  assert.ok(ids.isValid(idOf(ids, address, noon + 5 * second), 0, address, noon))
  assert.ok(!ids.isValid(idOf(ids, address, noon + 6 * second), 0, address, noon))
  const strict = idsOf({ maxClockSkewMs: 0 })
  assert.ok(strict.isValid(idOf(strict, address, noon), 0, address, noon))
  assert.ok(!strict.isValid(idOf(strict, address, noon + second), 0, address, noon))
})

test('one changed bit makes an id worthless, and so does another key', () => {
  for (const text of ['10.1.2.3', '2001:db8::7']) {
    const address = ip(text)
    const ids = idsOf({ lifetimeMs: 28_800 * second, maxClockSkewMs: 28_800 * second })
    const id = idOf(ids, address, noon)
    for (let bit = 0; bit < 64; bit++) {
      const changed = Buffer.from(id)
      changed[bit >> 3] = (changed[bit >> 3] ?? 0) ^ (1 << (bit & 7))
      assert.ok(!ids.isValid(changed, 0, address, noon), `bit ${bit}`)
    }
    assert.ok(ids.isValid(id, 0, address, noon))
    assert.ok(!idsOf({ privateKey: 'another' }).isValid(id, 0, address, noon))
    assert.ok(!ids.isValid(Buffer.alloc(8), 0, address, noon))
  }
})

test('an id does not become good again when its 16 bits of time come round', () => {
  const round = 65_536 * second
  const address = ip('10.1.2.3')
  const ids = idsOf()
  const id = idOf(ids, address, noon)
  for (const turns of [1, 2, 3]) {
    assert.ok(!ids.isValid(id, 0, address, noon + turns * round), `${turns}`)
    assert.ok(!ids.isValid(id, 0, address, noon - turns * round), `-${turns}`)
  }
  // Nor is one refused that lives while they do.
  const beforeRound = Math.floor(noon / round) * round - 30 * second
  const alive = idOf(ids, address, beforeRound)
  for (const ageSeconds of [0, 29, 30, 31, 119])
    assert.ok(ids.isValid(alive, 0, address, beforeRound + ageSeconds * second), `${ageSeconds} s`)
})

test('the time of an id is honoured across the whole of its 16 bits, whatever the moment', () => {
  const options = { lifetimeMs: 600 * second, maxClockSkewMs: 20 * second }
  const [issuer, checker] = [idsOf(options), idsOf(options)]
  fc.assert(
    fc.property(
      fc.integer({ min: 0, max: 2 ** 32 - 1 }),
      fc.integer({ min: -70_000, max: 140_000 }),
      fc.constantFrom('10.1.2.3', '2001:db8::7'),
      (nowSeconds, ageSeconds, text) => {
        const issuedAt = nowSeconds - ageSeconds
        fc.pre(issuedAt >= 0)
        const id = idOf(issuer, ip(text), issuedAt * second)
        const good = ageSeconds <= 600 && ageSeconds >= -20
        for (const ids of [issuer, checker])
          assert.equal(ids.isValid(id, 0, ip(text), nowSeconds * second), good)
      },
    ),
    { numRuns: 2000 },
  )
})

test('ids that share a slot of the memory do not stand for each other', () => {
  const ids = idsOf()
  // Far more than there are slots, so that most have pushed another one out.
  const made = Array.from({ length: 40_000 }, (_, i) => {
    const address: Ip = { family: 4, bytes: Uint8Array.of(10, i >> 16, (i >> 8) & 0xff, i & 0xff) }
    return { address, id: idOf(ids, address, noon) }
  })
  for (const { address, id } of made) assert.ok(ids.isValid(id, 0, address, noon))
  for (const [i, { address }] of made.entries()) {
    const other = made[(i + 1) % made.length]
    assert.ok(other && !ids.isValid(other.id, 0, address, noon))
  }
})

test('an id is read and written where it stands in a packet', () => {
  const ids = idsOf()
  const packet = Buffer.alloc(24, 0xee)
  ids.write(packet, 8, ip('10.1.2.3'), noon)
  assert.equal(packet.toString('hex', 0, 8) + packet.toString('hex', 16), 'ee'.repeat(16))
  assert.ok(ids.isValid(packet, 8, ip('10.1.2.3'), noon))
  assert.ok(!ids.isValid(packet, 0, ip('10.1.2.3'), noon))
})

test('a lifetime or skew that 16 bits of seconds cannot carry is refused by name', () => {
  for (const options of [
    { lifetimeMs: 999 },
    { lifetimeMs: 28_800 * second + 1 },
    { lifetimeMs: Number.NaN },
    { maxClockSkewMs: -1 },
    { maxClockSkewMs: 28_800 * second + 1 },
  ])
    assert.throws(() => idsOf(options), new RegExp(Object.keys(options)[0] ?? ''))
})

function idsOf(options: Partial<ConnectionIdOptions> = {}): ConnectionIds {
  return createConnectionIds({ privateKey: 'a shared secret', ...options })
}

function idOf(ids: ConnectionIds, address: Ip, nowMs: number): Buffer {
  const id = Buffer.alloc(8)
  ids.write(id, 0, address, nowMs)
  return id
}

function ip(text: string): Ip {
  const address = parseIp(text)
  assert.ok(address, text)
  return address
}

function sipHashHex(key: Uint8Array, message: Uint8Array): string {
  const result = new Int32Array(2)
  sipHash24(words(key), words(message), message.length, result)
  const bytes = Buffer.alloc(8)
  bytes.writeInt32LE(result[0] ?? 0)
  bytes.writeInt32LE(result[1] ?? 0, 4)
  return bytes.toString('hex')
}

function words(bytes: Uint8Array): Int32Array {
  const padded = Buffer.alloc(Math.ceil(bytes.length / 4) * 4)
  padded.set(bytes)
  return Int32Array.from({ length: padded.length / 4 }, (_, i) => padded.readInt32LE(4 * i))
}

/** SipHash-2-4 as the paper writes it, on 64-bit words. */
function bigSipHash(key: Uint8Array, message: Uint8Array): Buffer {
  const add = (a: bigint, b: bigint) => BigInt.asUintN(64, a + b)
  const turn = (a: bigint, bits: bigint) => BigInt.asUintN(64, (a << bits) | (a >> (64n - bits)))
  const k0 = Buffer.from(key).readBigUInt64LE(0)
  const k1 = Buffer.from(key).readBigUInt64LE(8)
  let v0 = k0 ^ 0x736f6d6570736575n
  let v1 = k1 ^ 0x646f72616e646f6dn
  let v2 = k0 ^ 0x6c7967656e657261n
  let v3 = k1 ^ 0x7465646279746573n
  const round = () => {
    v0 = add(v0, v1)
    v2 = add(v2, v3)
    v1 = turn(v1, 13n) ^ v0
    v3 = turn(v3, 16n) ^ v2
    v0 = turn(v0, 32n)
    v2 = add(v2, v1)
    v0 = add(v0, v3)
    v1 = turn(v1, 17n) ^ v2
    v3 = turn(v3, 21n) ^ v0
    v2 = turn(v2, 32n)
  }
  const padded = Buffer.alloc(8 * (Math.floor(message.length / 8) + 1))
  padded.set(message)
  padded[padded.length - 1] = message.length
  for (let at = 0; at < padded.length; at += 8) {
    const block = padded.readBigUInt64LE(at)
    v3 ^= block
    round()
    round()
    v0 ^= block
  }
  v2 ^= 0xffn
  for (let i = 0; i < 4; i++) round()
  const result = Buffer.alloc(8)
  result.writeBigUInt64LE(v0 ^ v1 ^ v2 ^ v3)
  return result
}
