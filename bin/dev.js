// Runs a TypeScript file of a checkout: installs what package-lock.json names if it is not there, then hands over
// to the pinned Node. `npm run …` starts here, with whatever Node the machine has.
import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { findNode, root, runUnder } from './node.js'

if (!isInstalled()) {
  process.stderr.write('Installing the packages named in package-lock.json (npm ci)\n')
  const { status } = spawnSync('npm', ['ci', '--no-audit', '--no-fund', '--loglevel=error'], {
    cwd: root,
    stdio: ['ignore', 2, 2],
  })
  if (status !== 0) {
    process.stderr.write('Cannot install the packages: `npm ci` failed, see above\n')
    process.exit(1)
  }
}
const node = findNode()
if (node === undefined) {
  process.stderr.write(
    `Rackswarm needs Node 24 or newer; this is ${process.versions.node}, and there is no packaged Node for this platform\n`,
  )
  process.exit(78)
}
const [file, ...args] = process.argv.slice(2)
runUnder(node, [join(root, file), ...args])

/** Whether node_modules holds just what package-lock.json names; npm keeps a copy of the lock it installed from. */
function isInstalled() {
  const hidden = join(root, 'node_modules', '.package-lock.json')
  if (!existsSync(hidden)) return false
  const installed = JSON.parse(readFileSync(hidden, 'utf8')).packages
  const wanted = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8')).packages
  return Object.entries(wanted).every(
    ([path, { version, optional, link }]) =>
      !path.startsWith('node_modules/') || optional || link || installed[path]?.version === version,
  )
}
