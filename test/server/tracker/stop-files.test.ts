import assert from 'node:assert/strict'
import { appendFile, mkdir, mkdtemp, readdir } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import { monotonicMs } from '../../../lib/runtime/clock.ts'
import { createLog } from '../../../lib/runtime/log.ts'
import type { HeardStop, StoppedPeer } from '../../../server/tracker/redis/stop-files.ts'
import { openStopFiles } from '../../../server/tracker/redis/stop-files.ts'
import { removeAll } from '../../support/fleet.ts'
import { until } from '../../support/until.ts'

const lookMs = 20

test('what stops at one server every other one hears once, whole and not late, and itself never', async (t) => {
  const path = await directoryOf(t)
  await using one = await openServer(path)
  await using other = await openServer(path)
  await using third = await openServer(path)
  await sleep(5 * lookMs)
  const peers = Array.from({ length: 3000 }, (_, i) => peerOf(i))
  for (const [i, peer] of peers.entries()) one.files.tell(peer, i % 2 === 0)
  for (const { heard } of [other, third]) {
    await until('all of them', () => heard.length >= peers.length)
    assert.deepEqual(
      heard.map(({ peer }) => peer),
      peers,
    )
    assert.ok(heard.every(({ isTold }, i) => isTold === (i % 2 === 0)))
    assert.ok(heard.every(({ ageMs }) => ageMs >= lookMs && ageMs < 5000))
  }
  other.files.tell(peerOf(7), false)
  await until('an answer', () => one.heard.length > 0)
  assert.deepEqual(
    one.heard.map(({ peer }) => peer),
    [peerOf(7)],
  )
})

test('what was there before a server began it does not hear', async (t) => {
  const path = await directoryOf(t)
  await using one = await openServer(path)
  await using other = await openServer(path)
  await sleep(5 * lookMs)
  one.files.tell(peerOf(1), false)
  await until('the first', () => other.heard.length === 1)
  await using late = await openServer(path)
  await sleep(5 * lookMs)
  one.files.tell(peerOf(2), false)
  await until('the second', () => late.heard.length > 0)
  assert.deepEqual(
    late.heard.map(({ peer }) => peer),
    [peerOf(2)],
  )
})

test('files end and go, and nothing is lost in between', async (t) => {
  const path = await directoryOf(t)
  await using one = await openServer(path, { partMs: 100 })
  await using other = await openServer(path)
  await sleep(5 * lookMs)
  for (let i = 0; i < 20; i++) {
    one.files.tell(peerOf(i), false)
    await sleep(50)
  }
  await until('all of them', () => other.heard.length >= 20)
  assert.deepEqual(
    other.heard.map(({ peer }) => peer),
    Array.from({ length: 20 }, (_, i) => peerOf(i)),
  )
  await until('old files to go', async () => (await readdir(path)).length <= 2)
})

test('a record that is half written is heard once it is whole, and what is none is passed over', async (t) => {
  const path = await directoryOf(t)
  await using other = await openServer(path)
  await sleep(5 * lookMs)
  const record = Buffer.alloc(42)
  record[23] = 4
  record.set([10, 0, 0, 1], 24)
  record.writeUInt16LE(6881, 40)
  const file = join(path, 'stranger.stops')
  await appendFile(file, Buffer.concat([Buffer.alloc(42, 0xff), record.subarray(0, 30)]))
  await sleep(5 * lookMs)
  assert.deepEqual(other.heard, [])
  await appendFile(file, record.subarray(30))
  await until('it', () => other.heard.length > 0)
  assert.deepEqual(other.heard, [
    {
      isTold: false,
      ageMs: lookMs,
      peer: {
        infoHash: infoHashFromHex('0'.repeat(40)),
        source: { family: 4, bytes: Uint8Array.of(10, 0, 0, 1) },
        port: 6881,
      },
    },
  ])
})

test('what cannot be written at first is told later, and half a record from before is no hindrance', async (t) => {
  const path = await directoryOf(t)
  await using one = await openServer(path)
  await appendFile(join(path, 'stranger.stops'), Buffer.alloc(30))
  await using other = await openServer(path)
  await sleep(5 * lookMs)
  await removeAll(path)
  one.files.tell(peerOf(1), false)
  await sleep(300)
  await mkdir(path)
  await until('it', () => other.heard.length > 0)
  assert.deepEqual(other.heard[0]?.peer, peerOf(1))
  const record = Buffer.alloc(42)
  record[23] = 4
  const late = join(path, 'late.stops')
  await appendFile(late, record.subarray(0, 30))
  await using third = await openServer(path)
  await sleep(5 * lookMs)
  await appendFile(late, Buffer.concat([record.subarray(30), record]))
  await until('both', () => third.heard.length === 2)
})

async function directoryOf(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-stops-'))
  t.after(() => removeAll(directory))
  return join(directory, 'stops')
}

async function openServer(path: string, options: { partMs?: number } = {}) {
  const heard: HeardStop[] = []
  const files = await openStopFiles({
    directory: path,
    heard: (stop) => {
      heard.push(stop)
    },
    monotonic: monotonicMs,
    log: createLog('test', 'error'),
    lookMs,
    ...options,
  })
  return { files, heard, [Symbol.asyncDispose]: () => files[Symbol.asyncDispose]() }
}

function peerOf(i: number): StoppedPeer {
  const bytes =
    i % 3 === 0
      ? Uint8Array.from({ length: 16 }, (_, at) => (i + at) & 0xff)
      : Uint8Array.of(10, 0, i >> 8, i & 0xff)
  return {
    infoHash: infoHashFromHex((i % 5).toString(16).repeat(40)),
    source: { family: bytes.length === 4 ? 4 : 6, bytes },
    port: 1024 + i,
  }
}
