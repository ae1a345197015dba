import { randomBytes } from 'node:crypto'
import { readFile, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { createFileAtomic, isMissing, makeDirectory } from './files.ts'

const secretBytes = 32

/** 256 random bits in base64url. */
export function makeSecret(): string {
  return randomBytes(secretBytes).toString('base64url')
}

/**
 * Reads a secret from a file that its owner alone can read.
 *
 * @throws Error naming the file that is missing, or that others can read
 */
export async function readSecret(file: string): Promise<string> {
  const { mode } = await stat(file).catch((cause: unknown) => {
    throw new Error(`Cannot read secret ${file}: ${cause instanceof Error ? cause.message : String(cause)}`, {
      cause,
    })
  })
  if ((mode & 0o077) !== 0)
    throw new Error(
      `Cannot use secret ${file}: others can read it; run chmod 600 on it, and consider it known`,
    )
  return (await readFile(file, 'utf8')).trim()
}

/** The same; where there is no file one is made, with 256 random bits in base64url. */
export async function readOrMakeSecret(file: string): Promise<string> {
  try {
    await stat(file)
  } catch (error) {
    if (!isMissing(error)) throw error
    await makeDirectory(dirname(file), 0o700)
    await createFileAtomic(file, `${makeSecret()}\n`, { mode: 0o600 })
  }
  return readSecret(file)
}
