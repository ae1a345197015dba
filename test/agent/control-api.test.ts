import assert from 'node:assert/strict'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { startControlApi } from '../../agent/control-api.ts'
import { openPins } from '../../agent/pins.ts'
import { createAgentClient } from '../../lib/client/agent-client.ts'
import type { Transfer } from '../../lib/client/api.ts'
import { silentLog } from '../../lib/runtime/log.ts'
import { temporaryDirectory } from './engine/fixtures.ts'

async function clientOf(t: TestContext, transfers: readonly Transfer[]) {
  const directory = await temporaryDirectory(t)
  const path = join(directory, 'agent.sock')
  const unused = () => assert.fail('not asked for here')
  const api = await startControlApi(
    { path, group: 'no-such-group' },
    {
      status: unused,
      transfers: () => [...transfers],
      fetcher: { fetch: unused, held: unused, refused: () => [] },
      ready: unused,
      pins: await openPins(join(directory, 'pins.json')),
      log: silentLog(),
    },
  )
  t.after(() => api[Symbol.asyncDispose]())
  const client = createAgentClient({ socketPath: path })
  t.after(() => client[Symbol.asyncDispose]())
  return client
}

function transferOf(state: Transfer['state'], uploadRate: number, peerCount: number): Transfer {
  return {
    repository: 'web',
    digest: `sha256:${'0'.repeat(64)}`,
    state,
    bytesDone: 0,
    sizeBytes: 1,
    bytes: { ownRack: 0, otherRacks: 0, webseed: 0 },
    downloadRate: 0,
    uploadRate,
    peerCount,
    peers: Array.from({ length: peerCount }, (_, i) => ({
      source: `192.0.2.1:${i}`,
      host: 'h'.repeat(128),
      place: 'p'.repeat(64),
      distance: 255,
      incoming: true,
      downloadRate: i,
      uploadRate: 0,
      requestedBytes: 0,
      owedBytes: 0,
      progress: 0,
      waiting: 'it has nothing that is missing',
    })),
  }
}

test('GET /v1/transfers puts fetches first, then the busiest seeds, of each the busiest peers', async (t) => {
  const client = await clientOf(t, [
    transferOf('seeding', 5, 0),
    transferOf('seeding', 9, 3),
    transferOf('waiting', 0, 0),
    transferOf('fetching', 0, 0),
  ])
  const { transfers } = await client.transfers()
  assert.deepEqual(
    transfers.map(({ state, uploadRate }) => [state, uploadRate]),
    [
      ['fetching', 0],
      ['waiting', 0],
      ['seeding', 9],
      ['seeding', 5],
    ],
  )
  assert.deepEqual(
    transfers[2]?.peers.map(({ downloadRate }) => downloadRate),
    [2, 1, 0],
  )
})

test('GET /v1/transfers is bounded, and says how many there are', async (t) => {
  const client = await clientOf(
    t,
    Array.from({ length: 200 }, (_, i) => transferOf('seeding', i, 150)),
  )
  const list = await client.transfers()
  assert.deepEqual([list.transferCount, list.transfers.length], [200, 50])
  for (const { peers, peerCount } of list.transfers) assert.deepEqual([peerCount, peers.length], [150, 100])
  assert.equal(list.transfers[0]?.peers[0]?.downloadRate, 149)
  assert.ok(JSON.stringify(list).length < 4 * 1024 * 1024)
})
