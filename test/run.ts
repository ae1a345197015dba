// npm test: gets the real peers that the tests need, then runs every test file. Arguments are file filters:
// `npm test -- registry` runs the files whose path has "registry" in it.
import { spawnSync } from 'node:child_process'
import { cpSync, globSync, rmSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { run } from 'node:test'
import { spec } from 'node:test/reporters'
import { installTools } from './support/tools.ts'

/** Debian packages of the real peers. */
const tools = [
  'aria2',
  'transmission-daemon',
  'iproute2',
  'ethtool',
  'skopeo',
  'docker-registry',
  'containerd',
  'podman',
  'openssl',
  'strace',
  'haproxy',
  'python3-libtorrent',
] as const
const root = join(import.meta.dirname, '..')
/** Those that start programs take longest: begun first, none of them is what all others wait for at the end. */
const slow = ['test/system/', 'test/packaging/', 'test/server/registry/', 'test/agent/', 'test/simulator/']
/** Much of a test is waiting for sockets, disks and clocks; with many more at once, what has a limit of time would come too late. */
const filesAtOnce = availableParallelism() + 1
const timeoutMs = 240_000
const slowestShown = 10

await main()

async function main(): Promise<void> {
  try {
    installTools(tools)
  } catch (error) {
    fail((error as Error).message)
  }
  const filters = process.argv.slice(2)
  const files = globSync('test/**/*.test.ts', { cwd: root })
    .filter((file) => filters.length === 0 || filters.some((filter) => file.includes(filter)))
    .sort((a, b) => rankOf(a) - rankOf(b) || (a < b ? -1 : 1))
  if (files.length === 0) fail(`no test file has ${filters.join(' or ')} in its path`)
  const startedAt = performance.now()
  process.env['RACKSWARM_TEST_BIN'] = buildPrograms()
  const { counts, success, slowest } = await runFiles(files)
  const seconds = Math.round((performance.now() - startedAt) / 1000)
  const { tests, passed, skipped, todo } = counts
  const leftOut = skipped + todo
  if (files.length > slowestShown) process.stderr.write(`Slowest files: ${slowest}\n`)
  process.stderr.write(
    `${passed} of ${tests} tests passed, ${tests - passed - leftOut} failed, ${leftOut} skipped, in ${seconds} s\n`,
  )
  if (leftOut > 0 && (process.env['CI'] === 'true' || process.getuid?.() === 0))
    fail(`${leftOut} tests were skipped, see above: a skipped test is a failed test`)
  process.exitCode = success ? 0 : 1
}

/** What the tests start is what is shipped, which needs half the time that the sources need to start. @returns the directory of the programs */
function buildPrograms(): string {
  const programs = join(root, '.rackswarm', 'programs')
  rmSync(programs, { recursive: true, force: true })
  for (const shipped of ['bin', 'configs', 'package.json'])
    cpSync(join(root, shipped), join(programs, shipped), { recursive: true })
  const { status } = spawnSync(
    process.execPath,
    [join(root, 'packaging', 'build.ts'), join(programs, 'dist')],
    { stdio: ['ignore', 2, 2] },
  )
  if (status !== 0) fail('the programs could not be built, see above')
  return join(programs, 'bin')
}

async function runFiles(files: readonly string[]) {
  // What a file of ours is compiled to is kept for the hundreds of processes that load it too: half of what a start costs.
  const compiled = join(root, '.rackswarm', 'compiled')
  rmSync(compiled, { recursive: true, force: true })
  process.env['NODE_COMPILE_CACHE'] = compiled
  const events = run({
    files: files.map((file) => join(root, file)),
    cwd: root,
    concurrency: filesAtOnce,
    timeout: timeoutMs,
    execArgv: ['--import', join(root, 'test', 'support', 'watchdog.ts')],
  })
  const seconds = new Map<string, number>()
  const summary = new Promise<{ counts: Counts; success: boolean }>((resolve, reject) => {
    events.on('test:summary', ({ file, counts, success, duration_ms: ms }) => {
      if (file === undefined) resolve({ counts, success })
      else seconds.set(file.slice(root.length + 1), ms / 1000)
    })
    events.once('error', reject)
  })
  events.compose(new spec()).pipe(process.stdout)
  const ended = await summary
  const slowest = [...seconds]
    .sort(([, a], [, b]) => b - a)
    .slice(0, slowestShown)
    .map(([file, took]) => `${file} ${took.toFixed(0)} s`)
    .join(', ')
  return { ...ended, slowest }
}

type Counts = Record<'tests' | 'passed' | 'skipped' | 'todo', number>

function rankOf(file: string): number {
  const rank = slow.findIndex((directory) => file.startsWith(directory))
  return rank < 0 ? slow.length : rank
}

function fail(message: string): never {
  process.stderr.write(`${message}\n`)
  process.exit(1)
}
