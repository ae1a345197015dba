import { readFile } from 'node:fs/promises'
import { z } from 'zod'
import { createHttpClient } from '../lib/client/http.ts'
import { createServerClient } from '../lib/client/server-client.ts'
import { Failure, exitCodes } from './failure.ts'

/** Where this job gets tokens of its platform from (OpenID Connect). */
export interface IdTokenSource {
  /** For messages. */
  readonly name: string
  /** A secret. */
  read(audience: string, signal: AbortSignal): Promise<string>
}

/** What an exchange gave: a token of the server, a secret. */
export interface Exchanged {
  readonly token: string
  readonly ttlSeconds: number
  readonly scopes: readonly string[]
}

/**
 * A file that is named, else what the platform gives its jobs: `DEPLOYCTL_ID_TOKEN` (GitLab's `id_tokens`), or
 * GitHub's endpoint, which is there with `permissions: id-token: write`. Undefined where there is none.
 */
export function findIdToken(
  options: { idTokenFile?: string | undefined },
  env: NodeJS.ProcessEnv,
): IdTokenSource | undefined {
  const file = options.idTokenFile ?? env['DEPLOYCTL_ID_TOKEN_FILE']
  if (file) return { name: file, read: async () => readIdTokenFile(file) }
  const given = env['DEPLOYCTL_ID_TOKEN']
  if (given) return { name: 'DEPLOYCTL_ID_TOKEN', read: async () => given.trim() }
  const url = env['ACTIONS_ID_TOKEN_REQUEST_URL']
  const secret = env['ACTIONS_ID_TOKEN_REQUEST_TOKEN']
  if (!url || !secret) return undefined
  return { name: 'GitHub Actions', read: (audience, signal) => askGitHub({ url, secret, audience }, signal) }
}

/** The `aud` that tokens are asked for with: the server, as it is called here. */
export function audienceFor(server: string, env: NodeJS.ProcessEnv): string {
  return env['DEPLOYCTL_ID_TOKEN_AUDIENCE'] || server
}

/** Exchanges a token of the platform for one of the server. @throws Failure, RequestError, UnreachableError */
export async function exchangeIdToken(
  source: IdTokenSource,
  { server, ca, audience }: { server: string; ca: string | undefined; audience: string },
  signal: AbortSignal,
): Promise<Exchanged> {
  const idToken = await source.read(audience, signal)
  await using http = createHttpClient({ baseUrl: server, ca })
  const reply = await createServerClient(http).exchangeToken(idToken, signal)
  return { token: reply.access_token, ttlSeconds: reply.expires_in, scopes: reply.scope.split(' ') }
}

/** Read for each exchange: Kubernetes replaces it long before it expires. */
async function readIdTokenFile(file: string): Promise<string> {
  try {
    return (await readFile(file, 'utf8')).trim()
  } catch (cause) {
    throw new Failure(exitCodes.auth, `Cannot read ID token file ${file}: ${(cause as Error).message}`, {
      cause,
    })
  }
}

async function askGitHub(
  { url, secret, audience }: { url: string; secret: string; audience: string },
  signal: AbortSignal,
): Promise<string> {
  const at = URL.parse(url)
  if (!at) throw new Failure(exitCodes.usage, 'Cannot use ACTIONS_ID_TOKEN_REQUEST_URL: it is no URL')
  at.searchParams.set('audience', audience)
  await using http = createHttpClient({ baseUrl: at.origin, credential: () => secret })
  const { value } = await http.json(z.object({ value: z.string() }), {
    path: `${at.pathname}${at.search}`,
    signal,
  })
  return value
}
