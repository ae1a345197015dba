import { readFile, readdir, stat, unlink } from 'node:fs/promises'
import { join } from 'node:path'
import type { JWK } from 'jose'
import { calculateJwkThumbprint, exportJWK, generateKeyPair } from 'jose'
import { z } from 'zod'
import { ignoreMissing, makeDirectory, syncDirectory, versionOf, writeFileAtomic } from '../runtime/files.ts'
import type { Algorithm } from './algorithms.ts'
import { algorithms } from './algorithms.ts'

/** next: published, not yet used; active: signs; retiring: verifies what it signed until that has expired. */
export type KeyState = 'next' | 'active' | 'retiring'

export interface SigningKey {
  /** RFC 7638 thumbprint, unless it was imported with a name of its own. */
  readonly kid: string
  readonly thumbprint: string
  readonly algorithm: Algorithm
  readonly state: KeyState
  readonly createdAt: Date
  /** When it came into this state. */
  readonly since: Date
  /** No token that it signed expires later. */
  readonly signedUntil: Date
  /** With its private part: never leaves lib/token. */
  readonly privateJwk: JWK
}

export interface PublicJwk extends JWK {
  readonly kid: string
}

/** Of a key of which nobody knows what it has signed: as long as the longest token that a server makes by itself. */
export const signedUnknownMs = 10 * 365 * 86_400_000

const KeyFile = z.strictObject({
  algorithm: z.enum(algorithms),
  state: z.enum(['next', 'active', 'retiring']),
  createdAt: z.iso.datetime(),
  kid: z.string().min(1).optional(),
  since: z.iso.datetime().optional(),
  signedUntil: z.iso.datetime().optional(),
  jwk: z.looseObject({ kty: z.string() }),
})

/**
 * Reads the key files of a directory (0700, files 0600).
 *
 * @throws Error naming the file that others can read, or that is damaged
 */
export async function readSigningKeys(directory: string): Promise<SigningKey[]> {
  await makeDirectory(directory, 0o700)
  const files = await keyFiles(directory)
  // One that is gone meanwhile another server has removed.
  const keys = await Promise.all(files.map((file) => readKey(file).catch(ignoreMissing)))
  return keys.filter((key) => key !== undefined)
}

/** Changes whenever a key is made, changed or removed. */
export async function signingKeysVersion(directory: string): Promise<string> {
  const files = (await keyFiles(directory)).sort()
  return (await Promise.all(files.map(async (file) => `${file} ${await versionOf(file)}`))).join('\n')
}

async function keyFiles(directory: string): Promise<string[]> {
  const names = (await readdir(directory)).filter((name) => name.endsWith('.json') && !name.startsWith('.'))
  return names.map((name) => join(directory, name))
}

/** The key that signs: of those that are active the last that became it. */
export function activeKey(keys: readonly SigningKey[]): SigningKey | undefined {
  return keys
    .filter(({ state }) => state === 'active')
    .sort((a, b) => b.since.getTime() - a.since.getTime() || b.createdAt.getTime() - a.createdAt.getTime())[0]
}

/** What `/.well-known/jwks.json` shows of a key. */
export function publicJwk({ kid, algorithm, privateJwk }: SigningKey): PublicJwk {
  const { kty, crv, x, y, n, e } = privateJwk
  const members = Object.entries({ kty, crv, x, y, n, e }).filter(([, value]) => value !== undefined)
  return {
    ...(Object.fromEntries(members) as JWK),
    kid,
    use: 'sig',
    ...(algorithm === 'Ed25519' ? {} : { alg: algorithm }),
  }
}

/** A new key; it is in no file yet. */
export async function makeSigningKey(
  algorithm: Algorithm,
  state: KeyState,
  nowMs: number,
): Promise<SigningKey> {
  const { privateKey } = await generateKeyPair(algorithm, { extractable: true })
  const privateJwk = await exportJWK(privateKey)
  const thumbprint = await calculateJwkThumbprint(privateJwk)
  const at = new Date(nowMs)
  return {
    kid: thumbprint,
    thumbprint,
    algorithm,
    state,
    createdAt: at,
    since: at,
    signedUntil: at,
    privateJwk,
  }
}

/** Durable when it returns. */
export async function writeSigningKey(directory: string, key: SigningKey): Promise<void> {
  const { kid, thumbprint, algorithm, state, createdAt, since, signedUntil, privateJwk } = key
  const content = {
    algorithm,
    state,
    createdAt: createdAt.toISOString(),
    ...(kid === thumbprint ? {} : { kid }),
    since: since.toISOString(),
    signedUntil: signedUntil.toISOString(),
    jwk: privateJwk,
  }
  await writeFileAtomic(fileOf(directory, key), `${JSON.stringify(content, null, 2)}\n`, { mode: 0o600 })
}

/** Durable when it returns. */
export async function removeSigningKey(directory: string, key: SigningKey): Promise<void> {
  await unlink(fileOf(directory, key)).catch(ignoreMissing)
  await syncDirectory(directory)
}

function fileOf(directory: string, { thumbprint }: SigningKey): string {
  return join(directory, `${thumbprint}.json`)
}

async function readKey(file: string): Promise<SigningKey> {
  const { mode } = await stat(file)
  if ((mode & 0o077) !== 0)
    throw new Error(
      `Cannot use key ${file}: others can read it; run chmod 600 on it, and consider the key known`,
    )
  const parsed = KeyFile.safeParse(parseJson(await readFile(file, 'utf8')))
  if (!parsed.success) throw new Error(`Cannot use key ${file}: ${z.prettifyError(parsed.error)}`)
  const { algorithm, state, jwk, kid, since, signedUntil } = parsed.data
  const privateJwk = jwk as JWK
  const thumbprint = await calculateJwkThumbprint(privateJwk)
  const createdAt = new Date(parsed.data.createdAt)
  return {
    kid: kid ?? thumbprint,
    thumbprint,
    algorithm,
    state,
    createdAt,
    since: since === undefined ? createdAt : new Date(since),
    signedUntil: new Date(signedUntil ?? createdAt.getTime() + signedUnknownMs),
    privateJwk,
  }
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}
