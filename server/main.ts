import { createLog } from '../lib/runtime/log.ts'
import { defaultPaths } from '../lib/runtime/paths.ts'
import { runDaemon } from '../lib/runtime/program.ts'
import { version } from '../lib/runtime/version.ts'
import { ServerConfig } from './config.ts'
import { startServer } from './server.ts'

/** `rackswarm-server`. */
export async function main(argv: string[]): Promise<void> {
  const log = createLog('rackswarm-server')
  await runDaemon(
    {
      name: 'rackswarm-server',
      version,
      schema: ServerConfig,
      defaultConfig: defaultPaths('server').config,
      start: async (config) => {
        log.level = config.log_level
        return startServer(config, { log, now: Date.now, random: Math.random })
      },
      started: (addresses) => {
        log.info({ version, ...addresses }, 'server is listening')
      },
    },
    argv,
  )
}
