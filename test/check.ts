// npm run check: everything that can be said about the sources without running them. All of it runs; any fault fails it.
import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'

const root = join(import.meta.dirname, '..')
const bin = (name: string) => join(root, 'node_modules', '.bin', name)
// The tools are scripts whose first line asks for `node`: let it be the one that runs this.
const env = { ...process.env, PATH: `${join(process.execPath, '..')}:${process.env['PATH'] ?? ''}` }

const steps: readonly (readonly [name: string, run: () => boolean])[] = [
  ['types (tsc)', () => command(bin('tsc'), '--noEmit', '-p', '.')],
  ['lint (eslint)', () => command(bin('eslint'), '.')],
  ['format (prettier)', () => command(bin('prettier'), '--check', '--log-level=warn', '.')],
  [
    'arrows and cycles (dependency-cruiser)',
    () =>
      command(
        bin('depcruise'),
        '--config',
        '.dependency-cruiser.cjs',
        ...['server', 'agent', 'cli', 'simulator', 'lib', 'bench', 'test', 'packaging', 'docs'],
      ),
  ],
  [
    'docs in step with the schemas',
    () => command(process.execPath, join(root, 'docs', 'generate.ts'), '--check'),
  ],
  ['lockfile without download addresses', checkLockfile],
  ['no leftovers', checkLeftovers],
]

const failed = steps.filter(([name, run]) => {
  process.stderr.write(`${name}\n`)
  return !run()
})
if (failed.length > 0) {
  process.stderr.write(`Failed: ${failed.map(([name]) => name).join(', ')}\n`)
  process.exitCode = 1
}

function command(file: string, ...args: string[]): boolean {
  return spawnSync(file, args, { cwd: root, env, stdio: ['ignore', 2, 2] }).status === 0
}

function checkLockfile(): boolean {
  const { packages } = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8')) as {
    packages: Record<string, { resolved?: string }>
  }
  const bad = Object.entries(packages).filter(([, { resolved }]) => resolved?.includes('://'))
  for (const [path, { resolved }] of bad)
    process.stderr.write(`package-lock.json: ${path} has the address ${resolved ?? ''}\n`)
  return bad.length === 0
}

/** Notes to oneself are issues, not comments. */
function checkLeftovers(): boolean {
  const words = ['TODO', 'FIXME', 'XXX', 'HACK'].map((word) => `\\b${word}\\b`).join('|')
  const files = spawnSync(
    'git',
    ['grep', '-nE', words, '--', '*.ts', '*.js', '*.md', ':!test/check.ts', ':!docs/benchmarks*'],
    {
      cwd: root,
      encoding: 'utf8',
    },
  )
  process.stderr.write(files.stdout)
  return files.stdout === ''
}
