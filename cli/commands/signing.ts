import { mkdir, stat } from 'node:fs/promises'
import { dirname, resolve } from 'node:path'
import type { Command } from 'commander'
import type { PulledManifest, RegistryClient } from '../../lib/client/registry-client.ts'
import { attachedBundles } from '../../lib/client/signatures.ts'
import type { Reference } from '../../lib/protocol/reference.ts'
import { formatReference, parseReference } from '../../lib/protocol/reference.ts'
import type { ReleaseIdentity } from '../../lib/protocol/statement.ts'
import { provenanceOf, tagsOf } from '../../lib/protocol/statement.ts'
import { ignoreMissing, writeFileAtomic } from '../../lib/runtime/files.ts'
import { algorithms } from '../../lib/token/algorithms.ts'
import type { ReleaseKey } from '../../lib/token/release-keys.ts'
import { generateReleaseKeys, readReleaseKeys } from '../../lib/token/release-keys.ts'
import type { Verdict } from '../../lib/token/release-signature.ts'
import { verifyRelease } from '../../lib/token/release-signature.ts'
import type { Context, WithContext } from '../context.ts'
import { Failure, exitCodes } from '../failure.ts'
import { readProvenance } from '../provenance.ts'
import { defaultSigningKeyFile, filesOf, openSigner, signRelease } from '../signing.ts'

const collect = (value: string, all: string[]) => [...all, value]

/** `sign`, `verify`, and `keys generate-signing`. */
export function registerSigning(program: Command, contextOf: WithContext): void {
  program
    .command('sign')
    .description('sign a release that is there already, for its tag')
    .argument('<name>', 'NAME[:TAG], or NAME@DIGEST for no tag')
    .option('--sign-key <file>', 'private key that signs it (DEPLOYCTL_SIGN_KEY_FILE)')
    .option('--json', 'print JSON')
    .action(async (reference: string, options: { signKey?: string }, command: Command) => {
      await runSign({ reference, signKey: options.signKey }, contextOf(command))
    })
  program
    .command('verify')
    .description('check who signed a release, and what: exit code 7 where nobody did whose key is given')
    .argument('<name>', 'NAME[:TAG], or NAME@DIGEST whatever its tag')
    .option('--key <file>', 'public key, as PEM or JWK; again for more', collect, [])
    .option('--any-tag', 'a signature for another tag of NAME counts too')
    .option('--json', 'print JSON')
    .action(async (reference: string, options: { key: string[]; anyTag?: boolean }, command: Command) => {
      await runVerify({ reference, keys: options.key, anyTag: options.anyTag ?? false }, contextOf(command))
    })
  const keys =
    program.commands.find((command) => command.name() === 'keys') ??
    program.command('keys').description('keys that sign')
  keys
    .command('generate-signing')
    .description('make a key that signs releases: FILE for whoever publishes (0600), FILE.pub for the hosts')
    .argument('[file]', 'default: where publish looks for it')
    .option('--algorithm <name>', algorithms.join(', '), 'ES256')
    .option('--json', 'print JSON')
    .action(async (file: string | undefined, options: { algorithm: string }, command: Command) => {
      await runGenerate({ file, algorithm: options.algorithm }, contextOf(command))
    })
}

export async function runGenerate(
  { file, algorithm: name }: { file: string | undefined; algorithm: string },
  { out, env }: Context,
): Promise<void> {
  const algorithm = algorithms.find((known) => known === name)
  if (algorithm === undefined)
    throw new Failure(exitCodes.usage, `Cannot make a ${name} key: need one of ${algorithms.join(', ')}`)
  const privateFile = resolve(file ?? defaultSigningKeyFile(env))
  const publicFile = `${privateFile}.pub`
  for (const taken of [privateFile, publicFile]) {
    // Whoever overwrites a key cannot sign for the hosts that know it.
    if (await stat(taken).catch(ignoreMissing))
      throw new Failure(exitCodes.conflict, `Cannot write ${taken}: it is there already`, {
        hint: 'Name another file, or remove it if nothing is signed with it any more.',
      })
  }
  const { id, privatePem, publicPem } = generateReleaseKeys(algorithm)
  await mkdir(dirname(privateFile), { recursive: true, mode: 0o700 })
  await writeFileAtomic(privateFile, privatePem, { mode: 0o600 })
  await writeFileAtomic(publicFile, publicPem, { mode: 0o644 })
  out.note('Put the public part on the hosts, and name it under signatures.keys in agent.yaml.')
  out.result({ keyId: id, algorithm, privateFile, publicFile }, () =>
    rows([
      ['key', id],
      ['private', privateFile],
      ['public', publicFile],
    ]),
  )
}

export async function runSign(
  { reference: text, signKey }: { reference: string; signKey: string | undefined },
  context: Context,
): Promise<void> {
  const reference = parseReference(text)
  const signer = await openSigner(signKey, context)
  await using connection = await context.connect()
  const { registry } = connection
  const manifest = await pull(registry, reference, context)
  const release = { repository: reference.repository, tag: reference.tag, digest: manifest.digest }
  const before = await verifyRelease(release, attached(registry, release, [signer], context), {
    keys: [signer],
    anyTag: false,
  })
  if (before.kind === 'signed') {
    context.out.done(
      { reference: formatReference(reference), digest: manifest.digest, keyId: signer.id, signed: false },
      `${formatReference(reference)} is signed by this key already`,
    )
    return
  }
  await signRelease(
    {
      repository: reference.repository,
      tags: reference.tag === undefined ? [] : [reference.tag],
      subject: {
        mediaType: manifest.mediaType,
        digest: manifest.digest,
        sizeBytes: manifest.bytes.length,
      },
      files: await filesOf(registry, reference.repository, manifest),
      provenance: readProvenance('sign', context.env),
      signer,
    },
    { registry, now: context.now, signal: context.signal },
  )
  context.out.done(
    { reference: formatReference(reference), digest: manifest.digest, keyId: signer.id, signed: true },
    `Signed ${formatReference(reference)} (${manifest.digest}) with key ${signer.id}`,
  )
}

export async function runVerify(
  { reference: text, keys: files, anyTag }: { reference: string; keys: readonly string[]; anyTag: boolean },
  context: Context,
): Promise<void> {
  const reference = parseReference(text)
  if (files.length === 0)
    throw new Failure(
      exitCodes.usage,
      `Cannot verify ${text}: need --key with the public key of who may sign`,
    )
  const named = files.flatMap((file) => readKeys(file).map((key) => ({ file, key })))
  const keys = named.map(({ key }) => key)
  await using connection = await context.connect()
  const { registry } = connection
  const { digest } = await pull(registry, reference, context)
  const release = { repository: reference.repository, tag: reference.tag, digest }
  const sought = anyTag ? { ...release, tag: undefined } : release
  const verdict = await verifyRelease(release, attached(registry, sought, keys, context), { keys, anyTag })
  if (verdict.kind === 'unverified')
    throw new Failure(
      exitCodes.verification,
      `Cannot trust ${formatReference(reference)} (${digest}): ${verdict.reason}`,
      { hint: `\`deployctl sign ${formatReference(reference)}\` signs what is there, with a key of yours.` },
    )
  const file = named.find(({ key }) => key.id === verdict.keyId)?.file
  show({ reference, digest, verdict, file }, context)
}

function show(
  {
    reference,
    digest,
    verdict: { keyId, statement, attachedBy },
    file,
  }: {
    reference: Reference
    digest: string
    verdict: Extract<Verdict, { kind: 'signed' }>
    file: string | undefined
  },
  { out }: Context,
): void {
  const tags = tagsOf(statement)
  const from = provenanceOf(statement)
  const files = statement.subject.filter(({ digest: its }) => `sha256:${its['sha256'] ?? ''}` !== digest)
  out.result(
    { reference: formatReference(reference), digest, keyId, keyFile: file, attachedBy, tags, ...from, files },
    () =>
      rows([
        ['verified', `${formatReference(reference)} ${digest}`],
        ['signed by', `${file ?? ''} ${keyId}`],
        [
          'for',
          tags.length === 0 ? 'no tag' : tags.map((tag) => `${reference.repository}:${tag}`).join(', '),
        ],
        ...files.map(({ name = '', digest: its }): [string, string] => [
          'file',
          `${name}, sha256:${its['sha256'] ?? ''}${its['btih'] === undefined ? '' : `, infohash ${its['btih']}`}`,
        ]),
        ['source', [from.source, from.commit].filter((part) => part !== undefined).join(', commit ')],
        ['built by', from.builderId ?? ''],
        ['run', from.invocationId ?? ''],
      ]),
  )
}

/** Rows without a value are left out. What they say is somebody else's word: no control characters reach the terminal. */
function rows(all: readonly (readonly [string, string])[]): string {
  return all
    .filter(([, value]) => value.trim() !== '')
    .map(([name, value]) => `${name.padEnd(10)} ${value.replaceAll(/\p{C}/gu, '?').trim()}\n`)
    .join('')
}

async function pull(
  registry: RegistryClient,
  { repository, tag, digest }: Reference,
  { signal }: Context,
): Promise<PulledManifest> {
  return registry.pullManifest(repository, digest ?? tag ?? 'latest', signal)
}

function attached(
  registry: RegistryClient,
  release: ReleaseIdentity,
  keys: readonly ReleaseKey[],
  { signal }: Context,
) {
  return attachedBundles(registry, { ...release, keys }, signal)
}

function readKeys(file: string): ReleaseKey[] {
  try {
    return readReleaseKeys(file)
  } catch (cause) {
    throw new Failure(exitCodes.usage, (cause as Error).message, { cause })
  }
}
