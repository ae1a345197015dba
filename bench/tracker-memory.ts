import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { BenchOptions, Benchmark, Side } from './harness.ts'
import { readMemoryMiB } from './proc.ts'
import type { Generator, LoadTarget } from './tracker-load.ts'
import { buildGenerator, fillOf, windowOf } from './tracker-load.ts'
import { describeOpentracker, startOpentracker } from './tracker-rivals.ts'
import { startTrackerServer } from './tracker-server.ts'

const peersMax = 6_000_000
/** Time for a collector to give back what the fill has left behind. */
const settleMs = 5_000
/** Longer than a `snapshot_interval`: whoever holds many peers also writes them down. */
const fullProbeSeconds = 75
/** So few under way that what waits before an announce is not what is measured. */
const fillWindow = 32
/** One peer of one swarm, announced a thousand times a second: when nobody answers for a while, it shows. */
const probe = { protocol: 'udp', swarms: 1, peers: 1, rate: 1000, seconds: 10, timeoutMs: 10_000 } as const

/** What a peer costs, and whether a tracker that holds many ever pauses. */
export const trackerMemory: Benchmark = {
  name: 'tracker-memory',
  summary: 'memory of a peer at 5 million of them, and the longest pause, beside opentracker',
  figures: [
    { name: 'memory', unit: 'bytes/peer' },
    { name: 'empty', unit: 'MiB' },
    { name: 'full', unit: 'MiB' },
    { name: 'fill rate', unit: 'announces/s' },
    { name: 'longest wait, filling', unit: 'ms' },
    { name: 'longest wait, empty', unit: 'ms' },
    { name: 'longest wait, full', unit: 'ms' },
  ],
  ignoresSize: true,
  unwarmed: true,
  prepare,
}

async function prepare(_stack: AsyncDisposableStack, { directory }: BenchOptions): Promise<Side[]> {
  const generator = buildGenerator(directory)
  let number = 0
  const next = () => join(directory, `memory-${++number}`)
  const own = (host: string, swarms: number, peers: number, settings: string): Side => ({
    name: `rackswarm, ${shapeName(host, swarms, peers)}`,
    settings,
    run: async () => {
      await using server = await startTrackerServer({
        name: 'rackswarm',
        directory: next(),
        udpHost: host,
        peersMax,
      })
      return await fillAndProbe(generator, server.udp, swarms, peers)
    },
  })
  const theirs = (swarms: number, peers: number, settings: string): Side => ({
    name: `opentracker, ${shapeName('127.0.0.1', swarms, peers)}`,
    settings,
    run: async () => {
      await using server = await startOpentracker(next(), generator.hashes(swarms))
      return await fillAndProbe(generator, server, swarms, peers)
    },
  })
  return [
    own(
      '127.0.0.1',
      1000,
      5000,
      `a fresh server on one core, filled over UDP with ${fillWindow} announces under way; memory: growth of the resident memory (Rss of smaps_rollup, ${settleMs / 1000} s after the fill) from after the probe of the empty server; longest wait: of any announce of the fill, and of a probe of ${probe.rate} announces/s for ${probe.seconds} s on the empty and ${fullProbeSeconds} s on the full server (a snapshot is written meanwhile), from when each was to be sent`,
    ),
    own('127.0.0.1', 50_000, 100, 'the same, in small swarms'),
    own('::1', 1000, 5000, 'the same over IPv6'),
    theirs(1000, 5000, `${describeOpentracker()}; the same fill and probes`),
    theirs(50_000, 100, 'the same, in small swarms'),
  ]
}

function shapeName(host: string, swarms: number, peers: number): string {
  return `${host.includes(':') ? 'IPv6' : 'IPv4'}, ${swarms} × ${peers}`
}

async function fillAndProbe(generator: Generator, target: LoadTarget, swarms: number, peers: number) {
  const idle = windowOf(await generator.load(target, probe))
  const emptyMiB = await readMemoryMiB(target.pids)
  const shape = { protocol: 'udp', swarms, peers, numwant: 30, window: fillWindow } as const
  const fill = fillOf(await generator.load(target, { ...shape, fill: true, seconds: 0 }))
  if (fill.known !== peers)
    throw new Error(`Cannot measure ${target.name}: its largest swarm has ${fill.known} peers, not ${peers}`)
  await sleep(settleMs)
  const fullMiB = await readMemoryMiB(target.pids)
  const full = windowOf(await generator.load(target, { ...probe, seconds: fullProbeSeconds }))
  return {
    memory: ((fullMiB - emptyMiB) * 2 ** 20) / (swarms * peers),
    empty: emptyMiB,
    full: fullMiB,
    'fill rate': fill.rate,
    'longest wait, filling': fill.latencyUs.max / 1000,
    'longest wait, empty': idle.latencyUs.max / 1000,
    'longest wait, full': full.latencyUs.max / 1000,
  }
}
