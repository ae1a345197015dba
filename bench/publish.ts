import { spawn } from 'node:child_process'
import { mkdir, readdir, writeFile } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { generateReleaseKeys } from '../lib/token/release-keys.ts'
import { bin, refreshFile, removeAll, startFleetServer, writeRandomFile } from '../test/support/fleet.ts'
import type { BenchOptions, Benchmark, Side } from './harness.ts'
import { readProcessCpuSeconds, watchProcess } from './proc.ts'

const root = resolve(import.meta.dirname, '..')

/** How near `deployctl publish` is to what the bytes alone cost. */
export const publish: Benchmark = {
  name: 'publish',
  summary:
    'deployctl publish of one build, beside the raw floor: read, SHA-256, send; receive, SHA-256, SHA-1, write, sync',
  figures: [
    { name: 'rate', unit: 'MiB/s' },
    { name: 'client CPU', unit: 's/GiB' },
    { name: 'server CPU', unit: 's/GiB' },
    { name: 'server memory', unit: 'MiB' },
  ],
  prepare,
}

async function prepare(stack: AsyncDisposableStack, { sizeBytes, directory }: BenchOptions): Promise<Side[]> {
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, sizeBytes)
  const server = stack.use(await startFleetServer(join(directory, 'publish')))
  const signKey = join(directory, 'signing-key.pem')
  await writeFile(signKey, generateReleaseKeys('ES256').privatePem, { mode: 0o600 })
  const floorDirectory = join(directory, 'floor')
  await mkdir(floorDirectory)
  const figures = (seconds: number, clientCpu: number, serverCpu: number, memory: number) => ({
    rate: sizeBytes / 2 ** 20 / seconds,
    'client CPU': clientCpu / (sizeBytes / 2 ** 30),
    'server CPU': serverCpu / (sizeBytes / 2 ** 30),
    'server memory': memory,
  })
  let number = 0
  return [
    {
      name: 'deployctl publish',
      settings:
        'server and deployctl as processes over loopback, plaintext, as npm pack ships them; signed; new content each run; time from the start of the command to its end',
      run: async () => {
        await refreshFile(build)
        const cpuBefore = await readProcessCpuSeconds(server.pid)
        const client = await runTimed(
          process.execPath,
          [bin('deployctl'), 'publish', build, `bench:${++number}`],
          {
            ...process.env,
            DEPLOYCTL_SERVER: server.publicUrl,
            DEPLOYCTL_TOKEN_FILE: server.adminTokenFile,
            DEPLOYCTL_SIGN_KEY_FILE: signKey,
          },
        )
        const serverCpu = (await readProcessCpuSeconds(server.pid)) - cpuBefore
        const memory = client.watchOther(server.pid)
        await dropBlobs(server.dataDirectory)
        return figures(client.seconds, client.cpuSeconds, serverCpu, await memory)
      },
    },
    {
      name: 'raw floor',
      settings:
        'bench/floor.ts: one TCP connection, 1 MiB reads, hashing and writing in one worker thread, buffers used again, fdatasync at the end; two processes',
      run: async () => {
        await refreshFile(build)
        const receiver = spawn(
          process.execPath,
          [join(root, 'bench', 'floor.ts'), 'receive', join(floorDirectory, 'copy')],
          {
            stdio: ['ignore', 'pipe', 'inherit'],
          },
        )
        const watch = watchProcess(receiver.pid ?? 0)
        const port = await firstLine(receiver.stdout)
        const client = await runTimed(
          process.execPath,
          [join(root, 'bench', 'floor.ts'), 'send', build, port],
          process.env,
        )
        receiver.kill('SIGTERM')
        const { cpuSeconds, peakMemoryMiB } = watch.end()
        await removeAll(join(floorDirectory, 'copy'))
        return figures(client.seconds, client.cpuSeconds, cpuSeconds, peakMemoryMiB)
      },
    },
  ]
}

async function runTimed(program: string, args: string[], env: NodeJS.ProcessEnv) {
  const start = process.hrtime.bigint()
  const child = spawn(program, args, { stdio: ['ignore', 'ignore', 'inherit'], env })
  const watch = watchProcess(child.pid ?? 0)
  const code = await new Promise((settle) => child.once('exit', settle))
  const seconds = Number(process.hrtime.bigint() - start) / 1e9
  if (code !== 0) throw new Error(`${args.join(' ')} ended with code ${String(code)}`)
  return {
    seconds,
    cpuSeconds: watch.end().cpuSeconds,
    watchOther: async (pid: number) => (await import('./proc.ts')).readPeakMemoryMiB(pid),
  }
}

async function firstLine(stream: NodeJS.ReadableStream): Promise<string> {
  return new Promise((settle) => stream.once('data', (data: Buffer) => settle(data.toString().trim())))
}

/** Frees the disk between runs; the server notices only a blob that nobody asks for again. */
async function dropBlobs(dataDirectory: string): Promise<void> {
  const blobs = join(dataDirectory, 'blobs', 'sha256')
  for (const shard of await readdir(blobs)) await removeAll(join(blobs, shard))
}
