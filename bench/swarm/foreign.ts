// Other BitTorrent clients as hosts of the swarm: Debian's aria2 and python3-libtorrent. They are told of a torrent, keep serving what they
// have, and say when they have all of it; neither computes a SHA-256.
import { chmod, mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { aria2Options } from '../../test/support/foreign.ts'
import type { HostStation } from './network.ts'
import type { Program } from './programs.ts'
import { startProgram } from './programs.ts'

export interface ForeignClient extends AsyncDisposable {
  /** Begins to download. */
  fetch(torrent: string): void
}

interface ForeignOptions {
  readonly directory: string
  /** Called with the time at which a copy was whole. */
  readonly done: (atMs: number) => void
}

const lookEveryMs = 100

/** aria2 has no way to wait: it starts with its first fetch. */
export async function createAria2Client(
  host: HostStation,
  { directory, done }: ForeignOptions,
): Promise<ForeignClient> {
  await mkdir(directory, { recursive: true })
  // What it says when it is done.
  const hook = join(directory, 'done.sh')
  const mark = join(directory, 'done')
  await writeFile(hook, `#!/bin/sh\ndate +%s%3N >${mark}.new && mv ${mark}.new ${mark}\n`)
  await chmod(hook, 0o755)
  let program: Program | undefined
  let timer: NodeJS.Timeout | undefined
  return {
    fetch: (torrent) => {
      program = startProgram(host, {
        command: 'aria2c',
        args: [
          ...aria2Options,
          `--dir=${directory}`,
          '--listen-port=6881',
          '--seed-ratio=0.0',
          `--on-bt-download-complete=${hook}`,
          torrent,
        ],
        logFile: join(directory, 'aria2.log'),
      })
      timer = setInterval(() => {
        readFile(mark, 'utf8').then(
          (text) => {
            clearInterval(timer)
            done(Number(text))
          },
          () => undefined,
        )
      }, lookEveryMs)
    },
    [Symbol.asyncDispose]: async () => {
      clearInterval(timer)
      await program?.kill()
    },
  }
}

/** A session that is up before it is told of a torrent. */
export async function startLibtorrentClient(
  host: HostStation,
  { directory, done }: ForeignOptions,
): Promise<ForeignClient> {
  await mkdir(directory, { recursive: true })
  const ready = Promise.withResolvers<boolean>()
  const logFile = join(directory, 'libtorrent.log')
  const program = startProgram(host, {
    // Debian's interpreter: another Python first in PATH does not see Debian's modules.
    command: '/usr/bin/python3',
    args: [join(import.meta.dirname, 'libtorrent-client.py'), directory, host.address],
    logFile,
    heard: (line) => {
      const [word, atMs] = line.split(' ')
      if (word === 'ready') ready.resolve(true)
      if (word === 'done') done(Number(atMs))
    },
  })
  if (!(await Promise.race([ready.promise, program.exited.then(() => false)])))
    throw new Error(`libtorrent at ${host.namespace} did not start: its log is ${logFile}`)
  return {
    fetch: (torrent) => program.stdin.write(`${torrent}\n`),
    [Symbol.asyncDispose]: () => program[Symbol.asyncDispose](),
  }
}
