import type { Command } from 'commander'
import type { Transfer, TransferList, TransferPeer } from '../../lib/client/api.ts'
import { RequestError, UnreachableError } from '../../lib/client/http.ts'
import { distanceUnknown } from '../../lib/protocol/announce.ts'
import { delay } from '../../lib/runtime/backoff.ts'
import type { Context, WithContext } from '../context.ts'
import { Failure, exitCodes } from '../failure.ts'
import type { Output } from '../output.ts'
import { formatBytes } from '../output.ts'

export interface TransfersOptions {
  readonly watch: boolean
  /** Whether each result may be drawn over the one before. */
  readonly redraw: boolean
}

const watchMs = 1000
/** Moves the cursor to the top of a terminal and clears what is below. */
const clearScreen = '\u001B[H\u001B[J'

export function registerTransfers(program: Command, contextOf: WithContext): void {
  program
    .command('transfers')
    .description(
      'what the agent of this host fetches and seeds now, from and to which peers, and why one waits',
    )
    .option('--watch', 'again every second, until Ctrl-C')
    .option('--json', 'print JSON; with --watch one line a second')
    .action(async (options: { watch?: boolean }, command: Command) => {
      const watch = options.watch ?? false
      await runTransfers({ watch, redraw: watch && process.stdout.isTTY }, contextOf(command))
    })
}

export async function runTransfers({ watch, redraw }: TransfersOptions, context: Context): Promise<void> {
  const { out, signal } = context
  await using agent = context.agent()
  for (;;) {
    const list = await agent.transfers().catch((error: unknown) => {
      throw withAdvice(error)
    })
    out.result(list, () => `${redraw ? clearScreen : ''}${describe(list, context)}`)
    if (list.transferCount === 0 && list.refused === undefined)
      out.note('Nothing is fetched, and nobody is connected to what is seeded.')
    if (!watch) return
    await delay(watchMs, signal)
  }
}

/** The agent is on this host: what keeps it from answering is found here. */
function withAdvice(error: unknown): unknown {
  if (error instanceof UnreachableError)
    return new Failure(exitCodes.failure, error.message, {
      cause: error,
      hint: 'Does an agent run on this host? --socket names its socket; `deployctl doctor` looks at the whole path.',
    })
  if (error instanceof RequestError && error.status === 404)
    return new Failure(exitCodes.failure, 'Cannot list transfers: the agent is older than deployctl', {
      cause: error,
      hint: 'Update it, or start it again if it was updated.',
    })
  return error
}

function describe({ transferCount, transfers, refused = [] }: TransferList, context: Context): string {
  const more = transferCount - transfers.length
  return [
    ...refused.map(
      ({ reference, digest, reason }) => `${reference} ${digest}\n${context.out.paint('red', reason)}\n`,
    ),
    ...transfers.map((transfer) => describeTransfer(transfer, context)),
    ...(more > 0 ? [`and ${more} more\n`] : []),
  ].join('\n')
}

function describeTransfer(transfer: Transfer, { out }: Context): string {
  const { repository, digest, state, bytes, reason, peers, peerCount } = transfer
  const lines = [
    `${repository} ${digest}`,
    `${state}, ${percent(transfer)} of ${formatBytes(transfer.sizeBytes)}, ${formatRate(transfer.downloadRate)} down, ${formatRate(transfer.uploadRate)} up`,
  ]
  if (state !== 'seeding')
    lines.push(
      `so far ${formatBytes(bytes.ownRack)} from this rack, ${formatBytes(bytes.otherRacks)} from others, ${formatBytes(bytes.webseed)} from the server`,
    )
  if (reason !== undefined) lines.push(`${out.paint('yellow', 'waits')}: ${reason}`)
  lines.push(peerCount === 0 ? 'no peers are connected\n' : tableOf(peers, out))
  const more = peerCount - peers.length
  return `${lines.join('\n')}${more > 0 ? `and ${more} more peers\n` : ''}`
}

function tableOf(peers: readonly TransferPeer[], out: Output): string {
  return out.table(
    ['HOST', 'PLACE', 'DISTANCE', 'HAS', 'DOWN', 'UP', 'ASKED', 'OWED', 'WAITING'],
    peers.map((peer) => [
      peer.host ?? peer.source,
      peer.place ?? '-',
      inWords(peer.distance),
      `${Math.floor(100 * peer.progress)}%`,
      formatRate(peer.downloadRate),
      formatRate(peer.uploadRate),
      formatBytes(peer.requestedBytes),
      formatBytes(peer.owedBytes),
      peer.waiting ?? '',
    ]),
  )
}

function percent({ bytesDone, sizeBytes }: Transfer): string {
  return sizeBytes === 0 ? '100%' : `${Math.floor((100 * bytesDone) / sizeBytes)}%`
}

function formatRate(bytesPerSecond: number): string {
  return `${formatBytes(bytesPerSecond)}/s`
}

function inWords(distance: number): string {
  if (distance === 0) return 'own rack'
  if (distance === distanceUnknown) return 'unknown'
  return distance === 1 ? '1 level away' : `${distance} levels away`
}
