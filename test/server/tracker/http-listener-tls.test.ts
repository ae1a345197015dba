import assert from 'node:assert/strict'
import { once } from 'node:events'
import type { Socket } from 'node:net'
import { connect as connectTcp } from 'node:net'
import { Duplex } from 'node:stream'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import type { ConnectionOptions, TLSSocket } from 'node:tls'
import { connect } from 'node:tls'
import { formatIp } from '../../../lib/protocol/address.ts'
import { parseCidr } from '../../../lib/protocol/cidr.ts'
import type { HttpListenerOptions } from '../../../server/tracker/http-listener.ts'
import { createAuthority } from '../../support/certificates.ts'
import type { RawClient } from '../../support/http-client.ts'
import { rawClient, rawClientOn } from '../../support/http-client.ts'
import { startListener } from '../../support/http-tracker.ts'
import { until } from '../../support/until.ts'

const authority = createAuthority('tracker-ca')
const pair = authority.issue('one')
const get = (target: string, ...lines: string[]) =>
  ['GET ' + target + ' HTTP/1.1', 'Host: tracker', ...lines, '', ''].join('\r\n')

async function tlsClient(
  t: TestContext,
  port: number,
  options: ConnectionOptions = {},
): Promise<RawClient & { readonly socket: TLSSocket }> {
  const socket = connect({ port, host: '127.0.0.1', ca: authority.cert, ...options })
  t.after(() => socket.destroy())
  await once(socket, 'secureConnect')
  return { ...rawClientOn(socket), socket }
}

async function body(client: RawClient, query: string): Promise<string> {
  client.send(get(`/announce?${query}`))
  return (await client.reply()).body
}

test('speaks TLS 1.2 and 1.3, and nothing older', async (t) => {
  const { port, asked } = await startListener(t, { tls: pair })
  for (const version of ['TLSv1.2', 'TLSv1.3'] as const) {
    const client = await tlsClient(t, port, { minVersion: version, maxVersion: version })
    assert.equal(client.socket.getProtocol(), version)
    assert.equal(await body(client, version), `announce ${version}`)
    client.send(get('/announce?close', 'Connection: close'))
    assert.equal((await client.reply()).headers.get('connection'), 'close')
    assert.equal(await client.ended(), '')
  }
  const old = { minVersion: 'TLSv1', maxVersion: 'TLSv1.1', ciphers: 'DEFAULT@SECLEVEL=0' } as const
  await assert.rejects(tlsClient(t, port, old), { code: 'ERR_SSL_TLSV1_ALERT_PROTOCOL_VERSION' })
  assert.equal(asked[0], 'announce TLSv1.2 127.0.0.1')
})

test('a client comes back with a session ticket, without another full handshake', async (t) => {
  const { port, listener } = await startListener(t, { tls: pair })
  for (const version of ['TLSv1.2', 'TLSv1.3'] as const) {
    const options = { minVersion: version, maxVersion: version }
    const socket = connect({ port, host: '127.0.0.1', ca: authority.cert, ...options })
    t.after(() => socket.destroy())
    const [[session]] = (await Promise.all([once(socket, 'session'), once(socket, 'secureConnect')])) as [
      [Buffer],
      [],
    ]
    const again = await tlsClient(t, port, { ...options, session })
    assert.equal(again.socket.isSessionReused(), true)
    assert.equal(await body(again, 'again'), 'announce again')
    // New material means new keys for tickets.
    listener.setTls(pair)
    const later = await tlsClient(t, port, { ...options, session })
    assert.equal(later.socket.isSessionReused(), false)
    assert.equal(await body(later, 'later'), 'announce later')
  }
})

test('new certificates are for new connections; what cannot be used is thrown and changes nothing', async (t) => {
  const { port, listener } = await startListener(t, { tls: pair })
  const name = (client: { socket: TLSSocket }) => client.socket.getPeerX509Certificate()?.subject
  const before = await tlsClient(t, port)
  const other = authority.issue('two')
  assert.throws(() => {
    listener.setTls({ cert: other.cert, key: pair.key })
  }, /key values mismatch/)
  assert.throws(() => {
    listener.setTls({ cert: Buffer.from('nonsense'), key: pair.key })
  }, /PEM/)
  assert.throws(() => {
    listener.setTls({ ...other, clientCertificates: 'required' })
  }, /need the CA/)
  assert.equal(name(await tlsClient(t, port)), 'CN=one')
  listener.setTls(other)
  const after = await tlsClient(t, port)
  assert.equal(name(after), 'CN=two')
  assert.equal(await body(before, 'before'), 'announce before')
  assert.equal(await body(after, 'after'), 'announce after')
})

test('material that cannot be used is an error at the start', async (t) => {
  await assert.rejects(
    startListener(t, { tls: { cert: pair.cert, key: authority.issue('x').key } }),
    /key values mismatch/,
  )
})

test('client certificates: required ones are required, optional ones must still be right', async (t) => {
  const clients = createAuthority('clients-ca')
  const good = clients.issue('agent')
  const wrong = createAuthority('stranger-ca').issue('agent')
  // With TLS 1.3 a client learns that it is refused after its own handshake: the connection ends without a reply.
  const answered = async (port: number, options: ConnectionOptions) => {
    try {
      return await body(await tlsClient(t, port, options), 'a')
    } catch (error) {
      return (error as Error).message.startsWith('The connection ended')
        ? 'refused'
        : (error as NodeJS.ErrnoException).code
    }
  }
  for (const maxVersion of ['TLSv1.2', 'TLSv1.3'] as const) {
    const required = await startListener(t, {
      tls: { ...pair, clientCa: clients.cert, clientCertificates: 'required' },
    })
    assert.equal(await answered(required.port, { maxVersion, ...good }), 'announce a')
    assert.notEqual(await answered(required.port, { maxVersion }), 'announce a')
    assert.notEqual(await answered(required.port, { maxVersion, ...wrong }), 'announce a')
    assert.equal(required.asked.length, 1)
    const optional = await startListener(t, {
      tls: { ...pair, clientCa: clients.cert, clientCertificates: 'optional' },
    })
    assert.equal(await answered(optional.port, { maxVersion, ...good }), 'announce a')
    assert.equal(await answered(optional.port, { maxVersion }), 'announce a')
    assert.notEqual(await answered(optional.port, { maxVersion, ...wrong }), 'announce a')
    assert.equal(optional.asked.length, 2)
    await until(
      'all are connected',
      () => required.listener.connections === 1 && optional.listener.connections === 2,
    )
  }
})

test('a client that does not shake hands is closed in time, and so is one that speaks plain HTTP', async (t) => {
  const { port, listener } = await startListener(t, { tls: pair, headTimeoutMs: 200, idleTimeoutMs: 60_000 })
  const silent = await rawClient(t, port)
  const half = await rawClient(t, port)
  half.send(Buffer.from('160301', 'hex'))
  await until('both are connected', () => listener.connections === 2)
  await silent.ended()
  await half.ended()
  const plain = await rawClient(t, port)
  plain.send(get('/announce?a'))
  // A TLS alert at most.
  assert.doesNotMatch(await plain.ended(), /HTTP/)
  const quiet = await tlsClient(t, port)
  assert.equal(await quiet.ended(), '')
  await until('the connections are gone', () => listener.connections === 0)
})

test('disposed, a TLS listener closes handshakes and idle connections', async (t) => {
  const { port, listener } = await startListener(t, { tls: pair })
  const shaking = await rawClient(t, port)
  const idle = await tlsClient(t, port)
  assert.equal(await body(idle, 'a'), 'announce a')
  await until('both are connected', () => listener.connections === 2)
  await listener[Symbol.asyncDispose]()
  assert.deepEqual([await shaking.ended(), await idle.ended()], ['', ''])
})

const proxied: Partial<HttpListenerOptions> = {
  proxyProtocol: true,
  trustedProxies: [parseCidr('127.0.0.2/32'), parseCidr('10.0.0.0/8')],
}
const proxy = { localAddress: '127.0.0.2' }
const v1 = (source: string) => `PROXY TCP4 ${source} 192.0.2.99 1000 443\r\n`
const local = '\r\n\r\n\0\r\nQUIT\n\x20\0\0\0'

test('behind a proxy the PROXY protocol names the client, whatever packets it comes in', async (t) => {
  const { port, asked } = await startListener(t, proxied)
  const send = async (text: string, bytesEach = text.length) => {
    const client = await rawClient(t, port, proxy)
    for (let i = 0; i < text.length; i += bytesEach) {
      client.send(text.slice(i, i + bytesEach))
      if (bytesEach < text.length) await new Promise((resolve) => setImmediate(resolve))
    }
    assert.equal((await client.reply()).status, 200)
    return client
  }
  const client = await send(v1('192.0.2.1') + get('/announce?a'))
  client.send(get('/announce?b', 'X-Forwarded-For: 9.9.9.9'))
  assert.equal((await client.reply()).status, 200)
  await send(v1('192.0.2.2') + get('/announce?c'), 1)
  await send(
    '\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x03\xc0\0\x02\x63\x03\xe8\x01\xbb' + get('/announce?d'),
  )
  await send(local + get('/announce?e'))
  await send('PROXY UNKNOWN\r\n' + get('/announce?f'))
  // The named client is a trusted proxy of its own.
  await send(v1('10.0.0.1') + get('/announce?g', 'X-Forwarded-For: 192.0.2.7'))
  assert.deepEqual(asked, [
    'announce a 192.0.2.1',
    'announce b 192.0.2.1',
    'announce c 192.0.2.2',
    'announce d 192.0.2.3',
    'announce e 127.0.0.2',
    'announce f 127.0.0.2',
    'announce g 192.0.2.7',
  ])
})

test('behind a proxy too a client may end its half while the tracker works', async (t) => {
  let answer: () => void = () => undefined
  const slow = new Promise<void>((resolve) => {
    answer = resolve
  })
  const { port, listener } = await startListener(t, {
    ...proxied,
    tracker: {
      announce: async (_query, source) => {
        await slow
        return Buffer.from(formatIp(source))
      },
      scrape: (query) => Buffer.from(query),
    },
  })
  const half = await rawClient(t, port, { ...proxy, allowHalfOpen: true })
  const other = await rawClient(t, port, proxy)
  half.socket.end(v1('192.0.2.8') + get('/announce?a'))
  await until('both are connected', () => listener.connections === 2)
  // By the time another is answered, the end was read too.
  other.send(v1('192.0.2.9') + get('/scrape?b'))
  assert.equal((await other.reply()).body, 'b')
  answer()
  assert.match(await half.ended(), /192\.0\.2\.8$/)
})

test('a trusted proxy must send the header, anyone else must not', async (t) => {
  const { port, asked, listener } = await startListener(t, { ...proxied, headTimeoutMs: 300 })
  const bare = await rawClient(t, port, proxy)
  bare.send(get('/announce?a'))
  assert.equal(await bare.ended(), '')
  const cut = await rawClient(t, port, { ...proxy, allowHalfOpen: true })
  cut.socket.end('PROXY TCP4')
  assert.equal(await cut.ended(), '')
  const silent = await rawClient(t, port, proxy)
  silent.send('PROXY')
  assert.equal(await silent.ended(), '')
  const stranger = await rawClient(t, port)
  stranger.send(v1('192.0.2.1') + get('/announce?b'))
  assert.equal((await stranger.reply()).status, 400)
  const direct = await rawClient(t, port)
  direct.send(get('/announce?c'))
  assert.equal((await direct.reply()).status, 200)
  assert.deepEqual(asked, ['announce c 127.0.0.1'])
  direct.socket.destroy()
  await until('the connections are gone', () => listener.connections === 0)
})

test('the PROXY protocol comes before TLS, in the same packet too', async (t) => {
  const { port, asked } = await startListener(t, { ...proxied, tls: pair })
  for (const together of [false, true]) {
    const raw = connectTcp({ port, host: '127.0.0.1', ...proxy })
    const header = Buffer.from(v1('192.0.2.1'))
    if (!together) await new Promise<void>((resolve) => raw.write(header, () => resolve()))
    const socket = connect({
      socket: together ? behind(header, raw) : raw,
      ca: authority.cert,
      host: '127.0.0.1',
    })
    t.after(() => socket.destroy())
    t.after(() => raw.destroy())
    await once(socket, 'secureConnect')
    const client = rawClientOn(socket)
    assert.equal(await body(client, 'a'), 'announce a')
    assert.equal(await body(client, 'b'), 'announce b')
  }
  const direct = await tlsClient(t, port)
  assert.equal(await body(direct, 'c'), 'announce c')
  assert.deepEqual(asked, [
    ...['a', 'b', 'a', 'b'].map((query) => `announce ${query} 192.0.2.1`),
    'announce c 127.0.0.1',
  ])
})

/** A socket whose first packet starts with the header. */
function behind(header: Buffer, raw: Socket): Duplex {
  let first = true
  const stream = new Duplex({
    read: () => undefined,
    write: (chunk: Buffer, _encoding, done) => {
      raw.write(first ? Buffer.concat([header, chunk]) : chunk, done)
      first = false
    },
  })
  raw.on('data', (chunk) => stream.push(chunk))
  raw.on('end', () => stream.push(null))
  return stream
}
