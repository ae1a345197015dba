// The short form of `npm run soak -- failover`: smaller, and each fault once.
import { mkdtemp } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import type { Drill, DrillOptions, Fault } from '../support/failover.ts'
import {
  assertGood,
  noFault,
  nodeKilled,
  oneAfterTheOther,
  primaryKilled,
  redisEmptied,
  redisStopped,
  serverCutOff,
  serverKilled,
  serversUpgraded,
  startDrill,
} from '../support/failover.ts'
import { removeAll } from '../support/fleet.ts'

const outageMs = 2000
/** What a deploy takes when nothing fails, whichever Redis it is: rate caps decide. */
let undisturbedSeconds = 0

test('a deploy goes on, and nothing is lost: three servers with clocks 90 s apart, and one Redis', async (t) => {
  const drill = await startedDrill(t, { redis: 'single', clocksOffSeconds: [0, 45, -45] })
  const undisturbed = await drill.deploy(noFault)
  undisturbedSeconds = undisturbed.seconds
  assertGood(undisturbed, undisturbedSeconds)
  await through(t, drill, [
    oneAfterTheOther([serverKilled(500), serverCutOff(outageMs)]),
    oneAfterTheOther([redisStopped(outageMs), redisEmptied()]),
    serversUpgraded(),
  ])
})

test('a deploy goes on, and nothing is lost: a primary that Sentinels replace', async (t) => {
  const drill = await startedDrill(t, { redis: 'sentinel', servers: 2, agents: 2 })
  await through(t, drill, [primaryKilled()])
})

test('a deploy goes on, and nothing is lost: a Redis Cluster', async (t) => {
  const drill = await startedDrill(t, { redis: 'cluster', servers: 2, agents: 2 })
  await through(t, drill, [nodeKilled(0, outageMs)])
})

async function startedDrill(
  t: TestContext,
  options: Pick<DrillOptions, 'redis'> & Partial<DrillOptions>,
): Promise<Drill> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-failover-'))
  const drill = await startDrill(directory, {
    agents: 3,
    buildBytes: 4 * 1024 * 1024,
    downloadRate: 2 * 1024 * 1024,
    peers: 200,
    intervalSeconds: 1,
    ...options,
  })
  t.after(async () => {
    await drill[Symbol.asyncDispose]()
    await removeAll(directory)
  })
  return drill
}

async function through(t: TestContext, drill: Drill, faults: readonly Fault[]): Promise<void> {
  for (const fault of faults)
    await t.test(fault.name, async () => {
      assertGood(await drill.deploy(fault), undisturbedSeconds)
    })
}
