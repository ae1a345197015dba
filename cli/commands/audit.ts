import type { Command } from 'commander'
import { AuditLine } from '../../lib/client/api.ts'
import { createChainCheck } from '../../lib/protocol/audit-chain.ts'
import type { Context, ServerConnection, WithContext } from '../context.ts'
import { Failure, exitCodes } from '../failure.ts'
import { parseDurationMs } from '../words.ts'

/** `audit`: who did what. */
export function registerAudit(program: Command, contextOf: WithContext): void {
  program
    .command('audit')
    .description('show who published, deleted, made and ended tokens, keys and hosts; oldest first')
    .option('--since <time>', 'from a time (2026-01-31T12:00:00Z), or for so long: 1h, 7d', '1d')
    .option('--verify', 'check that no line of the whole log was changed or removed')
    .option('--json', 'print JSON, one line each')
    .action(async (options: { since: string; verify?: boolean }, command: Command) => {
      const context = contextOf(command)
      if (options.verify === true) await runVerify(context)
      else await runAudit(options, context)
    })
}

async function runAudit({ since }: { since: string }, context: Context): Promise<void> {
  const { out } = context
  const from = sinceTime(since, context.now())
  await using connection = await context.connect()
  const logs = await logsOf(connection, from)
  let shown = 0
  for await (const text of byTime(logs.map((log) => log.lines))) {
    shown++
    const line = parseLine(text)
    out.result(line, () => out.table([], [rowOf(line)]))
  }
  if (shown === 0) out.note(`Nothing since ${from}`)
}

/** The chain of each server is checked here: the server's word is not needed for it. */
async function runVerify(context: Context): Promise<void> {
  await using connection = await context.connect()
  for (const log of await logsOf(connection, undefined)) {
    const { lines, first, head } = await verify(log)
    const { server } = log
    const name = server === undefined ? '' : `${server}: `
    context.out.result({ server, lines, first, last: head?.seq, hash: head?.hash }, () =>
      head
        ? `${name}${lines} lines hold together, from ${first ?? 0} to ${head.seq}\n${name}hash ${head.hash}\n`
        : `${name}There are no lines\n`,
    )
  }
  context.out.note(
    'Note the last number and its hash elsewhere: they show later whether lines were cut off the end.',
  )
}

async function verify({ server, lines: texts }: Log) {
  const check = createChainCheck()
  const faults: string[] = []
  let lines = 0
  let first: number | undefined
  for await (const text of texts) {
    lines++
    const fault = check.follow(text)
    if (fault !== undefined) faults.push(fault)
    first ??= check.head?.seq
  }
  if (faults.length > 0)
    throw new Failure(
      exitCodes.verification,
      `The audit log${server === undefined ? '' : ` of ${server}`} was tampered with or damaged: ${faults.slice(0, 10).join('; ')}`,
      { hint: 'Compare audit.log in the data_dir of the server with a backup of it.' },
    )
  return { lines, first, head: check.head }
}

interface Log {
  /** Several servers have a log each; one alone has one without a name. */
  readonly server: string | undefined
  readonly lines: AsyncGenerator<string>
}

async function logsOf({ api }: ServerConnection, since: string | undefined): Promise<Log[]> {
  const first = await api.audit({ after: 0, since })
  async function* linesOf(log: string | undefined, begin?: typeof first) {
    for (let page = begin ?? (await api.audit({ after: 0, since, log })); ;) {
      yield* page.lines
      if (page.next === undefined) return
      page = await api.audit({ after: page.next, since, log })
    }
  }
  return first.logs
    ? first.logs.map((server) => ({ server, lines: linesOf(server) }))
    : [{ server: undefined, lines: linesOf(undefined, first) }]
}

/** Lines of several logs, each in the order of its own, as they came one after the other by what the servers say. */
async function* byTime(logs: readonly Log['lines'][]): AsyncGenerator<string> {
  const heads: { text: string; time: string; log: Log['lines'] }[] = []
  const pull = async (log: Log['lines']) => {
    const next = await log.next()
    if (next.done === true) return
    heads.push({ text: next.value, time: logs.length > 1 ? parseLine(next.value).time : '', log })
  }
  for (const log of logs) await pull(log)
  for (;;) {
    heads.sort((a, b) => (a.time < b.time ? -1 : a.time > b.time ? 1 : 0))
    const first = heads.shift()
    if (!first) return
    yield first.text
    await pull(first.log)
  }
}

function parseLine(text: string): AuditLine {
  try {
    return AuditLine.parse(JSON.parse(text))
  } catch (cause) {
    throw new Failure(
      exitCodes.verification,
      `There is a line that is none of an audit log: ${text.slice(0, 80)}`,
      {
        cause,
        hint: '`deployctl audit --verify` checks all of it.',
      },
    )
  }
}

function rowOf({ time, who, address, action, target, outcome, details }: AuditLine): string[] {
  const more = Object.entries(details ?? {}).map(([name, value]) => `${name}=${JSON.stringify(value)}`)
  return [
    time,
    `${who.kind}:${who.name}`,
    address ?? '-',
    action,
    target,
    [...(outcome === 'failed' ? ['failed'] : []), ...more].join(' '),
  ]
}

/** @throws Failure for what is neither a time nor a duration */
function sinceTime(text: string, nowMs: number): string {
  const time = /^\d{4}-/.test(text) ? Date.parse(text) : nowMs - parseDurationMs(text)
  if (Number.isNaN(time))
    throw new Failure(
      exitCodes.usage,
      `Cannot use --since ${text}: need a time such as 2026-01-31T12:00:00Z, or 7d`,
    )
  return new Date(time).toISOString()
}
