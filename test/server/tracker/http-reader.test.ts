import assert from 'node:assert/strict'
import { METHODS } from 'node:http'
import { test } from 'node:test'
import fc from 'fast-check'
import type { RefusalReason } from '../../../server/tracker/http-reader.ts'
import { headBytesMax, HttpReader } from '../../../server/tracker/http-reader.ts'
import type { Verdict } from '../../support/http-streams.ts'
import { hostileStreams, packetsOf, plainTarget, readerVerdict } from '../../support/http-streams.ts'

const runs = Number(process.env['RACKSWARM_FUZZ_RUNS'] ?? 100_000)

function read(text: string, forwardedName?: string) {
  const reader = new HttpReader()
  reader.push(Buffer.from(text, 'latin1'))
  return reader.next(forwardedName)
}

test('reads a request: method, path, query and whether the connection stays', () => {
  assert.deepEqual(read('GET /announce?info_hash=%00%ff&a=b?c HTTP/1.1\r\nHost: tracker\r\n\r\n'), {
    kind: 'request',
    method: 'GET',
    path: '/announce',
    query: 'info_hash=%00%ff&a=b?c',
    minorVersion: 1,
    keepAlive: true,
    forwarded: undefined,
    end: 64,
  })
})

test('an absolute target is read without its scheme and authority', () => {
  const pathAndQuery = (target: string) => {
    const request = read(`GET ${target} HTTP/1.0\r\n\r\n`)
    return request?.kind === 'request' ? [request.path, request.query] : request?.reason
  }
  assert.deepEqual(pathAndQuery('http://tracker:6969/announce?a'), ['/announce', 'a'])
  assert.deepEqual(pathAndQuery('HTTPS://[::1]:1/scrape'), ['/scrape', ''])
  assert.deepEqual(pathAndQuery('http://tracker'), ['/', ''])
  assert.deepEqual(pathAndQuery('http://tracker?a'), ['/', 'a'])
  assert.deepEqual(pathAndQuery('*'), ['*', ''])
  for (const target of ['http:///a', 'http://user@host/a', 'ftp://host/a', 'announce', '*a', '?a', 'http:/a'])
    assert.equal(pathAndQuery(target), 'target', target)
})

test('HTTP/1.1 stays open unless told to close, HTTP/1.0 closes unless told to stay', () => {
  const keepAlive = (version: string, ...lines: string[]) => {
    const request = read(['GET / ' + version, 'Host: h', ...lines, '', ''].join('\r\n'))
    return request?.kind === 'request' && request.keepAlive
  }
  assert.equal(keepAlive('HTTP/1.1'), true)
  assert.equal(keepAlive('HTTP/1.1', 'Connection: close'), false)
  assert.equal(keepAlive('HTTP/1.1', 'cOnNeCtIoN: te , ClOsE\t'), false)
  assert.equal(keepAlive('HTTP/1.1', 'Connection: keep-alive', 'Connection: close'), false)
  assert.equal(keepAlive('HTTP/1.1', 'Connection: closed'), true)
  assert.equal(keepAlive('HTTP/1.1', 'Connection: Upgrade', 'Upgrade: h2c'), false)
  assert.equal(keepAlive('HTTP/1.1', 'Proxy-Connection: close'), false)
  assert.equal(keepAlive('HTTP/1.0'), false)
  assert.equal(keepAlive('HTTP/1.0', 'Connection: Keep-Alive'), true)
  assert.equal(keepAlive('HTTP/1.0', 'Connection: keep-alive, close'), false)
})

test('the values of the wanted header are joined, whatever the case of its name', () => {
  const text =
    'GET / HTTP/1.0\r\nX-Real-IP: 9.9.9.9\r\nX-FORWARDED-for:  1.1.1.1\r\nx-forwarded-for: 2.2.2.2\r\n\r\n'
  const forwarded = (name?: string) => {
    const request = read(text, name)
    return request?.kind === 'request' ? request.forwarded : request
  }
  assert.equal(forwarded('x-forwarded-for'), '1.1.1.1,2.2.2.2')
  assert.equal(forwarded('x-real-ip'), '9.9.9.9')
  assert.equal(forwarded('x-other'), undefined)
  assert.equal(forwarded(), undefined)
})

const host = 'Host: h\r\n'
const start = `GET / HTTP/1.1\r\n${host}`
const refused: Record<string, [text: string, reason: RefusalReason]> = {
  'a bare LF behind the request line': [`GET / HTTP/1.1\n${host}\r\n`, 'version'],
  'a bare LF behind a header': ['GET / HTTP/1.1\r\nHost: h\n\r\n', 'line_end'],
  'a bare LF as the end of the head': [`${start}\n`, 'field'],
  'a bare LF before the request': [`\n${start}\r\n`, 'line_end'],
  'a bare CR before the request': [`\r${start}\r\n`, 'line_end'],
  'a bare CR in a value': [`${start}A: b\rc\r\n\r\n`, 'line_end'],
  'CR CR LF': [`GET / HTTP/1.1\r\r\n${host}\r\n`, 'line_end'],
  'a folded line': [`${start}A: b\r\n c\r\n\r\n`, 'field'],
  'a folded first line': [`GET / HTTP/1.1\r\n ${host}\r\n`, 'field'],
  'a space before the colon': [`${start}Content-Length : 0\r\n\r\n`, 'field'],
  'a tab before the colon': [`${start}Content-Length\t: 0\r\n\r\n`, 'field'],
  'an empty name': [`${start}: 0\r\n\r\n`, 'field'],
  'no colon': [`${start}Accept\r\n\r\n`, 'field'],
  'NUL in a value': [`${start}A: \0\r\n\r\n`, 'field'],
  'DEL in a value': [`${start}A: \x7f\r\n\r\n`, 'field'],
  'a byte above ASCII in a name': [`${start}A\xe9: b\r\n\r\n`, 'field'],
  'NUL in the target': [`GET /\0 HTTP/1.1\r\n${host}\r\n`, 'target'],
  'a tab in the target': [`GET /a\tb HTTP/1.1\r\n${host}\r\n`, 'target'],
  'a byte above ASCII in the target': [`GET /\xff HTTP/1.1\r\n${host}\r\n`, 'target'],
  'two spaces after the method': [`GET  / HTTP/1.1\r\n${host}\r\n`, 'target'],
  'two spaces before the version': [`GET /  HTTP/1.1\r\n${host}\r\n`, 'version'],
  'a space behind the version': [`GET / HTTP/1.1 \r\n${host}\r\n`, 'version'],
  'HTTP/0.9': ['GET /\r\n\r\n', 'target'],
  'HTTP/0.9 with its name': [`GET / HTTP/0.9\r\n${host}\r\n`, 'version'],
  'HTTP/1.2': [`GET / HTTP/1.2\r\n${host}\r\n`, 'version'],
  'the preface of HTTP/2': ['PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', 'method'],
  'a lower-case method': [`get / HTTP/1.1\r\n${host}\r\n`, 'method'],
  'an unknown method': [`FOO / HTTP/1.1\r\n${host}\r\n`, 'method'],
  CONNECT: [`CONNECT h:443 HTTP/1.1\r\n${host}\r\n`, 'method'],
  'a TLS handshake': ['\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03', 'method'],
  'no Host in HTTP/1.1': ['GET / HTTP/1.1\r\n\r\n', 'host_missing'],
  'two Hosts': [`${start}${host}\r\n`, 'host_twice'],
  'a body': [`${start}Content-Length: 3\r\n\r\n`, 'body'],
  'a body with leading zeros': [`${start}Content-Length: 003\r\n\r\n`, 'body'],
  'a chunked body': [`${start}Transfer-Encoding: chunked\r\n\r\n`, 'body'],
  'an empty Transfer-Encoding': [`${start}Transfer-Encoding:\r\n\r\n`, 'body'],
  'Content-Length and Transfer-Encoding': [
    `${start}Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n`,
    'framing',
  ],
  'Transfer-Encoding and Content-Length': [
    `${start}Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n`,
    'framing',
  ],
  'Content-Length twice': [`${start}Content-Length: 0\r\ncontent-length: 0\r\n\r\n`, 'content_length'],
  'Content-Length twice, different': [
    `${start}Content-Length: 0\r\nContent-Length: 5\r\n\r\n`,
    'content_length',
  ],
  'a list as Content-Length': [`${start}Content-Length: 0, 0\r\n\r\n`, 'content_length'],
  'a sign before Content-Length': [`${start}Content-Length: +0\r\n\r\n`, 'content_length'],
  'an empty Content-Length': [`${start}Content-Length:\r\n\r\n`, 'content_length'],
}

for (const [what, [text, reason]] of Object.entries(refused)) {
  test(`refuses ${what}`, () => {
    assert.equal(readerVerdict([Buffer.from(text, 'latin1')]).end, reason)
    assert.equal(readerVerdict(Array.from(text, (byte) => Buffer.from(byte, 'latin1'))).end, reason)
  })
}

test('a head that can no longer be good is refused before it ends', () => {
  for (const bad of ['\0', '\x7f', '\n', '\rb', '\r\r']) {
    const reader = new HttpReader()
    reader.push(Buffer.from(`${start}A: b`))
    assert.equal(reader.next(), undefined)
    reader.push(Buffer.from(bad))
    assert.equal(reader.next()?.kind, 'refusal', JSON.stringify(bad))
  }
})

test('Content-Length: 0 is no body', () => {
  assert.equal(read(`${start}Content-Length: 0 \r\n\r\n`)?.kind, 'request')
  assert.equal(read(`${start}Content-Length: 000\r\n\r\n`)?.kind, 'request')
})

test('a head may have 16 KiB and no byte more, empty lines before it included', () => {
  const head = (bytes: number, before = '') => {
    const rest = `${before}GET / HTTP/1.0\r\nA: `
    return `${rest}${'x'.repeat(bytes - rest.length - 4)}\r\n\r\n`
  }
  const verdict = (text: string) => readerVerdict([Buffer.from(text)]).end
  assert.equal(headBytesMax, 16_384)
  assert.equal(verdict(head(headBytesMax)), 'closed')
  assert.equal(verdict(head(headBytesMax + 1)), 'head_too_large')
  assert.equal(verdict(head(headBytesMax, '\r\n')), 'closed')
  assert.equal(verdict(head(headBytesMax + 1, '\r\n')), 'head_too_large')
  assert.equal(verdict('\r\n'.repeat(headBytesMax)), 'head_too_large')
  assert.equal(verdict(`GET /${'x'.repeat(headBytesMax)}`), 'head_too_large')
  // Refused once so much is there, not when it ends.
  const reader = new HttpReader()
  reader.push(Buffer.from('GET / HTTP/1.1\r\n'))
  assert.equal(reader.next(), undefined)
  while (reader.held < headBytesMax - 1) reader.push(Buffer.from('x'))
  assert.equal(reader.next(), undefined)
  reader.push(Buffer.from('x'))
  assert.equal((reader.next() as { reason: string }).reason, 'head_too_large')
})

test('pipelined requests come out one by one, however they are cut', () => {
  const text = Array.from({ length: 5 }, (_, i) => `GET /${i}?q HTTP/1.1\r\n${host}\r\n`).join('\r\n')
  const targets = ['/0?q', '/1?q', '/2?q', '/3?q', '/4?q']
  for (let size = 1; size <= text.length; size++) {
    const packets = Array.from({ length: Math.ceil(text.length / size) }, (_, i) =>
      Buffer.from(text.slice(i * size, (i + 1) * size)),
    )
    const { requests, end } = readerVerdict(packets)
    assert.deepEqual([requests.map((request) => request.target), end], [targets, 'clean'])
  }
})

test('a head in packets of one byte costs little more than one in a single packet', () => {
  const text = `GET / HTTP/1.0\r\n${'A: b\r\n'.repeat(2700)}\r\n`
  const reader = new HttpReader()
  const startMs = performance.now()
  let found = 0
  for (const byte of text) {
    reader.push(Buffer.from(byte))
    if (reader.next()) found++
  }
  assert.equal(found, 1)
  // Reading from the start at each byte takes several times this.
  assert.ok(performance.now() - startMs < 1_000, `took ${performance.now() - startMs} ms`)
})

test(`agrees with a parser of split and match on ${runs} hostile streams, in any packets`, () => {
  const seen = new Set<string>()
  fc.assert(
    fc.property(hostileStreams(), (stream) => {
      const verdict = readerVerdict(packetsOf(stream))
      seen.add(verdict.end)
      assert.deepEqual(plainly(verdict), simply(stream.text))
    }),
    { numRuns: runs },
  )
  // The streams reach every verdict; the size of a head has its own test.
  const all: readonly Verdict['end'][] = [
    'clean',
    'closed',
    'cut',
    'body',
    'method',
    'target',
    'version',
    'line_end',
    'field',
  ]
  if (runs >= 10_000)
    assert.deepEqual(
      [...all, 'content_length', 'framing', 'host_missing', 'host_twice'].filter((end) => !seen.has(end)),
      [],
    )
})

interface Plainly {
  readonly requests: Verdict['requests']
  readonly end: 'clean' | 'closed' | 'refused' | 'too large'
}

/** A head that is cut is refused like a broken one. */
function plainly({ requests, end }: Verdict): Plainly {
  if (end === 'clean' || end === 'closed') return { requests, end }
  return { requests, end: end === 'body' ? 'too large' : 'refused' }
}

/** The second opinion: all bytes at once, one regular expression for each rule of RFC 9112. */
function simply(text: string): Plainly {
  const requests: { method: string; target: string }[] = []
  for (let rest = text; ;) {
    rest = rest.replace(/^(\r\n)+/, '')
    if (rest === '' || rest === '\r') return { requests, end: 'clean' }
    const head = /^(.*?)\r\n\r\n/s.exec(rest)?.[1]
    if (head === undefined) return { requests, end: 'refused' }
    rest = rest.slice(head.length + 4)
    const [requestLine = '', ...lines] = head.split('\r\n')
    const [, method = '', target = '', minor] = /^(\S+) (\S+) HTTP\/1\.([01])$/.exec(requestLine) ?? []
    const targetIsGood =
      /^[!-~]+$/.test(target) && /^(\/|\*$|\*\?|https?:\/\/[\w.:[\]-]+(\/|\?|$))/i.test(target)
    const fields = lines.map((line) => /^([\w!#$%&'*+.^`|~-]+):[ \t]*([\t -~\x80-\xff]*)$/.exec(line))
    if (minor === undefined || !METHODS.includes(method) || method === 'CONNECT' || !targetIsGood)
      return { requests, end: 'refused' }
    if (fields.includes(null)) return { requests, end: 'refused' }
    const values = (name: string) =>
      fields.filter((field) => field?.[1]?.toLowerCase() === name).map((field) => (field?.[2] ?? '').trim())
    const lengths = values('content-length')
    const encodings = values('transfer-encoding')
    if (lengths.length > 1 || !lengths.every((length) => /^[0-9]+$/.test(length)))
      return { requests, end: 'refused' }
    if (lengths.length > 0 && encodings.length > 0) return { requests, end: 'refused' }
    if (encodings.length > 0 || Number(lengths[0] ?? 0) > 0) return { requests, end: 'too large' }
    const hosts = values('host').length
    if (hosts > 1 || (hosts === 0 && minor === '1')) return { requests, end: 'refused' }
    requests.push({ method, target: plainTarget(target) })
    const options = [...values('connection'), ...values('proxy-connection')]
      .flatMap((value) => value.split(','))
      .map((option) => option.trim().toLowerCase())
    const closes = options.includes('close') || options.includes('upgrade')
    if (closes || (minor === '0' && !options.includes('keep-alive'))) return { requests, end: 'closed' }
  }
}
