import type { Command } from 'commander'
import type { Release } from '../../lib/client/api.ts'
import { formatReference, parseReference } from '../../lib/protocol/reference.ts'
import type { Context, ServerConnection, WithContext } from '../context.ts'
import { Failure, exitCodes } from '../failure.ts'
import { formatBytes } from '../output.ts'

/** `list` and `show`. */
export function registerReleases(program: Command, contextOf: WithContext): void {
  program
    .command('list')
    .description('list releases, newest first')
    .argument('[name]', 'only this NAME')
    .option('--json', 'print JSON')
    .action(async (name: string | undefined, _options: unknown, command: Command) => {
      await runList({ name }, contextOf(command))
    })
  program
    .command('show')
    .description('show one release')
    .argument('<name>', 'NAME[:TAG]')
    .option('--json', 'print JSON')
    .action(async (reference: string, _options: unknown, command: Command) => {
      await runShow({ reference }, contextOf(command))
    })
}

export async function runList({ name }: { name: string | undefined }, context: Context): Promise<void> {
  const { out } = context
  await using connection = await context.connect()
  const { releases } = await connection.api.releases(name)
  if (releases.length === 0) out.note('There is nothing yet: deployctl publish FILE')
  out.result({ releases }, () =>
    out.table(
      ['RELEASE', 'SIZE', 'PUBLISHED', 'DIGEST'],
      releases.map(({ repository, tag, sizeBytes, publishedAt, digest }) => [
        `${repository}:${tag}`,
        formatBytes(sizeBytes),
        publishedAt,
        digest,
      ]),
    ),
  )
}

export async function runShow({ reference }: { reference: string }, context: Context): Promise<void> {
  await using connection = await context.connect()
  const release = await findRelease(connection, reference)
  context.out.result(release, () =>
    [
      `release    ${release.repository}:${release.tag}`,
      `digest     ${release.digest}`,
      `published  ${release.publishedAt}`,
      `size       ${formatBytes(release.sizeBytes)}`,
      ...release.blobs.map(
        ({ title, digest, sizeBytes, infohash }) =>
          `file       ${title ?? '(no name)'}, ${formatBytes(sizeBytes)}, ${digest}${infohash === undefined ? '' : `, infohash ${infohash}`}`,
      ),
      '',
    ].join('\n'),
  )
}

/** @throws Failure `notFound` */
export async function findRelease({ api }: ServerConnection, text: string): Promise<Release> {
  const reference = parseReference(text)
  const { releases } = await api.releases(reference.repository)
  const found = releases.find(({ tag, digest }) =>
    reference.digest === undefined ? tag === reference.tag : digest === reference.digest,
  )
  if (found) return found
  throw new Failure(exitCodes.notFound, `There is no release ${formatReference(reference)}`, {
    hint: '`deployctl list` shows what there is.',
  })
}
