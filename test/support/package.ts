import { execFile } from 'node:child_process'
import { cp, mkdir, readFile, readdir, symlink, writeFile } from 'node:fs/promises'
import { basename, join, resolve } from 'node:path'
import { promisify } from 'node:util'

export const run = promisify(execFile)
export const root = resolve(import.meta.dirname, '..', '..')

/** What a checkout has beside its sources. */
const notSources = new Set(['node_modules', '.git', 'dist', '.rackswarm', 'coverage'])

/**
 * Packs the package as npm would publish it. Packing writes into the tree that is packed, so it is a copy: other tests may pack, and
 * read package.json, meanwhile.
 *
 * @returns the path of the tarball
 */
export async function packTarball(directory: string): Promise<string> {
  const tree = join(directory, 'tree')
  await cp(root, tree, {
    recursive: true,
    filter: (source) => source === root || !notSources.has(basename(source)),
  })
  await symlink(join(root, 'node_modules'), join(tree, 'node_modules'))
  const developed = await readFile(join(tree, 'package.json'), 'utf8')
  await run('npm', ['pack', '--pack-destination', directory], { cwd: tree })
  if ((await readFile(join(tree, 'package.json'), 'utf8')) !== developed)
    throw new Error('packing does not leave package.json as it was')
  const tarball = (await readdir(directory)).find((name) => name.endsWith('.tgz'))
  if (tarball === undefined) throw new Error('npm pack has made no tarball')
  return join(directory, tarball)
}

/** Installs a tarball, and nothing else, with the network out of reach. Makes the directory a package unless it is one. */
export async function installTarball(tarball: string, directory: string): Promise<void> {
  await mkdir(directory, { recursive: true })
  const isPackage = (await readdir(directory)).includes('package.json')
  if (!isPackage) await writeFile(join(directory, 'package.json'), '{"private":true}')
  await run('npm', ['install', '--offline', '--no-audit', '--no-fund', tarball], { cwd: directory })
}
