// npm run soak -- AREA: the long forms of what npm test does once. Without an area, says which there are.
import { spawn } from 'node:child_process'
import { existsSync, globSync } from 'node:fs'
import { basename, join } from 'node:path'

const directory = join(import.meta.dirname, 'soak')
const [area, ...args] = process.argv.slice(2)
const areas = [...globSync('*.ts', { cwd: directory }).map((file) => basename(file, '.ts')), 'fuzz'].sort()

if (area === undefined || !areas.includes(area)) {
  process.stderr.write(`Usage: npm run soak -- AREA, where AREA is one of ${areas.join(', ')}\n`)
  process.exitCode = 2
} else {
  const file = join(directory, `${area}.ts`)
  // The fuzz soak is the property tests themselves, with many more inputs.
  const command = existsSync(file)
    ? [file, ...args]
    : [
        '--test',
        ...globSync('test/**/*.test.ts', { cwd: join(directory, '..', '..') }).filter((name) =>
          /lib\/protocol|lib\/token/.test(name),
        ),
      ]
  const env = area === 'fuzz' ? { ...process.env, RACKSWARM_FUZZ_RUNS: args[0] ?? '2000000' } : process.env
  const child = spawn(process.execPath, command, { stdio: 'inherit', env, cwd: join(directory, '..', '..') })
  child.once('exit', (code) => {
    process.exitCode = code ?? 1
  })
}
