// What a host tells those it is connected to of pieces, and whom it stays connected to for it.
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { describe, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { uploadSlots, uselessMs } from '../../../agent/engine/schedule.ts'
import { atOnceMax } from '../../../agent/engine/turns.ts'
import { encode } from '../../../lib/protocol/bencode.ts'
import type { Metainfo } from '../../../lib/protocol/metainfo.ts'
import { pieceCount } from '../../../lib/protocol/metainfo.ts'
import { until } from '../../support/until.ts'
import type { Blob } from './fixtures.ts'
import { mebibyte, message, peerAt, peerFeed, randomBlob, temporaryDirectory } from './fixtures.ts'
import { assertFetched, startEngine, startFetch, startSeeder, unlimited } from './own-engine.ts'
import type { RawConnection, RawMessage, RawRequest } from './raw-peer.ts'
import {
  blockOf,
  bytesOf,
  dialRaw,
  fullBitfield,
  numberOf,
  rangeOf,
  rawHandshake,
  startRawListener,
} from './raw-peer.ts'

const interested = message(2)
const haveAllId = 14
const extendedId = 20
/** What these agents take claims under, and claims that are taken back. */
const claimId = 1
const unclaimId = 2
/** …and what others are sending. */
const busyId = 3
const blockLength = 16_384
/** Piece 0, and no other. */
const firstPiece = message(5, Buffer.from([0x80]))

interface Named {
  readonly host: string
  readonly place: string
  readonly isSeed?: boolean
  /** Where it listens. */
  readonly port?: number | undefined
}

/** What an agent says first, as one that takes turns. */
function agentGreeting(metainfo: Metainfo, { host, place, isSeed = false, port }: Named): Buffer {
  const peerId = Buffer.concat([Buffer.from('-RS0200-'), randomBytes(12)])
  const introduction = encode({
    m: { rs_busy: busyId, rs_claim: claimId, rs_unclaim: unclaimId },
    p: port,
    rs: { block: 262_144, host, place, seed: isSeed ? 1 : undefined },
  })
  return Buffer.concat([
    rawHandshake(metainfo, { extended: true, fast: true, peerId }),
    message(20, Buffer.concat([Buffer.from([0]), introduction])),
  ])
}

/** What any other client with the fast extension says first. */
function clientGreeting(metainfo: Metainfo): Buffer {
  return rawHandshake(metainfo, { fast: true })
}

/** A peer that dials, says all this, and listens. */
async function dialAndSay(t: TestContext, port: number, { metainfo }: Blob, ...parts: Buffer[]) {
  const heard: RawMessage[] = []
  const connection = await dialRaw(t, port, metainfo, {
    connected: (opened) => {
      opened.send(...parts)
    },
    shaken: () => undefined,
    told: (_, said) => heard.push(said),
  })
  return {
    connection,
    heard,
    haves: () => heard.filter(({ id }) => id === 4).map(({ body }) => body.readUInt32BE()),
    /** Pieces said to be fetched from afar, and those that are not after all, as `+0` and `-0`. */
    claims: () =>
      heard.flatMap(({ id, body }) =>
        id === extendedId && (body[0] === claimId || body[0] === unclaimId)
          ? `${body[0] === claimId ? '+' : '-'}${body.readUInt32BE(1)}`
          : [],
      ),
    /** What it was told is being sent to others. */
    busy: () =>
      heard.flatMap(({ id, body }) =>
        id === extendedId && body[0] === busyId ? body.subarray(1).toString('hex') : [],
      ),
    /** Pieces it was asked for, each once. */
    asked: () => [...new Set(heard.filter(({ id }) => id === 6).map(({ body }) => body.readUInt32BE()))],
    isUnchoked: () => heard.some(({ id }) => id === 1),
    /** What a request was answered with, 7 or 16, in order. */
    answers: (request: RawRequest) =>
      heard
        .filter(({ id, body }) => isAnswer(id) && body.readUInt32BE() === request.piece)
        .filter(({ body }) => body.readUInt32BE(4) === request.offset)
        .map(({ id }) => id),
  }
}

function requestOf(body: Buffer): RawRequest {
  return { piece: body.readUInt32BE(), offset: body.readUInt32BE(4), length: body.readUInt32BE(8) }
}

function isAnswer(id: number): boolean {
  return id === 7 || id === 16
}

/** One block after the other, each after so long. */
function answerSlowly(blob: Blob, blockMs: number) {
  let freeAtMs = 0
  return (connection: RawConnection, request: RawRequest) => {
    freeAtMs = Math.max(freeAtMs, performance.now()) + blockMs
    setTimeout(() => {
      connection.send(blockOf(request, bytesOf(blob, request)))
    }, freeAtMs - performance.now())
  }
}

/** A client of the rack that offers pieces when it is told to, and takes so long for a block. */
async function startSource(t: TestContext, blob: Blob, blockMs = 0) {
  const opened: RawConnection[] = []
  const peer = await startRawListener(t, blob.metainfo, {
    shaken: (connection) => {
      connection.send(rawHandshake(blob.metainfo), message(1))
      opened.push(connection)
    },
    requested: answerSlowly(blob, blockMs),
  })
  return {
    port: peer.port,
    isConnected: () => opened.length > 0,
    offer: (piece: number) => {
      for (const connection of opened) connection.send(message(4, numberOf(piece)))
    },
  }
}

/** Two agents of the rack that may ask a seeder for pieces: one takes it four seconds, and is nobody else's for two of them. */
async function dialSlowSeeder(t: TestContext, blob: Blob) {
  const limits = { ...unlimited, uploadBytesPerSecond: 64 * 1024 }
  const { engine } = await startSeeder(t, await temporaryDirectory(t), blob, { limits })
  const dialAs = (host: string) =>
    dialAndSay(t, engine.port, blob, agentGreeting(blob.metainfo, { host, place: 'rack-1' }), interested)
  const [first, second] = [await dialAs('first'), await dialAs('second')]
  await until('that both may ask', () => first.isUnchoked() && second.isUnchoked())
  return [first, second] as const
}

describe('rackswarm: news of pieces', { concurrency: 4 }, () => {
  test('an agent that fetches is told only of what it lacks; clients and seeds are told of all', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(mebibyte)
    const pieces = pieceCount(blob.metainfo)
    const source = await startSource(t, blob)
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const handle = startFetch(engine, blob, file, peerFeed(peerAt(source.port)))
    const named = (host: string, isSeed: boolean) =>
      agentGreeting(blob.metainfo, { host, place: 'rack-1', isSeed })
    const agent = await dialAndSay(t, engine.port, blob, named('agent', false), firstPiece)
    const seed = await dialAndSay(t, engine.port, blob, named('seed', true), firstPiece)
    const client = await dialAndSay(t, engine.port, blob, clientGreeting(blob.metainfo), firstPiece)
    await until(
      'what they have',
      () => source.isConnected() && handle.peers().filter(({ progress }) => progress > 0).length === 3,
    )
    const all = Array.from({ length: pieces }, (_, piece) => piece)
    for (const piece of all) {
      source.offer(piece)
      await until(`piece ${piece}`, () => handle.has(piece))
    }
    await assertFetched(handle, blob, file)
    await until('that it has everything', () => agent.heard.some(({ id }) => id === haveAllId))
    await until('all pieces', () => client.haves().length >= pieces && seed.haves().length >= pieces)
    assert.deepEqual(client.haves(), all)
    assert.deepEqual(seed.haves(), all)
    assert.deepEqual(agent.haves(), all.slice(1))
    assert.equal(agent.connection.socket.closed, false)
  })

  test('an agent is served however many other clients are, which wait for a place', async (t) => {
    const blob = randomBlob(mebibyte)
    const { engine } = await startSeeder(t, await temporaryDirectory(t), blob)
    const client = () => dialAndSay(t, engine.port, blob, clientGreeting(blob.metainfo), interested)
    const clients = await Promise.all(Array.from({ length: uploadSlots }, client))
    await until('that all may ask', () => clients.every(({ isUnchoked }) => isUnchoked()))
    const late = await client()
    const greeting = agentGreeting(blob.metainfo, { host: 'agent', place: 'rack-1' })
    const agent = await dialAndSay(t, engine.port, blob, greeting, interested)
    await until('that the agent may ask', () => agent.isUnchoked())
    assert.equal(late.isUnchoked(), false)
    agent.connection.socket.destroy()
    await sleep(200)
    assert.equal(late.isUnchoked(), false, 'the agent had none of the places')
    clients[0]?.connection.socket.destroy()
    await until('that the late one may ask', () => late.isUnchoked())
  })

  test('of two agents that have everything, the one that has it last ends the connection', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(mebibyte)
    const source = await startSource(t, blob)
    const engine = await startEngine(t)
    const file = join(directory, 'copy')
    const handle = startFetch(engine, blob, file, peerFeed(peerAt(source.port)))
    const greeting = agentGreeting(blob.metainfo, { host: 'agent', place: 'rack-1' })
    const agent = await dialAndSay(t, engine.port, blob, greeting, fullBitfield(blob.metainfo))
    await until('it', () => source.isConnected() && handle.peers().some(({ progress }) => progress === 1))
    for (let piece = 0; piece < pieceCount(blob.metainfo); piece++) source.offer(piece)
    await assertFetched(handle, blob, file)
    await until('the end of the connection', () => agent.connection.socket.closed)
    assert.deepEqual(agent.haves(), [])
  })

  test('a connection to an agent far away that neither may use is let go; those that may be of use stay', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    // So slow that the fetch is under way all the time, and never stands still.
    const source = await startRawListener(t, blob.metainfo, { requested: answerSlowly(blob, 100) })
    const engine = await startEngine(t)
    const farPort = 1
    const peers = peerFeed(peerAt(farPort, { reserve: true }), peerAt(source.port))
    const handle = startFetch(engine, blob, join(directory, 'copy'), peers)
    const all = fullBitfield(blob.metainfo)
    const agentOf = (host: string, place: string) =>
      agentGreeting(blob.metainfo, { host, place, port: host === 'far' ? farPort : undefined })
    const openedAtMs = performance.now()
    await dialAndSay(t, engine.port, blob, agentOf('near', 'rack-1'))
    await dialAndSay(t, engine.port, blob, agentOf('far-and-wants', 'rack-2'), all, interested)
    const client = await dialAndSay(t, engine.port, blob, clientGreeting(blob.metainfo), all)
    await dialAndSay(t, engine.port, blob, agentOf('far', 'rack-2'), all)
    const agents = () => handle.peers().flatMap(({ host }) => host ?? [])
    await until('all connections', () => agents().length === 3)
    await until('the end of one', () => agents().length < 3)
    assert.ok(performance.now() - openedAtMs > uselessMs, `after ${performance.now() - openedAtMs} ms`)
    assert.deepEqual(agents(), ['near', 'far-and-wants'])
    assert.equal(client.connection.socket.closed, false)
    assert.equal(handle.peerCount, 4, 'with the client and the source')
    assert.ok(handle.bytesVerified < blob.bytes.length, 'the fetch is under way')
  })

  test('what a gateway was asking of far away still comes when it is none any more, and then the connection ends', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    // So slow that the fetch is under way all the time, and never stands still.
    const near = await startSource(t, blob, 200)
    const engine = await startEngine(t)
    const peers = peerFeed(peerAt(near.port))
    const handle = startFetch(engine, blob, join(directory, 'copy'), peers)
    await until('the near one', () => near.isConnected())
    for (let piece = 1; piece < pieceCount(blob.metainfo); piece++) near.offer(piece)
    const greeting = agentGreeting(blob.metainfo, { host: 'far', place: 'rack-2', port: 1 })
    const hasFirst = message(5, Buffer.from([0x80, 0]))
    const far = await dialAndSay(t, engine.port, blob, greeting, hasFirst, message(1))
    const asked = () => far.heard.filter(({ id }) => id === 6).map(({ body }) => requestOf(body))
    await until('a request', () => asked().length > 0)
    peers.push(peerAt(1, { reserve: true }))
    const [first] = asked()
    assert.ok(first)
    const bytes = blockOf(first, bytesOf(blob, first))
    far.connection.send(bytes.subarray(0, 1000))
    await sleep(uselessMs + 1_500)
    assert.equal(far.connection.socket.closed, false, 'a block is under way')
    assert.equal(
      far.heard.some(({ id }) => id === 3),
      false,
      'who is told so sends nothing more',
    )
    far.connection.send(bytes.subarray(1000))
    let sent = 1
    await until('the rest', () => {
      for (; sent < asked().length; sent++) {
        const request = asked()[sent]
        if (request) far.connection.send(blockOf(request, bytesOf(blob, request)))
      }
      return handle.has(0)
    })
    await until('the end of the connection', () => far.connection.socket.closed, { withinMs: 10_000 })
    assert.ok(handle.bytesVerified < blob.bytes.length, 'the fetch is under way')
  })

  test('what one agent takes back is given to another that was refused it before', async (t) => {
    const blob = randomBlob(mebibyte)
    const [first, second] = await dialSlowSeeder(t, blob)
    const blocks = Array.from({ length: blob.metainfo.pieceLength / blockLength }, (_, i) => ({
      piece: 0,
      offset: i * blockLength,
      length: blockLength,
    }))
    const [wanted] = blocks.slice(-1)
    assert.ok(wanted)
    const askForIt = () => {
      second.connection.send(message(6, rangeOf(wanted)))
    }
    first.connection.send(...blocks.map((block) => message(6, rangeOf(block))))
    await until('the first block', () => first.heard.some(({ id }) => id === 7))
    askForIt()
    await until('an answer', () => second.answers(wanted).length === 1)
    assert.deepEqual(second.answers(wanted), [16])
    assert.deepEqual(second.busy(), ['0000000000'], 'piece 0, and there is room for others')
    first.connection.send(...blocks.map((block) => message(8, rangeOf(block))))
    await until('what becomes of its last request', () => first.answers(wanted).length === 1)
    assert.deepEqual(first.answers(wanted), [16])
    askForIt()
    await until('another answer', () => second.answers(wanted).length === 2)
    assert.deepEqual(second.answers(wanted), [16, 7])
  })

  test('who refuses a piece is asked at once for what it is not sending, and left in peace where it is sending enough', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    const engine = await startEngine(t)
    startFetch(engine, blob, join(directory, 'copy'), peerFeed())
    const greeting = agentGreeting(blob.metainfo, { host: 'agent', place: 'rack-1' })
    const pieces = Array.from({ length: pieceCount(blob.metainfo) }, (_, piece) => piece)
    const all = fullBitfield(blob.metainfo)
    const agent = await dialAndSay(t, engine.port, blob, greeting, all, message(1))
    const refuse = () =>
      agent.heard
        .splice(0)
        .filter(({ id }) => id === 6)
        .map(({ body }) => message(16, body))
    const say = (...bytes: number[]) => message(extendedId, Buffer.of(busyId, ...bytes))
    await until('requests', () => agent.asked().length > 0)
    const first = agent.asked()
    const [busy = 0] = pieces.filter((piece) => !first.includes(piece))
    const sinceMs = performance.now()
    agent.connection.send(say(0, 0, 0, 0, busy), ...refuse())
    await until('other requests', () => agent.asked().length > 0, { everyMs: 1 })
    const second = agent.asked()
    if (performance.now() - sinceMs < 900)
      assert.ok(!second.some((piece) => piece === busy || first.includes(piece)), String(second))
    agent.connection.send(say(1), ...refuse())
    await sleep(300)
    assert.deepEqual(agent.asked(), [], 'it says when it has a turn')
    agent.connection.send(say(0))
    await until('requests again', () => agent.asked().length > 0, { withinMs: 500 })
  })

  test('who found all turns taken is told when there is one', async (t) => {
    const blob = randomBlob(4 * mebibyte)
    const [first, second] = await dialSlowSeeder(t, blob)
    const blocks = Array.from({ length: atOnceMax }, (_, piece) => ({
      piece,
      offset: 0,
      length: blockLength,
    }))
    first.connection.send(...blocks.map((block) => message(6, rangeOf(block))))
    await until('a block', () => first.heard.some(({ id }) => id === 7))
    second.connection.send(message(6, rangeOf({ piece: atOnceMax, offset: 0, length: blockLength })))
    await until('that there is no turn', () => second.busy().length === 1)
    assert.match(second.busy()[0] ?? '', /^01/)
    first.connection.send(...blocks.map((block) => message(8, rangeOf(block))))
    await until('that there is one', () => second.busy().length === 2, { withinMs: 1_000 })
    assert.match(second.busy()[1] ?? '', /^00/)
  })

  test('neighbours hear what an agent fetches from afar, again where that takes long, and when it does not come', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(mebibyte)
    const engine = await startEngine(t)
    startFetch(engine, blob, join(directory, 'copy'), peerFeed())
    const greet = (host: string, place: string) => agentGreeting(blob.metainfo, { host, place })
    const near = await dialAndSay(t, engine.port, blob, greet('near', 'rack-1'))
    const far = await dialAndSay(t, engine.port, blob, greet('far', 'rack-2'), firstPiece, message(1))
    const asked = () => far.heard.filter(({ id }) => id === 6).map(({ body }) => message(16, body))
    await until('the claim', () => near.claims().length === 1)
    await until('the claim again', () => near.claims().length === 2, { withinMs: 10_000 })
    assert.deepEqual(near.claims(), ['+0', '+0'])
    far.connection.send(...asked())
    await until('that it was refused', () => near.claims().length === 3)
    assert.deepEqual(near.claims(), ['+0', '+0', '-0'])
  })
})
