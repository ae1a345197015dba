import assert from 'node:assert/strict'
import { once } from 'node:events'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { createServer } from 'node:http'
import type { AddressInfo, Socket } from 'node:net'
import { connect } from 'node:net'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import fc from 'fast-check'
import { parseReplies } from '../../support/http-client.ts'
import type { Stream, Verdict } from '../../support/http-streams.ts'
import { hostileStreams, packetsOf, plainTarget, readerVerdict } from '../../support/http-streams.ts'
import { startListener } from '../../support/http-tracker.ts'

const runs = Math.ceil(Number(process.env['RACKSWARM_FUZZ_RUNS'] ?? 100_000) / 10)

/**
 * Where we refuse what node:http takes. Every other refusal must be node's too, and node must never refuse what we take: then no
 * proxy that reads as node does can be made to see other requests than we do.
 */
const stricter: readonly {
  readonly end: Verdict['end']
  readonly why: string
  readonly rest: RegExp
  readonly example: string
}[] = [
  {
    end: 'body',
    why: 'an announce has no body',
    rest: /^(content-length|transfer-encoding):/im,
    example: 'POST /announce HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc',
  },
  {
    end: 'host_twice',
    why: 'RFC 9112 section 3.2 wants it refused',
    rest: /^host:[^]*^host:/im,
    example: 'GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n',
  },
  {
    end: 'version',
    why: 'HTTP/0.9, HTTP/2.0 and RTSP',
    rest: /^\S+ \S+ (HTTP\/0\.9|HTTP\/2\.0|RTSP\/1\.0)\r\n/,
    example: 'GET / HTTP/2.0\r\nHost: h\r\n\r\n',
  },
  {
    end: 'version',
    why: 'one space between target and version',
    rest: /^\S+ \S+ {2,}/,
    example: 'GET /  HTTP/1.1\r\nHost: h\r\n\r\n',
  },
  {
    end: 'target',
    why: 'one space between method and target',
    rest: /^\S+ {2,}/,
    example: 'GET  / HTTP/1.1\r\nHost: h\r\n\r\n',
  },
  {
    end: 'target',
    why: 'HTTP/0.9: no version',
    rest: /^\S+ \S+\r?\n/,
    example: 'GET /announce\r\n\r\n',
  },
  {
    end: 'target',
    why: '* stands alone',
    rest: /^\S+ \*[^ ?]/,
    example: 'GET *a HTTP/1.1\r\nHost: h\r\n\r\n',
  },
  {
    end: 'target',
    why: 'http and https have a host',
    rest: /^\S+ https?:\/\/[/?]/i,
    example: 'GET http:///announce HTTP/1.1\r\nHost: h\r\n\r\n',
  },
  {
    end: 'target',
    why: 'the characters of a host are letters, digits and . : [ ] _ -',
    rest: /^\S+ https?:\/\/[\w.:[\]-]*[^\w.:[\]/?\s-]/i,
    example: 'GET http://user@h/announce HTTP/1.1\r\nHost: h\r\n\r\n',
  },
  {
    end: 'target',
    why: 'no scheme but http and https',
    rest: /^\S+ (?!https?:)[a-z]+:\/\//i,
    example: 'GET ftp://h/announce HTTP/1.1\r\nHost: h\r\n\r\n',
  },
  {
    end: 'line_end',
    why: 'empty lines before a request end with CR LF',
    rest: /^(\n|\r(?!\n))/,
    example: '\nGET / HTTP/1.1\r\nHost: h\r\n\r\n',
  },
  {
    end: 'method',
    why: 'PRI belongs to HTTP/2; node takes it with HTTP/0.9',
    rest: /^PRI /,
    example: 'PRI /announce\r\n\r\n',
  },
  {
    end: 'method',
    why: 'what follows CONNECT is not HTTP',
    rest: /^CONNECT /,
    example: 'CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\n',
  },
]

/** Where we close after a request and node reads on. */
const closesSooner = /^(proxy-)?connection:.*(upgrade|close)/im

test(`takes and refuses what node:http does, on ${runs} hostile streams over real sockets`, async (t) => {
  const node = await startNode(t)
  const { port, asked } = await startListener(t)
  const used = new Set<string>()
  await fc.assert(
    fc.asyncProperty(hostileStreams(), async (stream) => {
      const packets = packetsOf(stream)
      asked.length = 0
      const [theirs, text] = await Promise.all([node.verdict(packets), talk(port, packets)])
      const ours = readerVerdict(packets)
      compare(ours, theirs, stream.text, used)
      const methods = ours.requests.map(({ method }) => method)
      answersAs(ours, parseReplies(text, methods), asked)
    }),
    {
      numRuns: runs,
      examples: [
        ...stricter.map(({ example }): [Stream] => [{ text: example, cuts: [] }]),
        // We refuse at the R; what follows says why.
        [{ text: 'GET /other?y RTSP/1.0\r\nHost: h\r\n\r\n', cuts: [14] }],
      ],
    },
  )
  // A line of the list that nothing needs any more would hide a fault.
  if (runs >= 3000)
    assert.deepEqual(
      stricter.map(({ why }) => why).filter((why) => !used.has(why)),
      [],
    )
})

interface NodeVerdict {
  readonly requests: { method: string; target: string }[]
  /** Of its replies, in order; a refusal adds one. */
  readonly refused: boolean
}

function compare(ours: Verdict, theirs: NodeVerdict, text: string, used: Set<string>): void {
  const { requests, end, rest } = ours
  const { length } = requests
  const same = () => {
    assert.deepEqual(theirs.requests.slice(0, length), requests)
  }
  same()
  if (end === 'closed') {
    if (theirs.requests.length > length) assert.match(text, closesSooner)
    return
  }
  if (end === 'clean') {
    assert.deepEqual([theirs.requests.length, theirs.refused], [length, false])
    return
  }
  // node answers 400 and reads on; nobody reads what it says then.
  if (end === 'host_missing') {
    assert.equal(theirs.refused, true)
    return
  }
  if (theirs.refused && theirs.requests.length === length) return
  const head = rest.replace(/^(\r\n)+/, '')
  const known = stricter.find((each) => each.end === end && each.rest.test(head))
  assert.ok(known, `node:http takes what we refuse as ${end}: ${JSON.stringify(rest)}`)
  used.add(known.why)
}

/** The replies and the tracker's requests are those of the verdict, in its order. */
function answersAs(
  { requests, end }: Verdict,
  replies: readonly { status: number; headers: ReadonlyMap<string, string> }[],
  asked: readonly string[],
): void {
  const expected = requests.map(({ method, target }) => {
    const action = /^\/(announce|scrape)\?/.exec(target)?.[1]
    return action === undefined ? 404 : method === 'GET' ? 200 : 405
  })
  const refusal = { closed: [], clean: [], body: [413], head_too_large: [431] }[end as string] ?? [400]
  assert.deepEqual(
    replies.map(({ status }) => status),
    [...expected, ...refusal],
  )
  assert.deepEqual(
    asked.map((line) => line.replace(/ 127\.0\.0\.1$/, '')),
    requests
      .filter(({ method, target }) => method === 'GET' && /^\/(announce|scrape)\?/.test(target))
      .map(({ target }) => target.slice(1).replace('?', ' ')),
  )
  const last = replies.at(-1)
  if (last !== undefined && end !== 'clean') assert.equal(last.headers.get('connection'), 'close')
}

/** node:http as it is by default, with its verdict on a stream. */
async function startNode(
  t: TestContext,
): Promise<{ verdict(packets: readonly Buffer[]): Promise<NodeVerdict> }> {
  let requests: NodeVerdict['requests'] = []
  let refused = false
  const take = (request: IncomingMessage, response: ServerResponse) => {
    requests.push({ method: request.method ?? '', target: plainTarget(request.url ?? '') })
    request.on('error', () => undefined).resume()
    response.end()
  }
  const server = createServer(take)
  server.on('checkExpectation', take)
  server.on('checkContinue', (request, response) => {
    // Otherwise node closes behind the reply: the body could be there or not.
    response.writeContinue()
    take(request, response)
  })
  // Taken, as HTTP goes; what comes behind it is not.
  server.on('connect', (request, socket) => {
    requests.push({ method: request.method ?? '', target: plainTarget(request.url ?? '') })
    // Unread bytes would reset the connection, and a 400 that was written before were lost.
    socket.resume().end()
  })
  server.on('clientError', (_error, socket) => {
    refused = true
    socket.destroy()
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.after(() => server.close().closeAllConnections())
  const { port } = server.address() as AddressInfo
  return {
    verdict: async (packets) => {
      requests = []
      refused = false
      const text = await talk(port, packets)
      // A missing Host is answered without an event.
      return { requests, refused: [refused, text.includes('HTTP/1.1 400 ')].includes(true) }
    },
  }
}

/** Sends the packets and the end; resolves with all that came back, once the other side closed. */
async function talk(port: number, packets: readonly Buffer[]): Promise<string> {
  const socket: Socket = connect({ port, host: '127.0.0.1', allowHalfOpen: true, noDelay: true })
  let received = ''
  socket.on('data', (chunk: Buffer) => {
    received += chunk.toString('latin1')
  })
  socket.on('error', () => undefined)
  socket.once('end', () => socket.end())
  const closed = new Promise((resolve) => socket.once('close', resolve))
  for (const packet of packets) socket.write(packet)
  socket.end()
  await closed
  return received
}
