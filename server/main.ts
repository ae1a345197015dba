import { dirname, resolve } from 'node:path'
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
      start: async (config, _signal, file) => {
        log.level = config.log_level
        const directory = file === undefined ? undefined : dirname(resolve(file))
        server = await startServer(config, { log, now: Date.now, random: Math.random, directory })
        return server
      },
      reload: (next) => {
        const failed = (error: unknown) => {
          log.error({ err: error }, 'reload failed; what was in force stays')
        }
        if (next instanceof Error) {
          failed(next)
          return
        }
        log.level = next.log_level
        server?.reload(next).then((needRestart) => {
          log.info(needRestart.length > 0 ? { needRestart } : {}, 'reloaded')
        }, failed)
      },
      started: (addresses) => {
        log.info({ version, ...addresses }, 'server is listening')
      },
    },
    argv,
  )
}
