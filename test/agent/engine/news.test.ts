// What a host tells those it is connected to of pieces, and whom it stays connected to for it.
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { describe, test } from 'node:test'
import { uselessMs } from '../../../agent/engine/schedule.ts'
import { encode } from '../../../lib/protocol/bencode.ts'
import type { Metainfo } from '../../../lib/protocol/metainfo.ts'
import { pieceCount } from '../../../lib/protocol/metainfo.ts'
import type { Blob } from './fixtures.ts'
import {
  eventually,
  mebibyte,
  message,
  peerAt,
  peerFeed,
  randomBlob,
  temporaryDirectory,
} from './fixtures.ts'
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
    m: { rs_claim: 1 },
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
    isUnchoked: () => heard.some(({ id }) => id === 1),
    /** What a request was answered with, 7 or 16, in order. */
    answers: (request: RawRequest) =>
      heard
        .filter(({ id, body }) => isAnswer(id) && body.readUInt32BE() === request.piece)
        .filter(({ body }) => body.readUInt32BE(4) === request.offset)
        .map(({ id }) => id),
  }
}

function isAnswer(id: number): boolean {
  return id === 7 || id === 16
}

/** A client of the rack that offers pieces when it is told to. */
async function startSource(t: TestContext, blob: Blob) {
  const opened: RawConnection[] = []
  const peer = await startRawListener(t, blob.metainfo, {
    shaken: (connection) => {
      connection.send(rawHandshake(blob.metainfo), message(1))
      opened.push(connection)
    },
    requested: (connection, request) => {
      connection.send(blockOf(request, bytesOf(blob, request)))
    },
  })
  return {
    port: peer.port,
    isConnected: () => opened.length > 0,
    offer: (piece: number) => {
      for (const connection of opened) connection.send(message(4, numberOf(piece)))
    },
  }
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
    await eventually(
      () => source.isConnected() && handle.peers().filter(({ progress }) => progress > 0).length === 3,
      'what they have',
    )
    const all = Array.from({ length: pieces }, (_, piece) => piece)
    for (const piece of all) {
      source.offer(piece)
      await eventually(() => handle.has(piece), `piece ${piece}`)
    }
    await assertFetched(handle, blob, file)
    await eventually(() => agent.heard.some(({ id }) => id === haveAllId), 'that it has everything')
    await eventually(() => client.haves().length >= pieces && seed.haves().length >= pieces, 'all pieces')
    assert.deepEqual(client.haves(), all)
    assert.deepEqual(seed.haves(), all)
    assert.deepEqual(agent.haves(), all.slice(1))
    assert.equal(agent.connection.socket.closed, false)
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
    await eventually(
      () => source.isConnected() && handle.peers().some(({ progress }) => progress === 1),
      'it',
    )
    for (let piece = 0; piece < pieceCount(blob.metainfo); piece++) source.offer(piece)
    await assertFetched(handle, blob, file)
    await eventually(() => agent.connection.socket.closed, 'the end of the connection')
    assert.deepEqual(agent.haves(), [])
  })

  test('a connection to an agent far away that neither may use is let go; those that may be of use stay', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(4 * mebibyte)
    let freeAtMs = 0
    // So slow that the fetch is under way all the time, and never stands still.
    const source = await startRawListener(t, blob.metainfo, {
      requested: (connection, request) => {
        freeAtMs = Math.max(freeAtMs, performance.now()) + 100
        setTimeout(() => {
          connection.send(blockOf(request, bytesOf(blob, request)))
        }, freeAtMs - performance.now())
      },
    })
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
    await eventually(() => agents().length === 3, 'all connections')
    await eventually(() => agents().length < 3, 'the end of one')
    assert.ok(performance.now() - openedAtMs > uselessMs, `after ${performance.now() - openedAtMs} ms`)
    assert.deepEqual(agents(), ['near', 'far-and-wants'])
    assert.equal(client.connection.socket.closed, false)
    assert.equal(handle.peerCount, 4, 'with the client and the source')
    assert.ok(handle.bytesVerified < blob.bytes.length, 'the fetch is under way')
  })

  test('what one agent takes back is given to another that was refused it before', async (t) => {
    const directory = await temporaryDirectory(t)
    const blob = randomBlob(mebibyte)
    // A piece takes four seconds, and is nobody else's for two of them.
    const limits = { ...unlimited, uploadBytesPerSecond: 64 * 1024 }
    const { engine } = await startSeeder(t, directory, blob, { limits })
    const dialAs = (host: string) =>
      dialAndSay(t, engine.port, blob, agentGreeting(blob.metainfo, { host, place: 'rack-1' }), interested)
    const [first, second] = [await dialAs('first'), await dialAs('second')]
    await eventually(() => first.isUnchoked() && second.isUnchoked(), 'that both may ask')
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
    await eventually(() => first.heard.some(({ id }) => id === 7), 'the first block')
    askForIt()
    await eventually(() => second.answers(wanted).length === 1, 'an answer')
    assert.deepEqual(second.answers(wanted), [16])
    first.connection.send(...blocks.map((block) => message(8, rangeOf(block))))
    await eventually(() => first.answers(wanted).length === 1, 'what becomes of its last request')
    assert.deepEqual(first.answers(wanted), [16])
    askForIt()
    await eventually(() => second.answers(wanted).length === 2, 'another answer')
    assert.deepEqual(second.answers(wanted), [16, 7])
  })
})
