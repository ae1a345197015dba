import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { stat } from 'node:fs/promises'
import { basename } from 'node:path'
import type { Command } from 'commander'
import createTorrent from 'create-torrent'
import { parseDigest } from '../../lib/protocol/digest.ts'
import { parseTorrent, pieceLengthFor, swarmLengthMin } from '../../lib/protocol/metainfo.ts'
import { writeFileAtomic } from '../../lib/runtime/files.ts'
import type { Context, WithContext } from '../context.ts'
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
