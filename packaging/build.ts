// npm run build [-- DIRECTORY]: bundles the three programs, their worker threads and the module that others import into dist/,
// dependencies included (docs/decisions/0001), with the types of the latter and the licences of everything inside.
import { globSync } from 'node:fs'
import { readFile, readdir, rm, writeFile } from 'node:fs/promises'
import { dirname, join, relative, resolve } from 'node:path'
import type { Metafile, Plugin } from 'esbuild'
import { build } from 'esbuild'
import { ServerConfig } from '../server/config.ts'
import { embeddedDefaults, serverOnlySettings } from '../server/embedded-settings.ts'
import { bundleTypes } from './bundle-types.ts'
import { settingsType } from './settings-type.ts'

const root = join(import.meta.dirname, '..')
const dist = resolve(process.argv[2] ?? join(root, 'dist'))

async function buildDist(): Promise<void> {
  await rm(dist, { recursive: true, force: true })
  const workers = globSync('{lib,server,agent}/**/*-worker.ts', { cwd: root })
  const { metafile } = await build({
    absWorkingDir: root,
    entryPoints: {
      server: 'server/main.ts',
      agent: 'agent/main.ts',
      cli: 'cli/main.ts',
      index: 'server/embed.ts',
      ...Object.fromEntries(workers.map((file) => [workerName(file), file])),
    },
    outdir: dist,
    bundle: true,
    splitting: true,
    chunkNames: 'chunk-[hash]',
    platform: 'node',
    target: 'node24',
    format: 'esm',
    metafile: true,
    logLevel: 'warning',
    // Native addons that webtorrent tries and does without; `sodium-native` and others never load here.
    external: ['utp-native', 'bufferutil', 'utf-8-validate', 'node-datachannel'],
    banner: {
      js: "import { createRequire as __createRequire } from 'node:module'; const require = __createRequire(import.meta.url);",
    },
    plugins: [workerUrls],
  })
  await writeFile(join(dist, 'THIRD_PARTY_LICENSES'), await licences(metafile))
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

function workerName(file: string): string {
  return relative(root, join(root, file)).replace(/\.ts$/, '').replaceAll('/', '-')
}

/** Sources start a worker by the URL of its file beside them; in dist/ all files lie side by side. */
const workerUrls: Plugin = {
  name: 'worker-urls',
  setup(plugin) {
    plugin.onLoad({ filter: /\.ts$/ }, async ({ path }) => {
      const contents = (await readFile(path, 'utf8')).replace(
        /new URL\('\.\/([\w-]+-worker)\.ts', import\.meta\.url\)/g,
        (_, name: string) =>
          `new URL('./${workerName(join(dirname(relative(root, path)), `${name}.ts`))}.js', import.meta.url)`,
      )
      return { contents, loader: 'ts' }
    })
  },
}

async function licences(metafile: Metafile): Promise<string> {
  const packages = new Set(
    Object.keys(metafile.inputs).flatMap(
      (file) => /^.*node_modules\/(?:@[^/]+\/)?[^/]+/.exec(file)?.[0] ?? [],
    ),
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
