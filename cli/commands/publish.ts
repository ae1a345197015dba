import { createHash } from 'node:crypto'
import type { FileHandle } from 'node:fs/promises'
import { open, stat } from 'node:fs/promises'
import { basename } from 'node:path'
import type { Command } from 'commander'
import type { BlobSource } from '../../lib/client/registry-client.ts'
import { bytesSource } from '../../lib/client/registry-client.ts'
import { digestFromHex, digestOf } from '../../lib/protocol/digest.ts'
import type { Reference } from '../../lib/protocol/reference.ts'
import { formatReference, isRepository, parseReference } from '../../lib/protocol/reference.ts'
import type { Context, WithContext } from '../context.ts'
import { Failure, exitCodes } from '../failure.ts'
import { formatBytes } from '../output.ts'
import { readProvenance } from '../provenance.ts'
import { infoHashOf, openSigner, signRelease } from '../signing.ts'
import { parseDurationMs, parseShare } from '../words.ts'
import { waitForFleet } from '../wait-for-fleet.ts'

export interface PublishOptions {
  readonly file: string
  readonly name: string | undefined
  /** Share of the fleet to wait for, 0 to 1. */
  readonly wait: number | undefined
  readonly timeoutMs: number
  /** Whether the tag `latest` moves too. */
  readonly latest: boolean
  /** Whether it is signed; `signKey` is the file that the command line names. */
  readonly sign: boolean
  readonly signKey: string | undefined
}

const manifestType = 'application/vnd.oci.image.manifest.v1+json'
const artifactType = 'application/vnd.rackswarm.release.v1'
const layerType = 'application/vnd.rackswarm.build.v1'
const emptyType = 'application/vnd.oci.empty.v1+json'
const emptyBytes = Buffer.from('{}')

export function registerPublish(program: Command, contextOf: WithContext): void {
  program
    .command('publish')
    .description('publish a build')
    .argument('<file>', 'the build')
    .argument('[name]', 'NAME[:TAG]; default: the stem of the file, and the time in UTC')
    .option('--wait <share>', 'wait until this share of the fleet has it, such as 95%')
    .option('--timeout <duration>', 'how long to wait', '10m')
    .option('--no-latest', 'do not move the tag latest')
    .option('--sign-key <file>', 'private key that signs it (DEPLOYCTL_SIGN_KEY_FILE)')
    .option('--no-sign', 'publish it without a signature: hosts refuse it unless they are told not to')
    .option('--json', 'print JSON')
    .action(
      async (
        file: string,
        name: string | undefined,
        options: { wait?: string; timeout: string; latest: boolean; sign: boolean; signKey?: string },
        command: Command,
      ) => {
        await runPublish(
          {
            file,
            name,
            wait: options.wait === undefined ? undefined : parseShare(options.wait),
            timeoutMs: parseDurationMs(options.timeout),
            latest: options.latest,
            sign: options.sign,
            signKey: options.signKey,
          },
          contextOf(command),
        )
      },
    )
}

/** Pushes a file as an OCI artifact of one layer, signs it, and moves its tags. */
export async function runPublish(options: PublishOptions, context: Context): Promise<void> {
  const { out, signal } = context
  if (!options.sign && options.signKey !== undefined)
    throw new Failure(exitCodes.usage, 'Cannot both sign and not sign: give --sign-key or --no-sign')
  const reference = referenceFor(options, context.now())
  const { repository, tag } = reference
  const source = await openSource(options.file, (done, total) => {
    out.progress(`Publishing ${formatReference(reference)}: ${formatBytes(done)} of ${formatBytes(total)}`)
  })
  // Before anything is sent: what cannot be signed is not worth sending.
  const signer = options.sign ? await openSigner(options.signKey, context) : undefined
  await using connection = await context.connect()
  const { registry } = connection
  const layer = await registry.pushBlob(repository, source, signal)
  await registry.pushBlob(repository, bytesSource(emptyBytes), signal)
  const title = basename(options.file)
  const manifest = Buffer.from(
    JSON.stringify({
      schemaVersion: 2,
      mediaType: manifestType,
      artifactType,
      config: { mediaType: emptyType, digest: digestOf(emptyBytes), size: emptyBytes.length },
      layers: [
        {
          mediaType: layerType,
          digest: layer,
          size: source.sizeBytes,
          annotations: { 'org.opencontainers.image.title': title },
        },
      ],
      annotations: {
        'org.opencontainers.image.version': tag,
        'org.opencontainers.image.created': new Date(context.now()).toISOString(),
      },
    }),
  )
  const tags = options.latest && tag !== 'latest' ? [tag, 'latest'] : [tag]
  const digest = digestOf(manifest)
  const infohash = await infoHashOf(registry, repository, layer)
  if (signer) {
    // By its digest first: whoever sees a tag move finds the signature.
    await registry.pushManifest(repository, digest, manifestType, manifest, signal)
    await signRelease(
      {
        repository,
        tags,
        subject: { mediaType: manifestType, digest, sizeBytes: manifest.length },
        files: [{ name: title, digest: layer, infoHash: infohash }],
        provenance: readProvenance('publish', context.env),
        signer,
      },
      { registry, now: context.now, signal },
    )
  }
  for (const name of tags) await registry.pushManifest(repository, name, manifestType, manifest, signal)
  const published = {
    reference: formatReference({ repository, tag, digest: undefined }),
    repository,
    tag,
    digest,
    file: { name: title, digest: layer, sizeBytes: source.sizeBytes, infohash },
    ...(signer && { signedBy: signer.id }),
  }
  if (options.wait !== undefined) {
    out.note(`Published ${published.reference} (${digest})`)
    const status = await waitForFleet(
      { reference: `${repository}@${digest}`, share: options.wait, timeoutMs: options.timeoutMs },
      { ...context, api: connection.api },
    )
    out.result({ ...published, fleet: status.fleet }, () => describe(published))
    return
  }
  out.result(published, () => describe(published))
}

function describe({
  reference,
  digest,
  file,
  signedBy,
}: {
  reference: string
  digest: string
  file: { name: string; digest: string; sizeBytes: number; infohash: string | undefined }
  signedBy?: string
}): string {
  const rows = [
    ['published', reference],
    ['digest', digest],
    ['file', `${file.name}, ${formatBytes(file.sizeBytes)}, ${file.digest}`],
    ['infohash', file.infohash ?? 'none: small files travel over HTTP'],
    ['signed', signedBy === undefined ? 'no, as --no-sign says' : `by key ${signedBy}`],
    ['fetch', `deployctl fetch ${reference}, on a host with an agent`],
  ]
  return rows.map(([name = '', value = '']) => `${name.padEnd(10)} ${value}\n`).join('')
}

function referenceFor({ file, name }: PublishOptions, nowMs: number): Reference & { tag: string } {
  const tag = new Date(nowMs).toISOString().replaceAll(/[-:]/g, '').replace('T', '-').slice(0, 15)
  if (name === undefined) {
    const stem = basename(file).replace(/\.(tar(\.\w+)?|tgz|zip|[A-Za-z0-9]{1,8})$/, '')
    if (!isRepository(stem)) {
      throw new Failure(
        exitCodes.usage,
        `Cannot name a release after ${basename(file)}: ${JSON.stringify(stem)} is no valid name`,
        { hint: `Give one: deployctl publish ${file} NAME[:TAG]` },
      )
    }
    return { repository: stem, tag, digest: undefined }
  }
  const parsed = parseReference(name)
  if (parsed.digest !== undefined)
    throw new Failure(
      exitCodes.usage,
      `Cannot publish as ${name}: a digest follows from the bytes; give NAME[:TAG]`,
    )
  return { ...parsed, tag: name.includes(':') && parsed.tag !== undefined ? parsed.tag : tag }
}

/** What is read at once. */
const chunkBytes = 1024 * 1024
/**
 * Chunks that are filled in turn. One is with the socket and the next is being read; new memory for each would have the
 * collector run for every 64 MiB. A chunk that were filled again too early would show: the digests would differ.
 */
const chunksInTurn = 4

/** Reads the file once and hashes what goes by; a second reading after a dropped connection hashes from the start again. */
async function openSource(
  file: string,
  progress: (done: number, total: number) => void,
): Promise<BlobSource> {
  const before = await stat(file)
  if (!before.isFile()) throw new Failure(exitCodes.usage, `Cannot publish ${file}: it is not a file`)
  const chunks = Array.from({ length: Math.min(chunksInTurn, Math.ceil(before.size / chunkBytes)) }, () =>
    Buffer.allocUnsafeSlow(chunkBytes),
  )
  let hash = createHash('sha256')
  return {
    sizeBytes: before.size,
    async *open(offset) {
      hash = createHash('sha256')
      await using handle = await open(file, 'r')
      let done = 0
      for await (const chunk of readInTurn(handle, before.size, chunks)) {
        hash.update(chunk)
        const skipped = Math.min(chunk.length, Math.max(0, offset - done))
        done += chunk.length
        if (skipped < chunk.length) yield chunk.subarray(skipped)
        progress(done, before.size)
      }
    },
    digest: async () => {
      const after = await stat(file)
      if (after.size !== before.size || after.mtimeMs !== before.mtimeMs) {
        throw new Failure(exitCodes.verification, `Cannot publish ${file}: it changed while it was read`, {
          hint: 'Publish it again when whoever writes it is done.',
        })
      }
      return digestFromHex(hash.digest('hex'))
    },
  }
}

/** The file's bytes, each chunk good until as many more as there are buffers have been asked for; one is read ahead. */
async function* readInTurn(
  handle: FileHandle,
  sizeBytes: number,
  chunks: readonly Buffer[],
): AsyncGenerator<Buffer> {
  const read = async (position: number) => {
    const chunk = chunks[(position / chunkBytes) % chunks.length] ?? Buffer.alloc(0)
    const wanted = Math.min(chunk.length, sizeBytes - position)
    let length = 0
    while (length < wanted) {
      const { bytesRead } = await handle.read(chunk, length, wanted - length, position + length)
      // A file that has become shorter is found out at the end.
      if (bytesRead === 0) break
      length += bytesRead
    }
    return chunk.subarray(0, length)
  }
  let next = read(0)
  for (let position = 0; position < sizeBytes; position += chunkBytes) {
    const chunk = await next
    if (position + chunkBytes < sizeBytes) {
      next = read(position + chunkBytes)
      // Who stops asking does not look at it.
      next.catch(() => undefined)
    }
    yield chunk
    if (chunk.length < Math.min(chunkBytes, sizeBytes - position)) return
  }
}
