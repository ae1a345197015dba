import assert from 'node:assert/strict'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { digestOf } from '../../../../lib/protocol/digest.ts'
import { silentLog } from '../../../../lib/runtime/log.ts'
import { onThisServer } from '../../../../server/state/on-one-server.ts'
import { startEventQueue } from '../../../../server/registry/upstream/event-queue.ts'
import type { PushEvent } from '../../../../server/registry/upstream/push-events.ts'
import { openSqliteStateStore } from '../../../../server/state/sqlite-state-store.ts'
import { until } from '../../../support/until.ts'

test('what was taken is pulled after a restart; what was pulled is known; what waits has a bound', async (t) => {
  const file = await stateFile(t)
  const pulled: string[] = []
  {
    await using state = await openSqliteStateStore({ file })
    await using queue = await startedQueue(state, () => new Promise(() => undefined))
    assert.deepEqual(await queue.add([event('a'), event('b'), event('a')]), { accepted: 2, duplicates: 1 })
    assert.equal(queue.waiting, 2)
    const many = Array.from({ length: 9_999 }, (_, i) => event(`many-${i}`))
    await assert.rejects(queue.add(many), { status: 503 })
    assert.equal(queue.waiting, 2, 'none of them was taken')
  }
  await using state = await openSqliteStateStore({ file })
  const pull = ({ reference }: { reference: string }) => {
    pulled.push(reference)
    return Promise.resolve(digest)
  }
  {
    await using queue = await startedQueue(state, pull)
    await until('all are pulled', () => queue.waiting === 0)
    assert.deepEqual(pulled, ['a', 'b'])
  }
  await using queue = await startedQueue(state, pull)
  assert.deepEqual(await queue.add([event('a'), event('c')]), { accepted: 1, duplicates: 1 })
  await until('the new one is pulled', () => queue.waiting === 0)
  assert.deepEqual(pulled, ['a', 'b', 'c'])
  // Without an id nobody knows whether it is the same push, or the tag that came back.
  for (const expected of [1, 1]) {
    const { accepted } = await queue.add([{ ...event('d'), id: '' }])
    assert.equal(accepted, expected)
    await until('it is pulled', () => queue.waiting === 0)
  }
})

const digest = digestOf(Buffer.from('manifest'))

function event(tag: string): PushEvent {
  return { id: `id-${tag}`, repository: 'team/app', digest, tag }
}

async function startedQueue(
  state: Awaited<ReturnType<typeof openSqliteStateStore>>,
  pull: (request: { reference: string; signal: AbortSignal }) => Promise<typeof digest>,
) {
  return startEventQueue({
    onOneServer: onThisServer,
    state,
    pullThrough: {
      pull: async (request) =>
        Promise.race([
          pull(request),
          new Promise<never>((_, reject) => {
            request.signal.addEventListener('abort', () => {
              reject(new Error('ended'))
            })
          }),
        ]),
    },
    now: Date.now,
    random: Math.random,
    log: silentLog(),
    observer: { event: () => undefined },
  })
}

async function stateFile(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-events-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return join(directory, 'state.sqlite')
}
