import assert from 'node:assert/strict'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { Agent } from 'undici'
import type { AnnounceGrant, Announcer } from '../../agent/announcer.ts'
import { createAnnouncer } from '../../agent/announcer.ts'
import type { EnginePeer } from '../../agent/engine/engine.ts'
import { endpointPort } from '../../lib/protocol/address.ts'
import { silentLog } from '../../lib/runtime/log.ts'
import { until } from '../support/until.ts'
import { randomBlob } from './engine/fixtures.ts'
import type { MiniServer } from './mini-server.ts'
import { startMiniServer } from './mini-server.ts'

const blob = randomBlob(300_000)

function startAnnouncer(t: TestContext): Announcer {
  const dispatcher = new Agent()
  const announcer = createAnnouncer({
    peerId: Buffer.from('-RS0100-abcdefghijkl'),
    port: 6881,
    dispatcher,
    now: Date.now,
    monotonic: () => performance.now(),
    random: Math.random,
    log: silentLog(),
  })
  t.after(async () => {
    await announcer[Symbol.asyncDispose]()
    await dispatcher.destroy()
  })
  return announcer
}

function grantOf(server: MiniServer, token: string, lifeMs = 900_000): AnnounceGrant {
  return {
    announceUrl: `${server.url}/announce`,
    token,
    obtainedAt: Date.now(),
    expiresAt: Date.now() + lifeMs,
  }
}

function add(
  announcer: Announcer,
  server: MiniServer,
  options: { grant?: AnnounceGrant; left?: () => number; infoHash?: typeof blob.metainfo.infoHash } = {},
) {
  let renewals = 0
  const announcement = announcer.add({
    infoHash: options.infoHash ?? blob.metainfo.infoHash,
    grant: options.grant ?? grantOf(server, 'first'),
    renew: async () => grantOf(server, `renewed-${++renewals}`),
    progress: () => ({ left: options.left?.() ?? 100, downloaded: 0, uploaded: 0 }),
  })
  return { announcement, renewals: () => renewals }
}

async function take(peers: AsyncIterable<EnginePeer>, count: number): Promise<EnginePeer[]> {
  const found: EnginePeer[] = []
  for await (const peer of peers) {
    found.push(peer)
    if (found.length === count) break
  }
  return found
}

test('started, completed and stopped are told, with the token and the tracker id', async (t) => {
  const server = await startMiniServer(t)
  const announcer = startAnnouncer(t)
  let left = 100
  const { announcement } = add(announcer, server, { left: () => left })
  await until('the first announce', () => server.announces.length === 1)
  left = 0
  announcement.completed()
  await until('the second announce', () => server.announces.length === 2)
  await announcement.close()
  assert.deepEqual(
    server.announces.map(({ event, jwt, left: missing, trackerId, rackswarm }) => [
      event,
      jwt,
      missing,
      trackerId,
      rackswarm,
    ]),
    [
      ['started', 'first', 100, undefined, true],
      ['completed', 'first', 0, 'ticket', true],
      ['stopped', 'first', 0, 'ticket', true],
    ],
  )
})

test('far peers are held in reserve while the rack has any, but not for its gateways', async (t) => {
  const server = await startMiniServer(t)
  server.peers = [
    { port: 1001, distance: 0 },
    { port: 1002, distance: 2 },
  ]
  const announcer = startAnnouncer(t)
  const shape = (peers: EnginePeer[]) =>
    peers.map(({ endpoint, reserve }) => [endpointPort(endpoint), reserve])
  const host = add(announcer, server)
  assert.deepEqual(shape(await take(host.announcement.peers, 2)), [
    [1001, false],
    [1002, true],
  ])
  await host.announcement.close()
  server.gateway = true
  const gateway = add(announcer, server)
  assert.deepEqual(shape(await take(gateway.announcement.peers, 2)), [
    [1001, false],
    [1002, false],
  ])
  await gateway.announcement.close()
  server.gateway = false
  server.peers = [{ port: 1002, distance: 2 }]
  assert.deepEqual(
    shape(await take(add(announcer, server).announcement.peers, 1)),
    [[1002, false]],
    'no rack is an island',
  )
})

test('a token with less than a third of its life left is renewed before it is used', async (t) => {
  const server = await startMiniServer(t)
  const announcer = startAnnouncer(t)
  const old = { ...grantOf(server, 'old'), obtainedAt: Date.now() - 800_000, expiresAt: Date.now() + 100_000 }
  add(announcer, server, { grant: old })
  await until('an announce', () => server.announces.length === 1)
  assert.equal(server.announces[0]?.jwt, 'renewed-1')
})

test('a refused token is renewed at once', async (t) => {
  const server = await startMiniServer(t)
  const announcer = startAnnouncer(t)
  server.failAnnounce = 'unapproved request: invalid jwt'
  const { announcement } = add(announcer, server)
  await until('a second announce', () => server.announces.length === 2)
  assert.match(announcement.lastError ?? '', /invalid jwt/)
  server.failAnnounce = undefined
  assert.deepEqual(
    server.announces.map(({ jwt }) => jwt),
    ['first', 'renewed-1'],
  )
})

test('after an error it tries again and begins with started', async (t) => {
  const server = await startMiniServer(t)
  const announcer = startAnnouncer(t)
  let failures = 1
  server.intercept = (_request, response) => {
    if (failures-- <= 0) return false
    response.writeHead(502).end()
    return true
  }
  add(announcer, server)
  await until('an announce that is answered', () => server.announces.length === 1)
  assert.equal(server.announces[0]?.event, 'started')
})

test('a new epoch makes it announce all it holds again', async (t) => {
  const server = await startMiniServer(t)
  const announcer = startAnnouncer(t)
  const hashes = [randomBlob(300_000), randomBlob(300_000)].map(({ metainfo }) => metainfo.infoHash)
  const added = hashes.map((infoHash) => add(announcer, server, { infoHash }))
  // Until both were answered: a reply that comes later names the new epoch itself.
  await until('the first replies', () => added.every(({ announcement }) => announcement.seeds !== undefined))
  assert.equal(server.announces.length, 2)
  server.epoch = 'two'
  announcer.noteEpoch('two')
  await until('the second announces', () => server.announces.length === 4)
  assert.deepEqual(new Set(server.announces.slice(2).map(({ infoHash }) => infoHash)), new Set(hashes))
  assert.ok(server.announces.every(({ event }) => event === 'started'))
})

test('announceNow() does not wait for the interval', async (t) => {
  const server = await startMiniServer(t)
  server.intervalSeconds = 3600
  const announcer = startAnnouncer(t)
  const { announcement } = add(announcer, server)
  await until('an announce', () => server.announces.length === 1)
  await until('another announce', () => {
    announcement.announceNow()
    return server.announces.length >= 2
  })
})

test('at the end stopped is told for every torrent, and a dead tracker does not hold it up', async (t) => {
  const server = await startMiniServer(t)
  const announcer = startAnnouncer(t)
  for (let i = 0; i < 20; i++) add(announcer, server, { infoHash: randomBlob(300_000).metainfo.infoHash })
  await until('all announces', () => server.announces.length === 20)
  await announcer[Symbol.asyncDispose]()
  assert.equal(server.announces.filter(({ event }) => event === 'stopped').length, 20)
})
