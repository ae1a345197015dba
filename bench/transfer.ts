import { spawn } from 'node:child_process'
import { mkdir, rename } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  deployctlOk,
  fetchOn,
  removeAll,
  startFleetAgent,
  startFleetServer,
  writeRandomFile,
} from '../test/support/fleet.ts'
import { aria2Options, fetchWithAria2, startAria2Seeder } from '../test/support/foreign.ts'
import type { BenchOptions, Benchmark, Side } from './harness.ts'
import { cpuSecondsOf } from './harness.ts'
import { readPeakMemoryMiB, watchProcess } from './proc.ts'

const extra = (engine: string) =>
  `engine: ${engine}\nlimits: { download: 100GiB, upload: 100GiB }\ndisk: { quota: 100GiB }\n`

/** What is told of one side that fetches from another. */
export const transferFigures = [
  { name: 'rate', unit: 'MiB/s' },
  { name: 'fetching CPU', unit: 's/GiB' },
  { name: 'seeding CPU', unit: 's/GiB' },
  { name: 'fetching memory', unit: 'MiB' },
  { name: 'seeding memory', unit: 'MiB' },
] as const

/** One build from one host to another over loopback, by our agents and by aria2. */
export const transfer: Benchmark = {
  name: 'transfer',
  summary: 'one build from one agent to another, beside aria2 to aria2',
  figures: transferFigures,
  prepare,
}

async function prepare(stack: AsyncDisposableStack, { sizeBytes, directory }: BenchOptions): Promise<Side[]> {
  const build = join(directory, 'build.tar')
  const sha256 = await writeRandomFile(build, sizeBytes)
  const gib = sizeBytes / 2 ** 30
  let number = 0

  /** Two agents and a server of their own. */
  const agents = async (engine: string): Promise<Side> => {
    const server = stack.use(await startFleetServer(join(directory, engine)))
    await deployctlOk(server, ['publish', build, 'bench:1'])
    const start = (host: string) =>
      startFleetAgent(join(directory, engine, host), server, { host, place: 'rack', extra: extra(engine) })
    const seeder = stack.use(await start('seeder'))
    await fetchOn(seeder, 'bench:1')
    return {
      name: `rackswarm agents, ${engine} engine`,
      settings:
        'two agents and a server as processes; limits lifted; from the request on the control socket to the exposed file, SHA-256 included',
      run: async () => {
        const host = `fetcher-${++number}`
        await using fetcher = await start(host)
        const { result, cpu } = await cpuSecondsOf({ fetching: fetcher.pid, seeding: seeder.pid }, () =>
          fetchOn(fetcher, 'bench:1'),
        )
        if (result.held.bytes.webseed > 0)
          throw new Error(`${result.held.bytes.webseed} bytes came from the webseed`)
        const figures = {
          rate: sizeBytes / 2 ** 20 / result.seconds,
          'fetching CPU': (cpu['fetching'] ?? 0) / gib,
          'seeding CPU': (cpu['seeding'] ?? 0) / gib,
          'fetching memory': await readPeakMemoryMiB(fetcher.pid),
          'seeding memory': await readPeakMemoryMiB(seeder.pid),
        }
        await fetcher[Symbol.asyncDispose]()
        await removeAll(join(directory, engine, host))
        return figures
      },
    }
  }
  const own = await agents('rackswarm')
  const webtorrent = await agents('webtorrent')

  // A tracker of its own: in one swarm the two sides would serve each other.
  const other = stack.use(await startFleetServer(join(directory, 'theirs')))
  await deployctlOk(other, ['publish', build, 'bench:1'])
  const torrent = join(directory, 'build.torrent')
  await deployctlOk(other, ['torrent', 'bench:1', '--output', torrent, '--no-webseed'])
  const aria2Seed = join(directory, 'aria2-seed')
  await mkdir(aria2Seed)
  await rename(build, join(aria2Seed, sha256))
  const aria2Seeder = stack.use(await startAria2Seeder(aria2Seed, torrent))
  // It announces once it has checked the file; a fetcher that comes before would wait for the next announce.
  await sleep(5_000)

  return [
    own,
    webtorrent,
    {
      name: 'aria2',
      settings: `${await aria2Version()}; ${aria2Options.join(' ')}; the same blob and a tracker of the same kind; from the start of the process to its end, no SHA-256`,
      run: async () => {
        const home = join(directory, `aria2-${++number}`)
        await mkdir(home)
        const { result, cpu } = await cpuSecondsOf({ seeding: aria2Seeder.pid }, () =>
          fetchTimed(home, torrent),
        )
        const figures = {
          rate: sizeBytes / 2 ** 20 / result.seconds,
          'fetching CPU': result.cpuSeconds / gib,
          'seeding CPU': (cpu['seeding'] ?? 0) / gib,
          'fetching memory': result.peakMemoryMiB,
          'seeding memory': await readPeakMemoryMiB(aria2Seeder.pid),
        }
        await removeAll(home)
        return figures
      },
    },
  ]
}

async function fetchTimed(directory: string, torrent: string) {
  const start = process.hrtime.bigint()
  const { child, done } = await fetchWithAria2(directory, torrent)
  const watch = watchProcess(child.pid ?? 0)
  await done
  return { seconds: Number(process.hrtime.bigint() - start) / 1e9, ...watch.end() }
}

async function aria2Version(): Promise<string> {
  const child = spawn('aria2c', ['--version'], { stdio: ['ignore', 'pipe', 'ignore'] })
  const lines = await new Promise<string>((settle) =>
    child.stdout.once('data', (data: Buffer) => {
      settle(data.toString())
    }),
  )
  return lines.split('\n')[0] ?? 'aria2'
}
