// Three servers, 2,000 announcing peers and several agents that fetch a build, while one thing after the other fails. `npm run soak -- failover
// [CASE]` (single, sentinel or cluster; default: all three): about twelve minutes. Each deploy takes at least a minute undisturbed.
import { mkdtemp } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { DrillOptions, DrillResult, Fault } from '../support/failover.ts'
import {
  assertGood,
  noFault,
  nodeKilled,
  primaryKilled,
  redisEmptied,
  redisStopped,
  serverCutOff,
  serverKilled,
  serversUpgraded,
  startDrill,
} from '../support/failover.ts'
import { removeAll } from '../support/fleet.ts'

const outageMs = 20_000
const usual = {
  agents: 6,
  buildBytes: 64 * 1024 * 1024,
  downloadRate: 1024 * 1024,
  peers: 2000,
  intervalSeconds: 5,
} as const

/** What happens to each kind of Redis, and to the servers before it, one after the other. */
const cases: Readonly<Record<DrillOptions['redis'], readonly Fault[]>> = {
  single: [
    serverKilled(outageMs / 2),
    redisStopped(outageMs),
    redisEmptied(),
    serverCutOff(outageMs),
    serversUpgraded(),
    // The last of them stay like this.
    { ...serversUpgraded([0, 45, -45]), name: 'servers restarted with clocks 90 s apart' },
    { ...serverKilled(outageMs / 2), name: 'kill -9 of a server, clocks 90 s apart' },
  ],
  sentinel: [primaryKilled()],
  cluster: [nodeKilled(0, outageMs / 2)],
}

async function main(only: string | undefined): Promise<void> {
  const kinds = Object.keys(cases) as DrillOptions['redis'][]
  const wanted = kinds.filter((kind) => only === undefined || kind === only)
  if (wanted.length === 0) throw new Error(`There is no such case: need ${kinds.join(', ')}`)
  say(
    'case | undisturbed s | disturbed s | outage s | added s | counts right after s | announces | refused | failed | sent again | wrong peers | p99 ms | slowest ms',
  )
  for (const redis of wanted) {
    const directory = await mkdtemp(join(tmpdir(), 'rackswarm-failover-'))
    try {
      await using drill = await startDrill(directory, { ...usual, redis })
      const undisturbed = await drill.deploy(noFault)
      row(redis, undisturbed, undisturbed.seconds)
      check(undisturbed, undisturbed.seconds)
      for (const fault of cases[redis]) {
        const result = await drill.deploy(fault)
        row(redis, result, undisturbed.seconds)
        check(result, undisturbed.seconds)
      }
    } finally {
      await removeAll(directory)
    }
  }
}

/** What went wrong is told at once, and the rest goes on. */
function check(result: DrillResult, undisturbedSeconds: number): void {
  try {
    assertGood(result, undisturbedSeconds)
  } catch (error) {
    process.exitCode = 1
    process.stderr.write(`${(error as Error).message}\n`)
  }
}

function row(redis: string, result: DrillResult, undisturbedSeconds: number): void {
  const { crowd } = result
  const wrong = Object.values(crowd.wrong).reduce((sum, count) => sum + count, 0)
  say(
    [
      `${redis}: ${result.name}`,
      ...[
        undisturbedSeconds,
        result.seconds,
        result.outageSeconds,
        result.seconds - undisturbedSeconds,
        result.countsRightAfterSeconds,
      ].map((seconds) => seconds.toFixed(1)),
      crowd.answered + crowd.refused + crowd.failed,
      crowd.refused,
      crowd.failed,
      crowd.sentAgain,
      `${wrong} of ${crowd.handedOut}`,
      result.p99Ms.toFixed(0),
      result.slowestMs.toFixed(0),
    ].join(' | '),
  )
}

function say(line: string): void {
  process.stdout.write(`${line}\n`)
}

await main(process.argv[2])
