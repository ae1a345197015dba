import fc from 'fast-check'
import type { HttpRefusal, HttpRequest } from '../../server/tracker/http-reader.ts'
import { HttpReader } from '../../server/tracker/http-reader.ts'

/** What one connection sends until it ends, latin1, and where it is cut into packets. */
export interface Stream {
  readonly text: string
  readonly cuts: readonly number[]
}

/** What a parser makes of all the bytes of a connection, the client's end included. */
export interface Verdict {
  readonly requests: readonly { readonly method: string; readonly target: string }[]
  /** `closed`: the last request asked for it, what follows is not read. `cut`: the bytes end within a head. */
  readonly end: 'clean' | 'closed' | 'cut' | HttpRefusal['reason']
  /** From the head that was refused or cut on. */
  readonly rest: string
}

/** Requests, most of them good, with what smugglers send put into them: lengths, line ends, odd bytes, bodies, closes. */
export function hostileStreams(): fc.Arbitrary<Stream> {
  return fc
    .record({
      requests: fc.array(request, { minLength: 1, maxLength: 3 }),
      spoils: fc.array(spoil, { maxLength: 2 }),
      cuts: fc.array(fc.double({ min: 0, max: 1, noNaN: true }), { maxLength: 3 }),
    })
    .map(({ requests, spoils, cuts }) => {
      const text = spoils.reduce((spoilt, change) => change(spoilt), requests.join(''))
      return { text, cuts: cuts.map((cut) => Math.floor(cut * text.length)).sort((a, b) => a - b) }
    })
}

export function packetsOf({ text, cuts }: Stream): Buffer[] {
  const bytes = Buffer.from(text, 'latin1')
  return [0, ...cuts].map((cut, i) => bytes.subarray(cut, cuts[i] ?? bytes.length))
}

/** What our reader makes of them. */
export function readerVerdict(packets: readonly Buffer[]): Verdict {
  const reader = new HttpReader()
  const requests: { method: string; target: string }[] = []
  const all = Buffer.concat(packets)
  let pushed = 0
  const verdict = (end: Verdict['end']) => ({
    requests,
    end,
    rest: all.toString('latin1', pushed - reader.held),
  })
  for (const packet of packets) {
    reader.push(packet)
    pushed += packet.length
    for (let head = reader.next(); head !== undefined; head = reader.next()) {
      if (head.kind === 'refusal') return verdict(head.reason)
      requests.push({ method: head.method, target: targetOf(head) })
      if (!head.keepAlive) return verdict('closed')
    }
  }
  return verdict(reader.blank ? 'clean' : 'cut')
}

export function targetOf({ path, query }: HttpRequest): string {
  return `${path}?${query}`
}

/** The same of a target as it was sent: without scheme and authority, and with a `?`. */
export function plainTarget(target: string): string {
  const [, path = '', query = ''] = /^([^?]*)\??([^]*)$/.exec(target) ?? []
  return `${path.replace(/^https?:\/\/[^/]+/i, '') || '/'}?${query}`
}

const usual = <Value>(value: Value, ...odd: readonly Value[]) =>
  fc.oneof(
    { weight: 20 * odd.length, arbitrary: fc.constant(value) },
    ...odd.map((each) => fc.constant(each)),
  )

const method = usual('GET', 'HEAD', 'POST', 'OPTIONS', 'M-SEARCH', 'PRI', 'CONNECT', 'FOO', 'get', 'GE', '')
const target = fc.oneof(
  {
    weight: 3,
    arbitrary: fc.constantFrom('/announce?a=%00b', '/announce', '/scrape?x', '/announce?', '/other?y'),
  },
  {
    weight: 1,
    arbitrary: fc.constantFrom(
      ...[
        'http://host/announce?b',
        'HTTPS://host:1/a',
        'http://host',
        'http://host?q',
        'http:///a',
        'http://u@h/',
        'x://h/a',
      ],
      ...['*', '*a', '/a#b?c', '/a?b?c#d', 'announce', '?a', '/"<>\\^`{|}', '/\xe9', '/a\tb', ''],
    ),
  },
)
const version = usual(
  ...([
    'HTTP/1.1',
    'HTTP/1.0',
    'HTTP/1.1',
    'HTTP/0.9',
    'HTTP/1.2',
    'HTTP/2.0',
    'http/1.1',
    'HTTP/1.1 ',
    'HTTP/1',
    'HTTP/01.1',
    'RTSP/1.0',
    '',
  ] as const),
)
const lineEnd = usual('\r\n', ...Array<string>(8).fill('\r\n'), '\n', '\r', '\r\r\n', ' \r\n', '\r\n ')
const fields = fc.oneof(
  {
    weight: 4,
    arbitrary: fc.constantFrom('Accept: */*', 'User-Agent:x', 'X-Forwarded-For: 1.2.3.4', 'A:', 'B: \t c \t'),
  },
  {
    weight: 2,
    arbitrary: fc.constantFrom(
      ...[
        'Connection: close',
        'connection: Keep-Alive',
        'Connection: a, CLOSE\t,b',
        'Connection: closed',
        'Connection: x close',
      ],
      ...[
        'Proxy-Connection: close',
        'Connection: keep-alive, close',
        'Connection: Upgrade',
        'Upgrade: x',
        'Connection:',
        'Expect: 100-continue',
        'Expect: x',
      ],
    ),
  },
  {
    weight: 3,
    arbitrary: fc.constantFrom(
      ...[
        'Content-Length: 0',
        'content-length:00',
        'Content-Length: 3',
        'Content-Length: +0',
        'Content-Length: 0, 0',
        'Content-Length:',
      ],
      ...[
        'Content-Length: 0 0',
        'Content-Length: 0x0',
        'Content-Length: 99999999999999999999',
        'Content-Length : 0',
        'Content-Length: 0\t',
      ],
      ...[
        'Transfer-Encoding: chunked',
        'transfer-encoding: identity',
        'Transfer-Encoding:',
        'Transfer-Encoding: chunked, x',
        'Transfer-Encoding\t: chunked',
      ],
    ),
  },
  {
    weight: 1,
    arbitrary: fc.constantFrom(
      ...[
        'Host: other',
        'Host : x',
        ' folded',
        '\tfolded',
        ': x',
        'no colon',
        'A b: c',
        'A\xe9: c',
        'A: \xe9\xff',
        'A: \0',
        'A: \x7f',
        'A: \x01',
        'A(: b',
        "!#$%&'*+-.^_`|~9: x",
      ],
    ),
  },
)
const field = fc.tuple(fields, lineEnd).map((parts) => parts.join(''))
const request = fc
  .tuple(
    usual('', '', '\r\n', '\r\n\r\n', '\n', '\r', ' '),
    fc
      .tuple(method, usual(' ', '  ', '\t'), target, usual(' ', '  ', ''), version, lineEnd)
      .map((parts) => parts.join('')),
    usual('Host: h\r\n', '', 'host:\r\n', 'HOST: a b/@\r\n'),
    fc.array(field, { maxLength: 3 }).map((lines) => lines.join('')),
    lineEnd,
    usual(
      '',
      '',
      '',
      'abc',
      '0\r\n\r\n',
      '3\r\nabc\r\n0\r\n\r\n',
      'GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n',
    ),
  )
  .map((parts) => parts.join(''))

/** Changes one place: a byte or a fragment put in, a few bytes cut out, or the end cut off. */
const spoil = fc
  .record({
    kind: fc.constantFrom('put', 'put', 'set', 'cut', 'end', 'none', 'none', 'none'),
    at: fc.double({ min: 0, max: 1, noNaN: true }),
    piece: fc.oneof(
      fc.constantFrom(
        '\r',
        '\n',
        '\r\n',
        '\0',
        ' ',
        '\t',
        ':',
        '\x7f',
        '\x80',
        '\v',
        ',',
        '?',
        '#',
        '\r\n\r\n',
        '\n\n',
        '0',
      ),
      fc.constantFrom(
        'Content-Length: 1\r\n',
        'Transfer-Encoding: chunked\r\n',
        'Host: h\r\n',
        'Connection: close\r\n',
      ),
      fc.integer({ min: 0, max: 255 }).map((byte) => String.fromCharCode(byte)),
    ),
  })
  .map(({ kind, at, piece }) => (text: string) => {
    const place = Math.floor(at * text.length)
    switch (kind) {
      case 'put':
        return text.slice(0, place) + piece + text.slice(place)
      case 'set':
        return text.slice(0, place) + piece + text.slice(place + piece.length)
      case 'cut':
        return text.slice(0, place) + text.slice(place + piece.length)
      case 'end':
        return text.slice(0, place)
      default:
        return text
    }
  })
