import { createLog } from '../lib/runtime/log.ts'
import { defaultPaths } from '../lib/runtime/paths.ts'
import { runDaemon } from '../lib/runtime/program.ts'
import { version } from '../lib/runtime/version.ts'
import { ServerConfig } from './config.ts'
import type { Server } from './server.ts'
import { startServer } from './server.ts'

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
      start: async (config) => {
        log.level = config.log_level
        server = await startServer(config, { log, now: Date.now, random: Math.random })
        return server
      },
      reload: () => {
        server?.reload().then(
          () => {
            log.info('reloaded')
          },
          (error: unknown) => {
            log.error({ err: error }, 'reload failed; what was in force stays')
          },
        )
      },
      started: (addresses) => {
        log.info({ version, ...addresses }, 'server is listening')
      },
    },
    argv,
  )
}
