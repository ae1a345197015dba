import { copyFile } from 'node:fs/promises'
import { join } from 'node:path'
import {
  deployctlOk,
  fetchOn,
  refreshFile,
  removeAll,
  startFleetAgent,
  startFleetServer,
  writeRandomFile,
} from '../test/support/fleet.ts'
import type { BenchOptions, Benchmark, Side } from './harness.ts'

const mebibyte = 2 ** 20

/** How long a host waits for a build that its neighbour has. */
export const agentExposed: Benchmark = {
  name: 'agent-exposed',
  summary:
    'from the request on the socket of an agent to the exposed file, 1 MiB and 64 MiB from a host of the same rack',
  figures: [
    { name: 'request to exposed', unit: 'ms' },
    { name: 'the copy itself', unit: 'ms' },
  ],
  ignoresSize: true,
  prepare,
}

async function prepare(stack: AsyncDisposableStack, { directory }: BenchOptions): Promise<Side[]> {
  const server = stack.use(await startFleetServer(join(directory, 'server')))
  const start = (host: string) =>
    startFleetAgent(join(directory, host), server, {
      host,
      place: 'rack',
      extra: 'limits: { download: 100GiB, upload: 100GiB }\n',
    })
  const seeder = stack.use(await start('seeder'))
  const fetcher = stack.use(await start('fetcher'))
  let number = 0
  const side = async (mib: number): Promise<Side> => {
    const build = join(directory, `build-${mib}`)
    await writeRandomFile(build, mib * mebibyte)
    return {
      name: `${mib} MiB`,
      settings: `a build of ${mib} MiB, new each run, that another agent has; two agents and a server as processes, up for a while; limits lifted, SHA-256 included; beside it copyFile of the build on the same disk`,
      run: async () => {
        await refreshFile(build)
        const reference = `bench:${++number}`
        await deployctlOk(server, ['publish', build, reference])
        await fetchOn(seeder, reference)
        const { held, seconds } = await fetchOn(fetcher, reference)
        if (held.bytes.ownRack < mib * mebibyte) throw new Error('not all of it came from the other agent')
        const from = performance.now()
        await copyFile(build, `${build}-copy`)
        const copyMs = performance.now() - from
        await removeAll(`${build}-copy`)
        return { 'request to exposed': 1000 * seconds, 'the copy itself': copyMs }
      },
    }
  }
  return [await side(1), await side(64)]
}
