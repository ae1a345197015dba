// npm test: gets the real peers that the tests need, then runs every test file. Arguments are file filters:
// `npm test -- registry` runs the files whose path has "registry" in it.
import { spawn, spawnSync } from 'node:child_process'
import { existsSync, globSync, mkdirSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'

/** What must be there, and the Debian package that brings it. */
const tools = [
  { file: '/usr/bin/aria2c', packageName: 'aria2' },
  { file: '/usr/bin/transmission-daemon', packageName: 'transmission-daemon' },
  { file: '/usr/sbin/ip', packageName: 'iproute2' },
  { file: '/usr/sbin/ethtool', packageName: 'ethtool' },
  { file: '/usr/bin/skopeo', packageName: 'skopeo' },
  { file: '/usr/bin/openssl', packageName: 'openssl' },
  { file: '/usr/lib/python3/dist-packages/libtorrent.*.so', packageName: 'python3-libtorrent' },
]
const root = join(import.meta.dirname, '..')
const resultsFile = join(root, '.rackswarm', 'test-results.tap')

await main()

async function main(): Promise<void> {
  installTools()
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

/** Installs with apt what is missing; where that is not possible, says what to install and ends. */
function installTools(): void {
  const missing = () =>
    tools.filter(({ file }) => globSync(file).length === 0).map(({ packageName }) => packageName)
  const wanted = missing()
  if (wanted.length === 0) return
  const byHand = `install these Debian packages and run it again: apt-get install ${wanted.join(' ')}`
  if (process.getuid?.() !== 0 || !existsSync('/usr/bin/apt-get')) fail(`Tests need real peers: ${byHand}`)
  process.stderr.write(`Installing ${wanted.join(', ')} with apt-get\n`)
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' }
  const apt = (...args: string[]) =>
    spawnSync('apt-get', ['-qq', '-y', '-o', 'Dpkg::Use-Pty=0', ...args], {
      env,
      stdio: ['ignore', 'ignore', 2],
    })
  const install = () => apt('install', '--no-install-recommends', ...wanted).status === 0
  // The lists of a machine may be old or not there.
  if (!install()) {
    apt('update')
    if (!install()) fail(`apt-get failed, see above; ${byHand}`)
  }
  if (missing().length > 0) fail(`${missing().join(', ')} did not bring what the tests need`)
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
