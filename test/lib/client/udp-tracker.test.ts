import assert from 'node:assert/strict'
import type { RemoteInfo } from 'node:dgram'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { UnreachableError } from '../../../lib/client/http.ts'
import type { UdpTracker, UdpTrackerOptions } from '../../../lib/client/udp-tracker.ts'
import { createUdpTracker } from '../../../lib/client/udp-tracker.ts'
import type { Family } from '../../../lib/protocol/address.ts'
import { endpoint, formatEndpoint, parseIp } from '../../../lib/protocol/address.ts'
import type { Announce } from '../../../lib/protocol/announce.ts'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import {
  parseUdpAnnounce,
  parseUdpScrape,
  readUdpAction,
  readUdpTransactionId,
  udpActions,
  writeUdpAnnounceHeader,
  writeUdpConnectReply,
  writeUdpError,
  writeUdpScrapeReply,
} from '../../../lib/protocol/udp.ts'

const infoHash = infoHashFromHex('0102030405060708090a0b0c0d0e0f1011121314')
const otherHash = infoHashFromHex('f1f2f3f4f5f6f7f8f9fafbfcfdfeff0011223344')
const announce = {
  infoHash,
  peerId: Buffer.from('-RS0001-abcdefghijkl'),
  port: 6881,
  uploaded: 1,
  downloaded: 2,
  left: 3,
  event: 'started' as const,
}

for (const family of [4, 6] as const) {
  test(`announce() connects, announces and hands out the peers of the reply, over IPv${family}`, async (t) => {
    const tracker = await startTracker(t, { family })
    const client = startClient(t, tracker)
    const reply = await client.announce({ ...announce, numwant: 7 })
    assert.deepEqual(tracker.seen, ['connect', 'announce'])
    assert.equal(reply.intervalSeconds, 1800)
    assert.deepEqual([reply.complete, reply.incomplete], [4, 5])
    assert.deepEqual(
      reply.peers.map((peer) => formatEndpoint(peer.endpoint)),
      family === 4 ? ['10.1.2.3:6881'] : ['[2001:db8::7]:6881'],
    )
    const [got] = tracker.announces
    assert.ok(got)
    const { uploaded, downloaded, left, event, numwant, jwt } = got
    assert.equal(got.infoHash, infoHash)
    assert.deepEqual([uploaded, downloaded, left, event, numwant, jwt], [1, 2, 3, 'started', 7, undefined])
  })
}

test('a tracker is found by name, in the family that was asked for', async (t) => {
  const tracker = await startTracker(t, { family: 4 })
  const client = startClient(t, tracker, { url: `udp://localhost:${tracker.port}`, family: 4 })
  assert.equal((await client.announce(announce)).intervalSeconds, 1800)
})

test('scrape() answers each infohash, and leaves out what the tracker left out', async (t) => {
  const tracker = await startTracker(t)
  const client = startClient(t, tracker)
  const counts = await client.scrape([infoHash, otherHash])
  assert.deepEqual(counts.get(infoHash), { complete: 0, downloaded: 10, incomplete: 20 })
  assert.deepEqual(counts.get(otherHash), { complete: 1, downloaded: 11, incomplete: 21 })
  tracker.scrapeMax = 1
  assert.deepEqual([...(await client.scrape([infoHash, otherHash])).keys()], [infoHash])
  await assert.rejects(client.scrape([]), RangeError)
  await assert.rejects(client.scrape(new Array(75).fill(infoHash)), /at once: need 1 to 74/)
})

test('token, tracker id and what the URL says travel in URLData; without them the packet is a plain one', async (t) => {
  const tracker = await startTracker(t)
  const token = 'eyJhbGciOi.'.repeat(64)
  const origin = `udp://127.0.0.1:${tracker.port}`
  const sent = async (url: string, more: { jwt?: string; trackerId?: string }) => {
    await startClient(t, tracker, { url }).announce({ ...announce, ...more })
    const { jwt, trackerId } = tracker.announces.at(-1) ?? {}
    return { jwt, trackerId, urlData: urlDataOf(tracker.packets.at(-1)) }
  }
  assert.deepEqual(await sent(origin, {}), { jwt: undefined, trackerId: undefined, urlData: '' })
  assert.equal(tracker.packets.at(-1)?.length, 98)
  assert.equal((await sent(`${origin}/`, {})).urlData, '')
  assert.equal((await sent(`${origin}/announce`, {})).urlData, '/announce')
  assert.equal((await sent(`${origin}/announce?jwt=a.b`, {})).jwt, 'a.b')
  assert.deepEqual(await sent(`${origin}/announce?x=1`, { jwt: token, trackerId: 'a&b' }), {
    jwt: token,
    trackerId: 'a&b',
    urlData: `/announce?x=1&trackerid=a%26b&jwt=${token}`,
  })
  assert.equal((await sent(`${origin}/announce?jwt=old`, { jwt: 'new' })).jwt, 'new')
  assert.equal((await sent(origin, { jwt: token })).urlData, `/?jwt=${token}`)
  assert.equal((await sent(`${origin}?x=1`, { jwt: 'a' })).urlData, '/?x=1&jwt=a')
})

test('a connection id is used for one minute, then a new one is asked for', async (t) => {
  const tracker = await startTracker(t)
  let nowMs = 1000
  const client = startClient(t, tracker, { monotonic: () => nowMs })
  await client.announce(announce)
  nowMs += 59_999
  await client.scrape([infoHash])
  assert.deepEqual(tracker.seen, ['connect', 'announce', 'scrape'])
  nowMs += 1
  await client.announce(announce)
  assert.deepEqual(tracker.seen, ['connect', 'announce', 'scrape', 'connect', 'announce'])
})

test('transaction ids differ from request to request', async (t) => {
  const tracker = await startTracker(t)
  const client = startClient(t, tracker)
  for (let i = 0; i < 10; i++) await client.announce(announce)
  assert.equal(new Set(tracker.packets.map(readUdpTransactionId)).size, tracker.packets.length)
})

test('what is lost is sent again after 15 s, then after twice the wait each time', async (t) => {
  t.mock.timers.enable({ apis: ['setTimeout'] })
  const tracker = await startTracker(t, {
    drop: (kind, count) => (kind === 'connect' ? count <= 1 : count <= 2),
  })
  const client = startClient(t, tracker)
  const reply = client.announce(announce)
  await tracker.saw(['connect'])
  await ticked(t, 14_999)
  assert.deepEqual(tracker.seen, ['connect'])
  await ticked(t, 1)
  await tracker.saw(['connect', 'connect', 'announce'])
  await ticked(t, 29_999)
  assert.deepEqual(tracker.seen, ['connect', 'connect', 'announce'])
  await ticked(t, 1)
  await tracker.saw(['connect', 'connect', 'announce', 'announce'])
  await ticked(t, 59_999)
  assert.deepEqual(tracker.seen, ['connect', 'connect', 'announce', 'announce'])
  await ticked(t, 1)
  assert.equal((await reply).complete, 4)
  assert.deepEqual(tracker.seen, ['connect', 'connect', 'announce', 'announce', 'announce'])
})

test('a tracker that stays silent is given up on, by its name without the token', async (t) => {
  const tracker = await startTracker(t, { drop: () => true })
  const url = `udp://127.0.0.1:${tracker.port}/announce?jwt=secret`
  const client = startClient(t, tracker, { url, firstTimeoutMs: 5, triesMax: 3 })
  await assert.rejects(client.announce({ ...announce, jwt: 'secret' }), (error) => {
    assert.ok(error instanceof UnreachableError)
    assert.equal(error.message, `Cannot reach udp://127.0.0.1:${tracker.port}: it does not answer (tries: 3)`)
    return true
  })
  assert.deepEqual(tracker.seen, ['connect', 'connect', 'connect'])
  // It is tried afresh afterwards, from a new socket.
  tracker.drop = () => false
  assert.equal((await client.announce(announce)).complete, 4)
  assert.equal(new Set(tracker.senders.slice(0, 3)).size, 1)
  assert.notEqual(tracker.senders[3], tracker.senders[0])
})

test('a closed port is reported at once, and tried afresh when something listens there', async (t) => {
  const gone = await startTracker(t)
  const client = startClient(t, gone)
  await client.announce(announce)
  await gone.close()
  await assert.rejects(client.announce(announce), /nothing listens there \(connection refused\)/)
  await startTracker(t, { port: gone.port })
  assert.equal((await client.announce(announce)).complete, 4)
})

test('a tracker without an address of the family wanted cannot be reached', async (t) => {
  const client = startClient(t, undefined, { url: 'udp://127.0.0.1:1', family: 6 })
  await assert.rejects(client.announce(announce), {
    name: 'UnreachableError',
    message: 'Cannot reach udp://127.0.0.1:1: it has only an IPv4 address',
  })
})

test('replies with another transaction id, from another address, or too late are not taken', async (t) => {
  const stranger = createSocket('udp4')
  t.after(() => stranger.close())
  stranger.bind(0, '127.0.0.1')
  await once(stranger, 'listening')
  const tracker = await startTracker(t, {
    before: async (packet, from, send) => {
      const transactionId = readUdpTransactionId(packet)
      const forged = readUdpAction(packet) === udpActions.connect ? connectReply : announceReply
      // From the tracker, but to no request; half a reply; and the right one from a stranger.
      await send(forged((transactionId + 1) >>> 0, 66))
      await send(forged(transactionId, 66).subarray(0, 7))
      const { promise, resolve } = Promise.withResolvers<undefined>()
      stranger.send(forged(transactionId, 66), from.port, from.address, () => resolve(undefined))
      await promise
    },
    // Everything twice: the second comes when its request has ended.
    copies: 2,
  })
  const client = startClient(t, tracker)
  for (let i = 0; i < 3; i++)
    assert.equal((await client.announce({ ...announce, port: 1000 + i })).complete, 4)
  assert.equal((await client.scrape([infoHash])).get(infoHash)?.downloaded, 10)
  assert.deepEqual(tracker.seen, ['connect', 'announce', 'announce', 'announce', 'scrape'])
})

test('an answer to an earlier try counts as long as its request lasts', async (t) => {
  let first: (() => Promise<void>) | undefined
  const tracker = await startTracker(t, {
    // The first announce is answered only when the second has come, and the second not at all.
    hold: (kind, count, answer) => {
      if (kind !== 'announce') return false
      if (count === 1) first = answer
      else void first?.()
      return true
    },
  })
  const client = startClient(t, tracker, { firstTimeoutMs: 20 })
  assert.equal((await client.announce(announce)).complete, 4)
  assert.deepEqual(tracker.seen.slice(0, 3), ['connect', 'announce', 'announce'])
})

test("a refusal is ClientError 'tracker_failure' with the tracker's words, and is not tried again", async (t) => {
  const tracker = await startTracker(t, { refuse: (kind) => (kind === 'connect' ? undefined : `no ${kind}`) })
  const client = startClient(t, tracker)
  const failure = (message: string) => ({ name: 'ClientError', code: 'tracker_failure', message })
  await assert.rejects(client.announce(announce), failure('no announce'))
  await assert.rejects(client.scrape([infoHash]), failure('no scrape'))
  assert.deepEqual(tracker.seen, ['connect', 'announce', 'scrape'])
  tracker.refuse = (kind) => `no ${kind} at all`
  await assert.rejects(startClient(t, tracker).announce(announce), failure('no connect at all'))
})

test('a reply that makes no sense is ClientError bad_reply', async (t) => {
  const tracker = await startTracker(t, {
    before: async (packet, _, send) => {
      if (readUdpAction(packet) !== udpActions.connect)
        await send(connectReply(readUdpTransactionId(packet), 1))
    },
  })
  await assert.rejects(startClient(t, tracker).announce(announce), { name: 'ClientError', code: 'bad_reply' })
})

test('a tracker that forgot its connection ids is connected to again, once', async (t) => {
  const tracker = await startTracker(t)
  const client = startClient(t, tracker)
  await client.announce(announce)
  tracker.connectionByte = 78
  await client.announce(announce)
  assert.deepEqual(tracker.seen, ['connect', 'announce', 'announce', 'connect', 'announce'])
  tracker.refuse = (kind) => (kind === 'connect' ? undefined : 'bad connection ID')
  await assert.rejects(client.announce(announce), { code: 'tracker_failure', message: 'bad connection ID' })
  assert.deepEqual(tracker.seen.slice(5), ['announce', 'connect', 'announce'])
})

test('many requests at once share the socket, and their number is bounded', async (t) => {
  const tracker = await startTracker(t)
  const client = startClient(t, tracker)
  const results = await Promise.allSettled(
    Array.from({ length: 300 }, (_, i) => client.announce({ ...announce, port: 1000 + i })),
  )
  const answered = results.filter(({ status }) => status === 'fulfilled').length
  assert.equal(answered, 256)
  assert.equal(new Set(tracker.announces.map(({ port }) => port)).size, 256)
  assert.equal(new Set(tracker.senders).size, 1)
  const refused = results.find((result) => result.status === 'rejected')
  assert.match(String(refused?.reason), /too many requests under way: at most 256 at once/)
  assert.equal((await client.announce(announce)).complete, 4)
})

test('a signal ends a request with its reason, before it starts or while it waits', async (t) => {
  const tracker = await startTracker(t, { drop: (kind) => kind === 'announce' })
  const client = startClient(t, tracker)
  const reason = new Error('enough')
  await assert.rejects(client.announce(announce, { signal: AbortSignal.abort(reason) }), reason)
  assert.deepEqual(tracker.seen, [])
  const control = new AbortController()
  const waiting = client.announce(announce, { signal: control.signal })
  const rejected = assert.rejects(waiting, reason)
  await tracker.saw(['connect', 'announce'])
  control.abort(reason)
  await rejected
  assert.equal((await client.scrape([infoHash])).size, 1)
})

test('closing ends what is under way, and nothing can be asked afterwards', async (t) => {
  const tracker = await startTracker(t, { drop: (kind) => kind === 'announce' })
  const client = startClient(t, tracker)
  const rejected = assert.rejects(client.announce(announce), /its client was closed/)
  await tracker.saw(['connect', 'announce'])
  await client[Symbol.asyncDispose]()
  await rejected
  await assert.rejects(client.announce(announce), /its client was closed/)
  await client[Symbol.asyncDispose]()
  await startClient(t, tracker)[Symbol.asyncDispose]()
})

test('packets leave from the local address that was set', async (t) => {
  const tracker = await startTracker(t)
  await startClient(t, tracker, { localAddress: '127.0.1.7' }).announce(announce)
  assert.match(tracker.senders[0] ?? '', /^127\.0\.1\.7:/)
  await assert.rejects(
    startClient(t, tracker, { localAddress: '192.0.2.1' }).announce(announce),
    UnreachableError,
  )
})

test('a URL that is not a UDP tracker is refused, without repeating what may be a token', () => {
  for (const url of ['http://127.0.0.1:1/?jwt=secret', 'udp://127.0.0.1/?jwt=secret', 'udp:secret', 'secret'])
    assert.throws(
      () => createUdpTracker({ url }),
      (error) => error instanceof Error && /need udp:/.test(error.message) && !/secret/.test(error.message),
      url,
    )
})

type Kind = 'connect' | 'announce' | 'scrape'

interface Behaviour {
  family: Family
  port: number
  /** Whether the `count`th request of a kind is lost. */
  drop(kind: Kind, count: number): boolean
  /** An error instead of the reply. */
  refuse(kind: Kind): string | undefined
  /** Sent before the reply. */
  before(packet: Buffer, from: RemoteInfo, send: (reply: Buffer) => Promise<void>): Promise<void>
  /** True: the reply is sent when `answer` is called. */
  hold(kind: Kind, count: number, answer: () => Promise<void>): boolean
  copies: number
  scrapeMax: number
  /** The connection id is eight of it. */
  connectionByte: number
}

interface TestTracker extends Behaviour {
  readonly seen: Kind[]
  readonly packets: Buffer[]
  readonly announces: Announce[]
  readonly senders: string[]
  /** Resolves when these requests have come. */
  saw(kinds: readonly Kind[]): Promise<void>
  close(): Promise<void>
}

async function startTracker(t: TestContext, behaviour: Partial<Behaviour> = {}): Promise<TestTracker> {
  const family = behaviour.family ?? 4
  const socket = createSocket(family === 4 ? 'udp4' : 'udp6')
  let open = true
  const arrived = new EventTarget()
  const tracker: TestTracker = {
    drop: () => false,
    refuse: () => undefined,
    before: async () => undefined,
    hold: () => false,
    copies: 1,
    scrapeMax: 74,
    connectionByte: 77,
    family,
    ...behaviour,
    port: 0,
    seen: [],
    packets: [],
    announces: [],
    senders: [],
    saw: async (kinds) => {
      while (tracker.seen.length < kinds.length) await once(arrived, 'request')
      assert.deepEqual(tracker.seen, kinds)
    },
    close: async () => {
      if (!open) return
      open = false
      const closed = once(socket, 'close')
      socket.close()
      await closed
    },
  }
  const receive = async (packet: Buffer, from: RemoteInfo) => {
    const kind = kindOf(packet)
    tracker.seen.push(kind)
    tracker.packets.push(packet)
    tracker.senders.push(`${from.address}:${from.port}`)
    const count = tracker.seen.filter((other) => other === kind).length
    if (kind === 'announce') tracker.announces.push(parseUdpAnnounce(packet, family))
    arrived.dispatchEvent(new Event('request'))
    const send = async (reply: Buffer) => {
      const { promise, resolve } = Promise.withResolvers<undefined>()
      if (!open) return
      socket.send(reply, from.port, from.address, () => resolve(undefined))
      await promise
    }
    const answer = async () => {
      await tracker.before(packet, from, send)
      for (let i = 0; i < tracker.copies; i++) await send(replyTo(packet, kind, tracker))
    }
    if (tracker.drop(kind, count) || tracker.hold(kind, count, answer)) return
    await answer()
  }
  socket.on('message', (packet, from) => void receive(packet, from))
  socket.bind(behaviour.port ?? 0, family === 4 ? '127.0.0.1' : '::1')
  await once(socket, 'listening')
  t.after(() => tracker.close())
  tracker.port = socket.address().port
  return tracker
}

function startClient(
  t: TestContext,
  tracker: TestTracker | undefined,
  options: Partial<UdpTrackerOptions> = {},
): UdpTracker {
  const host = tracker?.family === 6 ? '[::1]' : '127.0.0.1'
  const client = createUdpTracker({ url: `udp://${host}:${tracker?.port ?? 1}`, ...options })
  t.after(() => client[Symbol.asyncDispose]())
  return client
}

/** Moves the mocked clock, and lets packets that are sent by then arrive. */
async function ticked(t: TestContext, ms: number): Promise<void> {
  t.mock.timers.tick(ms)
  for (let turns = 0; turns < 10; turns++) await new Promise((resolve) => setImmediate(resolve))
}

function kindOf(packet: Buffer): Kind {
  switch (readUdpAction(packet)) {
    case udpActions.connect:
      return 'connect'
    case udpActions.announce:
      return 'announce'
    case udpActions.scrape:
      return 'scrape'
    default:
      throw new Error(`unexpected packet ${packet.toString('hex')}`)
  }
}

function replyTo(packet: Buffer, kind: Kind, tracker: TestTracker): Buffer {
  const transactionId = readUdpTransactionId(packet)
  const refusal = tracker.refuse(kind)
  if (refusal !== undefined) return errorReply(transactionId, refusal)
  if (kind === 'connect') return connectReply(transactionId, tracker.connectionByte)
  const good = Buffer.alloc(8, tracker.connectionByte)
  if (!packet.subarray(0, 8).equals(good)) return errorReply(transactionId, 'bad connection ID')
  if (kind === 'announce') return announceReply(transactionId, 4, tracker.family)
  const { infoHashes } = parseUdpScrape(packet, 74)
  const swarms = infoHashes
    .slice(0, tracker.scrapeMax)
    .map((_, i) => ({ complete: i, downloaded: 10 + i, incomplete: 20 + i }))
  return written((target) => writeUdpScrapeReply(target, 0, transactionId, swarms))
}

function connectReply(transactionId: number, byte: number): Buffer {
  return written((target) => writeUdpConnectReply(target, 0, transactionId, Buffer.alloc(8, byte)))
}

function announceReply(transactionId: number, seeders: number, family: Family = 4): Buffer {
  const ip = parseIp(family === 4 ? '10.1.2.3' : '2001:db8::7')
  assert.ok(ip)
  const { compact } = endpoint(ip, 6881)
  const header = { action: udpActions.announce, transactionId, intervalSeconds: 1800, leechers: 5, seeders }
  return written((target) => {
    const at = writeUdpAnnounceHeader(target, 0, header)
    target.set(compact, at)
    return at + compact.length
  })
}

function errorReply(transactionId: number, text: string): Buffer {
  return written((target) => writeUdpError(target, 0, transactionId, text, 1472))
}

function written(write: (target: Buffer) => number): Buffer {
  const target = Buffer.alloc(2048)
  return target.subarray(0, write(target))
}

/** The URLData of an announce, its pieces put together. */
function urlDataOf(packet: Buffer | undefined): string {
  assert.ok(packet)
  let text = ''
  for (let at = 98; at < packet.length; at += 2 + (packet[at + 1] ?? 0)) {
    assert.equal(packet[at], 2)
    text += packet.toString('latin1', at + 2, at + 2 + (packet[at + 1] ?? 0))
  }
  return text
}
