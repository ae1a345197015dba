import type { Command } from 'commander'
import { readFile, stat } from 'node:fs/promises'
import { homedir } from 'node:os'
import { join } from 'node:path'
import { z } from 'zod'
import type { AgentClient } from '../lib/client/agent-client.ts'
import { createAgentClient } from '../lib/client/agent-client.ts'
import type { HttpClient } from '../lib/client/http.ts'
import { createHttpClient } from '../lib/client/http.ts'
import type { RegistryClient } from '../lib/client/registry-client.ts'
import { createRegistryClient } from '../lib/client/registry-client.ts'
import type { ServerClient } from '../lib/client/server-client.ts'
import { createServerClient } from '../lib/client/server-client.ts'
import { isMissing } from '../lib/runtime/files.ts'
import { defaultPaths } from '../lib/runtime/paths.ts'
import { version } from '../lib/runtime/version.ts'
import { Failure, exitCodes } from './failure.ts'
import type { Exchanged, IdTokenSource } from './id-token.ts'
import { audienceFor, exchangeIdToken, findIdToken } from './id-token.ts'
import type { Output } from './output.ts'

/** Options that every command takes. */
export interface GlobalOptions {
  readonly server?: string
  readonly tokenFile?: string
  readonly idTokenFile?: string
  readonly ca?: string
  readonly socket?: string
}

/** How to reach the server, and who one is there. */
export interface Connection {
  readonly server: string
  /** A secret. */
  readonly token: string | undefined
  /** What is exchanged for a token where there is none. */
  readonly idToken?: IdTokenSource | undefined
  readonly ca: string | undefined
  /** Where the pieces came from, for `doctor`. */
  readonly source: string
}

export interface ServerConnection extends AsyncDisposable {
  readonly http: HttpClient
  readonly api: ServerClient
  readonly registry: RegistryClient
  readonly connection: Connection
}

/** Gives a command's action its context; the last argument of an action is the command itself. */
export type WithContext = (command: Command) => Context

/** What a command works with. */
export interface Context {
  readonly out: Output
  readonly env: NodeJS.ProcessEnv
  readonly now: () => number
  /** Aborts at Ctrl-C. */
  readonly signal: AbortSignal
  readonly stdin: AsyncIterable<Buffer> & { isTTY?: boolean }
  connect(options?: { anonymous?: boolean }): Promise<ServerConnection>
  resolve(): Promise<Connection>
  agent(): AgentClient
  readonly socketPath: string
}

/** What `login` stores. */
export const StoredCredentials = z.strictObject({
  server: z.url(),
  token: z.string(),
  ca: z.string().optional(),
})

export function credentialsFile(env: NodeJS.ProcessEnv): string {
  const base = env['XDG_CONFIG_HOME'] || join(env['HOME'] ?? homedir(), '.config')
  return join(base, 'deployctl', 'credentials.json')
}

/** Flags win over the environment, that over what `login` stored, that over the server on this machine. */
export function createContext(
  base: Omit<Context, 'connect' | 'resolve' | 'agent' | 'socketPath'>,
  options: GlobalOptions,
): Context {
  const { env } = base
  const socketPath =
    options.socket ?? env['DEPLOYCTL_SOCKET'] ?? join(defaultPaths('agent', env).runtime, 'agent.sock')
  const resolve = () => resolveConnection(options, env)
  return {
    ...base,
    socketPath,
    resolve,
    connect: async ({ anonymous = false } = {}) => {
      const connection = await resolve()
      const { server, ca, idToken } = connection
      await using started = new AsyncDisposableStack()
      let { token } = connection
      if (token === undefined && idToken && !anonymous) {
        const exchange = () =>
          exchangeIdToken(idToken, { server, ca, audience: audienceFor(server, env) }, base.signal)
        const first = await exchange()
        ;({ token } = first)
        started.use(
          keepExchanged(first, exchange, (next) => {
            token = next
          }),
        )
      }
      if (token === undefined && !anonymous) {
        throw new Failure(exitCodes.auth, `Cannot use ${server}: there is no token`, {
          hint: 'Run `deployctl login URL`, or set DEPLOYCTL_TOKEN_FILE.',
        })
      }
      const http = createHttpClient({
        baseUrl: server,
        ca,
        credential: () => token,
        userAgent: `deployctl/${version}`,
        idleTimeoutMs: 120_000,
      })
      started.use(http)
      const owned = started.move()
      return {
        http,
        api: createServerClient(http),
        registry: createRegistryClient(http),
        connection: { ...connection, token },
        [Symbol.asyncDispose]: () => owned.disposeAsync(),
      }
    },
    agent: () => createAgentClient({ socketPath }),
  }
}

/** A publish may last longer than a token that was exchanged: another one is got at two thirds of its life. */
function keepExchanged(
  first: Exchanged,
  exchange: () => Promise<Exchanged>,
  use: (token: string) => void,
): Disposable {
  let timer: NodeJS.Timeout
  const later = (seconds: number) => {
    timer = setTimeout(() => {
      exchange().then(
        ({ token, ttlSeconds }) => {
          use(token)
          later((ttlSeconds * 2) / 3)
        },
        // The old one counts for a while; what it is used for then says what is wrong.
        () => {
          later(renewRetrySeconds)
        },
      )
    }, seconds * 1000)
    timer.unref()
  }
  later((first.ttlSeconds * 2) / 3)
  return {
    [Symbol.dispose]: () => {
      clearTimeout(timer)
    },
  }
}

const renewRetrySeconds = 15

async function resolveConnection(
  options: GlobalOptions,
  environment: NodeJS.ProcessEnv,
): Promise<Connection> {
  // A variable that is empty is as good as none: `VAR= deployctl …` takes it away for one call.
  const env = Object.fromEntries(Object.entries(environment).filter(([, value]) => value !== ''))
  const stored = await readStored(env)
  const server = options.server ?? env['DEPLOYCTL_SERVER'] ?? stored?.server
  const caFile = options.ca ?? env['DEPLOYCTL_CA']
  const ca = caFile === undefined ? stored?.ca : await readFile(caFile, 'utf8')
  const tokenFile = options.tokenFile ?? env['DEPLOYCTL_TOKEN_FILE']
  if (options.tokenFile !== undefined && options.idTokenFile !== undefined)
    throw new Failure(
      exitCodes.usage,
      'Cannot use --token-file and --id-token-file together: leave one of them out',
    )
  // A flag wins over a variable.
  const given =
    options.idTokenFile !== undefined
      ? undefined
      : tokenFile === undefined
        ? env['DEPLOYCTL_TOKEN']
        : await readTokenFile(tokenFile)
  if (server !== undefined) {
    const url = parseServerUrl(server)
    // A stored token is for the server it was stored with, and for no other.
    const isStored = options.idTokenFile === undefined && stored && parseServerUrl(stored.server) === url
    return {
      server: url,
      token: given ?? (isStored ? stored.token : undefined),
      idToken: findIdToken(options, env),
      ca,
      source: options.server
        ? '--server'
        : env['DEPLOYCTL_SERVER']
          ? 'DEPLOYCTL_SERVER'
          : credentialsFile(env),
    }
  }
  const local = join(defaultPaths('server', env).data, 'admin-token')
  const isLocal = options.idTokenFile === undefined
  const token =
    given ?? (isLocal ? (await readFile(local, 'utf8').catch(() => undefined))?.trim() : undefined)
  if (token === undefined) {
    throw new Failure(exitCodes.usage, 'Cannot tell which server is meant', {
      hint: 'Run `deployctl login URL`, or give --server, or set DEPLOYCTL_SERVER.',
    })
  }
  return { server: 'http://127.0.0.1:6969', token, ca, source: `the server on this machine (${local})` }
}

/** @throws Failure unless it is an http or https URL */
export function parseServerUrl(text: string): string {
  if (!URL.canParse(text) || !/^https?:$/.test(new URL(text).protocol)) {
    throw new Failure(
      exitCodes.usage,
      `Cannot use server ${JSON.stringify(text)}: need a URL such as https://tracker.example:6969`,
    )
  }
  return text.replace(/\/+$/, '')
}

export async function readTokenFile(file: string): Promise<string> {
  try {
    return (await readFile(file, 'utf8')).trim()
  } catch (cause) {
    throw new Failure(exitCodes.auth, `Cannot read token file ${file}: ${(cause as Error).message}`, {
      cause,
    })
  }
}

async function readStored(env: NodeJS.ProcessEnv) {
  const file = credentialsFile(env)
  try {
    const { mode } = await stat(file)
    if ((mode & 0o077) !== 0) {
      throw new Failure(exitCodes.auth, `Cannot use ${file}: others can read it`, {
        hint: `Run: chmod 600 ${file}`,
      })
    }
    return StoredCredentials.parse(JSON.parse(await readFile(file, 'utf8')))
  } catch (error) {
    if (isMissing(error)) return undefined
    if (error instanceof Failure) throw error
    throw new Failure(exitCodes.auth, `Cannot read ${file}`, {
      cause: error,
      hint: 'Run `deployctl login URL` again.',
    })
  }
}
