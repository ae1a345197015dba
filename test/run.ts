// npm test: gets the real peers that the tests need, then runs every test file. Arguments are file filters:
// `npm test -- registry` runs the files whose path has "registry" in it.
import { spawn } from 'node:child_process'
import { globSync, mkdirSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
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
  'python3-libtorrent',
] as const
const root = join(import.meta.dirname, '..')
const resultsFile = join(root, '.rackswarm', 'test-results.tap')

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
    .sort()
  if (files.length === 0) fail(`no test file has ${filters.join(' or ')} in its path`)
  mkdirSync(join(root, '.rackswarm'), { recursive: true })
  const startedAt = Date.now()
  const code = await run(files)
  const { skipped, summary } = await readResults()
  process.stderr.write(`${summary}, in ${Math.round((Date.now() - startedAt) / 1000)} s\n`)
  if (skipped > 0 && (process.env['CI'] === 'true' || process.getuid?.() === 0))
    fail(`${skipped} tests were skipped, see above: a skipped test is a failed test`)
  process.exitCode = code
}

function run(files: readonly string[]): Promise<number> {
  const child = spawn(
    process.execPath,
    [
      '--test',
      '--test-concurrency=2',
      '--test-timeout=240000',
      '--test-reporter=spec',
      '--test-reporter-destination=stdout',
      '--test-reporter=tap',
      `--test-reporter-destination=${resultsFile}`,
      ...files,
    ],
    { cwd: root, stdio: 'inherit', env: { ...process.env, NO_COLOR: process.stdout.isTTY ? '' : '1' } },
  )
  return new Promise((resolve, reject) => {
    child.once('error', reject)
    child.once('exit', (code) => {
      resolve(code ?? 1)
    })
  })
}

async function readResults(): Promise<{ skipped: number; summary: string }> {
  const text = await readFile(resultsFile, 'utf8')
  const count = (name: string) => Number(new RegExp(`^# ${name} (\\d+)$`, 'm').exec(text)?.[1] ?? 0)
  const skipped = count('skipped') + count('todo')
  return {
    skipped,
    summary: `${count('pass')} of ${count('tests')} tests passed, ${count('fail') + count('cancelled')} failed, ${skipped} skipped`,
  }
}

function fail(message: string): never {
  process.stderr.write(`${message}\n`)
  process.exit(1)
}
