// A large image through two hosts' mirrors, beside pulls from the registry itself. `npm run soak -- mirror [MIB]` (default: 1024). Needs root and Debian's
// containerd and skopeo.
import assert from 'node:assert/strict'
import { mkdtemp, readFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Containerd } from '../support/containerd.ts'
import { startContainerd } from '../support/containerd.ts'
import { removeAll, startFleetServer } from '../support/fleet.ts'
import { writeIndexImage } from '../support/image.ts'
import { pushImage, startMirrorHost, untilSeeders } from '../support/mirror.ts'
import { installTools } from '../support/tools.ts'

/** @throws AssertionError when a client has something else than what was pushed */
export async function pullLargeImage(mebibytes: number, say: (line: string) => void): Promise<void> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-mirror-soak-'))
  await using started = new AsyncDisposableStack()
  started.defer(() => removeAll(directory))
  const server = started.use(await startFleetServer(directory, { settings: 'min_announce_interval: 1s\n' }))
  const layout = join(directory, 'image')
  const image = await writeIndexImage(layout, [
    { architecture: 'amd64', layerBytes: mebibytes * 1024 * 1024 },
  ])
  const reference = await pushImage(server, layout, 'team/large')
  const admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
  const one = started.use(await startMirrorHost(join(directory, 'a1'), server, { host: 'a1' }))
  const two = started.use(await startMirrorHost(join(directory, 'a2'), server, { host: 'a2' }))
  const pull = async (name: string, options: Parameters<Containerd['fetch']>[1]) => {
    await using client = await startContainerd(join(directory, name))
    const startedAt = performance.now()
    await client.fetch(reference, options)
    say(`${name}: ${((performance.now() - startedAt) / 1000).toFixed(2)} s`)
    for (const sha256 of image.blobs) assert.equal(await client.contentOf(sha256), sha256)
    await removeAll(join(directory, name))
  }
  const plain = { hostsDirectory: join(directory, 'none'), user: `token:${admin}` }
  // The first pull of all warms what both ways use.
  await pull('warming', plain)
  await pull('from the registry', plain)
  await pull('through the mirror of the first host', one)
  await untilSeeders(server, 1)
  await pull('through the mirror of the second host', two)
  await pull('again, from the second host’s cache', two)
  assert.equal(await two.metric('rackswarm_agent_received_bytes_total{source="webseed"}'), 0)
}

if (import.meta.main) {
  installTools(['containerd', 'skopeo'])
  await pullLargeImage(Number(process.argv[2] ?? 1024), (line) => {
    process.stdout.write(`${line}\n`)
  })
}
