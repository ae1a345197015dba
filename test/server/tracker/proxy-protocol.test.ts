import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { formatIp } from '../../../lib/protocol/address.ts'
import { proxyHeaderBytesMax, readProxyHeader } from '../../../server/tracker/proxy-protocol.ts'
import { fuzzRuns, spoilt } from '../../support/fuzz.ts'

const signature = '0d0a0d0a000d0a515549540a'
const v1 = (text: string) => Buffer.from(text, 'latin1')
/** `command` 0x21 is PROXY; the length is that of the payload unless given. */
const v2 = (command: number, family: number, payload: Buffer, length = payload.length) =>
  Buffer.concat([
    Buffer.from(signature, 'hex'),
    Buffer.from([command, family, length >> 8, length & 0xff]),
    payload,
  ])
const ipv4 = Buffer.from('c0000201c6336401dc04 01bb'.replace(' ', ''), 'hex')
const ipv6 = Buffer.from(`${'20010db8'.padEnd(31, '0')}1${'20010db8'.padEnd(31, '0')}2dc0401bb`, 'hex')
const mapped = Buffer.from(`${'0'.repeat(20)}ffffc0000201${'0'.repeat(20)}ffffc6336401dc0401bb`, 'hex')
const tlv = Buffer.from('0400050000000000', 'hex')

const good: Record<string, [header: Buffer, source: string | undefined]> = {
  'version 1, TCP4': [v1('PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n'), '192.0.2.1'],
  'version 1, TCP6': [v1('PROXY TCP6 2001:db8::1 2001:DB8::2 56324 443\r\n'), '2001:db8::1'],
  'version 1, TCP6 with an IPv4-mapped address': [v1('PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n'), '192.0.2.1'],
  'version 1, UNKNOWN': [v1('PROXY UNKNOWN\r\n'), undefined],
  'version 1, UNKNOWN and more': [v1('PROXY UNKNOWN ffff::1 what ever\r\n'), undefined],
  'version 1, as long as it gets': [v1(`PROXY UNKNOWN ${'f'.repeat(107 - 16)}\r\n`), undefined],
  'version 2, TCP over IPv4': [v2(0x21, 0x11, ipv4), '192.0.2.1'],
  'version 2, UDP over IPv4': [v2(0x21, 0x12, ipv4), '192.0.2.1'],
  'version 2, TCP over IPv6': [v2(0x21, 0x21, ipv6), '2001:db8::1'],
  'version 2, TCP over IPv6 with an IPv4-mapped address': [v2(0x21, 0x21, mapped), '192.0.2.1'],
  'version 2, with a TLV': [v2(0x21, 0x11, Buffer.concat([ipv4, tlv])), '192.0.2.1'],
  'version 2, as long as is read': [v2(0x21, 0x11, Buffer.concat([ipv4, Buffer.alloc(4084)])), '192.0.2.1'],
  'version 2, LOCAL': [v2(0x20, 0x00, Buffer.alloc(0)), undefined],
  'version 2, LOCAL with addresses': [v2(0x20, 0x11, ipv4), undefined],
  'version 2, UNSPEC': [v2(0x21, 0x00, tlv), undefined],
  'version 2, a Unix socket': [v2(0x21, 0x31, Buffer.alloc(216)), undefined],
}

for (const [what, [header, source]] of Object.entries(good)) {
  test(`reads ${what}`, () => {
    const rest = Buffer.from('GET / HTTP/1.1\r\n')
    const read = readProxyHeader(Buffer.concat([header, rest]))
    assert.ok(read.kind === 'header', `is ${read.kind}`)
    assert.equal(read.source && formatIp(read.source), source)
    assert.equal(read.length, header.length)
    for (let length = 0; length < header.length; length++)
      assert.deepEqual(readProxyHeader(header.subarray(0, length)), { kind: 'more' }, `${length} bytes`)
  })
}

const bad: Record<string, [header: Buffer, message: RegExp]> = {
  'no header': [v1('GET / HTTP/1.1\r\n'), /does not start with one/],
  'one byte of something else': [v1('G'), /does not start with one/],
  'another case': [v1('proxy TCP4 1.1.1.1 2.2.2.2 1 2\r\n'), /does not start/],
  'no protocol': [v1('PROXY \r\n'), /need TCP4/],
  'an unknown protocol': [v1('PROXY UDP4 1.1.1.1 2.2.2.2 1 2\r\n'), /need TCP4/],
  'an IPv6 address with TCP4': [v1('PROXY TCP4 ::1 ::2 1 2\r\n'), /two addresses/],
  'an IPv4 address with TCP6': [v1('PROXY TCP6 1.1.1.1 2.2.2.2 1 2\r\n'), /two addresses/],
  'a leading zero in an address': [v1('PROXY TCP4 1.1.1.01 2.2.2.2 1 2\r\n'), /two addresses/],
  'one address': [v1('PROXY TCP4 1.1.1.1\r\n'), /two addresses/],
  'two spaces': [v1('PROXY TCP4  1.1.1.1 2.2.2.2 1 2\r\n'), /two addresses/],
  'one port': [v1('PROXY TCP4 1.1.1.1 2.2.2.2 1\r\n'), /two ports/],
  'three ports': [v1('PROXY TCP4 1.1.1.1 2.2.2.2 1 2 3\r\n'), /two ports/],
  'a port that is too large': [v1('PROXY TCP4 1.1.1.1 2.2.2.2 1 65536\r\n'), /two ports/],
  'a port with a leading zero': [v1('PROXY TCP4 1.1.1.1 2.2.2.2 01 2\r\n'), /two ports/],
  'a space at the end': [v1('PROXY TCP4 1.1.1.1 2.2.2.2 1 2 \r\n'), /two ports/],
  'a bare LF': [v1(`PROXY TCP4 1.1.1.1 2.2.2.2 1 2\n${'x'.repeat(107)}`), /no end in 107 bytes/],
  'a line that is too long': [v1(`PROXY UNKNOWN ${'f'.repeat(108 - 16)}\r\n`), /no end in 107 bytes/],
  'version 1 in binary': [v2(0x11, 0x11, ipv4), /version 1/],
  'an unknown command': [v2(0x22, 0x11, ipv4), /command 2/],
  'an unspecified family': [v2(0x21, 0x41, ipv4), /unspecified/],
  'an unspecified transport': [v2(0x21, 0x13, ipv4), /unspecified/],
  'more than is read': [v2(0x21, 0x11, ipv4, 4097), /at most 4112/],
  'too few bytes for IPv4': [v2(0x21, 0x11, ipv4.subarray(1)), /too short/],
  'too few bytes for IPv6': [v2(0x21, 0x21, ipv6.subarray(1)), /too short/],
}

for (const [what, [header, message]] of Object.entries(bad)) {
  test(`refuses ${what}`, () => {
    const read = readProxyHeader(header)
    assert.ok(read.kind === 'broken', `is ${read.kind}`)
    assert.match(read.message, message)
  })
}

test('never asks for more than a header may have, whatever comes', () => {
  const headers = [...Object.values(good), ...Object.values(bad)].map(([header]) => header)
  fc.assert(
    fc.property(spoilt(headers), (bytes) => {
      const header = readProxyHeader(Buffer.from(bytes))
      if (header.kind === 'more') assert.ok(bytes.length < proxyHeaderBytesMax)
      if (header.kind === 'header') assert.ok(header.length <= bytes.length)
    }),
    { numRuns: fuzzRuns / 10 },
  )
})
