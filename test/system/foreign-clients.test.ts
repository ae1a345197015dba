import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { copyFile, mkdir, mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { withDeadline } from '../agent/engine/fixtures.ts'
import type { FleetServer } from '../support/fleet.ts'
import { deployctlOk, fetchOn, startFleetAgent, startFleetServer, writeRandomFile } from '../support/fleet.ts'
import type { ForeignSeeder } from '../support/foreign.ts'
import {
  fetchWithAria2,
  fetchWithLibtorrent,
  startAria2Seeder,
  startLibtorrentSeeder,
} from '../support/foreign.ts'
import { until } from '../support/until.ts'

const sizeBytes = 24 * 1024 * 1024 + 12_345

const fetchers = { aria2: fetchWithAria2, libtorrent: fetchWithLibtorrent }
const seeders = { aria2: startAria2Seeder, libtorrent: startLibtorrentSeeder }

for (const client of ['aria2', 'libtorrent'] as const) {
  test(`${client} downloads a .torrent of deployctl from an agent, webseed switched off`, async (t) => {
    const { server, directory, torrent, sha256 } = await publishedBuild(t)
    const agent = await startFleetAgent(join(directory, 'agent'), server, {
      host: 'h1',
      place: 'a',
      extra: 'peers: any\n',
    })
    t.after(() => agent[Symbol.asyncDispose]())
    await fetchOn(agent, 'web:1')
    const home = join(directory, 'foreign')
    await mkdir(home)
    const { child, done } = await fetchers[client](home, torrent)
    t.after(() => child.kill('SIGKILL'))
    await withDeadline(done, () => `the download by ${client}`, 60)
    assert.equal(await sha256Of(join(home, sha256)), sha256)
  })

  test(`an agent downloads from ${client}, without a byte from the webseed`, async (t) => {
    const { server, directory, torrent, sha256, build } = await publishedBuild(t)
    const home = join(directory, 'foreign')
    await mkdir(home)
    await copyFile(build, join(home, sha256))
    const foreign = await seeders[client](home, torrent)
    t.after(() => foreign[Symbol.asyncDispose]())
    await untilSeederIsKnown(server, foreign)
    const agent = await startFleetAgent(join(directory, 'agent'), server, {
      host: 'h1',
      place: 'a',
      extra: 'peers: any\n',
    })
    t.after(() => agent[Symbol.asyncDispose]())
    const { held, files } = await fetchOn(agent, 'web:1')
    assert.equal(held.bytes.webseed, 0)
    assert.ok(held.bytes.ownRack + held.bytes.otherRacks >= sizeBytes)
    assert.equal(await sha256Of(files[0]?.path ?? ''), sha256)
  })
}

async function publishedBuild(t: TestContext) {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-foreign-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const server = await startFleetServer(directory, { settings: 'min_announce_interval: 1s\n' })
  t.after(() => server[Symbol.asyncDispose]())
  const build = join(directory, 'build.tar')
  const sha256 = await writeRandomFile(build, sizeBytes)
  await deployctlOk(server, ['publish', build, 'web:1'])
  const torrent = join(directory, 'build.torrent')
  await deployctlOk(server, ['torrent', 'web:1', '--output', torrent, '--no-webseed'])
  return { directory, server, build, sha256, torrent }
}

/** The tracker's own totals say when the seeder's announce has arrived. */
async function untilSeederIsKnown(server: FleetServer, seeder: ForeignSeeder): Promise<void> {
  await until(`process ${seeder.pid} has announced`, async () => {
    const { seeders } = (await (await fetch(`${server.metricsUrl}/stats.json`)).json()) as {
      seeders: number
    }
    return seeders > 0
  })
}

async function sha256Of(file: string): Promise<string> {
  return createHash('sha256')
    .update(await readFile(file))
    .digest('hex')
}
