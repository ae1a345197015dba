import { spawn } from 'node:child_process'
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { bin } from '../../../support/fleet.ts'
import type { Step } from './strace.ts'
import { parseTrace, tracedCalls } from './strace.ts'

/** A server under strace, over a directory that may have something in it. */
export interface TracedServer extends AsyncDisposable {
  readonly url: string
  readonly headers: Readonly<Record<string, string>>
  /** Kills the server. @returns what it did, from its start */
  finish(): Promise<Step[]>
}

/** More than a worker writes at once: data that is cut is of no use here. */
const stringsMaxBytes = 1024 * 1024 + 1

export async function startTracedServer(directory: string, dataDirectory: string): Promise<TracedServer> {
  await mkdir(directory, { recursive: true })
  const config = join(directory, 'server.yaml')
  const trace = join(directory, 'trace')
  await writeFile(
    config,
    // A name of its own, so that the next server on another port takes its tokens.
    `data_dir: ${dataDirectory}\nroles: [registry]\npublic_url: http://registry.example\nhttp: { addr: 127.0.0.1:0 }\nmetrics_addr: none\n`,
  )
  const child = spawn(
    'strace',
    [
      ...['-f', '-qq', '-y', '-xx', '-s', String(stringsMaxBytes), '-e', 'signal=none'],
      ...['-e', `trace=${tracedCalls.join(',')}`, '-o', trace],
      ...[process.execPath, bin('rackswarm-server'), '--config', config],
    ],
    { stdio: ['ignore', 'ignore', 'pipe'] },
  )
  const exited = new Promise((settle) => child.once('exit', settle))
  const ready = Promise.withResolvers<{ pid: number; http: { port: number } }>()
  child.once('error', (cause) => {
    ready.reject(new Error('Cannot run strace', { cause }))
  })
  const said: string[] = []
  createInterface({ input: child.stderr }).on('line', (line) => {
    said.push(line)
    if (!line.includes('"server is listening"')) return
    ready.resolve(JSON.parse(line) as { pid: number; http: { port: number } })
  })
  void exited.then(() => {
    ready.reject(new Error(`the server under strace ended: ${said.join('\n')}`))
  })
  const { pid, http } = await ready.promise
  const kill = async () => {
    if (child.exitCode === null && child.signalCode === null) process.kill(pid, 'SIGKILL')
    await exited
  }
  const token = (await readFile(join(dataDirectory, 'admin-token'), 'utf8')).trim()
  return {
    url: `http://127.0.0.1:${http.port}`,
    headers: { authorization: `Bearer ${token}` },
    finish: async () => {
      // The end of the last call of interest is written down before the answer to this is sent.
      await fetch(`http://127.0.0.1:${http.port}/v2/`)
      await kill()
      return parseTrace(await readFile(trace, 'latin1'))
    },
    [Symbol.asyncDispose]: kill,
  }
}
