import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { after, before, test } from 'node:test'
import { TransferList } from '../../lib/client/api.ts'
import type { Transfer, TransferPeer } from '../../lib/client/api.ts'
import { createAgentClient } from '../../lib/client/agent-client.ts'
import type { FleetAgent, FleetServer } from '../support/fleet.ts'
import {
  bin,
  deployctl,
  deployctlOk,
  fetchOn,
  startFleetAgent,
  startFleetServer,
  writeRandomFile,
} from '../support/fleet.ts'
import { until } from '../support/until.ts'

const mebibyte = 1024 * 1024
const sizeBytes = 64 * mebibyte
/** So slow that the fetch lasts as long as all that is tested here. */
const limitBytesPerSecond = mebibyte

let directory = ''
let server: FleetServer
let seeder: FleetAgent
let fetcher: FleetAgent

before(async () => {
  directory = await mkdtemp(join(tmpdir(), 'rackswarm-transfers-'))
  server = await startFleetServer(directory)
  seeder = await startFleetAgent(join(directory, 'a1'), server, { host: 'a1', place: 'rack-1' })
  fetcher = await startFleetAgent(join(directory, 'a2'), server, {
    host: 'a2',
    place: 'rack-1',
    extra: 'limits: { download: 1MiB, fetches_max: 1 }\n',
  })
})

after(async () => {
  for (const started of [fetcher, seeder, server]) await started[Symbol.asyncDispose]()
  await rm(directory, { recursive: true, force: true })
})

test('transfers says that nothing is under way, and where there is no agent', async () => {
  const idle = await transfersOf(fetcher)
  assert.deepEqual([idle.code, idle.stdout], [0, ''])
  assert.match(idle.stderr, /^Nothing is fetched/)
  const json = await transfersOf(fetcher, '--json')
  assert.deepEqual(JSON.parse(json.stdout), { transferCount: 0, transfers: [] })
  const socketPath = join(directory, 'no-agent.sock')
  const absent = await transfersOf({ socketPath })
  assert.deepEqual([absent.code, absent.stdout], [1, ''])
  assert.match(
    absent.stderr,
    /^deployctl: Cannot reach .*no-agent\.sock: .*\nDoes an agent run on this host\?/,
  )
})

test('both ends of a slow fetch show its rates, its peers, and why one waits', async () => {
  const build = join(directory, 'build.tar')
  for (const name of ['slow:1', 'queued:1']) {
    await writeRandomFile(build, sizeBytes)
    await deployctlOk(server, ['publish', build, name])
  }
  await fetchOn(seeder, 'slow:1')
  void fetchOn(fetcher, 'slow:1').catch(() => undefined)
  await using here = createAgentClient({ socketPath: fetcher.socketPath })
  await using there = createAgentClient({ socketPath: seeder.socketPath })

  const { transfer: fetching, peer: from } = await seen(
    here,
    (transfer, peer) => transfer.state === 'fetching' && transfer.downloadRate > 0 && peer.downloadRate > 0,
  )
  assert.deepEqual([fetching.repository, fetching.sizeBytes, fetching.peerCount], ['slow', sizeBytes, 1])
  assert.deepEqual([from.host, from.place, from.distance, from.progress], ['a1', 'rack-1', 0, 1])
  const measured = await steadyRate(here)
  assert.ok(
    measured > limitBytesPerSecond / 2 && measured < 2 * limitBytesPerSecond,
    `${measured} B/s with a limit of ${limitBytesPerSecond}`,
  )
  await seen(here, (_, peer) => peer.waiting === 'the download limit' && peer.requestedBytes === 0)
  await seen(here, (_, peer) => peer.waiting === undefined && peer.requestedBytes > 0)

  const { transfer: seeding, peer: to } = await seen(
    there,
    (transfer, peer) => transfer.state === 'seeding' && transfer.uploadRate > 0 && peer.uploadRate > 0,
  )
  assert.deepEqual([seeding.digest, seeding.bytesDone, seeding.downloadRate], [fetching.digest, sizeBytes, 0])
  assert.deepEqual([to.host, to.place], ['a2', 'rack-1'])
  assert.ok(to.progress < 1)

  void fetchOn(fetcher, 'queued:1').catch(() => undefined)
  await until('a second fetch', async () => (await here.transfers()).transferCount === 2)
  const [, queued] = (await here.transfers()).transfers
  assert.deepEqual(
    [queued?.repository, queued?.state, queued?.reason, queued?.peers],
    ['queued', 'waiting', 'other fetches are under way', []],
  )

  const { code, stdout } = await transfersOf(fetcher)
  assert.equal(code, 0)
  const [slow = '', second = ''] = stdout.split('\n\n')
  assert.match(
    slow,
    /^slow sha256:\w{64}\nfetching, \d+% of 64\.0 MiB, [\d.]+ [KM]?i?B\/s down, 0 B\/s up\nso far [1-9].* from this rack, 0 B from others, .* from the server\n/,
  )
  assert.match(
    slow,
    /^a1\track-1\town rack\t100%\t[\d.]+ [KM]iB\/s\t0 B\/s\t[\d.]+ \w+\t0 B\t(the download limit)?$/m,
  )
  assert.match(
    second,
    /^queued sha256:\w{64}\nwaiting, 0% of .*\nso far .*\nwaits: other fetches are under way\nno peers are connected\n$/,
  )
})

test('--watch lists them again and again, until it is interrupted', async () => {
  const child = spawn(process.execPath, [bin('deployctl'), 'transfers', '--watch', '--json'], {
    stdio: ['ignore', 'pipe', 'inherit'],
    env: { ...process.env, DEPLOYCTL_SOCKET: seeder.socketPath },
  })
  const ended = once(child, 'close', { signal: AbortSignal.timeout(20_000) })
  try {
    const lists: TransferList[] = []
    for await (const line of createInterface({ input: child.stdout, signal: AbortSignal.timeout(20_000) })) {
      lists.push(TransferList.parse(JSON.parse(line)))
      if (lists.length === 2) child.kill('SIGINT')
    }
    assert.equal(lists.length, 2)
    assert.deepEqual(
      lists.map(({ transfers }) => transfers[0]?.repository),
      ['slow', 'slow'],
    )
    assert.deepEqual(await ended, [130, null])
  } finally {
    child.kill('SIGKILL')
  }
})

async function transfersOf({ socketPath }: Pick<FleetAgent, 'socketPath'>, ...args: string[]) {
  return deployctl(server, ['transfers', ...args], { env: { DEPLOYCTL_SOCKET: socketPath } })
}

interface Client {
  transfers(): Promise<TransferList>
}

/** Waits for a peer that a test wants to see. */
async function seen(client: Client, isWanted: (transfer: Transfer, peer: TransferPeer) => boolean) {
  return until(String(isWanted), async () => {
    for (const transfer of (await client.transfers()).transfers)
      for (const peer of transfer.peers) if (isWanted(transfer, peer)) return { transfer, peer }
    return undefined
  })
}

/** The mean of what is told as the rate of the first transfer over some seconds. */
async function steadyRate(client: Client): Promise<number> {
  const rates: number[] = []
  const endsAt = Date.now() + 4000
  await until('some seconds of rates', async () => {
    rates.push((await client.transfers()).transfers[0]?.downloadRate ?? 0)
    return Date.now() > endsAt
  })
  return rates.reduce((total, rate) => total + rate, 0) / rates.length
}
