import { setFlagsFromString } from 'node:v8'
import { createLog } from '../lib/runtime/log.ts'
import { defaultPaths } from '../lib/runtime/paths.ts'
import { loggedReload, runDaemon } from '../lib/runtime/program.ts'
import { version } from '../lib/runtime/version.ts'
import type { Agent } from './agent.ts'
import { startAgent } from './agent.ts'
import { AgentConfig } from './config.ts'
import { mirrorCommand } from './mirror/mirror-command.ts'

/** `rackswarm-agent`. */
export async function main(argv: string[]): Promise<void> {
  // The space of new objects would grow to 96 MiB, and stay so: pieces do not lie there, and the little that does is gone at once.
  setFlagsFromString('--semi-space-growth-factor=1')
  const log = createLog('rackswarm-agent')
  const bootstrapToken = process.env['RACKSWARM_BOOTSTRAP_TOKEN']
  // Children and core dumps need not know it.
  delete process.env['RACKSWARM_BOOTSTRAP_TOKEN']
  let agent: Agent | undefined
  await runDaemon(
    {
      name: 'rackswarm-agent',
      version,
      schema: AgentConfig,
      defaultConfig: defaultPaths('agent').config,
      start: async (config) => {
        log.level = config.log_level
        agent = await startAgent(config, {
          log,
          now: Date.now,
          monotonic: () => performance.now(),
          random: Math.random,
          bootstrapToken,
        })
        return agent
      },
      reload: loggedReload(log, (next: AgentConfig) => agent?.reload(next) ?? []),
      started: (addresses) => {
        log.info({ version, ...addresses }, 'agent is running')
      },
      commands: {
        mirror: {
          summary: 'have containerd, podman and docker of this host pull through the agent, or undo that',
          run: mirrorCommand,
        },
      },
    },
    argv,
  )
}
