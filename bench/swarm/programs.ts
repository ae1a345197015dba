import type { ChildProcess } from 'node:child_process'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createWriteStream } from 'node:fs'
import type { Writable } from 'node:stream'
import { createInterface } from 'node:readline'
import type { Station } from './network.ts'

/** A program that runs at a station. Disposing it kills it. */
export interface Program extends AsyncDisposable {
  readonly pid: number
  readonly stdin: Writable
  /** Resolves with the exit code, or null after a signal. */
  readonly exited: Promise<number | null>
  kill(): Promise<void>
}

export interface ProgramOptions {
  readonly command: string
  readonly args: readonly string[]
  /** Gets what it writes, both outputs. */
  readonly logFile: string
  readonly env?: Readonly<Record<string, string>>
  readonly heard?: (line: string) => void
}

/** Starts a program at a station. */
export function startProgram(
  { namespace }: Station,
  { command, args, logFile, env = {}, heard }: ProgramOptions,
): Program {
  // `ip netns exec` becomes the command: the process id is that of the command. In a process group of its own, a Ctrl-C does not reach it.
  const child = spawn('ip', ['netns', 'exec', namespace, command, ...args], {
    stdio: 'pipe',
    detached: true,
    env: { ...process.env, ...env },
  })
  const log = createWriteStream(logFile, { mode: 0o600, flags: 'a' })
  const exited = new Promise<number | null>((resolve) => {
    child.once('exit', resolve)
    child.once('error', () => {
      resolve(null)
    })
  })
  child.once('error', (error) => log.write(`${error.message}\n`))
  child.once('close', () => log.end())
  // It may end before it has read what it was told.
  child.stdin.on('error', () => undefined)
  for (const output of [child.stdout, child.stderr])
    createInterface({ input: output }).on('line', (line) => {
      log.write(`${line}\n`)
      heard?.(line)
    })
  const end = () => killChild(child)
  return { pid: child.pid ?? 0, stdin: child.stdin, exited, kill: end, [Symbol.asyncDispose]: end }
}

async function killChild(child: ChildProcess): Promise<void> {
  if (child.pid === undefined || child.exitCode !== null || child.signalCode !== null) return
  const ended = once(child, 'exit')
  child.kill('SIGKILL')
  await ended
}

/** A line of a log of ours: what it says, and when. */
export interface LogEntry {
  readonly msg: string
  readonly atMs: number
  readonly fields: Readonly<Record<string, unknown>>
}

export function parseLogLine(line: string): LogEntry | undefined {
  if (!line.startsWith('{')) return undefined
  try {
    const fields = JSON.parse(line) as Record<string, unknown>
    return { msg: String(fields['msg']), atMs: Date.parse(String(fields['time'])), fields }
  } catch {
    return undefined
  }
}
