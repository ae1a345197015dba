import { globSync } from 'node:fs'
import { copyFile, readFile } from 'node:fs/promises'
import { dirname, join, relative } from 'node:path'
import type { Plugin } from 'esbuild'
import { build } from 'esbuild'

const root = join(import.meta.dirname, '..')

/**
 * Bundles programs as they are shipped, dependencies included, with the threads that they start.
 *
 * @param programs name of each file in `outdir`, without `.js`, and its source, from the root of the project
 * @returns the files that went into it, from the root of the project
 */
export async function bundle(programs: Readonly<Record<string, string>>, outdir: string): Promise<string[]> {
  const workers = globSync('{lib,server,agent,simulator}/**/*-worker.ts', { cwd: root })
  const { metafile } = await build({
    absWorkingDir: root,
    entryPoints: {
      ...programs,
      ...Object.fromEntries(workers.map((file) => [flatName(file).replace(/\.ts$/, ''), file])),
    },
    outdir,
    bundle: true,
    splitting: true,
    chunkNames: 'chunk-[hash]',
    platform: 'node',
    target: 'node24',
    format: 'esm',
    // The text of a program stays in memory for as long as it runs. Lines are kept short, and names as they are, for stack traces.
    minifyWhitespace: true,
    lineLimit: 120,
    metafile: true,
    logLevel: 'warning',
    // Native addons that webtorrent tries and does without; `sodium-native` and others never load here.
    external: ['utp-native', 'bufferutil', 'utf-8-validate', 'node-datachannel'],
    banner: {
      js: "import { createRequire as __createRequire } from 'node:module'; const require = __createRequire(import.meta.url);",
    },
    plugins: [fileUrls],
  })
  const scripts = globSync('server/**/*.lua', { cwd: root })
  for (const file of scripts) await copyFile(join(root, file), join(outdir, flatName(file)))
  return Object.keys(metafile.inputs)
}

/** What a file below the root is called in the one directory of what is shipped. */
function flatName(file: string): string {
  return relative(root, join(root, file)).replaceAll('/', '-')
}

/** Sources name a worker, or a script for Redis, by the URL of its file beside or below them; in dist/ all files lie side by side. */
const fileUrls: Plugin = {
  name: 'file-urls',
  setup(plugin) {
    plugin.onLoad({ filter: /\.ts$/ }, async ({ path }) => {
      const shipped = (file: string) => flatName(join(dirname(relative(root, path)), file))
      const contents = (await readFile(path, 'utf8'))
        .replace(
          /new URL\('\.\/([\w-]+-worker)\.ts', import\.meta\.url\)/g,
          (_, name: string) => `new URL('./${shipped(name)}.js', import.meta.url)`,
        )
        .replace(
          /new URL\('\.\/([\w/-]+\.lua)', import\.meta\.url\)/g,
          (_, name: string) => `new URL('./${shipped(name)}', import.meta.url)`,
        )
      return { contents, loader: 'ts' }
    })
  },
}
