import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { bundle } from '../../../packaging/bundle.ts'
import type { Owner } from '../../support/tracker.ts'
import { peakBytesOf, withDeadline } from '../../agent/engine/fixtures.ts'
import type { Command, HostOptions, HostPeer, Progress, Report } from './host.ts'

export interface Outcome {
  readonly sha256: string
  /** Since it was first told of a peer. */
  readonly tookMs: number
}

/** A process that fetches or seeds one blob. */
export interface Host {
  readonly port: number
  readonly pieces: ReadonlySet<number>
  readonly progress: Progress
  tell(...peers: readonly HostPeer[]): void
  /** Fetches once more, after a failure. */
  again(): void
  /** @throws Error where the fetch fails, the process ends or the time is over */
  fetched(seconds: number): Promise<Outcome>
  /** @throws Error where the process has ended */
  peakBytes(): Promise<number>
  kill(): Promise<void>
}

const startSeconds = 30

/** @returns the program, bundled as it is shipped: from the sources each process would need 40 MiB more to strip types */
export async function bundleHost(directory: string): Promise<string> {
  await bundle({ host: 'test/soak/engine/host.ts' }, directory)
  return join(directory, 'host.js')
}

/** Killed with its owner. Resolves once it listens, and `started`, which is called before that, has it from its first moment. */
export async function startHost(
  owner: Owner,
  program: string,
  options: HostOptions,
  started: (host: Pick<Host, 'pieces' | 'kill'>) => void = () => undefined,
): Promise<Host> {
  const child = spawn(process.execPath, [program, JSON.stringify(options)], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  const closed = once(child, 'close')
  // It may be killed while it is being told something.
  child.stdin.on('error', () => undefined)
  const listening = Promise.withResolvers<number>()
  let outcome = Promise.withResolvers<Outcome>()
  const pieces = new Set<number>()
  let progress: Progress = { receivedBytes: 0, verifiedBytes: 0, stillMs: 0, waiting: undefined }
  const fail = (error: Error) => {
    listening.reject(error)
    outcome.reject(error)
  }
  outcome.promise.catch(() => undefined)
  createInterface(child.stdout).on('line', (line) => {
    const report = JSON.parse(line) as Report
    switch (report.kind) {
      case 'listening':
        listening.resolve(report.port)
        break
      case 'piece':
        pieces.add(report.piece)
        break
      case 'progress':
        ;({ ...progress } = report)
        break
      case 'done':
        outcome.resolve(report)
        break
      case 'failed':
        outcome.reject(new Error(report.message))
        break
    }
  })
  void closed.then(() => {
    fail(new Error(`the process ended: ${child.exitCode ?? child.signalCode ?? 'nobody knows why'}`))
  })
  const say = (command: Command) => {
    child.stdin.write(`${JSON.stringify(command)}\n`)
  }
  const kill = async () => {
    child.kill('SIGKILL')
    await closed
  }
  owner.after(kill)
  started({ pieces, kill })
  return {
    port: await withDeadline(listening.promise, () => 'the start of the process', startSeconds),
    pieces,
    get progress() {
      return progress
    },
    tell: (...peers) => {
      say({
        kind: 'peers',
        peers: peers.map(({ port, host }) => ({ port, ...(host === undefined ? {} : { host }) })),
      })
    },
    again: () => {
      outcome = Promise.withResolvers()
      outcome.promise.catch(() => undefined)
      say({ kind: 'again' })
    },
    fetched: (seconds) =>
      withDeadline(outcome.promise, () => `the end of the fetch: ${JSON.stringify(progress)}`, seconds),
    peakBytes: () => peakBytesOf(child.pid),
    kill,
  }
}
