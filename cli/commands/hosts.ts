import type { Command } from 'commander'
import type { Context, WithContext } from '../context.ts'

/** `hosts`, `hosts revoke` and `hosts forget`. */
export function registerHosts(program: Command, contextOf: WithContext): void {
  const hosts = program
    .command('hosts')
    .description('list enrolled hosts')
    .option('--json', 'print JSON')
    .action(async (_options: unknown, command: Command) => {
      await runHosts(contextOf(command))
    })
  hosts
    .command('revoke')
    .description('end the credential of a host, at once; what it has on disk stays')
    .argument('<host>', 'as `hosts` shows it')
    .option('--json', 'print JSON')
    .action(async (host: string, _options: unknown, command: Command) => {
      const context = contextOf(command)
      await using connection = await context.connect()
      await connection.api.revokeHost(host)
      context.out.done({ host, revoked: true }, `Revoked ${host}`)
    })
  hosts
    .command('forget')
    .description('let a host that was revoked enrol again under its name')
    .argument('<host>', 'as `hosts` shows it')
    .option('--json', 'print JSON')
    .action(async (host: string, _options: unknown, command: Command) => {
      const context = contextOf(command)
      await using connection = await context.connect()
      await connection.api.forgetHost(host)
      context.out.done({ host, forgotten: true }, `Forgot ${host}`)
    })
}

async function runHosts(context: Context): Promise<void> {
  const { out } = context
  await using connection = await context.connect()
  const { hosts } = await connection.api.hosts()
  out.result({ hosts }, () =>
    out.table(
      ['HOST', 'RACK', 'ADDRESS', 'LAST HEARD', 'AGENT', ''],
      hosts.map(({ host, place, address, seenAt, agentVersion, revoked }) => [
        host,
        place,
        address ?? '-',
        seenAt ?? 'never',
        agentVersion ?? '-',
        revoked ? 'revoked' : '',
      ]),
    ),
  )
}
