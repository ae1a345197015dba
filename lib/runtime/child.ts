import type { ChildProcess } from 'node:child_process'
import { spawn } from 'node:child_process'
import { createWriteStream } from 'node:fs'
import { createInterface } from 'node:readline'

/** A program of ours that runs as a child process and has said that it is up. */
export interface Child extends AsyncDisposable {
  readonly process: ChildProcess
  readonly pid: number
  /** The log line that said so. */
  readonly ready: Readonly<Record<string, unknown>>
  /** Resolves with the exit code, or null after a signal. */
  readonly exited: Promise<number | null>
}

export interface ChildOptions {
  /** Path of the JavaScript or TypeScript file. */
  readonly file: string
  readonly args: readonly string[]
  /** The `msg` of the log line on stderr that says it is up. */
  readonly readyMessage: string
  /** Where its log goes, 0600. */
  readonly logFile: string
  readonly env?: NodeJS.ProcessEnv
  readonly startTimeoutMs?: number
  readonly signal?: AbortSignal
}

const startTimeoutMsDefault = 30_000
/** SIGKILL follows SIGTERM after this long. */
const stopTimeoutMs = 15_000
/** What a process wrote before it ended is here by then. */
const lastWordsMs = 1_000

/**
 * Starts a program under this Node and waits for the line that says it is up. Disposing it ends it.
 *
 * @throws Error naming the program, why it is not up and the file of its log
 */
export async function startChild(options: ChildOptions): Promise<Child> {
  const { file, readyMessage, logFile } = options
  // A process group of its own: a Ctrl-C in the terminal reaches it only through its parent, in order.
  const child = spawn(process.execPath, [file, ...options.args], {
    stdio: ['ignore', 'ignore', 'pipe'],
    detached: true,
    env: options.env ?? process.env,
  })
  const exited = new Promise<number | null>((resolve) => child.once('exit', resolve))
  const end = async () => {
    if (child.exitCode === null && child.signalCode === null && child.pid !== undefined) {
      child.kill('SIGTERM')
      const kill = setTimeout(() => child.kill('SIGKILL'), stopTimeoutMs)
      await exited
      clearTimeout(kill)
    }
  }
  const log = createWriteStream(logFile, { mode: 0o600, flags: 'a' })
  const ready = Promise.withResolvers<Record<string, unknown>>()
  const giveUp = (why: string) => {
    ready.reject(new Error(`Cannot start ${file}: it ${why}; its log is ${logFile}`))
  }
  const timeoutMs = options.startTimeoutMs ?? startTimeoutMsDefault
  const timer = setTimeout(giveUp, timeoutMs, `was not up within ${timeoutMs / 1000} s`)
  const interrupted = () => {
    giveUp('was interrupted')
  }
  options.signal?.addEventListener('abort', interrupted)
  child.once('error', (error) => {
    giveUp(`cannot be run: ${error.message}`)
  })
  const lines = createInterface({ input: child.stderr })
  const logged = new Promise<void>((resolve) => {
    lines.once('close', () => {
      log.write('', () => {
        resolve()
      })
    })
  })
  child.once('exit', (code, signal) => {
    const tell = () => {
      giveUp(`ended with ${signal ?? `code ${String(code)}`}`)
    }
    // Whoever is told that it has ended finds in the log why; a child of its own may hold the pipe open.
    setTimeout(tell, lastWordsMs).unref()
    void logged.then(tell)
  })
  lines.on('line', (line) => {
    const entry = parseLine(line)
    log.write(`${line}\n`, () => {
      // Whoever is told that it is up finds it said in the log.
      if (entry?.['msg'] === readyMessage) ready.resolve(entry)
    })
  })
  try {
    const line = await ready.promise
    return { process: child, pid: child.pid ?? 0, ready: line, exited, [Symbol.asyncDispose]: end }
  } catch (error) {
    await end()
    throw error
  } finally {
    clearTimeout(timer)
    options.signal?.removeEventListener('abort', interrupted)
  }
}

function parseLine(line: string): Record<string, unknown> | undefined {
  try {
    return JSON.parse(line) as Record<string, unknown>
  } catch {
    return undefined
  }
}
