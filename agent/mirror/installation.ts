import { createHash } from 'node:crypto'
import { chmod, chown, lstat, readFile, rmdir, unlink } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { z } from 'zod'
import { ClientError } from '../../lib/protocol/errors.ts'
import {
  errorCode,
  ignoreMissing,
  isMissing,
  makeDirectory,
  syncDirectory,
  writeFileAtomic,
} from '../../lib/runtime/files.ts'
import type { ClientFile, MirrorClient } from './client-files.ts'
import { mirrorClients } from './client-files.ts'

/** How a file of ours stands: `edited` since, `gone`, or `restored` by somebody else to what it was before us. */
export type FileState = 'installed' | 'edited' | 'gone' | 'restored'

export interface Change {
  /** As a client sees it, without the root. */
  readonly path: string
  readonly did: 'written' | 'unchanged' | 'restored' | 'removed'
  /** Where the edited file went that `force` replaced. */
  readonly kept?: string | undefined
}

/**
 * What was written into the configuration of clients, and what stood there before: recorded durably before a file is touched, so that it can be undone
 * byte for byte after a crash at any moment. A call that must refuse changes nothing.
 */
export interface Installation {
  /** Makes the files of `clients` be exactly `files`; others of theirs are restored. @throws ClientError `EDITED` and what the files say */
  install(
    clients: readonly MirrorClient[],
    files: readonly ClientFile[],
    options: { force: boolean },
  ): Promise<Change[]>
  /** Restores what stood there before. @throws ClientError `EDITED` */
  uninstall(clients: readonly MirrorClient[], options: { force: boolean }): Promise<Change[]>
  status(): Promise<{ readonly client: MirrorClient; readonly path: string; readonly state: FileState }[]>
}

const stateDirectory = '/var/lib/rackswarm/mirror'

const Entry = z.strictObject({
  client: z.enum(mirrorClients),
  path: z.string(),
  /** SHA-256 of what we wrote; of the last two contents while one replaces the other. */
  written: z.array(z.string()).min(1),
  /** What stood there; null for nothing. */
  original: z
    .strictObject({ sha256: z.string(), mode: z.int(), uid: z.int(), gid: z.int(), backup: z.string() })
    .nullable(),
})
type Entry = z.output<typeof Entry>
const State = z.strictObject({
  version: z.literal(1),
  files: z.array(Entry),
  /** That were made for them. */
  directories: z.array(z.string()),
})

interface Found {
  readonly bytes: Buffer
  readonly sha256: string
  readonly mode: number
  readonly uid: number
  readonly gid: number
}

/** @param root stands before every path: `/` on a host, another directory for an image that is being built */
export async function openInstallation(root: string): Promise<Installation> {
  const at = (path: string) => join(root, path)
  const stateFile = at(join(stateDirectory, 'installed.json'))
  const backupPath = (name: string) => at(join(stateDirectory, 'backup', name))
  const saved = await readState(stateFile)
  const entries = new Map(saved.files.map((entry) => [entry.path, entry]))
  const directories = new Set(saved.directories)

  const save = async () => {
    await makeDirectory(at(stateDirectory), 0o700)
    const state = { version: 1, files: [...entries.values()], directories: [...directories] }
    await writeFileAtomic(stateFile, `${JSON.stringify(state, undefined, 2)}\n`, { mode: 0o600 })
  }

  const stateOf = (entry: Entry, found: Found | undefined): FileState => {
    if (found && entry.written.includes(found.sha256)) return 'installed'
    if (found?.sha256 === entry.original?.sha256) return 'restored'
    return found ? 'edited' : 'gone'
  }

  const keepCopy = async (path: string, bytes: Buffer): Promise<string> => {
    const name = `${path.replaceAll('/', '+')}.${sha256Of(bytes).slice(0, 12)}.edited`
    await makeDirectory(at(join(stateDirectory, 'backup')), 0o700)
    await writeFileAtomic(backupPath(name), bytes, { mode: 0o600 })
    return join(stateDirectory, 'backup', name)
  }

  /** What the file was without us. */
  const originalOf = async (entry: Entry | undefined, found: Found | undefined) => {
    if (!entry) return found?.bytes
    return entry.original ? readFile(backupPath(entry.original.backup)) : undefined
  }

  const putBack = async (entry: Entry, force: boolean): Promise<Change> => {
    const { path, original } = entry
    const found = await readRegular(at(path))
    const state = stateOf(entry, found)
    let kept: string | undefined
    if (state === 'edited' && force && found) kept = await keepCopy(path, found.bytes)
    let did: Change['did'] = 'unchanged'
    if (original && state !== 'restored') {
      await writeAs(at(path), await readFile(backupPath(original.backup)), original)
      did = 'restored'
    } else if (!original && found) {
      await unlink(at(path))
      await syncDirectory(dirname(at(path)))
      did = 'removed'
    }
    entries.delete(path)
    await save()
    if (original) await unlink(backupPath(original.backup)).catch(ignoreMissing)
    return { path, did, kept }
  }

  /** @throws ClientError `EDITED` where what somebody wrote would be lost */
  const checkUnedited = async (entry: Entry, losing: readonly FileState[]) => {
    const state = stateOf(entry, await readRegular(at(entry.path)))
    if (losing.includes(state))
      throw new ClientError(
        'EDITED',
        `Cannot change ${entry.path}: it ${state === 'gone' ? 'was removed' : 'was edited'} since it was installed; --force goes on, and keeps a copy of it`,
      )
  }

  const finish = async () => {
    // Those within others come first.
    for (const directory of [...directories].sort((a, b) => b.length - a.length))
      if (await removeIfEmpty(at(directory))) directories.delete(directory)
    if (entries.size > 0) {
      await save()
      return
    }
    await unlink(stateFile).catch(ignoreMissing)
    await removeIfEmpty(at(join(stateDirectory, 'backup')))
    await removeIfEmpty(at(stateDirectory))
  }

  return {
    install: async (clients, files, { force }) => {
      const surplus = [...entries.values()].filter(
        ({ client, path }) => clients.includes(client) && !files.some((file) => file.path === path),
      )
      const planned = await Promise.all(
        files.map(async (file) => {
          const entry = entries.get(file.path)
          const found = await readRegular(at(file.path))
          if (entry && !force) await checkUnedited(entry, ['edited'])
          return { file, entry, found, content: file.content(await originalOf(entry, found)) }
        }),
      )
      if (!force) for (const entry of surplus) await checkUnedited(entry, ['edited', 'gone'])
      const changes: Change[] = []
      for (const entry of surplus) changes.push(await putBack(entry, force))
      for (const { file, entry, found, content } of planned) {
        const { path, client } = file
        const sha256 = sha256Of(content)
        if (entry?.written.includes(sha256) && found?.sha256 === sha256) {
          changes.push({ path, did: 'unchanged' })
          continue
        }
        const edited = entry && stateOf(entry, found) === 'edited' ? found : undefined
        const kept = edited && (await keepCopy(path, edited.bytes))
        const original = entry ? entry.original : found ? await backUp(path, found) : null
        for (const directory of await missingDirectories(root, dirname(path))) directories.add(directory)
        const next = { client, path, original }
        entries.set(path, { ...next, written: [sha256, ...(entry?.written.slice(0, 1) ?? [])] })
        await save()
        await makeDirectory(dirname(at(path)), 0o755)
        await writeAs(at(path), content, original ?? { mode: 0o644, uid: undefined, gid: undefined })
        entries.set(path, { ...next, written: [sha256] })
        await save()
        changes.push({ path, did: 'written', kept })
      }
      await finish()
      return changes
    },
    uninstall: async (clients, { force }) => {
      const leaving = [...entries.values()].filter(({ client }) => clients.includes(client))
      if (!force) for (const entry of leaving) await checkUnedited(entry, ['edited', 'gone'])
      const changes: Change[] = []
      for (const entry of leaving) changes.push(await putBack(entry, force))
      await finish()
      return changes
    },
    status: async () =>
      Promise.all(
        [...entries.values()].map(async (entry) => ({
          client: entry.client,
          path: entry.path,
          state: stateOf(entry, await readRegular(at(entry.path))),
        })),
      ),
  }

  async function backUp(path: string, { bytes, sha256, mode, uid, gid }: Found): Promise<Entry['original']> {
    const backup = `${path.replaceAll('/', '+')}.original`
    await makeDirectory(at(join(stateDirectory, 'backup')), 0o700)
    // It may hold credentials.
    await writeFileAtomic(backupPath(backup), bytes, { mode: 0o600 })
    return { sha256, mode, uid, gid, backup }
  }
}

async function readState(file: string): Promise<z.output<typeof State>> {
  const text = await readFile(file, 'utf8').catch(ignoreMissing)
  if (text === undefined) return { version: 1, files: [], directories: [] }
  try {
    return State.parse(JSON.parse(text))
  } catch (cause) {
    throw new ClientError(
      'BAD_STATE',
      `Cannot read ${file}, which says what was installed: was it edited, or written by another version?`,
      { cause },
    )
  }
}

/** @throws ClientError for what is there and is no regular file */
async function readRegular(path: string): Promise<Found | undefined> {
  try {
    const stats = await lstat(path)
    if (!stats.isFile())
      throw new ClientError(
        'NOT_A_FILE',
        `Cannot use ${path}: it is no regular file; whoever made it so should configure the mirror there`,
      )
    const bytes = await readFile(path)
    return { bytes, sha256: sha256Of(bytes), mode: stats.mode & 0o7777, uid: stats.uid, gid: stats.gid }
  } catch (error) {
    if (isMissing(error) || errorCode(error) === 'ENOTDIR') return undefined
    throw error
  }
}

async function writeAs(
  path: string,
  bytes: Uint8Array,
  { mode, uid, gid }: { mode: number; uid: number | undefined; gid: number | undefined },
): Promise<void> {
  await makeDirectory(dirname(path), 0o755)
  await writeFileAtomic(path, bytes, { mode: mode & 0o700 })
  if (uid !== undefined && gid !== undefined && process.getuid?.() === 0) await chown(path, uid, gid)
  await chmod(path, mode)
}

/** Directories on the way that are not there, the outermost first. */
async function missingDirectories(root: string, directory: string): Promise<string[]> {
  const missing: string[] = []
  for (let path = directory; path !== '/'; path = dirname(path)) {
    if ((await lstat(join(root, path)).catch(ignoreMissing)) !== undefined) break
    missing.unshift(path)
  }
  return missing
}

/** @returns whether it is gone */
async function removeIfEmpty(directory: string): Promise<boolean> {
  try {
    await rmdir(directory)
    return true
  } catch (error) {
    if (['ENOTEMPTY', 'EEXIST'].includes(errorCode(error) ?? '')) return false
    if (isMissing(error)) return true
    throw error
  }
}

function sha256Of(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex')
}
