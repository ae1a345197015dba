// The one-copy-per-link ideal: Debian's udpcast, which sends to a multicast group, and again what somebody has missed.
import { mkdir, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Scenario } from '../../simulator/scenario.ts'
import type { Build } from './hosts.ts'
import type { SwarmNetwork } from './network.ts'
import type { Program } from './programs.ts'
import { startProgram } from './programs.ts'

interface Sending {
  readonly network: SwarmNetwork
  readonly scenario: Scenario
  readonly builds: readonly Build[]
  readonly directory: string
  readonly signal: AbortSignal
  readonly say: (text: string) => void
}

/** Above that share of the slowest link, headers and what is sent again would not fit. */
const rateShare = 0.9
const timeoutMs = 600_000
const startTimeoutMs = 30_000
/** More than sender and receivers have to say to each other before. */
const greetingBytes = 64 * 1024
const lookEveryMs = 50

/** Sends the first build to all hosts at once. */
export async function sendToAll({ network, scenario, builds, directory, signal, say }: Sending) {
  const [build] = builds
  if (build === undefined) throw new Error('There is no build')
  const slowest = Math.min(scenario.host_uplink, scenario.rack_uplink, scenario.server_uplink ?? Infinity)
  await using stack = new AsyncDisposableStack()
  const receivers = await Promise.all(
    network.hosts.map(async (station) => {
      const home = join(directory, `host-${station.index}`)
      await mkdir(home)
      const file = join(home, build.sha256)
      const program = stack.use(
        startProgram(station, {
          command: 'udp-receiver',
          args: ['--interface', 'eth0', '--file', file, '--nokbd', '--no-progress'],
          logFile: join(home, 'udpcast.log'),
        }),
      )
      return { station, file, program, doneAt: writtenAt(program, file) }
    }),
  )
  say(`udpcast to ${receivers.length} hosts`)
  await sleep(1000, undefined, { signal })
  const t0 = Date.now()
  const sender = stack.use(
    startProgram(network.server, {
      command: 'udp-sender',
      args: [
        '--interface',
        'eth0',
        '--file',
        build.file,
        '--full-duplex',
        '--min-receivers',
        String(receivers.length),
        '--max-bitrate',
        `${Math.floor((slowest * 8 * rateShare) / 1000)}k`,
        '--nokbd',
        '--no-progress',
      ],
      logFile: join(directory, 'udpcast.log'),
    }),
  )
  const all = Promise.all([sender.exited, ...receivers.map(({ doneAt }) => doneAt)])
  const begunAt = await untilSending(network, signal)
  await Promise.race([all, sleep(timeoutMs, undefined, { signal, ref: false })])
  for (const { program } of receivers) await program.kill()
  const times = await Promise.all(receivers.map(({ doneAt }) => doneAt))
  return {
    hosts: receivers.map(({ station }, i) => {
      const at = times[i]
      return {
        index: station.index,
        rack: station.rack,
        client: 'udpcast' as const,
        // It makes out for two seconds who is there.
        heard: (begunAt - t0) / 1000,
        seconds: at === undefined ? undefined : (at - t0) / 1000,
        isHit: false,
        isGone: false,
      }
    }),
    copies: receivers.flatMap(({ file }, i) =>
      times[i] === undefined ? [] : [{ file, sha256: build.sha256 }],
    ),
  }
}

/** When the last of the file was written, if all went well; it takes its leave for half a second more. */
async function writtenAt(program: Program, file: string): Promise<number | undefined> {
  return (await program.exited) === 0 ? (await stat(file)).mtimeMs : undefined
}

async function untilSending(network: SwarmNetwork, signal: AbortSignal): Promise<number> {
  const atStart = await network.readServerBytes()
  const deadline = Date.now() + startTimeoutMs
  while ((await network.readServerBytes()) - atStart < greetingBytes) {
    if (Date.now() > deadline) throw new Error(`udp-sender does not send after ${startTimeoutMs / 1000} s`)
    await sleep(lookEveryMs, undefined, { signal })
  }
  return Date.now()
}
