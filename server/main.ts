import { dirname, resolve } from 'node:path'
import { createLog } from '../lib/runtime/log.ts'
import { createRandom } from '../lib/runtime/random.ts'
import { defaultPaths } from '../lib/runtime/paths.ts'
import { loggedReload, runDaemon } from '../lib/runtime/program.ts'
import { version } from '../lib/runtime/version.ts'
import { ServerConfig } from './config.ts'
import { selftest } from './selftest.ts'
import type { Server } from './server.ts'
import { startServer } from './server.ts'
import { topologyCommand } from './topology-command.ts'

/** `rackswarm-server`. */
export async function main(argv: string[]): Promise<void> {
  const log = createLog('rackswarm-server')
  let server: Server | undefined
  await runDaemon(
    {
      name: 'rackswarm-server',
      version,
      schema: ServerConfig,
      defaultConfig: defaultPaths('server').config,
      start: async (config, signal, file) => {
        log.level = config.log_level
        const directory = file === undefined ? undefined : dirname(resolve(file))
        server = await startServer(config, {
          log,
          now: Date.now,
          random: createRandom(Math.random),
          directory,
          signal,
        })
        return server
      },
      reload: loggedReload(log, async (next: ServerConfig) => (await server?.reload(next)) ?? []),
      started: (addresses) => {
        log.info({ version, ...addresses }, 'server is listening')
      },
      commands: {
        selftest: {
          summary: 'ask the running server what a peer would ask, and say what is wrong',
          run: selftest,
        },
        topology: {
          summary:
            'say where addresses are by a configuration, for `deployctl topology`, which writes it for people',
          run: topologyCommand,
        },
      },
    },
    argv,
  )
}
