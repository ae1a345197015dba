// A tracker of 8,000 agents with 200 builds each ends badly (kill -9) and is started again: with its snapshot, and without one while
// all agents announce again. Both ways it must be whole within a minute. `npm run soak -- tracker-restart [AGENTS [BUILDS]]`.
import assert from 'node:assert/strict'
import { mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { readProcessCpuSeconds } from '../../bench/proc.ts'
import type { Generator } from '../../bench/tracker-load.ts'
import { buildGenerator, fillOf } from '../../bench/tracker-load.ts'
import type { Child } from '../../lib/runtime/child.ts'
import { startChild } from '../../lib/runtime/child.ts'
import { bin } from '../support/fleet.ts'
import { freePort } from '../support/foreign.ts'
import { until } from '../support/until.ts'

const wholeWithinSeconds = 60
/** Where the agents are, who differ in their ports: with more addresses the generator would need more time for its packets than the tracker. */
const [racks, addresses] = [40, 200]
const deadlineMs = 10 * 60_000

interface Figures {
  readonly peers: number
  /** All announced for the first time. */
  readonly fillSeconds: number
  readonly snapshotBytes: number
  /** From the start of the process until every peer is there. */
  readonly withSnapshotSeconds: number
  readonly withoutSnapshotSeconds: number
  /** What the process took of it: on a machine that does other things, too, the rest was waiting. */
  readonly withSnapshotCpuSeconds: number
  readonly withoutSnapshotCpuSeconds: number
  /** Of the process that has read the snapshot. */
  readonly residentBytes: number
}

/** @throws AssertionError when a peer is lost */
export async function restartTracker(agents: number, builds: number): Promise<Figures> {
  const peers = agents * builds
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-soak-restart-'))
  try {
    const generator = buildGenerator(directory)
    const port = await freePort()
    const config = join(directory, 'server.yaml')
    const configure = async (storage: string) =>
      writeFile(
        config,
        `roles: [tracker]
data_dir: ${directory}/data
metrics_addr: 127.0.0.1:0
announce_interval: 30m
min_announce_interval: 30m
tracker: { approval: none }
http: { addr: 127.0.0.1:0 }
udp: { addr: 127.0.0.1:${port} }
${storage}`,
      )
    await configure('storage: { config: { snapshot_interval: 5s } }\n')
    const file = join(directory, 'data', 'swarms.snapshot')
    const announceAll = async (server: Child) => announce(generator, server, { port, agents, builds })

    let server = await start(directory, config)
    const fillSeconds = await announceAll(server)
    assert.equal(await totalOf(server), peers)
    // Of the first change the snapshot may have been begun before the last announce.
    await changed(file)
    await changed(file)
    await kill(server)
    const { size: snapshotBytes } = await stat(file)
    // From here on, as it is unless somebody says otherwise.
    await configure('')

    let startedAt = performance.now()
    server = await start(directory, config)
    await whole(server, peers)
    const withSnapshotSeconds = (performance.now() - startedAt) / 1000
    const residentBytes = await residentOf(server)
    const withSnapshotCpuSeconds = await readProcessCpuSeconds(server.pid)
    await kill(server)

    await rm(file)
    startedAt = performance.now()
    server = await start(directory, config)
    assert.equal(await totalOf(server), 0)
    await announceAll(server)
    await whole(server, peers)
    const withoutSnapshotSeconds = (performance.now() - startedAt) / 1000
    const withoutSnapshotCpuSeconds = await readProcessCpuSeconds(server.pid)
    await kill(server)
    return {
      peers,
      fillSeconds,
      snapshotBytes,
      withSnapshotSeconds,
      withSnapshotCpuSeconds,
      withoutSnapshotSeconds,
      withoutSnapshotCpuSeconds,
      residentBytes,
    }
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
}

async function start(directory: string, config: string): Promise<Child> {
  return startChild({
    file: bin('rackswarm-server'),
    args: ['--config', config],
    readyMessage: 'server is listening',
    logFile: join(directory, 'server.log'),
    startTimeoutMs: deadlineMs,
  })
}

async function kill(server: Child): Promise<void> {
  server.process.kill('SIGKILL')
  await server.exited
}

/** Has every agent announce every build, as fast as the tracker answers, until each announce was answered. @returns how long it took */
async function announce(
  generator: Generator,
  { pid }: Child,
  { port, agents, builds }: { port: number; agents: number; builds: number },
): Promise<number> {
  const result = await generator.load(
    { name: 'the tracker', port, pids: [pid] },
    {
      protocol: 'udp',
      swarms: builds,
      peers: agents,
      addresses,
      racks,
      sockets: 1,
      window: 2048,
      fill: true,
      seconds: 0,
    },
    false,
  )
  return fillOf(result).seconds
}

async function totalOf({ ready }: Child): Promise<number> {
  const response = await fetch(`${String(ready['metricsUrl'])}/stats.json`)
  const { seeders, leechers } = (await response.json()) as { seeders: number; leechers: number }
  return seeders + leechers
}

async function whole(server: Child, peers: number): Promise<void> {
  await until(`${peers} peers`, async () => (await totalOf(server)) === peers, { withinMs: deadlineMs })
}

async function changed(file: string): Promise<void> {
  const version = async () =>
    stat(file).then(
      ({ ino, mtimeMs }) => `${ino} ${mtimeMs}`,
      () => '',
    )
  const before = await version()
  await until('another snapshot', async () => (await version()) !== before, { withinMs: deadlineMs })
}

async function residentOf({ pid }: Child): Promise<number> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8')
  return Number(/^VmRSS:\s+(\d+) kB$/m.exec(status)?.[1]) * 1024
}

if (import.meta.main) {
  const [agents, builds] = [Number(process.argv[2] ?? 8000), Number(process.argv[3] ?? 200)]
  const figures = await restartTracker(agents, builds)
  const mib = (bytes: number) => `${Math.round(bytes / 2 ** 20)} MiB`
  process.stdout.write(`${figures.peers} peers (${agents} agents, ${builds} builds)
announced at first         ${figures.fillSeconds.toFixed(1)} s
whole again with snapshot  ${figures.withSnapshotSeconds.toFixed(1)} s (${figures.withSnapshotCpuSeconds.toFixed(1)} s of CPU, ${mib(figures.snapshotBytes)} on disk, ${mib(figures.residentBytes)} resident)
whole again without one    ${figures.withoutSnapshotSeconds.toFixed(1)} s (${figures.withoutSnapshotCpuSeconds.toFixed(1)} s of CPU), all agents announcing again
`)
  for (const seconds of [figures.withSnapshotSeconds, figures.withoutSnapshotSeconds])
    assert.ok(seconds < wholeWithinSeconds, `whole after ${seconds} s, need ${wholeWithinSeconds}`)
}
