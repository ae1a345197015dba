import { stat } from 'node:fs/promises'
import { homedir } from 'node:os'
import { join } from 'node:path'
import { z } from 'zod'
import { RequestError } from '../lib/client/http.ts'
import type { PulledManifest, RegistryClient } from '../lib/client/registry-client.ts'
import type { SignedManifest } from '../lib/client/signatures.ts'
import { attachBundle } from '../lib/client/signatures.ts'
import type { Digest } from '../lib/protocol/digest.ts'
import { parseDigest } from '../lib/protocol/digest.ts'
import type { InfoHash } from '../lib/protocol/infohash.ts'
import { parseTorrent } from '../lib/protocol/metainfo.ts'
import type { Provenance } from '../lib/protocol/statement.ts'
import { releaseStatement } from '../lib/protocol/statement.ts'
import { ignoreMissing } from '../lib/runtime/files.ts'
import type { ReleaseSigner } from '../lib/token/release-keys.ts'
import { readReleaseSigner } from '../lib/token/release-keys.ts'
import { signStatement } from '../lib/token/release-signature.ts'
import type { Context } from './context.ts'
import { Failure, exitCodes } from './failure.ts'

export interface SignedFile {
  readonly name: string
  readonly digest: Digest
  readonly infoHash: InfoHash | undefined
}

/** The key that is used when nothing else is said, where `keys generate-signing` puts it. */
export function defaultSigningKeyFile(env: NodeJS.ProcessEnv): string {
  const base = env['XDG_CONFIG_HOME'] || join(env['HOME'] ?? homedir(), '.config')
  return join(base, 'deployctl', 'signing-key.pem')
}

/** The key that signs: of the command line, else of the environment, else of the configuration directory. @throws Failure */
export async function openSigner(
  given: string | undefined,
  { env }: Pick<Context, 'env'>,
): Promise<ReleaseSigner> {
  const named = given ?? (env['DEPLOYCTL_SIGN_KEY_FILE'] || undefined)
  const usual = defaultSigningKeyFile(env)
  if (named === undefined && (await stat(usual).catch(ignoreMissing)) === undefined) {
    throw new Failure(exitCodes.usage, 'Cannot sign: there is no key', {
      hint: 'Make one with `deployctl keys generate-signing` and give its public part to the hosts, or name one by --sign-key or DEPLOYCTL_SIGN_KEY_FILE. With --no-sign a build is published that hosts refuse unless they are told not to.',
    })
  }
  try {
    return await readReleaseSigner(named ?? usual)
  } catch (cause) {
    throw new Failure(exitCodes.usage, (cause as Error).message, {
      cause,
      hint: 'Need a private key for ES256, Ed25519 or RS256, as PEM or JWK: `deployctl keys generate-signing` makes one.',
    })
  }
}

/** Signs a manifest that is in the registry, and stores the signature. @returns the digest of what attaches it */
export async function signRelease(
  {
    repository,
    tags,
    subject,
    files,
    provenance,
    signer,
  }: {
    repository: string
    tags: readonly string[]
    subject: SignedManifest
    files: readonly SignedFile[]
    provenance: Provenance
    signer: ReleaseSigner
  },
  { registry, now, signal }: { registry: RegistryClient; now: () => number; signal: AbortSignal },
): Promise<Digest> {
  const statement = releaseStatement({ repository, tags, digest: subject.digest, files, provenance })
  const bundle = signStatement(statement, signer)
  return attachBundle(
    registry,
    { repository, subject, bundle, keyId: signer.id, createdAt: new Date(now()) },
    signal,
  )
}

const Manifest = z.object({
  layers: z
    .array(z.object({ digest: z.string(), annotations: z.record(z.string(), z.string()).optional() }))
    .optional(),
})

/** The files of a manifest, each with the infohash that the server has for it. An index has none of its own: its digest stands for what it names. */
export async function filesOf(
  registry: RegistryClient,
  repository: string,
  { bytes }: PulledManifest,
): Promise<SignedFile[]> {
  const { layers = [] } = Manifest.parse(JSON.parse(bytes.toString()))
  const files: SignedFile[] = []
  for (const { digest: text, annotations } of layers) {
    const digest = parseDigest(text)
    const infoHash = await infoHashOf(registry, repository, digest)
    files.push({ name: annotations?.['org.opencontainers.image.title'] ?? digest, digest, infoHash })
  }
  return files
}

/** The infohash of a blob; undefined where it is too small to have one. */
export async function infoHashOf(
  registry: RegistryClient,
  repository: string,
  digest: Digest,
): Promise<InfoHash | undefined> {
  try {
    return parseTorrent(await registry.pullTorrent(repository, digest, { webseed: false })).infoHash
  } catch (error) {
    // 406: there is a blob, and no torrent of it.
    if (error instanceof RequestError && [404, 406].includes(error.status)) return undefined
    throw error
  }
}
