import { createHash } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { ConfigError } from '../lib/runtime/config.ts'
import type { KeySetSource } from '../lib/token/key-set.ts'
import type { ServerConfig } from './config.ts'

/** Where a tracker without a registry has the keys of announce tokens from; undefined where it takes none. */
export async function trackerKeySet(
  { tokens, tracker }: ServerConfig,
  directory: string | undefined,
): Promise<KeySetSource | undefined> {
  if (tracker.approval === 'none') return undefined
  if (tokens.keys_file !== undefined) return { file: tokens.keys_file }
  if (tokens.keys_url === undefined) return undefined
  return {
    url: tokens.keys_url,
    refreshIntervalMs: tokens.keys_refresh,
    cacheFile: directory && join(directory, 'keys-cache.json'),
    ca: await readAuthority(tokens.keys_ca, 'tokens.keys_ca'),
  }
}

/** Where the keys of each issuer of `registry.trust` are. */
export async function issuerKeySets(
  { registry, tokens }: ServerConfig,
  directory: string,
): Promise<ReadonlyMap<string, KeySetSource>> {
  const issuers = new Map<string, KeySetSource>()
  for (const [i, { issuer, jwks_url, jwks_file, ca }] of registry.trust.entries()) {
    if (issuers.has(issuer)) continue
    const name = createHash('sha256').update(issuer).digest('hex').slice(0, 16)
    const fetched = {
      url: jwks_url ?? `${issuer.replace(/\/$/, '')}/.well-known/openid-configuration`,
      issuer: jwks_url === undefined ? issuer : undefined,
      refreshIntervalMs: tokens.keys_refresh,
      cacheFile: join(directory, `issuer-keys-${name}.json`),
      ca: await readAuthority(ca, `registry.trust.${i}.ca`),
    }
    issuers.set(issuer, jwks_file === undefined ? fetched : { file: jwks_file })
  }
  return issuers
}

async function readAuthority(file: string | undefined, setting: string): Promise<string | undefined> {
  if (file === undefined) return undefined
  return readFile(file, 'utf8').catch((cause: unknown) => {
    throw new ConfigError([`${setting}: cannot read ${file}: ${(cause as Error).message}`], { cause })
  })
}
