import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { TrackerHandlers } from '../../../server/tracker/http-connection.ts'
import { parseReplies, rawClient } from '../../support/http-client.ts'
import { startListener } from '../../support/http-tracker.ts'
import { until } from '../../support/until.ts'

const get = (query: string, ...lines: string[]) =>
  [`GET /announce?${query} HTTP/1.1`, 'Host: t', ...lines, '', ''].join('\r\n')

/** Answers with the query, and takes its time for those of greedy clients. */
function busyTracker() {
  const counts = { greedy: 0, modest: 0 }
  const answer = (query: string) => {
    if (query === 'greedy') {
      counts.greedy++
      for (const endMs = performance.now() + 0.2; performance.now() < endMs;);
    } else {
      counts.modest++
    }
    return Buffer.from(query, 'latin1')
  }
  const tracker: TrackerHandlers = { announce: answer, scrape: answer }
  return { tracker, counts }
}

test('clients that pipeline more than they could read hold up neither others nor new ones', async (t) => {
  const { tracker, counts } = busyTracker()
  const { port } = await startListener(t, { tracker })
  const modest = await rawClient(t, port)
  modest.send(get('modest'))
  await modest.reply()
  const each = 2000
  for (let i = 0; i < 20; i++) (await rawClient(t, port)).send(get('greedy').repeat(each))
  await until('the greedy one is answered', () => counts.greedy > 0)
  const before = counts.greedy
  modest.send(get('modest'))
  await modest.reply()
  const late = await rawClient(t, port)
  late.send(get('modest', 'Connection: close'))
  assert.equal(parseReplies(await late.ended()).length, 1)
  assert.equal(counts.modest, 3)
  assert.ok(counts.greedy - before < each, `${counts.greedy - before} greedy requests came first`)
})

test('requests that wait for their turn are answered all, in order, and before the connection ends', async (t) => {
  const { tracker } = busyTracker()
  const { port } = await startListener(t, { tracker })
  const clients = await Promise.all(
    Array.from({ length: 5 }, () => rawClient(t, port, { allowHalfOpen: true })),
  )
  for (const [i, client] of clients.entries()) {
    const queries = Array.from({ length: 300 }, (_, n) => `${i}-${n}`)
    client.socket.end(queries.map((query) => get(query)).join(''))
  }
  for (const [i, client] of clients.entries()) {
    const replies = parseReplies(await client.ended())
    assert.deepEqual(
      replies.map(({ body }) => body),
      Array.from({ length: 300 }, (_, n) => `${i}-${n}`),
    )
  }
})
