import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { stat } from 'node:fs/promises'
import { basename } from 'node:path'
import type { Command } from 'commander'
import createTorrent from 'create-torrent'
import { parseDigest } from '../../lib/protocol/digest.ts'
import { parseTorrent, pieceLengthFor, swarmLengthMin } from '../../lib/protocol/metainfo.ts'
import { parseReference } from '../../lib/protocol/reference.ts'
import { writeFileAtomic } from '../../lib/runtime/files.ts'
import type { Context, ServerConnection, WithContext } from '../context.ts'
import { Failure, exitCodes } from '../failure.ts'
import { parseDurationMs } from '../words.ts'
import { findRelease } from './releases.ts'

export interface TorrentOptions {
  readonly reference: string
  readonly output: string
  readonly ttlMs: number | undefined
  readonly webseed: boolean
}

export interface CreateOptions {
  readonly file: string
  readonly output: string | undefined
  readonly announce: string | undefined
}

export function registerTorrent(program: Command, contextOf: WithContext): void {
  const torrent = program
    .command('torrent')
    .description('write a .torrent with a signed announce URL, for a client of your own')
    .argument('[name]', 'NAME[:TAG]')
    .option('-o, --output <file>', 'where to write it')
    .option('--ttl <duration>', 'how long its token lives; default: what the server says, 24h')
    .option('--no-webseed', 'without the server as a seed')
    .option('--json', 'print JSON')
    .action(
      async (
        reference: string | undefined,
        options: { output?: string; ttl?: string; webseed: boolean },
        command: Command,
      ) => {
        if (reference === undefined || options.output === undefined) {
          throw new Failure(exitCodes.usage, 'Cannot write a torrent: need a NAME[:TAG] and --output FILE', {
            hint: '`deployctl torrent --help` shows more.',
          })
        }
        await runTorrent(
          {
            reference,
            output: options.output,
            ttlMs: options.ttl === undefined ? undefined : parseDurationMs(options.ttl),
            webseed: options.webseed,
          },
          contextOf(command),
        )
      },
    )
  torrent
    .command('revoke')
    .description('stop sharing: no host gets or gives it any more; what hosts have on disk stays')
    .argument('<what>', 'INFOHASH, NAME:TAG, or NAME@DIGEST of a release or of one of its files')
    .option('--reason <text>', 'why, for the list and the audit log')
    .option('--json', 'print JSON')
    .action(async (what: string, _options: unknown, command: Command) => {
      const { reason } = command.optsWithGlobals<{ reason?: string }>()
      await runRevoke({ what, reason }, contextOf(command))
    })
  torrent
    .command('unrevoke')
    .description('share what was revoked again')
    .argument('<what>', 'as for revoke')
    .option('--json', 'print JSON')
    .action(async (what: string, _options: unknown, command: Command) => {
      await runUnrevoke({ what }, contextOf(command))
    })
  torrent
    .command('revoked')
    .description('list torrents that were revoked')
    .option('--json', 'print JSON')
    .action(async (_options: unknown, command: Command) => {
      const context = contextOf(command)
      await using connection = await context.connect()
      const { torrents } = await connection.api.revokedTorrents()
      context.out.result({ torrents }, () =>
        context.out.table(
          ['INFOHASH', 'REVOKED', 'REASON'],
          torrents.map(({ infohash, revokedAt, reason }) => [infohash, revokedAt, reason ?? '']),
        ),
      )
    })
  torrent
    .command('create')
    .description('make a .torrent of a file, offline; its infohash is the one the server would compute')
    .argument('<file>', 'the file')
    .option('-o, --output <file>', 'where to write it; default: FILE.torrent')
    .option('--announce <url>', 'its announce URL')
    .option('--json', 'print JSON')
    .action(async (file: string, _options: unknown, command: Command) => {
      // `-o` and `--json` belong to the parent too, which takes them first.
      const { output, announce } = command.optsWithGlobals<{ output?: string; announce?: string }>()
      await runCreate({ file, output, announce }, contextOf(command))
    })
}

/** The file holds a bearer token, so only its owner may read it. */
export async function runTorrent(
  { reference, output, ttlMs, webseed }: TorrentOptions,
  context: Context,
): Promise<void> {
  await using connection = await context.connect()
  const release = await findRelease(connection, reference)
  const blob =
    release.blobs.find(({ infohash, title }) => infohash !== undefined && title !== undefined) ??
    release.blobs.find(({ infohash }) => infohash !== undefined)
  if (!blob) {
    throw new Failure(
      exitCodes.notFound,
      `Cannot write a torrent of ${reference}: its files are too small to have one`,
      {
        hint: `Files up to ${swarmLengthMin / 1024} KiB travel over HTTP: deployctl fetch ${reference}`,
      },
    )
  }
  const bytes = await connection.registry.pullTorrent(release.repository, parseDigest(blob.digest), {
    webseed,
    ttlSeconds: ttlMs === undefined ? undefined : Math.max(1, Math.floor(ttlMs / 1000)),
  })
  const { infoHash, length } = parseTorrent(bytes)
  await writeFileAtomic(output, bytes, { mode: 0o600 })
  context.out.result(
    { output, infohash: infoHash, sizeBytes: length },
    () => `${output}\ninfohash ${infoHash}\n`,
  )
}

/** Reads the file twice: its name in the torrent is its SHA-256. */
export async function runCreate(
  { file, output = `${file}.torrent`, announce }: CreateOptions,
  context: Context,
): Promise<void> {
  const { size } = await stat(file)
  const hash = createHash('sha256')
  for await (const chunk of createReadStream(file, { highWaterMark: 1024 * 1024 }) as AsyncIterable<Buffer>)
    hash.update(chunk)
  const bytes = await new Promise<Uint8Array>((resolve, reject) => {
    createTorrent(
      file,
      {
        name: hash.digest('hex'),
        pieceLength: pieceLengthFor(size),
        private: true,
        announceList: announce === undefined ? [] : [[announce]],
        createdBy: 'Rackswarm',
      },
      (error, torrent) => {
        if (error) reject(error)
        else resolve(torrent)
      },
    )
  })
  const { infoHash } = parseTorrent(bytes)
  await writeFileAtomic(output, bytes, { mode: 0o644 })
  context.out.result(
    { output, infohash: infoHash, sizeBytes: size, file: basename(file) },
    () => `${output}\ninfohash ${infoHash}\n`,
  )
}

export async function runRevoke(
  { what, reason }: { what: string; reason: string | undefined },
  context: Context,
): Promise<void> {
  await using connection = await context.connect()
  const infohashes = await infoHashesOf(connection, what)
  for (const infohash of infohashes)
    await connection.api.revokeTorrent(infohash, reason === undefined ? {} : { reason })
  context.out.done({ infohashes, revoked: true }, `Revoked ${infohashes.join(', ')}`)
}

export async function runUnrevoke({ what }: { what: string }, context: Context): Promise<void> {
  await using connection = await context.connect()
  const infohashes = await infoHashesOf(connection, what)
  for (const infohash of infohashes) await connection.api.unrevokeTorrent(infohash)
  context.out.done({ infohashes, revoked: false }, `${infohashes.join(', ')} may be shared again`)
}

/** The torrents of all files of a release, or the one that is named. @throws Failure `notFound` */
async function infoHashesOf(connection: ServerConnection, what: string): Promise<string[]> {
  if (/^[0-9a-fA-F]{40}$/.test(what)) return [what.toLowerCase()]
  const { repository, digest } = parseReference(what)
  const { releases } = await connection.api.releases(repository)
  const file = releases.flatMap(({ blobs }) => blobs).find((blob) => blob.digest === digest)
  const blobs = file ? [file] : (await findRelease(connection, what)).blobs
  const infohashes = [...new Set(blobs.flatMap(({ infohash }) => infohash ?? []))]
  if (infohashes.length > 0) return infohashes
  throw new Failure(exitCodes.notFound, `${what} has no torrent: its files are too small to have one`)
}
