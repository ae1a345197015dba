import { spawnSync } from 'node:child_process'
import { cp, open, readFile, unlink, writeFile } from 'node:fs/promises'
import { cpus, release, totalmem } from 'node:os'
import { join, resolve } from 'node:path'
import { readProcessCpuSeconds, readTotalCpu } from './proc.ts'

/** One number that a run yields; `better` says which direction wins. */
export interface Figure {
  readonly name: string
  readonly unit: string
}

/** One way of doing the work that a benchmark compares. */
export interface Side {
  readonly name: string
  /** Versions, flags, sizes: all that a second person needs to repeat it. */
  readonly settings: string
  /** Does the work once. @returns a value for each figure of the benchmark */
  run(): Promise<Record<string, number>>
}

export interface Benchmark {
  readonly name: string
  readonly summary: string
  readonly figures: readonly Figure[]
  /** It moves no build: `--size` says nothing to it, and no page cache is warmed. */
  readonly ignoresSize?: true
  /** Each run starts from nothing and warms up what it needs: none is left out. */
  readonly unwarmed?: true
  /** Starts what the sides need for the whole benchmark; what is put on the stack is disposed at the end. */
  prepare(stack: AsyncDisposableStack, options: BenchOptions): Promise<Side[]>
}

export interface BenchOptions {
  /** Bytes to move; 0 where the benchmark moves none. */
  readonly sizeBytes: number
  readonly directory: string
}

export interface Sample {
  readonly side: string
  readonly run: number
  readonly figures: Record<string, number>
  /** Share of all cores that was busy during the run, 0 to 1: near 1 the machine, not the program, set the pace. */
  readonly machineBusy: number
}

export interface Report {
  readonly benchmark: string
  readonly date: string
  readonly command: string
  readonly machine: Machine
  readonly sides: readonly { name: string; settings: string }[]
  readonly figures: readonly Figure[]
  readonly samples: readonly Sample[]
}

export interface Machine {
  readonly cpu: string
  readonly cores: number
  readonly memoryGiB: number
  readonly kernel: string
  readonly node: string
}

/** What is touched before each run, in multiples of the bytes that the benchmark moves. */
const warmFactor = 3

/** Runs every side in turn, `runs` times over, after one run of each that does not count (but for `unwarmed`). */
export async function measure(
  benchmark: Benchmark,
  { runs, side: part }: { readonly runs: number; readonly side: string },
  options: BenchOptions,
  command: string,
): Promise<Report> {
  await using stack = new AsyncDisposableStack()
  const sides = (await benchmark.prepare(stack, options)).filter(({ name }) => name.includes(part))
  const samples: Sample[] = []
  for (let run = benchmark.unwarmed ? 1 : 0; run <= runs; run++) {
    for (const side of sides) {
      await warmMemory(options)
      const before = await readTotalCpu()
      const figures = await side.run()
      const after = await readTotalCpu()
      const machineBusy =
        (after.busySeconds - before.busySeconds) / (after.totalSeconds - before.totalSeconds)
      process.stderr.write(
        `${run === 0 ? 'warm-up' : `run ${run}`}  ${side.name}  ${JSON.stringify(round(figures))}\n`,
      )
      if (run > 0) samples.push({ side: side.name, run, figures, machineBusy })
    }
  }
  return {
    benchmark: benchmark.name,
    date: new Date().toISOString(),
    command,
    machine: await describeMachine(),
    sides: sides.map(({ name, settings }) => ({ name, settings })),
    figures: benchmark.figures,
    samples,
  }
}

/**
 * Writes a file and removes it, so that the kernel has memory at hand. A virtual machine gives memory that was freed back to
 * its host within seconds, and the page cache then pays up to ten times the CPU for each byte of it: 0.2 to 2 s a GiB, as
 * chance has it. So both sides get memory that was in use a moment ago, as on a machine of its own.
 */
async function warmMemory({ directory, sizeBytes }: BenchOptions): Promise<void> {
  if (sizeBytes === 0) return
  const file = join(directory, 'warm')
  {
    await using handle = await open(file, 'w')
    const chunk = Buffer.alloc(1024 * 1024)
    for (let written = 0; written < warmFactor * sizeBytes; written += chunk.length) await handle.write(chunk)
  }
  await unlink(file)
}

/** A Markdown table: a row for each side, `median (min–max)` for each figure. */
export function formatReport(report: Report): string {
  const { machine } = report
  const header = [
    '',
    ...report.figures.map(({ name, unit }) => `${name}${unit === '' ? '' : ` (${unit})`}`),
    'machine busy',
  ]
  const rows = report.sides.map((side) => {
    const samples = report.samples.filter((sample) => sample.side === side.name)
    return [
      side.name,
      ...report.figures.map(({ name }) => spread(samples.map(({ figures }) => figures[name] ?? Number.NaN))),
      spread(samples.map(({ machineBusy }) => machineBusy)),
    ]
  })
  return [
    `${report.date.slice(0, 10)}, \`${report.command}\`, ${machine.cores} × ${machine.cpu}, ${machine.memoryGiB} GiB, Linux ${machine.kernel}, Node ${machine.node}.`,
    'Median (minimum–maximum) of the runs, sides in turn.',
    '',
    `| ${header.join(' | ')} |`,
    `|${header.map(() => '---').join('|')}|`,
    ...rows.map((row) => `| ${row.join(' | ')} |`),
    '',
    ...report.sides.map(({ name, settings }) => `- ${name}: ${settings}`),
  ].join('\n')
}

/** Writes the raw samples where docs/benchmarks.md points. */
export async function saveReport(report: Report, directory: string): Promise<string> {
  const file = `${directory}/${report.benchmark}-${report.date.slice(0, 10)}.json`
  await writeFile(file, `${JSON.stringify(report, null, 2)}\n`)
  return file
}

/** CPU seconds that processes spent while `work` ran; they must live through it. */
export async function cpuSecondsOf<Result>(
  pids: Readonly<Record<string, number>>,
  work: () => Promise<Result>,
): Promise<{ result: Result; cpu: Record<string, number> }> {
  const read = async () =>
    Object.fromEntries(
      await Promise.all(
        Object.entries(pids).map(async ([name, pid]) => [name, await readProcessCpuSeconds(pid)] as const),
      ),
    )
  const before = await read()
  const result = await work()
  const after = await read()
  return {
    result,
    cpu: Object.fromEntries(
      Object.keys(pids).map((name) => [name, (after[name] ?? 0) - (before[name] ?? 0)]),
    ),
  }
}

export async function describeMachine(): Promise<Machine> {
  const all = cpus()
  return {
    cpu: all[0]?.model.trim() ?? (await readFile('/proc/cpuinfo', 'utf8')).slice(0, 80),
    cores: all.length,
    memoryGiB: Math.round(totalmem() / 2 ** 30),
    kernel: release(),
    node: process.versions.node,
  }
}

function spread(values: readonly number[]): string {
  // Not every side has every figure.
  if (values.every(Number.isNaN)) return '–'
  const sorted = [...values].sort((a, b) => a - b)
  const at = (index: number) => format(sorted[index] ?? Number.NaN)
  return `${format(median(sorted))} (${at(0)}–${at(sorted.length - 1)})`
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length / 2
  return sorted.length % 2 === 1
    ? (sorted[Math.floor(middle)] ?? Number.NaN)
    : ((sorted[middle - 1] ?? Number.NaN) + (sorted[middle] ?? Number.NaN)) / 2
}

function format(value: number): string {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)
}

function round(figures: Record<string, number>): Record<string, number> {
  return Object.fromEntries(
    Object.entries(figures).map(([name, value]) => [name, Number(value.toPrecision(4))]),
  )
}

/** The programs as `npm pack` ships them, bundled: what a user runs, and what the sides start. */
export async function installPrograms(home: string): Promise<void> {
  const root = resolve(import.meta.dirname, '..')
  for (const part of ['bin', 'package.json'])
    await cp(join(root, part), join(home, part), { recursive: true })
  const built = spawnSync(process.execPath, [join(root, 'packaging', 'build.ts'), join(home, 'dist')], {
    stdio: ['ignore', 2, 2],
  })
  if (built.status !== 0) throw new Error('Cannot measure: the build failed, see above')
  process.env['RACKSWARM_TEST_BIN'] = join(home, 'bin')
}
