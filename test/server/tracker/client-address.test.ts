import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { Ip } from '../../../lib/protocol/address.ts'
import { formatIp, parseIp, socketAddress } from '../../../lib/protocol/address.ts'
import { parseCidr } from '../../../lib/protocol/cidr.ts'
import type { ForwardedHeader } from '../../../server/tracker/client-address.ts'
import { clientAddress, isTrusted } from '../../../server/tracker/client-address.ts'
import { answersOrRefuses, spoiltText } from '../../support/fuzz.ts'

const trusted = ['10.0.0.0/8', 'fd00::/8'].map(parseCidr)

function ip(text: string): Ip {
  const parsed = parseIp(text)
  assert.ok(parsed)
  return parsed
}

function client(
  peer: string,
  forwarded: string | undefined,
  header: ForwardedHeader = 'x-forwarded-for',
): string {
  return formatIp(clientAddress(ip(peer), forwarded, header, trusted))
}

test('X-Forwarded-For counts up to the right-most hop that is no trusted proxy', () => {
  assert.equal(client('10.0.0.1', '192.0.2.1'), '192.0.2.1')
  // Whoever is not a proxy may have written the rest.
  assert.equal(client('10.0.0.1', '192.0.2.9, 192.0.2.1'), '192.0.2.1')
  assert.equal(client('10.0.0.1', '192.0.2.9,192.0.2.1 ,\t10.0.0.2,fd00::1'), '192.0.2.1')
  assert.equal(client('fd00::1', 'nonsense, 2001:db8::1'), '2001:db8::1')
  assert.equal(client('10.0.0.1', '::ffff:192.0.2.1'), '192.0.2.1')
  // Trusted all the way: the left-most.
  assert.equal(client('10.0.0.1', '10.0.0.3, 10.0.0.2'), '10.0.0.3')
})

test('without the header a trusted proxy is the client', () => {
  for (const header of ['x-forwarded-for', 'x-real-ip'] as const) {
    assert.equal(client('10.0.0.1', undefined, header), '10.0.0.1')
    assert.equal(client('10.0.0.1', ' ', header), '10.0.0.1')
  }
})

test('the header of anyone else says nothing, not even that it is broken', () => {
  for (const header of ['x-forwarded-for', 'x-real-ip'] as const) {
    assert.equal(client('192.0.2.7', '192.0.2.1', header), '192.0.2.7')
    assert.equal(client('192.0.2.7', 'nonsense', header), '192.0.2.7')
  }
})

test('X-Real-IP is one address, of a proxy too', () => {
  assert.equal(client('10.0.0.1', ' 192.0.2.1 ', 'x-real-ip'), '192.0.2.1')
  assert.equal(client('10.0.0.1', '10.0.0.9', 'x-real-ip'), '10.0.0.9')
})

test('a trusted proxy that writes something else than addresses is refused', () => {
  for (const text of ['nonsense', '192.0.2.1:80', '[::1]', '192.0.2.01', 'unknown', '192.0.2.1, _hidden']) {
    assert.throws(() => client('10.0.0.1', text), {
      code: 'bad_forwarded_for',
      message: 'Cannot read X-Forwarded-For after 10.0.0.1: need addresses',
    })
  }
  for (const text of ['nonsense', '192.0.2.1, 192.0.2.2', '192.0.2.1:80']) {
    assert.throws(() => client('10.0.0.1', text, 'x-real-ip'), {
      code: 'bad_real_ip',
      message: 'Cannot read X-Real-IP from 10.0.0.1: need one address',
    })
  }
})

test('whatever a trusted proxy writes, it is read or refused', () => {
  const texts = spoiltText(['192.0.2.1, 10.0.0.2', '2001:db8::1,fd00::2', '10.0.0.1'])
  answersOrRefuses(
    fc.tuple(texts, fc.constantFrom<ForwardedHeader>('x-forwarded-for', 'x-real-ip')),
    ([text, header]) => clientAddress(ip('10.0.0.1'), text, header, trusted),
  )
})

test('the address of a socket is read without its zone, and IPv4 on a dual-stack socket as IPv4', () => {
  const text = (remoteAddress: string | undefined) => {
    const address = socketAddress(remoteAddress)
    return address && formatIp(address)
  }
  assert.equal(text('192.0.2.1'), '192.0.2.1')
  assert.equal(text('::ffff:192.0.2.1'), '192.0.2.1')
  assert.equal(text('::ffff:c000:201'), '192.0.2.1')
  assert.equal(text('fe80::1%eth0'), 'fe80::1')
  assert.equal(text('2001:db8::1'), '2001:db8::1')
  assert.equal(text(undefined), undefined)
})

test('a network that is trusted is found among several', () => {
  assert.equal(isTrusted(ip('10.1.2.3'), trusted), true)
  assert.equal(isTrusted(ip('fd12::1'), trusted), true)
  assert.equal(isTrusted(ip('11.0.0.1'), trusted), false)
  assert.equal(isTrusted(ip('10.1.2.3'), []), false)
})
