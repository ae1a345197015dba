// npm pack runs this: `before` builds dist/ and ships a package.json without what the bundle already holds; `after` puts
// the development one back.
import { spawnSync } from 'node:child_process'
import { copyFile, readFile, rename, writeFile } from 'node:fs/promises'
import { join } from 'node:path'

const root = join(import.meta.dirname, '..')
const file = join(root, 'package.json')
const kept = join(root, '.package.json.development')

if (process.argv[2] === 'before') {
  if (
    spawnSync(process.execPath, [join(root, 'packaging', 'build.ts')], { stdio: ['ignore', 2, 2] }).status !==
    0
  )
    throw new Error('Cannot pack: the build failed, see above')
  const { name, version, description, license, type, engines, bin, exports, types, files } = JSON.parse(
    await readFile(file, 'utf8'),
  ) as Record<string, unknown>
  await copyFile(file, kept)
  await writeFile(
    file,
    `${JSON.stringify({ name, version, description, license, type, engines, bin, exports, types, files }, null, 2)}\n`,
  )
} else {
  await rename(kept, file)
}
