import type { Command } from 'commander'
import { infoHashFromHex } from '../../lib/protocol/infohash.ts'
import { parseReference } from '../../lib/protocol/reference.ts'
import { writeFileAtomic } from '../../lib/runtime/files.ts'
import { inspectToken, mintOffline } from '../../lib/token/offline.ts'
import type { Context, WithContext } from '../context.ts'
import { readTokenFile } from '../context.ts'
import { Failure, exitCodes } from '../failure.ts'
import { parseDurationMs } from '../words.ts'
import { findRelease } from './releases.ts'

const list = (text: string) =>
  text
    .split(',')
    .map((part) => part.trim())
    .filter((part) => part !== '')
const collect = (value: string, all: string[]) => [...all, value]

/** `token create|list|revoke|inspect|bootstrap|mint`. */
export function registerToken(program: Command, contextOf: WithContext): void {
  const token = program
    .command('token')
    .description('tokens: for people and CI, for hosts to enrol, for clients to announce')
  token
    .command('create')
    .description('make an API token')
    .requiredOption('--name <name>', 'who holds it')
    .requiredOption(
      '--scope <scope>',
      'admin, publish:PREFIX, delete:PREFIX or pull:PREFIX; again for more',
      collect,
      [],
    )
    .option('--ttl <duration>', 'how long it lives; default: what the server says, 90d')
    .option('-o, --output <file>', 'write it to a file (0600) instead of stdout')
    .option('--json', 'print JSON')
    .action(async (options: CreateOptions, command: Command) => {
      await runCreate(options, contextOf(command))
    })
  token
    .command('list')
    .description('list API tokens, and bootstrap tokens')
    .option('--json', 'print JSON')
    .action(async (_options: unknown, command: Command) => {
      await runList(contextOf(command))
    })
  token
    .command('revoke')
    .description('end an API token or a bootstrap token, at once')
    .argument('<id>', 'as `token list` shows it')
    .option('--json', 'print JSON')
    .action(async (id: string, _options: unknown, command: Command) => {
      const context = contextOf(command)
      await using connection = await context.connect()
      if (isBootstrapId(id)) await connection.api.revokeBootstrapToken(id)
      else await connection.api.revokeToken(id)
      context.out.done({ id, revoked: true }, `Revoked ${id}`)
    })
  token
    .command('inspect')
    .description('show what a token says, unproven; it is read from stdin unless --file names it')
    .option('--file <file>', 'file with the token')
    .option('--json', 'print JSON')
    .action(async (options: { file?: string }, command: Command) => {
      await runInspect(options, contextOf(command))
    })
  token
    .command('bootstrap')
    .description('make a token that lets hosts enrol')
    .option(
      '--places <places>',
      'places that hosts may claim: a,b or any; default: none, the address decides',
      '',
    )
    .option('--repositories <patterns>', 'what the hosts may fetch: web,team/*', '*')
    .option('--uses <number>', 'how many hosts may use it; default: any number')
    .option('--ttl <duration>', 'how long it lives', '30d')
    .option('-o, --output <file>', 'write it to a file (0600) instead of stdout')
    .option('--json', 'print JSON')
    .action(async (options: BootstrapOptions, command: Command) => {
      await runBootstrap(options, contextOf(command))
    })
  token
    .command('mint')
    .description('make a signed announce URL: by the server, or offline with a key file')
    .argument('[name]', 'NAME[:TAG]')
    .option('--infohash <hex>', 'instead of a name')
    .option('--ttl <duration>', 'how long it lives', '24h')
    .option('--rack <place>', 'where its bearer is')
    .option('--cidr <network>', 'the announcing address must lie in it')
    .option('--key <file>', 'sign offline with this key: ours, a private JWK or a PEM')
    .option('--issuer <url>', 'offline: the `iss`; default: the announce URL without /announce')
    .option('--audience <url>', 'offline: the `aud`; default: the issuer')
    .option('--announce <url>', 'offline: the announce URL')
    .option('--json', 'print JSON')
    .action(async (name: string | undefined, options: MintOptions, command: Command) => {
      await runMint(name, options, contextOf(command))
    })
}

interface CreateOptions {
  readonly name: string
  readonly scope: string[]
  readonly ttl?: string
  readonly output?: string
}

export async function runCreate(
  { name, scope, ttl, output }: CreateOptions,
  context: Context,
): Promise<void> {
  await using connection = await context.connect()
  const created = await connection.api.createToken({ name, scopes: scope, ...ttlSeconds(ttl) })
  await handOver(
    { ...created, secret: created.token, output, what: `Token ${created.id}, until ${created.expiresAt}` },
    context,
  )
}

async function runList(context: Context): Promise<void> {
  await using connection = await context.connect()
  const { tokens } = await connection.api.listTokens()
  const { bootstrapTokens } = await connection.api.listBootstrapTokens()
  context.out.result({ tokens, bootstrapTokens }, () =>
    context.out.table(
      ['ID', 'NAME', 'SCOPES', 'EXPIRES', ''],
      [
        ...tokens.map(({ id, name, scopes, expiresAt, revoked }) => [
          id,
          name,
          scopes.join(' '),
          expiresAt,
          revoked ? 'revoked' : '',
        ]),
        ...bootstrapTokens.map(({ id, repositories, places, expiresAt, usesLeft }) => [
          id,
          'bootstrap',
          `enrol for ${repositories.join(' ')} at ${places === 'any' ? 'any place' : places.join(' ') || 'no place of their choice'}`,
          expiresAt,
          usesLeft === undefined ? '' : `${usesLeft} left`,
        ]),
      ],
    ),
  )
}

/** Bootstrap tokens have short ids, which stand in the tokens themselves; API tokens have UUIDs. */
function isBootstrapId(id: string): boolean {
  return /^[0-9a-f]{12}$/.test(id)
}

export async function runInspect({ file }: { file?: string }, context: Context): Promise<void> {
  const token = file === undefined ? await readStdin(context) : await readTokenFile(file)
  let shown: ReturnType<typeof inspectToken>
  try {
    shown = inspectToken(token)
  } catch (error) {
    throw new Failure(exitCodes.usage, (error as Error).message, { cause: error })
  }
  const { exp } = shown.claims
  const expired = typeof exp === 'number' && exp * 1000 < context.now()
  context.out.result(
    { ...shown, expired },
    () => `${JSON.stringify(shown, null, 2)}\n${expired ? 'It has expired.\n' : ''}`,
  )
}

interface BootstrapOptions {
  readonly places: string
  readonly repositories: string
  readonly uses?: string
  readonly ttl: string
  readonly output?: string
}

async function runBootstrap(
  { places, repositories, uses, ttl, output }: BootstrapOptions,
  context: Context,
): Promise<void> {
  if (uses !== undefined && !/^[1-9]\d{0,8}$/.test(uses))
    throw new Failure(exitCodes.usage, `Cannot use --uses ${uses}: need a number`)
  await using connection = await context.connect()
  const created = await connection.api.createBootstrapToken({
    places: places === 'any' ? 'any' : list(places),
    repositories: list(repositories),
    ...(uses === undefined ? {} : { usesMax: Number(uses) }),
    ...ttlSeconds(ttl),
  })
  await handOver(
    {
      ...created,
      secret: created.bootstrapToken,
      output,
      what: `Bootstrap token ${created.id}, until ${created.expiresAt}`,
    },
    context,
  )
}

interface MintOptions {
  readonly infohash?: string
  readonly ttl: string
  readonly rack?: string
  readonly cidr?: string
  readonly key?: string
  readonly issuer?: string
  readonly audience?: string
  readonly announce?: string
}

export async function runMint(
  name: string | undefined,
  options: MintOptions,
  context: Context,
): Promise<void> {
  const { infohash, ttl, rack, cidr, key } = options
  if ((name === undefined) === (infohash === undefined))
    throw new Failure(exitCodes.usage, 'Cannot mint: give either a NAME[:TAG] or --infohash')
  if (key !== undefined) {
    const { announce } = options
    if (infohash === undefined || announce === undefined)
      throw new Failure(exitCodes.usage, 'Cannot mint offline: need --infohash and --announce')
    const issuer = options.issuer ?? announce.replace(/\/announce$/, '')
    const minted = await mintOffline({
      keyFile: key,
      issuer,
      audience: options.audience ?? issuer,
      infoHash: infoHashFromHex(infohash),
      subject: 'offline',
      rack,
      cidr,
      ttlMs: parseDurationMs(ttl),
      now: context.now,
    })
    const url = new URL(announce)
    url.searchParams.set('jwt', minted.token)
    showMinted(
      {
        infohash: infohash.toLowerCase(),
        announceUrl: url.href,
        token: minted.token,
        expiresAt: minted.expiresAt.toISOString(),
      },
      context,
    )
    return
  }
  await using connection = await context.connect()
  const target = infohash === undefined ? await blobOf(connection, name ?? '') : { infohash }
  const minted = await connection.api.announceToken({
    ...target,
    ...ttlSeconds(ttl),
    ...(rack === undefined ? {} : { rack }),
    ...(cidr === undefined ? {} : { cidr }),
  })
  showMinted(minted, context)
}

async function blobOf(
  connection: Parameters<typeof findRelease>[0],
  text: string,
): Promise<{ repository: string; digest: string }> {
  const { repository, blobs } = await findRelease(connection, text)
  const blob = blobs.find(({ infohash }) => infohash !== undefined)
  if (!blob)
    throw new Failure(
      exitCodes.notFound,
      `Cannot mint for ${text}: its files are too small to have a torrent`,
    )
  return { repository: parseReference(repository).repository, digest: blob.digest }
}

function showMinted(
  minted: { infohash: string; announceUrl: string; token: string; expiresAt: string },
  { out }: Context,
): void {
  out.note(`For infohash ${minted.infohash}, until ${minted.expiresAt}`)
  out.result(minted, () => `${minted.announceUrl}\n`)
}

/** A secret goes to stdout alone, or into a file that only its owner reads. */
async function handOver(
  made: { id: string; expiresAt: string; secret: string; output: string | undefined; what: string },
  { out }: Context,
): Promise<void> {
  const { id, expiresAt, secret, output, what } = made
  out.note(what)
  if (output === undefined) {
    out.result({ id, expiresAt, token: secret }, () => `${secret}\n`)
    return
  }
  await writeFileAtomic(output, `${secret}\n`, { mode: 0o600 })
  out.result({ id, expiresAt, output }, () => `${output}\n`)
}

function ttlSeconds(ttl: string | undefined): { ttlSeconds?: number } {
  return ttl === undefined ? {} : { ttlSeconds: Math.max(1, Math.floor(parseDurationMs(ttl) / 1000)) }
}

/** The whole of stdin, trimmed. @throws Failure at a terminal, where nobody would know what is waited for */
export async function readStdin({ stdin }: Context): Promise<string> {
  if (stdin.isTTY === true)
    throw new Failure(exitCodes.usage, 'Cannot read the token: give --file, or pipe it in')
  const parts: Buffer[] = []
  for await (const part of stdin) parts.push(part)
  return Buffer.concat(parts).toString().trim()
}
