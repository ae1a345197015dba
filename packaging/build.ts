// npm run build [-- DIRECTORY]: bundles the three programs, their worker threads and the module that others import into dist/,
// dependencies included (docs/decisions/0001), with the types of the latter and the licences of everything inside.
import { readFile, readdir, rm, writeFile } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { ServerConfig } from '../server/config.ts'
import { embeddedDefaults, serverOnlySettings } from '../server/embedded-settings.ts'
import { bundle } from './bundle.ts'
import { bundleTypes } from './bundle-types.ts'
import { settingsType } from './settings-type.ts'

const root = join(import.meta.dirname, '..')
const dist = resolve(process.argv[2] ?? join(root, 'dist'))

async function buildDist(): Promise<void> {
  await rm(dist, { recursive: true, force: true })
  const inputs = await bundle(
    {
      server: 'server/main.ts',
      agent: 'agent/main.ts',
      cli: 'cli/main.ts',
      index: 'server/embed.ts',
    },
    dist,
  )
  await writeFile(join(dist, 'THIRD_PARTY_LICENSES'), await licences(inputs))
  await writeFile(join(dist, 'index.d.ts'), types())
}

/** Of index.js. AsyncDisposable must be known to programs that are compiled for an older language too. */
function types(): string {
  const settings = settingsType('EmbeddedSettings', ServerConfig, {
    omitted: serverOnlySettings,
    told: embeddedDefaults,
  })
  const declarations = bundleTypes(
    join(root, 'server', 'embed.ts'),
    new Map([
      ['EmbeddedSettings', `/** What server.yaml says, as an object: docs/configuration.md. */\n${settings}`],
    ]),
  )
  return `/// <reference lib="esnext.disposable" />\n\n${declarations}`
}

async function licences(inputs: readonly string[]): Promise<string> {
  const packages = new Set(
    inputs.flatMap((file) => /^.*node_modules\/(?:@[^/]+\/)?[^/]+/.exec(file)?.[0] ?? []),
  )
  const parts = await Promise.all(
    [...packages].sort().map(async (directory) => {
      const { name, version, license } = JSON.parse(
        await readFile(join(root, directory, 'package.json'), 'utf8'),
      ) as { name: string; version: string; license?: string }
      const file = (await readdir(join(root, directory))).find((entry) =>
        /^(licen[cs]e|copying)/i.test(entry),
      )
      const text = file === undefined ? '' : await readFile(join(root, directory, file), 'utf8')
      return `${name} ${version} (${license ?? 'see below'})\n\n${text.trim()}\n`
    }),
  )
  return parts.join(`\n${'-'.repeat(80)}\n\n`)
}

await buildDist()
