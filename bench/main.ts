import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { size } from '../lib/runtime/config.ts'
import { agentExposed } from './agent-exposed.ts'
import { agentRest } from './agent-rest.ts'
import { engine } from './engine.ts'
import type { Benchmark } from './harness.ts'
import { formatReport, installPrograms, measure, saveReport } from './harness.ts'
import { mirror } from './mirror.ts'
import { publish } from './publish.ts'
import { picker } from './picker.ts'
import { redis } from './redis.ts'
import { registry } from './registry.ts'
import { selection } from './selection.ts'
import { topology } from './topology.ts'
import { trackerHttp } from './tracker-http.ts'
import { trackerLatency } from './tracker-latency.ts'
import { trackerMemory } from './tracker-memory.ts'
import { trackerTokens } from './tracker-tokens.ts'
import { trackerUdp } from './tracker-udp.ts'
import { transfer } from './transfer.ts'

/** A new engine, store or peer is a new side of one of these; a new question is a new file and a line here. */
const benchmarks: readonly Benchmark[] = [
  transfer,
  engine,
  agentExposed,
  agentRest,
  publish,
  trackerUdp,
  trackerHttp,
  trackerTokens,
  trackerMemory,
  trackerLatency,
  topology,
  selection,
  picker,
  registry,
  redis,
  mirror,
]

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    runs: { type: 'string', default: '5' },
    size: { type: 'string', default: '1GiB' },
    /** Runs only those sides that have this in their name, to look at one thing; not to be saved. */
    side: { type: 'string', default: '' },
    json: { type: 'boolean', default: false },
    save: { type: 'boolean', default: false },
  },
})
const benchmark = benchmarks.find(({ name }) => name === positionals[0])
if (benchmark === undefined || positionals.length !== 1 || !/^[1-9]\d*$/.test(values.runs)) {
  process.stderr.write(
    `Usage: npm run bench -- NAME [--runs 5] [--size 1GiB] [--side PART] [--json] [--save]\n\n${benchmarks.map(({ name, summary }) => `  ${name.padEnd(15)} ${summary}`).join('\n')}\n`,
  )
  process.exit(2)
}

const directory = await mkdtemp(join(tmpdir(), 'rackswarm-bench-'))
try {
  const command = `npm run bench -- ${process.argv
    .slice(2)
    .filter((argument) => argument !== '--save' && argument !== '--json')
    .join(' ')}`
  await installPrograms(join(directory, 'installed'))
  const report = await measure(
    benchmark,
    { runs: Number(values.runs), side: values.side },
    { sizeBytes: benchmark.ignoresSize ? 0 : size().parse(values.size), directory },
    command,
  )
  process.stdout.write(values.json ? `${JSON.stringify(report, null, 2)}\n` : `${formatReport(report)}\n`)
  if (values.save) {
    const samples = resolve(import.meta.dirname, '..', 'docs', 'benchmarks')
    await mkdir(samples, { recursive: true })
    process.stderr.write(`Raw samples: ${await saveReport(report, samples)}\n`)
  }
} finally {
  await rm(directory, { recursive: true, force: true })
}
