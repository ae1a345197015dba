import { randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { ConnectionOptions } from 'node:tls'
import { rootCertificates } from 'node:tls'
import { parseArgs } from 'node:util'
import { AnnounceTokenReply, ApiErrorBody } from '../lib/client/api.ts'
import { isLoopback, parseIp } from '../lib/protocol/address.ts'
import { cidrContains } from '../lib/protocol/cidr.ts'
import type { InfoHash } from '../lib/protocol/infohash.ts'
import { infoHashFromHex } from '../lib/protocol/infohash.ts'
import { ConfigError, duration, loadConfig, parseConfig } from '../lib/runtime/config.ts'
import { defaultPaths } from '../lib/runtime/paths.ts'
import { ServerConfig, topologyOf } from './config.ts'
import type { Expected, Finding, Frontend, Swarm } from './selftest-frontend.ts'
import { checkFrontend, describeFault, exchange, isName } from './selftest-frontend.ts'
import { trackerSettings } from './tracker-settings.ts'

const usage = `Usage: rackswarm-server selftest [options]
Announces to every frontend of the running server as two peers that must find each other, and says what is wrong.

  --config FILE   the configuration of that server (default: ${defaultPaths('server').config}, if it is there)
  --http URL      ask this instead: http://HOST:PORT/announce, or https; may be given several times
  --udp URL       ask this instead: udp://HOST:PORT; may be given several times
  --token FILE    a file with an announce token, or with an API token of scope admin
                  (default: data_dir/admin-token, if it can be read)
  --ca FILE       PEM file with an authority to trust besides the usual ones and the configured certificate
  --cert FILE     PEM file with a certificate to show, where the server wants one, and --key FILE with its key
  --insecure      do not look at certificates
  --timeout TIME  how long an answer may take (default: 5s)
  --json          print JSON

Exit codes: 0 all is well, 1 something is not, 2 wrong arguments, 78 unusable configuration.
`

interface Options {
  readonly config: string | undefined
  readonly http: readonly string[]
  readonly udp: readonly string[]
  readonly token: string | undefined
  readonly ca: string | undefined
  readonly cert: string | undefined
  readonly key: string | undefined
  readonly insecure: boolean
  readonly timeoutMs: number
  readonly json: boolean
  readonly help: boolean
}

/** `rackswarm-server selftest`. @returns the exit code */
export async function selftest(argv: readonly string[]): Promise<number> {
  let options: Options
  try {
    options = readOptions(argv)
  } catch (error) {
    process.stderr.write(`rackswarm-server selftest: ${(error as Error).message}\n${usage}`)
    return 2
  }
  if (options.help) {
    process.stdout.write(usage)
    return 0
  }
  try {
    const findings = await runSelftest(options)
    const ok = findings.every(({ verdict }) => verdict !== 'fail')
    process.stdout.write(options.json ? `${JSON.stringify({ ok, findings })}\n` : describe(findings))
    return ok ? 0 : 1
  } catch (error) {
    process.stderr.write(`rackswarm-server selftest: ${(error as Error).message}\n`)
    return error instanceof ConfigError ? 78 : 1
  }
}

/** @throws Error naming the file that cannot be read */
async function runSelftest(options: Options): Promise<Finding[]> {
  const { file, config } = await readConfig(options.config)
  const given = [...options.http.map(withPath), ...options.udp]
  const tls = await tlsOptions(options, config)
  const targets = given.length > 0 ? given.map((url) => found(url, tls)) : configured(config, tls)
  if (targets.length === 0)
    return [
      {
        frontend: file ?? 'the default configuration',
        verdict: 'fail',
        detail: 'it has no frontend of a tracker',
        advice: 'Is this the configuration of a server with the role tracker?',
      },
    ]
  const expected: Expected = {
    // Of a URL it is not known whose it is, unless the configuration was named with it.
    tokensNeeded:
      given.length > 0 && options.config === undefined ? undefined : config.tracker.approval === 'token',
    prehooks: config.prehooks.map(({ name }) => name),
  }
  const findings: Finding[] = []
  const swarm = await findSwarm(options, config, { expected, tls, findings })
  // One after the other: what is left behind by one would be found by the next.
  for (const target of targets)
    findings.push(
      'detail' in target ? target : await checkFrontend(target, swarm, expected, options.timeoutMs),
    )
  return findings
}

/** @throws Error naming what is wrong */
function readOptions(argv: readonly string[]): Options {
  const text = { type: 'string' } as const
  const texts = { type: 'string', multiple: true, default: [] as string[] } as const
  const flag = { type: 'boolean', default: false } as const
  const { values } = parseArgs({
    args: [...argv],
    options: {
      config: text,
      http: texts,
      udp: texts,
      token: text,
      ca: text,
      cert: text,
      key: text,
      insecure: flag,
      timeout: { type: 'string', default: '5s' },
      json: flag,
      help: { ...flag, short: 'h' },
    },
  })
  for (const [name, urls] of [
    ['http', values.http],
    ['udp', values.udp],
  ] as const)
    for (const url of urls)
      if (!isUrl(url, name))
        throw new Error(`--${name}: need ${name === 'udp' ? 'udp://HOST:PORT' : 'http://HOST:PORT/announce'}`)
  const timeout = duration().safeParse(values.timeout)
  if (!timeout.success || timeout.data < 1) throw new Error('--timeout: need a duration such as 5s')
  if ((values.cert === undefined) !== (values.key === undefined))
    throw new Error('--cert and --key belong together')
  const { config, token, ca, cert, key } = values
  return { ...values, config, token, ca, cert, key, timeoutMs: timeout.data }
}

function isUrl(text: string, kind: 'http' | 'udp'): boolean {
  const url = URL.canParse(text) ? new URL(text) : undefined
  if (kind === 'udp') return url?.protocol === 'udp:' && url.hostname !== '' && url.port !== ''
  return (url?.protocol === 'http:' || url?.protocol === 'https:') && url.hostname !== ''
}

async function readConfig(
  given: string | undefined,
): Promise<{ file: string | undefined; config: ServerConfig }> {
  const usual = defaultPaths('server').config
  const file = given ?? (existsSync(usual) ? usual : undefined)
  return {
    file,
    config:
      file === undefined ? parseConfig(ServerConfig, '', '(no file)') : await loadConfig(ServerConfig, file),
  }
}

function withPath(text: string): string {
  const url = new URL(text)
  if (url.pathname === '/') url.pathname = '/announce'
  return url.href
}

function found(url: string, tls: ConnectionOptions): Frontend {
  return { url, tls, proxyHeader: false }
}

/** Where the configured server listens; a finding for an address that is only known once it does. */
function configured(config: ServerConfig, tls: ConnectionOptions): (Frontend | Finding)[] {
  if (!config.roles.includes('tracker')) return []
  const hasRegistry = config.roles.includes('registry')
  const { http, udp } = trackerSettings(config, {
    mainPort: !hasRegistry,
    topology: topologyOf(config),
    trust: { issuer: '', audience: '', keySet: undefined },
    tls: undefined,
    secrets: { udpPrivateKey: '', ticketSecret: '' },
    epoch: '',
    modulesDirectory: '',
  })
  const main = { ...config.http.addr, tls: config.http.tls?.main_port ?? false, isMain: true }
  const path = pathOf(config.http.announce_routes)
  const own = ownCertificate(config, tls)
  return [
    ...[
      ...(hasRegistry ? [main] : []),
      ...http.listeners.map((listener) => ({ ...listener, isMain: false })),
    ].map(({ host, port, tls: isTls, isMain }) => {
      const reached = reachable(host)
      const url = `${isTls ? 'https' : 'http'}://${bracketed(reached)}:${port}${path}`
      if (port === 0) return unknownPort(url, '--http URL')
      return { url, tls: own, proxyHeader: !isMain && isProxy(config, reached) }
    }),
    ...udp.addresses.map(({ host, port }) => {
      const url = `udp://${bracketed(reachable(host))}:${port}`
      return port === 0 ? unknownPort(url, '--udp URL') : { url, tls: own, proxyHeader: false }
    }),
  ]
}

function unknownPort(frontend: string, option: string): Finding {
  return {
    frontend,
    verdict: 'fail',
    detail: 'its port is chosen when the server starts',
    advice: `The log line "server is listening" names it: ${option}.`,
  }
}

/** An address that listens everywhere is reached at loopback. */
function reachable(host: string): string {
  if (host === '0.0.0.0') return '127.0.0.1'
  return /^[0:]+$/.test(host) ? '::1' : host
}

function bracketed(host: string): string {
  return host.includes(':') ? `[${host}]` : host
}

function isProxy({ http }: ServerConfig, host: string): boolean {
  const ip = parseIp(host === 'localhost' ? '127.0.0.1' : host)
  return (
    http.proxy_protocol && ip !== undefined && http.trusted_proxies.some((cidr) => cidrContains(cidr, ip))
  )
}

/** A path of the first route: what stands for anything is named. */
function pathOf([route = '/announce']: readonly string[]): string {
  return route.replace(/[:*]\w+/g, 'selftest')
}

async function tlsOptions(options: Options, { http }: ServerConfig): Promise<ConnectionOptions> {
  const ca = [...rootCertificates]
  // What cannot be read here may still be what the server shows.
  if (http.tls) ca.push(await readFile(http.tls.cert, 'utf8').catch(() => ''))
  if (options.ca !== undefined) ca.push(await readFile(options.ca, 'utf8'))
  return {
    ca: ca.filter((pem) => pem !== ''),
    // The configured certificate is trusted itself, whoever signed it.
    allowPartialTrustChain: true,
    rejectUnauthorized: !options.insecure,
    ...(options.cert !== undefined && { cert: await readFile(options.cert) }),
    ...(options.key !== undefined && { key: await readFile(options.key) }),
  }
}

/** At its own address a server need not have the name of that address, but that of `public_url`, if that is known. */
function ownCertificate({ public_url }: ServerConfig, tls: ConnectionOptions): ConnectionOptions {
  const name = public_url === undefined ? '' : new URL(public_url).hostname
  return { ...tls, servername: isName(name) ? name : '', checkServerIdentity: () => undefined }
}

/** An infohash nobody has, with a token for it where one is to be had; or that of the token that was given. */
async function findSwarm(
  options: Options,
  config: ServerConfig,
  context: { expected: Expected; tls: ConnectionOptions; findings: Finding[] },
): Promise<Swarm> {
  const infoHash = infoHashFromHex(randomBytes(20).toString('hex'))
  const anonymous: Swarm = { infoHash, isOurs: true, jwt: undefined }
  if (options.token === undefined && context.expected.tokensNeeded !== true) return anonymous
  const token = await readToken(options, config)
  if (token === undefined) return anonymous
  const own = infoHashOf(token)
  if (own !== undefined) return { infoHash: own, isOurs: false, jwt: token }
  const api = apiOf(options, config, context.tls)
  if (!api) return anonymous
  const { origin } = new URL(api.url)
  try {
    return { ...anonymous, jwt: await mint(api, token, infoHash, options.timeoutMs) }
  } catch (error) {
    const { detail, advice } = describeFault(error, context.expected)
    context.findings.push({
      frontend: `${origin}/api/v1`,
      verdict: 'fail',
      detail: `no announce token: ${detail}`,
      advice: error instanceof RefusedError ? error.hint : advice,
    })
    return anonymous
  }
}

/** @throws Error naming the file that was asked for and cannot be read */
async function readToken(options: Options, config: ServerConfig): Promise<string | undefined> {
  if (options.token !== undefined) return (await readFile(options.token, 'utf8')).trim()
  if (!config.roles.includes('registry')) return undefined
  const file = join(config.data_dir ?? defaultPaths('server').data, 'admin-token')
  return readFile(file, 'utf8').then(
    (text) => text.trim(),
    () => undefined,
  )
}

/** What an announce token is for; undefined for any other token. */
function infoHashOf(token: string): InfoHash | undefined {
  try {
    const payload = JSON.parse(Buffer.from(token.split('.')[1] ?? '', 'base64url').toString()) as {
      infohash?: unknown
    }
    return typeof payload.infohash === 'string' ? infoHashFromHex(payload.infohash) : undefined
  } catch {
    return undefined
  }
}

/**
 * The main port of the registry: as configured; else that of the first URL, if a token may go there: to this host, or over TLS.
 */
function apiOf(options: Options, config: ServerConfig, tls: ConnectionOptions): Frontend | undefined {
  const { addr } = config.http
  if (
    config.roles.includes('registry') &&
    addr.port !== 0 &&
    (options.http.length === 0 || options.config !== undefined)
  ) {
    const scheme = config.http.tls?.main_port === true ? 'https' : 'http'
    return found(`${scheme}://${bracketed(reachable(addr.host))}:${addr.port}`, ownCertificate(config, tls))
  }
  const url = options.http.find((text) => {
    const { protocol, hostname } = new URL(text)
    const ip = parseIp(hostname.replace(/^\[(.*)\]$/, '$1'))
    return protocol === 'https:' || hostname === 'localhost' || (ip !== undefined && isLoopback(ip))
  })
  return url === undefined ? undefined : found(url, tls)
}

class RefusedError extends Error {
  override readonly name = 'RefusedError'
  readonly hint: string | undefined

  constructor(message: string, hint: string | undefined) {
    super(message)
    this.hint = hint
  }
}

/** Longer than all frontends together take, unless they are many and slow. */
const tokenTtlSeconds = 300

/** Has the registry make an announce token. */
async function mint(api: Frontend, token: string, infohash: InfoHash, timeoutMs: number): Promise<string> {
  const { status, body } = await exchange(
    api,
    {
      method: 'POST',
      path: '/api/v1/announce-tokens',
      headers: { authorization: `Bearer ${token}`, 'content-type': 'application/json' },
      body: JSON.stringify({ infohash, ttlSeconds: tokenTtlSeconds }),
    },
    timeoutMs,
  )
  const json = parseJson(body)
  const reply = AnnounceTokenReply.safeParse(json)
  if (status === 200 && reply.success) return reply.data.token
  const refusal = ApiErrorBody.safeParse(json)
  if (!refusal.success)
    throw new RefusedError(`HTTP status ${status}`, 'Is this the main port of a registry?')
  const { message, hint } = refusal.data.error
  throw new RefusedError(message, hint ?? 'It takes an API token of scope admin: --token FILE.')
}

function parseJson(bytes: Buffer): unknown {
  try {
    return JSON.parse(bytes.toString())
  } catch {
    return undefined
  }
}

function describe(findings: readonly Finding[]): string {
  const width = Math.max(...findings.map(({ frontend }) => frontend.length))
  return findings
    .map(({ frontend, verdict, detail, advice }) => {
      const line = `${verdict.padEnd(8)} ${frontend.padEnd(width)}  ${detail}\n`
      return verdict === 'ok' || advice === undefined ? line : `${line}${' '.repeat(width + 11)}${advice}\n`
    })
    .join('')
}
