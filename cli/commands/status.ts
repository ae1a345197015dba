import type { Command } from 'commander'
import type { ReleaseStatus } from '../../lib/client/api.ts'
import { formatReference, parseReference } from '../../lib/protocol/reference.ts'
import type { Context, WithContext } from '../context.ts'
import { exitCodes } from '../failure.ts'
import { formatBytes, formatDuration } from '../output.ts'

export interface StatusOptions {
  readonly reference: string | undefined
  readonly hosts: boolean
}

export function registerStatus(program: Command, contextOf: WithContext): void {
  program
    .command('status')
    .description('who has a release, per rack; without a name: all that is tagged latest')
    .argument('[name]', 'NAME[:TAG]')
    .option('--hosts', 'each host, with why it waits or failed')
    .option('--json', 'print JSON')
    .action(async (reference: string | undefined, options: { hosts?: boolean }, command: Command) => {
      await runStatus({ reference, hosts: options.hosts ?? false }, contextOf(command))
    })
}

/** Exit code 3 where a host has failed. */
export async function runStatus({ reference, hosts }: StatusOptions, context: Context): Promise<void> {
  const { out } = context
  await using connection = await context.connect()
  const { api } = connection
  const names =
    reference === undefined
      ? (await api.releases()).releases
          .filter(({ tag }) => tag === 'latest')
          .map(({ repository, tag }) => `${repository}:${tag}`)
      : [formatReference(parseReference(reference))]
  const all: ReleaseStatus[] = []
  for (const name of names) all.push(await api.releaseStatus(name))
  out.result(reference === undefined ? { releases: all } : all[0], () =>
    all.map((status) => describe(status, hosts, context)).join('\n'),
  )
  if (all.some(({ fleet }) => fleet.failed > 0)) process.exitCode = exitCodes.degraded
}

function describe(status: ReleaseStatus, hosts: boolean, { out }: Context): string {
  const { fleet, reference, digest } = status
  const head = `${reference} ${digest}\n${fleet.held} of ${fleet.total} hosts have it, ${fleet.fetching} fetch, ${fleet.waiting} wait, ${fleet.failed} failed\n`
  if (fleet.total === 0) return `${head}No host follows it or fetches it.\n`
  const racks = out.table(
    ['RACK', 'HAVE IT', 'FETCH', 'WAIT', 'FAILED', 'OWN RACK', 'OTHER RACKS', 'SERVER'],
    status.racks.map(({ place, total, held, fetching, waiting, failed, bytes }) => [
      place,
      `${held}/${total}`,
      String(fetching),
      String(waiting),
      String(failed),
      formatBytes(bytes.ownRack),
      formatBytes(bytes.otherRacks),
      formatBytes(bytes.webseed),
    ]),
  )
  if (!hosts) return `${head}${racks}`
  const each = out.table(
    ['HOST', 'RACK', 'STATE', 'DONE', 'TIME', 'OWN RACK', 'OTHER RACKS', 'SERVER', 'REASON'],
    status.hosts.map(({ host, place, held }) => [
      host,
      place,
      held.state,
      held.bytesTotal === 0 ? '-' : `${Math.floor((100 * held.bytesDone) / held.bytesTotal)}%`,
      formatDuration(held.tookMs),
      formatBytes(held.bytes.ownRack),
      formatBytes(held.bytes.otherRacks),
      formatBytes(held.bytes.webseed),
      held.reason ?? '',
    ]),
  )
  return `${head}${racks}${each}`
}
