// Our own engine, again and again: runs of one seeder and up to four fetchers, none of which may stall, then each fault of
// test/soak/engine/faults.ts at random times. `npm run soak -- engine [--runs N] [--seed N] [--only TEXT]` (default: 100 runs, a random
// seed, everything). A fault is repeated once for every 20 runs. The small disk is mounted, which needs root.
import assert from 'node:assert/strict'
import { createHash, randomInt } from 'node:crypto'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import type { Owner } from '../support/tracker.ts'
import { mebibyte, randomOf } from '../agent/engine/fixtures.ts'
import { faults } from './engine/faults.ts'
import type { Round, Seen } from './engine/round.ts'
import {
  between,
  boundedPeak,
  createSwarmFiles,
  endedRight,
  startFetcher,
  startSeeder,
} from './engine/round.ts'
import { bundleHost } from './engine/start-host.ts'

const stallMs = 2_000
const runSeconds = 120
const fetchersMax = 4
const runsPerFault = 20
/** Faults at once: most of them wait. */
const faultsAtOnce = 3

export interface Soak {
  readonly program: string
  readonly seed: number
}

export interface RunFigures {
  readonly runs: number
  /** From the peers' being known to the last byte of the slowest fetcher; of the runs that ended right. */
  readonly tookMs: readonly number[]
  /** Of any process. */
  readonly peakBytes: number
  readonly stalls: number
  readonly failures: number
}

/** Runs one after the other. Those that go wrong are said and counted. */
export async function runSwarms(runs: number, soak: Soak, say: (line: string) => void): Promise<RunFigures> {
  const tookMs: number[] = []
  let peakBytes = 0
  let stalls = 0
  let failures = 0
  for (let run = 1; run <= runs; run++) {
    try {
      const swarm = await inRound(soak, 'runs', run, runSwarm)
      tookMs.push(swarm.tookMs)
      peakBytes = Math.max(peakBytes, swarm.peakBytes)
      if (swarm.stillMs <= stallMs) continue
      stalls++
      say(`STALL   run ${run}: no byte for ${seconds(swarm.stillMs)}; ${swarm.what}`)
    } catch (error) {
      failures++
      say(`FAILED  run ${run}: ${reasonOf(error)}`)
    }
  }
  return { runs, tookMs: tookMs.sort((a, b) => a - b), peakBytes, stalls, failures }
}

/** One seeder, and fetchers that come within half a second and know each other. */
async function runSwarm(round: Round): Promise<Seen & { stillMs: number; what: string }> {
  const sizeBytes = Math.round(between(round, 1, 64) * mebibyte)
  const fetcherCount = 1 + Math.floor(between(round, 0, fetchersMax))
  const files = await createSwarmFiles(round, sizeBytes)
  const seeder = await startSeeder(round, files)
  const fetchers = await Promise.all(Array.from({ length: fetcherCount }, () => startFetcher(round, files)))
  const peers = [seeder, ...fetchers].map(({ port }) => ({ port }))
  const fetches = await Promise.all(
    fetchers.map(async (fetcher) => {
      await round.wait(0, 500)
      fetcher.tell(...peers.filter(({ port }) => port !== fetcher.port))
      return endedRight(fetcher, files, runSeconds)
    }),
  )
  return {
    tookMs: Math.max(...fetches.map(({ tookMs }) => tookMs)),
    peakBytes: Math.max(await boundedPeak(seeder), ...fetches.map(({ peakBytes }) => peakBytes)),
    stillMs: Math.max(...fetchers.map(({ progress }) => progress.stillMs)),
    what: `${(sizeBytes / mebibyte).toFixed(1)} MiB to ${fetcherCount}`,
  }
}

/** Each fault `rounds` times. @returns how many of them went wrong */
export async function repeatFaults(
  rounds: number,
  soak: Soak,
  only: string,
  say: (line: string) => void,
): Promise<number> {
  const left = Object.entries(faults).filter(([what]) => what.includes(only))
  let failed = 0
  const worker = async () => {
    for (let next = left.shift(); next; next = left.shift()) {
      const [what, fault] = next
      const seen: Seen[] = []
      const wrong: string[] = []
      for (let round = 1; round <= rounds; round++) {
        try {
          seen.push(await inRound(soak, what, round, fault))
        } catch (error) {
          wrong.push(`round ${round}: ${reasonOf(error)}`)
        }
      }
      if (wrong.length > 0) failed++
      say(
        `${wrong.length > 0 ? 'FAILED' : 'ok    '}  ${what}: ${[summaryOf(seen, rounds), ...wrong].join('; ')}`,
      )
    }
  }
  await Promise.all(Array.from({ length: faultsAtOnce }, worker))
  return failed
}

function summaryOf(seen: readonly Seen[], rounds: number): string {
  if (seen.length === 0) return `0 of ${rounds} right`
  const tookMs = seen.map((each) => each.tookMs).sort((a, b) => a - b)
  const peak = Math.max(...seen.map(({ peakBytes }) => peakBytes))
  const notes = new Set(seen.flatMap(({ note }) => note ?? []))
  return [
    `${seen.length} of ${rounds} right, median ${seconds(quantile(tookMs, 0.5))}, max ${seconds(quantile(tookMs, 1))}`,
    `at most ${Math.round(peak / mebibyte)} MiB resident`,
    ...notes,
  ].join('; ')
}

/** A round has its own randomness, of its name and number: it is the same whatever ran before it. */
async function inRound<Value>(
  { program, seed }: Soak,
  what: string,
  number: number,
  play: (round: Round) => Promise<Value>,
): Promise<Value> {
  await using owned = new AsyncDisposableStack()
  const owner: Owner = {
    after: (undo) => {
      owned.defer(async () => undo())
    },
  }
  const random = randomOf(createHash('sha256').update(`${seed} ${what} ${number}`).digest().readUInt32BE())
  const wait = async (fromMs: number, toMs: number) =>
    new Promise<void>((resolve) => setTimeout(resolve, fromMs + random() * (toMs - fromMs)))
  return await play({ owner, program, random, wait })
}

function quantile(sorted: readonly number[], share: number): number {
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)] ?? NaN
}

function seconds(ms: number): string {
  return `${(ms / 1000).toFixed(2)} s`
}

function reasonOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}

if (import.meta.main) {
  const { values } = parseArgs({
    options: {
      runs: { type: 'string', default: '100' },
      seed: { type: 'string', default: String(randomInt(2 ** 31)) },
      only: { type: 'string', default: '' },
    },
  })
  const [runs, seed] = [Number(values.runs), Number(values.seed)]
  assert.ok(Number.isInteger(runs) && runs > 0, `--runs is ${values.runs}, need a whole number from 1 on`)
  assert.ok(Number.isInteger(seed) && seed >= 0, `--seed is ${values.seed}, need a whole number`)
  const say = (line: string) => {
    process.stdout.write(`${line}\n`)
  }
  say(`seed ${seed}`)
  await using owned = new AsyncDisposableStack()
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-soak-engine-'))
  owned.defer(() => rm(directory, { recursive: true }))
  const soak = { program: await bundleHost(directory), seed }
  let wrong = 0
  if ('runs'.includes(values.only)) {
    const { tookMs, peakBytes, stalls, failures } = await runSwarms(runs, soak, say)
    const [median, p99, max] = [0.5, 0.99, 1].map((share) => seconds(quantile(tookMs, share)))
    wrong += stalls + failures
    say(
      `${wrong > 0 ? 'FAILED' : 'ok    '}  ${runs} runs: median ${median}, p99 ${p99}, max ${max}; at most ${Math.round(peakBytes / mebibyte)} MiB resident; ${stalls} stalls, ${failures} failures`,
    )
  }
  wrong += await repeatFaults(Math.ceil(runs / runsPerFault), soak, values.only, say)
  if (wrong > 0) process.exitCode = 1
}
