import type { Command } from 'commander'
import { readFile } from 'node:fs/promises'
import type { KeyInfo, RotateKeyRequest } from '../../lib/client/api.ts'
import { RotateKeyRequest as RotateKey } from '../../lib/client/api.ts'
import type { Context, WithContext } from '../context.ts'
import { Failure, exitCodes } from '../failure.ts'
import { readStdin } from './token.ts'

/** `keys list|rotate|revoke|import`. */
export function registerKeys(program: Command, contextOf: WithContext): void {
  const keys = program.command('keys').description('the keys that the server signs tokens with')
  keys
    .command('list')
    .description('list them: next (published), active (signs), retiring (verifies what it signed)')
    .option('--json', 'print JSON')
    .action(async (_options: unknown, command: Command) => {
      await runList(contextOf(command))
    })
  keys
    .command('rotate')
    .description('make a new key; it signs once every verifier knows it')
    .option('--algorithm <name>', 'ES256, Ed25519 or RS256; default: tokens.algorithm')
    .option('--now', 'it signs at once; also takes the next key that waits already')
    .option('--json', 'print JSON')
    .action(async (options: { algorithm?: string; now?: boolean }, command: Command) => {
      await runRotate(options, contextOf(command))
    })
  keys
    .command('revoke')
    .description('end a key, and with it every token that it signed, at once')
    .argument('<kid>', 'as `keys list` shows it')
    .option('--json', 'print JSON')
    .action(async (kid: string, _options: unknown, command: Command) => {
      const context = contextOf(command)
      await using connection = await context.connect()
      await connection.api.revokeKey(kid)
      context.out.done({ kid, revoked: true }, `Revoked ${kid}`)
    })
  keys
    .command('import')
    .description('take a private key from elsewhere: PEM (PKCS #8, SEC 1, PKCS #1) or JWK')
    .argument('[file]', 'the file; default: stdin')
    .option('--kid <name>', 'its name in tokens; default: that of the JWK, else its thumbprint')
    .option('--verify-only', 'it never signs here: only what it has signed elsewhere counts')
    .option('--json', 'print JSON')
    .action(
      async (file: string | undefined, options: { kid?: string; verifyOnly?: boolean }, command: Command) => {
        await runImport({ file, ...options }, contextOf(command))
      },
    )
}

async function runList(context: Context): Promise<void> {
  await using connection = await context.connect()
  const { keys } = await connection.api.keys()
  context.out.result({ keys }, () =>
    context.out.table(
      ['KEY', 'ALGORITHM', 'STATE', 'SINCE', ''],
      keys.map((key) => [key.kid, key.algorithm, key.state, key.since, whatNext(key)]),
    ),
  )
}

export async function runRotate(
  { algorithm, now }: { algorithm?: string | undefined; now?: boolean | undefined },
  context: Context,
): Promise<void> {
  const parsed = RotateKey.safeParse({ algorithm, now })
  if (!parsed.success)
    throw new Failure(
      exitCodes.usage,
      `Cannot use --algorithm ${algorithm ?? ''}: need ES256, Ed25519 or RS256`,
    )
  const request: RotateKeyRequest = parsed.data
  await using connection = await context.connect()
  const key = await connection.api.rotateKey(request)
  context.out.result(key, () => `${key.kid}\n`)
  context.out.note(`Key ${key.kid} is ${key.state}${whatNext(key)}`)
}

export async function runImport(
  options: { file: string | undefined; kid?: string; verifyOnly?: boolean },
  context: Context,
): Promise<void> {
  const { file, kid, verifyOnly } = options
  const text = file === undefined ? await readStdin(context) : await readFile(file, 'utf8')
  await using connection = await context.connect()
  const key = await connection.api.importKey({
    key: text,
    ...(kid === undefined ? {} : { kid }),
    ...(verifyOnly === undefined ? {} : { verifyOnly }),
  })
  context.out.result(key, () => `${key.kid}\n`)
  context.out.note(`Key ${key.kid} is ${key.state}${whatNext(key)}`)
}

function whatNext({ state, dueAt }: KeyInfo): string {
  if (dueAt === undefined) return ''
  return state === 'next' ? `, signs from ${dueAt}` : `, goes at ${dueAt}`
}
