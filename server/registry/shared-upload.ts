import { randomUUID } from 'node:crypto'
import { readdir, rename, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { ignoreMissing, isMissing } from '../../lib/runtime/files.ts'

// The file of an upload in a directory that several servers share. One server at a time writes it, and it has a name of that server's choice. Each request
// of a client renames it first: the server that has written so far goes on with what it has hashed, and another one takes it, reads all of it into
// a file of its own, and goes on there. So a rename decides who has the upload, and a server that stood still meanwhile writes into a file that nobody looks at any more.

/** What a server writes. */
export function ownFile(directory: string): string {
  return join(directory, `data-${randomUUID()}`)
}

/** Goes on with the file that this server has written. @returns its name from now on; undefined where another server took it */
export async function keepFile(file: string, directory: string): Promise<string | undefined> {
  const renewed = ownFile(directory)
  try {
    await rename(file, renewed)
    return renewed
  } catch (error) {
    if (isMissing(error)) return undefined
    throw error
  }
}

/**
 * Takes the file of another server, under a name that says that it is yet to be read: if this server ends before it has, the next one takes it.
 *
 * @returns undefined where others were faster, or nothing was written
 */
export async function takeFile(directory: string): Promise<string | undefined> {
  for (const name of await namesOf(directory)) {
    const taken = join(directory, `taken-${randomUUID()}`)
    try {
      await rename(join(directory, name), taken)
      return taken
    } catch (error) {
      if (!isMissing(error)) throw error
    }
  }
  return undefined
}

/** Bytes that have been written so far, as far as this server sees. */
export async function sizeSoFar(directory: string): Promise<number> {
  const [name] = await namesOf(directory)
  return name === undefined ? 0 : ((await stat(join(directory, name)).catch(ignoreMissing))?.size ?? 0)
}

/** When anything was written last; milliseconds since 1970. */
export async function lastWriteMs(directory: string): Promise<number> {
  const times = await Promise.all(
    ['', ...(await namesOf(directory))].map(
      async (name) => (await stat(join(directory, name)).catch(ignoreMissing))?.mtimeMs ?? 0,
    ),
  )
  return Math.max(...times)
}

/** What is whole first. */
async function namesOf(directory: string): Promise<string[]> {
  const names = ((await readdir(directory).catch(ignoreMissing)) ?? []).sort()
  return ['data-', 'taken-'].flatMap((kind) => names.filter((name) => name.startsWith(kind)))
}
