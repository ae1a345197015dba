// kill -9 of an agent at random points of its fetches: every fetch ends right. `npm run soak`, or by itself:
// node test/soak/crash-agent.ts [FETCHES] (default 50).
import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { mkdtemp, readFile, readdir } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { createAgentClient } from '../../lib/client/agent-client.ts'
import type { FleetAgent } from '../support/fleet.ts'
import {
  deployctlOk,
  refreshFile,
  removeAll,
  startFleetAgent,
  startFleetServer,
  writeRandomFile,
} from '../support/fleet.ts'
import { until } from '../support/until.ts'

const sizeBytes = 24 * 1024 * 1024
const killsMax = 4

/** @throws AssertionError when a fetch ends wrong */
export async function crashAgents(fetches: number, say: (line: string) => void): Promise<void> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-crash-agent-'))
  let agent: FleetAgent | undefined
  let kills = 0
  try {
    await using server = await startFleetServer(directory, { settings: 'min_announce_interval: 1s\n' })
    const build = join(directory, 'build.tar')
    await writeRandomFile(build, sizeBytes)
    const start = async () =>
      startFleetAgent(join(directory, 'a1'), server, {
        host: 'a1',
        place: 'a',
        // Slow enough to be killed in the middle; a small quota, so that eviction and crashes meet.
        extra:
          'follow: ["web:latest"]\nfollow_jitter: 1ms\nlimits: { download: 48MiB }\ndisk: { quota: 80MiB }\n',
      })
    agent = await start()
    for (let round = 1; round <= fetches; round++) {
      await refreshFile(build)
      await deployctlOk(server, ['publish', build, `web:${round}`])
      const wanted = await sha256Of(build)
      for (let left = Math.floor(Math.random() * killsMax); left > 0; left--) {
        await sleep(Math.random() * 1500)
        agent.process.kill('SIGKILL')
        await agent.exited
        kills++
        await assertBlobsAreWhole(join(directory, 'a1', 'data'))
        agent = await start()
      }
      await untilHeld(agent, wanted, round)
      say(`fetch ${round} of ${fetches} ended right; ${kills} kills so far`)
    }
    await assertBlobsAreWhole(join(directory, 'a1', 'data'))
  } finally {
    await agent?.[Symbol.asyncDispose]()
    await removeAll(directory)
  }
}

/** Whatever the moment of the crash, what stands in blobs/ is what its name says. */
async function assertBlobsAreWhole(data: string): Promise<void> {
  const blobs = join(data, 'blobs', 'sha256')
  for (const name of await readdir(blobs)) assert.equal(await sha256Of(join(blobs, name)), name)
}

async function untilHeld(agent: FleetAgent, sha256: string, round: number): Promise<void> {
  await using client = createAgentClient({ socketPath: agent.socketPath })
  await until(
    `fetch ${round} has ended`,
    async () => {
      const held = (await client.status()).references.find(({ reference }) => reference === 'web:latest')
      if (held?.state !== 'held' || held.path === undefined) return false
      return (await sha256Of(join(held.path, 'build.tar')).catch(() => undefined)) === sha256
    },
    { withinMs: 120_000 },
  )
}

async function sha256Of(file: string): Promise<string> {
  return createHash('sha256')
    .update(await readFile(file))
    .digest('hex')
}

if (import.meta.main) {
  await crashAgents(Number(process.argv[2] ?? 50), (line) => {
    process.stdout.write(`${line}\n`)
  })
}
