import type { Command } from 'commander'
import type { GcItem, GcReport, GcStatus } from '../../lib/client/api.ts'
import { delay } from '../../lib/runtime/backoff.ts'
import type { Context, WithContext } from '../context.ts'
import { Failure, exitCodes } from '../failure.ts'
import { formatBytes, formatDuration } from '../output.ts'

/** `registry gc|pin|unpin|pins`. */
export function registerRegistry(program: Command, contextOf: WithContext): void {
  const registry = program.command('registry').description('what the registry keeps, and what it removes')
  registry
    .command('gc')
    .description('remove now what no tag, pin or host needs')
    .option('--dry-run', 'only say what would go, and why')
    .option('--json', 'print JSON')
    .action(async (options: { dryRun?: boolean }, command: Command) => {
      await runGc({ dryRun: options.dryRun ?? false }, contextOf(command))
    })
  registry
    .command('pin')
    .description('keep a tag and what it names now, whatever retention rules say')
    .argument('<reference>', 'NAME:TAG or NAME@DIGEST')
    .option('--json', 'print JSON')
    .action(async (reference: string, _options: unknown, command: Command) => {
      const context = contextOf(command)
      await using connection = await context.connect()
      const pin = await connection.api.pin(reference)
      context.out.done(pin, `Pinned ${pin.reference}: ${pin.digest}`)
    })
  registry
    .command('unpin')
    .description('let go of what was pinned')
    .argument('<reference>', 'as `registry pins` shows it')
    .option('--json', 'print JSON')
    .action(async (reference: string, _options: unknown, command: Command) => {
      const context = contextOf(command)
      await using connection = await context.connect()
      await connection.api.unpin(reference)
      context.out.done({ reference, pinned: false }, `Unpinned ${reference}`)
    })
  registry
    .command('pins')
    .description('list what is pinned')
    .option('--json', 'print JSON')
    .action(async (_options: unknown, command: Command) => {
      await runPins(contextOf(command))
    })
}

const pollMs = 500

export async function runGc({ dryRun }: { dryRun: boolean }, context: Context): Promise<void> {
  const { out, signal } = context
  await using connection = await context.connect()
  const { api } = connection
  let status = await api.collectGarbage({ dryRun })
  // A long one goes on without us; which it is its start says.
  const startedAt = status.running?.startedAt
  while (startedAt !== undefined && status.running?.startedAt === startedAt) {
    out.progress(`collecting since ${startedAt}`)
    await delay(pollMs, signal)
    status = await api.garbageCollection()
  }
  const report = reportOf(status, { dryRun, startedAt })
  out.result(report, () => out.table(['WHAT', 'NAME', 'SIZE', 'WHY'], report.items.map(rowOf)))
  out.note(summaryOf(report))
  for (const { repository, message } of report.faults) out.note(`${repository} was left alone: ${message}`)
}

/** @throws Failure where the run that was asked for failed */
function reportOf(
  { lastRun, lastDryRun, lastFailure }: GcStatus,
  { dryRun, startedAt }: { dryRun: boolean; startedAt: string | undefined },
): GcReport {
  const report = dryRun ? lastDryRun : lastRun
  const failed = lastFailure !== undefined && lastFailure.startedAt === startedAt
  if (report && !failed) return report
  throw new Failure(
    exitCodes.failure,
    `The collection failed: ${lastFailure?.message ?? 'the server has no report'}`,
    {
      hint: 'The log of the server says more. What was to go is still there, or goes with the next run.',
    },
  )
}

function rowOf({ kind, repository, tag, digest, sizeBytes, reason }: GcItem): string[] {
  const name =
    repository === undefined ? digest : `${repository}${tag === undefined ? `@${digest}` : `:${tag}`}`
  return [kind, name, sizeBytes === undefined ? '' : formatBytes(sizeBytes), reason]
}

function summaryOf({ dryRun, gone, kept, waiting, items, graceSeconds, tookMs }: GcReport): string {
  const listed = gone.tags + gone.manifests + gone.links + gone.blobs
  return [
    `${dryRun ? 'Would remove' : 'Removed'} ${gone.tags} tags, ${gone.manifests} manifests and ${gone.blobs} blobs, ${formatBytes(gone.bytes)}, in ${formatDuration(tookMs)}`,
    `Kept ${kept.blobs} blobs, ${formatBytes(kept.bytes)}; ${formatBytes(waiting.bytes)} of it only for the grace period of ${formatDuration(graceSeconds * 1000)}`,
    ...(listed > items.length ? [`Listed are the first ${items.length} of ${listed}`] : []),
  ].join('\n')
}

async function runPins(context: Context): Promise<void> {
  const { out } = context
  await using connection = await context.connect()
  const { pins } = await connection.api.pins()
  out.result({ pins }, () =>
    out.table(
      ['REFERENCE', 'DIGEST', 'PINNED', 'BY'],
      pins.map(({ reference, digest, pinnedAt, by }) => [reference, digest, pinnedAt, by]),
    ),
  )
}
