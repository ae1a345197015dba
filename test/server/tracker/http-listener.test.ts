import assert from 'node:assert/strict'
import { once } from 'node:events'
import type { Socket } from 'node:net'
import { connect, createServer } from 'node:net'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { spawn } from 'node:child_process'
import { createInterface } from 'node:readline'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { decode } from '../../../lib/protocol/bencode.ts'
import { parseCidr } from '../../../lib/protocol/cidr.ts'
import type { Logger } from '../../../lib/runtime/log.ts'
import { silentLog } from '../../../lib/runtime/log.ts'
import type { TrackerHandlers } from '../../../server/tracker/http-connection.ts'
import { HttpConnection } from '../../../server/tracker/http-connection.ts'
import { compileRoutes } from '../../../server/tracker/http-routes.ts'
import { Turns } from '../../../server/tracker/http-turns.ts'
import { parseReplies, rawClient } from '../../support/http-client.ts'
import { startListener } from '../../support/http-tracker.ts'
import { until } from '../../support/until.ts'

const get = (target: string, ...lines: string[]) =>
  ['GET ' + target + ' HTTP/1.1', 'Host: tracker', ...lines, '', ''].join('\r\n')

test('answers announces and scrapes with the bytes of the tracker, told the query as sent and the address', async (t) => {
  const { port, asked } = await startListener(t)
  const client = await rawClient(t, port)
  client.send(get('/announce?info_hash=%00%ff+%2b&x=y?z'))
  assert.deepEqual(await client.reply(), {
    status: 200,
    headers: new Map([
      ['content-type', 'text/plain'],
      ['content-length', '35'],
    ]),
    body: 'announce info_hash=%00%ff+%2b&x=y?z',
  })
  client.send(get('/scrape'))
  assert.equal((await client.reply()).body, 'scrape ')
  assert.deepEqual(asked, ['announce info_hash=%00%ff+%2b&x=y?z 127.0.0.1', 'scrape  127.0.0.1'])
})

test('an unknown path is not found, another method is not allowed, and the connection stays', async (t) => {
  const { port, asked } = await startListener(t)
  const client = await rawClient(t, port)
  client.send(get('/announce/'))
  const missing = await client.reply()
  assert.deepEqual(
    [missing.status, missing.headers.get('content-type'), missing.body],
    [404, 'text/plain', 'there is nothing here\n'],
  )
  client.send('POST /announce HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n')
  const wrong = await client.reply()
  assert.deepEqual(
    [wrong.status, wrong.headers.get('allow'), wrong.body],
    [405, 'GET', '/announce takes GET\n'],
  )
  client.send(`HEAD /announce HTTP/1.1\r\nHost: h\r\n\r\n${get('/scrape', 'Connection: close')}`)
  const [head, scrape] = parseReplies(await client.ended(), ['HEAD'])
  assert.deepEqual([head?.status, head?.headers.get('allow'), head?.body], [405, 'GET', ''])
  assert.equal(scrape?.body, 'scrape ')
  assert.deepEqual(asked, ['scrape  127.0.0.1'])
})

test('a query may have 8192 characters; a longer one is answered as a tracker does', async (t) => {
  const { port, asked } = await startListener(t)
  const client = await rawClient(t, port)
  client.send(get(`/announce?${'x'.repeat(8192)}`))
  assert.equal((await client.reply()).body.length, 'announce '.length + 8192)
  client.send(get(`/announce?${'x'.repeat(8193)}`))
  const reply = await client.reply()
  assert.equal(reply.status, 200)
  assert.deepEqual(
    decode(Buffer.from(reply.body)),
    new Map([['failure reason', Buffer.from('query too long')]]),
  )
  assert.equal(asked.length, 1)
})

test('absolute targets and patterns of routes reach the tracker', async (t) => {
  const { port, asked } = await startListener(t, {
    routes: { announce: ['/announce', '/:key/announce'], scrape: ['/scrape', '/stats/*rest'] },
  })
  const client = await rawClient(t, port)
  client.send(get('http://tracker:80/announce?a') + get('/secret/announce?b') + get('/stats/a/b?c'))
  for (let i = 0; i < 3; i++) assert.equal((await client.reply()).status, 200)
  assert.deepEqual(asked, ['announce a 127.0.0.1', 'announce b 127.0.0.1', 'scrape c 127.0.0.1'])
})

test('HTTP/1.1 stays open, HTTP/1.0 stays open if asked to and is told so, and close is honoured', async (t) => {
  const { port, asked } = await startListener(t)
  const old = await rawClient(t, port)
  old.send('GET /announce?1 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n')
  assert.equal((await old.reply()).headers.get('connection'), 'keep-alive')
  old.send('GET /missing HTTP/1.0\r\nConnection: keep-alive\r\n\r\n')
  const missing = await old.reply()
  assert.deepEqual([missing.status, missing.headers.get('connection')], [404, 'keep-alive'])
  old.send('GET /announce?2 HTTP/1.0\r\n\r\nGET /announce?never HTTP/1.0\r\n\r\n')
  assert.equal((await old.reply()).headers.get('connection'), 'close')
  assert.equal(await old.ended(), '')
  const current = await rawClient(t, port)
  current.send(get('/announce?3'))
  assert.equal((await current.reply()).headers.has('connection'), false)
  current.send(get('/announce?4', 'Connection: close'))
  assert.equal((await current.reply()).headers.get('connection'), 'close')
  assert.equal(await current.ended(), '')
  assert.deepEqual(
    asked.map((line) => line.split(' ')[1]),
    ['1', '2', '3', '4'],
  )
})

test('a client that ends its half gets its reply, and one that ends within a head is told', async (t) => {
  const { port } = await startListener(t)
  const done = await rawClient(t, port, { allowHalfOpen: true })
  done.socket.end(get('/announce?a'))
  assert.deepEqual(
    parseReplies(await done.ended()).map(({ body }) => body),
    ['announce a'],
  )
  const cut = await rawClient(t, port, { allowHalfOpen: true })
  cut.socket.end(get('/announce?a').slice(0, -2))
  const [reply] = parseReplies(await cut.ended())
  assert.deepEqual(
    [reply?.status, reply?.body],
    [400, 'Cannot read the request: the connection ends within the head of the request\n'],
  )
  const silent = await rawClient(t, port, { allowHalfOpen: true })
  silent.socket.end('\r\n\r\n')
  assert.equal(await silent.ended(), '')
})

test('Expect: 100-continue is answered like any request: there is no body to continue with', async (t) => {
  const { port } = await startListener(t)
  const client = await rawClient(t, port)
  client.send(get('/announce?a', 'Expect: 100-continue'))
  assert.equal((await client.reply()).body, 'announce a')
})

test('pipelined requests are answered in order, and those behind a slow one wait for it', async (t) => {
  const slow = slowTracker()
  const { port } = await startListener(t, { tracker: slow.tracker })
  const client = await rawClient(t, port)
  client.send(['a', 'slow-b', 'c', 'slow-d', 'e'].map((query) => get(`/announce?${query}`)).join(''))
  assert.equal((await client.reply()).body, 'a')
  await until('the request waits', () => slow.waiting.length === 1)
  assert.deepEqual(slow.asked, ['a', 'slow-b'])
  slow.answer()
  for (const body of ['slow-b', 'c']) assert.equal((await client.reply()).body, body)
  assert.deepEqual(slow.asked, ['a', 'slow-b', 'c', 'slow-d'])
  slow.answer()
  for (const body of ['slow-d', 'e']) assert.equal((await client.reply()).body, body)
  // The connection goes on as before.
  client.send(get('/announce?f'))
  assert.equal((await client.reply()).body, 'f')
})

test('a late answer does not wait for the acknowledgement of the one before', async (t) => {
  const tracker: TrackerHandlers = {
    announce: async (query) => {
      await sleep(2)
      return Buffer.from(query)
    },
    scrape: (query) => Buffer.from(query),
  }
  const { port } = await startListener(t, { tracker })
  const client = await rawClient(t, port)
  const exchange = async (...targets: string[]) => {
    const startedAt = performance.now()
    client.send(targets.map((target) => get(target)).join(''))
    for (const target of targets) assert.equal((await client.reply()).body, target.slice(-1))
    return performance.now() - startedAt
  }
  // A kernel acknowledges at once until it has seen that a connection answers each packet by itself.
  for (let i = 0; i < 50; i++) await exchange('/scrape?a')
  const times: number[] = []
  for (let i = 0; i < 10; i++) times.push(await exchange('/scrape?a', '/announce?b', '/announce?c'))
  // It would be held back for 40 ms, each time.
  assert.ok(Math.min(...times) < 35, `the fastest took ${Math.min(...times)} ms`)
})

test('a client that ends its half while the tracker works gets its reply', async (t) => {
  const slow = slowTracker()
  const { port, listener } = await startListener(t, { tracker: slow.tracker })
  const client = await rawClient(t, port, { allowHalfOpen: true })
  const other = await rawClient(t, port)
  client.socket.end(get('/announce?slow'))
  await until('the request waits', () => slow.waiting.length === 1)
  // By the time another is answered, the end was read too.
  other.send(get('/announce?a'))
  await other.reply()
  slow.answer()
  assert.deepEqual(
    parseReplies(await client.ended()).map(({ body }) => body),
    ['slow'],
  )
  await until('it is connected', () => listener.connections === 1)
})

test('a client that leaves while the tracker works costs nothing', async (t) => {
  const slow = slowTracker()
  const { port, listener } = await startListener(t, { tracker: slow.tracker })
  const client = await rawClient(t, port)
  client.send(get('/announce?slow'))
  await until('the request waits', () => slow.waiting.length === 1)
  client.socket.resetAndDestroy()
  await until('the connection is gone', () => listener.connections === 0)
  slow.answer()
  const other = await rawClient(t, port)
  other.send(get('/announce?a'))
  assert.equal((await other.reply()).body, 'a')
})

test('while the tracker works, what more a client sends is left to the kernel', async (t) => {
  const slow = slowTracker()
  const { client, socket } = await startConnection(t, slow.tracker)
  client.send(get('/announce?slow'))
  await until('the request waits', () => slow.waiting.length === 1)
  const count = 200_000
  client.send(get('/announce?a').repeat(count))
  await until('nothing more is read', () => socket.isPaused())
  // The client's bytes do not fit into the kernel, and do not come here either.
  await until('more has come than was read', () => socket.readableLength > 0)
  const held = 2 * 64 * 1024 + socket.readableHighWaterMark
  assert.ok(socket.bytesRead <= held, `${socket.bytesRead} bytes were read`)
  assert.ok(client.socket.writableLength > 0)
  slow.answer()
  await until('all are asked', () => slow.asked.length === count + 1)
  const replyBytes = (query: string) =>
    `HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: ${query.length}\r\n\r\n${query}`.length
  await until(
    'all replies have come',
    () => client.socket.bytesRead === replyBytes('slow') + count * replyBytes('a'),
  )
})

test('while a client does not read, what more it sends is left to the kernel', async (t) => {
  const body = Buffer.alloc(16 * 1024 * 1024)
  const { client, socket } = await startConnection(t, { announce: () => body, scrape: () => body })
  client.socket.pause()
  client.send(get('/announce?a'))
  await until('a reply does not fit', () => socket.writableNeedDrain)
  client.send(get('/announce?a').repeat(200_000))
  await until('nothing more is read', () => socket.isPaused() && socket.readableLength > 0)
  const held = 2 * 64 * 1024 + socket.readableHighWaterMark
  assert.ok(socket.bytesRead <= held, `${socket.bytesRead} bytes were read`)
})

test('part of a head behind a slow request is read on', async (t) => {
  const slow = slowTracker()
  const { port } = await startListener(t, { tracker: slow.tracker })
  const client = await rawClient(t, port)
  client.send(get('/announce?slow') + get('/announce?a').slice(0, 20))
  await until('the request waits', () => slow.waiting.length === 1)
  slow.answer()
  assert.equal((await client.reply()).body, 'slow')
  client.send(get('/announce?a').slice(20))
  assert.equal((await client.reply()).body, 'a')
})

test('what comes behind a request that closes is dropped, and does not keep the connection', async (t) => {
  const slow = slowTracker()
  const { client, socket } = await startConnection(t, slow.tracker, { allowHalfOpen: true })
  client.send(get('/announce?slow', 'Connection: close'))
  await until('the request waits', () => slow.waiting.length === 1)
  client.send(get('/announce?never').repeat(10_000))
  await until('nothing more is read', () => socket.isPaused())
  slow.answer()
  assert.equal((await client.reply()).body, 'slow')
  assert.equal(await client.ended(), '')
  client.socket.end()
  await until('both ends are closed', () => client.socket.closed && socket.closed)
  // All of it was read, so nothing was reset.
  assert.equal(socket.bytesRead, client.socket.bytesWritten)
  assert.equal(client.socket.errored, null)
  assert.deepEqual(slow.asked, ['slow'])
})

test('a client that does not read its replies is asked for no more, and closed in the end', async (t) => {
  const body = Buffer.alloc(256 * 1024)
  let asked = 0
  const answer = () => {
    asked++
    return body
  }
  const { port, listener } = await startListener(t, {
    tracker: { announce: answer, scrape: answer },
    idleTimeoutMs: 300,
  })
  const client = await rawClient(t, port)
  client.socket.pause()
  client.send(get('/announce?a').repeat(2000))
  await until('it is connected', () => listener.connections === 1)
  await until('the connection is gone', () => listener.connections === 0)
  // What fits into the buffers of both kernels, far from 500 MB.
  assert.ok(asked < 200, `asked ${asked} times`)
})

test('a client that reads slowly gets all its replies', async (t) => {
  const body = Buffer.alloc(100_000, 'x')
  const { port } = await startListener(t, { tracker: { announce: () => body, scrape: () => body } })
  const client = await rawClient(t, port)
  client.socket.pause()
  client.send(get('/announce?a').repeat(300) + get('/announce?a', 'Connection: close'))
  await until('half a request is sent', () => client.socket.bytesWritten > 0)
  client.socket.resume()
  assert.equal(parseReplies(await client.ended()).length, 301)
})

test('a head that does not end is answered with 408, however busily it is sent', async (t) => {
  const { port } = await startListener(t, { headTimeoutMs: 300 })
  const client = await rawClient(t, port)
  const startMs = performance.now()
  client.send('GET /announce?')
  const drip = setInterval(() => client.socket.writable && client.send('a'), 20)
  t.after(() => {
    clearInterval(drip)
  })
  const reply = await client.reply()
  assert.equal(reply.status, 408)
  assert.equal(reply.headers.get('connection'), 'close')
  assert.ok(performance.now() - startMs >= 290, `after ${performance.now() - startMs} ms`)
})

test('the time for a head counts anew for each request', async (t) => {
  const { port, listener } = await startListener(t, { headTimeoutMs: 300 })
  const client = await rawClient(t, port)
  const startMs = performance.now()
  let replies = 0
  for (; performance.now() - startMs < 900; replies++) {
    const text = get('/announce?a')
    client.send(text.slice(0, 20))
    await until('it is connected', () => listener.connections === 1)
    client.send(text.slice(20))
    assert.equal((await client.reply()).status, 200)
  }
  assert.ok(replies > 1)
})

test('connections that say nothing are closed: new ones and those between requests', async (t) => {
  const { port, listener } = await startListener(t, { headTimeoutMs: 200, idleTimeoutMs: 400 })
  const [silent, idle] = [await rawClient(t, port), await rawClient(t, port)]
  // An empty line behind a request is not the begin of another.
  idle.send(`${get('/announce?a')}\r\n`)
  await idle.reply()
  const startMs = performance.now()
  assert.equal(await silent.ended(), '')
  await until('it is connected', () => listener.connections === 1)
  assert.equal(await idle.ended(), '')
  assert.ok(performance.now() - startMs >= 250, `after ${performance.now() - startMs} ms`)
  await until('the connection is gone', () => listener.connections === 0)
})

test('connections beyond the limit are closed as they come and counted, others go on', async (t) => {
  const { port, listener } = await startListener(t, { connectionsMax: 2 })
  const [first, second] = [await rawClient(t, port), await rawClient(t, port)]
  await until('two are connected', () => listener.connections === 2)
  const third = await rawClient(t, port)
  assert.equal(await third.ended(), '')
  assert.deepEqual([listener.connections, listener.refused], [2, 1])
  first.send(get('/announce?a'))
  assert.equal((await first.reply()).status, 200)
  second.socket.destroy()
  await until('one of them is gone', () => listener.connections === 1)
  const fourth = await rawClient(t, port)
  fourth.send(get('/announce?b'))
  assert.equal((await fourth.reply()).status, 200)
  listener.update({ connectionsMax: 3 })
  const fifth = await rawClient(t, port)
  fifth.send(get('/announce?c'))
  assert.equal((await fifth.reply()).status, 200)
})

test('a process without file descriptors refuses connections and goes on', async (t) => {
  const program = join(import.meta.dirname, '../../support/http-listener-process.ts')
  const child = spawn('bash', ['-c', 'ulimit -n 64; exec "$0" "$1"', process.execPath, program], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  t.after(() => child.kill('SIGKILL'))
  const [line] = (await once(createInterface(child.stdout), 'line')) as [string]
  const port = Number(line)
  const clients = Array.from({ length: 120 }, () => connect({ port, host: '127.0.0.1' }))
  let closed = 0
  for (const client of clients) {
    client.on('error', () => undefined).once('close', () => closed++)
    client.resume()
    t.after(() => client.destroy())
  }
  // Some get in, and the rest is told at once rather than left waiting.
  await until('the others are closed', () => closed >= 60)
  assert.ok(closed < 120)
  for (const client of clients) client.destroy()
  // It takes a moment until it has them back.
  await until('there is room again', async () => {
    const client = await rawClient(t, port)
    client.send(get('/announce?a', 'Connection: close'))
    return (await client.ended()).startsWith('HTTP/1.1 200')
  })
  assert.equal(child.exitCode, null)
})

test('what cannot be read is refused in words that arrive, even while the client still sends', async (t) => {
  const { port, asked } = await startListener(t)
  const client = await rawClient(t, port, { allowHalfOpen: true })
  client.send('POST /announce HTTP/1.1\r\nHost: h\r\nContent-Length: 50000000\r\n\r\n')
  const piece = Buffer.alloc(1_000_000)
  for (let i = 0; i < 50; i++) client.socket.write(piece)
  const reply = await client.reply()
  assert.deepEqual(
    [reply.status, reply.headers.get('connection'), reply.body],
    [413, 'close', 'Cannot read the request: requests with a body are not taken\n'],
  )
  // All of it was read and dropped: the client was not reset.
  client.socket.end()
  await once(client.socket, 'close')
  assert.equal(client.socket.errored, null)
  assert.equal(
    client.socket.bytesWritten,
    50_000_000 + 'POST /announce HTTP/1.1\r\nHost: h\r\nContent-Length: 50000000\r\n\r\n'.length,
  )
  for (const [text, status] of [
    ['GET /announce\r\n\r\n', 400],
    [get('/announce', 'Content-Length: 0', 'Content-Length: 0'), 400],
    ['PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', 400],
    [get(`/announce?${'a'.repeat(17_000)}`), 431],
  ] as const) {
    const other = await rawClient(t, port)
    other.send(text)
    const refusal = await other.reply()
    assert.deepEqual([refusal.status, refusal.headers.get('connection')], [status, 'close'])
    assert.equal(await other.ended(), '')
  }
  assert.deepEqual(asked, [])
})

test('a refused client that does not stop sending is cut after some seconds', async (t) => {
  const { port, listener } = await startListener(t, { headTimeoutMs: 500 })
  const client = await rawClient(t, port, { allowHalfOpen: true })
  client.send(get('/announce', 'Transfer-Encoding: chunked'))
  assert.equal((await client.reply()).status, 413)
  const drip = setInterval(() => client.socket.writable && client.send('a'), 20)
  t.after(() => {
    clearInterval(drip)
  })
  await until('the connections are gone', () => listener.connections === 0)
})

test('a tracker that throws costs a 500, and one that answers nonsense a connection', async (t) => {
  const logged: string[] = []
  const log = { error: (_fields: object, message: string) => logged.push(message) } as unknown as Logger
  const tracker: TrackerHandlers = {
    announce: (query) => {
      if (query === 'throw') throw new Error('broken')
      if (query === 'reject') return Promise.reject(new Error('broken'))
      if (query === 'nonsense') return undefined as unknown as Buffer
      if (query === 'late-nonsense') return Promise.resolve(undefined as unknown as Buffer)
      return Buffer.from(query)
    },
    scrape: () => Buffer.alloc(0),
  }
  const { port } = await startListener(t, { tracker, log })
  const client = await rawClient(t, port)
  for (const query of ['throw', 'reject']) {
    client.send(get(`/announce?${query}`))
    const reply = await client.reply()
    assert.deepEqual([reply.status, reply.body], [500, 'internal error\n'])
  }
  client.send(get('/announce?fine'))
  assert.equal((await client.reply()).body, 'fine')
  for (const query of ['nonsense', 'late-nonsense']) {
    const other = await rawClient(t, port)
    other.send(get(`/announce?${query}`))
    assert.equal(await other.ended(), '')
  }
  assert.deepEqual(logged, ['request failed', 'request failed', 'connection failed', 'connection failed'])
  client.send(get('/announce?fine'))
  assert.equal((await client.reply()).body, 'fine')
})

test('the forwarded header counts from trusted proxies alone, and a broken one is refused', async (t) => {
  const { port, asked, listener } = await startListener(t, { trustedProxies: [parseCidr('127.0.0.2/32')] })
  const proxy = await rawClient(t, port, { localAddress: '127.0.0.2' })
  const stranger = await rawClient(t, port, { localAddress: '127.0.0.3' })
  const forwarded = get('/announce?a', 'X-Forwarded-For: 9.9.9.9', 'x-forwarded-for: 192.0.2.1, 127.0.0.2')
  for (const client of [proxy, stranger]) {
    client.send(forwarded)
    assert.equal((await client.reply()).status, 200)
  }
  proxy.send(get('/announce?b', 'X-Forwarded-For: unknown'))
  const broken = await proxy.reply()
  assert.deepEqual(
    [broken.status, broken.body],
    [400, 'Cannot read X-Forwarded-For after 127.0.0.2: need addresses\n'],
  )
  // Connections that are there see what changes.
  listener.update({ trustedProxies: [parseCidr('127.0.0.3/32')], forwardedHeader: 'x-real-ip' })
  for (const client of [proxy, stranger]) {
    client.send(get('/announce?c', 'X-Real-IP: 192.0.2.7', 'X-Forwarded-For: 192.0.2.8'))
    assert.equal((await client.reply()).status, 200)
  }
  assert.deepEqual(asked, [
    'announce a 192.0.2.1',
    'announce a 127.0.0.3',
    'announce c 127.0.0.2',
    'announce c 192.0.2.7',
  ])
})

test('a reload that cannot be used changes nothing', async (t) => {
  const { port, listener } = await startListener(t)
  const client = await rawClient(t, port)
  const status = async (path: string) => {
    client.send(get(path))
    return (await client.reply()).status
  }
  assert.throws(() => {
    listener.update({ routes: { announce: ['announce'], scrape: [] } })
  }, /Cannot use route "announce": need a path such as \/announce/)
  assert.deepEqual([await status('/announce'), await status('/a')], [200, 404])
  listener.update({ routes: { announce: ['/a'], scrape: [] } })
  assert.deepEqual([await status('/announce'), await status('/a')], [404, 200])
  assert.throws(() => {
    listener.setTls({ cert: Buffer.alloc(0), key: Buffer.alloc(0) })
  }, /speaks no TLS/)
})

test('disposed, a listener closes idle connections at once, and answers what is under way as the last', async (t) => {
  const slow = slowTracker()
  const { port, listener } = await startListener(t, { tracker: slow.tracker })
  const [idle, fresh, working, reading] = await Promise.all(
    Array.from({ length: 4 }, () => rawClient(t, port)),
  )
  assert.ok(idle && fresh && working && reading)
  working.send(get('/announce?slow') + get('/announce?never'))
  reading.send(get('/announce?b').slice(0, 30))
  await until(
    'all are connected, and one waits',
    () => slow.waiting.length === 1 && listener.connections === 4,
  )
  // By the time this is answered, what was sent before was read.
  idle.send(get('/announce?a'))
  await idle.reply()
  const disposed = listener[Symbol.asyncDispose]()
  assert.equal(listener[Symbol.asyncDispose](), disposed)
  assert.deepEqual([await idle.ended(), await fresh.ended()], ['', ''])
  await assert.rejects(rawClient(t, port), { code: 'ECONNREFUSED' })
  reading.send(get('/announce?b').slice(30))
  slow.answer()
  for (const [client, body] of [
    [reading, 'b'],
    [working, 'slow'],
  ] as const) {
    const reply = await client.reply()
    assert.deepEqual([reply.body, reply.headers.get('connection')], [body, 'close'])
    assert.equal(await client.ended(), '')
  }
  await disposed
  assert.deepEqual(slow.asked, ['slow', 'a', 'b'])
  await until('the connection is gone', () => listener.connections === 0)
})

test('disposed, a listener lets a client read what it was answered', async (t) => {
  const body = Buffer.alloc(64 * 1024 * 1024, 'x')
  const { port, listener } = await startListener(t, { tracker: { announce: () => body, scrape: () => body } })
  const client = await rawClient(t, port)
  client.socket.pause()
  client.send(get('/announce?a'))
  await until('a reply has begun', () => client.socket.readableLength > 0)
  const startMs = performance.now()
  const disposed = listener[Symbol.asyncDispose]()
  client.socket.resume()
  assert.ok((await client.ended()).length > body.length)
  await disposed
  assert.ok(performance.now() - startMs < 9_000, 'the connection was kept until it was cut')
})

test('disposed, a listener does not wait for ever', async (t) => {
  const slow = slowTracker()
  const { port, listener } = await startListener(t, { tracker: slow.tracker, drainTimeoutMs: 200 })
  const client = await rawClient(t, port)
  client.send(get('/announce?slow'))
  await until('the request waits', () => slow.waiting.length === 1)
  const startMs = performance.now()
  await listener[Symbol.asyncDispose]()
  assert.ok(performance.now() - startMs >= 190)
  assert.equal(await client.ended(), '')
})

test('an address that is taken is an error, unless both share it', async (t) => {
  const { port } = await startListener(t)
  await assert.rejects(startListener(t, { port }), { code: 'EADDRINUSE' })
  const shared = await startListener(t, { reusePort: true })
  const again = await startListener(t, { reusePort: true, port: shared.port })
  assert.equal(again.port, shared.port)
  const client = await rawClient(t, shared.port)
  client.send(get('/announce?a'))
  assert.equal((await client.reply()).body, 'announce a')
})

test('routes: alone, with names, with a rest; matched as httprouter does', () => {
  const match = compileRoutes({
    announce: ['/announce', '/:key/announce', '/v1/user_:name/a'],
    scrape: ['/static/announce', '/s/*rest', '/a.b'],
  })
  const cases: Record<string, 'announce' | 'scrape' | undefined> = {
    '/announce': 'announce',
    '/announce/': undefined,
    '//announce': undefined,
    '/Announce': undefined,
    '/k/announce': 'announce',
    '/k%2fl/announce': 'announce',
    '/k/l/announce': undefined,
    '/static/announce': 'scrape',
    '/v1/user_x/a': 'announce',
    '/v1/user_/a': undefined,
    '/s': undefined,
    '/s/': 'scrape',
    '/s/a/b': 'scrape',
    '/a.b': 'scrape',
    '/aXb': undefined,
    '/': undefined,
    '*': undefined,
  }
  for (const [path, action] of Object.entries(cases)) assert.equal(match(path), action, path)
})

test('routes that cannot be read, or that would never be reached, are errors', () => {
  const compile =
    (...announce: string[]) =>
    () =>
      compileRoutes({ announce, scrape: ['/scrape'] })
  for (const route of ['announce', '', '/a?b', '/a#b', '/a b', '/\xe9'])
    assert.throws(compile(route), /need a path/)
  for (const route of ['/:', '/*', '/:a:b', '/:a*b', '/:a-b']) assert.throws(compile(route), /need one name/)
  for (const route of ['/*rest/a', '/a*rest']) assert.throws(compile(route), /must be the last segment/)
  assert.throws(compile('/scrape'), /another route takes the same paths/)
  assert.throws(compile('/:a/x', '/:b/x'), /another route takes the same paths/)
})

/** Answers queries that start with "slow" when told to, others at once, with the query. */
function slowTracker() {
  const asked: string[] = []
  const waiting: (() => void)[] = []
  const answer = (query: string) => {
    asked.push(query)
    const bytes = Buffer.from(query)
    return query.startsWith('slow')
      ? new Promise<Buffer>((resolve) => {
          waiting.push(() => {
            resolve(bytes)
          })
        })
      : bytes
  }
  return { tracker: { announce: answer, scrape: answer }, asked, waiting, answer: () => waiting.shift()?.() }
}

/** One connection without a listener, to look at its socket. */
async function startConnection(t: TestContext, tracker: TrackerHandlers, options = {}) {
  const server = createServer({ allowHalfOpen: true })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.after(() => server.close())
  const [client, [socket]] = await Promise.all([
    rawClient(t, (server.address() as { port: number }).port, options),
    once(server, 'connection') as Promise<[Socket]>,
  ])
  const context = {
    tracker,
    match: compileRoutes({ announce: ['/announce'], scrape: [] }),
    trustedProxies: [],
    forwardedHeader: 'x-forwarded-for',
    headTimeoutMs: 60_000,
    idleTimeoutMs: 60_000,
    turns: new Turns(),
    now: () => 0,
    closing: false,
    leaving: false,
    log: silentLog(),
  } as const
  new HttpConnection(context, socket, undefined, () => undefined)
  return { client, socket }
}
