import { mkdir, readFile, readdir, stat } from 'node:fs/promises'
import { join } from 'node:path'
import type { JWK } from 'jose'
import { calculateJwkThumbprint, exportJWK, generateKeyPair } from 'jose'
import { z } from 'zod'
import { makeDirectory, writeFileAtomic } from '../runtime/files.ts'
import type { Algorithm } from './algorithms.ts'
import { algorithms } from './algorithms.ts'

/** next: published, not yet used; active: signs; retiring: verifies what it signed until that has expired. */
export type KeyState = 'next' | 'active' | 'retiring'

export interface SigningKey {
  /** RFC 7638 thumbprint. */
  readonly kid: string
  readonly algorithm: Algorithm
  readonly state: KeyState
  readonly createdAt: Date
  /** With its private part: never leaves lib/token. */
  readonly privateJwk: JWK
}

export interface PublicJwk extends JWK {
  readonly kid: string
}

const KeyFile = z.strictObject({
  algorithm: z.enum(algorithms),
  state: z.enum(['next', 'active', 'retiring']),
  createdAt: z.iso.datetime(),
  jwk: z.looseObject({ kty: z.string() }),
})

/**
 * Opens the key files of a directory (0700, files 0600), and makes the first key where there is none.
 *
 * @throws Error naming the file that others can read, that is damaged, or that no key is active
 */
export async function openSigningKeys(options: {
  directory: string
  algorithm: Algorithm
  now: () => number
}): Promise<SigningKey[]> {
  await makeDirectory(options.directory, 0o700)
  const files = (await readdir(options.directory)).filter(
    (name) => name.endsWith('.json') && !name.startsWith('.'),
  )
  if (files.length === 0) return [await createKey(options)]
  const keys = await Promise.all(files.map((name) => readKey(join(options.directory, name))))
  if (!keys.some(({ state }) => state === 'active')) {
    throw new Error(`Cannot sign: none of the ${keys.length} keys in ${options.directory} is active`)
  }
  return keys
}

/** The key that signs: the newest that is active. */
export function activeKey(keys: readonly SigningKey[]): SigningKey {
  const [newest] = keys
    .filter(({ state }) => state === 'active')
    .sort((a, b) => b.createdAt.getTime() - a.createdAt.getTime())
  if (!newest) throw new Error('Cannot sign: no key is active')
  return newest
}

/** What `/.well-known/jwks.json` shows of a key. */
export function publicJwk({ kid, algorithm, privateJwk }: SigningKey): PublicJwk {
  const { kty, crv, x, y, n, e } = privateJwk
  const members = Object.entries({ kty, crv, x, y, n, e }).filter(([, value]) => value !== undefined)
  // Verifiers match `alg` by its spelling, and Ed25519 has two (RFC 9864 renames EdDSA); without it either matches.
  return {
    ...(Object.fromEntries(members) as JWK),
    kid,
    use: 'sig',
    ...(algorithm === 'Ed25519' ? {} : { alg: algorithm }),
  }
}

async function createKey({
  directory,
  algorithm,
  now,
}: {
  directory: string
  algorithm: Algorithm
  now: () => number
}): Promise<SigningKey> {
  const { privateKey } = await generateKeyPair(algorithm, { extractable: true })
  const privateJwk = await exportJWK(privateKey)
  const kid = await calculateJwkThumbprint(privateJwk)
  const createdAt = new Date(now())
  await mkdir(directory, { recursive: true, mode: 0o700 })
  const content = { algorithm, state: 'active', createdAt: createdAt.toISOString(), jwk: privateJwk }
  await writeFileAtomic(join(directory, `${kid}.json`), `${JSON.stringify(content, null, 2)}\n`, {
    mode: 0o600,
  })
  return { kid, algorithm, state: 'active', createdAt, privateJwk }
}

async function readKey(file: string): Promise<SigningKey> {
  const { mode } = await stat(file)
  if ((mode & 0o077) !== 0)
    throw new Error(
      `Cannot use key ${file}: others can read it; run chmod 600 on it, and consider the key known`,
    )
  const parsed = KeyFile.safeParse(parseJson(await readFile(file, 'utf8')))
  if (!parsed.success) throw new Error(`Cannot use key ${file}: ${z.prettifyError(parsed.error)}`)
  const { algorithm, state, createdAt, jwk } = parsed.data
  const privateJwk = jwk as JWK
  return {
    kid: await calculateJwkThumbprint(privateJwk),
    algorithm,
    state,
    createdAt: new Date(createdAt),
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
