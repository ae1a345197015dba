import { readFile, unlink } from 'node:fs/promises'
import { dirname } from 'node:path'
import type { Command } from 'commander'
import { createHttpClient } from '../../lib/client/http.ts'
import { createServerClient } from '../../lib/client/server-client.ts'
import { ignoreMissing, makeDirectory, writeFileAtomic } from '../../lib/runtime/files.ts'
import type { Context, GlobalOptions, WithContext } from '../context.ts'
import { credentialsFile, parseServerUrl, readTokenFile } from '../context.ts'
import { Failure, exitCodes } from '../failure.ts'
import { audienceFor, exchangeIdToken, findIdToken } from '../id-token.ts'
import { readStdin } from './token.ts'

/** `login` and `logout`. */
export function registerLogin(program: Command, contextOf: WithContext): void {
  program
    .command('login')
    .description(
      'store a server and a token for it; the token is read from stdin unless --token-file names it',
    )
    .argument('<url>', 'the server')
    .option(
      '--oidc',
      'exchange the token that the platform of this CI job gives, or that --id-token-file names',
    )
    .option('--json', 'print JSON')
    .action(async (url: string, { oidc = false }: { oidc?: boolean }, command: Command) => {
      const { tokenFile, idTokenFile, ca } = command.optsWithGlobals<GlobalOptions>()
      await runLogin(
        { url, tokenFile, caFile: ca, oidc: oidc || idTokenFile !== undefined, idTokenFile },
        contextOf(command),
      )
    })
  program
    .command('logout')
    .description('forget the stored token')
    .option('--json', 'print JSON')
    .action(async (_options: unknown, command: Command) => {
      const context = contextOf(command)
      await unlink(credentialsFile(context.env)).catch(ignoreMissing)
      context.out.done({ loggedOut: true }, 'Logged out')
    })
}

export async function runLogin(
  options: {
    url: string
    tokenFile: string | undefined
    caFile: string | undefined
    oidc: boolean
    idTokenFile: string | undefined
  },
  context: Context,
): Promise<void> {
  const server = parseServerUrl(options.url)
  const ca = options.caFile === undefined ? undefined : await readFile(options.caFile, 'utf8')
  const token = options.oidc
    ? await exchanged(options, { server, ca }, context)
    : options.tokenFile === undefined
      ? await readStdin(context)
      : await readTokenFile(options.tokenFile)
  await using http = createHttpClient({ baseUrl: server, ca, credential: () => token })
  const { caller } = await createServerClient(http).serverInfo()
  const file = credentialsFile(context.env)
  await makeDirectory(dirname(file), 0o700)
  await writeFileAtomic(file, `${JSON.stringify({ server, token, ca })}\n`, { mode: 0o600 })
  const { name, scopes } = caller
  context.out.done({ server, name, scopes }, `Logged in to ${server} as ${name} (${scopes.join(', ')})`)
}

/** @throws Failure where this is no CI job with an identity */
async function exchanged(
  { idTokenFile }: { idTokenFile: string | undefined },
  { server, ca }: { server: string; ca: string | undefined },
  { env, signal, out }: Context,
): Promise<string> {
  const source = findIdToken({ idTokenFile }, env)
  if (!source)
    throw new Failure(exitCodes.auth, 'Cannot log in: this job has no identity of its platform', {
      hint: 'GitHub: permissions: { id-token: write }. GitLab: id_tokens: { DEPLOYCTL_ID_TOKEN: { aud: SERVER } }. Elsewhere: --id-token-file.',
    })
  const { token, ttlSeconds } = await exchangeIdToken(
    source,
    { server, ca, audience: audienceFor(server, env) },
    signal,
  )
  out.note(`The token of ${source.name} was exchanged for one of ${ttlSeconds} s`)
  return token
}
