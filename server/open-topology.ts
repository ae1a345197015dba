import { resolve } from 'node:path'
import { ConfigError } from '../lib/runtime/config.ts'
import { versionOf } from '../lib/runtime/files.ts'
import type { Logger } from '../lib/runtime/log.ts'
import type { ServerConfig } from './config.ts'
import { topologyOf } from './config.ts'
import { readPlaceTable } from './tracker/place-table.ts'
import type { Topology, TopologyConfig } from './tracker/topology.ts'
import { createTopology } from './tracker/topology.ts'

export interface OpenedTopology {
  readonly topology: Topology
  /** The same as plain data, for the threads of the tracker. */
  readonly config: TopologyConfig
  /** The file of `topology.table`, and which version of it this is. */
  readonly table: { readonly file: string; readonly version: string } | undefined
}

/** Reads `topology.table`, if there is one; relative paths begin at `directory`. @throws ConfigError with all faults */
export async function openTopology(
  server: Pick<ServerConfig, 'topology'>,
  directory: string,
): Promise<OpenedTopology> {
  const { table: path, prefixes } = server.topology
  const file = path === undefined ? undefined : resolve(directory, path)
  // Before it is read: what is written meanwhile is another version.
  const table = file === undefined ? undefined : { file, version: await versionOf(file) }
  const config = topologyOf(server, file === undefined ? undefined : await readPlaceTable(file, prefixes))
  try {
    return { topology: createTopology(config), config, table }
  } catch (cause) {
    throw new ConfigError((cause as Error).message.split('\n'), { cause })
  }
}

/** Between two looks at the file of the table. It counts once two of them agree. */
const tablePollMs = 1000

/** Has `reopen` called when the file of the table has changed. One that cannot be used is logged, and the one before stays. */
export function watchTopologyTable(options: {
  readonly inForce: () => OpenedTopology
  /** Opens the topology of the configuration in force once more, and puts it in force. */
  readonly reopen: () => Promise<void>
  readonly log: Logger
}): Disposable {
  const { inForce, reopen, log } = options
  let looking = false
  let seen: string | undefined
  let tried: string | undefined
  const look = async () => {
    const { table } = inForce()
    if (looking || table === undefined) return
    looking = true
    const { file } = table
    try {
      const version = await versionOf(file)
      const isSettled = version === seen
      seen = version
      if (!isSettled || version === tried || version === table.version) return
      tried = version
      await reopen()
      log.info({ file }, 'topology table loaded')
    } catch (error) {
      log.error({ err: error, file }, 'topology table not loaded; the one before stays in force')
    } finally {
      looking = false
    }
  }
  const timer = setInterval(() => void look(), tablePollMs)
  timer.unref()
  return {
    [Symbol.dispose]: () => {
      clearInterval(timer)
    },
  }
}
