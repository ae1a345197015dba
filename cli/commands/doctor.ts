import { randomBytes } from 'node:crypto'
import type { Command } from 'commander'
import type { ServerInfo } from '../../lib/client/api.ts'
import { parseAnnounceReply, writeAnnounce } from '../../lib/protocol/announce.ts'
import { infoHashFromHex } from '../../lib/protocol/infohash.ts'
import type { Connection, Context, ServerConnection, WithContext } from '../context.ts'
import { exitCodes, failureOf } from '../failure.ts'
import type { Output } from '../output.ts'
import { formatDuration } from '../output.ts'

type Verdict = 'ok' | 'warn' | 'fail'

interface Finding {
  readonly check: string
  readonly verdict: Verdict
  readonly detail: string
  /** What to do, where it is not ok. */
  readonly advice?: string | undefined
}

/** Clocks further apart than this are worth a word; tokens tolerate two minutes. */
const clockWarnMs = 10_000
const clockFailMs = 120_000
const reportStaleMs = 60_000

export function registerDoctor(program: Command, contextOf: WithContext): void {
  program
    .command('doctor')
    .description(
      'look at all that is between this host and a deploy: configuration, server, keys, clock, tracker, agent',
    )
    .option('--json', 'print JSON')
    .action(async (_options: unknown, command: Command) => {
      await runDoctor(contextOf(command))
    })
}

/** Runs every check that can run; exit code 1 where one failed. */
export async function runDoctor(context: Context): Promise<void> {
  const findings: Finding[] = []
  const connection = await attempt(findings, 'configuration', () => context.resolve(), describeConnection)
  if (connection) await checkServer(findings, context)
  await checkAgent(findings, context)
  const failed = findings.some(({ verdict }) => verdict === 'fail')
  context.out.result({ ok: !failed, findings }, () =>
    findings.map((finding) => describeFinding(finding, context.out)).join(''),
  )
  if (failed) process.exitCode = exitCodes.failure
}

async function checkServer(findings: Finding[], context: Context): Promise<void> {
  await using connection = await context.connect({ anonymous: true })
  const info = await attempt(findings, 'server and token', () => connection.api.serverInfo(), describeServer)
  await attempt(
    findings,
    'keys',
    () => connection.api.jwks(),
    ({ keys }) =>
      keys.length > 0
        ? { verdict: 'ok', detail: `${keys.length} public key${keys.length === 1 ? '' : 's'} published` }
        : {
            verdict: 'fail',
            detail: 'no public key is published',
            advice: 'Look at data_dir/keys of the server.',
          },
  )
  if (!info) return
  findings.push(checkClock(info, context.now()), ...checkParts(info))
  if (info.roles.includes('tracker') && info.caller.scopes.includes('admin'))
    await checkTracker(findings, connection)
  else
    findings.push({
      check: 'tracker',
      verdict: 'warn',
      detail: 'not asked',
      advice: 'The canary announce needs a token with the scope admin.',
    })
}

/** A canary: an infohash that nobody has, announced with a good token, then with a bad one. Then it leaves the swarm. */
async function checkTracker(findings: Finding[], { api }: ServerConnection): Promise<void> {
  const infoHash = infoHashFromHex(randomBytes(20).toString('hex'))
  const query = (jwt: string, event: 'started' | 'stopped') =>
    writeAnnounce({
      infoHash,
      peerId: Buffer.from('-RS0000-doctorcanary'),
      port: 9,
      uploaded: 0,
      downloaded: 0,
      left: 1,
      numwant: 0,
      event,
      jwt,
    })
  const good = await attempt(
    findings,
    'tracker, good token',
    async () => {
      const { token } = await api.announceToken({ infohash: infoHash, ttlSeconds: 60 })
      parseAnnounceReply(await api.announce(query(token, 'started')))
      return token
    },
    () => ({ verdict: 'ok', detail: 'a canary was announced' }),
  )
  if (good === undefined) return
  await api.announce(query(good, 'stopped'))
  const tampered = `${good.slice(0, -8)}${good.endsWith('AAAAAAAA') ? 'BBBBBBBB' : 'AAAAAAAA'}`
  const refusal = await api.announce(query(tampered, 'started')).then(
    (bytes) => {
      try {
        parseAnnounceReply(bytes)
        return undefined
      } catch (error) {
        return (error as Error).message
      }
    },
    (error: unknown) => (error as Error).message,
  )
  findings.push(
    refusal === 'unapproved request: invalid jwt'
      ? { check: 'tracker, bad token', verdict: 'ok', detail: 'refused, as it should be' }
      : {
          check: 'tracker, bad token',
          verdict: 'fail',
          detail: refusal === undefined ? 'a forged token was accepted' : `unexpected answer: ${refusal}`,
          advice: 'Anyone can join your swarms unless tracker.approval is token.',
        },
  )
}

async function checkAgent(findings: Finding[], context: Context): Promise<void> {
  await using agent = context.agent()
  const status = await attempt(
    findings,
    'agent',
    () => agent.status(),
    ({ host, place, references }) => ({
      verdict: 'ok',
      detail: `${host} in ${place ?? 'a place the server decides'}, ${references.length} reference${references.length === 1 ? '' : 's'}`,
    }),
    'warn',
  )
  if (!status) return
  const ageMs =
    status.lastReportAt === undefined ? undefined : context.now() - Date.parse(status.lastReportAt)
  findings.push(
    ageMs !== undefined && ageMs < reportStaleMs
      ? { check: 'agent report', verdict: 'ok', detail: `${formatDuration(ageMs)} ago` }
      : {
          check: 'agent report',
          verdict: 'fail',
          detail: `${ageMs === undefined ? 'never' : `${formatDuration(ageMs)} ago`}${status.lastReportError === undefined ? '' : `: ${status.lastReportError}`}`,
          advice: `The agent cannot report to ${status.server}: check the network, its certificate and its credential.`,
        },
  )
  for (const { reference, state, reason } of status.references) {
    if (state === 'failed')
      findings.push({ check: `release ${reference}`, verdict: 'fail', detail: reason ?? 'failed' })
  }
}

function checkClock({ serverTime }: ServerInfo, nowMs: number): Finding {
  const differenceMs = Math.abs(Date.parse(serverTime) - nowMs)
  const verdict = differenceMs > clockFailMs ? 'fail' : differenceMs > clockWarnMs ? 'warn' : 'ok'
  return {
    check: 'clock',
    verdict,
    detail: `${formatDuration(differenceMs)} from the server's`,
    advice:
      verdict === 'ok'
        ? undefined
        : 'Set the clock (NTP): tokens are refused when clocks differ by more than two minutes.',
  }
}

/** What the server says of its own parts, such as its way to Redis. */
function checkParts({ checks = {} }: ServerInfo): Finding[] {
  return Object.entries(checks)
    .filter(([, result]) => result !== 'ok')
    .map(([part, result]) => ({
      check: `server, ${part}`,
      verdict: result.startsWith('degraded: ') ? 'warn' : 'fail',
      detail: result,
      advice: `See docs/operations.md, "What each failure looks like"; the log of the server says more.`,
    }))
}

type Judgement = Omit<Finding, 'check'>

async function attempt<Value>(
  findings: Finding[],
  check: string,
  work: () => Promise<Value>,
  judge: (value: Value) => Judgement,
  verdict: Verdict = 'fail',
): Promise<Value | undefined> {
  try {
    const value = await work()
    findings.push({ check, ...judge(value) })
    return value
  } catch (error) {
    const { message, hint } = failureOf(error)
    findings.push({ check, verdict, detail: message, advice: hint })
    return undefined
  }
}

function describeConnection({ server, token, source }: Connection): Judgement {
  if (token === undefined)
    return { verdict: 'fail', detail: `${server}, but no token for it`, advice: 'Run `deployctl login URL`.' }
  return { verdict: 'ok', detail: `${server}, from ${source}` }
}

function describeServer({ version, roles, caller }: ServerInfo): Judgement {
  return {
    verdict: 'ok',
    detail: `version ${version}, ${roles.join(' and ')}; you are ${caller.name} (${caller.scopes.join(', ')})`,
  }
}

const colours = { ok: 'green', warn: 'yellow', fail: 'red' } as const

function describeFinding({ check, verdict, detail, advice }: Finding, { paint }: Output): string {
  const line = `${paint(colours[verdict], verdict.padEnd(5))} ${check.padEnd(20)} ${detail}\n`
  return verdict === 'ok' || advice === undefined ? line : `${line}${' '.repeat(27)}${advice}\n`
}
