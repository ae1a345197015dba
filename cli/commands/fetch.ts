import { copyFile, link, lstat, mkdir, rename, stat, unlink } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import type { Command } from 'commander'
import type { FetchEvent } from '../../lib/client/api.ts'
import { formatReference, parseReference } from '../../lib/protocol/reference.ts'
import { errorCode, ignoreMissing } from '../../lib/runtime/files.ts'
import type { Context, WithContext } from '../context.ts'
import { Failure, exitCodes } from '../failure.ts'
import { formatBytes, formatDuration } from '../output.ts'

export interface FetchOptions {
  readonly reference: string
  readonly output: string | undefined
  readonly force: boolean
}

export function registerFetch(program: Command, contextOf: WithContext): void {
  program
    .command('fetch')
    .description('have the agent of this host fetch a release')
    .argument('<name>', 'NAME[:TAG]')
    .option('-o, --output <dir>', 'put its files into this directory, with your own rights')
    .option('--force', 'replace files that are there')
    .option('--json', 'print JSON')
    .action(async (reference: string, options: { output?: string; force?: boolean }, command: Command) => {
      await runFetch({ reference, output: options.output, force: options.force ?? false }, contextOf(command))
    })
}

/** Fetches through the agent: from this host's rack, verified, and shared with it afterwards. */
export async function runFetch({ reference, output, force }: FetchOptions, context: Context): Promise<void> {
  const { out } = context
  const wanted = formatReference(parseReference(reference))
  const done = await fetched(wanted, context)
  const files =
    output === undefined
      ? done.files
      : await Promise.all(
          done.files.map(async (file) => ({ ...file, path: await place(file, output, force) })),
        )
  const { bytes, tookMs } = done.held
  out.result({ reference: wanted, digest: done.held.digest, tookMs, bytes, files }, () =>
    [
      ...files.map(({ path }) => path),
      `${wanted} in ${formatDuration(tookMs)}: ${formatBytes(bytes.ownRack)} from this rack, ${formatBytes(bytes.otherRacks)} from others, ${formatBytes(bytes.webseed)} from the server`,
      '',
    ].join('\n'),
  )
}

async function fetched(reference: string, context: Context): Promise<Extract<FetchEvent, { event: 'done' }>> {
  await using agent = context.agent()
  for await (const event of agent.fetch(reference, context.signal)) {
    switch (event.event) {
      case 'progress': {
        const { bytesDone, bytesTotal, reason } = event.held
        context.out.progress(
          `Fetching ${reference}: ${formatBytes(bytesDone)} of ${formatBytes(bytesTotal)}${reason === undefined ? '' : ` (${reason})`}`,
        )
        break
      }
      case 'done':
        return event
      case 'error': {
        const { code, message, hint } = event.error
        throw new Failure(exitOf(code), message, {
          hint: hint ?? 'The log of the agent says more; `deployctl doctor` looks at the whole path.',
        })
      }
    }
  }
  throw new Failure(exitCodes.failure, `Cannot fetch ${reference}: the agent ended the connection`, {
    hint: 'Is it restarting? Try again.',
  })
}

function exitOf(code: string): number {
  if (/UNKNOWN|NOT_FOUND/.test(code)) return exitCodes.notFound
  if (/DENIED|UNAUTHORIZED|REVOKED/.test(code)) return exitCodes.auth
  if (/DIGEST|VERIF/.test(code)) return exitCodes.verification
  return exitCodes.failure
}

/** A hard link where the file system allows it, else a copy; beside the target and renamed, so never half a file. */
async function place(
  { name, path }: { name: string; path: string },
  directory: string,
  force: boolean,
): Promise<string> {
  await mkdir(directory, { recursive: true })
  const target = resolve(directory, name)
  const there = await lstat(target).catch(ignoreMissing)
  if (there && !force) {
    const { dev, ino } = await stat(path)
    const same = there.isFile() && there.dev === dev && there.ino === ino
    if (same) return target
    throw new Failure(exitCodes.conflict, `Cannot write ${target}: it is there already`, {
      hint: 'Give --force to replace it.',
    })
  }
  const temporary = join(directory, `.${name}.${process.pid}.tmp`)
  try {
    await link(path, temporary).catch(async (error: unknown) => {
      if (!['EXDEV', 'EPERM', 'EACCES', 'EMLINK'].includes(errorCode(error) ?? '')) throw error
      await copyFile(path, temporary)
    })
    await rename(temporary, target)
  } finally {
    // A rename onto another link of the same file does nothing and leaves the temporary name.
    await unlink(temporary).catch(ignoreMissing)
  }
  return target
}
