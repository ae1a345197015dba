import { readFile, unlink } from 'node:fs/promises'
import { dirname } from 'node:path'
import type { Command } from 'commander'
import { createHttpClient } from '../../lib/client/http.ts'
import { createServerClient } from '../../lib/client/server-client.ts'
import { ignoreMissing, makeDirectory, writeFileAtomic } from '../../lib/runtime/files.ts'
import type { Context, WithContext } from '../context.ts'
import { credentialsFile, parseServerUrl, readTokenFile } from '../context.ts'
import { readStdin } from './token.ts'

/** `login` and `logout`. */
export function registerLogin(program: Command, contextOf: WithContext): void {
  program
    .command('login')
    .description(
      'store a server and a token for it; the token is read from stdin unless --token-file names it',
    )
    .argument('<url>', 'the server')
    .option('--json', 'print JSON')
    .action(async (url: string, _options: unknown, command: Command) => {
      const { tokenFile, ca } = command.optsWithGlobals<{ tokenFile?: string; ca?: string }>()
      await runLogin({ url, tokenFile, caFile: ca }, contextOf(command))
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
  options: { url: string; tokenFile: string | undefined; caFile: string | undefined },
  context: Context,
): Promise<void> {
  const server = parseServerUrl(options.url)
  const token =
    options.tokenFile === undefined ? await readStdin(context) : await readTokenFile(options.tokenFile)
  const ca = options.caFile === undefined ? undefined : await readFile(options.caFile, 'utf8')
  await using http = createHttpClient({ baseUrl: server, ca, credential: () => token })
  const { caller } = await createServerClient(http).serverInfo()
  const file = credentialsFile(context.env)
  await makeDirectory(dirname(file), 0o700)
  await writeFileAtomic(file, `${JSON.stringify({ server, token, ca })}\n`, { mode: 0o600 })
  const { name, scopes } = caller
  context.out.done({ server, name, scopes }, `Logged in to ${server} as ${name} (${scopes.join(', ')})`)
}
